"""What a conversion reports: a table on the terminal, ``report.json``, ``report.html`` and plots.

:class:`Report` documents the dictionary that :mod:`convert.pipeline` fills in. The terminal and the page show the
same tables; both are made of :class:`Table`, which holds finished text.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jinja2
import numpy as np
import rich.box
import rich.table
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image
from rich.console import Console
from rich.text import Text

from torq_jax import files
from torq_jax.config import SITES
from torq_jax.duration import format_seconds
from torq_jax.errors import ConversionError
from torq_jax.evaluate import Protocol

# -- the dictionary ------------------------------------------------------------------------------------------


class ModelReport(TypedDict):
    """What was converted."""

    name: str
    source_kind: str
    architecture: str
    parameters: int
    linear_parameters: int
    layers: int
    hidden_size: int


class CalibrationReport(TypedDict):
    """The text that statistics were gathered on; sizes in tokens."""

    source: str
    sha256: str
    sequences: int
    sequence_length: int
    tokens: int


class SettingsReport(TypedDict):
    """How it was converted; more keys may follow, they go to the file as they are."""

    method: str
    weights: str
    activations: str
    weight_scale: str
    activation_scale: str
    seed: int
    calibration: CalibrationReport
    versions: dict[str, str]


class EvaluationRow(TypedDict):
    """A way of quantising: a row of the main table. The float original has no method and no difference."""

    label: str
    method: str | None
    weights: str
    activations: str
    perplexity: float
    nll: float  # nats a token
    delta_nats: float | None  # above float, over the same tokens
    delta_standard_error: float | None  # of the paired difference over windows
    chosen: NotRequired[bool]  # the row that the checkpoint holds; by method and formats where absent
    bytes: NotRequired[int | None]


class EvaluationReport(TypedDict):
    """Perplexities of one protocol; the first row is the float original."""

    protocol: dict[str, Any]  # fields of torq_jax.evaluate.Protocol
    rows: list[EvaluationRow]


class SizeReport(TypedDict):
    """Bytes. ``linear_bytes`` are codes and scales of the quantised layers, without rotation matrices."""

    original_bytes: int
    checkpoint_bytes: int
    compression: float  # original / checkpoint
    linear_bytes: int
    bits_per_weight: float  # of the linear layers
    file_bytes: NotRequired[int]


class SiteReport(TypedDict):
    """Diagnostics of one converted site on a sample of its activations.

    Signal-to-noise ratios are None where nothing was rounded.
    """

    layer: int
    site: str
    imbalance_before: float  # largest block energy / mean block energy
    imbalance_after: float
    entropy_before: float  # bits of codebook use; 3 when all eight magnitudes are used alike
    entropy_after: float
    activation_sqnr_db: float | None
    output_sqnr_db: float | None  # as converted
    output_sqnr_a4_db: float | None  # activations rounded, weights folded and not rounded
    predicted_sqnr_db: float | None  # from the errors of both casts, see pipeline.predicted_sqnr
    fold_error: float  # relative change of the float output by the fold, before any rounding
    online_multiply_adds: int  # a token
    online_bytes: int  # of rotation matrices
    orthogonality_error: float
    weights: NotRequired[str]  # format of the stored weights
    multiply_adds: NotRequired[int]  # a token, of the site's linear layers
    online: NotRequired[list[str]]  # what runs on every token
    folded_into: NotRequired[str | None]  # what took the transform, or a part of it, for free
    solver: NotRequired[dict[str, Any]]


class EquivalenceReport(TypedDict):
    """The transformed model against the original before anything is rounded, on one calibration sequence."""

    logits_error: float  # relative
    tolerance: float
    tokens: int


class FoldingReport(TypedDict):
    """What was folded into neighbouring weights, so that it costs nothing online."""

    into: dict[str, str]  # site -> what took its transform
    refused: dict[str, str]  # site -> why nothing could
    function_error: dict[str, float]  # of the outputs of o and down: largest relative change over layers
    tolerance: float
    untied_bytes: int  # of an output projection that was the embedding table before


class MixedSite(TypedDict):
    """A site that is kept at MXFP8."""

    layer: int
    site: str
    activation_loss: float  # modelled, in nats a token, for rounding the activation to MXFP4
    weight_loss: float  # the same for the weights
    extra_bytes: int  # beyond MXFP4
    share: float  # of the modelled loss of all sites


class MixedReport(TypedDict):
    """Sites that are kept at MXFP8, and the budget that they were chosen under; see :mod:`convert.mixed`."""

    budget: float  # of the linear layers' MXFP4 bytes
    budget_bytes: int
    extra_bytes: int
    modelled_loss: float  # of all sites at MXFP4, in nats a token
    sites: list[MixedSite]


class ExpertLayer(TypedDict):
    """What the router of a layer did with the calibration text."""

    layer: int
    tokens: list[int]  # that chose each expert
    few: list[int]  # experts that saw fewer than ExpertsReport.few_tokens


class ExpertsReport(TypedDict):
    """The router's choices on the calibration text, of a mixture of experts."""

    experts: int  # a layer
    per_token: int
    few_tokens: int
    own_moments: bool  # whether weights are rounded under what their own expert saw
    layers: list[ExpertLayer]


