"""Kernels compiled for GPUs that are not attached: registers, spills and shared memory of each, as ptxas counts them.

XLA's CUDA plugin lowers and compiles for a description of a GPU, in a process of its own for each; the PTX that it
leaves behind goes through ``ptxas -v`` once more, for the figures. Nothing runs, and there is no estimate of time.
Needs Python 3.12, ``pip install 'torq-jax[gpu-compile]'`` and an installed CUDA toolkit.

``python -m benchmarks.gpu_compiler`` compiles everything and prints a table.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels import portable

PATIENCE = 600
"""Seconds that a target may take."""


class Target(NamedTuple):
    """What XLA and Triton have to know of a GPU; from NVIDIA's data sheets and CUDA's device queries."""

    name: str
    major: int
    cores: int
    shared_memory: int
    """Bytes of shared memory that a block may ask for."""
    shared_memory_core: int
    threads_core: int
    l2: int
    memory: int
    bandwidth: int
    """Bytes a second."""


TARGETS = {
    "sm_90a": Target(
        "NVIDIA H100 80GB HBM3", 9, 132, 232448, 233472, 2048, 52428800, 84942979072, 3352320000000
    ),
    "sm_100a": Target("NVIDIA B200", 10, 148, 232448, 233472, 2048, 132644864, 191514411008, 7672320000000),
    "sm_120a": Target(
        "NVIDIA RTX PRO 6000 Blackwell", 12, 188, 101376, 131072, 1536, 134217728, 102625181696, 1792000000000
    ),
}


class Case(NamedTuple):
    """A product to compile, with its rotation."""

    rows: int
    k: int
    n: int
    dtype: str
    rule: str | None
    inter: tuple[int, ...] | None
    intra: tuple[int, ...] | None


CASES = {
    "few_rows": Case(1, 4096, 4096, "bfloat16", "even", (32, 8, 16, 16), (128, 32, 32)),
    "many_rows": Case(1024, 4096, 14336, "bfloat16", "even", (32, 8, 16, 16), (128, 32, 32)),
    "weights_only": Case(1024, 4096, 4096, "bfloat16", None, (128, 128), (32, 32)),
    "float32": Case(64, 4032, 1000, "float32", "ceil", (32, 14, 9, 9), (32, 32)),
}


def missing() -> str | None:
    """What this machine lacks to compile, and how to get it; None where nothing is missing."""
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)):
        return "XLA's CUDA plugin is missing: pip install 'torq-jax[gpu-compile]'"
    if jax.__version_info__ < (0, 12):
        return f"jax {jax.__version__} is too old to describe these GPUs: needs 0.12"
    if not _ptxas():
        return "ptxas is missing: install the CUDA toolkit and put its bin folder on PATH"
    return None


def compile_cases(target: str, cases: list[str]) -> list[dict[str, Any]]:
    """Each kernel of each case: ``case, kernel, registers, spills, shared, products``.

    spills: bytes of register spills, stores and loads together. shared: bytes of shared memory that the kernel asks
    for. products: the matrix instructions in its PTX.

    Raises:
      RuntimeError: a case does not compile, with the end of what the compiler said.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # which looks for a driver
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
        }
        command = [sys.executable, "-m", "benchmarks.gpu_compiler", target, *cases]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            raise RuntimeError(f"{target} does not compile: {done.stderr[-2000:]}")
        found = []
        for path in sorted(Path(folder).glob("*.ptx")):
            text = path.read_text()
            kernel = re.search(r"\.entry (\w+)", text)
            if kernel and kernel[1].startswith("torq_"):  # XLA makes others, for padding and transposition
                case = path.name.split(".")[1].removeprefix("jit_")
                shared = _shared_memory(Path(folder) / f"jit_{case}.{kernel[1]}.triton-to-llvm.txt")
                products = sorted(set(re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.", text)))
                found.append(
                    {"case": case, "kernel": kernel[1]}
                    | _resources(path, target)
                    | {"shared": shared, "products": products}
                )
        return found


def _ptxas() -> str | None:
    return shutil.which("ptxas", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def _resources(ptx: Path, target: str) -> dict[str, int]:
    program = _ptxas()
    assert program
    command = [program, "-v", f"-arch={target}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.findall(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    if not registers or not spills:
        raise RuntimeError(f"ptxas names no registers or no spills: {said[-500:]}")
    return {"registers": max(map(int, registers)), "spills": sum(map(int, spills))}


def _shared_memory(passes: Path) -> int | None:
    """From the last of Triton's passes: PTX does not have it, since it is asked for at launch."""
    found = re.findall(r"ttg\.shared = (\d+)", passes.read_text()) if passes.exists() else []
    return int(found[-1]) if found else None


def _description(target: Target) -> str:
    return f"""gpu_device_info {{
  name: "{target.name}"
  cuda_compute_capability {{ major: {target.major} minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: {target.cores} fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {target.threads_core}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {target.shared_memory}
  shared_memory_per_core: {target.shared_memory_core}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  l2_cache_size: {target.l2} device_memory_size: {target.memory} memory_bandwidth: {target.bandwidth}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{target.name}"
"""


def _compile(target: str, name: str) -> None:
    """Lower and compile a case in this process; XLA dumps what it makes."""
    case = CASES[name]
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=_description(TARGETS[target]),
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def shape(dims: tuple[int, ...] | None, dtype: Any) -> Any:
        return None if dims is None else jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def product(x: Any, codes: Any, scales: Any, inter: Any, intra: Any) -> Any:
        return portable.rotate_quantize_matmul(x, inter, intra, codes, scales, rule=case.rule)

    product.__name__ = name
    dtype = jnp.dtype(case.dtype)
    given = [
        shape((case.rows, case.k), dtype),
        shape((case.n, case.k // 2), jnp.uint8),
        shape((case.n, case.k // 32), jnp.uint8),
        shape(case.inter, dtype),
        shape(case.intra, dtype),
    ]
    # Pallas asks for a device when it lowers, not when it compiles.
    device = jax.sharding.AbstractDevice(
        device_kind=TARGETS[target].name, num_cores=TARGETS[target].cores, platform="gpu"
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(product).trace(*given).lower(lowering_platforms=("cuda",))
    lowered.compile()


def main() -> None:
    if len(sys.argv) > 1:
        for name in sys.argv[2:]:
            _compile(sys.argv[1], name)
        return
    reason = missing()
    if reason:
        raise SystemExit(reason)
    print("| target | case | kernel | registers | spilled bytes | shared memory | matrix instructions |")
    print("|---|---|---|---|---|---|---|")
    for target in TARGETS:
        for row in compile_cases(target, list(CASES)):
            row["products"] = ", ".join(row["products"]) or "none"
            print("| " + " | ".join(map(str, [target, *row.values()])) + " |", flush=True)


if __name__ == "__main__":
    main()
