"""Generation: cached decoding against whole passes, sampling, streaming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_decoder import GOLDENS
from torq_jax.errors import TorqError
from torq_jax.generate import chat_prompt, generate_tokens, sample, stream_text


def test_greedy_tokens_equal_hugging_face(model):
    golden = np.load(GOLDENS / "llama3" / "golden.npz")
    made = list(generate_tokens(model, golden["prompt"].tolist(), max_tokens=8))
    np.testing.assert_array_equal(made, golden["generated"])


def test_a_seed_gives_the_same_tokens_again(model):
    settings = {"max_tokens": 12, "temperature": 1.0, "top_k": 50, "top_p": 0.9}
    first, again, other = (list(generate_tokens(model, [3, 4], seed=s, **settings)) for s in (1, 1, 2))
    assert first == again != other


def test_generation_stops_at_the_end_of_sequence(model, monkeypatch):
    made = list(generate_tokens(model, [3, 4], max_tokens=12, temperature=1.0))
    end = made[7]
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_ids=(287, end)))
    stopped = list(generate_tokens(model, [3, 4], max_tokens=12, temperature=1.0))
    assert stopped == made[: made.index(end) + 1]


def test_generation_stops_with_a_warning_where_the_positions_end(model, monkeypatch, caplog):
    # 128 positions; the last token made is read by nobody, so it needs none.
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_ids=()))
    assert model.config.max_position_embeddings == 128
    assert len(list(generate_tokens(model, [3] * 120, max_tokens=9))) == 9 and not caplog.records
    made = list(generate_tokens(model, [3] * 120, max_tokens=400))
    assert len(made) == 9
    assert "stopped after 9 of 400 tokens: prompt and text fill the model's 128 positions" in caplog.text
    assert len(list(generate_tokens(model, [3] * 128, max_tokens=2))) == 1
    with pytest.raises(TorqError, match="the prompt has 129 tokens, the model has positions for 128"):
        generate_tokens(model, [3] * 129)


def test_sampling_keeps_to_its_limits():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    drawn = {
        name: {int(sample(logits, jax.random.key(i), temperature=1.0, **limit)[0]) for i in range(60)}
        for name, limit in {"k": {"top_k": 2}, "p": {"top_p": 0.6}, "all": {}, "one": {"top_p": 1e-6}}.items()
    }
    assert drawn == {"k": {0, 1}, "p": {0, 1}, "all": {0, 1, 2, 3}, "one": {0}}
    assert int(sample(logits, jax.random.key(0))[0]) == 0


def test_streamed_pieces_make_the_whole_text(model, tokenizer):
    pieces = list(stream_text(model, tokenizer, "the quick", max_tokens=20))
    ids = tokenizer("the quick")["input_ids"]
    whole = tokenizer.decode(list(generate_tokens(model, ids, max_tokens=20)), skip_special_tokens=True)
    assert "".join(pieces) == whole and len(pieces) > 1


def test_chat_prompt_uses_the_template(tokenizer):
    assert "hello" in chat_prompt(tokenizer, "hello") != "hello"
    with pytest.raises(TorqError, match="no chat template"):
        chat_prompt(object(), "hello")


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([999], {}, "token 999 outside the vocabulary of 288"),
        ([1], {"temperature": -1}, "temperature -1 and top_k 0 must be finite and not negative"),
        ([1], {"temperature": float("nan")}, "temperature nan"),
        ([1], {"max_tokens": -100}, "max_tokens -100 must not be negative"),
        ([1], {"seed": 2**63}, r"seed 9223372036854775808 in 0\.\."),
        ([1], {"top_p": 0}, r"top_p 0 in \(0, 1\]"),
    ],
)
def test_bad_settings_are_errors(model, prompt, settings, message):
    with pytest.raises(TorqError, match=message):
        generate_tokens(model, prompt, **settings)
