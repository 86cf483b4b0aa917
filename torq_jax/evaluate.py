"""Perplexity, with its protocol: ``python -m torq_jax.evaluate DIR --text FILE``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from torq_jax import decoder, sharding
from torq_jax.compiled import compiled
from torq_jax.decoder import Decoder
from torq_jax.errors import TorqError

JOINS = ("raw", "rows")
LOGITS_CHUNK = 256
"""Tokens whose logits are held at a time; a large vocabulary makes them the largest array there is."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a perplexity was measured; two perplexities of different protocols cannot be compared."""

    file: str
    sha256: str
    joined: str
    """``"raw"``: the file as it is. ``"rows"``: lines joined by two newlines, as papers do with WikiText."""
    window: int
    windows: int
    bos: bool
    tokens_scored: int

    def __str__(self) -> str:
        return (
            f"{self.file} (sha256 {self.sha256[:12]}), joined {self.joined}, {self.windows} windows of "
            f"{self.window} tokens from its start, {'with' if self.bos else 'without'} BOS, "
            f"{self.tokens_scored} tokens scored"
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over items (windows, questions) and its standard error, not a number for less than two of them."""

    mean: float
    standard_error: float
    items: int


def read_text(path: str | Path, joined: str = "raw") -> tuple[str, str]:
    """A text and the sha256 of its file. ``.jsonl`` files give their ``text`` fields, joined by two newlines.

    Raises:
      TorqError: the file is missing, is not UTF-8 text, or has lines without a ``text`` field.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
            text = "\n\n".join(rows)
        elif joined == "rows":
            # Rows as the data set has them: each line with its end, an empty one as nothing.
            lines = io.StringIO(text, newline="\n")
            text = "\n\n".join(line if line.strip() else "" for line in lines)
    except FileNotFoundError:
        raise TorqError(f"text file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise TorqError(f"text file {path} cannot be read: {type(error).__name__}: {error}") from error
    return text, hashlib.sha256(data).hexdigest()


def tokenize(tokenizer: Any, text: str) -> Int32[np.ndarray, " n"]:
    """Token ids of a whole text, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.asarray(ids, np.int32)


def check_vocabulary(tokens: Int32[np.ndarray, "*n"], size: int) -> None:
    """Raise TorqError for a token outside a vocabulary of ``size``: its embedding would be another token's."""
    if tokens.size and int(tokens.max()) >= size:
        raise TorqError(
            f"token {int(tokens.max())} is outside the vocabulary of {size}: the tokenizer is not this model's"
        )


def cut(tokens: Int32[np.ndarray, " n"], window: int, count: int | None = None) -> Int32[np.ndarray, "w t"]:
    """The first ``count`` whole windows of the text, side by side; all that fit when None.

    Raises:
      TorqError: the text is too short for them, or there is nothing to score in them.
    """
    if window < 2 or (count is not None and count < 1):
        raise TorqError(
            f"cannot score {'all' if count is None else count} windows of {window} tokens: a window needs 2 tokens "
            "at least, the first being context only, and there must be a window"
        )
    fit = len(tokens) // window
    if fit < (1 if count is None else count):
        raise TorqError(
            f"the text has {len(tokens)} tokens, {fit} windows of {window}, but {count or 1} are needed: "
            "use a longer text, fewer windows or a smaller window"
        )
    count = fit if count is None else count
    return tokens[: count * window].reshape(count, window)


def estimate(values: Float[np.ndarray, " items"]) -> Estimate:
    """Mean of independent items, and its standard error from their sample variance."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(np.mean(values)), error, n)


def estimate_json(value: Estimate) -> dict[str, Any]:
    """An estimate as plain values."""
    error = None if math.isnan(value.standard_error) else value.standard_error
    return {"mean": value.mean, "standard_error": error, "items": value.items}


def log_probabilities(logits: Float[Array, "*b V"], targets: Int32[Array, "*b"]) -> Float[Array, "*b"]:
    """Logarithm of the probability that logits give to a target, in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames="eps")
def negative_log_likelihood(
    hidden: Float[Array, "b t H"],
    tokens: Int32[Array, "b t"],
    norm: Float[Array, " H"],
    head: Float[Array, "V H"],
    *,
    eps: float,
) -> Float[Array, "b t-1"]:
    """``-log p(token i + 1 | tokens 0 to i)`` in nats, from the residual stream after the last layer."""
    x, targets = hidden[:, :-1], tokens[:, 1:]
    b, t, h = x.shape
    chunks = -(-t // LOGITS_CHUNK)
    x = jnp.pad(x, ((0, 0), (0, chunks * LOGITS_CHUNK - t), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, chunks * LOGITS_CHUNK - t)))

    def score(chunk: tuple[Array, Array]) -> Array:
        return -log_probabilities(decoder.logits(chunk[0], norm, head, eps), chunk[1])

    split = (
        jnp.moveaxis(x.reshape(b, chunks, LOGITS_CHUNK, h), 1, 0),
        jnp.moveaxis(targets.reshape(b, chunks, LOGITS_CHUNK), 1, 0),
    )
    return jnp.moveaxis(jax.lax.map(score, split), 0, 1).reshape(b, -1)[:, :t]


def window_losses(
    model: Decoder, windows: Int32[np.ndarray, "w t"], *, kv: str | None = None, rotate: bool | None = None
) -> Float[np.ndarray, "w t-1"]:
    """Negative log-likelihood in nats of every token but the first of each window, each window on its own.

    Args:
      model: a decoder.
      windows: token ids.
      kv: a cache's format (:data:`torq_jax.cache.FORMATS`) through which every key and value goes, those of a token
        itself too, as in generation; None for the model's own, and without one for none.
      rotate: as in :meth:`~torq_jax.decoder.Decoder.init_cache`.

    Raises:
      TorqError: a token outside the vocabulary, or a format that the model cannot have.
    """
    kv = model.kv if kv is None else kv
    check_vocabulary(windows, model.config.vocab_size)
    programs, own, config = compiled(model), model.partition, model.config

    def run(tokens: Int32[Array, "b t"]) -> Float[Array, "b t-1"]:
        cache = None if kv is None else model.init_cache(*tokens.shape, kv=kv, rotate=rotate)
        hidden, _ = programs.hidden(tokens, cache)
        return _losses(own, config.norm_eps, hidden, tokens, programs.norm, programs.head)

    rows = 1 if own is None else own.batch(1)  # one on each part of a mesh's data axis
    parts = []
    for first in range(0, len(windows), rows):
        part = windows[first : first + rows]
        whole = np.concatenate(
            [part, np.repeat(part[:1], rows - len(part), axis=0)]
        )  # the last may lack some
        parts.append(np.asarray(run(sharding.put(own, whole, "batch", None)))[: len(part)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
    own: sharding.Partition | None, eps: float, hidden: Array, tokens: Array, norm: Array, head: Array
) -> Float[Array, "b t-1"]:
    return sharding.replicate(own, negative_log_likelihood(hidden, tokens, norm, head, eps=eps))


def read_windows(
    tokenizer: Any, path: str | Path, *, window: int, windows: int | None = None, joined: str = "raw"
) -> tuple[Int32[np.ndarray, "w t"], Protocol]:
    """The windows of a text file that a perplexity is measured on, and the protocol that says so.

    The whole text is tokenised once, without special tokens, and cut into windows side by side.

    Raises:
      TorqError: a text that cannot be read or is too short.
    """
    text, digest = read_text(path, joined)
    tokens = cut(tokenize(tokenizer, text), window, windows)
    count, window = tokens.shape
    return tokens, Protocol(Path(path).name, digest, joined, window, count, False, count * (window - 1))


def perplexity(
    model: Decoder,
    tokenizer: Any,
    path: str | Path,
    *,
    window: int = 1024,
    windows: int | None = None,
    joined: str = "raw",
) -> tuple[float, Protocol]:
    """Perplexity of ``model`` on a text file, and the protocol that gives it a meaning.

    Each window of :func:`read_windows` is scored on its own, its first token being context only.

    Raises:
      TorqError: as :func:`read_windows`, or a token outside the vocabulary.
    """
    tokens, protocol = read_windows(tokenizer, path, window=window, windows=windows, joined=joined)
    losses = window_losses(model, tokens)
    return float(np.exp(losses.mean(dtype=np.float64))), protocol


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    from torq_jax.checkpoint import add_inference_options, load

    parser = argparse.ArgumentParser("python -m torq_jax.evaluate", description=__doc__)
    parser.add_argument("directory", help="checkpoint that python -m convert wrote")
    parser.add_argument("--text", required=True, help="UTF-8 text, or .jsonl with a field 'text' a line")
    parser.add_argument("--window", type=int, default=1024, help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, help="how many windows, from the start (default: all)")
    parser.add_argument("--joined", choices=JOINS, default="raw", help="how the file becomes one text")
    add_inference_options(parser)
    options = parser.parse_args(argv)
    try:
        model, tokenizer, _ = load(
            options.directory, kv=options.kv, dequantize=False if options.packed else None, mesh=options.mesh
        )
        if tokenizer is None:
            raise TorqError(f"{options.directory} has no tokenizer: text cannot be scored")
        value, protocol = perplexity(
            model,
            tokenizer,
            options.text,
            window=options.window,
            windows=options.windows,
            joined=options.joined,
        )
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"perplexity {value:.4f}\nprotocol   {protocol}")
    if options.kv is not None:
        print(f"kv cache   {options.kv}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that there is no torch
    sys.exit(main())
