"""A site's linear layers on a GPU: weights and rotation in the layout of that GPU's kernels, and one call for all of
them."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pallas_kernels import blackwell, hopper, layout, portable, reference, tiles
from torq_jax import mxfp4, packing
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import MXFP4Array
from torq_jax.rotation import TwoLevelRotation

Kind = Literal["hopper", "hopper_e4m3", "blackwell", "portable"]
KINDS: tuple[str, ...] = get_args(Kind)

CAPABILITY: dict[str, tuple[int, int]] = {"hopper": (9, 0), "hopper_e4m3": (9, 0), "blackwell": (10, 0)}
"""Compute capability of the GPUs that a kernel's code runs on, and on no other; the portable ones run on any."""

INTERPRETER_THREADS = 16
"""Threads of XLA that interpretation of the Hopper and Blackwell kernels takes: its warps wait for each other."""

_log = logging.getLogger(__name__)


class CanonicalWeight(NamedTuple):
    """What the portable kernels read: ``codes [N, K/2]`` and ``scales [N, K/32]`` as they are stored."""

    codes: UInt8[Array, "n k2"]
    scales: UInt8[Array, "n k32"]


LAYOUTS: dict[str, Callable[..., Any]] = {
    "hopper": layout.to_hopper,
    "hopper_e4m3": layout.to_hopper_e4m3,
    "blackwell": layout.to_blackwell,
    "portable": CanonicalWeight,
}
"""From canonical codes and scales to what kernels read, by kind."""


@dataclasses.dataclass(frozen=True)
class GPULinear:
    """Weights ``[out, features]`` side by side and the rotation that they were folded with, as a GPU's kernels read
    them.

    A pytree; what is static stands behind the arrays. Made by :func:`pack`, once, when a model is loaded.
    """

    weight: layout.HopperWeight | layout.HopperE4M3Weight | layout.BlackwellOperand | CanonicalWeight
    rotation: portable.Rotation
    out_features: int
    features: int
    kind: str


jax.tree_util.register_dataclass(
    GPULinear,
    data_fields=["weight", "rotation"],
    meta_fields=["out_features", "features", "kind"],
)


def pack(
    weights: MXFP4Array | Sequence[MXFP4Array],
    transform: TwoLevelRotation | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    kind: Kind,
) -> GPULinear:
    """Weights that read one activation, and its rotation, in the layout of a GPU's kernels.

    Args:
      weights: ``[out, features]`` each, folded with ``transform``; their outputs stand side by side in this order.
      transform: the site's rotation, or None.
      dtype: of the activations, bfloat16 or float32.
      kind: whose layout, one of :data:`KINDS`. Outputs that Hopper's cannot hold become NaN; :func:`unfit` finds them
        before.

    Raises:
      TorqError: weights of different sizes, not blocked along their features, another dtype or kind.
    """
    if kind not in KINDS:
        raise TorqError(f"kernels {kind!r} do not exist: must be one of {', '.join(KINDS)}")
    codes, scales = packing.side_by_side(weights, transform, dtype, "GPU")
    size = codes.shape[1] * 2
    inter, intra = (None, None) if transform is None else (transform.inter, transform.intra)
    rotation = portable.prepare_rotation(inter, intra, size, jnp.dtype(dtype))
    return GPULinear(LAYOUTS[kind](codes, scales), rotation, codes.shape[0], size, kind)


def stack(linears: Sequence[GPULinear]) -> GPULinear:
    """The same site of several layers as one, arrays stacked along a leading axis; see ``layer`` in :func:`apply`.

    Raises:
      TorqError: sites of different shapes or kinds.
    """
    return packing.stack(linears)


def pack_stack(
    weights: Sequence[MXFP4Array], transform: TwoLevelRotation | None, *, dtype: Any, kind: Kind
) -> GPULinear:
    """:func:`pack` of every layer, and :func:`stack` of the results: arrays with a leading axis of layers."""
    return stack(packing.pack_layers(functools.partial(pack, dtype=dtype, kind=kind), weights, transform))


def unfit(
    kind: Kind, activation_scale: str | None, dtype: Any, weights: Sequence[MXFP4Array] = ()
) -> str | None:
    """Why a GPU's kernels cannot run products with such operands; None if they can.

    Args:
      kind: whose kernels.
      activation_scale: scale rule of the activations; None leaves them in float.
      dtype: of the activations.
      weights: concrete arrays of any leading axes, or nothing to leave them out of account.
    """
    if kind in ("blackwell", "hopper_e4m3") and activation_scale is None:
        return f"the product of {kind} takes MXFP4 activations, and these stay in float"
    if kind == "hopper" and activation_scale is None and jnp.dtype(dtype) == jnp.float32:
        return "float32 activations that stay in float have no exact product on Hopper's tensor cores"
    if kind in ("hopper", "hopper_e4m3"):
        for weight in weights:
            codes, scales = (a.reshape(-1, a.shape[-1]) for a in (weight.codes, weight.scales))
            if not layout.fits_hopper(codes, scales, e4m3=kind == "hopper_e4m3"):
                return "scales of an output are too far apart for their layout"
    return None