class BlockEnergy(TypedDict):
    """Mean square of each block of a site, ``[B]``, before and after the rotation."""

    layer: int
    site: str
    before: list[float]
    after: list[float]


class Codebook(TypedDict):
    """Shares of the eight E2M1 magnitudes, ``[8]``, before and after the rotation."""

    before: list[float]
    after: list[float]
    site: NotRequired[str]  # all sites together where absent
    layer: NotRequired[int]


class PlotsReport(TypedDict):
    """Data for the plots alone."""

    block_energy: BlockEnergy | list[BlockEnergy]
    codebook: Codebook | list[Codebook]


class SampleReport(TypedDict):
    """What the converted model writes after a prompt."""

    prompt: str
    text: str
    model: str


class TimingsReport(TypedDict):
    """Wall-clock seconds."""

    total_seconds: float
    stages: dict[str, float]


class Report(TypedDict):
    """Everything that a conversion measured. See :func:`write_report` for NaN in the file."""

    model: ModelReport
    settings: SettingsReport
    evaluation: EvaluationReport | None
    equivalence: NotRequired[EquivalenceReport]
    size: SizeReport
    sites: list[SiteReport]
    mixed: NotRequired[MixedReport | None]  # None where every site has the same format
    folding: NotRequired[FoldingReport | None]
    experts: NotRequired[ExpertsReport | None]  # None of a dense model
    plots: NotRequired[PlotsReport]
    samples: NotRequired[list[SampleReport]]
    timings: NotRequired[TimingsReport]
    memory: NotRequired[dict[str, Any]]  # peak_rss_bytes, by_stage
    warnings: NotRequired[list[str]]


# -- tables of text ------------------------------------------------------------------------------------------

NONE = "–"
WIDE = 110
"""Columns of terminal from which the costs of rotations stand beside the other diagnostics."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Finished text: the first column is a name, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    """Rows to stress."""
    weak: frozenset[int] = frozenset()
    """Rows that belong to the one above."""
    wide: frozenset[int] = frozenset()
    """Columns that a narrow terminal leaves out."""
    notes: tuple[str, ...] = ()


def _figure(value: float | None, spec: str) -> str:
    """A number as text; unmeasured and non-finite ones as such."""
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return "0" if value == 0 and spec.endswith("e") else format(value, spec)


def _perplexity(value: float | None) -> str:
    return _figure(value, ".2f" if value is None or value < 1e4 else ".2e")


def _quantity(value: float | None, unit: str = "") -> str:
    """A count with a decimal prefix: ``134.5 M``, ``56.5 MB``, ``0 B``."""
    if value is None or not math.isfinite(value):
        return _figure(value, "")
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _ratio(part: float, whole: float) -> str:
    return _figure(100 * part / whole if whole else None, ".1f") + " %"


def _is_chosen(row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    keys = ("method", "weights", "activations")
    return bool(row.get("chosen", all(row[k] == settings[k] for k in keys)))


def _row_bytes(row: Mapping[str, Any], report: Mapping[str, Any]) -> int | None:
    """Size of what a row describes; None for methods that were evaluated and not written."""
    if row.get("bytes") is not None:
        return row["bytes"]
    if row["method"] is None:
        return report["size"]["original_bytes"]
    return report["size"]["checkpoint_bytes"] if _is_chosen(row, report["settings"]) else None


def main_table(report: Mapping[str, Any]) -> Table:
    """Float, the methods compared, the chosen one: perplexity, nats above float, bytes, compression."""
    size, evaluation = report["size"], report.get("evaluation")
    original = size["original_bytes"]
    if evaluation is None:
        rows = [
            ("float", _quantity(original, "B"), "1.00×"),
            (
                report["settings"]["method"],
                _quantity(size["checkpoint_bytes"], "B"),
                _figure(size["compression"], ".2f") + "×",
            ),
        ]
        return Table(
            "Size", ("", "size", "compression"), tuple(rows), frozenset({1}), notes=(_size_note(report),)
        )
    lines: list[tuple[str, ...]] = []
    strong = []
    for index, row in enumerate(evaluation["rows"]):
        size_bytes = _row_bytes(row, report)
        delta = _figure(row["delta_nats"], "+.4f")
        if (error := row["delta_standard_error"]) is not None:
            delta += " ± " + _figure(error, ".4f")
        lines.append(
            (
                row["label"],
                _perplexity(row["perplexity"]),
                delta,
                _quantity(size_bytes, "B"),
                NONE if not size_bytes else f"{original / size_bytes:.2f}×",
            )
        )
        if _is_chosen(row, report["settings"]):
            strong.append(index)
    return Table(
        "Perplexity and size",
        ("", "perplexity", "nats above float", "size", "compression"),
        tuple(lines),
        strong=frozenset(strong),
        notes=(f"Perplexity on {Protocol(**evaluation['protocol'])}.", _size_note(report)),
    )


def _size_note(report: Mapping[str, Any]) -> str:
    size = report["size"]
    note = (
        f"Linear layers: {_quantity(size['linear_bytes'], 'B')}, "
        f"{_figure(size['bits_per_weight'], '.2f')} bits a weight."
    )
    if size.get("file_bytes") is not None:
        note += f" All files together: {_quantity(size['file_bytes'], 'B')}."
    return note


def _site_names(report: Mapping[str, Any]) -> list[str]:
    found = dict.fromkeys(s["site"] for s in report["sites"])
    return sorted(found, key=lambda s: SITES.index(s) if s in SITES else len(SITES))


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of what was measured; NaN stays NaN, so that it is seen."""
    measured = [v for v in values if v is not None]
    return float(np.mean(measured)) if measured else None


