"""Generation: batches against single rows, sampling against numpy, stop strings, streaming, the command line."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main as convert
from tests.test_decoder import GOLDENS, golden_model
from torq_jax import detokenize, sampling, terminal
from torq_jax import generate as module
from torq_jax.errors import TorqError
from torq_jax.generate import (
    Sampling,
    bucket,
    chat_prompt,
    generate,
    generate_tokens,
    sample,
    stream,
    stream_text,
)

DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


@contextlib.contextmanager
def compilations():
    """Names of the events of programs that XLA compiles in the context."""
    seen = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def endless(model):
    """The golden LLaMA without an end of text."""
    graph = golden_model("llama3")
    graph.config = dataclasses.replace(model.config, eos_token_ids=())
    return graph


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden LLaMA converted, for the command line."""
    out = tmp_path_factory.mktemp("checkpoint") / "model"
    options = ["--method", "none", "--rounding", "nearest", "--sensitivity", "output", "--quiet"]
    calibration = ["--calibration", "random", "--samples", "2", "--sequence-length", "16"]
    assert convert(["--hf", str(GOLDENS / "llama3"), "--out", str(out), *options, *calibration]) == 0
    return str(out)


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


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_rows_of_a_batch_equal_rows_alone_and_hugging_face(name):
    model, golden = golden_model(name), np.load(GOLDENS / name / "golden.npz")
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    prompts = [[5], golden["prompt"].tolist(), list(range(3, 60)), [7, 8, 9]]
    # Rows end at different times, the longest prompt's first.
    limits = [Sampling(max_tokens=n) for n in (40, 8, 3, 21)]
    together = generate(model, prompts, limits)
    assert [len(row.tokens) for row in together] == [40, 8, 3, 21]
    np.testing.assert_array_equal(together[1].tokens, golden["generated"])
    for prompt, limit, row in zip(prompts, limits, together, strict=True):
        assert generate(model, [prompt], limit) == [row]


def test_rows_end_each_for_its_own_reason(model, tokenizer, caplog):
    made = generate(model, [[3, 4]], Sampling(temperature=1.0, max_tokens=12))[0].tokens
    assert len(made) == 12
    ending = golden_model("llama3")
    ending.config = dataclasses.replace(model.config, eos_token_ids=(made[4],))
    at = made.index(made[4])
    words = tokenizer.decode(made[: max(at, 2)], skip_special_tokens=True)
    drawn = Sampling(temperature=1.0, max_tokens=12)
    rows = generate(
        ending,
        [[3, 4], [3, 4], [3, 4], [9] * 126, [3, 4]],
        [
            drawn,
            dataclasses.replace(drawn, max_tokens=at),
            dataclasses.replace(drawn, stop=words[:1]),
            Sampling(max_tokens=40),
            Sampling(max_tokens=0),
        ],
        tokenizer=tokenizer,
        batch=1,
    )
    assert [row.stopped for row in rows] == ["eos", "length", "stop", "positions", "length"]
    assert rows[0].tokens == made[: at + 1] and rows[1].tokens == made[:at]
    assert rows[2].text == "" and len(rows[3].tokens) == 3 and rows[4] == ((), "", "length")
    assert "row 3 of 5 stopped after 3 of 40 tokens" in caplog.text


def test_a_long_prompt_enters_in_pieces(endless, monkeypatch):
    prompts = [list(range(2, 52)), [4, 5, 6]]
    whole = generate(endless, prompts, Sampling(max_tokens=6))
    monkeypatch.setattr(module, "PREFILL", 32)
    assert generate(endless, prompts, Sampling(max_tokens=6)) == whole


def test_batches_of_fewer_rows_make_the_same(endless):
    prompts = [[i, i + 1] for i in range(3, 8)]
    pieces = list(stream(endless, prompts, Sampling(max_tokens=5), batch=2))
    for row, prompt in enumerate(prompts):
        made = [p.token for p in pieces if p.row == row]
        assert made == list(generate_tokens(endless, prompt, max_tokens=5)) and len(made) == 5
    assert generate(endless, []) == []