def apply(
    x: Float[Array, "*batch features"],
    linear: GPULinear,
    activation_scale: str | None,
    *,
    layer: Any = None,
    interpret: bool = False,
) -> Float[Array, "*batch out"]:
    """``round(rotate(x)) @ weight.T``, in the dtype of ``x``.

    Args:
      x: bfloat16 or float32, as ``linear`` was packed for; its last block may lack features, which are zeros.
      linear: from :func:`pack`.
      activation_scale: "floor", "ceil" or "even"; None leaves the activations in float.
      layer: None, or the index into arrays of ``linear`` that are stacked along a leading axis, as :func:`stack`
        does.
      interpret: run in Pallas's interpretation, on a CPU.

    Raises:
      TorqError: a scale rule that one pass cannot apply, a dtype or size that does not fit, a jax that is too old.
    """
    rows = packing.rows_of(x, linear.features)
    given: dict[str, Any] = {"rule": activation_scale, "rotation": linear.rotation, "layer": layer}
    try:
        if linear.kind == "portable":
            y = portable.rotate_quantize_matmul(
                rows, None, None, *linear.weight, **given, interpret=interpret
            )
        else:
            where = _interpreted() if interpret else {"cores": cores(linear.kind)}
            y = product_of(linear.kind)(rows, None, None, linear.weight, **given, **where)
    except (ValueError, ImportError) as error:
        if isinstance(error, TorqError):
            raise
        raise TorqError(str(error)) from error
    return y[:, : linear.out_features].reshape(*x.shape[:-1], linear.out_features)


def product_of(kind: str) -> Callable[..., Any]:
    """``rotate_quantize_matmul`` of a kind that Mosaic GPU compiles."""
    products: dict[str, Any] = {
        "hopper": hopper.rotate_quantize_matmul,
        "hopper_e4m3": hopper.rotate_quantize_matmul_e4m3,
        "blackwell": blackwell.rotate_quantize_matmul,
    }
    return products[kind]


def _interpreted() -> dict[str, Any]:
    return {"cores": 1, "interpret": hopper.require().InterpretGPUParams()}


def cores(kind: str) -> int:
    """Multiprocessors of the GPU at hand; without one, of the GPU that ``kind`` was made for."""
    found = getattr(jax.devices()[0], "core_count", None)
    return tiles.GPUS[kind.removesuffix("_e4m3")].cores if found is None else int(found)


# ---------------------------------------------------------------- which kernels


def capability() -> tuple[int, int] | None:
    """Compute capability of the GPU at hand, None where there is none."""
    found = getattr(jax.devices()[0], "compute_capability", None)
    if jax.default_backend() != "gpu" or found is None:
        return None
    major, _, minor = str(found).partition(".")
    return int(major), int(minor or 0)


def native(found: tuple[int, int] | None) -> tuple[Kind, str | None]:
    """The kernels made for a compute capability, and why not others where these would be faster.

    On Hopper those with float32 sums: "hopper_e4m3" runs by its name alone.
    "portable" for a GPU without kernels of its own, and with a jax that is too old for them.
    """
    own: Kind | None = next((kind for kind in ("hopper", "blackwell") if CAPABILITY[kind] == found), None)
    if own is None:
        return "portable", None
    try:
        hopper.require()
    except ImportError as error:
        return "portable", str(error)
    return own, None


def require(kind: str, *, interpret: bool = False) -> None:
    """Refuse kernels that cannot run here; on a GPU, let them show once that they compute what they should.

    Raises:
      TorqError: a jax that is too old, a GPU of another kind, too few threads to interpret, or a wrong result.
    """
    if kind != "portable":
        try:
            hopper.require()
        except ImportError as error:
            raise TorqError(str(error)) from error
    if interpret:
        threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
        if kind != "portable" and threads < INTERPRETER_THREADS:
            raise TorqError(
                f"interpreting the {kind} kernels takes {INTERPRETER_THREADS} threads and XLA has {threads}, so that "
                f"they might wait for ever: set NPROC={INTERPRETER_THREADS} in the environment"
            )
        return
    found, needed = capability(), CAPABILITY.get(kind)
    if needed not in (None, found):
        raise TorqError(
            f"implementation {kind!r} needs a GPU of compute capability {_dotted(needed)}, this one has "
            f"{_dotted(found)}: use 'gpu' for the kernels that fit it"
        )
    _checked(kind)


