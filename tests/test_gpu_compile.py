"""The GPU kernels compile to machine code for GPUs that are not attached, each in a process of its own."""

import pytest

from benchmarks import gpu_compiler
from benchmarks.gpu_compiler import Call

REASON = gpu_compiler.missing()
ROTATION = ((32, 2, 16, 16), (32, 32, 32))

CALLS = [
    Call("hopper", "h100", 16, 1024, 1024),
    Call("hopper", "h100", 256, 1024, 1024),
    Call("hopper_e4m3", "h100", 256, 2048, 4096),
    Call("blackwell", "b200", 16, 1024, 1024),
    Call("blackwell", "b200", 1024, 1024, 8192),
    Call("portable", "a100", 16, 512, 256, rule=None),
    Call("rotate", "rtx6000", 64, 1024, 1024, *ROTATION),
]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.operation}-{call.target}-{call.m}")
def test_compiles_without_spills(call):
    result = gpu_compiler.compile_call(call)
    assert "error" not in result, result["error"]
    assert result["spill_stores"] == result["spill_loads"] == result["stack"] == 0, result
    assert result["registers"] <= 255 and not result["serialized"], result
    assert result["shared"] is not None and result["shared"] <= gpu_compiler.TARGETS[call.target].shared, (
        result
    )
    assert result["tensor_ptx"] > 0, result
    if result["loop"] is not None:
        assert gpu_compiler.EXPECTED[call.operation] in result["loop"], result["loop"]


def test_what_is_missing_is_said():
    assert REASON is None or any(word in REASON for word in ("Python 3.12", "jax-cuda13-plugin", "ptxas"))


def test_bounds_count_whole_tiles():
    call = Call("hopper", "h100", 16, 4096, 4096)
    found = gpu_compiler.bounds(call, {"tiles": [16, 128, 256, 4], "loop": {"HGMMA": 16, "LOP3": 353}})
    assert found["memory_us"] == pytest.approx((4096**2 * 4.25 / 8 + 4 * 16 * 4096) / 3.35e6)
    # 128 tiles on 132 multiprocessors: a round of a quarter of K, 4 steps of 369 instructions of 8 warps, 4 at once.
    assert found["issue_us"] == pytest.approx(4 * 369 * 8 / 4 / 1.83e3)
    assert found["tensor_us"] == pytest.approx(16 * 128 * 1024 / 2048 / 1.83e3)