def _worst(sites: Sequence[Mapping[str, Any]], key: str, sign: int) -> Mapping[str, Any] | None:
    """The layer whose ``sign * value`` is largest; NaN is worse than any number."""
    measured = [s for s in sites if s[key] is not None]
    return max(measured, key=lambda s: math.inf if math.isnan(s[key]) else sign * s[key], default=None)


# Column, key (or keys before and after), format, and the direction of worse.
_DIAGNOSTICS: tuple[tuple[str, tuple[str, ...], str, int], ...] = (
    ("imbalance", ("imbalance_before", "imbalance_after"), ".1f", 1),
    ("entropy", ("entropy_before", "entropy_after"), ".2f", -1),
    ("x dB", ("activation_sqnr_db",), ".1f", -1),
    ("y dB", ("output_sqnr_db",), ".1f", -1),
    ("y A4 dB", ("output_sqnr_a4_db",), ".1f", -1),
    ("fold", ("fold_error",), ".0e", 1),
    ("y pred.", ("predicted_sqnr_db",), ".1f", -1),
    ("not orth.", ("orthogonality_error",), ".0e", 1),
)
_COSTS = (("mult-adds", "online_multiply_adds", ""), ("matrices", "online_bytes", "B"))

DIAGNOSTIC_NOTE = (
    "imbalance: largest block energy over the mean one, before → after rotation. entropy: bits of codebook use, "
    "3 at most. x dB, y dB: signal over rounding noise of the activation and of the output; A4: with float weights; "
    "pred.: of y, from the sizes of its casts' errors alone. "
    "fold: relative change of the float output by folding, before rounding."
)


def _cell(site: Mapping[str, float | None], keys: tuple[str, ...], spec: str) -> str:
    return "→".join(_figure(site[k], spec) for k in keys)


def summary_table(report: Mapping[str, Any]) -> Table:
    """Diagnostics by kind of site: the mean over layers and, if there are several, each figure's worst layer."""
    rows, weak = [], []
    for name in _site_names(report):
        sites = [s for s in report["sites"] if s["site"] == name]
        means = {k: _mean([s[k] for s in sites]) for _, keys, _, _ in _DIAGNOSTICS for k in keys}
        rows.append(
            (
                name,
                *(_cell(means, keys, spec) for _, keys, spec, _ in _DIAGNOSTICS),
                *(_quantity(_mean([s[key] for s in sites]), unit) for _, key, unit in _COSTS),
            )
        )
        if len(sites) < 2:
            continue
        worst = []
        for _, keys, spec, sign in _DIAGNOSTICS:
            site = _worst(sites, keys[-1], sign)
            worst.append(NONE if site is None else f"{_cell(site, keys[-1:], spec)} ({site['layer']})")
        weak.append(len(rows))
        rows.append(("  worst", *worst, *("" for _ in _COSTS)))
    columns = ("site", *(d[0] for d in _DIAGNOSTICS), *(c[0] for c in _COSTS))
    several = any(r[0] == "  worst" for r in rows)
    return Table(
        "Diagnostics by site, mean over layers" + (" and worst layer (its number)" if several else ""),
        columns,
        tuple(rows),
        weak=frozenset(weak),
        wide=frozenset(range(len(columns) - 4, len(columns))),
        notes=(DIAGNOSTIC_NOTE, _online_note(report)),
    )


