"""The adapter under lm-eval's own evaluator against our scores; all but the first test need the extra ``eval``."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.test_decoder import GOLDENS, golden_model
from tests.test_tasks import rounded_model
from torq_jax import tasks
from torq_jax.errors import TorqError
from torq_jax.evaluate import window_losses
from torq_jax.generate import generate_tokens
from torq_jax.likelihood import model_scorer

CHOICES = [
    {"context": "Question: What barks?\nAnswer:", "choices": ["a dog", "the cat sat", "sky"], "answer": 0},
    {"context": "Question: What flies?\nAnswer: ", "choices": ["no", "the bird that sings "], "answer": 1},
    {"context": "", "choices": ["with nothing before", "é, ü and 中"], "answer": 0},
]
PARTIAL = [
    {"context": "", "choices": ["the cat so it", "the big dog so it"], "target": " barks.", "answer": 1},
    {"context": "", "choices": ["Ann is late so Ann", "Ann is late so Bob"], "target": " runs", "answer": 0},
]
LAST_WORDS = [
    {"context": "The capital of France is", "target": " Paris"},
    {"context": "in two parts, the last of", "target": " the\n\nlines"},
]


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "torq_jax.lm_eval_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install 'torq-jax\[eval\]'"):
        importlib.import_module("torq_jax.lm_eval_adapter")


@pytest.fixture(scope="module")
def adapter():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'torq-jax[eval]')")
    return importlib.import_module("torq_jax.lm_eval_adapter")


@pytest.fixture(scope="module")
def lm(adapter):
    return adapter.TorqLM(
        model=golden_model("llama3"), tokenizer=AutoTokenizer.from_pretrained(GOLDENS / "llama3")
    )


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.mark.parametrize("make", [golden_model, rounded_model], ids=["float", "rounded"])
def test_lm_eval_gives_our_numbers(adapter, lm, tmp_path, monkeypatch, make):
    """Items, contexts, continuations and accuracies by lm-eval; log-likelihoods of each pair as ours."""
    lm = adapter.TorqLM(model=make("llama3"), tokenizer=lm.tokenizer)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = {}
    for name, items in {"choice": CHOICES, "partial": PARTIAL, "word": LAST_WORDS}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")

    from lm_eval import simple_evaluate

    theirs = simple_evaluate(lm, tasks=[adapter.task_config(f) for f in files.values()], bootstrap_iters=0)
    ours_by = model_scorer(lm.model)
    for name, file in files.items():
        ours = tasks.score(ours_by, tasks.read_task(file), lm.tokenizer, 128)
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(ours.items)
        for sample, item in zip(samples, ours.items, strict=True):
            found = [response for (response,) in sample["resps"]]
            # lm-eval hands over the requests of all tasks at once, and ours go task by task: the shapes do not
            # depend on that, so that the bits are the same. Another token would be worth some nats.
            assert tuple(value for value, _ in found) == item.log_likelihoods
            assert tuple(greedy for _, greedy in found) == item.greedy
            assert sample["acc"] == item.acc
            if item.acc_norm is not None:
                assert sample["acc_norm"] == item.acc_norm
        means = theirs["results"][name]
        assert means["acc,none"] == tasks.values(ours).mean()
        if name == "word":
            assert means["perplexity,none"] == pytest.approx(tasks.perplexity(ours), rel=1e-5)
    assert len(theirs["samples"]["choice"]) == 3


def test_rolling_windows_cover_a_text_once(adapter, lm):
    text = "a text that is somewhat longer than thirty-two tokens, so that windows must roll over it"
    tokens = [lm.prefix_token_id, *lm.tokenizer.encode(text)]
    assert 33 < len(tokens) <= 128
    (whole,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    expected = -window_losses(lm.model, np.array([tokens], np.int32)).sum(dtype=np.float64)
    assert whole == pytest.approx(expected, abs=1e-5 * len(tokens))  # as TOKEN_ERROR of test_tasks

    short = adapter.TorqLM(model=lm.model, tokenizer=lm.tokenizer, max_length=32)
    rolled, again = short.loglikelihood_rolling(requests((text,), (text,)), disable_tqdm=True)
    assert rolled == pytest.approx(again) and abs(rolled - whole) > 1e-2
    assert short.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0.0]


def test_generation_stops_before_a_stop_sequence(lm):
    ids = lm.tokenizer.encode("the quick")
    made = list(generate_tokens(lm.model, ids, max_tokens=20))
    text = lm.tokenizer.decode(made, skip_special_tokens=True)
    stop = text[6:9]
    settings = [{"max_gen_toks": 20, "do_sample": False}, {"max_gen_toks": 20, "until": [stop]}]
    whole, stopped = lm.generate_until(requests(*(("the quick", s) for s in settings)), disable_tqdm=True)
    assert whole == text and stopped == text[: text.index(stop)]
    with pytest.raises(TorqError, match="no setting num_beams"):
        lm.generate_until(requests(("the quick", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(TorqError, match="200 new tokens leave no room"):
        lm.generate_until(requests(("the quick", {"max_gen_toks": 200})), disable_tqdm=True)


def test_the_model_is_registered_and_checks_its_settings(adapter, lm):
    from lm_eval.api.registry import get_model

    assert get_model("torq_jax") is adapter.TorqLM
    for settings, message in (
        ({}, "either a checkpoint or a model"),
        ({"model": lm.model}, "the model has no tokenizer"),
        ({"model": lm.model, "tokenizer": lm.tokenizer, "max_length": 129}, "max_length 129 must be 2 to"),
    ):
        with pytest.raises(TorqError, match=message):
            adapter.TorqLM(**settings)
    assert "hello" in lm.apply_chat_template([{"role": "user", "content": "hello"}])


def test_a_file_of_several_forms_is_no_lm_eval_task(adapter, tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in (*CHOICES, *PARTIAL)))
    with pytest.raises(TorqError, match="items of more than one form"):
        adapter.task_config(file)
