"""The Hopper and Blackwell kernels as far as a CPU can run them: products in Mosaic GPU's interpretation, errors."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import blackwell, hopper, layout
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


@pytest.mark.parametrize("rows", [1, 16, 64, 100, 2048])
@pytest.mark.parametrize("k, n", [(4096, 4096), (4096, 14336), (14336, 4096), (256, 128)])
def test_chosen_tiles_fit_the_shared_memory(rows, k, n):
    tiles = hopper.choose(rows, k, n)
    assert hopper.shared_memory(tiles, 4) <= hopper.SHARED_MEMORY
    assert k // layout.HOPPER_STEP % tiles.splits == 0


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


@pytest.mark.parametrize("rows", [1, 100, 2048])
@pytest.mark.parametrize("k, n", [(4096, 4096), (4096, 14336), (14336, 4096), (256, 128)])
def test_chosen_blackwell_tiles_fit_the_shared_memory(rows, k, n):
    for width in (2, 4):
        tiles = blackwell.choose(rows, k, n, width=width)
        assert blackwell.shared_memory(tiles, width) <= blackwell.SHARED_MEMORY
        assert n % tiles.columns == 0 and k // layout.BLACKWELL_STEP % tiles.splits == 0
