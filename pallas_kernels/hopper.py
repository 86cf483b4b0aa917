"""The product with an MXFP4 weight on Hopper (sm_90a), by Mosaic GPU: weights decoded in registers beside bfloat16
activations in shared memory.

Tensor cores of sm_90 have no 4-bit type. MXFP4 values are exact in bfloat16, so the product of decoded operands is
exact but for float32 sums, at the bfloat16 rate; what is saved is the weight's bytes. ``wgmma`` takes its left
operand from registers: the weight is the left one and the activations the right, so that decoded weights never go
back to memory, and 8 tokens are as wide as a product need be. Results leave transposed.

A block of threads has two warpgroups that decode and multiply, 64 outputs each, and one that only starts TMA copies
(``emit_pipeline_warp_specialized``). While one warpgroup decodes, the other one's ``wgmma`` can run. Decoding costs
a shift, a mask and a product for two weights (:class:`pallas_kernels.layout.HopperWeight`); :func:`_decode` writes
these as they are, on whole 32-bit registers, because Pallas cannot shift two 16-bit lanes of a register together.
The interpreter runs neither that nor products of registers: it takes :func:`_decode_plainly`, which computes the same
from the same words, by way of shared memory.

Activations are rotated and rounded by a kernel of their own, that of :mod:`pallas_kernels.portable`: fused into this
one, every one of 32 to 112 tiles of outputs would do it again, and rounding 16 rows of 4096 takes as many
instructions as decoding a tile's weights does. It writes rounded values as bfloat16, not codes: their bytes matter
little beside the weight's, and no tile decodes them again.

With few tokens and few outputs there are fewer tiles than multiprocessors: K is split, and XLA adds the parts, where
that takes less time by counting (:func:`choose`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import elements, portable
from pallas_kernels import tiles as tiling
from pallas_kernels.layout import BLOCK, HOPPER_ROWS, HOPPER_STEP, HopperWeight, hopper_code
from pallas_kernels.portable import Rotation, layer_index
from pallas_kernels.reference import Rule

LEAST_JAX = (0, 12)
"""The kernels use the names that Mosaic GPU has from this version of jax on."""

_GPU = tiling.GPUS["hopper"]
CORES = _GPU.cores
"""Multiprocessors of an H100 SXM, an H200 and a GH200; a call may name others."""

SHARED_MEMORY = _GPU.shared
"""Bytes of shared memory that a block of threads may take on sm_90."""

_HALF = HOPPER_ROWS // 2  # outputs of a warpgroup
_SLAB = HOPPER_STEP // 4  # features of one of a word's four elements


class Tiles(NamedTuple):
    """How a call works: tokens of a tile, steps of 256 features in flight, parts that K is split into."""

    tokens: int
    stages: int
    splits: int = 1


_STEP_CYCLES = (
    2 * 375
)  # 8 warps on 4 schedulers; the inner loop as benchmarks.gpu_static finds it, 364 to 383


def candidates(rows: int, k: int, n: int) -> list[Tiles]:
    """Tiles worth trying: no more tokens than hold the rows, as many steps in flight as fit, up to five."""
    found = []
    for tokens in (128, 64, 32, 16, 8):
        if tokens > 8 and rows <= tokens // 2:
            continue
        # With results in float32: those in bfloat16 leave room to spare.
        fits = lambda splits, stages: shared_memory(Tiles(tokens, stages, splits), 4) <= SHARED_MEMORY  # noqa: E731, B023
        cuts = tiling.cuts_of_k(rows, k, HOPPER_STEP, fits)
        found += [Tiles(tokens, stages, splits) for splits, stages in cuts]
    return found


def work(tiles: Tiles, rows: int, k: int, n: int) -> tiling.Work:
    """What a call with these tiles has to do."""
    steps, tokens, splits = -(-k // HOPPER_STEP), tiles.tokens, tiles.splits
    parts = 2 * 4 * splits if splits > 1 else 0  # written, and read by XLA
    return tiling.Work(
        tiles=-(-rows // tokens) * -(-n // HOPPER_ROWS) * splits,
        steps=steps // splits,
        loaded=_step_bytes(tokens),
        cycles=max(_STEP_CYCLES, tokens * HOPPER_ROWS * HOPPER_STEP / _GPU.multiply_adds),
        moved=k * n * 4.25 / 8 + 2 * rows * k + (2 + parts) * rows * n,
        summed=splits > 1,
        drained=True,
    )


@functools.cache
def choose(rows: int, k: int, n: int, cores: int = CORES) -> Tiles:
    """The candidate with the least time by counting: :func:`pallas_kernels.tiles.counted_us`."""
    works = {tiles: work(tiles, rows, k, n) for tiles in candidates(rows, k, n)}
    return tiling.least(_GPU._replace(cores=cores), works)


def shared_memory(tiles: Tiles, width: int = 2) -> int:
    """Bytes of shared memory of a call, but for a few barriers."""
    return tiles.stages * _step_bytes(tiles.tokens) + HOPPER_ROWS * tiles.tokens * (
        4 if tiles.splits > 1 else width
    )


def _step_bytes(tokens: int) -> int:
    """Words, exponents and activations of 256 features."""
    return HOPPER_ROWS * _SLAB * 2 + HOPPER_STEP // BLOCK * HOPPER_ROWS + tokens * HOPPER_STEP * 2


def require() -> Any:
    """``jax.experimental.pallas.mosaic_gpu`` of a jax that has what these kernels need.

    Raises:
      ImportError: an older jax.
    """
    if jax.__version_info__[:2] < LEAST_JAX:
        wanted = ".".join(map(str, LEAST_JAX))
        raise ImportError(
            f"the Hopper and Blackwell kernels need jax {wanted} or later, this is jax {jax.__version__}: use Python "
            f"3.12 and pip install 'jax[cuda13]>={wanted}', or implementation='portable' or 'xla'"
        )
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _decode(plgpu: Any, words: Any, scales: Any, t: int) -> Any:
    """Element ``t`` of words ``[64, 64]`` -> bfloat16 ``[64, 64]``, times the multipliers of its two blocks.

    ``scales``: exponent fields uint8 ``[64]`` of columns 0 to 31 and 32 to 63.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector
    from jax.experimental.mosaic import gpu as mgpu

    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, row, row),
        return_type=plgpu.ShapeDtypeStruct((_HALF, _SLAB), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def decode(_: Any, words: Any, low: Any, high: Any) -> Any:
        i32, i16 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16)
        one, pair = ir.VectorType.get((1,), i32), ir.VectorType.get((2,), ir.BF16Type.get())

        def constant(of: Any, value: int) -> Any:
            return mgpu.c(value - (value >> 31 << 32), of)

        def masked(word: Any, move: int, mask: int) -> Any:
            if move:
                shift = arith.shli if move > 0 else arith.shrui
                word = shift(word, constant(i32, abs(move)))
            return arith.andi(word, constant(i32, mask * 0x10001))

        def multiplier(register: Any) -> Any:
            byte = vector.extract(register, dynamic_position=[], static_position=[0])
            field = arith.shli(arith.extui(i16, byte), constant(i16, 7))
            return vector.broadcast(pair, arith.bitcast(ir.BF16Type.get(), field))

        # A register of the words has two columns of a row, the second index is the group of eight columns, the fifth
        # the upper or lower row of two eight apart; of the scales, the third.
        multipliers = [[multiplier(s.registers[0, 0, h, 0, 0]) for h in range(2)] for s in (low, high)]
        made = words.registers.copy()
        for place, register in np.ndenumerate(words.registers):
            word = vector.extract(vector.bitcast(one, register), dynamic_position=[], static_position=[0])
            if t < 3:
                value = masked(word, 3 * t, 0x81C0)
            else:
                value = arith.ori(masked(word, -6, 0x0180), masked(word, -4, 0x0040))
                value = arith.ori(value, masked(word, 4, 0x8000))
            value = vector.bitcast(pair, vector.broadcast(one, value))
            made[place] = arith.mulf(value, multipliers[place[1] // 4][place[4]])
        return mgpu.FragmentedArray(_registers=made, _layout=words.layout, _is_signed=None)

    return decode(words, *scales)


def _decode_plainly(words: Any, scales: Any, t: int) -> Any:
    """What :func:`_decode` computes, in jax.numpy, for the interpreter."""
    low, high = (s.astype(jnp.int32)[:, None] for s in scales)
    scale = jnp.where(lax.broadcasted_iota(jnp.int32, words.shape, 1) < BLOCK, low, high)
    # From the multiplier 2**(field - 127) of an element times 2**-126 to the E8M0 code that means as much.
    value = elements.decode(hopper_code(words.astype(jnp.int32), t), jnp.maximum(scale - 126, 1))
    return jnp.where(scale == 0, 0.0, value).astype(jnp.bfloat16)


def _kernel(
    x_gmem: Any,
    words_gmem: Any,
    exponents_gmem: Any,
    factor_gmem: Any,
    layer_gmem: Any,
    out_gmem: Any,
    out_smem: Any,
    weight_smem: Any,
    *,
    plgpu: Any,
    tiles: Tiles,
    outputs: int,
) -> None:
    """Tiles of ``out [1, M, N]``, or ``[splits, N, M]`` of sums that are parts, one after another in each block.

    Weights of several layers stand one below the other, ``outputs`` rows each; ``layer_gmem`` says which.
    """
    tokens, splits = tiles.tokens, tiles.splits
    row = plgpu.Layout.WGMMA.reduce(1)
    group = lax.axis_index("wg")
    mine = pl.ds(group * _HALF, _HALF)
    steps = x_gmem.shape[1] // HOPPER_STEP // splits
    tiles_m, tiles_n = x_gmem.shape[0] // tokens, outputs // HOPPER_ROWS
    layer = layer_gmem[0]
    above, exponents_above = layer * outputs, layer * (x_gmem.shape[1] // BLOCK)
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def pipeline(body: Any, context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((HOPPER_ROWS, _SLAB), lambda k: (0, k), transforms=swizzled),
                plgpu.BlockSpec((HOPPER_STEP // BLOCK, HOPPER_ROWS), lambda k: (k, 0)),
                plgpu.BlockSpec((tokens, HOPPER_STEP), lambda k: (0, k), transforms=swizzled),
            ],
            wg_axis="wg",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.stages,
            compute_context=context,
        )

    def body(_: Any, words_smem: Any, exponents_smem: Any, x_smem: Any, total: Any) -> Any:
        words = plgpu.load(words_smem.at[mine], layout=plgpu.Layout.WGMMA)
        for t in range(4):
            scales = [plgpu.load(exponents_smem.at[2 * t + i, mine], layout=row) for i in range(2)]
            x = x_smem.at[:, pl.ds(t * _SLAB, _SLAB)].transpose((1, 0))
            if weight_smem is None:
                plgpu.wgmma(total, _decode(plgpu, words, scales, t), x)
                continue
            plgpu.wgmma_wait(0)
            weight_smem[group] = _decode_plainly(words, scales, t)
            plgpu.commit_smem()
            plgpu.wgmma(total, weight_smem.at[group], x)
        plgpu.wgmma_wait(0)
        return total

    allocations = pipeline(lambda *_: None, lambda *_: None).get_allocations(
        words_gmem, exponents_gmem, x_gmem
    )

    @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="wg")
    def _(allocations: Any) -> None:
        @plgpu.nd_loop((tiles_m * tiles_n * splits,), collective_axes="block")
        def _(info: Any) -> None:
            # Tiles of the same outputs come together: their weight is then in the L2 cache.
            rest, m = lax.div(info.index[0], tiles_m), lax.rem(info.index[0], tiles_m)
            n, split = lax.div(rest, splits), lax.rem(rest, splits)
            here, rows = pl.ds(n * HOPPER_ROWS, HOPPER_ROWS), pl.ds(m * tokens, tokens)

            def context(run: Any) -> None:
                @functools.partial(pl.run_scoped, total_ref=plgpu.ACC((_HALF, tokens), jnp.float32))
                def _(total_ref: Any) -> None:
                    run(total_ref)
                    factor = plgpu.load(
                        factor_gmem.at[pl.ds(above + n * HOPPER_ROWS + group * _HALF, _HALF)], layout=row
                    )
                    y = total_ref[...] * lax.broadcast_in_dim(factor, (_HALF, tokens), (0,))
                    y = y.astype(out_smem.dtype)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    target = out_gmem.at[split, here, rows].at[mine]
                    if splits == 1:
                        out_smem.at[group].transpose((1, 0))[...] = y
                        target = out_gmem.at[split, rows, here].at[:, mine]
                    else:
                        out_smem[group] = y
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_smem.at[group], target)

            first = split * steps
            pipeline(body, context)(
                words_gmem.at[
                    pl.ds(above + n * HOPPER_ROWS, HOPPER_ROWS), pl.ds(first * _SLAB, steps * _SLAB)
                ],
                exponents_gmem.at[
                    pl.ds(
                        exponents_above + first * HOPPER_STEP // BLOCK,
                        steps * HOPPER_STEP // BLOCK,
                    ),
                    here,
                ],
                x_gmem.at[rows, pl.ds(first * HOPPER_STEP, steps * HOPPER_STEP)],
                allocations=allocations,
            )

    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("dtype", "tiles", "cores", "interpret"))
def matmul(
    x: Float[Array, "m k"],
    weight: HopperWeight,
    *,
    dtype: Any = jnp.bfloat16,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """``x @ weight.T`` with bfloat16 activations; products exact, sums float32.

    Args:
      x: ``[M, K]`` bfloat16, any M from 1.
      weight: from :func:`pallas_kernels.layout.to_hopper`.
      dtype: of the result, bfloat16 or float32.
      layer: None, or the index into a weight whose arrays have a leading axis: nothing is copied.
      tiles: sizes to work in, None for :func:`choose`.
      cores: multiprocessors that share the tiles.
      interpret: None, or ``InterpretGPUParams`` to run on a CPU.

    Returns:
      ``[M, N]``, N as padded.

    Raises:
      ImportError: a jax that is too old.
      ValueError: a dtype or sizes that do not fit, or tiles that need more shared memory than there is.
    """
    plgpu = require()
    rows, size = x.shape
    outputs, full = weight.words.shape[-2], weight.words.shape[-1] * 4
    if x.dtype != jnp.bfloat16:
        raise ValueError(
            f"activations are {x.dtype}: the Hopper product takes bfloat16, cast them or use 'portable'"
        )
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"a result of {jnp.dtype(dtype)} cannot be made: must be bfloat16 or float32")
    if size % BLOCK or -(-size // HOPPER_STEP) * HOPPER_STEP != full:
        raise ValueError(f"activations have {size} features, the weight {full}")
    tiles = choose(rows, full, outputs, cores) if tiles is None else tiles
    if tiles.tokens not in (8, 16, 32, 64, 128) or full // HOPPER_STEP % tiles.splits:
        raise ValueError(
            f"{tiles} do not fit {full} features: tokens must be 8, 16, 32, 64 or 128, "
            f"splits divide {full // HOPPER_STEP}"
        )
    result = jnp.dtype(jnp.float32 if tiles.splits > 1 else dtype)
    needed = shared_memory(tiles, result.itemsize)
    if needed > SHARED_MEMORY:
        raise ValueError(
            f"{tiles} need {needed} bytes of shared memory, sm_90 has {SHARED_MEMORY}: take fewer stages"
        )
    more = -rows % tiles.tokens
    if more or full > size:
        x = jnp.pad(x, ((0, more), (0, full - size)))
    count = x.shape[0] // tiles.tokens * (outputs // HOPPER_ROWS) * tiles.splits
    if tiles.splits == 1:
        shape, part = (1, x.shape[0], outputs), (2, tiles.tokens, _HALF)
    else:
        shape, part = (tiles.splits, outputs, x.shape[0]), (2, _HALF, tiles.tokens)

    def shared(shape: tuple[int, ...], dtype: Any) -> Any:
        swizzle = min(128, shape[-1] * dtype.itemsize)
        tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    y = plgpu.kernel(
        functools.partial(_kernel, plgpu=plgpu, tiles=tiles, outputs=outputs),
        out_type=jax.ShapeDtypeStruct(shape, result),
        grid=(min(cores, count),),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        scratch_types=[
            shared(part, result),
            None if interpret is None else shared((2, _HALF, _SLAB), jnp.dtype(jnp.bfloat16)),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="torq_hopper_matmul",
    )(
        x,
        weight.words.reshape(-1, full // 4),
        weight.exponents.reshape(-1, outputs),
        weight.factor.reshape(-1),
        layer_index(layer),
    )
    y = y[0] if tiles.splits == 1 else y.sum(0).T
    return y[:rows].astype(dtype)


def rotate_quantize_matmul(
    x: Float[Array, "m k"],
    inter: Any,
    intra: Any,
    weight: HopperWeight,
    *,
    rule: Rule | None,
    rotation: Rotation | None = None,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """``round(rotate(x)) @ weight.T``, in two kernels: ``portable.rotate_round`` and :func:`matmul`.

    Args:
      x: ``[M, K]`` bfloat16 or float32, any M from 1.
      inter, intra: None, or as ``torq_jax.TwoLevelRotation`` has them, in any of its shapes.
      weight, tiles, cores, interpret: as in :func:`matmul`.
      rotation: from ``portable.prepare_rotation``, in place of inter and intra.
      layer: None, or the index into a weight and a rotation that have a leading axis.
      rule: scale rule of the activations; None leaves them in bfloat16 (W4A16).

    Returns:
      ``[M, N]`` in the dtype of ``x``, N as padded. A row with a NaN or an infinity is NaN.

    Raises:
      ImportError, ValueError: as :func:`matmul`, and float32 activations without a rule.
    """
    if rule is None and x.dtype == jnp.float32:
        raise ValueError(
            "float32 activations that are not rounded to MXFP4 have no exact product on Hopper's tensor cores: cast "
            "them to bfloat16, or use implementation='portable'"
        )
    z = portable.rotate_round(
        x, inter, intra, rule=rule, rotation=rotation, layer=layer, interpret=interpret is not None
    )
    return matmul(z, weight, dtype=x.dtype, layer=layer, tiles=tiles, cores=cores, interpret=interpret)
