"""Perplexity of a model under Hugging Face's own code, by the protocol of ``torq_jax.evaluate``.

Protocol: the whole text, read byte for byte, is tokenised once without special tokens and cut into windows
of ``--window`` tokens that do not overlap; the first ``--windows`` of them are scored, each on its own; the
first token of a window is context only; perplexity is exp of the mean negative log-likelihood of all scored
tokens. Weights and arithmetic are float32.

It is the reference for ours, and runs in an environment of its own (``pip install torch transformers gguf
accelerate``); nothing else here needs torch. MODEL is a directory, a hub id or a .gguf file:

    python benchmarks/hf_perplexity.py MODEL --text wiki.test.raw --out benchmarks/results/hf_perplexity.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import time

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model: str):
    """(model in float32 with eager attention, tokenizer, what identifies the model)."""
    path = pathlib.Path(model)
    if path.suffix == ".gguf":
        where, options = str(path.parent), {"gguf_file": path.name}
        identity = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    else:
        where, options = model, {}
        identity = {"file": path.name if path.is_dir() else model}
    network = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    return network, AutoTokenizer.from_pretrained(where, **options), identity


def window_nll(network, window: torch.Tensor) -> np.ndarray:
    """float64 [W-1] negative log-likelihoods of tokens 1.. of a window [W]."""
    with torch.no_grad():
        logits = network(window[None]).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity under Hugging Face's own code.")
    parser.add_argument("model", help="directory, hub id or .gguf file")
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()

    network, tokenizer, identity = load(arguments.model)
    with arguments.text.open(encoding="utf-8", newline="") as file:
        text = file.read()
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = min(arguments.windows, len(tokens) // arguments.window)
    if count == 0:
        raise SystemExit(
            f"{arguments.text}: {len(tokens)} tokens are fewer than one window of {arguments.window}"
        )
    start = time.perf_counter()
    windows = tokens[: count * arguments.window].reshape(count, arguments.window)
    nll = np.stack([window_nll(network, window) for window in windows])
    result = {
        "perplexity": math.exp(nll.mean()),
        "mean_nll": float(nll.mean()),
        "window_nll": [float(n) for n in nll.mean(axis=1)],
        "scored_tokens": nll.size,
        "model": identity,
        "text": {
            "file": arguments.text.name,
            "sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
            "tokens": len(tokens),
            "first_tokens": tokens[:16].tolist(),
            "tokens_sha256": hashlib.sha256(windows.numpy().astype("<i4").tobytes()).hexdigest(),
        },
        "protocol": {
            "window": arguments.window,
            "windows": count,
            "overlap": 0,
            "special_tokens": False,
            "scored": "tokens 1.. of each window",
            "dtype": "float32",
            "attention": "eager",
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(time.perf_counter() - start, 1),
    }
    line = json.dumps(result, indent=2)
    print(line)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
