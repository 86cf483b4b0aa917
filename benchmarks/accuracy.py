"""Every method on one model, one protocol, one table: perplexity above float on two kinds of text, paired errors.

python -m benchmarks.accuracy --data FOLDER                       # all rows; hours on two cores, resumable
python -m benchmarks.accuracy --data FOLDER --rows two_level wush hadamard

FOLDER holds wikitext2_train_slice.txt, c4_calibration.jsonl (calibration), wikitext2_test.txt and
c4_evaluation.jsonl (evaluation). Statistics are gathered once, in ``--work``; a row that the JSON has is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import nvfp4
from benchmarks.machine import describe
from convert import folding, gradients, names, pipeline, sources
from convert.progress import LayerProgress, progress
from convert.sources import Source
from torq_jax import checkpoint, decoder, evaluate
from torq_jax.config import SITE_WEIGHTS, SITES
from torq_jax.statistics import SiteStatistics

TEXTS = {"wikitext2": "wikitext2_test.txt", "c4": "c4_evaluation.jsonl"}
CALIBRATION = {
    "mixture": ("wikitext2_train_slice.txt", "c4_calibration.jsonl"),
    "wikitext2": ("wikitext2_train_slice.txt",),
}
MODES = {
    "a4": ("bf16", "nearest"),
    "nearest": ("mxfp4", "nearest"),
    "gptq": ("mxfp4", "gptq"),
    "two_sided": ("mxfp4", "two_sided"),
}
TITLES = {
    "a4": "A4 only",
    "nearest": "W4A4 nearest",
    "gptq": "W4A4 + GPTQ",
    "two_sided": "W4A4 + two-sided",
}
PUBLISHED = ("a4", "nearest", "gptq")
SHORT = ("a4", "gptq")
OURS = ("a4", "two_sided")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the table: a solver, what it weighs errors by, and the modes that are run."""

    name: str
    method: str
    sensitivity: str = "output"
    modes: tuple[str, ...] = PUBLISHED
    options: tuple[tuple[str, Any], ...] = ()
    more: tuple[tuple[str, Any], ...] = ()
    """Settings of the conversion that are not the default's."""
    nvfp4: bool = False
    """Another format, for reference: NVFP4 in place of MXFP4."""

    def settings(self) -> pipeline.Settings:
        """What a conversion of this row is given."""
        return pipeline.Settings(
            method=self.method, options=self.options, sensitivity=self.sensitivity, **dict(self.more)
        )


# What a competitor published weighs errors by the layer's output; the same with the loss's weights beside it.
ENTRIES = (
    Entry("two_level", "two_level", "loss", (*PUBLISHED, "two_sided")),
    Entry("wush", "wush"),
    Entry("hadamard", "hadamard"),
    Entry("none", "none"),
    Entry("torq", "torq"),
    Entry("full_hadamard", "full_hadamard"),
    Entry("wush, loss", "wush", "loss", (*SHORT, "two_sided")),
    Entry("two_level, orthogonal only", "two_level", "loss", OURS, (("orthogonal_only", True),)),
    Entry("hadamard, loss", "hadamard", "loss", ("gptq", "two_sided")),
    Entry("two_level, output", "two_level", "output", SHORT),
    Entry("two_level, orthogonal macro", "two_level", "loss", OURS, (("macro", "orthogonal"),)),
    Entry("two_level, budget 0.2", "two_level", "loss", OURS, (("budget", 0.2),)),
    Entry("two_level, o's folded into v", "two_level", "loss", OURS, more=(("fold", "free"),)),
    Entry("two_level, prescale", "two_level", "loss", OURS, more=(("prescale", True),)),
    Entry("two_level, mean correction", "two_level", "loss", OURS, more=(("mean_correction", True),)),
    Entry("two_level, rounded target", "two_level", "loss", OURS, more=(("target", "rounded"),)),
    Entry("random", "random", "output", SHORT),
    Entry("none, loss", "none", "loss", ("gptq", "two_sided")),
    Entry("NVFP4", "none", nvfp4=True),
)


