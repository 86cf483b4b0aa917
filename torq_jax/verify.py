"""Is a checkpoint what was converted, and sound?

    python -m torq_jax.verify DIR                    # files, shapes, scales, values, rotations
    python -m torq_jax.verify DIR --text FILE        # and the perplexity that its report states

One line a check; the exit status is 1 where one fails. Every check is made, whatever failed before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from torq_jax import checkpoint, evaluate, rotation
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.decoder import Formats, SiteFormat
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import SCALE_NAN
from torq_jax.rotation import TwoLevelRotation
from torq_jax.tasks import Progress, ProgressLine

ORTHOGONAL = ("none", "hadamard", "random", "full_hadamard", "torq")
"""Methods whose matrices are rotations; the others' are invertible."""
STATED = 1e-3
"""Relative difference from the report up to which a condition number is the one written there: computed from the same
numbers, by a LAPACK that may be another."""
FLOAT_NATS, ROUNDED_NATS = 1e-3, 0.05
"""Difference from the report's mean loss, in nats a token, with activations in float and in four bits: of the latter,
values on a rounding boundary go to either side (see docs/evaluation.md)."""
_E4M3_NAN = 0x7F  # magnitude bits


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    detail: str
    """What was found, or what is wrong and where."""
    passed: bool


def verify(
    directory: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Iterator[Check]:
    """Check a checkpoint, piece by piece: in memory is one layer, and with a text the model.

    Args:
      directory: what the converter wrote.
      text: the file that the report's perplexity was measured on.
      progress: makes what is told how far a check has come.

    Yields:
      Each outcome as it is known.

    Raises:
      TorqError: there is no checkpoint of this project, or its manifest cannot be understood.
    """
    directory = Path(directory)
    manifest = checkpoint.read_manifest(directory)
    try:
        config = DecoderConfig.from_json(manifest["config"])
        formats = checkpoint.layer_formats(config, manifest)
        settings = dict(manifest["settings"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TorqError(
            f"{directory / checkpoint.MANIFEST} is damaged: {type(error).__name__}: {error}"
        ) from error
    show = progress or (lambda name: lambda done, total: None)
    yield _files(directory, manifest, show("files"))
    report = _report(directory)
    yield from _parameters(directory, config, formats, settings, report, show("parameters"))
    if text is not None:
        yield _perplexity(directory, Path(text), settings, report)


def _files(directory: Path, manifest: Mapping[str, Any], progress: Progress) -> Check:
    """Every file is there with its hash, and no others lie among them."""
    listed, wrong = dict(manifest.get("files", {})), []
    for done, name in enumerate(sorted(listed), 1):
        try:
            checkpoint.check_files(directory, manifest, name)
        except (TorqError, OSError) as error:
            wrong.append(str(error))
        progress(done, len(listed))
    there = {
        file.relative_to(directory).as_posix()
        for part in ("layers", "outer", "tokenizer")
        for file in (directory / part).rglob("*")
        if not file.is_dir()
    }
    wrong += [f"{directory / name} is not the manifest's" for name in sorted(there - listed.keys())]
    return _check("files", wrong, f"{len(listed)} have the manifest's sha256, and there are no others")


def _report(directory: Path) -> dict[str, Any] | None:
    """The report, which no hash covers; None where there is none, or none that can be read."""
    try:
        found = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _parameters(
    directory: Path,
    config: DecoderConfig,
    formats: list[Formats],
    settings: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    progress: Progress,
) -> Iterator[Check]:
    """Shapes and types, codes and scales, finite values, and rotations, of all layers and what is outside them."""
    shapes: list[str] = []
    codes: list[str] = []
    values: list[str] = []
    turns: list[str] = []
    stated = {
        (site["layer"], site["site"]): site["condition_number"]
        for site in (report or {}).get("sites", [])
        if {"layer", "site", "condition_number"} <= site.keys()
    }
    rotations, blocks, worst = 0, 0, 0.0
    names = ("embed", "norm") if config.tie_embeddings else ("embed", "norm", "lm_head")
    total = config.num_layers + len(names)
    orthogonal = _orthogonal(settings)
    for index, own in enumerate(formats):
        piece = f"layers/{index:05d}"
        try:
            layer = checkpoint.restore(directory / piece)
        except TorqError as error:
            shapes.append(str(error))
            continue
        found = {f"{piece} {name}": array for name, array in _flat(layer)}
        wrong = checkpoint.misfits(layer, checkpoint.layer_shapes(config, own), f"{piece} ")
        shapes += wrong
        values += _infinite(found)
        if not wrong:
            for site in SITES:
                bad, count = _illegal_codes(f"{piece} {site}", layer[site], own[site])
                codes, blocks = codes + bad, blocks + count
                transform = _transform(layer[site], own[site], config.site_in_features(site))
                if transform is not None:
                    rotations += 1
                    text, size = _turn(transform, orthogonal, stated.get((index, site)))
                    worst = max(worst, size)
                    turns += [f"{piece} {site}: {text}"] if text else []
        progress(index + 1, total)
    for done, name in enumerate(names, config.num_layers + 1):
        shape = (config.hidden_size,) if name == "norm" else (config.vocab_size, config.hidden_size)
        try:
            outer = checkpoint.restore(directory / "outer" / name)
        except TorqError as error:
            shapes.append(str(error))
        else:
            found = {f"outer/{key}": array for key, array in outer.items()}
            shapes += checkpoint.misfits(outer, {name: jax.ShapeDtypeStruct(shape, np.float32)}, "outer/")
            values += _infinite(found)
        progress(done, total)
    yield _check(
        "shapes", shapes, f"{config.num_layers} layers and {', '.join(names)} are as the config says"
    )
    yield _check("codes", codes, f"{blocks} blocks, no scale and no code of them a NaN")
    yield _check("values", values, "all floats are finite")
    what = "orthogonality error at most" if orthogonal else "condition number at most"
    detail = f"{rotations} run online, {what} {worst:.3g}" if rotations else "none runs online"
    if rotations and not orthogonal:
        detail += ", each as in the report" if stated else "; there is no report to compare with"
    yield _check("rotations", turns, detail)


def _infinite(found: Mapping[str, np.ndarray]) -> list[str]:
    return [
        f"{name} has {np.count_nonzero(bad)} of {bad.size} values that are not finite"
        for name, array in found.items()
        if array.dtype != np.uint8 and (bad := ~np.isfinite(array.astype(np.float32))).any()
    ]


def _illegal_codes(name: str, site: Mapping[str, np.ndarray], form: SiteFormat) -> tuple[list[str], int]:
    """Blocks whose scale (E8M0's 255) or, in E4M3, any code is a NaN; and how many blocks there are."""
    if form.weights == "float":
        return [], 0
    wrong, blocks = [], 0
    for weight in SITE_WEIGHTS[name.rsplit(" ", 1)[1]]:
        scales, codes = site[f"{weight}_scales"], site[f"{weight}_codes"]
        blocks += scales.size
        nans = int(np.count_nonzero(scales == SCALE_NAN))
        if nans:
            wrong.append(f"{name}.{weight}_scales has {nans} of {scales.size} that are {SCALE_NAN}, a NaN")
        nans = int(np.count_nonzero(codes & 0x7F == _E4M3_NAN)) if form.weights == "mxfp8" else 0
        if nans:
            wrong.append(f"{name}.{weight}_codes has {nans} of {codes.size} that are NaN in E4M3")
    return wrong, blocks


def _transform(site: Mapping[str, Any], form: SiteFormat, features: int) -> TwoLevelRotation | None:
    if not form.rotated:
        return None
    return TwoLevelRotation(site.get("inter"), site.get("intra"), form.stored_features(features))


def _orthogonal(settings: Mapping[str, Any]) -> bool:
    """Whether the settings promise rotations, with nothing folded into them that is none."""
    if settings.get("prescale"):
        return False
    options = dict(settings.get("options", ()))
    return settings.get("method") in ORTHOGONAL or bool(options.get("orthogonal_only"))


def _turn(transform: TwoLevelRotation, orthogonal: bool, stated: float | None) -> tuple[str, float]:
    """What is wrong with a transform, and its orthogonality error or condition number."""
    if orthogonal:
        error = rotation.orthogonality_error(transform)
        limit = rotation.orthogonality_tolerance(transform)
        return "" if error <= limit else f"orthogonality error {error:.3g}, more than {limit:.3g}", error
    try:
        condition = rotation.condition_number(transform)
    except np.linalg.LinAlgError:  # a NaN in it
        return "has no condition number", math.inf
    if not math.isfinite(condition):
        return "is not invertible", condition
    if stated is not None and not math.isclose(condition, stated, rel_tol=STATED):
        return f"condition number {condition:.6g}, in the report {stated:.6g}", condition
    return "", condition


def _perplexity(
    directory: Path, text: Path, settings: Mapping[str, Any], report: Mapping[str, Any] | None
) -> Check:
    """The loaded model's mean loss on the report's windows is the report's."""
    name = "perplexity"
    evaluation = (report or {}).get("evaluation") or {}
    row = next((row for row in evaluation.get("rows", []) if row.get("chosen")), None)
    if row is None:
        return Check(name, "the report states none: it was converted without --evaluate", False)
    protocol = evaluation["protocol"]
    digest = evaluate.read_text(text, protocol["joined"])[1]
    if digest != protocol["sha256"]:
        return Check(
            name,
            f"{text} has sha256 {digest[:12]}, the report's {protocol['file']} {protocol['sha256'][:12]}",
            False,
        )
    try:
        model, tokenizer, _ = checkpoint.load(directory)
        if tokenizer is None:
            raise TorqError("the checkpoint has no tokenizer")
        value, _ = evaluate.perplexity(
            model,
            tokenizer,
            text,
            window=protocol["window"],
            windows=protocol["windows"],
            joined=protocol["joined"],
        )
    except TorqError as error:
        return Check(name, str(error), False)
    difference = math.log(value) - row["nll"]
    limit = FLOAT_NATS if settings.get("activations") == "bf16" else ROUNDED_NATS
    detail = f"{value:.4f}, in the report {row['perplexity']:.4f}: {difference:+.5f} nats, {limit} allowed"
    return Check(name, detail, abs(difference) <= limit)


def _check(name: str, wrong: list[str], right: str) -> Check:
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Check(name, "; ".join(wrong[:3]) + more if wrong else right, not wrong)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m torq_jax.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="checkpoint that python -m convert wrote")
    parser.add_argument("--text", help="the file that its perplexity was measured on")
    options = parser.parse_args(argv)
    failed = 0
    try:
        for check in verify(options.directory, text=options.text, progress=ProgressLine):
            failed += not check.passed
            print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:10}  {check.detail}", flush=True)
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that there is no torch
    sys.exit(main())