def test_a_seed_makes_the_same_text_in_any_batch(endless):
    settings = [Sampling(seed=s, max_tokens=10, **DRAWN) for s in (5, 6, 2**40 + 5, 5)]
    prompts = [[3, 4], [3, 4], [3, 4], list(range(9, 40))]
    together = generate(endless, prompts, settings, batch=2)
    alone = [generate(endless, [p], s)[0] for p, s in zip(prompts, settings, strict=True)]
    assert together == alone
    assert len({row.tokens for row in together[:3]}) == 3  # all bits of a seed count
    # Beside greedy rows too, and in another place.
    greedy = Sampling(max_tokens=10)
    mixed = generate(endless, [[8], *prompts[:1]], [greedy, settings[0]])
    assert mixed == [generate(endless, [[8]], greedy)[0], alone[0]]


def test_prompts_of_like_lengths_and_any_settings_share_what_is_compiled(endless):
    generate(endless, [[3, 4], [5]], Sampling(max_tokens=20))
    with compilations() as compiled:
        generate(endless, [list(range(2, 30)), [5, 6]], Sampling(max_tokens=30))
        generate(endless, [[7], [5, 6]], [Sampling(max_tokens=9, seed=4, **DRAWN), Sampling(max_tokens=8)])
    assert compiled == []
    with compilations() as compiled:  # a new shape, so that the listener is seen to hear
        jax.jit(lambda x: x + 1)(jnp.zeros(19))
    assert compiled


def test_buckets():
    lengths = [1, 64, 65, 96, 97, 128, 129, 192, 193, 1000, 1025]
    assert [bucket(n) for n in lengths] == [64, 64, 96, 96, 128, 128, 192, 192, 256, 1024, 1536]


def oracle_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """By sorting, one row at a time, in float64: the definitions, in the order of Hugging Face's ``generate``."""
    scaled = logits.astype(np.float64) / temperature
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= scaled >= np.sort(scaled)[-min(top_k, len(scaled))]
    shares = np.where(kept, np.exp(scaled - scaled.max()), 0)
    shares /= shares.sum()
    order = np.argsort(-shares)
    before = np.cumsum(shares[order]) - shares[order]
    kept[order[before >= top_p]] = False
    shares = np.where(kept, shares, 0)
    shares = np.where(shares < min_p * shares.max(), 0, shares)
    return shares / shares.sum()


LIMITS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.93},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.1, "temperature": 1.7},
    {"top_k": 5, "top_p": 0.9, "temperature": 0.3},
]


def test_limits_of_sampling_equal_their_definitions():
    """All in one call, so that rows of different settings share it."""
    logits = 3 * np.random.default_rng(0).standard_normal((len(LIMITS), 300)).astype(np.float32)
    settings = sampling.row_settings([Sampling(**{"temperature": 1.0} | limit) for limit in LIMITS])
    scaled = jnp.asarray(logits) / settings.temperature[:, None]
    limited = sampling.restrict(scaled, settings.top_k, settings.top_p, settings.min_p)
    for limit, row, given in zip(LIMITS, np.asarray(jax.nn.softmax(limited)), logits, strict=True):
        expected = oracle_probabilities(given, **limit)
        np.testing.assert_array_equal(row > 0, expected > 0, err_msg=str(limit))
        np.testing.assert_allclose(row, expected, atol=1e-6, err_msg=str(limit))


def test_equal_logits_stay_together():
    logits = jnp.asarray([[1.0, 0.0, -0.0, 0.0, -5.0]])
    count = lambda **k: int(  # noqa: E731
        jnp.isfinite(
            sampling.restrict(
                logits,
                jnp.asarray([k.get("top_k", 0)]),
                jnp.asarray([k.get("top_p", 1.0)]),
                jnp.zeros(1),
            )
        ).sum()
    )
    assert (count(top_k=1), count(top_k=2), count(top_k=4), count(top_p=0.5)) == (1, 4, 4, 4)


def test_draws_have_their_probabilities():
    logits = np.random.default_rng(1).standard_normal(12).astype(np.float32) * 2
    limit, draws = {"temperature": 1.3, "top_k": 9, "min_p": 0.02}, 20000
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, 12))
    counted = np.bincount(np.asarray(sample(rows, jax.random.key(3), **limit)), minlength=12)
    expected = oracle_probabilities(logits, **limit)
    assert (counted[expected == 0] == 0).all()
    # Five standard deviations of a count.
    assert (np.abs(counted - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected))).all()


def test_a_tiny_temperature_is_greedy():
    logits = jax.random.normal(jax.random.key(0), (3, 40))
    drawn = sample(logits, jax.random.key(1), temperature=1e-30)
    np.testing.assert_array_equal(drawn, jnp.argmax(logits, -1))


