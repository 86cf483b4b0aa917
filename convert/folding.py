"""What can run offline, does: rewrites of the float model that leave its function as it is.

:func:`residual_rotated` rotates the residual stream of a whole model; :func:`fold_layer` gives each site of a layer
what the linear layer or the norm before it can take (see :mod:`torq_jax.folding`). All that follows (calibration,
gradients, rounding, evaluation) works on the rewritten model and knows nothing of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from convert import names
from convert.sources import Source
from torq_jax import decoder, folding
from torq_jax.config import DecoderConfig
from torq_jax.errors import ConversionError, TorqError
from torq_jax.mxfp4 import BLOCK
from torq_jax.solvers.hadamard import hadamard_matrix
from torq_jax.statistics import SiteStatistics

_ROWS = 4096  # of a table rotated at once: the float64 temporaries stay small

_READERS = ("attn_in/q", "attn_in/k", "attn_in/v", "mlp_in/gate", "mlp_in/up")
_WRITERS = ("attn_out/o", "mlp_out/down")


# -- the residual stream -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RotatedSource(Source):
    """A source whose residual stream is ``h R``: channels in another order, a Hadamard matrix in each block of 32.

    Its tensors are float32, its embeddings untied, and all norms on the residual stream are ones: their weights are
    in the columns that read them. ``tensors`` still says where the original's lie; the fingerprint is the original's.
    """

    original: Source = dataclasses.field(kw_only=True)
    roles: Mapping[str, tuple[str, int]] = dataclasses.field(kw_only=True, repr=False)
    """Hugging Face name -> our key, and the layer or -1."""
    order: np.ndarray = dataclasses.field(kw_only=True, repr=False)
    """Of the channels, ``[H]``: see :func:`residual_order`."""

    def rotate(
        self, matrix: Float[np.ndarray, "rows H"], scale: Float[np.ndarray, " H"] | None = None
    ) -> Float[np.ndarray, "rows H"]:
        """``(matrix * scale) R``: see :func:`rotate_columns`."""
        return rotate_columns(matrix, self.order, scale)

    def unrotate(self, matrix: Float[np.ndarray, "rows H"]) -> Float[np.ndarray, "rows H"]:
        """``matrix R^T``, in float32."""
        plain = rotate_columns(matrix, np.arange(len(self.order)))  # the Hadamard matrix is its own inverse
        return plain[:, np.argsort(self.order)]

    def read(self, name: str) -> np.ndarray:
        """As :meth:`convert.sources.Source.read`, rewritten.

        Raises:
          ConversionError: as there.
        """
        key, layer = self.roles.get(name, (None, -1))
        outer = names.outer_tensors(self.original.config)
        if key == "embed":
            return self.rotate(self.original.read(outer["embed"]))
        if key == "lm_head":
            tied = self.original.config.tie_embeddings
            head = self.original.read(outer["embed" if tied else "lm_head"])
            return self.rotate(head, self.original.read(outer["norm"]))
        if key in ("norm", "attn_in_norm", "mlp_in_norm"):
            return np.ones(self.config.hidden_size, np.float32)
        value = self.original.read(name)
        if key in _READERS:
            norm = names.layer_tensors(self.config, layer)[f"{key.split('/')[0]}_norm"]
            return self.rotate(value, self.original.read(norm))
        if key in _WRITERS:
            return np.ascontiguousarray(self.rotate(value.T).T)
        if key in tuple(f"{writer}_bias" for writer in _WRITERS):
            return self.rotate(value[None])[0]
        return value


def check_residual(config: DecoderConfig) -> None:
    """Raise ConversionError where the residual stream has no whole blocks to rotate, or experts read it."""
    if config.num_experts:
        raise ConversionError("--folded-only is not supported for a mixture of experts: use --fold free")
    if config.hidden_size % BLOCK:
        raise ConversionError(
            f"--folded-only rotates the residual stream in blocks of {BLOCK}, and hidden_size "
            f"{config.hidden_size} is not a multiple of it: convert without --folded-only (and with --pad)"
        )


def residual_rotated(source: Source) -> RotatedSource:
    """The same model with its residual stream rotated.

    Exact: the norms see ``|h R| = |h|``. The embedding table, the rows of o and down and their biases write ``h R``;
    the columns of q, k, v, gate, up and the output projection read it and have the weights of the norms before them.

    Raises:
      ConversionError: as :func:`check_residual`.
    """
    check_residual(source.config)
    config = dataclasses.replace(source.config, tie_embeddings=False)
    roles = {name: (key, -1) for key, name in names.outer_tensors(config).items()}
    for layer in range(config.num_layers):
        roles |= {name: (key, layer) for key, name in names.layer_tensors(config, layer).items()}
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source)}
    return RotatedSource(
        **{**fields, "config": config}, original=source, roles=roles, order=residual_order(source)
    )


def residual_order(source: Source) -> np.ndarray:
    """Channels of the residual stream ``[H]``, those with the smallest norm weights first.

    A few channels carry a hundred times the energy of the others, and the norms have learnt small weights for them.
    A Hadamard matrix spreads what is in a block over all of it: the rounding errors of a loud channel, as large as it
    is loud, over its neighbours. So the loud ones share blocks. No data is needed: the geometric mean of a channel's
    weights over all norms follows its energy.
    """
    tensors = names.outer_tensors(source.config)
    found = [tensors["norm"]]
    for layer in range(source.config.num_layers):
        own = names.layer_tensors(source.config, layer)
        found += [own["attn_in_norm"], own["mlp_in_norm"]]
    total = np.zeros(source.config.hidden_size)
    for name in found:
        weight = np.abs(source.read(name).astype(np.float64))
        total += np.log(np.maximum(weight, 1e-6 * max(weight.max(), 1e-30)))  # a weight may be zero
    return np.argsort(total, kind="stable")


def rotate_columns(
    matrix: Float[np.ndarray, "rows d"],
    order: np.ndarray,
    scale: Float[np.ndarray, " d"] | None = None,
) -> Float[np.ndarray, "rows d"]:
    """``(matrix * scale) R`` in float32, of float64 products; ``d`` a multiple of 32.

    R takes the columns in ``order``, and multiplies each block of 32 by a normalised Hadamard matrix.
    """
    rotation = hadamard_matrix()
    found = np.empty(matrix.shape, np.float32)
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS].astype(np.float64)
        if scale is not None:
            rows *= scale.astype(np.float64)
        found[start : start + _ROWS] = (rows[:, order].reshape(-1, BLOCK) @ rotation).reshape(rows.shape)
    return found


# -- a layer -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FoldedLayer:
    """A layer rewritten, with what was measured of it in its new coordinates."""

    parameters: dict[str, Any]
    statistics: dict[str, SiteStatistics]
    reports: dict[str, dict[str, Any]]
    """Of every site that was given a transform, what :mod:`torq_jax.folding` says of it."""
    by_weight: dict[str, Any]
    """Transforms of the outputs of single weights, by ``"site/weight"``."""

    def outputs(self, site: str, moments: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Moments of the gradients at the outputs of a site's weights, from the original layer's."""
        return {
            name: folding.transform_output_moment(moment, transform)
            if (transform := self.by_weight.get(f"{site}/{name}")) is not None
            else moment
            for name, moment in moments.items()
        }


