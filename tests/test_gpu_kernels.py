"""The Hopper and Blackwell kernels as far as a CPU can run them: products in Mosaic GPU's interpretation, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, layout
from tests.test_portable_kernels import BF16, F32, check_product, exact_case

OLD = jax.__version_info__[:2] < hopper.LEAST_JAX
mosaic = pytest.mark.skipif(OLD, reason=f"Mosaic GPU kernels need jax 0.12 or later, this is {jax.__version__}")


def interpreted(**options):
    """The interpreter's parameters, with race detection."""
    return hopper.require().InterpretGPUParams(detect_races=True, **options)


# m, k, n, inter, intra, rule, dtype, tiles
CASES = [
    (5, 512, 128, None, None, None, BF16, hopper.Tiles(8, 2)),
    (9, 1024, 200, (32, 2, 16, 16), (32, 32, 32), "even", BF16, hopper.Tiles(16, 2, 2)),
    (20, 320, 128, (32, 5, 2, 2), None, "floor", F32, hopper.Tiles(16, 2)),
]


@mosaic
@pytest.mark.parametrize("m, k, n, inter, intra, rule, dtype, tiles", CASES)
def test_hopper_products_equal_the_reference(m, k, n, inter, intra, rule, dtype, tiles):
    x, inter, intra, w = exact_case(m, k, n, inter, intra, dtype)
    packed = layout.to_hopper(w.codes, w.scales)
    run = lambda rule: hopper.rotate_quantize_matmul(  # noqa: E731
        x, inter, intra, packed, rule=rule, tiles=tiles, cores=2, interpret=interpreted()
    )[:, :n]
    check_product(run, x, inter, intra, w, rule)
