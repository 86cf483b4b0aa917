"""The texts that ship with the package are what their hashes say, and calibration never sees evaluation."""

import hashlib
import re

import pytest

from torq_jax import data
from torq_jax.errors import TorqError

# A title stands between blank lines and has one "=" on each side; sections have two or more. One article's
# table legend (" = Goals ; A = ") has the same shape, and is told apart by its semicolon.
TITLE = re.compile(r"(?:(?<=\n)|\A) \n = (?!= )([^;\n]*) = \n \n")


def read(name: str) -> str:
    return data.path(name).read_bytes().decode("utf-8")


@pytest.mark.parametrize("name", data.SHA256)
def test_bytes_are_those_of_the_hash(name: str) -> None:
    assert hashlib.sha256(data.path(name).read_bytes()).hexdigest() == data.SHA256[name]


@pytest.mark.parametrize("name", data.SHA256)
def test_notice_quotes_hash_and_names_every_article(name: str) -> None:
    notice = " ".join(data.path(name).with_name("NOTICE").read_text(encoding="utf-8").split())
    assert data.SHA256[name] in notice
    for title in TITLE.findall(read(name)):
        assert title in notice


@pytest.mark.parametrize(("name", "articles"), [(data.CALIBRATION, 26), (data.EVALUATION, 11)])
def test_text_is_whole_articles(name: str, articles: int) -> None:
    text = read(name)
    assert len(TITLE.findall(text)) == articles
    assert text.startswith(" \n = ")  # the blank line before the first heading
    # The last paragraph and one blank line; the second blank line between articles belongs to the next one.
    assert text.endswith(" \n \n") and not text.endswith("\n \n \n")
    assert "\r" not in text and "<unk>" not in text


def test_texts_are_disjoint() -> None:
    calibration, evaluation = read(data.CALIBRATION), read(data.EVALUATION)
    assert not set(TITLE.findall(calibration)) & set(TITLE.findall(evaluation))
    # Headings such as "= = References = =" recur in any article; sentences must not.
    long_lines = [{line for line in text.split("\n") if len(line) > 80} for text in (calibration, evaluation)]
    assert min(map(len, long_lines)) > 300
    assert not long_lines[0] & long_lines[1]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TorqError, match=r"'c4.txt' .* one of wikitext2_calibration.txt"):
        data.path("c4.txt")
