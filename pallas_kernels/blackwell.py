"""The product of MXFP4 operands on Blackwell (sm_100a), by Mosaic GPU: tensor cores that multiply blocks of 32 E2M1
values with their E8M0 scales, exactly, and add in float32.

Both operands stay packed all the way: TMA copies codes and swizzled scales to shared memory, ``tcgen05.cp`` scales
to tensor memory, ``tcgen05.mma`` reads codes from shared and scales from tensor memory. No thread touches a weight.

Of a block of threads one warp starts copies, one starts products, and a second warpgroup writes results. With tiles
of 128 outputs there is tensor memory for two accumulators: one tile is written while the next is multiplied. With
few tiles K is split, and XLA adds the parts.

Activations are rotated and rounded by a kernel of their own (``portable.rotate_quantize_swizzled``), for the reason
that :mod:`pallas_kernels.hopper` gives; it writes codes, and scales where the product reads them. Tensor cores take
no bfloat16 beside 4-bit values: W4A16 has no kernel here.

The interpreter has no block-scaled product: it runs the same kernel on operands that are decoded to bfloat16 before,
which shows whether tiles, copies and barriers are right, and nothing about codes and scales.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import elements, portable
from pallas_kernels import tiles as tiling
from pallas_kernels.hopper import require
from pallas_kernels.layout import (
    BLACKWELL_ROWS,
    BLACKWELL_STEP,
    BLOCK,
    BlackwellOperand,
    unswizzle_scales,
)
from pallas_kernels.reference import Rule

_GPU = tiling.GPUS["blackwell"]
CORES = _GPU.cores
"""Multiprocessors of a B200; a call may name others."""

SHARED_MEMORY = _GPU.shared
"""Bytes of shared memory that a block of threads may take on sm_100."""

_ROWS = BLACKWELL_ROWS
_SCALES = BLACKWELL_STEP // BLOCK
_PART = 32  # columns of a result written at once


class Tiles(NamedTuple):
    """How a call works: outputs of a tile, 128 or 256, steps of 256 features in flight, parts that K is split into.

    A tile has 128 rows of activations, which is what the tensor core takes, or pads to.
    """

    columns: int
    stages: int
    splits: int = 1


def candidates(rows: int, k: int, n: int, width: int = 2) -> list[Tiles]:
    """Tiles worth trying, with as many steps in flight as fit, up to five.

    ``width``: bytes of an element of the result.
    """
    found = []
    for columns in (256, 128):
        if n % columns:
            continue
        fits = lambda splits, stages: shared_memory(Tiles(columns, stages, splits), width) <= SHARED_MEMORY  # noqa: E731, B023
        cuts = tiling.cuts_of_k(rows, k, BLACKWELL_STEP, fits)
        found += [Tiles(columns, stages, splits) for splits, stages in cuts]
    return found


def work(tiles: Tiles, rows: int, k: int, n: int) -> tiling.Work:
    """What a call with these tiles has to do."""
    steps, splits = -(-k // BLACKWELL_STEP), tiles.splits
    parts = 2 * 4 * splits if splits > 1 else 0  # written, and read by XLA
    return tiling.Work(
        tiles=-(-rows // _ROWS) * (n // tiles.columns) * splits,
        steps=steps // splits,
        loaded=_step_bytes(tiles.columns),
        cycles=_ROWS * tiles.columns * BLACKWELL_STEP / _GPU.multiply_adds,
        moved=(k * n + rows * k) * 4.25 / 8 + (2 + parts) * rows * n,
        summed=splits > 1,
        drained=False,
    )


@functools.cache
def choose(rows: int, k: int, n: int, cores: int = CORES, width: int = 2) -> Tiles:
    """The candidate with the least time by counting: :func:`pallas_kernels.tiles.counted_us`."""
    works = {tiles: work(tiles, rows, k, n) for tiles in candidates(rows, k, n, width)}
    return tiling.least(_GPU._replace(cores=cores), works)


def _step_bytes(columns: int) -> int:
    """Codes and scales of 256 features, of activations and weights."""
    return (_ROWS + columns) * (BLACKWELL_STEP // 2 + _SCALES)


def shared_memory(tiles: Tiles, width: int = 2) -> int:
    """Bytes of shared memory of a call, but for a few barriers."""
    return tiles.stages * _step_bytes(tiles.columns) + 2 * _ROWS * _PART * (4 if tiles.splits > 1 else width)


def _accumulators(tiles: Tiles) -> int:
    """Tensor memory has 512 columns; scales take some."""
    return 2 if tiles.columns == 128 else 1


def _kernel(*refs: Any, plgpu: Any, tiles: Tiles, outputs: int) -> None:
    """Tiles of ``out [splits, M, N]``, one after another in each block.

    Weights of several layers stand one below the other, ``outputs`` rows each; ``layer_gmem`` says which.
    """
    a_gmem, sa_gmem, b_gmem, sb_gmem, layer_gmem, out_gmem = refs[:6]
    a_smem, sa_smem, b_smem, sb_smem, out_smem, total_tmem, sa_tmem, sb_tmem = refs[6:14]
    filled, emptied, multiplied, stored = refs[14:]
    columns, stages, splits = tiles
    group = lax.axis_index("wg")
    steps = a_gmem.shape[1] // BLACKWELL_STEP // splits
    tiles_m, tiles_n = a_gmem.shape[0] // _ROWS, outputs // columns
    above = layer_gmem[0] * outputs

    @plgpu.nd_loop((tiles_m * tiles_n * splits,), collective_axes="block")
    def _(info: Any) -> None:
        # Tiles of the same outputs come together: their weight is then in the L2 cache.
        rest, m = lax.div(info.index[0], tiles_m), lax.rem(info.index[0], tiles_m)
        n, split = lax.div(rest, splits), lax.rem(rest, splits)
        local = info.local_index
        accumulators = _accumulators(tiles)
        half = lax.rem(local, jnp.int32(accumulators))
        total = total_tmem.at[:, pl.ds(half * columns, columns)]

        def slot(k: Any) -> Any:
            return lax.rem(local * steps + k, stages)

        @pl.when(group == 0)
        def _multiply() -> None:
            @plgpu.warp_map
            def _per_warp(warp: Any) -> None:
                @pl.when(warp == 0)
                def _copies() -> None:
                    def load(k: Any, carry: None) -> None:
                        at = slot(k)

                        @pl.when(local * steps + k >= stages)
                        def _() -> None:
                            plgpu.barrier_wait(emptied.at[at])

                        step = split * steps + k
                        features = pl.ds(step * BLACKWELL_STEP, BLACKWELL_STEP)
                        scales = pl.ds(step * 2, 2)
                        chunks, chunk = columns // 128, lax.div(above, 128)
                        for source, target in (
                            (a_gmem.at[pl.ds(m * _ROWS, _ROWS), features], a_smem),
                            (b_gmem.at[pl.ds(above + n * columns, columns), features], b_smem),
                            (sa_gmem.at[pl.ds(m, 1), scales], sa_smem),
                            (sb_gmem.at[pl.ds(chunk + n * chunks, chunks), scales], sb_smem),
                        ):
                            plgpu.copy_gmem_to_smem(source, target.at[at], filled.at[at])

                    lax.fori_loop(0, steps, load, None)

                @pl.when((warp == 1) & (local >= accumulators))
                def _wait() -> None:
                    plgpu.barrier_wait(stored.at[half])

                @pl.when(warp == 1)
                def _products() -> None:
                    def product(k: Any, i: int) -> None:
                        # A slot's scales have tensor memory of their own: the product that reads them may still run
                        # when the next step's are copied. It cannot be indexed, so slots are told apart here.
                        scales = {}
                        if a_smem.dtype == jnp.float4_e2m1fn:
                            plgpu.async_copy_scales_to_tmem(sa_smem.at[i], sa_tmem[i])
                            plgpu.async_copy_scales_to_tmem(sb_smem.at[i], sb_tmem[i])
                            scales = {"a_scale": sa_tmem[i], "b_scale": sb_tmem[i]}
                        b = b_smem.at[i].transpose((1, 0))
                        plgpu.tcgen05_mma(total, a_smem.at[i], b, emptied.at[i], accumulate=k > 0, **scales)

                    def multiply(k: Any, carry: None) -> None:
                        at = slot(k)
                        plgpu.barrier_wait(filled.at[at])
                        for i in range(stages):
                            pl.when(at == i)(functools.partial(product, k, i))

                        @pl.when(k == steps - 1)
                        def _() -> None:
                            plgpu.tcgen05_commit_arrive(multiplied.at[half])

                    lax.fori_loop(0, steps, multiply, None)

        @pl.when(group == 1)
        def _write() -> None:
            plgpu.barrier_wait(multiplied.at[half])
            for i in range(columns // _PART):
                part = pl.ds(i * _PART, _PART)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                out_smem[i % 2] = plgpu.async_load_tmem(total.at[:, part]).astype(out_smem.dtype)
                plgpu.commit_smem()
                target = out_gmem.at[split, pl.ds(m * _ROWS, _ROWS), pl.ds(n * columns, columns)]
                plgpu.copy_smem_to_gmem(out_smem.at[i % 2], target.at[:, part])
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(stored.at[half])

    plgpu.wait_smem_to_gmem(0)


def _decoded(operand: BlackwellOperand) -> Any:
    *layers, rows, features = operand.values.shape
    if layers:
        return jax.vmap(_decoded)(operand)
    scales = unswizzle_scales(lax.bitcast_convert_type(operand.scales, jnp.uint8)).astype(jnp.int32)
    pairs = lax.bitcast_convert_type(operand.values.reshape(rows, -1, 2), jnp.uint8).astype(jnp.int32)
    code = jnp.stack([pairs & 15, pairs >> 4], -1).reshape(rows, -1, BLOCK)
    return elements.decode(code, scales[..., None]).reshape(rows, features).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("dtype", "tiles", "cores", "interpret"))
def matmul(
    x: BlackwellOperand,
    weight: BlackwellOperand,
    *,
    dtype: Any = jnp.bfloat16,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """``x @ weight.T`` of two MXFP4 operands; products exact, sums float32.

    Args:
      x, weight: ``[M, K]`` and ``[N, K]``, from :func:`pallas_kernels.layout.to_blackwell`.
      dtype: of the result, bfloat16 or float32.
      layer: None, or the index into a weight whose arrays have a leading axis: nothing is copied.
      tiles: sizes to work in, None for :func:`choose`.
      cores: multiprocessors that share the tiles.
      interpret: None, or ``InterpretGPUParams`` to run on a CPU what of it can run there.

    Returns:
      ``[M, N]``, both as padded.

    Raises:
      ImportError: a jax that is too old.
      ValueError: a dtype or sizes that do not fit, or tiles that need more shared memory than there is.
    """
    plgpu = require()
    (rows, size), (outputs, full) = x.values.shape, weight.values.shape[-2:]
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"a result of {jnp.dtype(dtype)} cannot be made: must be bfloat16 or float32")
    if size != full:
        raise ValueError(f"activations have {size} features, the weight {full}")
    tiles = choose(rows, full, outputs, cores, jnp.dtype(dtype).itemsize) if tiles is None else tiles
    if tiles.columns not in (128, 256) or outputs % tiles.columns or full // BLACKWELL_STEP % tiles.splits:
        raise ValueError(
            f"{tiles} do not fit {outputs} outputs of {full} features: columns must be 128 or 256 and divide the "
            f"first, splits divide {full // BLACKWELL_STEP}"
        )
    result = jnp.dtype(jnp.float32 if tiles.splits > 1 else dtype)
    needed = shared_memory(tiles, result.itemsize)
    if needed > SHARED_MEMORY:
        raise ValueError(
            f"{tiles} need {needed} bytes of shared memory, sm_100 has {SHARED_MEMORY}: take fewer stages"
        )
    stages, chunks, accumulators = tiles.stages, tiles.columns // 128, _accumulators(tiles)
    count = rows // _ROWS * (outputs // tiles.columns) * tiles.splits
    four = (plgpu.TilingTransform((8, BLACKWELL_STEP)), plgpu.SwizzleTransform(128))
    swizzle = _PART * result.itemsize
    out = (plgpu.TilingTransform((8, _PART)), plgpu.SwizzleTransform(swizzle))
    e8, scales = jnp.float8_e8m0fnu, plgpu.TMEMLayout.SCALES_LAYOUT
    a, b = x.values, weight.values
    if interpret is not None:
        a, b = (_decoded(operand) for operand in (x, weight))
        four = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    y = plgpu.kernel(
        functools.partial(_kernel, plgpu=plgpu, tiles=tiles, outputs=outputs),
        out_type=jax.ShapeDtypeStruct((tiles.splits, rows, outputs), result),
        grid=(min(cores, count),),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((stages, _ROWS, BLACKWELL_STEP), a.dtype, transforms=four),
            plgpu.SMEM((stages, 1, 2, 32, 16), e8),
            plgpu.SMEM((stages, tiles.columns, BLACKWELL_STEP), b.dtype, transforms=four),
            plgpu.SMEM((stages, chunks, 2, 32, 16), e8),
            plgpu.SMEM((2, _ROWS, _PART), result, transforms=out),
            plgpu.TMEM((_ROWS, accumulators * tiles.columns), jnp.float32),
            [plgpu.TMEM((_ROWS, _SCALES), e8, layout=scales) for _ in range(stages)],
            [plgpu.TMEM((tiles.columns, _SCALES), e8, layout=scales) for _ in range(stages)],
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=accumulators, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=accumulators, orders_tensor_core=True),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="torq_blackwell_matmul",
    )(
        a,
        x.scales,
        b.reshape(-1, full),
        weight.scales.reshape(-1, *weight.scales.shape[-3:]),
        portable.layer_index(layer),
    )
    return (y[0] if tiles.splits == 1 else y.sum(0)).astype(dtype)


def rotate_quantize(
    x: Float[Array, "m k"], inter: Any = None, intra: Any = None, *, rule: Rule, **options: Any
) -> BlackwellOperand:
    """Rotated activations as an operand, by :func:`pallas_kernels.portable.rotate_quantize_swizzled`.

    Arguments and errors as there; rows are filled up to 128.
    """
    codes, scales = portable.rotate_quantize_swizzled(x, inter, intra, rule=rule, **options)
    values = lax.bitcast_convert_type(codes, jnp.float4_e2m1fn).reshape(codes.shape[0], -1)
    return BlackwellOperand(values, lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu))


def rotate_quantize_matmul(
    x: Float[Array, "m k"],
    inter: Any,
    intra: Any,
    weight: BlackwellOperand,
    *,
    rule: Rule | None,
    rotation: portable.Rotation | None = None,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """``round(rotate(x)) @ weight.T``, in two kernels: :func:`rotate_quantize` and :func:`matmul`.

    Args:
      x: ``[M, K]`` bfloat16 or float32, any M from 1.
      inter, intra: None, or as ``torq_jax.TwoLevelRotation`` has them, in any of its shapes.
      weight, tiles, cores, interpret: as in :func:`matmul`.
      rotation: from ``portable.prepare_rotation``, in place of inter and intra.
      layer: None, or the index into a weight and a rotation that have a leading axis.
      rule: scale rule of the activations.

    Returns:
      ``[M, N]`` in the dtype of ``x``, N as padded.

    Raises:
      ImportError, ValueError: as :func:`matmul`, and activations that are not to be rounded.
    """
    if rule is None:
        raise ValueError(
            "sm_100's block-scaled product takes MXFP4 activations: name a scale rule, or use "
            "implementation='portable'"
        )
    interpreted = interpret is not None
    rounded = rotate_quantize(
        x, inter, intra, rule=rule, rotation=rotation, layer=layer, interpret=interpreted
    )
    product = matmul(
        rounded, weight, dtype=x.dtype, layer=layer, tiles=tiles, cores=cores, interpret=interpret
    )
    return product[: x.shape[0]]
