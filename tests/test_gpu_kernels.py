"""The Hopper and Blackwell kernels as far as a CPU can run them: products in Mosaic GPU's interpretation, errors."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_tiles
from benchmarks.tpu_tune import MODELS
from pallas_kernels import blackwell, hopper, layout, tiles
from tests.test_portable_kernels import BF16, F32
from torq_jax import mxfp4

OLD = jax.__version_info__[:2] < hopper.LEAST_JAX
mosaic = pytest.mark.skipif(
    OLD, reason=f"Mosaic GPU kernels need jax 0.12 or later, this is {jax.__version__}"
)


@mosaic
def test_interpreted_products_equal_the_reference():
    file = Path(__file__).with_name("interpreted_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    # XLA's threads, of which each warp of a kernel holds one while it waits for another.
    ran = subprocess.run(
        command, env=os.environ | {"NPROC": "16"}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


@mosaic
def test_hopper_refuses_what_it_cannot_run():
    packed = layout.to_hopper(jnp.zeros((128, 128), jnp.uint8), jnp.zeros((128, 8), jnp.uint8))
    x = jnp.zeros((4, 256), BF16)
    with pytest.raises(
        ValueError, match="float32 activations that are not rounded to MXFP4 have no exact product"
    ):
        hopper.rotate_quantize_matmul(x.astype(F32), None, None, packed, rule=None)
    with pytest.raises(ValueError, match="activations have 512 features, the weight 256"):
        hopper.matmul(jnp.zeros((4, 512), BF16), packed)
    with pytest.raises(ValueError, match="activations are float32: the Hopper product takes bfloat16"):
        hopper.matmul(x.astype(F32), packed)
    with pytest.raises(
        ValueError, match="need 447488 bytes of shared memory, sm_90 has 232448: take fewer stages"
    ):
        hopper.matmul(x, packed, tiles=hopper.Tiles(128, 5))
    with pytest.raises(
        ValueError, match="do not fit 256 features: tokens must be 8, 16, 32, 64 or 128, splits divide 1"
    ):
        hopper.matmul(x, packed, tiles=hopper.Tiles(8, 1, 2))


@pytest.mark.skipif(not OLD, reason="this jax is not too old")
def test_an_old_jax_is_named_with_the_remedy():
    with pytest.raises(
        ImportError, match=rf"need jax 0.12 or later, this is jax {jax.__version__}: use Python 3.12"
    ):
        hopper.require()


SITES = sorted({site for model in MODELS.values() for site in model.sites()})


@pytest.mark.parametrize("module, kernel", [(hopper, "hopper"), (blackwell, "blackwell")])
@pytest.mark.parametrize("rows", [1, 16, 100, 256, 2048])
def test_tiles_of_known_models_fit_and_none_counts_less(module, kernel, rows):
    for k, n in [(256, 128), *SITES]:
        chosen, tried = module.choose(rows, k, n), module.candidates(rows, k, n)
        assert chosen in tried
        assert module.shared_memory(chosen, 4 if module is hopper else 2) <= module.SHARED_MEMORY
        assert -(-k // 256) % chosen.splits == 0 and chosen.splits <= max(1, k // 512)
        times = [tiles.counted_us(tiles.GPUS[kernel], module.work(t, rows, k, n)) for t in tried]
        mine = tiles.counted_us(tiles.GPUS[kernel], module.work(chosen, rows, k, n))
        assert mine == min(times)
        # Never less than its bytes and its multiply-adds take.
        assert mine >= gpu_tiles.row(kernel, rows, k, n)["bound_us"]


def test_a_counted_time_is_what_it_says():
    gpu = tiles.GPUS["hopper"]._replace(cores=10, clock=1e9, bandwidth=1e12)
    work = tiles.Work(tiles=21, steps=4, loaded=3200, cycles=500, moved=2e6, summed=False, drained=True)
    # Three rounds of four steps, 500 cycles for instructions against 100 for loads; 2 MB are faster.
    assert tiles.counted_us(gpu, work) == pytest.approx(3 * 4 * 0.5 + 3 * tiles.FILL_US)
    slow = work._replace(moved=9e6, summed=True, drained=False)
    assert tiles.counted_us(gpu, slow) == pytest.approx(9 + tiles.FILL_US + tiles.SUM_US)
    fewer = {"many": work, "few": work._replace(tiles=22, loaded=1600)}
    assert tiles.least(gpu, fewer) == "few"  # equal times, fewer bytes


def test_results_of_parts_take_no_more_than_the_weight():
    fits = lambda splits, stages: splits * stages <= 12  # noqa: E731
    assert list(tiles.cuts_of_k(16, 4096, 256, fits)) == [(1, 5), (2, 5), (4, 3), (8, 1)]
    assert list(tiles.cuts_of_k(256, 4096, 256, fits)) == [(1, 5), (2, 5)]
    assert list(tiles.cuts_of_k(2048, 4096, 256, fits)) == [(1, 5)]


def operands(m, k, n):
    keys = jax.random.split(jax.random.key(5))
    x, w = (
        mxfp4.quantize(jax.random.normal(key, (r, k)), "even") for key, r in zip(keys, (m, n), strict=True)
    )
    return x, w, *(layout.to_blackwell(a.codes, a.scales) for a in (x, w))


@mosaic
def test_blackwell_refuses_what_it_cannot_run():
    _, _, a, b = operands(4, 256, 128)
    x = jnp.zeros((4, 256), BF16)
    with pytest.raises(ValueError, match="takes MXFP4 activations: name a scale rule"):
        blackwell.rotate_quantize_matmul(x, None, None, b, rule=None)
    with pytest.raises(ValueError, match="activations have 512 features, the weight 256"):
        blackwell.matmul(operands(4, 512, 128)[2], b)
    with pytest.raises(ValueError, match="columns must be 128 or 256 and divide the first, splits divide 1"):
        blackwell.matmul(a, b, tiles=blackwell.Tiles(256, 1))
    with pytest.raises(ValueError, match="bytes of shared memory, sm_100 has 232448: take fewer stages"):
        blackwell.matmul(a, b, tiles=blackwell.Tiles(128, 8))


def test_rows_are_e4m3_and_what_is_left_of_them():
    rng = np.random.default_rng(0)
    powers = rng.integers(-7, 8, (40, 8, 1))
    powers[0, :, 0] = [7, -7, 0, 0, 0, 0, 0, 0]  # 14 apart, which fits ...
    powers[20:] *= 2  # ... and up to 28, which does not
    powers[20, :2, 0] = [14, -14]
    magnitude = rng.choice([0, 0.5, 1, 1.5, 2, 3, 4, 6], (40, 8, 32)) * rng.choice([-1, 1], (40, 8, 32))
    magnitude[:, :, 0] = 6
    z = jnp.asarray((magnitude * 2.0**powers).reshape(40, 256), BF16)
    z = z.at[2].set(0).at[3].multiply(2.0**-100).at[4].multiply(2.0**110)
    first, left = hopper.split_e4m3(z)
    assert first.values.dtype == jnp.float8_e4m3fn and left.dtype == BF16
    whole = first.values.astype(F32) * first.factor[:, None]
    np.testing.assert_array_equal(whole + left.astype(F32), z.astype(F32))
    assert not left[:20].any() and left[20].any()
    second, rest = hopper.split_e4m3(left)
    assert not rest.any()
    assert bool(
        (jnp.abs(second.values.astype(F32) * second.factor[:, None]) <= jnp.abs(whole).max(1)[:, None]).all()
    )
    broken, left = hopper.split_e4m3(z.at[0, 5].set(jnp.nan))
    assert bool(jnp.isnan(broken.values[0, 5].astype(F32))) and not left[0].any()


def test_e4m3_is_multiplied_and_loaded_at_its_own_rate():
    wide, narrow = (hopper.work(hopper.Tiles(128, 2), 128, 4096, 4096, e4m3=e) for e in (False, True))
    assert wide.cycles == 2 * narrow.cycles == 128 * 128 * 256 / 2048
    assert wide.loaded - narrow.loaded == 128 * 256
    assert hopper.shared_memory(hopper.Tiles(128, 3), e4m3=True) < hopper.SHARED_MEMORY
