"""benchmarks/gpu.py without a GPU: that it tells right from wrong, and that its times come out of real calls."""

import jax.numpy as jnp
import pytest

from benchmarks import gpu
from pallas_kernels import portable, reference
from torq_jax import mxfp4


def test_a_right_kernel_is_right_and_a_wrong_one_is_wrong(monkeypatch):
    case = gpu.CASES[0]
    assert gpu.check("portable", case, True)["right"]
    good = gpu.product
    monkeypatch.setattr(gpu, "product", lambda *a: good(*a) * jnp.asarray(1.02, jnp.bfloat16))
    found = gpu.check("portable", case, True)
    assert not found["right"] and found["products_wrong"] > 0 and found["codes_wrong"] == 0


def test_an_implementation_that_fails_is_reported(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(gpu, "product", broken)
    rows = gpu.check_all(["portable"], True)
    assert len(rows) == len(gpu.SMALL)
    assert all(not r["right"] and r["error"] == "no such instruction" for r in rows)


def test_times_are_those_of_the_calls(monkeypatch):
    def plain(name, x, inter, intra, weight, rule, interpret=False):
        z = reference.rotate(x, inter, intra)
        w = mxfp4.dequantize(mxfp4.MXFP4Array(*weight, x.shape[1], -1))
        return reference.multiply(z, w).astype(x.dtype)

    monkeypatch.setattr(gpu, "product", plain)
    monkeypatch.setattr(gpu, "CACHE", 1)
    monkeypatch.setattr(portable, "rotate_quantize", lambda x, a, b, rule: reference.rotate(x, a, b))
    found = gpu.time_shape("portable", 4, 512, 64, 0.01)
    for title in ("w4a4", "w4a4_rotated", "w4a16"):
        assert 0 < found[title]["least_us"] <= found[title]["us"] <= found[title]["greatest_us"]
        assert found[title]["times_faster"] == pytest.approx(found["xla_bf16"]["us"] / found[title]["us"])
    gpu.print_table([found], "a CPU", 1e9)


def test_implementations_by_capability():
    assert gpu.available((9, 0)) == ["hopper", "hopper_e4m3", "portable"]
    assert gpu.available((10, 0)) == ["blackwell", "portable"]
    assert gpu.available((12, 0)) == gpu.available((8, 9)) == ["portable"]
    assert gpu.copies(4096, 4096, 16, 4.25) == 16 and gpu.copies(14336, 4096, 2048, 16) == 2


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(
        SystemExit, match="no GPU: the backend is cpu; --interpret checks small shapes without one"
    ):
        gpu.main()
