"""The way of the data: source -> layer -> statistics -> rotation -> fold -> round -> shard, one layer at a time.

Besides the calibration text, evaluation windows travel through the layers, once for the float model and
once for each quantised variant. So one pass over the source gives the checkpoint, its perplexity and that of
the methods beside it, and no more than one layer of weights is ever in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import folding, gradients, mixed, names, report, streams
from convert import resume as resume_from
from convert.calibration import Calibration
from convert.devices import ONE, Devices
from convert.progress import LayerProgress
from convert.sources import Source
from torq_jax import (
    checkpoint,
    decoder,
    evaluate,
    files,
    mxfp4,
    mxfp8,
    prescale,
    rotation,
    rounding,
    solvers,
    statistics,
)
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.decoder import SiteFormat
from torq_jax.errors import ConversionError, TorqError
from torq_jax.matmul import dot, prepare
from torq_jax.rotation import TwoLevelRotation
from torq_jax.statistics import SiteStatistics

FOLD_TOLERANCE = 1e-4
"""Largest relative error of a folded site's float output; float32 sums of 2**14 products stay below 1e-5."""

WORSE_DB = 3.0
"""A site whose output errs by more than this, a factor of two, beyond :func:`predicted_sqnr` is named."""

SAMPLE_TOKENS = 1024
"""Tokens of each site kept for the solvers and for the diagnostics."""

ROUNDINGS = ("nearest", "gptq", "two_sided")
"""Ways to round weights: each to its nearest value, GPTQ, or GPTQ whose rows make up for each other as well, as far
as the loss's gradients at the outputs say that they can."""

SENSITIVITIES = ("loss", "output")
"""What errors can be weighed by."""

TARGETS = ("exact", "rounded")
"""What rounded weights can aim at."""

FOLDS = ("none", "free")
"""What becomes of ``attn_out``'s transform: it runs online, or v takes it (see :mod:`torq_jax.folding`)."""

FOLDED = "folded"
"""Name of the method under which nothing runs online: what is chosen with ``folded_only``."""

_DIAGNOSTIC_TOKENS = 256

EXPERT_PRIOR = 0.5
"""What the layer's second moment counts for beside an expert's own, in tokens a feature: it fills up what an expert
that saw few tokens says nothing about."""

FEW_TOKENS = EXPERT_PRIOR / 4
"""An expert that saw fewer tokens a feature is named: its own moment counts for less than a fifth."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a conversion does; round-trips through JSON into the checkpoint."""

    method: str = "torq"
    weights: str = "mxfp4"
    """``"mxfp4"`` or ``"bf16"``: left in float, folded."""
    activations: str = "mxfp4"
    weight_scale: str = "mse"
    activation_scale: str = "even"
    seed: int = 0
    pad: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    """Options of the chosen method, by name."""
    rounding: str = "nearest"
    """Of the weights: one of :data:`ROUNDINGS`."""
    damping: float = 0.01
    """Of GPTQ: what is added to the second moment's diagonal, in parts of its mean."""
    order: str = "natural"
    """In which GPTQ takes the features: ``"natural"`` or ``"energy"``."""
    sensitivity: str = "loss"
    """What errors are weighed by where a method or GPTQ weighs them: ``"loss"``, by how much the loss reacts to
    them (:mod:`torq_jax.sensitivity`), or ``"output"``, by the error of the layer's own output."""
    prescale: bool = False
    """Whether a factor for each block is sought that suits the cast (:mod:`torq_jax.prescale`)."""
    target: str = "exact"
    """What rounded weights aim at: ``"exact"``, their own values, or ``"rounded"``, those that read rounded
    activations best (:func:`torq_jax.rounding.correct`), under the second moment of the rounded activations."""
    mean_correction: bool = False
    """Whether a bias takes the mean error away that rounding leaves at each output on the calibration text."""
    mixed: float | None = None
    """Bytes that sites kept at MXFP8 may take, as a share of the linear layers' MXFP4 bytes; None keeps none."""
    compare: tuple[str, ...] = ("none",)
    """Methods evaluated beside the chosen one, with their rounding where it is another: ``"hadamard+gptq"``."""
    modes: tuple[str, ...] = ()
    """Of ``"w4a4"``, ``"a4"``, ``"w4"``: formats evaluated beside the chosen one, for every method."""
    fold: str = "none"
    """Of the chosen method: one of :data:`FOLDS`."""
    folded_only: bool = False
    """Nothing runs online but the cast: the method is :data:`FOLDED`, and ``fold`` ``"free"``."""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for the manifest and the report."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Windows to score, and the protocol that they follow."""

    tokens: np.ndarray  # [windows, t]
    protocol: evaluate.Protocol


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of quantising that is evaluated: a row of the table. The float original has no method."""

    method: str | None
    weights: str  # "mxfp4" or "bf16"
    activations: str
    rounding: str = "nearest"
    mixed: bool = False
    """Whether the chosen sites are at MXFP8."""

    @property
    def label(self) -> str:
        """Name of the row."""
        if self.method is None:
            return "float"
        mode = {("mxfp4", "mxfp4"): "W4A4", ("bf16", "mxfp4"): "A4-only", ("mxfp4", "bf16"): "W4A16"}
        name = "plain rounding" if self.method == "none" else self.method
        if self.rounding != "nearest":
            added = {"gptq": "GPTQ", "two_sided": "two-sided GPTQ"}[self.rounding]
            name = added if self.method == "none" else f"{name} + {added}"
        return f"{name} {mode.get((self.weights, self.activations), 'float')}" + ", mixed" * self.mixed


FLOAT = Variant(None, "bf16", "bf16")
_MODES = {"w4a4": ("mxfp4", "mxfp4"), "a4": ("bf16", "mxfp4"), "w4": ("mxfp4", "bf16")}


@dataclasses.dataclass(frozen=True)
class SolvedSite:
    """A site with its rotation as stored and its weights folded: float32 ``[out, padded in]``."""

    transform: TwoLevelRotation | None
    folded: dict[str, np.ndarray]
    report: dict[str, Any]
    seconds: float
    second: np.ndarray | None
    """Second moment of the rotated activations, float64; for GPTQ. Of experts each one's, ``[E, d, d]`` float32."""
    outputs: Mapping[str, np.ndarray] | None = None
    """Moments of the gradients at each weight's output; for two-sided rounding."""
    target: Mapping[str, np.ndarray] | None = None
    """What is rounded in place of ``folded``, where that is something else."""
    means: tuple[np.ndarray, np.ndarray] | None = None
    """Means of the rotated activations, before and after rounding; for the correction of the mean error."""
    packed: dict[str, dict[str, mxfp4.MXFP4Array]] = dataclasses.field(default_factory=dict)
    """Rounded weights, by rounding and name."""

    @property
    def aims(self) -> Mapping[str, np.ndarray]:
        """The weights to be rounded."""
        return self.folded if self.target is None else self.target


def compared(settings: Settings) -> list[tuple[str, str]]:
    """Methods compared and their rounding; plain rounding rounds plainly unless told otherwise."""
    pairs = []
    for text in settings.compare:
        method, plus, rounded = text.partition("+")
        default = "nearest" if method == "none" else settings.rounding
        pairs.append((method, rounded if plus else default))
    return list(dict.fromkeys(pairs))


def variants(settings: Settings) -> list[Variant]:
    """The rows to evaluate: the float original, the methods compared, the chosen one last.

    Only the chosen one has sites at MXFP8. Without them it is a row where it is named among the methods compared.
    """
    chosen = chosen_variant(settings)
    pure = dataclasses.replace(chosen, mixed=False)
    own = (settings.method, settings.rounding)
    methods = [pair for pair in compared(settings) if pair != own] + [own]
    modes = [(settings.weights, settings.activations), *(_MODES[m] for m in settings.modes)]
    rows = dict.fromkeys(variant(m, *mode, r) for mode in dict.fromkeys(modes) for m, r in methods)
    named = chosen.mixed and own in compared(settings)
    return [FLOAT, *(r for r in rows if r != pure or named), chosen]


def variant(method: str, weights: str, activations: str, rounding: str) -> Variant:
    """A row; how weights are rounded says nothing where they are not."""
    return Variant(method, weights, activations, rounding if weights == "mxfp4" else "nearest")


def chosen_variant(settings: Settings) -> Variant:
    """The row that is written."""
    found = variant(settings.method, settings.weights, settings.activations, settings.rounding)
    return dataclasses.replace(found, mixed=settings.mixed is not None)


