"""Peak memory of converting a Llama-3-8B-shaped checkpoint must not grow with its layers.

    python -m benchmarks.memory            # 2 and 6 layers; about 6 GiB of disk for the synthetic checkpoints

Random bfloat16 weights of the real shape, calibrated on random tokens: shapes and memory are real, accuracy
is not. Each conversion runs in its own process, whose peak resident set the kernel reports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.machine import describe
from convert.names import expected_tensors
from torq_jax.config import DecoderConfig

LIMIT_GIB = 10.0

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(folder: Path, layers: int) -> None:
    """A sharded Hugging Face checkpoint of random weights, a shard a layer."""
    config = LLAMA3_8B | {"num_hidden_layers": layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[str, list[str]] = {}
    shapes = expected_tensors(DecoderConfig.from_hf(config))
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else name
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    generator = np.random.default_rng(0)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            shape = shapes[name]
            if len(shape) == 1:
                tensors[name] = np.ones(shape, ml_dtypes.bfloat16)
            else:
                values = generator.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
                tensors[name] = values.astype(ml_dtypes.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, names in shards.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def convert(
    folder: Path, out: Path, samples: int, length: int, method: str, rounding: str
) -> dict[str, float]:
    """Convert in a process of its own; seconds and peak GiB."""
    command = [sys.executable, "-m", "convert", "--hf", str(folder), "--out", str(out), "--method", method]
    command += ["--rounding", rounding]
    command += ["--calibration", "random", "--samples", str(samples), "--sequence-length", str(length)]
    start = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - start
    report = json.loads((out / "report.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(report["memory"]["peak_rss_bytes"] / 2**30, 3),
        "peak_rss_gib_up_to": {k: round(v / 2**30, 3) for k, v in report["memory"]["by_stage"].items()},
        "checkpoint_mib": round(report["size"]["checkpoint_bytes"] / 2**20, 1),
        "bits_per_weight": report["size"]["bits_per_weight"],
    }


def main() -> int:
    """Run, print the table, write the JSON; 1 when the limit is exceeded or memory grows with depth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--method", default="torq")
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints go (default: a temporary directory)"
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for layers in options.layers:
            source = Path(folder) / f"llama3-8b-{layers}-layers"
            print(f"writing a synthetic checkpoint of {layers} layers", flush=True)
            write_checkpoint(source, layers)
            row = convert(
                source,
                Path(folder) / f"out-{layers}",
                options.samples,
                options.sequence_length,
                options.method,
                options.rounding,
            )
            rows.append({"layers": layers, **row})
    print(f"{'layers':>6} {'seconds':>8} {'peak GiB':>9} {'checkpoint MiB':>15} {'bits/weight':>12}")
    for r in rows:
        print(
            f"{r['layers']:>6} {r['seconds']:>8.1f} {r['peak_rss_gib']:>9.3f} {r['checkpoint_mib']:>15.1f} "
            f"{r['bits_per_weight']:>12.3f}"
        )
    peaks = [r["peak_rss_gib"] for r in rows]
    passed = max(peaks) < LIMIT_GIB
    print(
        f"limit {LIMIT_GIB} GiB: {'kept' if passed else 'EXCEEDED'}; growth {peaks[-1] - peaks[0]:+.3f} GiB"
    )
    options.json.parent.mkdir(exist_ok=True)
    settings = {
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "method": options.method,
        "rounding": options.rounding,
    }
    result = {
        "machine": describe(),
        "settings": settings,
        "rows": rows,
        "limit_gib": LIMIT_GIB,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
