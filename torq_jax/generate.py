"""Text from a converted model: ``python -m torq_jax.generate DIR --prompt "..."``.

Prompts of a batch are padded on the right, so that a token's slot in the cache is its position, and every row keeps
its own length. Prompts enter in pieces of few lengths and the cache has few lengths (:func:`bucket`): what is
compiled once serves all prompts of like size, and any settings, which are data.

Letters in shapes: b rows, t tokens of a piece of the prompts, H hidden size, V vocabulary, e ids that end a text.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from torq_jax import cache as kv_cache
from torq_jax import detokenize
from torq_jax.cache import KVCache
from torq_jax.compiled import Compiled, compiled
from torq_jax.decoder import Decoder, logits
from torq_jax.errors import TorqError
from torq_jax.sampling import RowSettings, Sampling, choose, row_settings, sample
from torq_jax.sharding import Partition, constrain, put, replicate

__all__ = [
    "Generated",
    "Piece",
    "Sampling",
    "chat_prompt",
    "generate",
    "generate_tokens",
    "sample",
    "stream",
    "stream_text",
]

_log = logging.getLogger(__name__)

SMALLEST_BUCKET = 64
"""Tokens; see :func:`bucket`."""
PREFILL = 512
"""Most tokens of each prompt that enter the model at a time."""

Stop = Literal["eos", "stop", "length", "positions"]
"""Why a row ended: an end-of-sequence token, a stop string, ``max_tokens``, or no positions left in the model."""


class Piece(NamedTuple):
    """One token of one row as it is made."""

    row: int
    """Index of the prompt."""
    token: int | None
    """None where a row ends without any (``max_tokens`` 0)."""
    text: str
    """What can be written now: empty within a character or where a stop string may be beginning; always empty without
    a tokenizer."""
    stopped: Stop | None
    """On a row's last piece, why it is the last."""


class Generated(NamedTuple):
    """What a row made."""

    tokens: tuple[int, ...]
    """All tokens, those of an end-of-sequence token or a stop string too."""
    text: str | None
    """Their text without special tokens, before the stop string; None without a tokenizer."""
    stopped: Stop


def generate(
    model: Decoder,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 - frozen
    *,
    tokenizer: Any = None,
    special_tokens: bool = True,
    batch: int | None = None,
    kv: str | None = None,
) -> list[Generated]:
    """What follows each of several prompts, which are run together.

    A row's tokens do not depend on the other rows, as far as sums of floats in another order leave logits the same.

    Args:
      model: a decoder.
      prompts: texts, or lists of token ids; of any lengths.
      sampling: of all rows, or one for each prompt. Equal prompts of equal seeds make equal texts: for several
        texts from one prompt give each row its own seed.
      tokenizer: the model's; needed for texts and stop strings.
      special_tokens: let the tokenizer add its own to prompts that are texts; not for a :func:`chat_prompt`, which
        holds them already.
      batch: most prompts that run together; all when None. With fewer, the last batch is filled up with empty rows.
        On a mesh, every batch is filled up to what divides evenly.
      kv: what keys and values are stored in, one of :data:`torq_jax.cache.FORMATS`; None for the model's own.

    Returns:
      One result for each prompt, in order.

    Raises:
      TorqError: prompts that are no list, an empty one, one longer than the model's positions, a token outside the
        vocabulary, texts or stop strings without a tokenizer, not as many samplings as prompts, or a cache format
        that the model cannot have.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    stopped: dict[int, Stop] = {}
    pieces = stream(
        model, prompts, sampling, tokenizer=tokenizer, special_tokens=special_tokens, batch=batch, kv=kv
    )
    for piece in pieces:
        if piece.token is not None:
            tokens[piece.row].append(piece.token)
        texts[piece.row].append(piece.text)
        if piece.stopped is not None:
            stopped[piece.row] = piece.stopped
    return [
        Generated(tuple(tokens[row]), None if tokenizer is None else "".join(texts[row]), stopped[row])
        for row in range(len(prompts))
    ]


def stream(
    model: Decoder,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 - frozen
    *,
    tokenizer: Any = None,
    special_tokens: bool = True,
    batch: int | None = None,
    kv: str | None = None,
) -> Iterator[Piece]:
    """As :func:`generate`, but each token as it is made: one of every row that still goes on, and again.

    A warning in the log says which rows fill the model's positions before they have made ``max_tokens``.

    Raises:
      TorqError: as :func:`generate`, before anything is made.
    """
    if isinstance(prompts, str):
        raise TorqError(f"prompts is one text, {prompts[:40]!r}: put it into a list")
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(prompts):
        raise TorqError(f"{len(samplings)} samplings for {len(prompts)} prompts: give one, or one for each")
    if batch is not None and batch < 1:
        raise TorqError(f"batch is {batch}: must be 1 at least")
    if tokenizer is None and any(s.stop for s in samplings):
        raise TorqError("stop strings need the tokenizer: pass tokenizer=")
    kv_cache.check_format(kv, model.config.head_dim)
    encoded = [_encode(p, tokenizer, special_tokens) for p in prompts]
    for tokens in encoded:
        _check(tokens, model)
    rows = batch or max(1, len(prompts))
    rows = rows if model.partition is None else model.partition.batch(rows)
    return _stream(model, encoded, samplings, tokenizer, rows, kv)


def generate_tokens(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids that follow ``prompt``, as they are made.

    Stops after an end-of-sequence token or ``max_tokens``; and, with a warning in the log, when prompt and tokens
    fill the model's ``max_position_embeddings``.

    Args:
      model: a decoder.
      prompt: token ids, one at least.
      max_tokens: and the others as in :class:`~torq_jax.sampling.Sampling`.

    Raises:
      TorqError: an empty prompt, one longer than the model's positions, a token outside the vocabulary, or a
        setting out of range.
    """
    settings = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    pieces = stream(model, [prompt], settings)
    return (piece.token for piece in pieces if piece.token is not None)