def _online_note(report: Mapping[str, Any]) -> str:
    operations = sum(s["online_multiply_adds"] for s in report["sites"])
    matrices = sum(s["online_bytes"] for s in report["sites"])
    if not operations:
        return "No rotation runs online."
    return (
        f"Rotations run online: {_quantity(operations)} multiply-adds a token in all, "
        f"{_ratio(operations, report['model']['linear_parameters'])} of the linear layers'; "
        f"{_quantity(matrices, 'B')} of matrices, {_ratio(matrices, report['size']['linear_bytes'])} of their bytes."
    )


def online_table(report: Mapping[str, Any]) -> Table:
    """What each kind of site runs on every token, its cost, and what took its transform for free.

    Costs are means over layers; empty for reports that do not say what runs online.
    """
    rows = []
    for name in _site_names(report):
        sites = [s for s in report["sites"] if s["site"] == name]
        if any("online" not in s for s in sites):
            return Table("Online", (), ())
        # Layers may differ in what they run: each way is told once.
        parts = dict.fromkeys(", ".join(_online_part(p) for p in s["online"]) or "nothing" for s in sites)
        operations, whole = (sum(s[k] for s in sites) for k in ("online_multiply_adds", "multiply_adds"))
        rows.append(
            (
                name,
                " or ".join(parts),
                _quantity(operations / len(sites)),
                _ratio(operations, whole),
                " or ".join(dict.fromkeys(s.get("folded_into") or NONE for s in sites)),
            )
        )
    columns = ("site", "runs online", "mult-adds", "of site's", "free, in")
    return Table("Online by site", columns, tuple(rows), notes=_folding_notes(report))


def _online_part(part: str) -> str:
    """``inter rotation [2, 2]`` as ``inter 2×2``, and the cast without its scale rule, which the title tells."""
    name, _, shape = part.partition(" rotation ")
    if shape:
        return f"{name} {shape.strip('[]').replace(', ', '×')}"
    return "cast" if part.startswith("MXFP4 cast") else part