def test_repetition_penalty_equals_hugging_faces_formula(endless):
    """Over prompt and generated tokens: score * penalty where negative, score / penalty otherwise."""
    penalty, prompt = 1.8, [3, 4, 3, 250]
    made = list(generate_tokens(endless, prompt, max_tokens=12, repetition_penalty=penalty))
    text, plain = list(prompt), list(generate_tokens(endless, prompt, max_tokens=12))
    logits = np.array(jax.jit(lambda x: endless(x)[0][0])(jnp.asarray([prompt + made])))
    for scores, token in zip(logits[len(prompt) - 1 :], made, strict=False):
        present = np.unique(text)
        scores[present] = np.where(scores[present] < 0, scores[present] * penalty, scores[present] / penalty)
        assert token == scores.argmax()
        text.append(token)
    assert made != plain
    # Of two rows in a batch only one is penalised, each by its own prompt.
    rows = generate(
        endless, [prompt, prompt], [Sampling(max_tokens=12), Sampling(max_tokens=12, repetition_penalty=1.8)]
    )
    assert [list(row.tokens) for row in rows] == [plain, made]


def test_text_is_cut_before_a_stop_string_however_it_arrives():
    text, stop = "one two END three", ["END", "two three", "ENDING"]
    for size in range(1, 8):
        written, held, stopped = "", "", False
        for at in range(0, len(text), size):
            ready, held, stopped = detokenize.cut(held + text[at : at + size], stop)
            written += ready
            assert "one two ".startswith(written)  # nothing is written that must be taken back
            if stopped:
                break
        assert written == "one two " and held == "" and stopped
    assert detokenize.cut("abc EN", stop) == ("abc ", "EN", False)
    assert detokenize.cut("tw", stop) == ("", "tw", False)
    assert detokenize.cut("twx", stop) == ("twx", "", False)
    assert detokenize.cut("text", []) == ("text", "", False)


def test_a_stop_string_may_begin_within_a_token(endless, tokenizer):
    """Of the text that the model makes anyway, each stretch of three characters, among them across tokens."""
    ids = tokenizer("the quick")["input_ids"]
    whole = generate(endless, [ids], Sampling(max_tokens=24), tokenizer=tokenizer)[0]
    made, text = list(whole.tokens), whole.text
    stops = sorted({text[i : i + 3] for i in range(1, len(text) - 3)})
    rows = generate(
        endless,
        [ids] * len(stops),
        [Sampling(max_tokens=24, stop=(s,)) for s in stops],
        tokenizer=tokenizer,
        batch=1,
    )
    crossed = 0
    for stop, row in zip(stops, rows, strict=True):
        assert row.stopped == "stop" and row.text == text[: text.index(stop)]
        assert list(row.tokens) == made[: len(row.tokens)]
        crossed += stop not in tokenizer.decode(row.tokens[-1:], skip_special_tokens=True)
    assert crossed > 3
    # What was held back is written where the text goes on differently, or ends.
    held = generate(endless, [ids], Sampling(max_tokens=24, stop=(text[-1] + "no",)), tokenizer=tokenizer)[0]
    assert held.text == text and held.stopped == "length"


def test_a_special_token_as_stop_string(model, tokenizer):
    pieces = []
    ending = module._Ending(
        Sampling(stop=("<|user|>",)), tokenizer, (1,), 9, module._stop_tokens(("<|user|>",), tokenizer)
    )
    pending = detokenize.Pending()
    for made, token in enumerate([*tokenizer("hi")["input_ids"], 2], 1):
        pending, text, why = ending.push(pending, token, made)
        pieces.append(text)
    assert tokenizer.convert_ids_to_tokens(2) == "<|user|>" and why == "stop" and "".join(pieces) == "hi"