def stream_text(
    model: Decoder, tokenizer: Any, prompt: str, *, special_tokens: bool = True, **settings: Any
) -> Iterator[str]:
    """Pieces of the text that follows ``prompt``, as they are made.

    Args:
      model: a decoder.
      tokenizer: its tokenizer.
      prompt: text to go on from.
      special_tokens: let the tokenizer add its own; not for a :func:`chat_prompt`, which holds them already.
      **settings: as in :class:`~torq_jax.sampling.Sampling`.

    Raises:
      TorqError: as :func:`generate_tokens`.
    """
    pieces = stream(model, [prompt], Sampling(**settings), tokenizer=tokenizer, special_tokens=special_tokens)
    return (piece.text for piece in pieces if piece.text)


def chat_prompt(tokenizer: Any, messages: str | Sequence[Mapping[str, str]], **variables: Any) -> str:
    """A conversation in the model's own chat template, up to where its next answer begins.

    Args:
      tokenizer: the model's.
      messages: one user's turn as a text, or several turns, each ``{"role": "system" | "user" | "assistant",
        "content": text}``.
      **variables: what the template knows besides, e.g. ``enable_thinking=False`` for Qwen3.

    Raises:
      TorqError: the tokenizer has no chat template, or the template refuses the messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise TorqError("the tokenizer has no chat template: leave --chat out")
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    for turn in turns:
        if not {"role", "content"} <= turn.keys():
            raise TorqError(f"a turn has {', '.join(turn) or 'nothing'}: it needs a role and a content")
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise TorqError(f"the chat template refuses turns of {roles}: {error}") from error


def bucket(length: int) -> int:
    """The length that stands for ``length`` in compiled shapes: 64, 96, 128, 192, 256, 384, ...

    At most half as long again, and two for each doubling.
    """
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size * 3 // 4 if size > SMALLEST_BUCKET and length <= size * 3 // 4 else size


# What follows runs a batch. Rows end on the device by themselves where tokens say so; a stop string is seen on the
# host, which tells the next step.


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How far each row is."""

    token: Int32[Array, " b"]
    """The last token made; it is not in the cache yet."""
    made: Int32[Array, " b"]
    """Tokens made."""
    done: Bool[Array, " b"]


@dataclasses.dataclass(frozen=True)
class _Ends:
    """Where rows end."""

    limit: Int32[Array, " b"]
    """Tokens that a row may make."""
    eos: Int32[Array, " e"]


_SEEN = ("batch", "vocab")
"""Logical axes of which tokens each row has, on a mesh."""

jax.tree_util.register_dataclass(_Rows, ["token", "made", "done"], [])
jax.tree_util.register_dataclass(_Ends, ["limit", "eos"], [])


