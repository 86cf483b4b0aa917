"""What the backends have in common when they lay out a site's weights: :mod:`torq_jax.tpu`, :mod:`torq_jax.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from torq_jax import rotation as rotations
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import BLOCK, MXFP4Array
from torq_jax.rotation import TwoLevelRotation

Linear = TypeVar("Linear")


def side_by_side(
    weights: MXFP4Array | Sequence[MXFP4Array], transform: TwoLevelRotation | None, dtype: Any, kernels: str
) -> tuple[UInt8[Array, "n k2"], UInt8[Array, "n k32"]]:
    """Codes and scales of weights ``[out, features]`` that read one activation, their outputs in this order.

    Args:
      weights: folded with ``transform``.
      transform: the site's rotation, or None.
      dtype: of the activations.
      kernels: whose layout they are for, by its name in errors.

    Raises:
      TorqError: weights of different sizes, not blocked along their features, a rotation that does not fit, or a
        dtype other than bfloat16 and float32.
    """
    each = [weights] if isinstance(weights, MXFP4Array) else list(weights)
    features = {w.codes.shape[-1] * 2 for w in each}
    if len(features) != 1 or any(w.axis != -1 or w.codes.ndim != 2 for w in each):
        shapes = ", ".join(str(w.shape) for w in each)
        raise TorqError(
            f"weights of shapes {shapes} cannot stand side by side: must be [out, features] alike"
        )
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise TorqError(
            f"activations of {jnp.dtype(dtype)} cannot run on the {kernels} kernels: cast to bfloat16"
        )
    size = features.pop()
    if transform is not None:
        rotations.validate(transform)
        if transform.features != size:
            raise TorqError(f"the weights have {size} features, the rotation {transform.features}")
    return jnp.concatenate([w.codes for w in each]), jnp.concatenate([w.scales for w in each])


def rows_of(x: Float[Array, "*batch features"], features: int) -> Float[Array, "m k"]:
    """Activations as a matrix, its last block filled up with zeros.

    Raises:
      TorqError: more than a block's part is missing.
    """
    size = x.shape[-1]
    if not 0 <= features - size < BLOCK:
        raise TorqError(f"activations have {size} features, the weight {features}")
    return jnp.pad(x.reshape(-1, size), ((0, 0), (0, features - size)))


def pack_layers(
    pack: Callable[[list[MXFP4Array], TwoLevelRotation | None], Linear],
    weights: Sequence[MXFP4Array],
    transform: TwoLevelRotation | None,
) -> list[Linear]:
    """``pack`` of each layer, of arrays that have a leading axis of layers."""
    return [
        pack(
            [jax.tree.map(lambda a: a[i], weight) for weight in weights],  # noqa: B023
            jax.tree.map(lambda a: a[i], transform),  # noqa: B023
        )
        for i in range(weights[0].codes.shape[0])
    ]


def stack(linears: Sequence[Linear]) -> Linear:
    """The same site of several layers as one, arrays stacked along a leading axis.

    Raises:
      TorqError: sites of different shapes or layouts.
    """
    if len({jax.tree.structure(x) for x in linears}) != 1:
        raise TorqError("sites of different sizes or layouts cannot be stacked: pack them alike")
    return jax.tree.map(lambda *each: jnp.stack(each), *linears)