@pytest.mark.parametrize("text", ["plain", "naïve ünï", "日本語テキスト", "a🙂b🙂🙂", " spaces  and\nlines "])
def test_characters_are_never_divided(tokenizer, text):
    pending, written = detokenize.Pending(), []
    for token in tokenizer(text)["input_ids"]:
        pending, ready, _ = detokenize.push(pending, token, tokenizer, ())
        written.append(ready)
    assert "".join(written) + detokenize.flush(pending, tokenizer, ())[0] == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in written)
    # Bytes that never become a character appear at the end.
    pending, ready, _ = detokenize.push(detokenize.Pending(), tokenizer("語")["input_ids"][0], tokenizer, ())
    assert ready == "" and detokenize.flush(pending, tokenizer, ())[0] == "\N{REPLACEMENT CHARACTER}"


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
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    expected = "<|begin_of_text|><|user|>a<|assistant|>b<|user|>c<|assistant|>"
    assert chat_prompt(tokenizer, turns) == expected
    with pytest.raises(TorqError, match="a turn has role: it needs a role and a content"):
        chat_prompt(tokenizer, [{"role": "user"}])
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
        ([1], {"min_p": 1.5}, r"min_p 1.5 must be in \[0, 1\]"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty 0 positive and finite"),
        ([1], {"top_k": 2.5}, "top_k is 2.5: must be an integer"),
    ],
)
def test_bad_settings_are_errors(model, prompt, settings, message):
    with pytest.raises(TorqError, match=message):
        generate_tokens(model, prompt, **settings)


def test_bad_batches_are_errors(model, tokenizer):
    for prompts, settings, message in (
        ("text", {}, "prompts is one text, 'text': put it into a list"),
        (["text"], {}, "the prompt 'text' is a text: pass tokenizer="),
        ([[1], []], {}, "the prompt has no tokens"),
        ([[1], [2]], {"sampling": [Sampling()]}, "1 samplings for 2 prompts"),
        ([[1]], {"sampling": Sampling(stop="x")}, "stop strings need the tokenizer"),
        ([[1]], {"batch": 0}, "batch is 0: must be 1 at least"),
    ):
        with pytest.raises(TorqError, match=message):
            stream(model, prompts, **settings)
    with pytest.raises(TorqError, match="stop has '': each must be a string of one character at least"):
        Sampling(stop=("a", ""))


def lines_of(*lines):
    """What a person types; exceptions among it are raised."""
    rest = iter(lines)

    def read(prompt):
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_a_chat_remembers_and_forgets(model, tokenizer, capsys, monkeypatch):
    asked = []

    def answer(model, prompts, own, *, tokenizer):
        asked.append((tokenizer.decode(prompts[0]), own.seed))
        return iter([module.Piece(0, 5, "yes", None), module.Piece(0, 6, "!", "length")])

    monkeypatch.setattr(terminal, "stream", answer)
    typed = lines_of(
        "hi", "more", "/reset", "new", KeyboardInterrupt(), "/system S", "/foo", "ok", "/exit", "no"
    )
    terminal.chat(model, tokenizer, Sampling(seed=7), system="R", read=typed)
    start, user, end = "<|begin_of_text|>", "<|user|>", "<|assistant|>"  # this template knows two roles only
    assert asked == [
        (f"{start}{end}R{user}hi{end}", 7),
        (f"{start}{end}R{user}hi{end}yes!{user}more{end}", 8),
        (f"{start}{end}R{user}new{end}", 9),
        (f"{start}{end}S{user}ok{end}", 10),
    ]
    printed = capsys.readouterr()
    assert printed.out == "yes!\n" * 4
    for told in (
        "the conversation starts anew",
        "no command /foo",
        "Ctrl-D leaves",
        "cut off after 128 tokens",
    ):
        assert told in printed.err


def test_an_interrupted_answer_stays_in_the_conversation(model, tokenizer, capsys, monkeypatch):
    asked = []

    def answer(model, prompts, own, *, tokenizer):
        asked.append(tokenizer.decode(prompts[0]))
        yield module.Piece(0, 5, "half", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "stream", answer)
    terminal.chat(model, tokenizer, Sampling(), read=lines_of("hi", "more"))
    assert asked[1] == "<|begin_of_text|><|user|>hi<|assistant|>half<|user|>more<|assistant|>"
    assert capsys.readouterr().err.count("[stopped]") == 2


