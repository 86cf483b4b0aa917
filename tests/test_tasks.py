"""Zero-shot tasks: items, tokens, scores against a whole forward pass, accuracies and their errors by hand."""

import io
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.test_decoder import GOLDENS, golden_model
from torq_jax import decoder, tasks
from torq_jax.checkpoint import Loaded
from torq_jax.config import SITES
from torq_jax.decoder import Decoder, SiteFormat
from torq_jax.errors import TorqError
from torq_jax.generate import generate_tokens
from torq_jax.likelihood import (
    Request,
    Score,
    bucket,
    encode,
    encode_pair,
    make_batches,
    make_request,
    model_scorer,
    scorer,
)
from torq_jax.tasks import paired, parse_item, read_task

pytestmark = pytest.mark.once

CHOICE = {"context": "Question: sky?\nAnswer:", "choices": ["blue", "a cow"], "answer": 0}
PARTIAL = {"context": "", "choices": ["the cat so it", "the dog so it"], "target": " barks.", "answer": 1}
LAST_WORD = {"context": "The capital of France is", "target": " Paris"}

# Logits here reach 7, where float32 has a spacing of 5e-7. Sums of a few hundred products of order one, in another
# order for each padded length, move a logit by some ten of those, and a token's log-likelihood, which is a logit
# minus a logsumexp, by at most twice that.
TOKEN_ERROR = 1e-5


def write(path, *items):
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n", encoding="utf-8")
    return path


def result(name, lines_and_right, sha256="0" * 64):
    items = tuple(tasks.ItemResult(n, 0, (-1.0, -2.0), (True, False), r, None) for n, r in lines_and_right)
    return tasks.TaskResult(name, f"{name}.jsonl", sha256, 0, items)


# Items.


def test_the_three_forms_of_an_item(tmp_path):
    task = read_task(write(tmp_path / "mixed.jsonl", CHOICE, PARTIAL, LAST_WORD))
    choice, partial, last = task.items
    assert (task.name, task.file) == ("mixed", "mixed.jsonl")
    assert choice.pairs == ((CHOICE["context"], " blue"), (CHOICE["context"], " a cow"))
    assert choice.lengths == (4, 5) and choice.answer == 0
    assert partial.pairs == (("the cat so it", " barks."), ("the dog so it", " barks."))
    assert partial.lengths is None and partial.answer == 1
    assert last.pairs == ((LAST_WORD["context"], " Paris"),)
    assert last.lengths is last.answer is None
    assert [item.line for item in task.items] == [1, 2, 3]