def _dotted(version: tuple[int, int] | None) -> str:
    return "none" if version is None else ".".join(map(str, version))


@functools.cache
def _checked(kind: Kind) -> None:
    """:func:`check` once a process.

    In a thread of its own, which runs what it is given even while this one traces a function that the kernels are to
    be part of. (``jax.ensure_compile_time_eval`` cannot: it would evaluate the kernels' own code as well.)
    """
    with ThreadPoolExecutor(1) as thread:
        tried = thread.submit(check, kind)
    error = tried.exception()
    if error is not None and not isinstance(error, TorqError):
        raise TorqError(
            f"the {kind} kernels do not run on this device: {error}; use implementation='xla', and please report this"
        ) from error
    tried.result()
    _log.info("the %s kernels computed %d small products right", kind, len(CHECKED))


# rows, features, outputs, group
CHECKED = ((3, 2048, 384, 4), (200, 512, 256, 16))
"""Products that the kernels are tried on: K in parts and in one, a filled and an unfilled tile, two layers."""

INEXACT = {"hopper_e4m3": 2.0**-11}
"""Of the sum of an output's magnitudes, what kernels may be off by whose tensor cores do not add in float32: those of
e4m3 products are reported to keep about 14 bits, of up to four partial sums. A scale that is read for another one
moves an output by more."""


def check(kind: Kind, *, interpret: bool = False) -> None:
    """Compare rotated and rounded activations and products on small operands, of which every float32 sum is exact.

    The kernels were compiled and interpreted, but on few GPUs run: no result of theirs is used before this.

    Raises:
      TorqError: they differ from what XLA computes, with the remedy.
    """
    for case in CHECKED:
        x, weights, transforms = check_operands(*case)
        linear = stack(
            [pack(w, t, dtype=x.dtype, kind=kind) for w, t in zip(weights, transforms, strict=True)]
        )
        for i, (w, t) in enumerate(zip(weights, transforms, strict=True)):
            got = np.asarray(apply(x, linear, "even", layer=i, interpret=interpret), np.float32)
            z = mxfp4.quantize_dequantize(reference.rotate(x, t.inter, t.intra), "even")
            want = np.asarray(reference.multiply(z, mxfp4.dequantize(w)).astype(x.dtype), np.float32)
            right = got == want
            if kind in INEXACT:
                size = np.asarray(reference.multiply(jnp.abs(z), jnp.abs(mxfp4.dequantize(w))))
                # ... and both are rounded to bfloat16.
                right = np.abs(got - want) <= INEXACT[kind] * size + 2.0**-8 * np.abs(want)
            if not right.all():
                wrong = int((~right).sum())
                raise TorqError(
                    f"the {kind} kernels are wrong on this device: {wrong} of {want.size} products of "
                    f"{case[0]} x {case[1]} by {case[1]} x {case[2]} are not what XLA computes; use "
                    "implementation='xla', and please report what 'python -m benchmarks.gpu' prints"
                )


def check_operands(
    rows: int, features: int, outputs: int, group: int
) -> tuple[Any, list[MXFP4Array], list[TwoLevelRotation]]:
    """Activations bfloat16, weights and rotations of two layers: small integers times powers of two.

    Scales differ from row to row and from block to block, so that one read for another shows. The magnitudes of an
    output's products add up to less than 2**20 times the least, so every sum is exact in float32, in any order.
    """
    rng = np.random.default_rng(rows)
    blocks = features // layout.BLOCK

    def sparse(*shape: int) -> Any:
        few = rng.random(shape) < min(1, 4 / shape[-1])
        return rng.integers(-2, 3, shape) / 4 * few

    def powers(most: int, *shape: int) -> Any:
        return 2.0 ** rng.integers(0, most + 1, shape)

    x = jnp.asarray(rng.integers(-40, 41, (rows, features)), jnp.bfloat16)
    weights, transforms = [], []
    for _ in range(2):
        w = rng.integers(-12, 13, (outputs, blocks, layout.BLOCK)) * powers(2, outputs, blocks, 1)
        w = (w * powers(4, outputs, 1, 1) / 4).reshape(outputs, features)
        weights.append(mxfp4.quantize(jnp.asarray(w, jnp.float32), "even"))
        inter = jnp.asarray(sparse(layout.BLOCK, blocks // group, group, group), jnp.float32)
        intra = jnp.asarray(sparse(blocks, layout.BLOCK, layout.BLOCK) * powers(1, blocks, 1, 1), jnp.float32)
        transforms.append(TwoLevelRotation(inter, intra, features))
    return x, weights, transforms