def test_a_conversation_that_fills_the_positions_says_what_it_forgets(model, tokenizer, capsys):
    # 128 positions, of which the answer takes 30; a character a token and two more a turn.
    typed = lines_of("X" * 40, "Y" * 40, "/reset", "Z" * 100)
    terminal.chat(model, tokenizer, Sampling(max_tokens=30), read=typed)
    told = capsys.readouterr().err
    assert "no longer fits the model's 128 positions: its oldest 2 turns are forgotten" in told
    assert "error: the message has 103 tokens and the answer needs room for 30" in told
    turns = [{"role": r, "content": c * 28} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    turns += [{"role": "user", "content": "last"}]
    kept, tokens = terminal.fit(turns, model, tokenizer, 60, {})
    assert [t["content"] for t in kept] == ["s" * 28, "u" * 28, "a" * 28, "last"] and len(tokens) + 32 <= 128
    kept, _ = terminal.fit([*turns[:-1], {"role": "user", "content": "l" * 30}], model, tokenizer, 20, {})
    assert [t["content"] for t in kept] == ["s" * 28, "l" * 30]


def test_command_line_batches(checkpoint, tmp_path, capsys, monkeypatch):
    def run(*arguments):
        assert terminal.main([checkpoint, "--max-tokens", "6", *arguments]) == 0
        return capsys.readouterr()

    single = [run("--prompt", p) for p in ("the block", "a")]
    assert (
        "prefill of" in single[0].err and "tokens/s" in single[0].err and single[0].err.count("[xla on") == 1
    )
    both = run("--prompt", "the block", "--prompt", "a")
    assert both.out == single[0].out + "\n" + single[1].out
    (tmp_path / "p.txt").write_text("the block\n\na\n", encoding="utf-8")
    assert run("--prompts", str(tmp_path / "p.txt"), "--batch", "1").out == both.out
    turns = [{"role": "user", "content": "a"}]
    lines = ["the block", {"prompt": "a"}, {"messages": turns}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    answers = [
        json.loads(x)
        for x in run("--prompts", str(tmp_path / "p.jsonl"), "--json", "--batch", "2").out.splitlines()
    ]
    assert [a["prompt"] for a in answers] == ["the block", "a", turns]
    assert "the block" + answers[0]["text"] + "\n" == single[0].out and answers[0]["tokens"] == 6
    assert answers[2]["text"] != answers[1]["text"] and {a["stopped"] for a in answers} <= {"length", "eos"}
    monkeypatch.setattr("sys.stdin", io.StringIO("the block\n"))  # no terminal
    assert run().out == single[0].out


def test_command_line_errors(checkpoint, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('"fine"\n{"text": 1}\n', encoding="utf-8")
    for arguments, message in (
        (["--prompts", str(bad)], "bad.jsonl:2 is '{\"text\": 1}': must be a string"),
        (["--prompts", "none.txt"], "--prompts none.txt cannot be read"),
        (["--prompt", "a", "--system", "b"], "--system and --chat-option belong to a chat template"),
        (["--prompt", "a", "--chat", "--chat-option", "x"], "--chat-option 'x': must be NAME=VALUE"),
        (["--prompt", "a", "--min-p", "2"], "min_p 2.0 must be in [0, 1]"),
        (["--prompt", "a", "--batch", "0"], "batch is 0"),
    ):
        assert terminal.main([checkpoint, *arguments]) == 1
        assert f"error: {message}" in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_a_chat_in_a_terminal(checkpoint):
    ours, theirs = pty.openpty()
    # The terminal becomes the process's own, so that Ctrl-C is a signal. Where the tests run in a shell's background
    # it would be ignored, which children inherit.
    program = (
        "import fcntl, runpy, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('torq_jax.generate', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, checkpoint, "--max-tokens", "6"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
    )
    os.close(theirs)
    shown, last, end = b"", b"", time.monotonic() + 300
    try:
        for typed in (b"hello\n", b"/reset\n", b"\x03", b"again\n", b"\x04"):
            prompts = shown.count(b"> ")
            while shown.count(b"> ") == prompts and time.monotonic() < end:
                if select.select([ours], [], [], 10)[0]:
                    shown += os.read(ours, 4096)
                elif last == b"\x03":  # came before readline slept, which wakes at the next one
                    os.write(ours, last)
            if typed == b"\x03":
                time.sleep(0.5)  # readline prints the prompt a moment before it waits
            os.write(ours, typed)
            last = typed
        with contextlib.suppress(OSError):  # the other side is closed
            while select.select([ours], [], [], max(0, end - time.monotonic()))[0]:
                shown += os.read(ours, 4096)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(ours)
    text = shown.decode(errors="replace")
    for part in ("[xla on cpu", "[a chat:", "the conversation starts anew", "[Ctrl-D leaves]", "[prefill of"):
        assert part in text
    assert text.count("[xla on cpu") == 1 and "Traceback" not in text