def windows(tokenizer: Any, files: list[Path], count: int, length: int) -> np.ndarray:
    """``count`` windows of ``length`` tokens, as many from each file, spread evenly over it."""
    found = []
    for file in files:
        tokens = evaluate.tokenize(tokenizer, evaluate.read_text(file)[0])
        whole = evaluate.cut(tokens, length)
        rows = np.linspace(0, len(whole) - 1, count // len(files)).round().astype(int)
        if len(set(rows.tolist())) != len(rows):
            raise SystemExit(f"{file} has {len(whole)} windows of {length} tokens: fewer than {len(rows)}")
        found.append(whole[rows])
    return np.concatenate(found)


def gather(source: Source, tokens: np.ndarray, folder: Path, shown: LayerProgress) -> None:
    """Statistics of every layer and site under both weightings, into files."""
    graph, _ = decoder.make_layer(source.config)
    run = functools.partial(pipeline.run_layer, graph, source.config)
    measured = gradients.measure(
        source,
        functools.partial(pipeline.read_layer, source),
        run,
        tokens,
        folder / "sensitivity",
        seed=0,
        progress=shown,
        outputs=True,
    )
    table = source.read(names.outer_tensors(source.config)["embed"])
    stream = [table[row][None].astype(np.float32) for row in tokens]
    for layer in range(source.config.num_layers):
        shown.stage("statistics")
        parameters = pipeline.read_layer(source, layer)
        weights = {site: measured.weights(layer, site) for site in SITES}
        by_output, by_loss = pipeline.gather_layer(
            graph, source.config, parameters, layer, stream, [None, weights], moments="full", seed=0
        )
        for site, own in by_output.items():
            np.savez(
                folder / f"{layer}.{site}.npz",
                tokens=own.tokens,
                inter=own.inter,
                samples=own.samples,
                output=own.second,
                loss=by_loss[site].second,
                gain=measured.gain(layer, site),
                sizes=own.sizes,
                weights=weights[site],
                **{f"outputs_{name}": moment for name, moment in measured.outputs(layer, site).items()},
            )
        shown.advance()
    shutil.rmtree(measured.folder)  # each site's file has its gain
    (folder / "done").touch()


def load(
    folder: Path, source: Source, layer: int, site: str, sensitivity: str, weights: Any
) -> SiteStatistics:
    """What :func:`gather` found, under one weighting."""
    with np.load(folder / f"{layer}.{site}.npz", allow_pickle=False) as stored:
        gain = stored["gain"] if sensitivity == "loss" else pipeline.output_gain(weights, site)
        return SiteStatistics(
            float(stored["tokens"]),
            stored["inter"],
            stored["samples"],
            stored[sensitivity],
            gain,
            sum(source.config.site_out_features(site).values()),
            stored["sizes"],
        )


def load_weights(folder: Path, layer: int, site: str) -> np.ndarray:
    """How much each calibration token counts at a site."""
    with np.load(folder / f"{layer}.{site}.npz", allow_pickle=False) as stored:
        return stored["weights"]


def load_outputs(folder: Path, layer: int, site: str) -> dict[str, np.ndarray]:
    """Moments of the gradients at the outputs of a site's weights."""
    with np.load(folder / f"{layer}.{site}.npz", allow_pickle=False) as stored:
        return {name: stored[f"outputs_{name}"] for name in SITE_WEIGHTS[site]}


Layers = dict[str, dict[str, Any]]
"""A layer's parameters in each mode."""


def quantise_layer(
    entry: Entry,
    modes: list[str],
    source: Source,
    folder: Path,
    layer: int,
    parameters: dict[str, Any],
    calibration: list[np.ndarray] | None = None,
) -> tuple[Layers, dict[str, decoder.Formats], list[dict[str, Any]]]:
    """A layer in each mode, its weights decoded, with its formats; and what solver and clock say of each site.

    ``calibration`` has what enters the layer, where the entry's settings want to look again; it moves on.
    """
    config, settings = source.config, entry.settings()
    begun, sites, reports = time.monotonic(), {}, []
    found = {s: load(folder, source, layer, s, entry.sensitivity, parameters[s]) for s in SITES}
    folds = None
    if settings.fold == "free":
        folds = folding.fold_layer(config, parameters, found)
        parameters, found = folds.parameters, folds.statistics
    into = folding.folded_into(config, fold=settings.fold, folded_only=False)
    for site in SITES:
        outputs = load_outputs(folder, layer, site) if "two_sided" in modes else None
        sites[site] = pipeline.solve_site(
            site,
            found[site],
            parameters[site],
            settings,
            pipeline.site_method(entry.method, site, settings, into),
            second=bool({"gptq", "two_sided"} & set(modes)),
            outputs=outputs if outputs is None or folds is None else folds.outputs(site, outputs),
        )
    if calibration is not None:
        graph, _ = decoder.make_layer(config)
        weights = None
        if entry.sensitivity == "loss":
            weights = {site: load_weights(folder, layer, site) for site in SITES}
        rounded = pipeline.gather_rounded(
            graph,
            config,
            parameters,
            layer,
            calibration,
            {site: solved.transform for site, solved in sites.items()},
            settings.activation_scale,
            weights,
        )
        sites = {site: pipeline.aim(solved, rounded[site], settings) for site, solved in sites.items()}
    solved_at = time.monotonic()
    layers: Layers = {m: {k: v for k, v in parameters.items() if k not in SITES} for m in modes}
    formats: dict[str, dict[str, decoder.SiteFormat]] = {m: {} for m in modes}
    for site, solved in sites.items():
        for mode in modes:
            weights_format, rounding = MODES[mode]
            row = pipeline.variant(entry.method, weights_format, "mxfp4", rounding)
            form, values = pipeline.store_site(
                config, source.float_dtype, site, solved, parameters[site], settings, row
            )
            formats[mode][site] = form.decoded()
            layers[mode][site] = checkpoint.decode_site(values, config, site, form, jnp.bfloat16)
        reports.append({"layer": layer, "site": site, **solved.report})
    reports[0] |= {"solving": solved_at - begun, "rounding": time.monotonic() - solved_at}
    return layers, formats, reports


def nvfp4_layer(
    modes: list[str], source: Source, folder: Path, layer: int, parameters: dict[str, Any]
) -> Layers:
    """A layer with its weights rounded to NVFP4, in each mode; GPTQ under the activations' second moment."""
    layers: Layers = {m: {k: v for k, v in parameters.items() if k not in SITES} for m in modes}
    for site in SITES:
        found = load(folder, source, layer, site, "output", parameters[site])
        for mode in modes:
            values = dict(parameters[site])
            for name in SITE_WEIGHTS[site]:
                if mode == "nearest":
                    values[name] = nvfp4.quantize_dequantize(values[name])
                elif mode == "gptq":
                    values[name] = nvfp4.gptq(values[name], found.second)
            layers[mode][site] = values
    return layers


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_nvfp4(graph: Any, config: Any, parameters: Any, x: Any) -> Any:
    """:func:`convert.pipeline.run_layer` of a float layer with the activations of each site rounded to NVFP4."""
    rope = decoder.rope_tables(config, jnp.arange(x.shape[1]))
    tap = lambda name, value: nvfp4.quantize_dequantize(value) if name in SITES else value  # noqa: E731
    return decoder.merge_layer(graph, parameters)(x, rope, tap=tap)[0]


def run_entry(
    entry: Entry | None,
    modes: list[str],
    source: Source,
    folder: Path,
    tokens: np.ndarray,
    calibration: np.ndarray,
    shown: LayerProgress,
) -> dict[str, dict[str, Any]]:
    """Losses of each window in each mode; of the float model when there is no entry."""
    config, start = source.config, time.monotonic()
    outer = names.outer_tensors(config)
    table = source.read(outer["embed"])
    stored = table.astype(source.float_dtype) if entry else table
    streams = {m: [stored[row][None].astype(np.float32) for row in tokens] for m in modes}
    again = None
    if entry and pipeline.second_pass(entry.settings()):
        again = [table[row][None].astype(np.float32) for row in calibration]
    report: list[dict[str, Any]] = []
    for layer in range(config.num_layers):
        parameters = pipeline.read_layer(source, layer)
        formats: dict[str, decoder.Formats] = {m: decoder.FLOAT for m in modes}
        run = pipeline.run_layer
        if entry is None:
            layers = {m: parameters for m in modes}
        elif entry.nvfp4:
            layers, run = nvfp4_layer(modes, source, folder, layer, parameters), run_nvfp4
        else:
            layers, formats, found = quantise_layer(entry, modes, source, folder, layer, parameters, again)
            report += found
        for mode in modes:
            graph, _ = decoder.make_layer(config, formats[mode])
            for i, x in enumerate(streams[mode]):
                streams[mode][i] = np.asarray(run(graph, config, layers[mode], x))
        shown.advance()
    norm = jnp.asarray(source.read(outer["norm"]).astype(np.float32))
    head = stored if config.tie_embeddings else source.read(outer["lm_head"])
    head = jnp.asarray(head.astype(source.float_dtype) if entry else head)
    result = {}
    for mode in modes:
        losses = [
            evaluate.negative_log_likelihood(
                jnp.asarray(x), jnp.asarray(t[None]), norm, head, eps=config.norm_eps
            )
            for x, t in zip(streams[mode], tokens, strict=True)
        ]
        result[mode] = {
            "losses": np.concatenate(losses).mean(-1, dtype=np.float64).round(6).tolist(),
            "solver_seconds": round(sum(r.get("solving", 0.0) for r in report), 1),
            "rounding_seconds": round(sum(r.get("rounding", 0.0) for r in report), 1),
            "all_modes_seconds": round(time.monotonic() - start, 1),
        }
        for key in ("macro_gain_db", "block_gain_db", "condition_number", "group", "prescale_gain_db"):
            # A site that is folded has another solver's report.
            known = {site: [r[key] for r in report if r["site"] == site and key in r] for site in SITES}
            if any(known.values()):
                result[mode][key] = {site: float(np.mean(found)) for site, found in known.items() if found}
    return result


def difference(losses: list[float], reference: list[float]) -> evaluate.Estimate:
    """Mean of the paired difference over windows, and its standard error."""
    return evaluate.estimate(np.subtract(losses, reference))


def print_table(result: dict[str, Any], count: int) -> None:
    """Nats per token above float, by text."""
    base = result["float"]["losses"]
    slices = {text: slice(i * count, (i + 1) * count) for i, text in enumerate(TEXTS)}
    for text, part in slices.items():
        print(f"{text}: float perplexity {np.exp(np.mean(base[part])):.3f}; nats per token above it")
        print(f"  {'':30s}" + "".join(f"{TITLES[m]:>20s}" for m in MODES))
        for name, modes in result["rows"].items():
            cells = []
            for mode in MODES:
                if mode in modes:
                    found = difference(modes[mode]["losses"][part], base[part])
                    cells.append(f"{found.mean:10.3f} ± {found.standard_error:.3f}")
                else:
                    cells.append("-")
            print(f"  {name:30s}" + "".join(f"{c:>20s}" for c in cells))


def draw(result: dict[str, Any], count: int, path: Path) -> None:
    """Bars of both texts: A4 alone, and W4A4 with GPTQ and with its two-sided form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, rows = result["float"]["losses"], result["rows"]
    added = {"gptq": "GPTQ", "two_sided": "two-sided GPTQ"}
    panels = {
        "A4 only": [(name, name, "a4") for name, modes in rows.items() if "a4" in modes],
        "W4A4": [(f"{n} + {added[m]}", n, m) for m in reversed(added) for n in rows if m in rows[n]],
    }
    height = 0.42 * max(map(len, panels.values())) + 1.6
    figure, axes = plt.subplots(1, 2, figsize=(12, height), width_ratios=(1, 1))
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        for i, text in enumerate(TEXTS):
            part = slice(i * count, (i + 1) * count)
            found = [difference(rows[n][m]["losses"][part], base[part]) for _, n, m in bars]
            axis.barh(
                np.arange(len(bars)) + 0.4 * i,
                [f.mean for f in found],
                0.38,
                xerr=[f.standard_error for f in found],
                label=text,
            )
        axis.set_title(title)
        axis.set_xlabel("nats per token above float")
        axis.set_yticks(np.arange(len(bars)) + 0.2, [label for label, _, _ in bars])
        axis.invert_yaxis()
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Gather, run what is missing, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(__file__).parent / "results"
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("accuracy-work"))
    parser.add_argument("--hf", help="another model than the demo's")
    parser.add_argument("--calibration", choices=tuple(CALIBRATION), default="mixture")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows, of 1024 tokens")
    parser.add_argument(
        "--windows", type=int, default=24, help="evaluation windows of each text, of 1024 tokens"
    )
    parser.add_argument("--rows", nargs="*", choices=[e.name for e in ENTRIES], help="only these")
    parser.add_argument("--modes", nargs="*", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--json", type=Path, help="(default: results/accuracy-CALIBRATION.json)")
    options = parser.parse_args()
    path = options.json or results / f"accuracy-{options.calibration}.json"

    source = sources.open_source(options.hf or str(sources.fetch_demo()))
    tokenizer = source.load_tokenizer()
    length = 1024
    evaluated = np.concatenate(
        [windows(tokenizer, [options.data / file], options.windows, length) for file in TEXTS.values()]
    )
    protocol = {
        "model": source.name,
        "calibration": options.calibration,
        "calibration_windows": options.samples,
        "evaluation_windows": options.windows,
        "window": length,
        "scale_rules": {"activations": "even", "weights": "mse"},
        "beginning_of_sequence": False,
    }
    result: dict[str, Any] = {"protocol": protocol, "rows": {}}
    if path.exists():
        result = json.loads(path.read_text())
        if result["protocol"] != protocol:
            raise SystemExit(f"{path} was made with another protocol: move it away, or give --json")

    def save() -> None:
        result["machine"] = describe()
        path.write_text(json.dumps(result, indent=1) + "\n")

    layers = source.config.num_layers
    folder = options.work / f"{source.name.replace('/', '-')}-{options.calibration}-{options.samples}"
    files = [options.data / file for file in CALIBRATION[options.calibration]]
    calibration = windows(tokenizer, files, options.samples, length)
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        begun = time.monotonic()
        with progress(3 * layers, "statistics", unit="pass") as shown:
            gather(source, calibration, folder, shown)
        result["statistics_seconds"] = round(time.monotonic() - begun, 1)
    if "float" not in result:
        with progress(layers, "float") as shown:
            result["float"] = run_entry(None, ["a4"], source, folder, evaluated, calibration, shown)["a4"]
        save()
    for entry in ENTRIES:
        if options.rows and entry.name not in options.rows:
            continue
        own_modes = [m for m in options.modes if m in entry.modes]
        missing = [m for m in own_modes if m not in result["rows"].get(entry.name, {})]
        if not missing:
            continue
        with progress(layers, entry.name) as shown:
            found = run_entry(entry, missing, source, folder, evaluated, calibration, shown)
        result["rows"].setdefault(entry.name, {}).update(found)
        save()
        print_table(result, options.windows)
    print_table(result, options.windows)
    draw(result, options.windows, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
