"""Quantising and dequantising on a CPU beside other libraries: GB/s of the float32 array, all in one run.

python -m benchmarks.codec --peers PYTHON [--microxcaling FOLDER]

PYTHON is the interpreter of an environment with torch, torchao and qwix; FOLDER a clone of microxcaling, which is on
no package index. The contestants take turns, one call each a round, so that all see the same machine; the figures are
medians, and the ratios medians over the rounds of the ratio within a round. A peer's values are compared with ours
under the same scale rule, element by element.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import torq_jax
from benchmarks.machine import describe
from convert.progress import progress
from tests import oracle

OPERATIONS = ("quantize", "dequantize", "both", "copy")
PEERS = (("torchao", "floor"), ("torchao", "even"), ("microxcaling", "floor"), ("qwix", "ceil"))
RULES = ("floor", "even", "ceil", "mse")
ORACLE_ROWS = 64
"""Of the array, as many as the oracle is given: it takes minutes for all, and its time is linear in them."""


def ours(x: np.ndarray, rule: str) -> dict[str, Callable[[], Any]]:
    """Our calls, each of which returns when the result is there."""
    given = jax.numpy.asarray(x)
    packed = torq_jax.quantize(given, rule)
    copy = jax.jit(jax.numpy.copy)
    calls = {
        "quantize": lambda: torq_jax.quantize(given, rule),
        "dequantize": lambda: torq_jax.dequantize(packed),
        "both": lambda: torq_jax.quantize_dequantize(given, rule),
        "copy": lambda: copy(given),
    }
    return {name: lambda call=call: jax.block_until_ready(call()) for name, call in calls.items()}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Peers:
    """The other environment, which answers one request at a time and is idle between them."""

    def __init__(self, python: str, folder: Path | None):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        if folder is not None:
            environment["PYTHONPATH"] = str(folder)
        script = Path(__file__).with_name("codec_peers.py")
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("error: the peers' process ended; its message is above")
            if line.startswith("{"):  # not what a library prints
                return json.loads(line)


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", required=True, metavar="PYTHON")
    parser.add_argument("--microxcaling", type=Path, metavar="FOLDER")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "codec.json")
    options = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((options.size, options.size), np.float32)
    calls: dict[str, Callable[[], float]] = {"numpy copy": lambda: seconds(x.copy)}
    for rule in RULES:
        for name, call in ours(x, rule).items():
            if name != "copy" or rule == RULES[0]:
                calls["jax copy" if name == "copy" else f"torq-jax {rule} {name}"] = lambda c=call: seconds(c)
    agreement, missing = {}, {}
    peers = Peers(options.peers, options.microxcaling)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x)
        about = peers.ask(do="prepare", array=f"{folder}/x.npy")
        for peer, rule in PEERS:
            answer = peers.ask(do="add", peer=peer, rule=rule, values=f"{folder}/values.npy")
            if "error" in answer:
                missing[f"{peer} {rule}"] = answer["error"]
                continue
            same = np.load(f"{folder}/values.npy") == np.asarray(torq_jax.quantize_dequantize(x, rule))
            agreement[f"{peer} {rule}"] = float(same.mean())
            for name in answer["operations"]:
                if name != "copy" or rule == RULES[0]:
                    key = "torch copy" if name == "copy" else f"{peer} {rule} {name}"
                    what = f"{peer} {rule} {name}"
                    calls[key] = lambda w=what: peers.ask(do="time", what=w)["seconds"]
    small = x[:ORACLE_ROWS]
    values = oracle.quantize(small, "floor").values
    agreement["numpy oracle floor"] = float(
        (values == np.asarray(torq_jax.quantize_dequantize(small, "floor"))).mean()
    )
    times: dict[str, list[float]] = {name: [] for name in calls}
    oracle_times = []
    with progress(options.rounds, "codec", unit="round") as shown:
        for turn in range(options.rounds + 1):
            for name, call in calls.items():
                taken = call()
                if turn:  # the first is a warm-up
                    times[name].append(taken)
            if turn:
                oracle_times.append(seconds(lambda: oracle.quantize(small, "floor")))
                shown.advance()
    times["numpy oracle floor both"] = [t * options.size / ORACLE_ROWS for t in oracle_times]
    print_table(times, x.nbytes, agreement)
    for name, why in missing.items():
        print(f"{name}: {why}")
    result = {
        "machine": describe() | {"jax_threads": os.cpu_count(), **about},
        "array": {"shape": list(x.shape), "dtype": "float32", "bytes": x.nbytes},
        "rounds": options.rounds,
        "milliseconds": {
            name: {"median": 1e3 * statistics.median(t), "least": 1e3 * min(t)} for name, t in times.items()
        },
        "ratios": ratios(times),
        "agreement": agreement,
        "missing": missing,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    """Median of first over second within a round."""
    return statistics.median(a / b for a, b in zip(times[first], times[second], strict=True))


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """What is claimed of quantising and dequantising in one go."""
    own = "torq-jax floor both"
    peers = [n for n in times if n.endswith(" both") and not n.startswith(("torq-jax", "numpy"))]
    fastest = min(peers, key=lambda n: statistics.median(times[n]))
    same_rule = f"torq-jax {fastest.split()[1]} both"
    return {
        f"{fastest} / {same_rule}": ratio(times, fastest, same_rule),
        **{f"{own} / {copy}": ratio(times, own, copy) for copy in times if copy.endswith("copy")},
    }


def print_table(times: dict[str, list[float]], nbytes: int, agreement: dict[str, float]) -> None:
    rows: dict[str, dict[str, float]] = {}
    for name, taken in times.items():
        who, _, operation = name.rpartition(" ")
        rows.setdefault(who, {})[operation] = statistics.median(taken)
    print(f"{'GB/s of float32 (ms)':24s}" + "".join(f"{o:>20s}" for o in OPERATIONS) + f"{'equal ours':>14s}")
    for who, found in rows.items():
        cells = (
            f"{nbytes / found[o] / 1e9:.2f} ({found[o] * 1e3:.0f})" if o in found else "–" for o in OPERATIONS
        )
        same = f"{100 * agreement[who]:.4f} %" if who in agreement else ""
        print(f"{who:24s}" + "".join(f"{cell:>20s}" for cell in cells) + f"{same:>14s}")
    for name, value in ratios(times).items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