def test_a_limit_takes_the_first_items_and_reads_no_further(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(f"\n{json.dumps(CHOICE)}\n\n{json.dumps(PARTIAL)}\nno JSON\n")
    assert [item.line for item in read_task(path, 2).items] == [2, 4]
    with pytest.raises(TorqError, match=r"task\.jsonl, line 5: Expecting value"):
        read_task(path)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([], "an item is an object with a context, not list"),
        ({"choices": ["a", "b"], "answer": 0}, "'context' must be a string, not None"),
        ({"context": "x"}, "'target' must be a string with something in it, not None"),
        ({**PARTIAL, "target": None}, "'target' must be a string with something in it, not None"),
        ({**LAST_WORD, "target": ""}, "'target' must be a string with something in it, not ''"),
        ({**CHOICE, "choices": ["a"]}, "'choices' must be a list of two or more"),
        ({**CHOICE, "choices": "ab"}, "'choices' must be a list of two or more, not 'ab'"),
        ({**CHOICE, "choices": ["a", ""]}, "every choice must be a string with something in it, not ''"),
        ({**CHOICE, "answer": 2}, "'answer' must be an index of the 2 choices, from 0, not 2"),
        ({**CHOICE, "answer": "0"}, "not '0'"),
        ({**CHOICE, "answer": True}, "not True"),
        ({**CHOICE, "target": " x"}, "'context' must be empty, not 'Question"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, item, message):
    path = write(tmp_path / "task.jsonl", CHOICE, item)
    with pytest.raises(TorqError, match=r"task\.jsonl, line 2: .*" + message):
        read_task(path)


def test_files_that_are_no_task(tmp_path):
    with pytest.raises(TorqError, match="does not exist"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(TorqError, match="cannot be read: IsADirectoryError"):
        read_task(tmp_path)
    (tmp_path / "binary.jsonl").write_bytes(b"\x80")
    with pytest.raises(TorqError, match="cannot be read: UnicodeDecodeError"):
        read_task(tmp_path / "binary.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TorqError, match="has no items"):
        read_task(tmp_path / "empty.jsonl")
    with pytest.raises(TorqError, match="cannot score 0 items"):
        read_task(tmp_path / "empty.jsonl", 0)


# Tokens.


def test_spaces_that_end_a_context_move_to_the_continuation(tokenizer):
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    assert encode_pair(tokenizer, "the cat", " sat") == (
        ids("the cat"),
        ids("the cat sat")[len(ids("the cat")) :],
    )
    assert encode_pair(tokenizer, "the cat \n", "sat") == encode_pair(tokenizer, "the cat", " \nsat")


def test_the_whole_is_encoded_and_cut_where_the_context_alone_would_end():
    # Letters are their own tokens, except that "bc" is one: it belongs to the context that ends within it.
    def encode(text, add_special_tokens):
        return [ord(c) for c in text.replace("bc", "X")]

    fake = SimpleNamespace(encode=encode, bos_token_id=None, eos_token_id=None)
    assert encode_pair(fake, "ab", "cd") == ([ord("a"), ord("b")], [ord("d")])


def test_an_empty_context_is_bos(tokenizer):
    bos = tokenizer.bos_token_id
    ids = tokenizer.encode("sat", add_special_tokens=False)
    assert encode_pair(tokenizer, "", "sat") == ([bos], ids)
    assert encode_pair(tokenizer, " ", "sat") == ([bos], tokenizer.encode(" sat", add_special_tokens=False))
    assert encode_pair(tokenizer, "", tokenizer.bos_token + "sat") == ([bos], ids)
    without = SimpleNamespace(
        bos_token_id=None, eos_token_id=7, encode=lambda text, add_special_tokens: [1, 2]
    )
    assert encode_pair(without, "", "x") == ([7], [1, 2])
    with pytest.raises(TorqError, match="neither BOS nor EOS"):
        encode_pair(SimpleNamespace(bos_token_id=None, eos_token_id=None), "", "x")


def test_a_tokenizer_that_adds_bos_adds_it_once():
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "llama3")
    bos, name = tokenizer.bos_token_id, tokenizer.bos_token
    plain = encode_pair(tokenizer, "the cat", " sat")
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    assert encode_pair(tokenizer, "the cat", " sat") == ([bos, *plain[0]], plain[1])
    assert encode_pair(tokenizer, name + "the cat", " sat") == ([bos, *plain[0]], plain[1])
    assert encode_pair(tokenizer, "", " sat") == ([bos], encode(tokenizer, " sat", special_tokens=False))


def test_a_context_without_room_loses_its_start():
    # 4 positions read 4 tokens and predict a fifth.
    assert make_request([1, 2, 3], [4, 5], 4) == Request((1, 2, 3, 4, 5), 2, 0)
    assert make_request([0, 1, 2, 3], [4, 5], 4) == Request((1, 2, 3, 4, 5), 2, 1)
    with pytest.raises(TorqError, match="5 tokens to score, but the model has 4 positions"):
        make_request([1], [1, 2, 3, 4, 5], 4)
    with pytest.raises(TorqError, match="1 tokens of context and 0 to score"):
        make_request([1], [], 4)


def test_an_item_that_cannot_be_scored_is_named(tokenizer):
    item = parse_item({**LAST_WORD, "target": " Paris" * 60}, line=12)
    with pytest.raises(
        TorqError, match=r"item of line 12: \d+ tokens to score, but the model has 128 positions"
    ):
        tasks.make_requests([item], tokenizer, 128)


# Scores.


def test_buckets():
    lengths = range(1, 500)
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 64, 65, 97, 129)] == [
        16, 16, 24, 24, 32, 48, 64, 64, 96, 128, 192,
    ]  # fmt: skip
    assert (
        all(n <= bucket(n) <= max(16, 1.5 * n) for n in lengths) and len({bucket(n) for n in lengths}) == 11
    )


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=40), st.integers(1, 300)
)
def test_batches_hold_every_request_once(sizes, batch_tokens):
    made = np.random.default_rng(0)
    requests = [Request(tuple(made.integers(1, 99, c + s).tolist()), s) for c, s in sizes]
    batches = make_batches(requests, batch_tokens)
    seen = []
    for batch in batches:
        rows, length = batch.tokens.shape
        assert rows == max(1, batch_tokens // length)
        assert not batch.tokens[len(batch.members) :].any()
        assert {bucket(len(requests[member].tokens) - 1) for member in batch.members} == {length}
        for row, member in enumerate(batch.members):
            tokens, scored = requests[member].tokens, requests[member].scored
            seen.append(member)
            own = batch.rows == row
            positions = batch.index[own] - row * batch.tokens.shape[1]
            np.testing.assert_array_equal(batch.targets[own], tokens[-scored:])
            np.testing.assert_array_equal(positions, np.arange(len(tokens) - 1 - scored, len(tokens) - 1))
            np.testing.assert_array_equal(batch.tokens[row, : len(tokens) - 1], tokens[:-1])
            assert not batch.tokens[row, len(tokens) - 1 :].any()
    assert sorted(seen) == list(range(len(requests)))


def rounded_model(name):
    """A golden model whose activations are rounded to MXFP4 at every site."""
    model = golden_model(name)
    formats = {site: SiteFormat(activation_scale="even") for site in SITES}
    return decoder.fill(Decoder(model.config, formats), nnx.to_pure_dict(nnx.split(model)[1]))


FORWARD = nnx.jit(lambda model, tokens: model(tokens)[0])


def brute_force(model, requests):
    """All logits of one padded pass, their softmax in float64, and of each row the part that is asked for."""
    padded = np.zeros((len(requests), 127), np.int32)
    for row, request in zip(padded, requests, strict=True):
        row[: len(request.tokens) - 1] = request.tokens[:-1]
    logits = np.asarray(FORWARD(model, jnp.asarray(padded)), np.float64)
    return [judged(row, request) for row, request in zip(logits, requests, strict=True)]


def judged(logits, request):
    last = len(request.tokens) - 1
    logits, scored = logits[last - request.scored : last], np.array(request.tokens[-request.scored :])
    chosen = logits[np.arange(len(scored)), scored]
    value = (chosen - np.log(np.exp(logits).sum(-1))).sum()
    return value, bool((logits.argmax(-1) == scored).all())


@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
def test_scores_equal_a_whole_pass(name):
    model = golden_model(name)
    made = np.random.default_rng(1)
    sizes = [(1, 1), (1, 3), (3, 20), (20, 1), (30, 4), (100, 5)]
    requests = [Request(tuple(made.integers(2, 288, c + s).tolist()), s) for c, s in sizes]
    greedy = list(generate_tokens(model, [5, 6, 7], max_tokens=4))
    requests += [Request((5, 6, 7, *greedy), 4), Request((5, 6, 7, *greedy[:-1], greedy[-1] ^ 1), 4)]
    expected = brute_force(model, requests)
    alone = np.asarray(
        FORWARD(model, jnp.asarray([requests[3].tokens[:-1]]))[0], np.float64
    )  # without padding
    assert judged(alone, requests[3])[0] == pytest.approx(expected[3][0], abs=TOKEN_ERROR)
    calls = []
    found = model_scorer(model, batch_tokens=256)(requests, lambda *call: calls.append(call))
    for request, score, (value, is_greedy) in zip(requests, found, expected, strict=True):
        assert abs(score.log_likelihood - value) < TOKEN_ERROR * request.scored
        assert score.greedy == is_greedy
    assert [score.greedy for score in found[-2:]] == [True, False]
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done) and set(totals) == {done[-1]} and len(calls) > 1


