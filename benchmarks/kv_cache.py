"""What each format of the cache of keys and values costs in perplexity, with and without the rotation of heads.

    python -m benchmarks.kv_cache --text wiki.test.raw

Every key and value goes through the cache, a token's own too, as in generation. Differences from the float32 cache of
the same model are paired window by window. Models are the demo's, SmolLM2-135M-Instruct, in float and W4A4
(``--checkpoint DIR``, or converted here by ``hadamard``, rounded to nearest).
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import torq_jax
from benchmarks.machine import describe
from benchmarks.parity import float_model
from convert import sources
from torq_jax import cache, evaluate
from torq_jax.decoder import Decoder

ROWS = (
    ("float32", False),
    ("bf16", False),
    ("mxfp8", False),
    ("mxfp8", True),
    ("mxfp4", False),
    ("mxfp4", True),
)
"""Format, and whether heads are rotated; the first is the reference."""
CONVERSION = ("--method", "hadamard", "--rounding", "nearest", "--sensitivity", "output", "--quiet")
TOKENS = ("--calibration", "random", "--samples", "2", "--sequence-length", "64")
"""The conversion needs no text: neither the Hadamard matrix nor rounding to nearest looks at one."""


def rows(losses: np.ndarray, model: Decoder) -> list[dict[str, Any]]:
    """A table's rows from mean losses ``[windows, rows]``."""
    made = []
    c = model.config
    for column, (kv, rotated) in enumerate(ROWS):
        difference = evaluate.estimate(losses[:, column] - losses[:, 0])
        made.append(
            {
                "kv": kv,
                "rotated": rotated,
                "perplexity": float(np.exp(losses[:, column].mean())),
                "above_float32": None if not column else evaluate.estimate_json(difference),
                "bytes_per_token": cache.bytes_per_token(c.num_layers, c.num_kv_heads, c.head_dim, kv),
                "window_losses": losses[:, column].tolist(),
            }
        )
    return made


def show(name: str, table: list[dict[str, Any]]) -> None:
    """Print one model's rows."""
    print(f"\n{name:<28} perplexity  nats above float32 cache  bytes a token")
    for row in table:
        difference = row["above_float32"]
        cost = (
            "–"
            if difference is None
            else f"{difference['mean']:+.5f} ± {difference['standard_error'] or 0:.5f}"
        )
        label = row["kv"] + (" rotated" if row["rotated"] else "")
        print(f"{label:<28} {row['perplexity']:10.3f}  {cost:>24}  {row['bytes_per_token']:13d}")


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="the W4A4 model, instead of converting the demo's")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kv_cache.json")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source = sources.open_source(str(sources.fetch_demo()))
    with tempfile.TemporaryDirectory() as folder:
        directory = options.checkpoint
        if directory is None:
            directory = Path(folder) / "model"
            command = [
                sys.executable,
                "-m",
                "convert",
                "--hf",
                str(sources.fetch_demo()),
                "--out",
                str(directory),
            ]
            subprocess.run([*command, *CONVERSION, *TOKENS], check=True)
        rounded, tokenizer, manifest = torq_jax.load(directory)
    windows, protocol = evaluate.read_windows(
        tokenizer, options.text, window=options.window, windows=options.windows
    )
    models = {"float": float_model(source), "W4A4": rounded}
    result: dict[str, Any] = {
        "protocol": str(protocol),
        "settings": manifest.get("settings"),
        "machine": describe(),
        "models": {},
    }
    for name, model in models.items():
        start, losses = time.monotonic(), np.full((len(windows), len(ROWS)), np.nan)
        for column, (kv, rotated) in enumerate(ROWS):
            each = evaluate.window_losses(model, windows, kv=kv, rotate=rotated)
            losses[:, column] = each.mean(axis=1, dtype=np.float64)
            print(f"{name} {kv} {rotated}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        result["models"][name] = rows(losses, model)
        show(name, result["models"][name])
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{protocol}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
