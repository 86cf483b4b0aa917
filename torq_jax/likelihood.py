"""Log-likelihoods of continuations, for models of any kind that are causal.

Tokens of a context and its continuation are made as EleutherAI's lm-eval makes them. Requests are padded on the
right to few lengths, in batches of few shapes, and only the positions that predict a scored token meet the
vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from torq_jax import decoder
from torq_jax.compiled import compiled
from torq_jax.decoder import Decoder
from torq_jax.errors import TorqError
from torq_jax.evaluate import LOGITS_CHUNK, check_vocabulary, log_probabilities

BATCH_TOKENS = 1024
"""Tokens of a batch, padding included. Part of a protocol: see :func:`make_batches`."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Tokens of which the last ``scored`` ones are scored, given all before them."""

    tokens: tuple[int, ...]
    scored: int
    dropped: int = 0
    """Tokens left out from the start because the model has no positions for them."""


class Score(NamedTuple):
    """What a model says about a request."""

    log_likelihood: float
    """Sum over the scored tokens, in nats."""
    greedy: bool
    """Whether each scored token is the likeliest one."""


class LogLikelihood(Protocol):
    """A model as the tasks see it; :func:`scorer` and :func:`model_scorer` make one."""

    def __call__(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Score requests, in their order."""


Progress = Callable[[int, int], None]
"""Called after each batch with the tokens done and those of all batches; pace is even over them."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests padded on the right to one length, and where in them the scored tokens are predicted."""

    tokens: Int32[np.ndarray, "b t"]
    members: Int32[np.ndarray, " m"]
    """Index of the request in each of the first rows; rows after them are empty."""
    index: Int32[np.ndarray, " p"]
    """Positions, in the flattened ``tokens``, at which a scored token is predicted."""
    targets: Int32[np.ndarray, " p"]
    rows: Int32[np.ndarray, " p"]
    """Row of each position."""


def prefix_token(tokenizer: Any) -> int:
    """The token that stands for an empty context: BOS, or EOS for a tokenizer without one.

    Raises:
      TorqError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise TorqError("the tokenizer has neither BOS nor EOS: a text without context cannot be scored")


def encode(tokenizer: Any, text: str, special_tokens: bool | None = None) -> list[int]:
    """Token ids as lm-eval makes them.

    Args:
      tokenizer: a transformers tokenizer.
      text: what to encode.
      special_tokens: whether the tokenizer may add its own; None lets it, unless the text begins with BOS already.
    """
    if special_tokens is None:
        has_prefix = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
        prefix = tokenizer.decode([prefix_token(tokenizer)]) if has_prefix else ""
        special_tokens = not (prefix and text.startswith(prefix))
    return tokenizer.encode(text, add_special_tokens=special_tokens)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation.

    Spaces that end the context move to the continuation, since tokens begin with spaces and do not end with
    them. Both are encoded as one text and cut where the context alone would end. An empty context is the
    :func:`prefix_token`.

    Returns:
      The context's tokens, one at least, and the continuation's, which may be none.
    """
    if not context:
        prefix, tokens = prefix_token(tokenizer), encode(tokenizer, continuation, special_tokens=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not kept:  # nothing but spaces, which would leave the continuation without context
        return encode_pair(tokenizer, "", continuation)
    tokens, head = encode(tokenizer, kept + continuation), encode(tokenizer, kept)
    return head, tokens[len(head) :]


def make_request(context: Sequence[int], continuation: Sequence[int], positions: int) -> Request:
    """A request for a model with ``positions`` positions; a context too long for them loses its start.

    Raises:
      TorqError: no context, nothing to score, or a continuation that does not fit by itself.
    """
    if not len(context) or not len(continuation):
        raise TorqError(
            f"{len(context)} tokens of context and {len(continuation)} to score: one of each is needed at least"
        )
    if len(continuation) > positions:
        raise TorqError(f"{len(continuation)} tokens to score, but the model has {positions} positions")
    tokens = (*context, *continuation)
    # The last token is never read, so that one more than the positions fits.
    kept = tokens[-(positions + 1) :]
    return Request(kept, len(continuation), len(tokens) - len(kept))


def bucket(length: int) -> int:
    """Length that ``length`` tokens are padded to: 16, 24, 32, 48, 64, 96 and so on, so that few are compiled."""
    size = 16
    while size < length:
        if size + size // 2 >= length:
            return size + size // 2
        size *= 2
    return size


def make_batches(requests: Sequence[Request], batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Requests in batches whose shape depends on the request's own length and on ``batch_tokens`` alone.

    A request is padded to its :func:`bucket`, and a batch that is not full has empty rows: otherwise other items,
    or fewer of them, would change the shape, with it the last bits of sums, and with those the side to which a
    4-bit activation near a tie is rounded, which can be worth several nats. Padding stands on the right, where no
    token of a causal model sees it. The longest come first, so that estimates of the time left err upwards.
    """
    by_length: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        by_length.setdefault(bucket(len(request.tokens) - 1), []).append(i)
    made = []
    for length, members in sorted(by_length.items(), reverse=True):
        rows = max(1, batch_tokens // length)
        made += [_batch(requests, members[i : i + rows], rows, length) for i in range(0, len(members), rows)]
    return made


def _batch(requests: Sequence[Request], members: Sequence[int], count: int, length: int) -> Batch:
    tokens = np.zeros((count, length), np.int32)
    index, targets, rows = [], [], []
    for row, member in enumerate(members):
        request = requests[member]
        read = len(request.tokens) - 1
        tokens[row, :read] = request.tokens[:-1]
        index.append(row * length + np.arange(read - request.scored, read))
        targets.append(request.tokens[-request.scored :])
        rows.append(np.full(request.scored, row))
    joined = (np.concatenate(part).astype(np.int32) for part in (index, targets, rows))
    return Batch(tokens, np.asarray(members, np.int32), *joined)


@functools.partial(jax.jit, static_argnames="eps")
def _score_positions(
    hidden: Float[Array, "b t H"],
    index: Int32[Array, " p"],
    targets: Int32[Array, " p"],
    norm: Float[Array, " H"],
    head: Float[Array, "V H"],
    *,
    eps: float,
) -> tuple[Float[Array, " p"], Bool[Array, " p"]]:
    logits = decoder.logits(hidden.reshape(-1, hidden.shape[-1])[index], norm, head, eps)
    return log_probabilities(logits, targets), jnp.argmax(logits, axis=-1) == targets


def batch_scores(
    hidden: Float[Array, "b t H"],
    batch: Batch,
    norm: Float[Array, " H"],
    head: Float[Array, "V H"],
    *,
    eps: float,
) -> list[Score]:
    """Scores of a batch's members from the residual stream after the last layer.

    Only the positions that predict a scored token meet the vocabulary, ``LOGITS_CHUNK`` of them at a time: logits
    in float32, sums in float64.

    Raises:
      TorqError: a log-likelihood that is not finite.
    """
    count, rows = len(batch.index), len(batch.members)
    padding = (0, -count % LOGITS_CHUNK)
    index, targets = np.pad(batch.index, padding), np.pad(batch.targets, padding)
    parts = [
        _score_positions(
            hidden, index[i : i + LOGITS_CHUNK], targets[i : i + LOGITS_CHUNK], norm, head, eps=eps
        )
        for i in range(0, len(index), LOGITS_CHUNK)
    ]
    likelihoods, greedy = (
        np.concatenate([np.asarray(p) for p in part])[:count] for part in zip(*parts, strict=True)
    )
    if not np.isfinite(likelihoods).all():
        raise TorqError(
            "the model gives log-likelihoods that are not finite: its weights or activations overflow"
        )
    sums = np.bincount(batch.rows, weights=likelihoods.astype(np.float64), minlength=rows)
    misses = np.bincount(batch.rows, weights=~greedy, minlength=rows)
    return [Score(float(s), not m) for s, m in zip(sums, misses, strict=True)]


def scorer(
    hidden: Callable[[Int32[Array, "b t"]], Float[Array, "b t H"]],
    norm: Float[Array, " H"],
    head: Float[Array, "V H"],
    *,
    eps: float,
    batch_tokens: int = BATCH_TOKENS,
) -> LogLikelihood:
    """A scoring function from the parts of any causal model.

    Args:
      hidden: from tokens to the residual stream after the last layer, before the final norm; best compiled, since
        it is called with few shapes.
      norm: weight of the final norm.
      head: output projection.
      eps: of the norm.
      batch_tokens: most tokens of a batch; a single request may be longer.

    Returns:
      The function; it raises TorqError for a token outside the vocabulary or a result that is not finite.
    """

    def score_requests(requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        for request in requests:
            check_vocabulary(np.asarray(request.tokens), head.shape[0])
        batches = make_batches(requests, batch_tokens)
        total, done = sum(batch.tokens.size for batch in batches), 0
        scores: dict[int, Score] = {}
        for batch in batches:
            found = batch_scores(hidden(jnp.asarray(batch.tokens)), batch, norm, head, eps=eps)
            scores.update(zip(batch.members.tolist(), found, strict=True))
            done += batch.tokens.size
            if progress is not None:
                progress(done, total)
        return [scores[i] for i in range(len(requests))]

    return score_requests


def model_scorer(model: Decoder, *, batch_tokens: int = BATCH_TOKENS) -> LogLikelihood:
    """A scoring function from a decoder, such as a loaded checkpoint's; see :func:`scorer`."""
    programs = compiled(model)

    def hidden(tokens: Int32[Array, "b t"]) -> Float[Array, "b t H"]:
        return programs.hidden(tokens, None)[0]

    return scorer(hidden, programs.norm, programs.head, eps=model.config.norm_eps, batch_tokens=batch_tokens)