def test_a_score_does_not_depend_on_what_else_is_scored():
    """Bit for bit, with rounded activations.

    So small a model seldom has a value near enough to a tie for another shape to show: that shapes depend on the
    request alone is what test_batches_hold_every_request_once sees to.
    """
    model = rounded_model("llama3")
    made = np.random.default_rng(2)
    requests = [Request(tuple(made.integers(2, 288, n).tolist()), 3) for n in (9, 15, 16, 20, 24, 31)]
    function = model_scorer(model, batch_tokens=128)
    together = function(requests)
    assert function(requests[::-1]) == together[::-1]
    assert [score for request in requests for score in function([request])] == together
    # And the activations are rounded.
    assert (
        abs(together[0].log_likelihood - model_scorer(golden_model("llama3"))(requests)[0].log_likelihood)
        > 1e-2
    )


def test_any_function_to_the_residual_stream_can_be_scored(model):
    head = model.lm_head[...]
    by_parts = scorer(
        jax.jit(lambda tokens: model.hidden(tokens)[0]), model.norm[...], head, eps=model.config.norm_eps
    )
    requests = [Request((3, 4, 5, 6), 2), Request((3, 4), 1)]
    # The same operations on the same shapes.
    assert by_parts(requests) == model_scorer(model)(requests)
    assert by_parts([]) == []


