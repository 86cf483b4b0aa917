"""Calibration tokens: from a file, from the text that ships with the package, from a hub data set, or random."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from convert import fetch
from torq_jax import data, evaluate
from torq_jax.errors import ConversionError

NAMED = ("bundled", "wikitext2", "c4", "random")

# Where the named data sets lie on the hub, and the files in them.
_HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
}
_C4_DOCUMENTS = 20000  # of the 356,317 in the first file; about ten million tokens


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Token ids to calibrate on, and where they are from."""

    source: str
    sha256: str
    """Of the text's file; of the ids themselves for random ones."""
    tokens: Int32[np.ndarray, "sequences length"]

    def to_json(self) -> dict[str, Any]:
        """For the report and the manifest."""
        sequences, length = self.tokens.shape
        return {
            "source": self.source,
            "sha256": self.sha256,
            "sequences": sequences,
            "sequence_length": length,
            "tokens": sequences * length,
        }


def load(
    source: str, tokenizer: Any, vocab_size: int, *, samples: int, sequence_length: int, seed: int
) -> Calibration:
    """Draw ``samples`` sequences of ``sequence_length`` tokens, without overlap.

    Args:
      source: one of :data:`NAMED`, or a text file (``.txt``, or ``.jsonl`` with a field ``text``).
      tokenizer: a transformers tokenizer; not needed for random tokens.
      vocab_size: ids must lie below it.
      samples: sequences to draw.
      sequence_length: tokens of each.
      seed: of the draw.

    Raises:
      ConversionError: too little text, a text that cannot be had, or a token outside the vocabulary.
    """
    if samples < 1 or sequence_length < 2:
        raise ConversionError(f"cannot calibrate on {samples} sequences of {sequence_length} tokens")
    generator = np.random.default_rng(seed)
    if source == "random":
        ids = generator.integers(0, vocab_size, (samples, sequence_length), dtype=np.int32)
        return Calibration("random tokens", hashlib.sha256(ids.tobytes()).hexdigest(), ids)
    if tokenizer is None:
        raise ConversionError(
            "the source has no tokenizer, so text cannot calibrate it: add one, or pass --calibration random "
            "(which tests shapes and memory, not accuracy)"
        )
    text, digest, name = _text(source)
    ids = evaluate.tokenize(tokenizer, text)
    if ids.size and int(ids.max()) >= vocab_size:
        raise ConversionError(f"{name}: token {int(ids.max())} is outside the vocabulary of {vocab_size}")
    fit = len(ids) // sequence_length
    if fit < samples:
        raise ConversionError(
            f"{name} has {len(ids)} tokens, enough for {fit} sequences of {sequence_length}, but {samples} are "
            "needed: give a longer text with --calibration, or lower --samples or --sequence-length"
        )
    chosen = np.sort(generator.choice(fit, samples, replace=False))
    windows = ids[: fit * sequence_length].reshape(fit, sequence_length)[chosen]
    return Calibration(name, digest, windows)


def _text(source: str) -> tuple[str, str, str]:
    """Text, sha256 of its file, and its name."""
    if source == "bundled":
        text, digest = evaluate.read_text(data.path(data.CALIBRATION))
        return text, digest, f"bundled {data.CALIBRATION}"
    if source in _HUB:
        repository, file = _HUB[source]
        text, digest = _read_hub_file(fetch.download_dataset_file(repository, file))
        return text, digest, f"{repository} {file}"
    if not Path(source).is_file():
        raise ConversionError(f"calibration text {source!r} is neither a file nor one of {', '.join(NAMED)}")
    text, digest = evaluate.read_text(source)
    return text, digest, Path(source).name


def _read_hub_file(path: Path) -> tuple[str, str]:
    """Text of a data set's file, and the file's sha256."""
    import pyarrow

    read = _parquet_text if path.suffix == ".parquet" else _json_text
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return read(path), digest
    # Each of these readers has its own errors for damage: truncated, not of this format, without the field.
    except (pyarrow.ArrowException, zlib.error, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{path} cannot be read ({type(error).__name__}: {reason}): delete {path.resolve()} and run again, which "
            "fetches it anew"
        ) from error


def _parquet_text(path: Path) -> str:
    import pyarrow.parquet

    # The papers' protocol: rows joined by two newlines.
    return "\n\n".join(pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist())


def _json_text(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line)["text"] for line in itertools.islice(lines, _C4_DOCUMENTS)]
    return "\n\n".join(rows)
