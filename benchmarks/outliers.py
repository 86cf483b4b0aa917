"""Stress: tiny models with outlier channels planted, a thing that changes no float output and ruins plain rounding.

    python -m benchmarks.outliers [--factor 64] [--channels 2]

In every layer, some channels of both norms' weights are multiplied by ``factor`` and the columns that read them
divided by it. The models are the random LLaMA and Qwen3 of the tests; what is printed is the mean divergence
KL(float || quantised) in nats per token on random tokens that were not calibrated on, before and after planting.
Random weights have no language: the figures rank methods by how they take outliers, and say nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

import torq_jax
from benchmarks.machine import describe
from convert import calibration, names, pipeline, sources
from convert.progress import progress

MODELS = ("llama3", "qwen3")
READERS = {"attn_in_norm": ("q", "k", "v"), "mlp_in_norm": ("gate", "up")}
ROWS = (
    ("none", "nearest"),
    ("none", "gptq"),
    ("hadamard", "nearest"),
    ("hadamard", "gptq"),
    ("torq", "nearest"),
    ("wush", "gptq"),
    ("two_level", "nearest"),
    ("two_level", "gptq"),
    ("two_level", "two_sided"),
)


def plant(folder: Path, target: Path, factor: float, channels: int, seed: int = 0) -> None:
    """A copy of a model of one safetensors file with outlier channels; the same function in float."""
    shutil.copytree(folder, target)
    config = sources.open_source(str(folder)).config
    tensors = load_file(target / "model.safetensors")
    rng = np.random.default_rng(seed)
    for layer in range(config.num_layers):
        keys = names.layer_tensors(config, layer)
        for norm, readers in READERS.items():
            chosen = rng.choice(config.hidden_size, channels, replace=False)
            tensors[keys[norm]][chosen] *= factor
            site = norm.removesuffix("_norm")
            for name in readers:
                tensors[keys[f"{site}/{name}"]][:, chosen] /= factor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def log_probabilities(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Of every next token, ``[b, t, V]`` float64."""
    model = torq_jax.load(folder).model
    return np.asarray(jax.nn.log_softmax(model(jnp.asarray(tokens))[0]), np.float64)


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """KL in nats per token."""
    return float(np.sum(np.exp(reference) * (reference - other), axis=-1).mean())


def measure(folder: Path, scratch: Path, seed: int = 0) -> dict[str, float]:
    """Divergence of every row from the float model."""
    source = sources.open_source(str(folder))
    vocabulary = source.config.vocab_size
    drawn = calibration.load("random", None, vocabulary, samples=16, sequence_length=128, seed=seed)
    tokens = np.random.default_rng(seed + 1).integers(0, vocabulary, (8, 128)).astype(np.int32)

    def convert(name: str, settings: pipeline.Settings) -> np.ndarray:
        with progress(source.config.num_layers, name) as shown:
            pipeline.convert(source, scratch / name, settings, drawn, progress=shown)
        return log_probabilities(scratch / name, tokens)

    plain = pipeline.Settings("none", weights="bf16", activations="bf16")
    reference = convert("float", plain)
    found = {}
    for method, rounded in ROWS:
        settings = pipeline.Settings(method, rounding=rounded, seed=seed)
        found[f"{method} + {rounded}"] = divergence(reference, convert(f"{method}-{rounded}", settings))
    return found


def main() -> int:
    """Plant, convert, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--factor", type=float, default=64.0)
    parser.add_argument("--channels", type=int, default=2, help="of each norm")
    parser.add_argument("--json", type=Path, default=here / "results" / "outliers.json")
    options = parser.parse_args()
    result: dict[str, dict[str, dict[str, float]]] = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = here.parent / "tests" / "goldens" / model
            plant(folder, Path(scratch) / "planted", options.factor, options.channels)
            result[model] = {}
            for name, where in (("as it is", folder), ("planted", Path(scratch) / "planted")):
                result[model][name] = measure(where, Path(scratch) / f"out-{name.replace(' ', '-')}")
    table = Table(title="KL(float || quantised), nats per token")
    table.add_column("", no_wrap=True)
    for heading in (f"{model}, {name}" for model in MODELS for name in result[model]):
        table.add_column(heading, justify="right")
    for row in next(iter(result[MODELS[0]].values())):
        table.add_row(row, *(f"{result[m][n][row]:.5f}" for m in MODELS for n in result[m]))
    Console(width=110).print(table)
    written = {
        "unit": "KL(float || quantised), nats per token",
        "factor": options.factor,
        "channels": options.channels,
        "result": result,
        "machine": describe(),
    }
    options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