def test_scores_that_mean_nothing_are_errors(model):
    function = model_scorer(model)
    with pytest.raises(TorqError, match="token 288 is outside the vocabulary of 288"):
        function([Request((1, 288), 1)])
    overflowing = scorer(
        lambda tokens: jnp.full((*tokens.shape, 64), jnp.nan), model.norm[...], model.lm_head[...], eps=1e-5
    )
    with pytest.raises(TorqError, match="not finite"):
        overflowing([Request((1, 2), 1)])


# Accuracies.


def scored_by(table):
    """A model that gives a continuation's score by its last token."""
    return lambda requests, progress=None: [Score(*table[request.tokens[-1]]) for request in requests]


def test_acc_norm_divides_by_characters():
    item = parse_item({**CHOICE, "choices": ["ab", "ab cd ef"], "answer": 1})
    judged = tasks.judge(item, [Score(-3.0, False), Score(-4.0, False)])  # by character -1.5 and -0.5
    assert (judged.acc, judged.acc_norm) == (False, True)
    # Not by bytes: four characters of eight bytes, against five; -1 and -0.9 by character.
    item = parse_item({**CHOICE, "choices": ["éééé", "abcde"], "answer": 1})
    assert tasks.judge(item, [Score(-4.0, False), Score(-4.5, False)]).acc_norm
    assert tasks.judge(item, [Score(-4.0, False), Score(-4.0, False)]).acc is False  # the first of equals


def test_winogrande_compares_the_shared_end(tokenizer, model, tmp_path):
    task = read_task(write(tmp_path / "winogrande.jsonl", PARTIAL))
    scored = tasks.score(model_scorer(model), task, tokenizer, 128)
    (item,) = scored.items
    end = tokenizer.encode(" barks.")
    requests = [make_request(tokenizer.encode(choice), end, 128) for choice in PARTIAL["choices"]]
    expected = [value for value, _ in brute_force(model, requests)]
    np.testing.assert_allclose(item.log_likelihoods, expected, atol=TOKEN_ERROR * len(end), rtol=0)
    assert item.acc == (expected[1] > expected[0]) and item.acc_norm is None
    assert not tasks.has_acc_norm(scored) and tasks.perplexity(scored) is None
    with pytest.raises(TorqError, match="winogrande has no acc_norm"):
        tasks.values(scored, "acc_norm")
    assert tasks.values(scored, "usual") == tasks.values(scored, "acc")


