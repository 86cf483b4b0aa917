"""The GPU kernels compiled to machine code for GPUs that are not attached, and what the code shows.

Pallas lowers to PTX for a described target, ``ptxas`` says registers, spills and shared memory, ``nvdisasm``, where
there is one, the instructions of the inner loop. Nothing runs. Needs Python 3.12, ``pip install
'torq-jax[gpu-compile]'`` and a CUDA toolkit's ptxas and libdevice. A process of its own for every call, because
Mosaic GPU takes one target a process and a compiler that gives up takes its process with it.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import portable
from pallas_kernels.tiles import GPU, GPUS

PATIENCE = 150
"""Seconds that a compilation may take."""


class Target(NamedTuple):
    """A GPU: what its compiler must know, and what bounds a kernel on it, by its vendor's data sheet."""

    name: str
    capability: tuple[int, int]
    accelerated: bool
    """Whether its code is for this capability alone, as wgmma and tcgen05 need."""
    memory: int
    """Bytes."""
    cores: int
    shared: int
    bandwidth: float
    clock: float
    multiply_adds: int
    """These as in :class:`pallas_kernels.tiles.GPU`."""

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}{'a' if self.accelerated else ''}"


TARGETS = {
    "a100": Target(
        *("NVIDIA A100-SXM4-80GB", (8, 0), False, 80 << 30), *GPU(108, 166912, 2.04e12, 1.41e9, 1024)
    ),
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), True, 80 << 30, *GPUS["hopper"]),
    "b200": Target("NVIDIA B200", (10, 0), True, 180 << 30, *GPUS["blackwell"]),
    "rtx6000": Target(
        *("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), False, 96 << 30),
        *GPU(188, 101376, 1.6e12, 2.45e9, 512),
    ),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What to compile."""

    operation: str
    """'portable', 'rotate' (the portable kernel of the activations; its scales swizzled on b200), 'hopper',
    'hopper_e4m3' or 'blackwell'."""
    target: str
    m: int
    k: int
    n: int
    inter: tuple[int, ...] | None = None
    intra: tuple[int, ...] | None = None
    rule: str | None = "even"


KERNELS = {
    "portable": "torq_portable_matmul",
    "rotate": "torq_portable_rotate",
    "hopper": "torq_hopper_matmul",
    "hopper_e4m3": "torq_hopper_e4m3_matmul",
    "blackwell": "torq_blackwell_matmul",
}
"""The kernel that is looked at, by operation."""

EXPECTED = {
    "portable": "HMMA",
    "rotate": "HMMA",
    "hopper": "HGMMA",
    "hopper_e4m3": "QGMMA",
    "blackwell": "UTCOMMA",
}
"""The tensor core's instruction in machine code. On sm_90a Triton makes wgmma of the portable product, too."""

PTX = {
    "portable": r"mma\.sync|wgmma",
    "rotate": r"mma\.sync|wgmma",
    "hopper": "wgmma",
    "hopper_e4m3": r"wgmma\.mma_async\S*e4m3\.e4m3",
    "blackwell": r"tcgen05\.mma",
}
"""And in PTX."""


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if sys.version_info < (3, 12):
        return "the GPU compilers need jax 0.12, which needs Python 3.12"
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "jax-cuda13-plugin is missing: pip install 'torq-jax[gpu-compile]'"
    if shutil.which("ptxas") is None:
        return "ptxas is missing: install a CUDA toolkit and put its bin folder on the PATH"
    return None


def disassembler() -> str | None:
    """Path of nvdisasm: on the PATH, or of the package nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm")
    if found is None:
        for folder in sys.path:
            for name in glob.glob(f"{folder}/nvidia/*/bin/nvdisasm"):
                return name
    return found


def compile_call(call: Call) -> dict[str, Any]:
    """Compile in a process of its own.

    Returns:
      Registers, spilled and stack bytes, shared bytes, ``tensor_ptx`` (tensor instructions in PTX), tiles, seconds,
      and what :func:`_code` finds in machine code. Or an ``error``.
    """
    reason = missing()
    if reason is not None:
        raise SystemExit(reason)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
        }
        command = [sys.executable, "-m", "benchmarks.gpu_compiler"]
        text = json.dumps(dataclasses.asdict(call))
        try:
            ran = subprocess.run(
                command, input=text, capture_output=True, env=environment, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return {"error": f"the compiler took more than {PATIENCE} s"}
        said = [line for line in ran.stdout.splitlines() if line.startswith("{")]
        if not said:
            return {
                "error": " ".join(ran.stderr.split())[-300:] or f"the compiler ended with {ran.returncode}"
            }
        result = json.loads(said[-1])
        if "error" not in result:
            result |= _inspect(call, Path(folder))
    return result | {"seconds": round(time.monotonic() - begun, 1)}


_TENSOR = r"HGMMA|QGMMA|HMMA|UTC\w*MMA|QMMA|OMMA"


def _inspect(call: Call, folder: Path) -> dict[str, Any]:
    kernel, target = KERNELS[call.operation], TARGETS[call.target]
    for path in folder.glob("*.ptx"):
        ptx = path.read_text()
        if re.search(rf"\.entry {kernel}", ptx):
            break
    else:
        return {"error": f"no PTX of {kernel} was written"}
    cubin = folder / "kernel.cubin"
    ran = subprocess.run(
        ["ptxas", "-v", f"-arch={target.architecture}", str(path), "-o", str(cubin)],
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        return {"error": " ".join(ran.stderr.split())[-300:]}

    def number(pattern: str, source: str) -> int | None:
        found = re.search(pattern, source)
        return int(found.group(1)) if found else None

    log = ran.stderr + ran.stdout
    shared = None
    for dumped in (*folder.glob(f"{kernel}*.resources.txt"), *folder.glob(f"*{kernel}*.triton-to-llvm.txt")):
        shared = number(r"(?:smem_scratch_bytes=|ttg\.shared = )(\d+)", dumped.read_text())
    return {
        "registers": number(r"Used (\d+) registers", log),
        "spill_stores": number(r"(\d+) bytes spill stores", log),
        "spill_loads": number(r"(\d+) bytes spill loads", log),
        "stack": number(r"(\d+) bytes stack frame", log),
        "shared": shared,
        "serialized": "wgmma" in log and "serialized" in log,
        "tensor_ptx": len(re.findall(PTX[call.operation], ptx)),
        **_code(cubin),
    }


def _code(cubin: Path) -> dict[str, Any]:
    """``loop``: instructions of the shortest loop around a tensor instruction, by name; None without nvdisasm.

    ``instructions``: of the whole kernel. ``loops``: of each loop, and whether a tensor instruction is in it.
    """
    tool = disassembler()
    if tool is None:
        return {"loop": None, "instructions": None, "loops": None}
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True).stdout
    labels: dict[str, int] = {}
    names: list[str] = []
    bodies: list[list[str]] = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x?_?\d+):", line)
        if label:
            labels[label.group(1)] = len(names)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)", line)
        if not found:
            continue
        names.append(found.group(1))
        back = re.search(r"`?\(?(\.L_x?_?\d+)", line) if found.group(1) == "BRA" else None
        if back and back.group(1) in labels:
            bodies.append(names[labels[back.group(1)] :])
    with_tensor = [any(re.match(_TENSOR, name) for name in body) for body in bodies]
    around = [body for body, tensor in zip(bodies, with_tensor, strict=True) if tensor]
    loop = collections.Counter(min(around, key=len)).most_common() if around else None
    # A jump to itself, behind the end, is no loop.
    loops = [[len(body), tensor] for body, tensor in zip(bodies, with_tensor, strict=True) if len(body) > 1]
    return {"loop": None if loop is None else dict(loop), "instructions": len(names), "loops": loops}


def rotation_shapes(k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A rotation of the default method's kind: groups of 16 blocks by position, a matrix for each block."""
    blocks = k // 32
    return (32, blocks // 16, 16, 16), (blocks, 32, 32)


def bounds(call: Call, result: dict[str, Any]) -> dict[str, float]:
    """Microseconds that a call takes at least: for its bytes, its multiply-adds, its other instructions.

    ``memory_us``: all bytes once. ``tensor_us``: multiply-adds of whole tiles at the peak rate. ``issue_us``, where
    threads decode: the inner loop's instructions, one a cycle for each of a multiprocessor's four schedulers.
    ``tile_bytes``: what the tiles load, most of it from the L2 cache.
    """
    target = TARGETS[call.target]
    if call.operation == "rotate":
        matrices = sum(math.prod(shape) for shape in (call.inter, call.intra) if shape is not None)
        moved = call.m * call.k * (2 + 4.25 / 8) + 2 * matrices
        made = {"bytes": moved, "memory_us": moved / target.bandwidth * 1e6}
        if result.get("loops") is not None:
            made["issue_us"] = _rotate_cycles(call, result) / target.clock * 1e6
        return made
    weight = call.k * call.n * 4.25 / 8
    x_bits = {"blackwell": 4.25, "hopper_e4m3": 8}.get(call.operation, 16)
    # e4m3 goes at twice bfloat16's rate.
    rate = target.multiply_adds * (2 if call.operation == "hopper_e4m3" else 1)
    moved = weight + call.m * call.k * x_bits / 8 + 2 * call.m * call.n
    made = {
        "bytes": moved,
        "memory_us": moved / target.bandwidth * 1e6,
        "tensor_us": call.m * call.k * call.n / rate / target.cores / target.clock * 1e6,
    }
    tiles = result.get("tiles")
    if tiles is None:
        return made
    rows, columns, depth, splits = tiles
    tiles_m, tiles_n = math.ceil(call.m / rows), math.ceil(call.n / columns)
    made["tile_bytes"] = tiles_m * tiles_n * call.k * (rows * x_bits + columns * 4.25) / 8
    # Whole tiles, in rounds of as many as there are multiprocessors.
    rounds = math.ceil(tiles_m * tiles_n * splits / target.cores) / splits
    made["tensor_us"] = rounds * rows * columns * call.k / rate / target.clock * 1e6
    if call.operation != "blackwell" and result.get("loop"):
        warps, schedulers = 4 if call.operation == "portable" else 8, 4
        steps = rounds * call.k / depth
        made["issue_us"] = steps * sum(result["loop"].values()) * warps / schedulers / target.clock * 1e6
    return made


def _rotate_cycles(call: Call, result: dict[str, Any]) -> float:
    """Cycles of the activations' kernel, for instructions alone: a program's blocks, and in each the group's in
    eights, one instruction a cycle and scheduler."""
    target, blocks, row_tiles = TARGETS[call.target], call.k // 32, math.ceil(call.m / 16)
    group = call.inter[-1] if call.inter is not None else 1
    count = portable.blocks_of_program(row_tiles, blocks, group)
    block_loop = sum(length for length, tensor in result["loops"] if tensor)
    mixing_loop = sum(length for length, tensor in result["loops"] if not tensor)
    executed = result["instructions"] + (count - 1) * block_loop
    executed += count * max(0, group // 8 - 1) * mixing_loop
    warps = row_tiles * blocks // count * portable.activation_warps(row_tiles, blocks)
    return math.ceil(warps / (4 * target.cores)) * executed


# ---------------------------------------------------------------- the child


def _description(target: Target) -> str:
    """A target as XLA reads it; limits of a block that all of them share are the architecture's."""
    major, minor = target.capability
    feature = "ACCELERATED_FEATURES" if target.accelerated else "NONE"
    threads = 1536 if major == 12 else 2048
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {target.shared + 1024} threads_per_core_limit: {threads} core_count: {target.cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(target.bandwidth)} l2_cache_size: 52428800 clock_rate_ghz: {target.clock / 1e9}
  device_memory_size: {target.memory} shared_memory_per_block_optin: {target.shared}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 name: "{target.name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{target.name}"
"""


def _compile(call: Call) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

    from pallas_kernels import blackwell, hopper, layout

    target = TARGETS[call.target]
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=_description(target), topology="1x1x1"
    )
    device = topology.devices[0]

    class Device(AbstractDevice):
        """Mosaic GPU asks for this, and takes sm_90 where there is none."""

        compute_capability = f"{target.capability[0]}.{target.capability[1]}"

    def shape(sizes: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    m, k, n = call.m, call.k, call.n
    x = shape((m, k), jnp.bfloat16)
    matrices = [None if s is None else shape(s, jnp.float32) for s in (call.inter, call.intra)]
    codes, scales = shape((n, k // 2), jnp.uint8), shape((n, k // 32), jnp.uint8)
    tiles: Any = None
    function: Any
    if call.operation == "portable":
        function = lambda *a: portable.rotate_quantize_matmul(*a, rule=call.rule)  # noqa: E731
        given = [x, *matrices, codes, scales]
        chosen = portable.Tiles()
        tiles = [min(chosen.rows, max(16, m)), chosen.columns, chosen.depth, 1]
    elif call.operation == "rotate":
        rotate = portable.rotate_quantize_swizzled if call.target == "b200" else portable.rotate_quantize
        function = lambda *a: rotate(*a, rule=call.rule)  # noqa: E731
        given = [x, *matrices]
    elif call.operation in ("hopper", "hopper_e4m3"):
        e4m3 = call.operation == "hopper_e4m3"
        weight = jax.eval_shape(layout.to_hopper_e4m3 if e4m3 else layout.to_hopper, codes, scales)
        given = [x, *(shape(a.shape, a.dtype) for a in weight)]
        if e4m3:
            given = [shape((m, k), jnp.float8_e4m3fn), shape((m,), jnp.float32), *given[1:]]

            def function(values: Any, factor: Any, *w: Any) -> Any:
                rows = hopper.E4M3Rows(values, factor)
                return hopper.matmul_e4m3(rows, layout.HopperE4M3Weight(*w))

        else:
            function = lambda x, *w: hopper.matmul(x, layout.HopperWeight(*w))  # noqa: E731
        picked = hopper.choose(m, k, n, target.cores, e4m3=e4m3)
        tiles = [picked.tokens, layout.HOPPER_ROWS, layout.HOPPER_STEP, picked.splits]
    elif call.operation == "blackwell":
        rows = shape((m, k // 2), jnp.uint8), shape((m, k // 32), jnp.uint8)
        pair = [jax.eval_shape(layout.to_blackwell, *a) for a in (rows, (codes, scales))]
        given = [shape(a.shape, a.dtype) for operand in pair for a in operand]

        def function(*a: Any) -> Any:
            return blackwell.matmul(layout.BlackwellOperand(*a[:2]), layout.BlackwellOperand(*a[2:]))

        wide = blackwell.choose(given[0].shape[0], k, n, target.cores)
        tiles = [layout.BLACKWELL_ROWS, wide.columns, layout.BLACKWELL_STEP, wide.splits]
    else:
        raise ValueError(f"unknown operation {call.operation!r}")
    described = Device(device_kind=target.name, num_cores=target.cores, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))
    lowered.compile()
    return {"tiles": tiles}


def main() -> int:
    """The child: a call as JSON on its input, a line of JSON on its output."""
    given = json.loads(sys.stdin.read())
    call = Call(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    try:
        result = _compile(call)
    except Exception as error:  # whatever the compiler says is the result of this call
        result = {"error": " ".join(str(error).split())[:300]}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
