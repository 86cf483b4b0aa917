"""A linear layer in MXFP4 (or MXFP8): rotate, quantise, multiply; and which implementation does it."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import portable
from pallas_kernels.reference import RULES
from torq_jax import mxfp4, mxfp8, rotation, tpu
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import MXFP4Array, ScaleRule
from torq_jax.mxfp8 import MXFP8Array
from torq_jax.rotation import TwoLevelRotation
from torq_jax.tpu import TPULinear

IMPLEMENTATIONS = ("tpu", "xla", "portable", "tpu_interpret", "portable_interpret")
"""Implementations that exist, best first as far as that is known: "portable" is plain Pallas for any GPU, and is not
chosen by itself until it has been timed on one. The last two run the kernels in Pallas's interpretation, slowly."""

_BACKENDS = {"tpu": "tpu", "portable": "gpu"}

INTERPRETED_AS = "v6e"
"""The generation whose tiles an interpreted kernel uses."""

ActivationFormat = Literal["mxfp4", "mxfp8"]
ACTIVATION_FORMATS: tuple[str, ...] = get_args(ActivationFormat)

_log = logging.getLogger(__name__)


def matmul(
    x: Float[Array, "*batch features"],
    weight: Float[Array, "out features"] | MXFP4Array | MXFP8Array | TPULinear,
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
        From :func:`torq_jax.tpu.pack`, with the rotation in it, it runs on the TPU kernels without being laid out
        anew in every call.
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
    chosen = select(implementation, weight, activation_scale, activation_format)
    if chosen in ("portable", "portable_interpret"):
        assert isinstance(weight, MXFP4Array)  # select() refuses the rest
        return _portable(x, weight, transform, activation_scale, interpret=chosen != "portable")
    if chosen != "xla":
        if isinstance(weight, TPULinear):
            if transform is not None:
                raise TorqError("a packed weight has its rotation in it: pass transform=None, or to pack()")
        else:
            assert isinstance(weight, MXFP4Array)  # select() refuses the rest
            weight = tpu.pack(weight, transform, dtype=x.dtype)
        interpreted = chosen == "tpu_interpret"
        generation = INTERPRETED_AS if interpreted else None
        return tpu.apply(x, weight, activation_scale, generation=generation, interpret=interpreted)
    assert not isinstance(weight, TPULinear)
    prepared = prepare(x, transform, activation_scale, activation_format)
    return dot(prepared, weight, rounded=activation_scale is not None)


def _portable(
    x: Float[Array, "*batch features"],
    weight: MXFP4Array,
    transform: TwoLevelRotation | None,
    activation_scale: str | None,
    *,
    interpret: bool,
) -> Float[Array, "*batch out"]:
    """The plain Pallas kernels of :mod:`pallas_kernels.portable`."""
    if weight.axis != -1 or weight.codes.ndim != 2:
        raise TorqError(
            f"a weight of shape {weight.shape} blocked along axis {weight.axis}: must be [out, features]"
        )
    outputs, features = weight.codes.shape[0], weight.codes.shape[1] * 2
    size = x.shape[-1]
    if not 0 <= features - size < mxfp4.BLOCK:
        raise TorqError(f"activations have {size} features, the weight {features}")
    if transform is not None and transform.features != features:
        raise TorqError(f"the weight has {features} features, the rotation {transform.features}")
    rows = jnp.pad(x.reshape(-1, size), ((0, 0), (0, features - size)))
    inter, intra = (None, None) if transform is None else (transform.inter, transform.intra)
    try:
        y = portable.rotate_quantize_matmul(
            rows,
            inter,
            intra,
            weight.codes,
            weight.scales,
            rule=activation_scale,  # type: ignore[arg-type]  # refused by its name
            interpret=interpret,
        )
    except ValueError as error:
        raise TorqError(str(error)) from error
    return y.reshape(*x.shape[:-1], outputs)


def select(
    implementation: str | None,
    weight: Any = None,
    activation_scale: str | None = None,
    activation_format: str = "mxfp4",
) -> str:
    """The implementation to use; a name that cannot run is an error, never another one in its place.

    Without a weight, that of MXFP4 weights in general.
    """
    backend, packed = jax.default_backend(), isinstance(weight, TPULinear)
    why = unfit(weight, activation_scale, activation_format)
    if implementation is None and packed and backend != "tpu":
        raise TorqError(
            f"this weight is packed for a TPU, and the backend is {backend}: keep the MXFP4Array, or pass "
            "implementation='tpu_interpret' to try the kernel slowly"
        )
    # A packed weight has one implementation on a TPU, fit or not.
    chosen = implementation
    if chosen is None:
        chosen = "tpu" if packed or (backend == "tpu" and why is None) else "xla"
    if chosen not in IMPLEMENTATIONS:
        raise TorqError(
            f"implementation {chosen!r} does not exist: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if chosen == "xla" and packed:
        raise TorqError(
            "this weight is packed for the TPU kernels: implementation 'xla' needs the MXFP4Array"
        )
    if chosen != "xla" and why is not None:
        raise TorqError(why)
    needed = _BACKENDS.get(chosen, backend)
    if backend != needed:
        raise TorqError(
            f"implementation {chosen!r} needs a {needed.upper()}, the backend is {backend}: use 'xla', or "
            f"'{chosen}_interpret' to try the kernel slowly"
        )
    if chosen.startswith("portable") and packed:
        raise TorqError(
            f"this weight is packed for the TPU kernels: implementation {chosen!r} needs the MXFP4Array"
        )
    if implementation is None:
        _announce(chosen, backend, why if backend == "tpu" else None)
    return chosen


def unfit(weight: Any, activation_scale: str | None, activation_format: str) -> str | None:
    """Why the kernels cannot run a product with such operands; None if they can."""
    if not isinstance(weight, MXFP4Array | TPULinear | None):
        return f"the kernels multiply MXFP4 weights, not {type(weight).__name__}"
    if activation_scale is not None and activation_format != "mxfp4":
        return f"the kernels round activations to mxfp4, not {activation_format}"
    if activation_scale not in (None, *RULES):
        return (
            f"the kernels cannot apply scale rule {activation_scale!r} in one pass: must be one of "
            f"{', '.join(RULES)}"
        )
    return None


@functools.cache
def _announce(implementation: str, backend: str, why: str | None) -> None:
    _log.info("MXFP4 matmul runs as %r on %s%s", implementation, backend, f": {why}" if why else "")


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
    x = padded(x, size)
    if transform is not None:
        x = rotation.rotate(x, transform)
    if activation_scale is not None:
        # Each format refuses rules that it does not have.
        cast: Any = mxfp4.quantize_dequantize if activation_format == "mxfp4" else mxfp8.quantize_dequantize
        x = cast(x, activation_scale)
    return x


def padded(x: Float[Array, "*batch features"], size: int) -> Float[Array, "*batch size"]:
    """``x`` with its last block filled up with zeros.

    Raises:
      TorqError: any other difference of sizes, which is a mistake.
    """
    if not 0 <= size - x.shape[-1] < mxfp4.BLOCK:
        raise TorqError(f"activations have {x.shape[-1]} features, the rotation {size}")
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) if size > x.shape[-1] else x


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
