"""Decode and prefill on a CPU beside Hugging Face transformers with torch, and beside the machine's own bounds.

    python -m benchmarks.cpu_speed --torch /path/to/other/environment/bin/python

SmolLM2-135M-Instruct in float32 on both sides, from the same GGUF, greedy; with ``--checkpoint DIR`` a converted
model besides. Both sides run in alternation, in processes of their own; of each the fastest and the median of
``--repeats`` are shown. torch runs with one thread and with one a core, and is compared by the faster; its OpenMP
threads sleep while they wait (``OMP_WAIT_POLICY=passive``): spinning ones lose much time on a machine that others
use, too.

Bounds: decoding reads every weight once a step, at the rate at which memory is copied (bytes read and written, by as
many threads as cores); a prefill multiplies, at the rate of a large float32 product in jax. A step's bound is the
larger of the two.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import torq_jax
from benchmarks.machine import describe
from benchmarks.parity import float_model
from convert import sources
from torq_jax.decoder import Decoder
from torq_jax.evaluate import read_text
from torq_jax.generate import Sampling, stream

PROMPT = 64
CASES = (("decode, batch 1", 1, PROMPT), ("decode, batch 8", 8, PROMPT), ("prefill, 512 tokens", 1, 512))
"""Name, rows, and tokens of each prompt."""
TARGET = 1.2
TEXT = "wikitext2_evaluation.txt"
CONVERTED = "ours, converted"
COPIED = 256 << 20
PRODUCT = 2048

Run = Callable[[list[list[int]], int], dict[str, Any]]


def ours(model: Decoder, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """As :func:`benchmarks.cpu_speed_torch.run`."""
    start = middle = time.perf_counter()
    last = {}
    for count, piece in enumerate(stream(model, prompts, Sampling(max_tokens=steps + 1)), 1):
        last[piece.row] = piece.token
        if count == len(prompts):
            middle = time.perf_counter()
    end = time.perf_counter()
    if count != len(prompts) * (steps + 1):
        raise RuntimeError(
            f"{count} tokens of {len(prompts) * (steps + 1)}: a row ended early; take another text"
        )
    return {
        "prefill": middle - start,
        "decode": end - middle,
        "tokens": [last[r] for r in range(len(prompts))],
    }


def theirs(python: Path, gguf: Path) -> tuple[subprocess.Popen[str], Callable[[int], Run], dict[str, str]]:
    """The process with torch, what runs there with so many threads, and its versions."""
    script = Path(__file__).with_name("cpu_speed_torch.py")
    process = subprocess.Popen(
        [python, script, gguf, "float32"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )

    def read() -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{python} {script} ended with {process.wait()}: run it by hand to see why")
        return json.loads(line)

    def with_threads(threads: int) -> Run:
        def run(prompts: list[list[int]], steps: int) -> dict[str, Any]:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"prompts": prompts, "steps": steps, "threads": threads}) + "\n")
            process.stdin.flush()
            return read()

        return run

    return process, with_threads, read()["ready"]


def copy_rate(threads: int) -> float:
    """Bytes a second, read and written, of copying arrays that no cache holds."""
    source = np.ones((threads, COPIED // threads), np.uint8)
    target = np.zeros_like(source)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(np.copyto, target, source))
        return 2 * source.nbytes / (time.perf_counter() - start)


def product_rate(x: jax.Array) -> float:
    """Operations a second of a square float32 product."""
    start = time.perf_counter()
    jnp.dot(x, x).block_until_ready()
    return 2 * len(x) ** 3 / (time.perf_counter() - start)


def bound(model: Decoder, rows: int, tokens: int, copied: float, multiplied: float) -> float:
    """Least seconds of a step over ``tokens`` of each row, logits of one a row: linear layers alone."""
    c = model.config
    in_layers = c.num_layers * sum(
        c.site_in_features(site) * out
        for site in torq_jax.config.SITES
        for out in c.site_out_features(site).values()
    )
    head = c.vocab_size * c.hidden_size
    reading = (in_layers + head) * model.dtype.itemsize / copied
    return max(reading, 2 * rows * (in_layers * tokens + head) / multiplied)


def measure(
    runs: dict[str, Run], texts: Sequence[int], steps: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step or a prefill: of each case and each of ``runs``, ``repeats`` in alternation."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, rows, length in CASES:
        prompts = [list(texts[i * length : (i + 1) * length]) for i in range(rows)]
        asked, part = (steps, "decode") if length == PROMPT else (0, "prefill")
        seconds[name] = {label: [] for label in runs}
        for run in runs.values():
            run(prompts, asked)  # compiles, warms up
        for _ in range(repeats):
            for label, run in runs.items():
                seconds[name][label].append(run(prompts, asked)[part] / max(asked, 1))
    return seconds


def main() -> int:
    """Measure, print and write; 1 where the target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", type=Path, required=True, help="a Python with torch, transformers and gguf"
    )
    parser.add_argument("--checkpoint", type=Path, help="a converted model, measured besides")
    parser.add_argument("--text", type=Path, default=Path(torq_jax.__file__).parent / "data" / TEXT)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "cpu_speed.json")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    gguf, cores = sources.fetch_demo(), len(os.sched_getaffinity(0))
    source = sources.open_source(str(gguf))
    model = float_model(source)
    texts = source.load_tokenizer()(read_text(options.text)[0][:20000])["input_ids"]
    process, with_threads, versions = theirs(options.torch, gguf)
    runs: dict[str, Run] = {"ours": lambda prompts, steps: ours(model, prompts, steps)}
    if options.checkpoint is not None:
        converted = torq_jax.load(options.checkpoint).model
        runs[CONVERTED] = lambda prompts, steps: ours(converted, prompts, steps)
    runs |= {f"torch, {n} threads": with_threads(n) for n in sorted({1, cores})}
    try:
        seconds = measure(runs, texts, options.steps, options.repeats)
        same = [texts[:PROMPT]]
        agree = runs["ours"](same, 8)["tokens"] == runs["torch, 1 threads"](same, 8)["tokens"]
    finally:
        process.kill()
        process.wait()
    x = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    product_rate(x)  # compiles
    copied = max(copy_rate(cores) for _ in range(options.repeats))
    multiplied = max(product_rate(x) for _ in range(options.repeats))

    print(f"{'':22}{'':20} fastest ms  median ms  torch/this fastest, median   bound/fastest")
    table = []
    for name, rows, length in CASES:
        taken = seconds[name]
        others = [v for label, v in taken.items() if label.startswith("torch")]
        fastest, median = min(map(min, others)), min(float(np.median(v)) for v in others)
        least = bound(model, rows, length if length != PROMPT else 1, copied, multiplied)
        for label, values in taken.items():
            row = {
                "case": name,
                "who": label,
                "seconds": values,
                "ratio_of_fastest": fastest / min(values),
                "ratio_of_medians": median / float(np.median(values)),
                "bound_seconds": least,
                "share_of_bound": least / min(values),
            }
            table.append(row)
            print(
                f"{name:22}{label:20} {min(values) * 1e3:10.1f} {np.median(values) * 1e3:10.1f} "
                f"{row['ratio_of_fastest']:18.2f}× {row['ratio_of_medians']:6.2f}× {row['share_of_bound']:15.0%}"
            )
    print(
        f"copied {copied / 1e9:.1f} GB/s, multiplied {multiplied / 1e9:.0f} GFLOP/s; same 9th token: {agree}"
    )
    result = {
        "rows": table,
        "copied_bytes_per_second": copied,
        "operations_per_second": multiplied,
        "ninth_token_agrees": agree,
        "steps": options.steps,
        "cores": cores,
        "load_average": os.getloadavg(),
        "torch": versions,
        "machine": describe(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    own = [row for row in table if row["who"] == "ours"]
    reached = all(min(row["ratio_of_medians"], row["ratio_of_fastest"]) >= TARGET for row in own)
    print(f"target of {TARGET}×: {'reached' if reached else 'missed'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
