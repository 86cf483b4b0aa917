"""The TPU kernels compile for every generation, with none attached: libtpu's compiler in a process of its own."""

import importlib.util

import pytest

from benchmarks.tpu_simulator import Call, simulate
from pallas_kernels import tiles


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is missing: pip install 'torq-jax[tpu]'"
)
def test_compiles_for_every_generation():
    rotation = ((32, 2, 16, 16), (32, 32, 32))
    calls = [
        Call(operation, generation, rows, 1024, 1024, *rotation)
        for generation in tiles.GENERATIONS
        for operation, rows in (("fused", 16), ("fused", 256), ("rotate_quantize", 16))
    ]
    calls += [
        Call(
            "fused", generation, 256, 2048, 1024, (32, 4, 16, 16), (64, 32, 32), "even", (256, 256, 256, 1024)
        )
        for generation in tiles.GENERATIONS
    ]
    # One test, because libtpu takes one process at a time.
    found = simulate(calls, profile=False)
    failed = [(call, result) for call, result in zip(calls, found, strict=True) if "compiled" not in result]
    assert not failed and len(found) == len(calls), failed


def test_tiles_of_the_table_fit_their_device():
    for entry in tiles.TABLE:
        chosen = tiles.choose(entry.generation, entry.rows, entry.k, entry.n)
        assert chosen[:3] == entry.tiles
    assert tiles.choose("v6e", 16, 4096, 4096).columns >= 256
    # Rows that are many are rotated apart, whatever K is.
    for k, n in ((17408, 5120), (25600, 5120), (28672, 8192), (2**21, 128)):
        assert tiles.choose("tpu7x", 1024, k, n).features
    with pytest.raises(ValueError, match="K 2097152 needs more than the 44 MiB of VMEM"):
        tiles.choose("tpu7x", 16, 2**21, 128)
    with pytest.raises(ValueError, match="no tiles for 'TPU v3'"):
        tiles.generation("TPU v3")
    assert tiles.generation("TPU v6 lite") == "v6e"