def _folding_notes(report: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [
        "mult-adds: of transforms, a token and layer; of site's: against those of its linear layers. "
        "free, in: weights that took a transform, which then costs nothing."
    ]
    folds = report.get("folding")
    if folds and folds["function_error"]:
        worst = max(folds["function_error"].values())
        notes.append(
            f"Folded for free: the float layers' outputs changed by {_figure(worst, '.0e')} (relative) at most."
        )
    return tuple(notes)


def layer_table(report: Mapping[str, Any]) -> Table:
    """Diagnostics of every site of every layer."""
    order = {name: i for i, name in enumerate(_site_names(report))}
    sites = sorted(report["sites"], key=lambda s: (s["layer"], order[s["site"]]))
    rows = tuple(
        (
            f"{s['layer']} {s['site']}" + (" (MXFP8)" if s.get("weights") == "mxfp8" else ""),
            *(_cell(s, keys, spec) for _, keys, spec, _ in _DIAGNOSTICS),
            *(_quantity(s[key], unit) for _, key, unit in _COSTS),
        )
        for s in sites
    )
    columns = ("layer, site", *(d[0] for d in _DIAGNOSTICS), *(c[0] for c in _COSTS))
    return Table("Diagnostics of every layer", columns, rows)


def _title_lines(report: Mapping[str, Any]) -> list[str]:
    """What was converted and how, a sentence a line."""
    model, settings = report["model"], report["settings"]
    calibration = settings["calibration"]
    rules = [
        f"{what} {form}" + (f" (scale rule {settings[rule]})" if form == "mxfp4" else "")
        for what, form, rule in (
            ("weights", settings["weights"], "weight_scale"),
            ("activations", settings["activations"], "activation_scale"),
        )
    ]
    digest = f" (sha256 {calibration['sha256'][:12]})" if calibration.get("sha256") else ""
    return [
        f"{model['architecture']}, {model['layers']} layers of {model['hidden_size']}, "
        f"{_quantity(model['parameters'])} parameters, "
        f"{_quantity(model['linear_parameters'])} of them in linear layers",
        f"method {settings['method']}{_fold_title(report)}, {', '.join(rules)}, seed {settings['seed']}",
        f"calibrated on {calibration['sequences']} × {calibration['sequence_length']} tokens of "
        f"{calibration['source']}{digest}",
        *([_equivalence_line(report["equivalence"])] if report.get("equivalence") else []),
        *([_mixed_line(report["mixed"])] if report.get("mixed") else []),
        *([_experts_line(report["experts"])] if report.get("experts") else []),
    ]


def _equivalence_line(found: Mapping[str, Any]) -> str:
    return (
        f"before rounding, logits differ from the original's by {_figure(found['logits_error'], '.0e')} (relative; "
        f"{_figure(found['tolerance'], '.0e')} allowed) on {found['tokens']} calibration tokens"
    )


_NAMED_SITES = 6  # sites at MXFP8 that the line names


def _mixed_line(mixed: Mapping[str, Any]) -> str:
    """The sites at MXFP8, those with the largest share of the modelled loss by name."""
    ranked = sorted(mixed["sites"], key=lambda s: -s["share"])
    names = [
        f"layer {s['layer']} {s['site']} ({_ratio(s['share'], 1)}, {_quantity(s['extra_bytes'], 'B')})"
        for s in ranked[:_NAMED_SITES]
    ]
    if len(ranked) > _NAMED_SITES:
        names.append(f"{len(ranked) - _NAMED_SITES} more")
    spent = f"{_quantity(mixed['extra_bytes'], 'B')} of {_quantity(mixed['budget_bytes'], 'B')} more"
    if not names:
        return f"no site at MXFP8: {spent}"
    share = _ratio(sum(s["share"] for s in ranked), 1)
    return f"sites at MXFP8: {', '.join(names)}; {share} of the modelled loss for {spent}"


def mixed_table(report: Mapping[str, Any]) -> Table:
    """The sites at MXFP8; empty where there are none."""
    found = report.get("mixed") or {"sites": ()}
    rows = tuple(
        (
            f"{s['layer']} {s['site']}",
            _ratio(s["share"], 1),
            _figure(s["activation_loss"], ".2e"),
            _figure(s["weight_loss"], ".2e"),
            _quantity(s["extra_bytes"], "B"),
        )
        for s in sorted(found["sites"], key=lambda s: -s["share"])
    )
    note = (
        "share: of the modelled loss of all sites at MXFP4. activation, weights: that of the site, in nats a token, "
        "were they rounded to MXFP4 after a Hadamard transform of each block. bytes: beyond MXFP4."
    )
    columns = ("layer, site", "share", "activation", "weights", "bytes")
    return Table("Sites kept at MXFP8", columns, rows, notes=(note,))


def experts_table(report: Mapping[str, Any]) -> Table:
    """Tokens that the router sent to the experts of each layer; empty of a dense model."""
    found = report.get("experts") or {"layers": ()}
    rows = []
    for layer in found["layers"]:
        tokens = np.asarray(layer["tokens"])
        rows.append(
            (
                f"{layer['layer']}",
                *(f"{int(value)}" for value in (tokens.min(), np.median(tokens), tokens.max())),
                f"{int((tokens == 0).sum())}",
                ", ".join(f"{e} ({tokens[e]})" for e in layer["few"]) or NONE,
            )
        )
    if not rows:
        return Table("Experts", (), ())
    note = (
        f"Calibration tokens that chose an expert, of {found['experts']} a layer and {found['per_token']} a token. "
        f"too few: experts with fewer than {found['few_tokens']} tokens, and how many each had."
    )
    if found["own_moments"]:
        note += (
            " Their weights are rounded under the layer's second moment more than under their own tokens'."
        )
    return Table(
        "Experts by layer",
        ("layer", "fewest", "median", "most", "unused", "too few"),
        tuple(rows),
        notes=(note,),
    )


def _experts_line(found: Mapping[str, Any]) -> str:
    tokens = np.array([layer["tokens"] for layer in found["layers"]])
    few = sum(len(layer["few"]) for layer in found["layers"])
    return (
        f"Experts: {found['per_token']} of {found['experts']} a token; calibration tokens of one: {tokens.min()} to "
        f"{tokens.max()}, median {int(np.median(tokens))}; {few} of {tokens.size} saw fewer than "
        f"{found['few_tokens']}."
    )


def few_tokens(found: Mapping[str, Any] | None) -> list[str]:
    """Warnings that name the experts which saw too little of the calibration text."""
    lines = []
    for layer in (found or {"layers": ()})["layers"]:
        if layer["few"]:
            names = ", ".join(map(str, layer["few"]))
            lines.append(
                f"layer {layer['layer']}: {'expert' if len(layer['few']) == 1 else 'experts'} {names} saw fewer than "
                f"{found['few_tokens']} calibration tokens: pass more --samples"  # type: ignore[index]
            )
    return lines


def _fold_title(report: Mapping[str, Any]) -> str:
    """Says of a method with transforms of its own which of them was folded."""
    folds = report.get("folding")
    if not folds or not folds["into"] or report["settings"].get("folded_only"):
        return ""
    return " (" + ", ".join(f"{site}'s transform in {into}" for site, into in folds["into"].items()) + ")"


def _cost_line(report: Mapping[str, Any]) -> str | None:
    """Time and memory of the conversion."""
    timings, memory = report.get("timings"), report.get("memory")
    parts = []
    if timings:
        stages = sorted(timings.get("stages", {}).items(), key=lambda kv: -kv[1])[:4]
        longest = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in stages)
        parts.append(
            f"took {format_seconds(timings['total_seconds'])}" + (f" ({longest})" if longest else "")
        )
    if memory and memory.get("peak_rss_bytes") is not None:
        parts.append(f"peak memory {_quantity(memory['peak_rss_bytes'], 'B')}")
    return ", ".join(parts) or None


