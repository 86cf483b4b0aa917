"""Simulated cycles of kernels on TPUs that are not attached: libtpu compiles, and its static profile is read.

The estimate is the compiler's own: bundles times trips, waits for the matrix units and for copies. Nothing
runs. Needs ``pip install 'torq-jax[tpu]'``; a process of its own for every batch of calls, because a compiler
that gives up takes its process with it, and one process at a time, because libtpu takes no more.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, SingleDeviceSharding

from benchmarks.machine import describe
from convert.progress import progress
from pallas_kernels import layout, tiles, tpu

PATIENCE = 120
"""Seconds that a compilation may take."""

_UNASSIGNED = "unassigned"
"""The error of a program whose kernels were profiled, but which had no room in VMEM with the profiler at work."""

_DUMPED = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Call:
    """What to compile: an operation, a generation and its shapes."""

    operation: str
    """'fused', 'rotate_quantize', 'xla_bf16', 'pallas_bf16' or 'qwix_int8'."""
    generation: str
    m: int
    k: int
    n: int
    inter: tuple[int, ...] | None = None
    intra: tuple[int, ...] | None = None
    rule: str | None = "even"
    tiles: tuple[int, ...] | None = None
    """As :func:`pallas_kernels.tiles.make` takes them; None for what the kernels would choose."""


def simulate(
    calls: Iterable[Call],
    shown: Callable[[Call, dict[str, Any]], None] | None = None,
    *,
    profile: bool = True,
) -> list[dict[str, Any]]:
    """``{"cycles": ..., "slots": ...}`` or ``{"error": ...}`` of each call, in order; for slots see :func:`slots`.

    Without ``profile`` the calls are compiled only, to ``{"compiled": True}``: libtpu's profiler gives up on some
    programs that its compiler takes.

    Raises:
      SystemExit: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("libtpu is not installed: pip install 'torq-jax[tpu]'")
    left, done = list(calls), []
    what = "the compiler or its profiler" if profile else "the compiler"
    ended = {"error": f"{what} gave up, or took more than {PATIENCE} s"}

    def kept(call: Call, result: dict[str, Any]) -> dict[str, Any]:
        if (error := result.pop(_UNASSIGNED, None)) is None:
            return result
        # With the profiler at work XLA keeps more of a program in VMEM: the cycles count if it compiles without.
        [plain] = simulate([call], profile=False)
        return result | {"compiled_without_profiler": True} if "compiled" in plain else {"error": error}

    while left:
        for result in itertools.chain(_child(left.copy(), profile), [ended]):
            if left:  # else the child has answered for all
                call = left.pop(0)
                done.append(kept(call, result))
                if shown:
                    shown(call, done[-1])
    return done


def resume(path: Path, calls: dict[str, Call], *, retry: bool) -> dict[str, Any]:
    """The results in a JSON, with those that it lacked; written after each.

    Args:
      path: of the JSON, which need not exist.
      calls: by the keys that they have in it.
      retry: simulate again what failed.
    """
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"calls": {}}
    had = result["calls"]
    missing = {k: c for k, c in calls.items() if k not in had or (retry and "cycles" not in had[k])}
    keys, machine = iter(missing), describe()
    with progress(len(missing), "simulating", unit="call") as shown:

        def keep(_: Call, found: dict[str, Any]) -> None:
            had[next(keys)] = found
            result["machine"] = machine
            path.write_text(json.dumps(result, indent=0) + "\n")
            shown.advance()

        simulate(missing.values(), keep)
    return result


def prepared(k: int, inter: tuple[int, ...] | None, intra: tuple[int, ...] | None) -> tpu.TPURotation:
    """Shapes of a rotation in the kernels' layout."""
    matrices = [None if s is None else jax.ShapeDtypeStruct(s, jnp.float32) for s in (inter, intra)]
    return jax.eval_shape(lambda a, b: tpu.prepare_rotation(a, b, k), *matrices)


