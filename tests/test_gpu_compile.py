"""The portable kernels compile for every GPU named, with none attached: XLA's CUDA plugin in a process of its own."""

import pytest

from benchmarks import gpu_compiler


@pytest.mark.skipif(gpu_compiler.missing() is not None, reason=str(gpu_compiler.missing()))
@pytest.mark.parametrize(
    "target",
    ["sm_90a", *(pytest.param(t, marks=pytest.mark.slow) for t in gpu_compiler.TARGETS if t != "sm_90a")],
)
def test_compiles_without_spills(target):
    cases = ["many_rows", "float32"]
    found = gpu_compiler.compile_cases(target, cases)
    kernels = {(row["case"], row["kernel"]) for row in found}
    assert kernels == {
        (case, name) for case in cases for name in ("torq_portable_rotate", "torq_portable_matmul")
    }
    assert all(row["spills"] == 0 for row in found), found
    assert all(row["shared"] <= gpu_compiler.TARGETS[target].shared_memory for row in found), found