def _clean(text: str) -> str:
    """Text with control characters and lone surrogates made visible: a model may write any of them."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs") else c
        for c in text
    )


# -- terminal ------------------------------------------------------------------------------------------------

_ASCII = str.maketrans({"→": ">", "±": "+-", "×": "x", "–": "-", "−": "-", "∞": "inf"})


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the report's tables, warnings and samples.

    Args:
      report: shaped like :class:`Report`.
      console: where to. Colour and width follow it; without colour where it is not a terminal.
    """

    def text(value: str, style: str = "") -> Text:
        value = _clean(value)
        if console.options.ascii_only:
            value = value.translate(_ASCII).encode("ascii", "replace").decode("ascii")
        return Text(value, style=style)

    console.print()
    console.print(text(report["model"]["name"], "bold"))
    for line in _title_lines(report):
        console.print(text(line))
    for table in (main_table(report), summary_table(report), online_table(report)):
        if not table.rows:
            continue
        console.print()
        console.print(text(table.title, "bold"))
        console.print(_rich_table(table, text, console))
        for note in table.notes:
            console.print(text(note, "dim"))
    for sample in report.get("samples") or ():
        console.print()
        console.print(text(f"The converted model goes on from: {sample['prompt']}", "bold"))
        console.print(text(sample["text"].strip()))
    if cost := _cost_line(report):
        console.print()
        console.print(text(cost, "dim"))
    if warnings := report.get("warnings"):
        console.print()
        for warning in warnings:
            console.print(text(f"warning: {warning}", "yellow"))


def _rich_table(table: Table, text: Callable[..., Text], console: Console) -> rich.table.Table:
    """The table as wide as there is room for: fewer columns, then closer ones, on a narrow terminal."""
    keep = [i for i in range(len(table.columns)) if console.width >= WIDE or i not in table.wide]
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i in keep:
        shown.add_column(text(table.columns[i]), justify="right" if i else "left", header_style="")
    for index, row in enumerate(table.rows):
        style = "bold" if index in table.strong else "dim" if index in table.weak else ""
        shown.add_row(*(text(row[i]) for i in keep), style=style)
    if console.measure(shown, options=console.options.update(max_width=10 * WIDE)).maximum > console.width:
        shown.padding = 0
    return shown


# -- plots ---------------------------------------------------------------------------------------------------

MAGNITUDES = ("0", "0.5", "1", "1.5", "2", "3", "4", "6")
_DPI = 120
_PANELS = 8  # panels that a plot by site shows at most


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    paper: str
    ink: str
    faint: str
    before: str
    after: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#d8dde3", "#9aa4af", "#0b66c3", ("#0b66c3", "#c75000", "#0a7d5a", "#8a3ea8")
)
DARK = Theme(
    "#15181c", "#dfe4ea", "#363c44", "#76818d", "#5aa9f2", ("#5aa9f2", "#f0954a", "#3fc495", "#c88ae0")
)
_MARKERS = ("o", "s", "^", "D")

TEXTS = {
    "perplexity": ("Perplexity", "Perplexity of the float original and of each way of quantising it"),
    "error_by_layer": ("Error by layer", "Signal over rounding noise of each site's output, by layer"),
    "block_energy": ("Energy of the blocks", "Energy of each block of 32 before and after the rotation"),
    "codebook": ("Codebook use", "Share of values at each magnitude of MXFP4 before and after the rotation"),
    "experts": ("Experts", "Calibration tokens that chose each expert of each layer, the most used first"),
}
"""Heading and description of each plot, in the page's order."""


