"""The demo model, a real LLaMA: one test downloads and converts it, with few tokens."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import torq_jax
from convert import sources
from convert.__main__ import main
from torq_jax import data, evaluate
from torq_jax.generate import generate_tokens, stream_text

# Fewer tokens to calibrate on leave a model so damaged that a rounding that falls the other way moves a window by a
# tenth of a nat; over six windows that averages out.
FEW = [
    "--samples",
    "4",
    "--sequence-length",
    "256",
    "--window",
    "256",
    "--windows",
    "6",
    "--rounding",
    "nearest",
    "--option",
    "steps=2",
]


@pytest.mark.slow
def test_the_demo_converts_and_writes(tmp_path, capsys):
    out = tmp_path / "demo"
    assert (
        main(["--demo", "--out", str(out), *FEW, "--compare", "none", "--modes", "a4", "--prompt", "Hello"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "plain rounding W4A4" in printed and "256" in printed

    report = json.loads((out / "report.json").read_text())
    rows = {row["label"]: row for row in report["evaluation"]["rows"]}
    assert len(report["sites"]) == 4 * 30
    # Quantising costs perplexity and float weights cost less than MXFP4 ones; by how much is the benchmarks' matter.
    float_, a4, w4a4 = (
        rows[label]["perplexity"] for label in ("float", "two_level A4-only", "two_level W4A4")
    )
    assert float_ < a4 < w4a4 < rows["plain rounding W4A4"]["perplexity"]
    for site in report["sites"]:
        assert site["fold_error"] < 1e-5

    model, tokenizer, _ = torq_jax.load(out)
    value, _ = evaluate.perplexity(model, tokenizer, data.path(data.EVALUATION), window=256, windows=6)
    # Layer by layer and in one scan: sums in another order, and roundings that fall the other way because of it.
    assert value == pytest.approx(w4a4, rel=0.03)
    # Which text so damaged a model makes differs between machines; it has all its tokens and streams as they decode.
    prompt = "The capital of France is"
    tokens = list(generate_tokens(model, tokenizer(prompt)["input_ids"], max_tokens=8))
    assert len(tokens) == 8 or tokens[-1] == tokenizer.eos_token_id
    streamed = "".join(stream_text(model, tokenizer, prompt, max_tokens=8))
    assert streamed == tokenizer.decode(tokens, skip_special_tokens=True) != ""


@pytest.mark.slow
def test_the_demo_model_is_what_hugging_face_reads():
    """Tokens and a few weights, pinned from transformers' own loader (benchmarks/hf_perplexity.py)."""
    source = sources.open_source(str(sources.fetch_demo()))
    text, _ = evaluate.read_text(data.path(data.EVALUATION))
    tokens = evaluate.tokenize(source.load_tokenizer(), text)
    # The evaluation text begins as WikiText-2's test does, whose first tokens that benchmark's result lists.
    pinned = json.loads(
        (data.path(data.EVALUATION).parents[2] / "benchmarks/results/hf_perplexity.json").read_text()
    )
    assert tokens[:16].tolist() == pinned["text"]["first_tokens"]
    weight = source.read("model.layers.0.self_attn.q_proj.weight")
    assert weight.shape == (576, 576) and weight.dtype == np.float32 and jnp.isfinite(weight).all()