def test_a_last_word_is_right_if_the_model_would_write_all_of_it(tokenizer, tmp_path):
    end = {word: tokenizer.encode(" " + word)[-1] for word in ("red", "sun", "tag")}
    task = read_task(
        write(tmp_path / "lambada.jsonl", *({"context": "it is", "target": " " + word} for word in end))
    )
    table = {end["red"]: (-1.0, True), end["sun"]: (-2.0, False), end["tag"]: (-6.0, True)}
    scored = tasks.score(scored_by(table), task, tokenizer, 128)
    assert [item.acc for item in scored.items] == [True, False, True]
    assert tasks.perplexity(scored) == pytest.approx(math.exp(3.0))
    assert tasks.estimate(tasks.values(scored, "log_likelihood")).mean == pytest.approx(-3.0)


def test_lost_starts_are_counted_and_warned_about(tokenizer, model, tmp_path, caplog):
    task = read_task(
        write(tmp_path / "task.jsonl", LAST_WORD, {**LAST_WORD, "context": "far too long " * 30})
    )
    scored = tasks.score(model_scorer(model), task, tokenizer, 128)
    assert scored.truncated == 1
    assert "1 of 2 requests lost their start, being longer than the model's 128 positions" in caplog.text


def test_paired_errors_by_hand():
    ours = {
        "a": result("a", [(1, True), (2, True), (3, False), (4, True)]),
        "b": result("b", [(1, True), (2, False)]),
    }
    reference = {
        "a": result(
            "a", [(4, False), (2, False), (3, False), (1, True), (9, True)]
        ),  # more, in another order
        "b": result("b", [(1, True), (2, True)]),
    }
    # a: differences 0, 1, 0, 1: mean 1/2, sample variance 4 (1/2)^2 / 3 = 1/3, error sqrt(1/3 / 4) = sqrt(1/12).
    # b: differences 0, -1: mean -1/2, sample variance 1/2, error sqrt(1/2 / 2) = 1/2.
    # Mean of both: 0, error sqrt(1/12 + 1/4) / 2 = sqrt(1/12).
    found = paired(ours, reference)
    assert (found.tasks["a"].mean, found.tasks["b"].mean, found.mean.mean) == (0.5, -0.5, 0.0)
    assert found.tasks["a"].standard_error == pytest.approx(math.sqrt(1 / 12))
    assert found.tasks["b"].standard_error == pytest.approx(1 / 2)
    assert found.mean.standard_error == pytest.approx(math.sqrt(1 / 12))
    assert (found.gained, found.lost) == ({"a": 2, "b": 0}, {"a": 0, "b": 1})
    # One item has no sample variance.
    assert math.isnan(tasks.estimate(np.array([1.0])).standard_error)


def test_what_cannot_be_compared():
    ours = {"a": result("a", [(1, True), (2, True)])}
    with pytest.raises(TorqError, match="no results for a: it has b"):
        paired(ours, {"b": ours["a"]})
    with pytest.raises(TorqError, match="a was another file for the reference: sha256 1111"):
        paired(ours, {"a": result("a", [(1, True), (2, True)], "1" * 64)})
    with pytest.raises(TorqError, match=r"has 1 items of a, and not 1 of the 2 .* line 2: use --limit 1 "):
        paired(ours, {"a": result("a", [(1, True)])})
    with pytest.raises(TorqError, match="no results to compare"):
        paired({}, ours)
    with pytest.raises(TorqError, match="metric 'f1' is none of acc, "):
        paired(ours, ours, "f1")


# The command.


@pytest.fixture
def loading(monkeypatch, model, tokenizer):
    """Directories called float and bent are checkpoints, the second of a slightly other model."""
    other = golden_model("llama3")
    other.norm[...] = other.norm[...] * jnp.linspace(0.5, 1.5, 64)
    loaded = {"float": Loaded(model, tokenizer, {}), "bent": Loaded(other, tokenizer, {})}
    monkeypatch.setattr("torq_jax.checkpoint.load", lambda directory: loaded[directory.rsplit("/", 1)[-1]])


