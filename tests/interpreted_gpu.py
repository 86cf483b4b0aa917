"""Products of the Hopper and Blackwell kernels in Mosaic GPU's interpretation, with race detection.

pytest does not collect this file by itself: test_gpu_kernels.py runs it in a process whose XLA has more threads than
the kernels, which wait for each other on them and otherwise may wait for ever.
"""

import jax.numpy as jnp
import pytest

from pallas_kernels import blackwell, hopper, layout, reference
from tests.test_gpu_kernels import operands
from tests.test_portable_kernels import BF16, F32, check_product, exact_case
from torq_jax import gpu, mxfp4


def interpreted(**options):
    """The interpreter's parameters, with race detection."""
    return hopper.require().InterpretGPUParams(detect_races=True, **options)


def races():
    """Whether the last interpretation found any."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


# m, k, n, inter, intra, rule, dtype, tiles
CASES = [
    (5, 512, 128, None, None, None, BF16, hopper.Tiles(8, 2)),
    (9, 1024, 200, (32, 2, 16, 16), (32, 32, 32), "even", BF16, hopper.Tiles(16, 2, 2)),
    (20, 320, 128, (32, 5, 2, 2), None, "floor", F32, hopper.Tiles(16, 2)),
]


@pytest.mark.parametrize("m, k, n, inter, intra, rule, dtype, tiles", CASES)
def test_hopper_products_equal_the_reference(m, k, n, inter, intra, rule, dtype, tiles):
    x, inter, intra, w = exact_case(m, k, n, inter, intra, dtype)
    packed = layout.to_hopper(w.codes, w.scales)
    options = {"tiles": tiles, "cores": 2, "interpret": interpreted()}

    def run(rule):
        return hopper.rotate_quantize_matmul(x, inter, intra, packed, rule=rule, **options)[:, :n]

    check_product(run, x, inter, intra, w, rule)
    assert not races()


# Every number of accumulators, splits, more tiles than blocks and than accumulators, more steps than stages.
@pytest.mark.parametrize(
    "m, k, n, tiles",
    [
        (128, 1024, 128, blackwell.Tiles(128, 2, 2)),
        (20, 768, 512, blackwell.Tiles(128, 2)),
        (128, 512, 512, blackwell.Tiles(256, 1)),
    ],
)
def test_blackwell_tiles_copies_and_barriers_are_right(m, k, n, tiles):
    x, w, a, b = operands(m, k, n)
    y = blackwell.matmul(a, b, dtype=F32, tiles=tiles, cores=1, interpret=interpreted())
    # Products exact, sums in another order: as in check_product.
    want, size = (
        reference.multiply(f(mxfp4.dequantize(x)), f(mxfp4.dequantize(w))) for f in (lambda v: v, jnp.abs)
    )
    assert bool((jnp.abs(y[:m, :n] - want) <= k * 2.0**-24 * size).all())
    assert not races()


@pytest.mark.parametrize("kind", ["hopper", "hopper_e4m3", "blackwell"])
def test_what_is_tried_on_a_device_at_first_use_is_right_here(kind, monkeypatch):
    """Packed sites of two layers, each read by its index; of Blackwell's kernel what a CPU can run. Fewer outputs."""
    monkeypatch.setattr(gpu, "CHECKED", ((9, 512, 128, 4),))
    gpu.check(kind, interpret=True)


@pytest.mark.parametrize("far", [False, True])
def test_hopper_e4m3_products_equal_the_reference(far):
    x, inter, intra, w = exact_case(9, 1024, 200, (32, 2, 16, 16), (32, 32, 32), BF16)
    if far:  # 19 powers of two lie between the first block of some rows and the rest, which no e4m3 row holds
        inter = intra = None
        x = x.at[2:5, :32].multiply(2.0**19)
    packed = layout.to_hopper_e4m3(w.codes, w.scales)
    options = {"tiles": hopper.Tiles(16, 2, 2), "cores": 2, "interpret": interpreted()}

    def run(rule):
        return hopper.rotate_quantize_matmul_e4m3(x, inter, intra, packed, rule=rule, **options)[:, :200]

    # The interpreter adds in float32, as Hopper's tensor cores do not.
    check_product(run, x, inter, intra, w, "even")
    assert not races()
