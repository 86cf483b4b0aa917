"""Calibration tokens: what the named data sets give, how sequences are drawn, and what stops a conversion."""

import gzip
import hashlib
import json
import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from convert import calibration, fetch
from tests.hub_server import serve, unreachable
from torq_jax.errors import ConversionError, TorqError

WIKITEXT2 = "wikitext-2-raw-v1/train-00000-of-00001.parquet"
C4 = "en/c4-train.00000-of-01024.json.gz"
ROWS = ["", " = Title = \n", "First row, naïve. \n", "", "Last row. \n"]


def characters(text, **options):
    """Stands in for a tokenizer: a token is a character's code, so that tokens give the text back."""
    return {"input_ids": [ord(character) for character in text]}


def text_of(tokens):
    return "".join(map(chr, tokens.ravel()))


def load(source, *, tokenizer=characters, vocab_size=0x110000, samples=1, sequence_length=16, seed=0):
    return calibration.load(
        str(source), tokenizer, vocab_size, samples=samples, sequence_length=sequence_length, seed=seed
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose data sets are the directories returned here by name."""
    with serve(tmp_path / "hf", monkeypatch) as server:
        server.models = {
            "datasets/Salesforce/wikitext": tmp_path / "wikitext",
            "datasets/allenai/c4": tmp_path / "c4",
        }
        for repository, name in (("wikitext", WIKITEXT2), ("c4", C4)):
            (tmp_path / repository / name).parent.mkdir(parents=True)
        server.wikitext2, server.c4 = tmp_path / "wikitext" / WIKITEXT2, tmp_path / "c4" / C4
        pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), server.wikitext2)
        with gzip.open(server.c4, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": row, "url": "http://there"}) + "\n" for row in ROWS)
        yield server


# --- the named data sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"), [("wikitext2", f"Salesforce/wikitext {WIKITEXT2}"), ("c4", f"allenai/c4 {C4}")]
)
def test_rows_of_a_hub_data_set_are_joined_by_two_newlines(hub, source, name):
    text = "\n\n".join(ROWS)
    got = load(source, sequence_length=len(text))
    assert text_of(got.tokens) == text
    assert got.tokens.dtype == np.int32 and got.source == name
    assert got.sha256 == hashlib.sha256(getattr(hub, source).read_bytes()).hexdigest()
    assert got.to_json() == {
        "source": name,
        "sha256": got.sha256,
        "sequences": 1,
        "sequence_length": len(text),
        "tokens": len(text),
    }
    hub.requests.clear()
    load(source)
    assert not [path for method, path in hub.requests if method == "GET"]  # it is in the cache now


def test_c4_is_read_no_further_than_needed(hub, monkeypatch):
    monkeypatch.setattr(calibration, "_C4_DOCUMENTS", 2)
    text = "\n\n".join(ROWS[:2])
    assert text_of(load("c4", sequence_length=len(text)).tokens) == text
    with pytest.raises(ConversionError, match=f"c4 {C4} has {len(text)} tokens"):
        load("c4", sequence_length=len(text) + 1)


def test_an_unreachable_hub_is_told_once_and_in_our_words(hub, monkeypatch, caplog):
    port = unreachable(monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the library, 23 s in all
    with pytest.raises(
        ConversionError, match=f"data set Salesforce/wikitext from .*127.0.0.1:{port}"
    ) as caught:
        load("wikitext2")
    assert "--calibration bundled" in str(caught.value) and "check network" in str(caught.value)
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]


def test_the_hub_s_log_is_quiet_during_a_call_only(hub):
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    with fetch._quiet_hub():
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    assert logger.level == before
    hub.models.clear()
    with pytest.raises(ConversionError):
        load("c4")
    assert logger.level == before


def test_a_data_set_that_the_hub_does_not_have(hub):
    hub.c4.unlink()
    with pytest.raises(ConversionError, match=f"cannot download {C4} of the data set allenai/c4"):
        load("c4")


def json_lines(*lines):
    return gzip.compress("".join(f"{line}\n" for line in lines).encode())


def damaged_deflate(data):
    return data[:30] + bytes(byte ^ 0xFF for byte in data[30:40]) + data[40:]


@pytest.mark.parametrize(
    ("source", "damage"),
    [
        ("wikitext2", lambda data: data[:-20]),
        ("wikitext2", lambda data: b""),
        ("wikitext2", lambda data: b"<html>not here</html>"),
        ("c4", lambda data: data[:-30]),
        ("c4", lambda data: data[:3]),
        ("c4", lambda data: b"<html>not here</html>"),
        ("c4", damaged_deflate),
        ("c4", lambda data: json_lines("{no json")),
        ("c4", lambda data: json_lines('{"title": "no text"}')),
        ("c4", lambda data: json_lines("[1, 2]")),
        ("c4", lambda data: json_lines('{"text": 7}')),
        ("c4", lambda data: gzip.compress(b'{"text": "\xff\xff"}\n')),
    ],
)
def test_damaged_files_of_data_sets_are_named_and_can_be_fetched_anew(hub, source, damage):
    file = getattr(hub, source)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.raises(ConversionError, match=rf"{file.name} cannot be read \(\w+: ") as caught:
        load(source)
    file.write_bytes(whole)
    # The remedy in the message works: without the file it names, the whole one is fetched.
    remedy = str(caught.value).split(": delete ")[1].split(" and run again")[0]
    fetch.Path(remedy).unlink()
    assert load(source).tokens.shape == (1, 16)


@pytest.mark.parametrize("column", [{"content": ROWS}, {"text": [*ROWS, None]}, {"text": [1, 2]}])
def test_parquet_without_a_column_of_text(hub, column):
    pyarrow.parquet.write_table(pyarrow.table(column), hub.wikitext2)
    with pytest.raises(ConversionError, match=f"{hub.wikitext2.name} cannot be read"):
        load("wikitext2")


# --- the draw ---------------------------------------------------------------------------------------------


def test_random_tokens_are_those_of_their_seed():
    settings = {"tokenizer": None, "vocab_size": 300, "samples": 4, "sequence_length": 64}
    first, again = (load("random", seed=1, **settings) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != load("random", seed=2, **settings).sha256
    assert first.tokens.shape == (4, 64) and first.tokens.dtype == np.int32
    assert first.tokens.min() >= 0 and first.tokens.max() < 300
    assert first.source == "random tokens"


def test_sequences_are_windows_of_the_text_that_do_not_overlap(tmp_path):
    # Every character occurs once, so a token tells its place.
    (tmp_path / "text.txt").write_text("".join(map(chr, range(0x100, 0x100 + 1003))), encoding="utf-8")
    settings = {"samples": 37, "sequence_length": 10}
    places = load(tmp_path / "text.txt", seed=3, **settings).tokens - 0x100
    np.testing.assert_array_equal(places, places[:, :1] + np.arange(10))
    assert (np.diff(places[:, 0]) >= 10).all() and (places[:, 0] % 10 == 0).all()
    again = load(tmp_path / "text.txt", seed=3, **settings).tokens - 0x100
    np.testing.assert_array_equal(places, again)
    assert (places != load(tmp_path / "text.txt", seed=4, **settings).tokens - 0x100).any()
    every = load(tmp_path / "text.txt", samples=100, sequence_length=10).tokens - 0x100
    np.testing.assert_array_equal(every.ravel(), np.arange(1000))


def test_the_bundled_text_and_json_lines(tmp_path):
    assert load("bundled").source.startswith("bundled ")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    text = "\n\n".join(ROWS)
    got = load(tmp_path / "text.jsonl", sequence_length=len(text))
    assert text_of(got.tokens) == text and got.source == "text.jsonl"


# --- what stops it ----------------------------------------------------------------------------------------


def test_errors(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("x" * 99)
    with pytest.raises(
        ConversionError, match=r"short.txt has 99 tokens, enough for 9 sequences of 10, but 10 are"
    ):
        load(file, samples=10, sequence_length=10)
    with pytest.raises(ConversionError, match=r"short.txt: token 120 is outside the vocabulary of 120"):
        load(file, vocab_size=120)
    assert load(file, vocab_size=121).tokens.max() == 120
    with pytest.raises(ConversionError, match=r"no tokenizer.*--calibration random"):
        load(file, tokenizer=None)
    with pytest.raises(ConversionError, match=r"absent.txt' is neither a file nor one of bundled, wikitext2"):
        load(tmp_path / "absent.txt")
    for settings in ({"samples": 0}, {"sequence_length": 1}):
        with pytest.raises(ConversionError, match="cannot calibrate on"):
            load("random", **settings)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TorqError, match=r"short.txt cannot be read"):
        load(file)