def convert(
    source: Source,
    out: Path,
    settings: Settings,
    calibration: Calibration,
    *,
    tokenizer: Any = None,
    evaluation: Evaluation | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: LayerProgress,
    devices: Devices = ONE,
) -> dict[str, Any]:
    """Convert ``source`` into a checkpoint at ``out``; the report's dictionary (see :mod:`convert.report`).

    Sequences of the calibration and the evaluation text are divided over ``devices``. With ``resume`` what an earlier
    call that was stopped has finished is not done again; see :mod:`convert.resume`.

    Raises:
      ConversionError: settings or a source that cannot be converted, or a checkpoint that cannot be written.
        Nothing is left at ``out`` then.
    """
    check(source.config, settings)
    if settings.folded_only:
        source = folding.residual_rotated(source)
    config = source.config
    resume_from.check_target(out, overwrite=overwrite, resume=resume)
    run = _Run(source, settings, calibration, evaluation, devices)
    needed = _checkpoint_bytes(source, settings) + 2 * run.stream_bytes()  # before and after a layer
    if run.sensitive:
        needed += gradients.disk_bytes(config, calibration.tokens.size, outputs=run.two_sided)
        progress.total += 2 * config.num_layers
    planned = plan(source, settings, calibration, evaluation, devices, out if resume else None)
    _check_space(out, needed, resume_from.partial_directory(out) if resume else None)
    with resume_from.conversion(out, planned, overwrite=overwrite, resume=resume) as unfinished:
        if unfinished.finished:
            return report.read_report(out)
        state = unfinished.state
        writer = checkpoint.CheckpointWriter(
            unfinished.checkpoint, None if state is None else state["pieces"]
        )
        with run.timed("embeddings"):
            progress.stage("embeddings")
            run.begin(unfinished.directory / "streams", state)
        if run.sensitive:
            with run.timed("sensitivity"):
                run.measure_sensitivity(unfinished.directory / "sensitivity", progress)
        progress.advance(run.layers)
        for index in range(run.layers, config.num_layers):
            run.layer(index, writer, progress)
            progress.stage("keeping")
            with run.timed("keeping"):
                unfinished.commit(run.keep(writer))
                run.forget()
            progress.advance()
        progress.stage("writing")
        with run.timed("outer"):
            for name in names.outer_tensors(config):
                if not any(file.startswith(f"outer/{name}/") for file in writer.hashes):
                    writer.outer(name, run.stored_outer(name))
                    unfinished.commit(run.state(writer))
            if tokenizer is not None:
                save_tokenizer(tokenizer, unfinished.checkpoint / "tokenizer")
        progress.stage("perplexity")
        with run.timed("equivalence"):
            equivalence = run.equivalence()
        with run.timed("perplexity"):
            rows = run.rows()
        progress.stage("assembling")
        resume_from.check_source(source, planned)
        writer.manifest(
            {
                "name": source.name,
                "config": config.to_json(),
                **run.stored_formats(),
                "folded": run.folded,
                "float_dtype": str(np.dtype(source.float_dtype)),
                "settings": settings.to_json(),
                "calibration": calibration.to_json(),
                "source": {
                    "kind": source.kind,
                    "fingerprint": source.fingerprint,
                    "files": resume_from.source_hashes(planned),
                },
                "versions": versions(),
                "plan_sha256": resume_from.digest(planned),
            }
        )
        result = run.report(rows, equivalence, writer.directory)
        if tokenizer is None:
            result["warnings"].append("no tokenizer: the checkpoint generates from token ids only")
        report.write_report(result, writer.directory)
        unfinished.finish()
    return result


def plan(
    source: Source,
    settings: Settings,
    calibration: Calibration,
    evaluation: Evaluation | None,
    devices: Devices = ONE,
    resumed: Path | None = None,
) -> dict[str, Any]:
    """What decides every byte of a checkpoint (see :func:`convert.resume.plan`).

    ``resumed`` is the destination of a conversion that goes on: hashes of its source's files are taken from there,
    where they have not been touched since.
    """
    return resume_from.plan(
        source,
        versions(),
        {} if resumed is None else resume_from.known_files(resumed),
        settings=settings.to_json(),
        calibration=calibration.to_json() | {"tokens_sha256": _tokens_sha256(calibration.tokens)},
        evaluation=None
        if evaluation is None
        else {
            "protocol": dataclasses.asdict(evaluation.protocol),
            "tokens_sha256": _tokens_sha256(evaluation.tokens),
        },
        devices=f"{devices.count} of {jax.device_count()} {jax.devices()[0].device_kind}",
    )


