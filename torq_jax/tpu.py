"""A site's linear layers on a TPU: weights and rotation in the kernels' layout, and one kernel call for all of
them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import layout, tiles, tpu
from torq_jax import packing
from torq_jax import rotation as rotations
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import MXFP4Array
from torq_jax.rotation import TwoLevelRotation

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TPULinear:
    """Weights ``[out, features]`` side by side and the rotation that they were folded with, in the TPU's layout.

    A pytree; what is static stands behind the arrays. Made by :func:`pack`, once, when a model is loaded.
    """

    weight: layout.TPUWeight
    rotation: tpu.TPURotation
    before: Any
    """A stage between blocks that the kernels cannot run (its groups are no power of two): XLA runs it first."""
    out_features: int
    features: int
    kind: str


jax.tree_util.register_dataclass(
    TPULinear,
    data_fields=["weight", "rotation", "before"],
    meta_fields=["out_features", "features", "kind"],
)


def pack(
    weights: MXFP4Array | Sequence[MXFP4Array],
    transform: TwoLevelRotation | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    kind: layout.Kind = "bytes",
) -> TPULinear:
    """Weights that read one activation, and its rotation, in the layout of the TPU kernels.

    Args:
      weights: ``[out, features]`` each, folded with ``transform``; their outputs stand side by side in this order.
      transform: the site's rotation, or None.
      dtype: of the activations, bfloat16 or float32.
      kind: "bytes", or "float4", which is faster on tpu7x and holds 14 instead of 27 powers of two in an output's
        scales. Outputs that do not fit become NaN; :func:`pallas_kernels.layout.check_scales` finds them before.

    Raises:
      TorqError: weights of different sizes, not blocked along their features, or another dtype.
    """
    codes, scales = packing.side_by_side(weights, transform, dtype, "TPU")
    size = codes.shape[1] * 2
    inter = intra = before = None
    if transform is not None:
        inter, intra = transform.inter, transform.intra
        if inter is not None and tpu.exchanged_bits(inter, size) is None:
            inter, before = None, inter
    return TPULinear(
        layout.to_tpu(codes, scales, kind),
        tpu.prepare_rotation(inter, intra, size, dtype=jnp.dtype(dtype)),
        before,
        codes.shape[0],
        size,
        kind,
    )


def stack(linears: Sequence[TPULinear]) -> TPULinear:
    """The same site of several layers as one, arrays stacked along a leading axis; see ``layer`` in :func:`apply`.

    Raises:
      TorqError: sites of different shapes or kinds.
    """
    return packing.stack(linears)


def pack_stack(
    weights: Sequence[MXFP4Array], transform: TwoLevelRotation | None, *, dtype: Any, kind: layout.Kind
) -> TPULinear:
    """:func:`pack` of every layer, and :func:`stack` of the results: arrays with a leading axis of layers."""
    return stack(packing.pack_layers(functools.partial(pack, dtype=dtype, kind=kind), weights, transform))


def best_kind(weights: Sequence[MXFP4Array], device: str | None = None) -> layout.Kind | None:
    """The fastest layout of a generation that holds all of these weights exactly; None if no layout does.

    Args:
      weights: concrete arrays.
      device: a generation; None asks the device.

    Raises:
      TorqError: an unknown TPU.
    """
    try:
        preferred = tiles.GENERATIONS[device or tiles.generation(jax.devices()[0].device_kind)].kind
    except ValueError as error:
        raise TorqError(str(error)) from error
    kinds: list[layout.Kind] = ["float4", "bytes"] if preferred == "float4" else ["bytes"]
    for kind in kinds:
        try:
            for weight in weights:
                layout.check_scales(weight.codes, weight.scales, kind)
        except ValueError as error:
            _log.info("layout %r does not hold a weight: %s", kind, error)
        else:
            return kind
    return None


def apply(
    x: Float[Array, "*batch features"],
    linear: TPULinear,
    activation_scale: str | None,
    *,
    layer: Any = None,
    generation: str | None = None,
    interpret: Any = False,
) -> Float[Array, "*batch out"]:
    """``round(rotate(x)) @ weight.T`` by the fused kernel, in the dtype of ``x``.

    Args:
      x: bfloat16 or float32, as ``linear`` was packed for; its last block may lack features, which are zeros.
      linear: from :func:`pack`.
      activation_scale: "floor", "ceil" or "even"; None leaves the activations in float.
      layer: None, or the index into arrays of ``linear`` that are stacked along a leading axis, as :func:`stack`
        does.
      generation: whose tiles to use; None asks the device.
      interpret: run in Pallas's interpretation, on any backend.

    Raises:
      TorqError: a scale rule that one pass cannot apply, a dtype or size that does not fit, an unknown TPU.
    """
    rows = packing.rows_of(x, linear.features)
    if linear.before is not None:
        before = linear.before if layer is None else linear.before[layer]
        rows = rotations.rotate(rows, TwoLevelRotation(before, None, linear.features))
    try:
        device = generation or tiles.generation(jax.devices()[0].device_kind)
        chosen = tiles.choose(
            device,
            rows.shape[0],
            linear.features,
            linear.out_features,
            rotation=jax.tree.map(lambda a: a if layer is None else a[0], linear.rotation),
            width=x.dtype.itemsize,
        )
        y = tpu.rotate_quantize_matmul(
            rows,
            linear.weight,
            linear.rotation,
            rule=activation_scale,  # type: ignore[arg-type]  # refused there by its name
            tiles=chosen,
            kind=linear.kind,  # type: ignore[arg-type]
            layer=layer,
            interpret=interpret,
            vmem_limit=None if interpret else tiles.limit(device, chosen),
        )
    except ValueError as error:
        if isinstance(error, TorqError):
            raise
        raise TorqError(str(error)) from error
    return y[:, : linear.out_features].reshape(*x.shape[:-1], linear.out_features)
