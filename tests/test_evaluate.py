"""Texts, windows and losses of the perplexity; its values are tested against Hugging Face's in test_convert."""

import numpy as np
import pytest

from tests.test_decoder import golden_model
from torq_jax.errors import TorqError
from torq_jax.evaluate import cut, read_text, window_losses


def test_rows_are_joined_as_the_data_set_has_them(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" = Title = \n\n one \n", newline="")
    assert read_text(path, "rows")[0] == " = Title = \n\n\n\n\n one \n"
    path.write_text("one\nlast, with no line end", newline="")
    assert read_text(path, "rows")[0] == "one\n\n\nlast, with no line end"
    assert read_text(path)[0] == "one\nlast, with no line end"


def test_jsonl_gives_its_text_fields(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(path)[0] == "one\n\ntwo"
    for line in ('{"txt": "one"}', '{"text": 1}', "[]", "one"):
        path.write_text(line)
        with pytest.raises(TorqError, match=r"text\.jsonl cannot be read"):
            read_text(path)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(TorqError, match="cannot be read: IsADirectoryError"):
        read_text(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x80")
    with pytest.raises(TorqError, match="cannot be read: UnicodeDecodeError"):
        read_text(tmp_path / "binary")


@pytest.mark.parametrize(("window", "count"), [(1, None), (0, None), (-5, None), (4, 0), (4, -1)])
def test_windows_with_nothing_to_score(window, count):
    with pytest.raises(
        TorqError, match=f"cannot score {'all' if count is None else count} windows of {window} "
    ):
        cut(np.arange(10, dtype=np.int32), window, count)


def test_windows_lie_side_by_side():
    tokens = np.arange(10, dtype=np.int32)
    np.testing.assert_array_equal(cut(tokens, 4), [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(cut(tokens, 4, 1), [[0, 1, 2, 3]])
    with pytest.raises(TorqError, match="10 tokens, 2 windows of 4, but 3 are needed"):
        cut(tokens, 4, 3)


def test_a_token_outside_the_vocabulary():
    with pytest.raises(TorqError, match="token 288 is outside the vocabulary of 288"):
        window_losses(golden_model("llama3"), np.array([[1, 288]], np.int32))