def _tokens_sha256(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()


def check(config: DecoderConfig, settings: Settings) -> None:
    """Raise ConversionError for settings that do not exist or sizes that do not fit."""
    for method, rounded in ((settings.method, settings.rounding), *compared(settings)):
        if rounded not in ROUNDINGS:
            raise ConversionError(
                f"unknown rounding {rounded!r} for method {method!r}: must be one of {', '.join(ROUNDINGS)}"
            )
        if method == FOLDED and settings.folded_only:
            continue
        try:
            solvers.check_options(method, method_options(method, settings))
        except TorqError as error:
            raise ConversionError(str(error)) from error
    check_folding(config, settings)
    if settings.order not in rounding.ORDERS:
        raise ConversionError(
            f"unknown order {settings.order!r}: must be one of {', '.join(rounding.ORDERS)}"
        )
    if not 0 < settings.damping < float("inf"):
        raise ConversionError(f"damping {settings.damping} must be positive: 0.01 is usual")
    if settings.sensitivity not in SENSITIVITIES:
        raise ConversionError(
            f"unknown sensitivity {settings.sensitivity!r}: must be one of {', '.join(SENSITIVITIES)}"
        )
    rounded_so = {settings.rounding, *(r for _, r in compared(settings))}
    if "two_sided" in rounded_so and settings.weights == "mxfp4" and settings.sensitivity != "loss":
        raise ConversionError(
            "rounding 'two_sided' needs gradients of the loss: pass --sensitivity loss, or --rounding gptq"
        )
    if settings.target not in TARGETS:
        raise ConversionError(f"unknown target {settings.target!r}: must be one of {', '.join(TARGETS)}")
    if second_pass(settings) and settings.activations != "mxfp4":
        raise ConversionError(
            f"target {settings.target!r}, mean correction {settings.mean_correction}: activations are not rounded, "
            "so nothing is there to make up for: leave both out, or pass --activations mxfp4"
        )
    if settings.prescale and settings.method in ("none", FOLDED):
        raise ConversionError(
            f"prescale needs a method that runs a matrix inside blocks: {settings.method!r} runs none"
        )
    if settings.mixed is not None:
        mixed.check(
            settings.mixed,
            sensitivity=settings.sensitivity,
            weights=settings.weights,
            activations=settings.activations,
        )
    if config.num_experts:
        check_experts(settings)
    if settings.seed < 0:
        raise ConversionError(f"seed {settings.seed} must not be negative")
    for rule in (settings.weight_scale, settings.activation_scale):
        if rule not in mxfp4.SCALE_RULES:
            raise ConversionError(
                f"unknown scale rule {rule!r}: must be one of {', '.join(mxfp4.SCALE_RULES)}"
            )
    for site in SITES:
        size = config.site_in_features(site)
        if size % mxfp4.BLOCK and not settings.pad:
            what = {
                "attn_in": "hidden_size",
                "mlp_in": "hidden_size",
                "attn_out": "heads x head_dim",
                "mlp_out": "moe_intermediate_size" if config.num_experts else "intermediate_size",
            }[site]
            raise ConversionError(
                f"{what} {size} is not a multiple of {mxfp4.BLOCK}: pass --pad to fill the blocks of {site} up "
                f"with zeros to {mxfp4.padded_size(size)}"
            )


def check_experts(settings: Settings) -> None:
    """Raise ConversionError for settings that a mixture of experts cannot be converted with."""
    for option, given, instead in (
        ("--folded-only", settings.folded_only, "--fold free"),
        ("--target rounded", settings.target == "rounded", "--target exact"),
        ("--mean-correction", settings.mean_correction, "a plain conversion"),
        ("--mixed", settings.mixed is not None, "a plain conversion"),
    ):
        if given:
            raise ConversionError(f"{option} is not supported for a mixture of experts: use {instead}")


def check_folding(config: DecoderConfig, settings: Settings) -> None:
    """Raise ConversionError for ways to fold that do not exist, or that other settings contradict."""
    if settings.fold not in FOLDS:
        raise ConversionError(f"unknown fold {settings.fold!r}: must be one of {', '.join(FOLDS)}")
    if not settings.folded_only:
        return
    if settings.method != FOLDED or settings.fold != "free" or settings.options:
        raise ConversionError(
            f"folded_only with method {settings.method!r}, fold {settings.fold!r} and options "
            f"{dict(settings.options)}: it has a method of its own: must be {FOLDED!r}, 'free' and none"
        )
    folding.check_residual(config)
    for method, rounded in compared(settings):
        # These rows are of the model as it was, the statistics of the rotated one.
        if method != FOLDED and (rounded != "nearest" or solvers.needs_moments(method) != "none"):
            raise ConversionError(
                f"--compare {method}+{rounded} needs statistics of the model as it was, and --folded-only gathers "
                f"those of the folded one: must be {FOLDED}, or none, hadamard, random or full_hadamard with +nearest"
            )


def site_method(method: str, site: str, settings: Settings, folded: Mapping[str, str]) -> str:
    """The method that solves a site for the online part: ``none`` where its transform is folded."""
    if method == FOLDED or (method == settings.method and site in folded):
        return "none"
    return method


def method_options(method: str, settings: Settings) -> dict[str, Any]:
    """The options that ``method`` is solved with."""
    options: dict[str, Any] = {}
    if "rule" in solvers.method_options(method):
        options["rule"] = settings.activation_scale  # solved for the cast that will run
    return options | (dict(settings.options) if method == settings.method else {})


def online_parts(form: SiteFormat) -> list[str]:
    """What a site runs on every token, for the manifest."""
    parts = [
        f"{level} rotation {list(shape)}" for level in ("inter", "intra") if (shape := getattr(form, level))
    ]
    if form.activation_scale is not None:
        cast = form.activations.upper()
        parts.append(f"{cast} cast of the activation, scale rule {form.activation_scale}")
    return parts


def versions() -> dict[str, str]:
    """Versions of Python and of what shapes the numbers, and the machine's kind."""
    packages = ("torq-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "transformers")
    found = {p: _version(p) for p in packages}
    return found | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
    }


def read_layer(source: Source, index: int) -> dict[str, Any]:
    """One layer of a source as the decoder's nested dictionary, float32."""
    config = source.config
    parameters: dict[str, Any] = {site: {} for site in SITES}
    for key, name in names.layer_tensors(config, index).items():
        value = np.asarray(source.read(name), np.float32)
        site, _, weight = key.rpartition("/")
        weight, _, expert = weight.partition(".")
        if expert:  # under the experts before it
            if expert == "0":
                room = np.empty((config.num_experts, *value.shape), np.float32)
                parameters[site][weight] = room.reshape(-1, value.shape[1])
            room[int(expert)] = value
        else:
            (parameters[site] if site else parameters)[weight] = value
    return jax.tree.map(jnp.asarray, parameters)


def solve_site(
    site: str,
    gathered: SiteStatistics,
    weights: Mapping[str, Any],
    settings: Settings,
    method: str,
    *,
    second: bool,
    outputs: Mapping[str, np.ndarray] | None = None,
) -> SolvedSite:
    """The site's rotation as it will be stored, and its weights folded with that.

    ``second`` asks for the second moment of the rotated activations, which GPTQ needs; ``outputs`` has the moments of
    the gradients at each weight's output, which two-sided rounding needs beside it.
    """
    start = time.monotonic()
    options = method_options(method, settings)
    solution = solvers.solve(method, gathered, seed=settings.seed, **options)
    seconds = time.monotonic() - start
    found, report = solution.rotation, dict(solution.report)
    if settings.prescale and found.intra is not None and method == settings.method:
        scaled = prescale.prescale(found, gathered, settings.activation_scale)  # type: ignore[arg-type]
        found, report["prescale_gain_db"] = scaled.rotation, scaled.gain_db
    rotates = found.inter is not None or found.intra is not None
    transform = rotation.astype(found, jnp.bfloat16) if rotates else None
    folded = {}
    for name in SITE_WEIGHTS[site]:
        weight = np.asarray(weights[name])
        missing = mxfp4.padded_size(weight.shape[1]) - weight.shape[1]
        weight = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
        folded[name] = (
            weight if transform is None else rotation.fold_host(weight, transform, dtype=np.float32)
        )
    moment = None
    if second:
        if gathered.second is None:
            raise TorqError('GPTQ needs the second moments: gather them with moments="full"')
        if gathered.experts is None:
            moment = _rotated_moment(gathered.second, transform)
        else:
            prior = EXPERT_PRIOR * gathered.second.shape[0]
            moment = np.stack(
                [
                    _rotated_moment(statistics.expert_second(gathered, e, prior), transform).astype(
                        np.float32
                    )
                    for e in range(len(gathered.experts.tokens))
                ]
            )
    return SolvedSite(transform, folded, report, seconds, moment, outputs)


def _rotated_moment(second: np.ndarray, transform: TwoLevelRotation | None) -> np.ndarray:
    """The second moment of rotated activations, float64."""
    moment = second.astype(np.float64)
    if transform is None:
        return moment
    half = rotation.rotate_host(moment, transform)
    moment = rotation.rotate_host(np.ascontiguousarray(half.T), transform)
    return (moment + moment.T) / 2  # the two products round apart


def second_pass(settings: Settings) -> bool:
    """Whether a layer's calibration activations are needed once more when its sites are solved."""
    return settings.target == "rounded" or settings.mean_correction


def gather_rounded(
    graph: Any,
    config: DecoderConfig,
    parameters: Any,
    index: int,
    stream: streams.Stream,
    transforms: Mapping[str, TwoLevelRotation | None],
    rule: Any,
    weights: Mapping[str, np.ndarray] | None,
    devices: Devices = ONE,
) -> dict[str, statistics.RoundedStatistics]:
    """What rounding does to the activations of each site of a layer; the stream moves on to the next one."""
    found: dict[str, statistics.RoundedStatistics] = {}
    shared = devices.share((parameters, dict(transforms)))
    for group in devices.groups(len(stream)):
        rows = slice(group.start, group.stop)
        own = None if weights is None else {site: weights[site][rows] for site in SITES}
        y, sums = devices.run(_sum_up_rounded, (graph, config, rule), shared, (_stacked(stream, group), own))
        _put_back(stream, group, _finite(y, index))
        for site in SITES:
            one = statistics.from_rounded_sums(sums[site])
            found[site] = statistics.add_rounded(found[site], one) if site in found else one
    return found


def aim(solved: SolvedSite, rounded: statistics.RoundedStatistics, settings: Settings) -> SolvedSite:
    """The site with weights that make up for what rounding does to its activations, as the settings say."""
    if settings.mean_correction:
        solved = dataclasses.replace(solved, means=(rounded.exact, rounded.rounded), packed={})
    if settings.target == "rounded":
        target = {
            name: rounding.correct(weight, rounded.cross, rounded.second, damping=settings.damping).astype(
                np.float32
            )
            for name, weight in solved.folded.items()
        }
        second = None if solved.second is None else rounded.second.astype(np.float64)
        solved = dataclasses.replace(solved, target=target, second=second, packed={})
    return solved


def round_weights(solved: SolvedSite, settings: Settings, rounded: str) -> dict[str, mxfp4.MXFP4Array]:
    """The folded weights in MXFP4; once for all rows that store them alike."""
    if rounded in solved.packed:
        return solved.packed[rounded]
    rule: Any = settings.weight_scale
    packed = solved.packed[rounded] = {}
    if rounded == "nearest":
        packed.update(
            {name: mxfp4.quantize(jnp.asarray(folded), rule) for name, folded in solved.aims.items()}
        )
        return packed
    if solved.second is None or (rounded == "two_sided" and solved.outputs is None):
        raise TorqError("solve the site with second=True for GPTQ, and with outputs for two-sided rounding")
    moments = solved.second if solved.second.ndim == 3 else solved.second[None]
    found: dict[str, list[rounding.Rounded]] = {name: [] for name in solved.aims}
    for expert, moment in enumerate(moments):
        order: Any = settings.order
        factorised = rounding.factorise(moment, damping=settings.damping, order=order)
        for name, folded in solved.aims.items():
            outputs = None
            if rounded == "two_sided" and solved.outputs:
                outputs = solved.outputs[name]
                if len(moments) > 1 and name != "down":  # what experts write in the stream has one moment
                    each = len(outputs) // len(moments)
                    outputs = outputs[expert * each : (expert + 1) * each]
            own = jnp.asarray(np.split(folded, len(moments))[expert])
            found[name].append(rounding.gptq_factorised(own, factorised, rule, outputs=outputs))
    for name, parts in found.items():
        packed[name] = parts[0].weight
        if len(parts) > 1:
            codes, scales = (
                np.concatenate([np.asarray(getattr(p.weight, k)) for p in parts]) for k in ("codes", "scales")
            )
            packed[name] = dataclasses.replace(
                parts[0].weight, codes=jnp.asarray(codes), scales=jnp.asarray(scales)
            )
        # Of experts, the mean.
        solved.report[f"{name}_error_nearest"] = float(np.mean([p.error_nearest for p in parts]))
        solved.report[f"{name}_error_{rounded}"] = float(np.mean([p.error for p in parts]))
    return packed


def store_site(
    config: DecoderConfig,
    float_dtype: Any,
    site: str,
    solved: SolvedSite,
    weights: Mapping[str, Any],
    settings: Settings,
    variant: Variant,
    *,
    wide: bool = False,
) -> tuple[SiteFormat, dict[str, Any]]:
    """Format and parameters of a site as a checkpoint of ``variant`` would store them.

    With ``wide`` what would be MXFP4 is MXFP8, rounded to nearest: GPTQ would win little of an error that is 1/18.
    """
    packed = variant.weights == "mxfp4"
    transform = solved.transform
    form = SiteFormat(
        weights="mxfp4" if packed else "float",
        weight_scale=settings.weight_scale if packed else None,
        activation_scale=settings.activation_scale if variant.activations == "mxfp4" else None,  # type: ignore[arg-type]
        inter=None if transform is None or transform.inter is None else tuple(transform.inter.shape),
        intra=None if transform is None or transform.intra is None else tuple(transform.intra.shape),
        corrected=solved.means is not None,
    )
    if wide:
        form = dataclasses.replace(
            form,
            weights="mxfp8" if packed else "float",
            weight_scale=mixed.SCALE_RULE if packed else None,
            activation_scale=mixed.SCALE_RULE if variant.activations == "mxfp4" else None,
            activations="mxfp8",
        )
    values: dict[str, Any] = {k: v for k, v in weights.items() if k.endswith("_bias")}
    for level in ("inter", "intra"):
        if getattr(form, level) is not None:
            values[level] = np.asarray(getattr(transform, level))
    for name, folded in solved.aims.items():
        if packed:
            q: mxfp4.MXFP4Array | mxfp8.MXFP8Array
            if wide:
                q = mxfp8.quantize(jnp.asarray(folded), mixed.SCALE_RULE)
            else:
                q = round_weights(solved, settings, variant.rounding)[name]
            values[f"{name}_codes"], values[f"{name}_scales"] = np.asarray(q.codes), np.asarray(q.scales)
        else:
            size = form.stored_features(config.site_in_features(site))
            values[name] = folded[:, :size].astype(float_dtype)
        if form.corrected and solved.means is not None:
            exact, read = solved.means if variant.activations == "mxfp4" else (solved.means[0],) * 2
            stored = (
                mxfp4.dequantize(round_weights(solved, settings, variant.rounding)[name])
                if packed
                else values[name]
            )
            stored = np.pad(np.asarray(stored, np.float32), ((0, 0), (0, len(read) - stored.shape[1])))
            error = stored @ read - solved.folded[name] @ exact
            bias = np.asarray(values.get(f"{name}_bias", np.float32(0)), np.float32)
            values[f"{name}_bias"] = (bias - error).astype(np.float32)
    return form, values


_KEPT = (
    "sites",
    "experts",
    "energy",
    "codebook",
    "fold_errors",
    "solver_seconds",
    "seconds",
    "peaks",
    "linear_bytes",
)
"""What a run has gathered over its layers that JSON can hold as it is."""


def store_unrounded(
    config: DecoderConfig, site: str, solved: SolvedSite, weights: Mapping[str, Any], settings: Settings
) -> tuple[SiteFormat, dict[str, Any]]:
    """A site as it is solved, with nothing rounded, aimed or corrected."""
    plain = dataclasses.replace(solved, means=None, target=None)
    unrounded = variant(settings.method, "bf16", "bf16", "nearest")
    return store_site(config, np.float32, site, plain, weights, settings, unrounded)


class _Run:
    """State of one conversion: the streams that travel through the layers, and what is reported."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        calibration: Calibration,
        evaluation: Evaluation | None,
        devices: Devices,
    ):
        self.devices = devices
        self.source, self.settings, self.config = source, settings, source.config
        self.original = source.original if isinstance(source, folding.RotatedSource) else source
        """The source of the rows that are compared: what ``source`` was before it was rotated."""
        self.folded = folding.folded_into(source.config, fold=settings.fold, folded_only=settings.folded_only)
        self.fold_errors: dict[str, float] = {}
        self.calibration, self.evaluation = calibration, evaluation
        self.variants = variants(settings) if evaluation is not None else []
        self.chosen = chosen_variant(settings)
        self.methods = list(dict.fromkeys([settings.method, *(v.method for v in self.variants if v.method)]))
        needed = {solvers.needs_moments(m) for m in self.methods}
        roundings = {v.rounding for v in (self.chosen, *self.variants)}
        if roundings - {"nearest"} or self.folded:
            needed.add("full")
        self.two_sided = "two_sided" in roundings
        self.by_expert = bool(source.config.num_experts and roundings - {"nearest"})
        """Whether each expert's own second moment is needed."""
        self.moments: statistics.Moments = next(m for m in ("full", "inter", "none") if m in needed)  # type: ignore[assignment]
        weighed = self.moments == "full" and settings.sensitivity == "loss"
        self.sensitive = weighed or settings.mixed is not None
        self.sensitivity: gradients.Sensitivity | None = None
        self.choice: mixed.Choice | None = None
        """Sites at MXFP8, once the sensitivity is measured."""
        self.formats: dict[str, SiteFormat] = {}
        self.wide_formats: dict[str, SiteFormat] = {}
        """Formats of the sites at MXFP8."""
        self.sites: list[dict[str, Any]] = []
        self.experts: list[list[int]] = []
        """Of every layer, how many calibration tokens chose each expert."""
        self.energy: list[dict[str, Any]] = []
        self.codebook: dict[str, dict[str, list[list[float]]]] = {
            s: {"before": [], "after": []} for s in SITES
        }
        self.bytes: dict[Variant, int] = {}
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        """Peak resident bytes of the process up to the end of each stage."""
        self.solver_seconds: dict[str, float] = {}
        self.started = time.monotonic()
        self.linear_bytes = 0
        self.layers = 0
        """How many are finished."""
        self.stream: streams.Stream
        self.unrounded: streams.Stream
        """The first calibration sequence through the transformed model before anything is rounded; where the source
        is rotated, through the original, too (otherwise the calibration stream has it)."""
        self.streams: dict[Variant, streams.Stream] = {}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
        self.peaks[stage] = _peak_rss()

    # -- streams -------------------------------------------------------------------------------------------

    def stream_bytes(self) -> int:
        """Bytes of all streams together."""
        tokens = self.calibration.tokens.size
        if self.evaluation is not None:
            tokens += self.evaluation.tokens.size * len(self.variants)
        tokens += 2 * self.calibration.tokens.shape[1]
        return 4 * tokens * self.config.hidden_size

    def in_files(self) -> bool:
        """Whether the streams are too large for memory."""
        return self.stream_bytes() > streams.IN_MEMORY_BYTES

    def begin(self, folder: Path, state: Mapping[str, Any] | None) -> None:
        """Start the streams in ``folder``, or go on from ``state``, where an earlier run was stopped."""
        if state is None:
            files.remove(folder)
            self.embed(folder)
            return
        for name, value in state["run"].items():
            setattr(self, name, value)
        self.started -= state["seconds"]
        self.layers = state["layers"]
        self.formats, self.wide_formats = (
            {site: SiteFormat.from_json(form) for site, form in state[name].items()}
            for name in ("formats", "wide_formats")
        )
        self.bytes = {v: state["bytes"][v.label] for v in self.variants if v is not FLOAT}
        self.stream, self.unrounded, *others = (
            streams.resume(folder / str(i), count, self.layers, in_files=self.in_files())
            for i, count in enumerate(state["streams"])
        )
        self.streams = dict(zip(self.stream_order(), others, strict=True))

    def state(self, writer: checkpoint.CheckpointWriter) -> dict[str, Any]:
        """All that a later run needs beside the streams and the sensitivity, for JSON."""
        return {
            "layers": self.layers,
            "pieces": writer.hashes,
            "streams": [len(s) for s in self.all_streams()],
            "formats": {site: form.to_json() for site, form in self.formats.items()},
            "wide_formats": {site: form.to_json() for site, form in self.wide_formats.items()},
            "bytes": {v.label: size for v, size in self.bytes.items()},
            "seconds": time.monotonic() - self.started,
            "run": {name: getattr(self, name) for name in _KEPT},
        }

    def keep(self, writer: checkpoint.CheckpointWriter) -> dict[str, Any]:
        """Make the streams outlast the process after a layer, and say so; see :meth:`state`."""
        for stream in self.all_streams():
            stream.keep()
        self.layers += 1
        return self.state(writer)

    def forget(self) -> None:
        """Delete what was needed before the last layer only."""
        for stream in self.all_streams():
            stream.forget()

    def all_streams(self) -> Iterator[streams.Stream]:
        """All of them, in the order of their folders."""
        yield from (self.stream, self.unrounded, *self.streams.values())

    def stream_order(self) -> list[Variant]:
        """The rows in the order of their streams."""
        return sorted(self.variants, key=self.is_original)

    def embed(self, folder: Path) -> None:
        """Start the streams: residual streams of one sequence each, ``[1, t, H]`` float32 on the host."""
        table = self.source.read(names.outer_tensors(self.config)["embed"])
        stored, original = np.dtype(self.source.float_dtype), None

        def start(tokens: np.ndarray, dtype: Any, *tables: np.ndarray) -> streams.Stream:
            arrays = (
                own[row][None].astype(dtype).astype(np.float32)
                for own in tables or (table,)
                for row in tokens
            )
            return streams.start(folder / str(next(numbers)), arrays, in_files=self.in_files())

        numbers = itertools.count()
        self.stream = start(self.calibration.tokens, table.dtype)
        both = [table]
        if self.original is not self.source:
            both.append(self.original.read(names.outer_tensors(self.original.config)["embed"]))
        self.unrounded = start(self.calibration.tokens[:1], table.dtype, *both)
        for variant in self.stream_order() if self.evaluation is not None else ():
            if self.is_original(variant) and table is not original:
                table = original = self.original.read(names.outer_tensors(self.original.config)["embed"])
            dtype = table.dtype if variant is FLOAT else stored
            self.streams[variant] = start(self.evaluation.tokens, dtype)  # type: ignore[union-attr]

    def layer(self, index: int, writer: checkpoint.CheckpointWriter, progress: LayerProgress) -> None:
        """Take every stream through layer ``index`` and write the chosen method's shard of it."""
        progress.stage("reading")
        with self.timed("reading"):
            parameters = read_layer(self.source, index)
        graph, _ = decoder.make_layer(self.config)
        progress.stage("statistics")
        entered = self.stream[0] if self.folded else None
        with self.timed("statistics"):
            gathered = self.calibrate(graph, parameters, index)
            if FLOAT in self.streams:
                self.advance(FLOAT, graph, parameters, index)

        read, measured = parameters, gathered
        for method in self.methods:
            progress.stage(method)
            with self.timed("folding") if self.folded else contextlib.nullcontext():
                parameters, gathered, folds = self.present(method, index, read, measured, entered)
            shared = {k: v for k, v in parameters.items() if k not in SITES}
            rows = [v for v in self.variants if v.method == method]
            # The chosen one is written even where nothing is evaluated.
            written = dict.fromkeys([*rows, self.chosen] if method == self.settings.method else rows)
            for variant in rows:
                self.bytes[variant] = self.bytes.get(variant, 0) + _nbytes(shared)
            layers: dict[Variant, dict[str, Any]] = {v: dict(shared) for v in rows}
            formats: dict[Variant, dict[str, SiteFormat]] = {v: {} for v in rows}
            shard: dict[str, Any] = dict(shared)
            roundings = {v.rounding for v in written}
            unrounded: dict[str, Any] = dict(shared)
            exact: dict[str, SiteFormat] = {}
            sites = self.solve(method, index, parameters, gathered, folds, roundings)
            if method == self.settings.method and second_pass(self.settings):
                sites = self.look_again(graph, parameters, index, dict(sites), progress)
            for site, solved in sites:
                wide = self.is_wide(index, site)
                with self.timed("rounding"):
                    stored = {
                        v: store_site(
                            self.config,
                            self.source.float_dtype,
                            site,
                            solved,
                            parameters[site],
                            self.settings,
                            v,
                            wide=wide and v.mixed,
                        )
                        for v in written
                    }
                    for variant in rows:
                        form, values = stored[variant]
                        formats[variant][site] = form.decoded()
                        self.bytes[variant] = self.bytes.get(variant, 0) + _nbytes(values)
                        # Rounded operands are exact in bfloat16, and are multiplied in it.
                        narrow = jnp.float32 if form.activation_scale is None else jnp.bfloat16
                        layers[variant][site] = checkpoint.decode_site(
                            values, self.config, site, form, narrow
                        )
                    if method == self.settings.method:
                        form, shard[site] = stored[self.chosen]
                        known = self.wide_formats if wide else self.formats
                        if known.setdefault(site, form) != form:
                            raise ConversionError(
                                f"layer {index}, {site}: the rotation has format {form}, that of earlier layers "
                                f"{known[site]}: all layers must share one"
                            )
                        self.linear_bytes += _weight_bytes(shard[site])
                        exact[site], unrounded[site] = store_unrounded(
                            self.config, site, solved, parameters[site], self.settings
                        )
                if method == self.settings.method:
                    with self.timed("diagnostics"):
                        self.diagnose(
                            index, site, solved, gathered[site], parameters[site], form, shard[site]
                        )
            if method == self.settings.method:
                with self.timed("equivalence"):
                    self.advance_unrounded(decoder.make_layer(self.config, exact)[0], unrounded, index)
                progress.stage("writing")
                with self.timed("writing"):
                    writer.layer(index, shard)
            with self.timed("evaluation"):
                for variant in rows:
                    quantised, _ = decoder.make_layer(self.config, formats[variant])
                    self.advance(variant, quantised, layers[variant], index)

    def solve(
        self,
        method: str,
        index: int,
        parameters: Mapping[str, Any],
        gathered: Mapping[str, SiteStatistics],
        folds: folding.FoldedLayer | None,
        roundings: set[str],
    ) -> Iterator[tuple[str, SolvedSite]]:
        """Each site of a layer when it is asked for: solved ones are large, and most are needed one at a time."""
        for site in SITES:
            with self.timed("solving"):
                outputs = None
                if "two_sided" in roundings and self.sensitivity is not None:
                    outputs = self.sensitivity.outputs(index, site)
                    outputs = outputs if folds is None else folds.outputs(site, outputs)
                solved = solve_site(
                    site,
                    gathered[site],
                    parameters[site],
                    self.settings,
                    site_method(method, site, self.settings, self.folded),
                    second=roundings != {"nearest"},
                    outputs=outputs,
                )
                self.solver_seconds[method] = self.solver_seconds.get(method, 0.0) + solved.seconds
                if folds is not None:
                    solved.report.update(folds.reports.get(site, {}))
            yield site, solved

    def is_original(self, variant: Variant) -> bool:
        """Whether a row is of the model as it was while the source is rotated."""
        return variant.method not in (None, self.settings.method) and self.original is not self.source

    def present(
        self,
        method: str,
        index: int,
        parameters: dict[str, Any],
        gathered: dict[str, SiteStatistics],
        entered: Any,
    ) -> tuple[dict[str, Any], dict[str, SiteStatistics], folding.FoldedLayer | None]:
        """Parameters and statistics of a layer as ``method`` sees them: folded ones only the chosen method.

        ``entered`` is one calibration sequence ``[1, t, H]`` before the layer, on which the folded one must agree
        with the original.
        """
        if method != self.settings.method:
            own = parameters if self.original is self.source else read_layer(self.original, index)
            return own, gathered, None
        if not self.folded:
            return parameters, gathered, None
        folds = folding.fold_layer(
            self.config, parameters, gathered, scales=("mlp_out",) if self.settings.folded_only else ()
        )
        original = parameters if self.original is self.source else read_layer(self.original, index)
        errors = folding.function_error(self.source, original, folds.parameters, entered)
        for name, error in sorted(errors.items(), key=lambda item: -item[1]):  # the worst is told
            if not error <= FOLD_TOLERANCE:
                raise ConversionError(
                    f"layer {index}: folding changed the float output of {name} by {error:.2e} (relative), more than "
                    f"{FOLD_TOLERANCE:.0e}: a transform is too badly conditioned to use: convert without --fold and "
                    "--folded-only"
                )
            self.fold_errors[name] = max(error, self.fold_errors.get(name, 0.0))
        return folds.parameters, folds.statistics, folds

    def calibrate(self, graph: Any, parameters: Any, index: int) -> dict[str, SiteStatistics]:
        """Statistics of every site from the calibration stream, which moves on to the next layer."""
        measured = self.weighing
        (gathered,) = gather_layer(
            graph,
            self.config,
            parameters,
            index,
            self.stream,
            [self.token_weights(index)],
            moments=self.moments,
            seed=self.settings.seed,
            move=not second_pass(self.settings),
            by_expert=self.by_expert,
            devices=self.devices,
        )
        if (experts := gathered["mlp_in"].experts) is not None:
            self.experts.append(experts.tokens.astype(int).tolist())
        for site, found in gathered.items():
            gain = None
            if self.moments == "full":
                gain = output_gain(parameters[site], site) if measured is None else measured.gain(index, site)
            outputs = self.config.site_used_outputs(site)
            gathered[site] = dataclasses.replace(found, gain=gain, outputs=outputs)
        return gathered

    @property
    def weighing(self) -> gradients.Sensitivity | None:
        """The sensitivity, where statistics are weighed by it: it may have been measured for ``mixed`` alone."""
        return self.sensitivity if self.moments == "full" else None

    def token_weights(self, index: int) -> dict[str, np.ndarray] | None:
        """How much each calibration token counts at the sites of a layer; None where all count alike."""
        measured = self.weighing
        return None if measured is None else {site: measured.weights(index, site) for site in SITES}

    def look_again(
        self,
        graph: Any,
        parameters: Any,
        index: int,
        sites: Mapping[str, SolvedSite],
        progress: LayerProgress,
    ) -> Iterator[tuple[str, SolvedSite]]:
        """The solved sites, made to make up for what rounding does to their activations; the stream then moves on.

        Sites at MXFP8 stay as they are: there is little to make up for.
        """
        progress.stage("rounded statistics")
        with self.timed("rounded statistics"):
            found = gather_rounded(
                graph,
                self.config,
                parameters,
                index,
                self.stream,
                {site: solved.transform for site, solved in sites.items()},
                self.settings.activation_scale,
                self.token_weights(index),
                self.devices,
            )
        for site, solved in sites.items():
            with self.timed("rounded statistics"):
                if not self.is_wide(index, site):
                    solved = aim(solved, found[site], self.settings)
            yield site, solved

    def is_wide(self, index: int, site: str) -> bool:
        """Whether a site is kept at MXFP8."""
        return self.choice is not None and self.choice.holds(index, site)

    def measure_sensitivity(self, folder: Path, progress: LayerProgress) -> None:
        """The pass back through the source, whose findings the statistics of every layer then use."""
        graph, _ = decoder.make_layer(self.config)
        self.sensitivity = gradients.measure(
            self.source,
            functools.partial(read_layer, self.source),
            functools.partial(self.devices.run, forward, (graph, self.config)),
            self.calibration.tokens,
            folder,
            seed=self.settings.seed,
            progress=progress,
            outputs=self.two_sided,
            costs=self.settings.mixed is not None,
            devices=self.devices,
        )
        if self.settings.mixed is not None:
            candidates = [
                mixed.candidate(self.config, layer, site, self.sensitivity.costs(layer, site))
                for layer in range(self.config.num_layers)
                for site in SITES
            ]
            self.choice = mixed.choose(self.config, candidates, self.settings.mixed)

    def advance(self, variant: Variant, graph: Any, parameters: Any, index: int) -> None:
        """Take one evaluation stream through a layer."""
        stream = self.streams[variant]
        parameters = self.devices.share(parameters)
        for group in self.devices.groups(len(stream)):
            x = _stacked(stream, group)
            y, _ = self.devices.run(forward, (graph, self.config), parameters, (x,))
            _put_back(stream, group, _finite(y, index))

    # -- sites ---------------------------------------------------------------------------------------------

    def advance_unrounded(self, graph: Any, parameters: Any, index: int) -> None:
        """Take the transformed model, and the original of a rotated source, through a layer on one sequence."""
        self.unrounded[0] = _finite(run_layer(graph, self.config, parameters, self.unrounded[0]), index)
        if self.original is not self.source:
            own, config = read_layer(self.original, index), self.original.config
            y = run_layer(decoder.make_layer(config)[0], config, own, self.unrounded[1])
            self.unrounded[1] = _finite(y, index)

    def equivalence(self) -> dict[str, Any]:
        """How far the transformed model's logits are from the original's before anything is rounded.

        Raises:
          ConversionError: further than the sites' own tolerances add up to.
        """
        rotated = self.original is not self.source
        exact = self.unrounded[1] if rotated else self.stream[0]
        heads = [self.head(source) for source in (self.original, self.source)]
        size = error = 0.0
        for first in range(0, exact.shape[1], evaluate.LOGITS_CHUNK):
            part = slice(first, first + evaluate.LOGITS_CHUNK)
            original, ours = (
                decoder.logits(jnp.asarray(x[:, part]), jnp.asarray(norm), head, self.config.norm_eps)
                for x, (norm, head, *_) in zip((exact, self.unrounded[0]), heads, strict=True)
            )
            size += float(jnp.sum(original * original))
            error += float(jnp.sum((ours - original) ** 2))
        relative = float(np.sqrt(error / size)) if size else float(np.sqrt(error))
        # Each site may be off by its tolerance; errors of sites that know nothing of each other add up in squares.
        tolerance = FOLD_TOLERANCE * float(np.sqrt(len(SITES) * self.config.num_layers))
        if not relative <= tolerance:
            raise ConversionError(
                "before anything is rounded, the transformed model's logits on the first calibration sequence "
                f"differ from the original's by {relative:.2e} (relative), more than {tolerance:.1e}: a transform is "
                "too badly conditioned to use: choose another method, or --option orthogonal_only=true"
            )
        return {"logits_error": relative, "tolerance": tolerance, "tokens": int(exact.shape[1])}

    def diagnose(
        self,
        index: int,
        site: str,
        solved: SolvedSite,
        gathered: SiteStatistics,
        weights: Mapping[str, Any],
        form: SiteFormat,
        values: Mapping[str, Any],
    ) -> None:
        """Measure one converted site on its sample of (normalised) activations."""
        every = max(1, len(gathered.samples) // _DIAGNOSTIC_TOKENS)
        x = jnp.asarray(gathered.samples[::every])
        experts = None if gathered.experts is None else gathered.experts.samples[::every]
        rotated = prepare(x, solved.transform, None)
        rounded = prepare(x, solved.transform, form.activation_scale, form.activations)
        stored = checkpoint.decode_site(values, self.config, site, form, jnp.float32)
        size = self.config.site_in_features(site)
        groups = _by_expert(experts, self.config.num_experts)
        exact, folded, a4, full = (
            jnp.concatenate([_outputs(site, a[rows], w, *part) for rows, *part in groups])
            for a, w in (
                (x, weights),
                (rotated, solved.folded),
                (rounded, solved.folded),
                (rounded, stored),
            )
        )
        fold_error = float(jnp.linalg.norm(folded - exact) / jnp.maximum(jnp.linalg.norm(exact), 1e-30))
        if not fold_error <= FOLD_TOLERANCE:
            raise ConversionError(
                f"layer {index}, {site}: folding the rotation changed the float output by {fold_error:.2e} "
                f"(relative), more than {FOLD_TOLERANCE:.0e}: the rotation is too badly conditioned to use"
            )
        before, after = _block_energy(x), _block_energy(rotated)
        # Occupancy is counted for rules that follow from amax alone; mse would need the rounding itself.
        own = self.settings.activation_scale if form.activations == "mxfp8" else form.activation_scale
        rule: Any = own if own in ("floor", "ceil") else "even"
        shares = {
            k: solvers.codebook_histogram(np.asarray(v).reshape(-1, mxfp4.BLOCK), rule)
            for k, v in (("before", x), ("after", rotated))
        }
        for k, v in shares.items():
            self.codebook[site][k].append(np.asarray(v, np.float64).mean(0).tolist())
        cost = None if solved.transform is None else rotation.online_cost(solved.transform)
        error = 0.0 if solved.transform is None else rotation.orthogonality_error(solved.transform)
        self.sites.append(
            {
                "layer": index,
                "site": site,
                "features": size,
                "weights": form.weights,
                "imbalance_before": _imbalance(before),
                "imbalance_after": _imbalance(after),
                "entropy_before": float(solvers.entropy_bits(shares["before"])),
                "entropy_after": float(solvers.entropy_bits(shares["after"])),
                "activation_sqnr_db": _sqnr(rotated, rounded),
                "output_sqnr_db": _sqnr(exact, full),
                "output_sqnr_a4_db": _sqnr(exact, a4),
                "predicted_sqnr_db": predicted_sqnr(
                    exact,
                    [
                        (
                            (rotated[rows], rounded[rows]),
                            [
                                tuple(_part(w[n], *part) for w in (solved.folded, stored))
                                for n in SITE_WEIGHTS[site]
                            ],
                        )
                        for rows, *part in groups
                    ],
                ),
                "fold_error": fold_error,
                "online": online_parts(form),
                "folded_into": self.folded.get(site),
                "multiply_adds": size * self.config.site_used_outputs(site) * self.config.site_rows(site),
                "online_multiply_adds": 0
                if cost is None
                else int(cost.multiply_adds) * self.config.site_rows(site),
                "online_bytes": 0 if cost is None else int(cost.bytes_read),
                "orthogonality_error": float(error),
                "condition_number": 1.0
                if solved.transform is None
                else rotation.condition_number(solved.transform),
                "solver_seconds": solved.seconds,
                "solver": solved.report,
            }
        )
        middle = self.config.num_layers // 2
        if index == middle:
            self.energy.append(
                {"layer": index, "site": site, "before": before.tolist(), "after": after.tolist()}
            )

    def stored_formats(self) -> dict[str, Any]:
        """What the manifest says of formats: those of all layers, the exceptions, and how these were chosen."""
        common = {s: self.formats[s] if s in self.formats else self.wide_formats[s] for s in SITES}
        described: dict[str, Any] = {
            "sites": {site: form.to_json() for site, form in common.items()},
            "online": {site: online_parts(form) for site, form in common.items()},
        }
        if self.choice is not None:
            layers = [
                {s: (self.wide_formats if self.choice.holds(i, s) else self.formats)[s] for s in SITES}
                for i in range(self.config.num_layers)
            ]
            described["exceptions"] = checkpoint.exceptions(common, layers)
            described["mixed"] = self.choice.to_json()
        return described

    # -- results -------------------------------------------------------------------------------------------

    def stored_outer(self, name: str) -> np.ndarray:
        """A parameter outside the layers as the checkpoint stores it."""
        value = self.source.read(names.outer_tensors(self.config)[name])
        return value.astype(np.float32 if name == "norm" else self.source.float_dtype)

    def rows(self) -> list[dict[str, Any]]:
        """The evaluated table: perplexities, and the difference to float with its paired standard error."""
        if self.evaluation is None:
            return []
        outer = {False: self.head(self.source)}
        if any(self.is_original(v) for v in self.variants):
            outer[True] = self.head(self.original)
        losses = {}
        for variant, stream in self.streams.items():
            norm, exact, stored, _ = outer[self.is_original(variant)]
            own = exact if variant is FLOAT else stored
            losses[variant] = np.concatenate(
                [
                    evaluate.negative_log_likelihood(
                        jnp.asarray(x), jnp.asarray(t[None]), norm, own, eps=self.config.norm_eps
                    )
                    for x, t in zip(stream, self.evaluation.tokens, strict=True)
                ]
            ).mean(-1, dtype=np.float64)
        table = []
        for variant in self.variants:
            outer_bytes = outer[self.is_original(variant)][-1]
            own_loss = losses[variant]
            delta = evaluate.estimate_json(evaluate.estimate(own_loss - losses[FLOAT]))
            table.append(
                {
                    "label": self.label(variant),
                    "method": variant.method,
                    "rounding": variant.rounding,
                    "weights": "float" if variant.weights == "bf16" else variant.weights,
                    "activations": "float" if variant.activations == "bf16" else variant.activations,
                    "chosen": variant == self.chosen,
                    "bytes": self.original_bytes() if variant is FLOAT else self.bytes[variant] + outer_bytes,
                    "perplexity": float(np.exp(own_loss.mean())),
                    "nll": float(own_loss.mean()),
                    "delta_nats": None if variant is FLOAT else delta["mean"],
                    "delta_standard_error": None if variant is FLOAT else delta["standard_error"],
                }
            )
        return table

    def label(self, variant: Variant) -> str:
        """Name of a finished row: where there are sites at MXFP8, how many."""
        if not variant.mixed or self.choice is None:
            return variant.label
        count = len(self.choice.sites)
        pure = dataclasses.replace(variant, mixed=False).label
        return f"{pure}, {count} site{'s' * (count != 1)} MXFP8"

    def head(self, source: Source) -> tuple[np.ndarray, Any, Any, int]:
        """Final norm, output projection as read and as stored, and the bytes of all that lies outside the layers."""
        config = source.config
        tensors = names.outer_tensors(config)
        head = source.read(tensors["embed" if config.tie_embeddings else "lm_head"])
        norm = source.read(tensors["norm"]).astype(np.float32)
        stored = head.astype(source.float_dtype, copy=False)
        size = norm.nbytes + stored.nbytes * (1 if config.tie_embeddings else 2)
        return norm, jnp.asarray(head), jnp.asarray(stored), size

    def parameters(self) -> int:
        """Elements of all of the original's tensors."""
        return sum(int(np.prod(shape)) for shape in names.expected_tensors(self.original.config).values())

    def original_bytes(self) -> int:
        """Bytes of the float model in the dtype that its checkpoint has, or would have."""
        return self.parameters() * np.dtype(self.source.float_dtype).itemsize

    def report(self, rows: list[dict[str, Any]], equivalence: dict[str, Any], out: Path) -> dict[str, Any]:
        """Everything that was measured, as :mod:`convert.report` documents it."""
        config, original = self.config, self.original_bytes()
        stored = checkpoint.directory_bytes(out, "layers", "outer")
        evaluation = None
        if self.evaluation is not None:
            evaluation = {"protocol": dataclasses.asdict(self.evaluation.protocol), "rows": rows}
        return {
            "model": {
                "name": self.source.name,
                "source_kind": self.source.kind,
                "architecture": config.architecture,
                "parameters": self.parameters(),
                "linear_parameters": config.linear_parameters(),
                "layers": config.num_layers,
                "hidden_size": config.hidden_size,
            },
            "settings": {
                **self.settings.to_json(),
                "calibration": self.calibration.to_json(),
                "versions": versions(),
            },
            "evaluation": evaluation,
            "equivalence": equivalence,
            "size": {
                "original_bytes": original,
                "checkpoint_bytes": stored,
                "compression": original / stored,
                "linear_bytes": self.linear_bytes,
                "bits_per_weight": 8 * self.linear_bytes / config.linear_parameters(),
            },
            "folding": None if self.settings.fold == "none" else self.folding(),
            "sites": self.sites,
            "experts": self.experts_report(),
            "mixed": None if self.choice is None else self.choice.to_json(),
            "plots": {
                "block_energy": self.energy,
                "codebook": [
                    {"site": site, **{k: np.mean(v, axis=0).tolist() for k, v in shares.items()}}
                    for site, shares in self.codebook.items()
                ],
            },
            "samples": [],
            "timings": {
                "total_seconds": time.monotonic() - self.started,
                "stages": self.seconds,
                "solvers": self.solver_seconds,
            },
            "memory": {"peak_rss_bytes": _peak_rss(), "by_stage": self.peaks},
            "warnings": self.warnings(),
        }

    def folding(self) -> dict[str, Any]:
        """What was folded into what, and how exactly."""
        return {
            "into": self.folded,
            "refused": folding.refused(self.config),
            "function_error": self.fold_errors,
            "tolerance": FOLD_TOLERANCE,
            "untied_bytes": folding.untied_bytes(self.source),
        }

    def experts_report(self) -> dict[str, Any] | None:
        """What the router did with the calibration text, and which experts saw too little of it."""
        if not self.experts:
            return None
        least = int(np.ceil(FEW_TOKENS * self.config.hidden_size))
        return {
            "experts": self.config.num_experts,
            "per_token": self.config.experts_per_token,
            "few_tokens": least,
            "own_moments": self.by_expert,
            "layers": [
                {
                    "layer": index,
                    "tokens": counts,
                    "few": [expert for expert, seen in enumerate(counts) if seen < least],
                }
                for index, counts in enumerate(self.experts)
            ],
        }

    def warnings(self) -> list[str]:
        """What a reader of the report must not overlook."""
        found = []
        if self.calibration.source == "random tokens":
            found.append("calibrated on random tokens: shapes and memory are tested, accuracy is not")
        for row in self.sites:
            predicted, measured = row["predicted_sqnr_db"], row["output_sqnr_db"]
            if predicted is not None and measured is not None and measured < predicted - WORSE_DB:
                found.append(
                    f"layer {row['layer']}, {row['site']}: the output's error is {predicted - measured:.1f} dB "
                    "larger than the sizes of its casts' errors explain; --mixed keeps such sites at MXFP8"
                )
        found += report.few_tokens(self.experts_report())
        if self.evaluation is None:
            found.append("not evaluated: pass --evaluate FILE to measure the perplexity")
        if self.choice is not None and not self.choice.sites:
            found.append(mixed.nothing_chosen(self.config, self.choice))
        if self.settings.fold != "none":
            outcome = "no transform at all" if self.settings.folded_only else "its transform runs online"
            found += [f"{site}: {why}: {outcome}" for site, why in folding.refused(self.config).items()]
        if untied := folding.untied_bytes(self.source):
            found.append(
                f"the rotated residual stream unties the embeddings: {untied / 1e6:.1f} MB of output projection are "
                "stored beside them"
            )
        return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(graph: Any, config: DecoderConfig, parameters: Any, x: Any) -> Any:
    """The residual stream ``x [1, t, H]`` after one layer."""
    rope = decoder.rope_tables(config, jnp.arange(x.shape[1]))
    return decoder.merge_layer(graph, parameters)(x, rope)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_tapped(graph: Any, config: DecoderConfig, parameters: Any, x: Any) -> Any:
    """The residual stream after one layer, and the activations that enter each site; each token's experts."""
    taps: dict[str, Any] = {}

    def record(name: str, activation: Any) -> Any:
        if name in SITES or name == "router":
            taps[name] = activation
        return activation

    rope = decoder.rope_tables(config, jnp.arange(x.shape[1]))
    y = decoder.merge_layer(graph, parameters)(x, rope, tap=record)[0]
    return y, taps


def _finite(x: Any, index: int) -> np.ndarray:
    x = np.asarray(x)
    if not np.isfinite(x).all():
        raise ConversionError(
            f"activations became NaN or infinite in layer {index}: the checkpoint is unsound"
        )
    return x


def gather_layer(
    graph: Any,
    config: DecoderConfig,
    parameters: Any,
    index: int,
    stream: Any,
    weightings: Sequence[Mapping[str, np.ndarray] | None],
    *,
    moments: statistics.Moments,
    seed: int,
    move: bool = True,
    by_expert: bool = False,
    devices: Devices = ONE,
) -> list[dict[str, SiteStatistics]]:
    """Statistics of every site of layer ``index``, once under each weighting; the stream moves on to the next layer.

    Unless ``move`` is false: a second look at the same activations needs it where it is. A weighting has
    ``[sequences, t]`` for every site, or is None: see :func:`torq_jax.statistics.gather`. With ``by_expert`` second
    moments of experts are gathered, too.
    """
    each = -(-SAMPLE_TOKENS // len(stream))
    gathered: list[dict[str, SiteStatistics]] = [{} for _ in weightings]
    shared = devices.share(parameters)
    for group in devices.groups(len(stream)):
        x = _stacked(stream, group)
        rows_of = {site: x.shape[1] * config.site_rows(site) for site in SITES}
        kept_rows = {
            site: np.stack([statistics.sampled(count, each, seed + i) for i in group])
            for site, count in rows_of.items()
        }
        own = [
            None
            if weights is None
            else {
                site: np.stack([statistics.check_weights(weights[site][i], count) for i in group])
                for site, count in rows_of.items()
            }
            for weights in weightings
        ]
        (y, samples), sums = devices.run(
            _sum_up, (graph, config, moments, by_expert), shared, (x, kept_rows, own)
        )
        y = _finite(y, index)
        if move:
            _put_back(stream, group, y)
        for found, kept, added in zip(gathered, samples, sums, strict=True):
            for site in SITES:
                rows, sizes, chosen = (np.concatenate(np.asarray(a)) for a in kept[site])
                sums_of, of_experts = added[site]
                one = statistics.from_sums(sums_of, rows, sizes)
                if of_experts is not None:
                    tokens, second = of_experts
                    seen = statistics.ExpertStatistics(
                        np.asarray(tokens, np.float64), chosen, None if second is None else np.asarray(second)
                    )
                    one = dataclasses.replace(one, experts=seen)
                found[site] = statistics.add(found[site], one) if site in found else one
    return gathered


def _sum_up(
    graph: Any,
    config: DecoderConfig,
    moments: Any,
    by_expert: bool,
    parameters: Any,
    x: Any,
    rows: Any,
    weightings: Any,
) -> tuple[Any, Any]:
    """A sequence after one layer and what is kept of it under each weighting, and sums of its activations."""
    y, taps = run_tapped(graph, config, parameters, x)
    chosen = taps.pop("router", None)
    kept, sums = [], []
    for weights in weightings:
        found: dict[str, Any] = {}
        added: dict[str, Any] = {}
        for site, activation in taps.items():
            own = None if weights is None else weights[site][0]
            flat, kept_rows = activation.reshape(-1, activation.shape[-1]), jnp.asarray(rows[site][0])
            site_sums, samples, sizes = statistics.sum_up(flat, kept_rows, own, moments)
            of_experts, samples_experts = None, jnp.zeros(len(kept_rows), jnp.int32)
            if config.has_experts(site):
                count, each = config.num_experts, config.experts_per_token
                of_experts = statistics.sum_up_experts(
                    flat, chosen.reshape(-1, each), own, count, by_expert and moments == "full"
                )
                pairs = kept_rows * (
                    each // config.site_rows(site)
                )  # the heaviest one of each token in mlp_in
                samples_experts = chosen.reshape(-1)[pairs]
            added[site] = (site_sums, of_experts)
            found[site] = (samples[None], sizes[None], samples_experts[None])
        sums.append(added)
        kept.append(found)
    return (y, kept), sums


def _sum_up_rounded(
    graph: Any, config: DecoderConfig, rule: Any, shared: Any, x: Any, weights: Any
) -> tuple[Any, Any]:
    """A sequence after one layer, and what rounding does to its activations."""
    parameters, transforms = shared
    y, taps = run_tapped(graph, config, parameters, x)
    sums = {}
    for site in SITES:
        activation = taps[site]
        own = None if weights is None else jnp.asarray(weights[site][0])
        flat = activation.reshape(-1, activation.shape[-1])
        sums[site] = statistics.sum_up_rounded(flat, transforms[site], rule, own)
    return y, sums


def forward(graph: Any, config: DecoderConfig, parameters: Any, x: Any) -> tuple[Any, Any]:
    """A sequence after one layer."""
    return run_layer(graph, config, parameters, x), ()


def _stacked(stream: Any, group: range) -> np.ndarray:
    """Sequences of a stream that run together, ``[n, t, H]``."""
    return np.concatenate([stream[i] for i in group])


def _put_back(stream: Any, group: range, y: np.ndarray) -> None:
    for row, i in enumerate(group):
        stream[i] = y[row : row + 1]


def output_gain(weights: Mapping[str, Any], site: str) -> np.ndarray:
    """:func:`torq_jax.statistics.output_gain` of a site's weights."""
    return statistics.output_gain(np.concatenate([np.asarray(weights[n]) for n in SITE_WEIGHTS[site]]))


def _block_energy(x: Any) -> np.ndarray:
    """Mean square of each block over tokens, ``[B]``."""
    return np.asarray(jnp.mean(x.reshape(x.shape[0], -1, mxfp4.BLOCK) ** 2, axis=(0, 2)), np.float64)


def _imbalance(energy: np.ndarray) -> float:
    """Largest block energy over the mean one; 1 where all are zero."""
    return float(energy.max() / energy.mean()) if energy.any() else 1.0


def _sqnr(signal: Any, noisy: Any) -> float | None:
    """Signal over quantisation noise in dB; None without noise."""
    noise = float(jnp.sum((signal - noisy) ** 2))
    return 10 * float(np.log10(float(jnp.sum(signal**2)) / noise)) if noise > 0 else None


def _by_expert(experts: np.ndarray | None, count: int) -> list[tuple[Any, int, int]]:
    """Samples that are multiplied with the same weights: their rows, the expert, and of how many it is one."""
    if experts is None:
        return [(slice(None), 0, 1)]
    return [(np.flatnonzero(experts == e), int(e), count) for e in np.unique(experts)]


def _part(weight: Any, expert: int, count: int) -> Any:
    """One expert's rows of a weight ``[count out, d]``."""
    rows = len(weight) // count
    return weight[expert * rows : (expert + 1) * rows]


def _outputs(site: str, x: Any, weights: Mapping[str, Any], expert: int, count: int) -> Any:
    """Outputs of all of a site's linear layers, of one expert where there are several, side by side."""
    own = (jnp.asarray(_part(weights[name], expert, count), jnp.float32) for name in SITE_WEIGHTS[site])
    return jnp.concatenate([dot(x, weight) for weight in own], axis=-1)


def predicted_sqnr(exact: Any, groups: Sequence[tuple[tuple[Any, Any], Sequence[Any]]]) -> float | None:
    """Signal-to-noise ratio in dB of a site's output, from the errors of its two casts and their sizes alone.

    Errors ``e`` of activations ``x [tokens, d]`` whose parts in different features know nothing of each other change
    ``x @ W.T`` by ``sum_j |e_j|^2 |W_j|^2`` in squares, and errors of the weight likewise. GPTQ's parts do know of
    each other, and do better; what errs in one direction that the weights read strongly does worse.

    Args:
      exact: the outputs ``[tokens, outs]``.
      groups: of tokens that are multiplied with the same weights. Of each, the activations before and after the cast,
        ``[tokens, d]``, and pairs of each linear layer's weight before and after, ``[out, d]``.
    """

    def energy(a: np.ndarray) -> np.ndarray:
        return (a**2).sum(0)  # [d]

    noise = 0.0
    for activations, weights in groups:
        x, rounded = (np.asarray(a, np.float64) for a in activations)
        for before, after in weights:
            w, stored = np.asarray(before, np.float64), np.asarray(after, np.float64)
            stored = np.pad(stored, ((0, 0), (0, w.shape[1] - stored.shape[1])))
            noise += energy(rounded - x) @ energy(w) + energy(x) @ energy(stored - w)
    size = (np.asarray(exact, np.float64) ** 2).sum()
    return float(10 * np.log10(size / noise)) if size and noise else None


def _peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one, up to the exec
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _weight_bytes(values: Mapping[str, Any]) -> int:
    keep = ("inter", "intra")
    return sum(v.nbytes for k, v in values.items() if k not in keep and not k.endswith("_bias"))


def _checkpoint_bytes(source: Source, settings: Settings) -> int:
    """About how large the checkpoint will be: uncompressed, without rotations and padding."""
    config, itemsize = source.config, np.dtype(source.float_dtype).itemsize
    packed = 17 / 32 * (1 + (settings.mixed or 0.0))
    linear = config.linear_parameters() * (packed if settings.weights == "mxfp4" else itemsize)
    outer = config.vocab_size * config.hidden_size * itemsize * (1 if config.tie_embeddings else 2)
    return int(linear + outer) + (8 << 20)


def _check_space(out: Path, needed: int, resumed: Path | None) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if resumed is not None and resumed.is_dir():
        needed -= files.tree_bytes(resumed)
    if free < needed:
        raise ConversionError(
            f"not enough room at {parent}: the checkpoint and what it is made of need about {needed / 2**20:.0f} MiB "
            f"and {free / 2**20:.0f} MiB are free: make room or choose another place with --out"
        )


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer's files."""
    tokenizer.save_pretrained(directory)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
