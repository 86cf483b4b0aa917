"""A linear layer in MXFP4 (or MXFP8): rotate, quantise, multiply; and which implementation does it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.reference import RULES
from torq_jax import gpu, mxfp4, mxfp8, rotation, tpu
from torq_jax.errors import TorqError
from torq_jax.gpu import GPULinear
from torq_jax.mxfp4 import MXFP4Array, ScaleRule
from torq_jax.mxfp8 import MXFP8Array
from torq_jax.rotation import TwoLevelRotation
from torq_jax.tpu import TPULinear

KERNELS = ("tpu", *gpu.KINDS)
IMPLEMENTATIONS = ("tpu", "xla", "gpu", *gpu.KINDS, *(f"{name}_interpret" for name in KERNELS))
"""Implementations that exist. "gpu" stands for the kernels made for the GPU at hand: "hopper", "blackwell" or
"portable"; "hopper_e4m3" multiplies at twice the rate of "hopper" and does not add in float32. None has been timed on
a GPU, so without a name a GPU runs what XLA compiles. Those in "_interpret" run kernels on a CPU, slowly."""

INTERPRETED_AS = "v6e"
"""The generation whose tiles an interpreted kernel uses."""

ActivationFormat = Literal["mxfp4", "mxfp8"]
ACTIVATION_FORMATS: tuple[str, ...] = get_args(ActivationFormat)

_log = logging.getLogger(__name__)


def matmul(
    x: Float[Array, "*batch features"],
    weight: Float[Array, "out features"] | MXFP4Array | MXFP8Array | TPULinear | GPULinear,
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
        From :func:`torq_jax.tpu.pack` or :func:`torq_jax.gpu.pack`, with the rotation in it, it runs on their kernels
        without being laid out anew in every call.
      transform: the site's rotation; None leaves the activations as they are.
      activation_scale: scale rule for the activations' cast; None leaves them in float.
      activation_format: of that cast.
      implementation: None for the best that can run here (logged once), or one of :data:`IMPLEMENTATIONS`.

    Returns:
      Products accumulated in float32, in the dtype of ``x``. As XLA computes them they can be differentiated:
      gradients pass the cast as if it were not there, to ``x``, to the transform and to a float weight. Kernels have
      none.

    Raises:
      TorqError: an implementation that does not exist or cannot run, a format or a
        scale rule of it that does not exist, or shapes that do not fit.
    """
    chosen = select(implementation, weight, activation_scale, activation_format)
    if chosen == "xla":
        assert not isinstance(weight, TPULinear | GPULinear)  # select() refuses them
        prepared = prepare(x, transform, activation_scale, activation_format)
        return dot(prepared, weight, rounded=activation_scale is not None)
    if isinstance(weight, TPULinear | GPULinear):
        if transform is not None:
            raise TorqError("a packed weight has its rotation in it: pass transform=None, or to pack()")
    else:
        assert isinstance(weight, MXFP4Array)  # select() refuses the rest
        if chosen.startswith("tpu"):
            weight = tpu.pack(weight, transform, dtype=x.dtype)
        else:
            # Inside jit no value is known: outputs that a layout cannot hold are NaN there.
            known = [] if isinstance(weight.codes, jax.core.Tracer) else [weight]
            reason = gpu.unfit(kernels_of(chosen), activation_scale, x.dtype, known)
            if reason is not None:
                raise TorqError(f"implementation {chosen!r} cannot run this product: {reason}; use 'xla'")
            weight = gpu.pack(weight, transform, dtype=x.dtype, kind=kernels_of(chosen))
    return runner(chosen)(x, weight, activation_scale)


def kernels_of(implementation: str) -> Any:
    """The kernels of an implementation, interpreted or not: one of :data:`KERNELS`."""
    return implementation.removesuffix("_interpret")


def runner(implementation: str) -> Callable[..., Any]:
    """:func:`torq_jax.tpu.apply` or :func:`torq_jax.gpu.apply` as an implementation runs it."""
    interpreted = implementation.endswith("_interpret")
    if kernels_of(implementation) == "tpu":
        generation = INTERPRETED_AS if interpreted else None
        return functools.partial(tpu.apply, generation=generation, interpret=interpreted)
    return functools.partial(gpu.apply, interpret=interpreted)


def select(
    implementation: str | None,
    weight: Any = None,
    activation_scale: str | None = None,
    activation_format: str = "mxfp4",
) -> str:
    """The implementation to use; a name that cannot run is an error, never another one in its place.

    Without a weight, that of MXFP4 weights in general. "gpu" becomes the name of the kernels that it stands for. A
    GPU's kernels are tried on a small product once a process, before anything relies on them.
    """
    backend = jax.default_backend()
    packed = _packed_for(weight)
    why = unfit(weight, activation_scale, activation_format)
    if implementation is None and packed and backend != _backend(packed):
        raise TorqError(
            f"this weight is packed for a {_backend(packed).upper()}, and the backend is {backend}: keep the "
            f"MXFP4Array, or pass implementation='{packed}_interpret' to try the kernel slowly"
        )
    # A packed weight has one implementation, fit or not.
    chosen = implementation
    if chosen is None:
        chosen = packed or ("tpu" if backend == "tpu" and why is None else "xla")
    if chosen not in IMPLEMENTATIONS:
        raise TorqError(
            f"implementation {chosen!r} does not exist: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if chosen == "gpu" and backend == "gpu":
        chosen, older = (packed, None) if packed in gpu.KINDS else gpu.native(gpu.capability())
        _announce(chosen, backend, older)
    name = kernels_of(chosen)
    if packed and name != packed:
        raise TorqError(
            f"this weight is packed for the {'TPU' if packed == 'tpu' else packed} kernels: implementation "
            f"{chosen!r} needs the MXFP4Array"
        )
    if chosen == "xla":
        if implementation is None:
            _announce(chosen, backend, _why_xla(backend, why))
        return chosen
    if why is not None:
        raise TorqError(why)
    if chosen == name and backend != _backend(name):
        slowly = f"{'portable' if name == 'gpu' else name}_interpret"
        raise TorqError(
            f"implementation {chosen!r} needs a {_backend(name).upper()}, the backend is {backend}: use 'xla', or "
            f"'{slowly}' to try the kernel slowly"
        )
    if name in gpu.KINDS:
        gpu.require(name, interpret=chosen != name)
    if implementation is None:
        _announce(chosen, backend, None)
    return chosen


def _packed_for(weight: Any) -> str | None:
    """The kernels that a weight is packed for, None if for none."""
    if isinstance(weight, GPULinear):
        return weight.kind
    return "tpu" if isinstance(weight, TPULinear) else None


def _backend(kernels: str) -> str:
    """JAX's name of the devices that they run on."""
    return "tpu" if kernels == "tpu" else "gpu"


def _why_xla(backend: str, why: str | None) -> str | None:
    if backend == "gpu" and why is None:
        return "implementation='gpu' takes the kernels made for this GPU, which no GPU has timed yet"
    return None if backend == "cpu" else why


def unfit(weight: Any, activation_scale: str | None, activation_format: str) -> str | None:
    """Why no kernel can run a product with such operands; None if some can."""
    if not isinstance(weight, MXFP4Array | TPULinear | GPULinear | None):
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