def test_the_command(loading, tmp_path, capsys):
    write(tmp_path / "piqa.jsonl", CHOICE, {**CHOICE, "answer": 1}, {**CHOICE, "context": "Why?"})
    write(tmp_path / "lambada_openai.jsonl", LAST_WORD, LAST_WORD)
    for name in ("float", "bent"):
        (tmp_path / name).mkdir()
    saved = tmp_path / "float.json"
    arguments = ["--data", str(tmp_path), "--tasks", "piqa, lambada_openai"]
    assert tasks.main([str(tmp_path / "float"), *arguments, "--json", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert "3 items of piqa.jsonl (sha256 " in out and "mean" in out and "piqa: 100 %" in err

    for against in (saved, tmp_path / "float"):
        file = tmp_path / "bent.json"
        options = [*arguments, "--limit", "2", "--against", str(against), "--json", str(file)]
        assert tasks.main([str(tmp_path / "bent"), *options]) == 0
        out = capsys.readouterr().out
        assert "Δ acc_norm" in out and "gained, lost" in out and "…" not in out  # nothing is cut
        data = json.loads(file.read_text())
        ours, reference = tasks.read_results(file), tasks.read_results(saved)
        compared = paired(ours, reference, "log_likelihood")
        written = data["paired"]["log_likelihood"]
        assert written["mean"]["mean"] == pytest.approx(compared.mean.mean) and compared.mean.mean != 0
        assert written["tasks"]["piqa"]["gained"] == compared.gained["piqa"]
        assert [item["line"] for item in data["tasks"]["piqa"]["items"]] == [1, 2]
    data = json.loads(saved.read_text())
    assert {**data, **json.loads(json.dumps(tasks.to_json(reference)))} == data
    assert data["batch_tokens"] == 1024 and data["backend"] == jax.default_backend()


def test_the_commands_errors(loading, tmp_path, capsys):
    path = write(tmp_path / "piqa.jsonl", CHOICE)

    def error(*options, data=tmp_path):
        assert tasks.main([str(tmp_path / "float"), "--data", str(data), *options]) == 1
        return capsys.readouterr().err

    assert "has no arc_easy, arc_challenge, winogrande, lambada_openai: it has piqa; choose with" in error()
    assert "holds the task piqa, not boolq" in error("--tasks", "boolq", data=path)
    assert "results none.json do not exist" in error("--against", "none.json", data=path)
    assert "its folder does not exist" in error("--json", str(tmp_path / "no" / "x.json"), data=path)
    (tmp_path / "other.json").write_text('{"format": "else"}')
    assert "does not hold results" in error("--against", str(tmp_path / "other.json"), data=path)
    (tmp_path / "other.json").write_text(
        json.dumps({"format": tasks.FORMAT, "version": 1, "tasks": {"a": {}}})
    )
    assert "are damaged: KeyError: 'file'" in error("--against", str(tmp_path / "other.json"), data=path)


def test_progress_says_what_is_left():
    now = [0.0]
    stream = io.StringIO()
    line = tasks.ProgressLine("piqa", stream, clock=lambda: now[0], every=30)
    for seconds, done in ((10, 1), (40, 4), (60, 6), (100, 10)):
        now[0] = seconds
        line(done, 10)
    assert stream.getvalue() == ("piqa:  40 %, 0:40 elapsed, about 1:00 left\npiqa: 100 %, 1:40 elapsed\n")
    live = io.StringIO()
    live.isatty = lambda: True
    line = tasks.ProgressLine("piqa", live, clock=lambda: now[0])
    now[0] = 4000.0
    line(1, 4)
    line(4, 4)
    first, second = live.getvalue().split("\r")[1:]
    assert first.rstrip() == "piqa:  25 %, 1:05:00 elapsed, about 3:15:00 left"
    assert second.endswith("\n") and len(second) == len(first) + 1
