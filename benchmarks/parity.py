"""SmolLM2's perplexity under our decoder against the one under Hugging Face's code.

    python benchmarks/hf_perplexity.py ...       # once, in an environment with torch
    python -m benchmarks.parity --text wiki.test.raw

Same GGUF, same text, same windows, float32 on both sides; fails where they differ by more than 0.1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.machine import describe
from convert import sources
from convert.pipeline import read_layer
from torq_jax import decoder, evaluate

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-3


def float_model(source: sources.Source) -> decoder.Decoder:
    """The source's own model in float32, all of it in memory, as checkpoints are loaded on a CPU."""
    layers = [read_layer(source, i) for i in range(source.config.num_layers)]
    parameters = {
        "embed": jnp.asarray(source.read("model.embed_tokens.weight"), jnp.float32),
        "norm": jnp.asarray(source.read("model.norm.weight"), jnp.float32),
        "layers": {i: jax.tree.map(lambda x: jnp.asarray(x)[None], own) for i, own in enumerate(layers)},
    }
    if not source.config.tie_embeddings:
        parameters["lm_head"] = jnp.asarray(source.read("lm_head.weight"), jnp.float32)
    empty = nnx.eval_shape(lambda: decoder.Decoder(source.config, apart=True))
    return decoder.join(decoder.fill(empty, parameters))


def main() -> int:
    """Measure, compare, print, write; 1 where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="the text that the reference was measured on"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "parity.json")
    options = parser.parse_args()
    reference = json.loads((RESULTS / "hf_perplexity.json").read_text())
    source = sources.open_source(str(sources.fetch_demo()))
    window, windows = reference["protocol"]["window"], reference["protocol"]["windows"]
    start = time.monotonic()
    value, protocol = evaluate.perplexity(
        float_model(source), source.load_tokenizer(), options.text, window=window, windows=windows
    )
    if protocol.sha256 != reference["text"]["sha256"]:
        print(f"{options.text} is not the text of the reference", file=sys.stderr)
        return 1
    difference = value / reference["perplexity"] - 1
    print(f"Hugging Face  {reference['perplexity']:.5f}\nours          {value:.5f}  ({difference:+.2e})")
    print(f"protocol      {protocol}")
    result = {
        "perplexity": value,
        "hugging_face": reference["perplexity"],
        "relative_difference": difference,
        "protocol": str(protocol),
        "seconds": round(time.monotonic() - start, 1),
        "machine": describe(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if abs(difference) < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
