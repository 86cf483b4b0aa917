"""A linear layer in MXFP4 (or MXFP8): rotate, quantise, multiply; and which implementation does it."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from torq_jax import mxfp4, mxfp8, rotation
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import MXFP4Array, ScaleRule
from torq_jax.mxfp8 import MXFP8Array
from torq_jax.rotation import TwoLevelRotation

IMPLEMENTATIONS = ("xla",)
"""Implementations that exist, best first."""

ActivationFormat = Literal["mxfp4", "mxfp8"]
ACTIVATION_FORMATS: tuple[str, ...] = get_args(ActivationFormat)

_log = logging.getLogger(__name__)


def matmul(
    x: Float[Array, "*batch features"],
    weight: Float[Array, "out features"] | MXFP4Array | MXFP8Array,
    transform: TwoLevelRotation | None = None,
    *,
    activation_scale: ScaleRule | None = None,
    activation_format: ActivationFormat = "mxfp4",
    implementation: str | None = None,
) -> Float[Array, "*batch out"]:
    """``rotate(x) @ weight.T``, with the rotated activations rounded to MXFP4 or MXFP8.

    With ``weight = fold(w, transform)`` and neither operand rounded this is ``x @ w.T``: the rotation
    changes the rounding only.

    Args:
      x: activations, float32 or bfloat16. A last block that is not whole is
        filled up with zeros.
      weight: ``[out, features]``, folded with ``transform``; MXFP4 or MXFP8 in blocks along the features, or float.
      transform: the site's rotation; None leaves the activations as they are.
      activation_scale: scale rule for the activations' cast; None leaves them in float.
      activation_format: of that cast.
      implementation: None for the best that can run here (logged once), or one of :data:`IMPLEMENTATIONS`.

    Returns:
      Products accumulated in float32, in the dtype of ``x``.

    Raises:
      TorqError: an implementation that does not exist or cannot run, a format or a
        scale rule of it that does not exist, or shapes that do not fit.
    """
    select(implementation)
    prepared = prepare(x, transform, activation_scale, activation_format)
    return dot(prepared, weight, rounded=activation_scale is not None)


def select(implementation: str | None) -> str:
    """The implementation to use; a name that cannot run is an error, never another one in its place."""
    if implementation is None:
        _announce("xla", jax.default_backend())
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise TorqError(
            f"implementation {implementation!r} does not exist: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation


@functools.cache
def _announce(implementation: str, backend: str) -> None:
    _log.info("MXFP4 matmul runs as %r on %s", implementation, backend)


def prepare(
    x: Float[Array, "*batch features"],
    transform: TwoLevelRotation | None,
    activation_scale: ScaleRule | None,
    activation_format: ActivationFormat = "mxfp4",
) -> Float[Array, "*batch padded"]:
    """Rotate and round the activations of a site, once for all the weights that it feeds.

    The result holds MXFP4 or MXFP8 values in the dtype of ``x``; E2M1 or E4M3 times a power of two is exact in
    bfloat16.
    """
    if activation_format not in ACTIVATION_FORMATS:
        raise TorqError(
            f"unknown activation format {activation_format!r}: must be one of {', '.join(ACTIVATION_FORMATS)}"
        )
    size = x.shape[-1] if transform is None else transform.features
    if activation_scale is not None:
        size = mxfp4.padded_size(size)
    # Only a last block that is not whole is filled up: any other difference is a mistake.
    if not 0 <= size - x.shape[-1] < mxfp4.BLOCK:
        raise TorqError(f"activations have {x.shape[-1]} features, the rotation {size}")
    if size > x.shape[-1]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    if transform is not None:
        x = rotation.rotate(x, transform)
    if activation_scale is not None:
        # Each format refuses rules that it does not have.
        cast: Any = mxfp4.quantize_dequantize if activation_format == "mxfp4" else mxfp8.quantize_dequantize
        x = cast(x, activation_scale)
    return x


def dot(
    x: Float[Array, "*batch features"],
    weight: Float[Array, "out features"] | MXFP4Array | MXFP8Array,
    *,
    rounded: bool = False,
) -> Float[Array, "*batch out"]:
    """``x @ weight.T`` accumulated in float32, in the dtype of ``x``.

    With ``rounded`` the activations hold MXFP4 or MXFP8 values. These are exact in bfloat16, and so are a packed
    weight's: such operands are multiplied in bfloat16, the type that matrix units are made for, and no product
    changes.
    """
    narrow = rounded and (isinstance(weight, MXFP4Array | MXFP8Array) or weight.dtype == jnp.bfloat16)
    dtype, result = (jnp.dtype(jnp.bfloat16) if narrow else x.dtype), x.dtype
    if isinstance(weight, MXFP4Array):
        weight = mxfp4.dequantize(weight, dtype)
    elif isinstance(weight, MXFP8Array):
        weight = mxfp8.dequantize(weight, dtype)
    padding = x.shape[-1] - weight.shape[-1]
    if padding < 0 or padding >= mxfp4.BLOCK:
        raise TorqError(f"activations have {x.shape[-1]} features, the weight {weight.shape[-1]}")
    if padding:
        # The padded part of a plain weight is zero; that of a folded one is stored.
        weight = jnp.pad(weight, ((0, 0), (0, padding)))
    return jnp.einsum(
        "...i,oi->...o",
        x.astype(dtype),
        weight.astype(dtype),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    ).astype(result)


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Full precision for float32 operands, which accelerators would otherwise round to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