def fold_layer(
    config: DecoderConfig,
    parameters: Mapping[str, Any],
    statistics: Mapping[str, SiteStatistics],
    *,
    scales: Sequence[str] = (),
) -> FoldedLayer:
    """Give ``attn_out`` the best transform that v can take, and the sites of ``scales`` a scale.

    Args:
      config: the decoder.
      parameters: of a float layer.
      statistics: of every site, with second moments and gains.
      scales: of :data:`torq_jax.folding.SCALED_SITES`. A site that a rotated residual stream feeds is better left
        out: its blocks are mixed evenly, and a scale after that would undo it.

    Raises:
      ConversionError: statistics that no transform follows from.
    """
    rewritten, gathered = dict(parameters), dict(statistics)
    reports: dict[str, dict[str, Any]] = {}
    by_weight: dict[str, Any] = {}
    try:
        if folding.values_refusal(config) is None:
            second, gain = folding.wush.moments(statistics["attn_out"], "fold")
            matrices, reports["attn_out"] = folding.solve_values(second, gain, config)
            rewritten = folding.fold_values(rewritten, config, matrices)
            by_head = folding.query_heads(matrices, config)
            gathered["attn_out"] = folding.transform_statistics(statistics["attn_out"], by_head)
            by_weight["attn_in/v"] = matrices
        for site in scales:
            second, gain = folding.wush.moments(statistics[site], "fold")
            found, reports[site] = folding.solve_scales(second, gain)
            rewritten = folding.fold_scales(rewritten, site, found)
            gathered[site] = folding.transform_statistics(statistics[site], found)
            if site == "mlp_out":
                by_weight["mlp_in/up"] = found[: config.intermediate_size]
    except TorqError as error:
        raise ConversionError(str(error)) from error
    return FoldedLayer(rewritten, gathered, reports, by_weight)