def draw_plots(report: Mapping[str, Any], theme: Theme = LIGHT) -> dict[str, bytes]:
    """PNG files of every plot that the report has data for, by the names of :data:`TEXTS`."""
    plots = report.get("plots") or {}
    figures = {
        "perplexity": _plot_perplexity(report, theme),
        "error_by_layer": _plot_errors(report, theme),
        "block_energy": _plot_energy(_entries(plots.get("block_energy")), theme),
        "codebook": _plot_codebook(_entries(plots.get("codebook")), theme),
        "experts": _plot_experts(report.get("experts"), theme),
    }
    return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _entries(value: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    if not value:
        return []
    return [value] if isinstance(value, Mapping) else list(value)


def _png(figure: Figure) -> bytes:
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette makes the file a third as large and is not seen: a plot has few colours.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(
        96, dither=Image.Dither.NONE
    )
    out = io.BytesIO()
    picture.save(out, format="png", optimize=True)
    return out.getvalue()


def _panels(count: int, theme: Theme, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` styled axes, two a row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(7.4, height * rows + 0.4), facecolor=theme.paper, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
    for ax in axes[:count]:
        ax.set_facecolor(theme.paper)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
        ax.tick_params(colors=theme.ink, labelsize=9.5, color=theme.faint)
        ax.grid(axis="y", color=theme.faint, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes[:count]


def _caption(ax: Axes, text: str, theme: Theme) -> None:
    ax.set_title(text, loc="left", fontsize=10, color=theme.ink, parse_math=False)


def _axis_labels(ax: Axes, theme: Theme, x: str = "", y: str = "") -> None:
    ax.set_xlabel(x, fontsize=9.5, color=theme.ink)
    ax.set_ylabel(y, fontsize=9.5, color=theme.ink)


def _legend(figure: Figure, ax: Axes, theme: Theme, columns: int) -> None:
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside upper right",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        labelcolor=theme.ink,
    )


def _finite(values: Iterable[float | None]) -> np.ndarray:
    """Float64 with NaN, which is not drawn, in place of anything that is not a number."""
    array = np.array([math.nan if v is None else v for v in values], np.float64)
    return np.where(np.isfinite(array), array, math.nan)


def _plot_perplexity(report: Mapping[str, Any], theme: Theme) -> Figure | None:
    rows = (report.get("evaluation") or {}).get("rows") or []
    values = _finite(row["perplexity"] for row in rows)
    if not np.isfinite(values).any():
        return None
    base = values[0] if np.isfinite(values[0]) else np.nanmin(values)
    # One method that fails altogether must not flatten the others: its bar ends at the edge, its label tells.
    edge = min(np.nanmax(values), 4 * base)
    figure, (ax,) = _panels(1, theme, 0.34 * len(rows) + 0.5)
    colours = [
        theme.after if _is_chosen(row, report["settings"]) else theme.ink if i == 0 else theme.before
        for i, row in enumerate(rows)
    ]
    widths = np.minimum(np.nan_to_num(values), edge)
    ax.barh(range(len(rows)), widths, color=colours, height=0.62)
    ax.axvline(base, color=theme.ink, linewidth=0.8, linestyle=(0, (2, 3)))
    for i, row in enumerate(rows):
        label = _perplexity(row["perplexity"]) + (" (beyond the axis)" if values[i] > edge else "")
        ax.annotate(
            label,
            (widths[i], i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=theme.ink,
        )
    ax.set_xlim(0, edge * 1.18)
    ax.set_yticks(range(len(rows)), [_clean(row["label"]) for row in rows], parse_math=False)
    ax.invert_yaxis()
    ax.grid(False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    _axis_labels(ax, theme, "perplexity; the dotted line is the float original")
    return figure


def _plot_errors(report: Mapping[str, Any], theme: Theme) -> Figure | None:
    figure, (ax,) = _panels(1, theme, 3.2)
    drawn = False
    for i, name in enumerate(_site_names(report)):
        sites = sorted((s for s in report["sites"] if s["site"] == name), key=lambda s: s["layer"])
        values = _finite(s["output_sqnr_db"] for s in sites)
        if not np.isfinite(values).any():
            continue
        drawn = True
        ax.plot(
            [s["layer"] for s in sites],
            values,
            color=theme.series[i % len(theme.series)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.4,
            label=name,
        )
    if not drawn:
        return None
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(x=0.02)
    _axis_labels(ax, theme, "layer", "output SQNR, dB (higher is better)")
    _legend(figure, ax, theme, 4)
    return figure


def _where(entry: Mapping[str, Any]) -> str:
    parts = ([f"layer {entry['layer']}"] if "layer" in entry else []) + [entry.get("site", "all sites")]
    return ", ".join(parts)


def _plot_energy(entries: Sequence[Mapping[str, Any]], theme: Theme) -> Figure | None:
    entries = [e for e in entries if len(e["before"])][:_PANELS]
    if not entries:
        return None
    figure, axes = _panels(len(entries), theme, 2.4 if len(entries) > 1 else 3.2, sharey=True)
    for ax, entry in zip(axes, entries, strict=True):
        before, after = _finite(entry["before"]), _finite(entry["after"])
        mean = np.nanmean(before) if np.isfinite(before).any() else math.nan
        scale = mean if mean > 0 else 1.0
        for values, colour, label in (
            (before, theme.before, "before"),
            (after, theme.after, "after rotation"),
        ):
            edges = np.arange(len(values) + 1) - 0.5
            ax.stairs(values / scale, edges, color=colour, linewidth=1.5, label=label, baseline=None)
        if (before > 0).any() or (after > 0).any():
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.01)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _caption(ax, _where(entry), theme)
        _axis_labels(ax, theme, "block", "energy / mean before" if ax in axes[::2] else "")
    _legend(figure, axes[0], theme, 2)
    return figure


def _plot_codebook(entries: Sequence[Mapping[str, Any]], theme: Theme) -> Figure | None:
    entries = [e for e in entries if len(e["before"])][:_PANELS]
    if not entries:
        return None
    figure, axes = _panels(len(entries), theme, 2.4 if len(entries) > 1 else 3.2)
    positions = np.arange(len(MAGNITUDES))
    for ax, entry in zip(axes, entries, strict=True):
        ax.bar(positions - 0.2, 100 * _finite(entry["before"]), 0.38, color=theme.before, label="before")
        ax.bar(
            positions + 0.2, 100 * _finite(entry["after"]), 0.38, color=theme.after, label="after rotation"
        )
        ax.axhline(
            100 / len(MAGNITUDES), color=theme.ink, linewidth=0.8, linestyle=(0, (2, 3)), label="all alike"
        )
        ax.set_xticks(positions, MAGNITUDES)
        _caption(ax, _where(entry), theme)
        _axis_labels(
            ax, theme, "magnitude, in units of the block's scale", "values, %" if ax in axes[::2] else ""
        )
    _legend(figure, axes[0], theme, 3)
    return figure


def _plot_experts(found: Mapping[str, Any] | None, theme: Theme) -> Figure | None:
    """Tokens of each expert by rank: the spread over layers, and how few are too few."""
    if not found or not found["layers"]:
        return None
    figure, (ax,) = _panels(1, theme, 3.2)
    ranked = -np.sort(-np.array([layer["tokens"] for layer in found["layers"]], float), axis=1)  # [L, E]
    rank = np.arange(1, ranked.shape[1] + 1)
    ax.fill_between(
        rank, ranked.min(0), ranked.max(0), color=theme.after, alpha=0.2, linewidth=0, label="all layers"
    )
    ax.plot(rank, np.median(ranked, 0), color=theme.after, linewidth=1.5, label="median layer")
    ax.axhline(
        found["few_tokens"], color=theme.ink, linewidth=0.8, linestyle=(0, (2, 3)), label="too few below"
    )
    ax.set_yscale("symlog", linthresh=max(found["few_tokens"], 1))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _axis_labels(ax, theme, "expert by rank in its layer", "calibration tokens")
    _legend(figure, ax, theme, 3)
    return figure


# -- files ---------------------------------------------------------------------------------------------------


def write_report(report: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Write ``report.json``, ``report.html`` and ``plots/*.png``, each whole or not at all.

    The page is one file with everything in it: no script, nothing fetched.

    Args:
      report: shaped like :class:`Report`. numpy numbers and arrays are fine; NaN and infinities go into the JSON
        as the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, which JSON itself has no number for.
      directory: where to; made if it does not exist. Plots there of an older report are replaced or removed.

    Returns:
      The files written.

    Raises:
      ConversionError: a file that cannot be written.
    """
    directory = Path(directory)
    drawn = draw_plots(report)
    contents = {directory / "plots" / f"{name}.png": data for name, data in drawn.items()}
    contents[directory / "report.html"] = render_page(report, drawn, draw_plots(report, DARK)).encode("utf-8")
    contents[directory / "report.json"] = (
        json.dumps(_plain(report), indent=1, allow_nan=False) + "\n"
    ).encode("ascii")
    path = directory
    try:
        (directory / "plots").mkdir(parents=True, exist_ok=True)
        for name in TEXTS.keys() - drawn.keys():
            (directory / "plots" / f"{name}.png").unlink(missing_ok=True)
        for path, data in contents.items():
            files.write(path, data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConversionError(
            f"the report cannot be written to {path}: {reason}: make room or check the path"
        ) from error
    return list(contents)


def read_report(directory: str | Path) -> dict[str, Any]:
    """What :func:`write_report` wrote.

    Raises:
      ConversionError: a file that cannot be read.
    """
    path = Path(directory) / "report.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read ({error}): convert anew with --overwrite") from error


def render_page(report: Mapping[str, Any], light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The report as one HTML page, with the plots of :func:`draw_plots` for light and dark screens in it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convert", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = [
        {"title": title, "text": text, "light": _data_url(light[name]), "dark": _data_url(dark[name])}
        for name, (title, text) in TEXTS.items()
        if name in light
    ]
    page = environment.get_template("report.html").render(
        name=report["model"]["name"],
        lines=_title_lines(report),
        warnings=report.get("warnings") or (),
        tables=[
            t
            for t in (
                main_table(report),
                mixed_table(report),
                summary_table(report),
                online_table(report),
                experts_table(report),
            )
            if t.rows
        ],
        layers=layer_table(report),
        plots=plots,
        samples=report.get("samples") or (),
        cost=_cost_line(report),
        versions=report["settings"].get("versions") or {},
    )
    # Names are the user's, samples the model's: whatever they hold, the page is valid UTF-8.
    return _clean(page)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _plain(value: Any) -> Any:
    """The same value in types that JSON has."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