@functools.partial(jax.jit, static_argnums=0)
def _last(
    own: Partition | None,
    hidden: Float[Array, "b t H"],
    length: Int32[Array, "*b"],
    last: Float[Array, "b H"],
    lengths: Int32[Array, " b"],
) -> Float[Array, "b H"]:
    """``last`` with the rows whose prompt ends in this piece, after which the cache has ``length`` tokens."""
    t = hidden.shape[1]
    at = lengths - 1 - (length - t)
    ends = (at >= 0) & (at < t)
    found = jnp.take_along_axis(hidden, jnp.clip(at, 0, t - 1)[:, None, None], axis=1)[:, 0]
    return constrain(own, jnp.where(ends[:, None], found, last), "batch", None)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _stepped(
    own: Partition | None, length: Int32[Array, " b"], rows: _Rows, stopped: Bool[Array, " b"]
) -> tuple[Int32[Array, " b"], _Rows]:
    """The cache's length after a step: rows that are done, or that the host has stopped, keep theirs.

    Returns it, and the rows, those that were stopped done.
    """
    rows = dataclasses.replace(rows, done=rows.done | stopped)
    return replicate(own, (length - rows.done, rows))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _choose(
    own: Partition | None,
    eps: float,
    norm: Float[Array, " H"],
    head: Float[Array, "V H"],
    hidden: Float[Array, "b H"],
    seen: Bool[Array, "b V"],
    rows: _Rows,
    settings: RowSettings,
    ends: _Ends,
) -> tuple[Bool[Array, "b V"], _Rows]:
    """The next token of each row, from the residual stream at its last.

    A program of its own: it takes as long to compile as the layers, and serves prefill and decode at any length.
    """
    token = choose(logits(hidden, norm, head, eps), seen, rows.made, settings)
    token = jnp.where(rows.done, rows.token, token)
    made = rows.made + ~rows.done
    seen = seen.at[jnp.arange(len(token)), token].set(True)
    done = rows.done | jnp.isin(token, ends.eos) | (made >= ends.limit)
    return constrain(own, seen, *_SEEN), replicate(own, _Rows(token, made, done))


def _stream(
    model: Decoder,
    prompts: list[list[int]],
    samplings: list[Sampling],
    tokenizer: Any,
    batch: int,
    kv: str | None,
) -> Iterator[Piece]:
    programs = compiled(model)
    positions = model.config.max_position_embeddings
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        for piece in _run(model, programs, prompts[part], samplings[part], tokenizer, batch, kv):
            row = first + piece.row
            if piece.stopped == "positions":
                _log.warning(
                    "%sstopped after %d of %d tokens: prompt and text fill the model's %d positions",
                    f"row {row} of {len(prompts)} " if len(prompts) > 1 else "",
                    _room(prompts[row], positions),
                    samplings[row].max_tokens,
                    positions,
                )
            yield piece._replace(row=row)


def _room(prompt: Sequence[int], positions: int) -> int:
    """Tokens that can follow a prompt. The last one is never read again and so needs no position."""
    return positions - len(prompt) + 1


def _run(
    model: Decoder,
    programs: Compiled,
    prompts: list[list[int]],
    samplings: list[Sampling],
    tokenizer: Any,
    batch: int,
    kv: str | None,
) -> Iterator[Piece]:
    """The pieces of one batch, of ``batch`` rows of which those after the prompts are empty."""
    positions, eos = model.config.max_position_embeddings, model.config.eos_token_ids
    limits = [min(s.max_tokens, _room(p, positions)) for p, s in zip(prompts, samplings, strict=True)]
    endings = [
        _Ending(s, tokenizer, eos, limit, _stop_tokens(s.stop, tokenizer))
        for s, limit in zip(samplings, limits, strict=True)
    ]
    live = [row for row, limit in enumerate(limits) if limit]
    yield from (Piece(row, None, "", "length") for row, limit in enumerate(limits) if not limit)
    if not live:
        return

    empty = batch - len(prompts)
    filled, bounds = [*prompts, *[[0]] * empty], np.array([*limits, *[0] * empty], np.int32)
    on_device = functools.partial(put, model.partition)
    settings = on_device(row_settings([*samplings, *[Sampling()] * empty]))
    ends = _Ends(on_device(bounds), on_device(np.array(eos or [-1], np.int32)))
    none = on_device(np.zeros(batch, np.int32))
    rows = _Rows(none, none, on_device(bounds == 0))
    own = model.partition
    cache, last, seen = _prompts_read(model, programs, filled, bounds, kv)
    chosen = functools.partial(_choose, own, model.config.norm_eps, programs.norm, programs.head)
    seen, rows = chosen(last, seen, rows, settings, ends)

    stopped = np.zeros(batch, bool)
    pending = [detokenize.Pending()] * len(prompts)

    def step(rows: _Rows) -> _Rows:
        nonlocal cache, seen
        known = on_device(stopped.copy())  # the array itself goes on changing
        hidden, filled = programs.hidden(jnp.expand_dims(rows.token, 1), cache)
        assert filled is not None  # there was one
        length, rows = _stepped(own, filled.length, rows, known)
        cache = dataclasses.replace(filled, length=length)
        seen, rows = chosen(jnp.squeeze(hidden, 1), seen, rows, settings, ends)
        return rows

    for made in range(1, max(limits) + 1):
        # The next step is under way while the host reads and writes this one's tokens; but the first token does not
        # wait for the step to be compiled.
        ahead = step(rows) if made > 1 and any(limits[row] > made for row in live) else None
        tokens = np.asarray(rows.token)
        for row in list(live):
            token = int(tokens[row])
            pending[row], text, why = endings[row].push(pending[row], token, made)
            if why is not None:
                live.remove(row)
                stopped[row] = True
            yield Piece(row, token, text, why)
        if not live:
            return
        rows = step(rows) if ahead is None else ahead


