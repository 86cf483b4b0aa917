"""Text from a converted model: ``python -m torq_jax.generate DIR --prompt "..."``."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from torq_jax.decoder import Decoder, KVCache
from torq_jax.errors import TorqError
from torq_jax.matmul import select

_log = logging.getLogger(__name__)

BUCKET = 64
"""Prompt and cache lengths are rounded up to this, so that few shapes are ever compiled."""


def generate_tokens(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids that follow ``prompt``, as they are made.

    Stops after an end-of-sequence token or ``max_tokens``; and, with a warning in the log, when prompt and tokens
    fill the model's ``max_position_embeddings``.

    Args:
      model: a decoder.
      prompt: token ids, one at least.
      max_tokens: most tokens to make.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
      top_k: sample among the k likeliest only; 0 for no limit.
      top_p: sample among the likeliest tokens that hold this share of probability.
      seed: of the sampling; the same seed gives the same text.

    Raises:
      TorqError: an empty prompt, one longer than the model's positions, a token outside the vocabulary, or a
        setting out of range.
    """
    if not len(prompt):
        raise TorqError("the prompt has no tokens")
    positions = model.config.max_position_embeddings
    if len(prompt) > positions:
        raise TorqError(
            f"the prompt has {len(prompt)} tokens, the model has positions for {positions} (its "
            "max_position_embeddings): shorten the prompt"
        )
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        raise TorqError(
            f"the prompt has token {max(prompt)} outside the vocabulary of {model.config.vocab_size}"
        )
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise TorqError(
            f"temperature {temperature} and top_k {top_k} must be finite and not negative, top_p {top_p} in (0, 1]"
        )
    if max_tokens < 0 or not 0 <= seed < 2**63:
        raise TorqError(f"max_tokens {max_tokens} must not be negative, seed {seed} in 0..2**63 - 1")
    return _generate(model, prompt, max_tokens, temperature, top_k, top_p, seed)


def _generate(
    model: Decoder,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    graph, state = nnx.split(model)
    length = _bucket(len(prompt))
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prompt)] = prompt
    # The last token made is never read again and so needs no position: at a full context one can still be made.
    room = model.config.max_position_embeddings - len(prompt) + 1
    count = min(max_tokens, room)
    cache = model.init_cache(1, _bucket(len(prompt) + count))
    logits, cache = _prefill(graph, state, jnp.asarray(tokens), cache, jnp.int32(len(prompt)))
    key = jax.random.key(seed)
    for step in range(count):
        key, own = jax.random.split(key)
        token = int(sample(logits, own, temperature=temperature, top_k=top_k, top_p=top_p)[0])
        yield token
        if token in model.config.eos_token_ids or step == max_tokens - 1:
            return
        if step == count - 1:
            _log.warning(
                "stopped after %d of %d tokens: prompt and text fill the model's %d positions",
                count,
                max_tokens,
                model.config.max_position_embeddings,
            )
            return
        logits, cache = _step(graph, state, jnp.full((1, 1), token, jnp.int32), cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(graph: Any, state: Any, tokens: Array, cache: KVCache, length: Array) -> tuple[Array, KVCache]:
    model = nnx.merge(graph, state)
    hidden, cache = model.hidden(tokens, cache)
    last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
    # What the padding wrote lies beyond ``length``: no query sees it before a later token overwrites it.
    return model.logits(last)[:, 0], KVCache(cache.keys, cache.values, length)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(graph: Any, state: Any, token: Array, cache: KVCache) -> tuple[Array, KVCache]:
    logits, cache = nnx.merge(graph, state)(token, cache)
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def sample(
    logits: Float[Array, "b V"], key: Array, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Int32[Array, " b"]:
    """One token for each row; the arguments are those of :func:`generate_tokens`."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered, axis=-1)
        # Kept while the likelier ones hold less than top_p: the likeliest always stays.
        kept = jnp.cumsum(shares, axis=-1) - shares < top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)


def stream_text(
    model: Decoder, tokenizer: Any, prompt: str, *, special_tokens: bool = True, **settings: Any
) -> Iterator[str]:
    """Pieces of the text that follows ``prompt``, as they are made.

    Args:
      model: a decoder.
      tokenizer: its tokenizer.
      prompt: text to go on from.
      special_tokens: let the tokenizer add its own; not for a :func:`chat_prompt`, which holds them already.
      **settings: as in :func:`generate_tokens`.

    Raises:
      TorqError: as :func:`generate_tokens`.
    """
    ids = tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
    return _pieces(generate_tokens(model, ids, **settings), tokenizer)


def _pieces(tokens: Iterator[int], tokenizer: Any) -> Iterator[str]:
    made: list[int] = []
    written = ""
    for token in tokens:
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character so far
            continue
        yield text[len(written) :]
        written = text
    rest = tokenizer.decode(made, skip_special_tokens=True)[len(written) :]
    if rest:
        yield rest


def chat_prompt(tokenizer: Any, message: str) -> str:
    """``message`` as a user's turn in the model's own chat template.

    Raises:
      TorqError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TorqError("the tokenizer has no chat template: leave --chat out")
    turn = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _bucket(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    from torq_jax.checkpoint import load

    parser = argparse.ArgumentParser("python -m torq_jax.generate", description=__doc__)
    parser.add_argument("directory", help="checkpoint that python -m convert wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        model, tokenizer, _ = load(options.directory)
        if tokenizer is None:
            raise TorqError(f"{options.directory} has no tokenizer: use generate_tokens from Python")
        prompt = chat_prompt(tokenizer, options.prompt) if options.chat else options.prompt
        backend = jax.default_backend()
        print(f"[{select(None)} on {backend}, {model.dtype} activations]", file=sys.stderr)
        if not options.chat:
            print(options.prompt, end="", flush=True)
        for piece in stream_text(
            model,
            tokenizer,
            prompt,
            special_tokens=not options.chat,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        ):
            print(piece, end="", flush=True)
        print()
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that there is no torch
    sys.exit(main())
