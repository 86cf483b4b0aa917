"""Load a converted model, let it write, and measure its perplexity."""

import sys

import torq_jax
from torq_jax.evaluate import perplexity
from torq_jax.generate import stream_text

directory, text_file = sys.argv[1:3]  # e.g. SmolLM2-135M-Instruct.Q4_1-torq-mxfp4 and a .txt file
model, tokenizer, manifest = torq_jax.load(directory)
print(manifest["name"], manifest["settings"]["method"])

for piece in stream_text(model, tokenizer, "The capital of France is", max_tokens=24):
    print(piece, end="", flush=True)
print()

value, protocol = perplexity(model, tokenizer, text_file, window=256, windows=2)
print(f"perplexity {value:.2f} on {protocol}")