def _prompts_read(
    model: Decoder,
    programs: Compiled,
    prompts: list[list[int]],
    limits: Int32[np.ndarray, " b"],
    kv: str | None,
) -> tuple[KVCache, Float[Array, "b H"], Bool[Array, "b V"]]:
    """Run the prompts.

    Returns a cache that holds them, with room for the tokens to come, the residual stream at the last token of each,
    and which tokens each has.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    starts = range(0, int(lengths.max()), PREFILL)
    widths = [min(PREFILL, bucket(int(lengths.max()) - start)) for start in starts]
    tokens = np.zeros((len(prompts), sum(widths)), np.int32)
    seen = np.zeros((len(prompts), model.config.vocab_size), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        seen[row, prompt] = True
    room = bucket(max(int((lengths + limits).max()), tokens.shape[1]))
    on_device = functools.partial(put, model.partition)
    cache = model.init_cache(len(prompts), room, kv=kv)
    cache = dataclasses.replace(cache, length=on_device(cache.length))
    last = on_device(np.zeros((len(prompts), model.config.hidden_size), model.dtype), "batch", None)
    for start, width in zip(starts, widths, strict=True):
        piece = on_device(tokens[:, start : start + width])
        hidden, filled = programs.hidden(piece, cache)
        assert filled is not None  # there was one
        cache, last = filled, _last(model.partition, hidden, filled.length, last, on_device(lengths))
    return dataclasses.replace(cache, length=on_device(lengths)), last, on_device(seen, *_SEEN)


@dataclasses.dataclass(frozen=True)
class _Ending:
    """What ends a row, as the host sees it."""

    sampling: Sampling
    tokenizer: Any
    eos: tuple[int, ...]
    limit: int
    """Tokens that the row may make: ``max_tokens``, or fewer where the model's positions end."""
    stop_tokens: tuple[int, ...]
    """Special tokens among the stop strings: the text, which leaves them out, would never show them."""

    def push(
        self, pending: detokenize.Pending, token: int, made: int
    ) -> tuple[detokenize.Pending, str, Stop | None]:
        """Add the row's ``made``-th token: what is pending, the text to write, and why the row ends with it."""
        why: Stop | None = None
        if token in self.eos:
            why = "eos"
        elif token in self.stop_tokens:
            why = "stop"
        elif made == self.limit:
            why = "length" if made == self.sampling.max_tokens else "positions"
        if self.tokenizer is None:
            return pending, "", why
        stop = self.sampling.stop
        pending, text, found = detokenize.push(pending, token, self.tokenizer, stop)
        if why is not None and not found:
            rest, found = detokenize.flush(pending, self.tokenizer, stop)
            text += rest
        return pending, text, "stop" if found else why


def _stop_tokens(stop: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    if tokenizer is None or not stop:
        return ()
    special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return tuple(special[s] for s in stop if s in special)


def _encode(prompt: str | Sequence[int], tokenizer: Any, special_tokens: bool) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise TorqError(f"the prompt {prompt[:40]!r} is a text: pass tokenizer=, or token ids")
    return list(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])


def _check(prompt: Sequence[int], model: Decoder) -> None:
    if not prompt:
        raise TorqError("the prompt has no tokens")
    positions = model.config.max_position_embeddings
    if len(prompt) > positions:
        raise TorqError(
            f"the prompt has {len(prompt)} tokens, the model has positions for {positions} (its "
            "max_position_embeddings): shorten the prompt"
        )
    wrong = [token for token in prompt if not 0 <= token < model.config.vocab_size]
    if wrong:
        raise TorqError(
            f"the prompt has token {wrong[0]} outside the vocabulary of {model.config.vocab_size}: was it made by "
            "another model's tokenizer?"
        )


def main(argv: list[str] | None = None) -> int:
    """Command line; see :mod:`torq_jax.terminal`."""
    from torq_jax import terminal

    return terminal.main(argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that there is no torch
    sys.exit(main())