def _child(calls: list[Call], profile: bool) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        dump = (
            f"--xla_jf_dump_static_llo_profile_to={folder} --xla_jf_dump_to={folder} {_DUMPED} "
            if profile
            else ""
        )
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"{dump}--xla_tpu_check_llo_types=false",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a program may be compiled without the profiler meanwhile
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "JAX_PLATFORMS": "cpu",
            "TPU_STDERR_LOG_LEVEL": "3",
        }
        text = json.dumps([dataclasses.asdict(call) for call in calls])
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tpu_simulator", *([folder] if profile else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        assert process.stdin and process.stdout
        process.stdin.write(text)
        process.stdin.close()
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith("{"):
                timer.cancel()
                yield json.loads(line)
                timer = threading.Timer(PATIENCE, process.kill)
                timer.start()
        timer.cancel()
        process.wait()


def _compile(call: Call) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[call.generation])
    sharding = SingleDeviceSharding(topology.devices[0])
    function, shapes = _operation(call)
    given = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    mesh = Mesh(np.array([topology.devices[0]]), ("d",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*given)
    lowered.compile()


def _operation(call: Call) -> tuple[Callable[..., Any], list[Any]]:
    shape, narrow = jax.ShapeDtypeStruct, jnp.bfloat16
    m, k, n = call.m, call.k, call.n
    x = shape((m, k), narrow)
    if call.operation == "xla_bf16":
        plain = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32).astype(narrow)  # noqa: E731
        return plain, [x, shape((k, n), narrow)]
    if call.operation == "qwix_int8":
        return _qwix_int8(call)
    if call.operation == "pallas_bf16":
        return _pallas_bf16(call), [x, shape((k, n), narrow)]
    rotation = prepared(k, call.inter, call.intra)
    given = [matrix for matrix in rotation if matrix is not None]

    def back(rest: tuple[Any, ...]) -> tpu.TPURotation:
        parts = iter(rest)
        return tpu.TPURotation(*(None if matrix is None else next(parts) for matrix in rotation))

    properties = tiles.GENERATIONS[call.generation]
    common: dict[str, Any] = {"rule": call.rule, "vmem_limit": properties.vmem}
    if call.operation == "rotate_quantize":
        return lambda x, *rest: tpu.rotate_quantize(x, back(rest), **common), [x, *given]
    if call.operation != "fused":
        raise ValueError(f"unknown operation {call.operation!r}")
    chosen = (
        tiles.choose(call.generation, m, k, n, rotation=rotation)
        if call.tiles is None
        else tiles.held_tiles(
            call.generation, tiles.make(call.generation, *call.tiles), m, k, n, rotation=rotation
        )
    )

    def fused(x: Any, words: Any, exponents: Any, factor: Any, *rest: Any) -> Any:
        weight = layout.TPUWeight(words, exponents, factor)
        x = x + x  # in a model something precedes the call, and leaves its result in VMEM
        common["vmem_limit"] = tiles.limit(call.generation, chosen)
        return tpu.rotate_quantize_matmul(x, weight, back(rest), tiles=chosen, kind=properties.kind, **common)

    full_k, full_n = layout.padded(k), layout.padded(n)
    packed = [shape((full_k // 8, full_n), jnp.int32), shape((full_k // 32, full_n), jnp.uint8)]
    return fused, [x, *packed, shape((1, full_n), jnp.float32), *given]


def _qwix_int8(call: Call) -> tuple[Callable[..., Any], list[Any]]:
    """qwix's kernel that rounds the activations to int8 as it multiplies, in its own tiles; one scale a tile.

    Of float32 activations: with bfloat16 ones Mosaic refuses its largest value of a tile.
    """
    from qwix.contrib.kernels import lhs_fused_quantized_matmul as kernels
    from qwix.contrib.kernels.quantized_matmul import QuantizedMatmulConfig

    sizes = QuantizedMatmulConfig()
    m, k, n = call.m, call.k, call.n
    bm, bk, bn = min(m, sizes.bm), min(k, sizes.bk), min(n, sizes.bn)

    def run(x: Any, w: Any, scales: Any) -> Any:
        return kernels.lhs_fused_quantized_matmul(x, w, scales, bm=bm, bk=bk, bn=bn, sm=m // bm)

    shape = jax.ShapeDtypeStruct
    return run, [
        shape((m, k), jnp.float32),
        shape((k, n), jnp.int8),
        shape((k // bk, n // bn), jnp.float32),
    ]


def _pallas_bf16(call: Call) -> Callable[..., Any]:
    width = 512 if call.k <= 8192 else 256

    def kernel(x_ref: Any, w_ref: Any, out_ref: Any) -> None:
        product = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)
        out_ref[...] = product.astype(out_ref.dtype)

    def run(x: Any, w: Any) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((call.m, call.n), x.dtype),
            grid=(pl.cdiv(call.n, width),),
            in_specs=[
                pl.BlockSpec((call.m, call.k), lambda n: (0, 0)),
                pl.BlockSpec((call.k, width), lambda n: (0, n)),
            ],
            out_specs=pl.BlockSpec((call.m, width), lambda n: (0, n)),
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiles.GENERATIONS[call.generation].vmem),
        )(x, w)

    return run


def _counts(operation: str) -> bool:
    """Whether an operation's cycles are the call's, not those of what precedes it."""
    return not operation.startswith("add")


def _taken(kernels: dict[str, Any]) -> dict[str, Any]:
    """Of the two ways that activations may take on tpu7x, that of those which fit float8."""
    narrow = any("_float8" in kernel for kernel in kernels)
    return {k: v for k, v in kernels.items() if not (narrow and k.startswith("torq_") and "_float8" not in k)}


def _cycles(folder: Path) -> int | None:
    found = {}
    for name in folder.glob("*.textproto"):
        each = re.findall(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)', name.read_text())
        found.update({kernel: int(cycles) for kernel, cycles in each if _counts(kernel)})
    found = _taken(found)
    if 0 in found.values():  # the profile gave this kernel up, and says so in no other way
        return None
    return sum(found.values()) or None


def slots(folder: Path) -> dict[str, dict[str, float]]:
    """How full each kernel's longest loop is, or the whole kernel where it has none.

    Returns:
      By kernel ``{"bundles": number of instructions of the loop, "MXU": used parts of the slots of a kind, ...}``,
      kinds that are used only. VALU are the vector units' operations, VLOAD and VSTORE their memory's.
    """
    found = {}
    for used in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
        kernel = re.sub(r"^\d+-|-\d+-final_hlo.*$", "", used.name)
        listing = glob.glob(f"{folder}/*-{glob.escape(kernel)}-[0-9][0-9]-final_bundles.txt")
        # <late-...> and TLP are the program around the kernels.
        if not listing or not _counts(kernel) or kernel.startswith(("<", "TLP")):
            continue
        _, names, capacity, _, *lines = used.read_text().splitlines()
        counts = np.array([line.split() for line in lines if line.strip()], int)
        loops = re.findall(
            r"^ *(?:0x[0-9a-f]+|0) *(?:[A-Z]{2})? *: *(>*)", Path(listing[-1]).read_text(), re.M
        )
        inside = np.flatnonzero([bool(loop) for loop in loops[: len(counts)]])
        runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
        longest = max(runs, key=len)
        chosen = counts[longest] if len(longest) else counts
        parts = chosen.mean(0) / np.array(capacity.split(), int)
        named = zip(names.split(", "), parts.tolist(), strict=True)
        found[kernel] = {"bundles": len(chosen)} | {name: round(part, 3) for name, part in named if part}
    ours = {k: v for k, v in _taken(found).items() if k.startswith("torq_")}
    return ours or found


def _profiled(folder: Path) -> dict[str, Any]:
    cycles = _cycles(folder)
    return {"cycles": cycles, "slots": slots(folder)} if cycles else {}


def main() -> int:
    """The child: calls as JSON on its input, a line of JSON for each on its output; profiles go to a given folder."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    for given in json.loads(sys.stdin.read()):
        call = Call(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        for file in folder.iterdir() if folder else ():
            file.unlink()
        begun = time.monotonic()
        result: dict[str, Any]
        try:
            _compile(call)
            result = _profiled(folder) if folder else {"compiled": True}
            result = result or {"error": "no profile was written, or none of a kernel"}
        except Exception as error:  # whatever the compiler says is the result of this call
            said = " ".join(str(error).split())[:300]
            known = _profiled(folder) if folder and "RESOURCE_EXHAUSTED" in said else {}
            result = known | {_UNASSIGNED: said} if known else {"error": said}
        print(json.dumps(result | {"seconds": round(time.monotonic() - begun, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