def folded_into(config: DecoderConfig, *, fold: str, folded_only: bool) -> dict[str, str]:
    """What took each site's transform, in words; sites for which nothing is folded are absent."""
    found = {}
    if folded_only:
        found = {
            "attn_in": "embeddings, o, down",
            "mlp_in": "embeddings, o, down",
            "mlp_out": "up",
        }
    if fold == "free" and folding.values_refusal(config) is None:
        found["attn_out"] = "v"
    return found


def refused(config: DecoderConfig) -> dict[str, str]:
    """Why a site's transform cannot be folded, where it cannot."""
    refusal = folding.values_refusal(config)
    return {} if refusal is None else {"attn_out": refusal}


def function_error(source: Source, original: Any, rewritten: Any, x: Any) -> dict[str, float]:
    """How far a rewritten layer is from the original one: the relative error of what each half adds to the stream.

    Args:
      source: of the rewritten layer; its stream is rotated where it is a :class:`RotatedSource`.
      original: parameters of the original layer.
      rewritten: parameters of the rewritten one.
      x: residual stream ``[1, t, H]`` that enters the rewritten layer.

    Returns:
      For o and down, the root mean square over tokens of the relative error of a token's output. Each token counts
      the same: the first one of a sequence, whose activations are hundreds of times larger, would hide the others.
    """
    rotated = source if isinstance(source, RotatedSource) else None
    before = decoder.run_outputs(
        source.config, original, x if rotated is None else rotated.unrotate(x[0])[None]
    )
    after = decoder.run_outputs(source.config, rewritten, x)
    found = {}
    for name, exact in before.items():
        y = np.asarray(exact[0], np.float64)
        y = y if rotated is None else rotated.rotate(y).astype(np.float64)
        size = np.linalg.norm(y, axis=-1)
        error = np.linalg.norm(np.asarray(after[name][0], np.float64) - y, axis=-1)
        # A token without an output has no relative error; what it got is measured against the mean one.
        found[name] = float(
            np.sqrt(np.mean((error / np.where(size > 0, size, max(size.mean(), 1e-30))) ** 2))
        )
    return found


def untied_bytes(source: Source) -> int:
    """Bytes of the output projection that a rotated source stores where the original's was its embedding table."""
    if not isinstance(source, RotatedSource) or not source.original.config.tie_embeddings:
        return 0
    shape = (source.config.vocab_size, source.config.hidden_size)
    return int(np.prod(shape)) * jnp.dtype(source.float_dtype).itemsize
