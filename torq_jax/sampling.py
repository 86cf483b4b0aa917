"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, and the draw.

The settings are arrays with one entry a row, so that a compiled step serves any of them and rows of one batch may
differ. They are applied in the order of Hugging Face's ``generate``: penalty, temperature, top-k, top-p, min-p.

Letters in shapes: b rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from torq_jax.errors import TorqError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends; checked when it is made.

    Raises:
      TorqError: a setting out of its range.
    """

    max_tokens: int = 128
    """Most tokens to make."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it and a token is drawn."""
    top_k: int = 0
    """Draw among the k likeliest tokens only (and those as likely as the last of them); 0 for no limit."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this share of probability, at least one; 1 for no limit."""
    min_p: float = 0.0
    """Draw among tokens that are at least this share as likely as the likeliest; 0 for no limit."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or made already are divided by it where positive and multiplied where
    negative, also at temperature 0; 1 leaves them."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings; a single string stands for itself."""
    seed: int = 0
    """Of the draws. A row's draws depend on its seed and on how many tokens it has made, not on its batch."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name in ("max_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TorqError(f"{name} is {value!r}: must be an integer")
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise TorqError(
                f"temperature {self.temperature} and top_k {self.top_k} must be finite and not negative, top_p "
                f"{self.top_p} in (0, 1]"
            )
        if not 0 <= self.min_p <= 1 or not 0 < self.repetition_penalty < math.inf:
            raise TorqError(
                f"min_p {self.min_p} must be in [0, 1] (0: no limit), repetition_penalty "
                f"{self.repetition_penalty} positive and finite (1: none)"
            )
        if self.max_tokens < 0 or not 0 <= self.seed < 2**63:
            raise TorqError(
                f"max_tokens {self.max_tokens} must not be negative, seed {self.seed} in 0..2**63 - 1"
            )
        for text in stop:
            if not isinstance(text, str) or not text:
                raise TorqError(f"stop has {text!r}: each must be a string of one character at least")


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The settings of :class:`Sampling` that choose tokens, one entry a row; a pytree."""

    temperature: Float[Array, " b"]
    top_k: Int32[Array, " b"]
    top_p: Float[Array, " b"]
    min_p: Float[Array, " b"]
    repetition_penalty: Float[Array, " b"]
    key: UInt32[Array, "b 2"]
    """Data of each row's threefry key."""


jax.tree_util.register_dataclass(RowSettings, [f.name for f in dataclasses.fields(RowSettings)], [])


def row_settings(samplings: Sequence[Sampling]) -> RowSettings:
    """The settings of a batch's rows as arrays."""

    def column(name: str, dtype: Any, most: float = math.inf) -> Array:
        return jnp.asarray(np.array([min(getattr(s, name), most) for s in samplings], dtype))

    # jax.random.key would drop the upper half of a 64-bit seed; for smaller seeds these are its keys.
    keys = np.array([[s.seed >> 32, s.seed & 0xFFFFFFFF] for s in samplings], np.uint32)
    return RowSettings(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32, 2**31 - 1),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        key=jnp.asarray(keys),
    )


def choose(
    logits: Float[Array, "b V"], seen: Bool[Array, "b V"], made: Int32[Array, " b"], settings: RowSettings
) -> Int32[Array, " b"]:
    """The next token of each row.

    Args:
      logits: of the next token, float32.
      seen: tokens that the row's prompt or text holds.
      made: tokens that the row has made, which number its draws.
      settings: see :class:`Sampling`.
    """
    logits = penalise(logits, seen, settings.repetition_penalty)
    greedy = settings.temperature == 0

    def draw(logits: Array) -> Array:
        temperature = jnp.where(greedy, 1.0, settings.temperature)[:, None]
        # The likeliest at 0, so that no temperature overflows.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        scaled = restrict(scaled, settings.top_k, settings.top_p, settings.min_p)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(settings.key, impl="threefry2x32"), made)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)

    # A branch that is not taken is not run: greedy rows alone pay for no draw.
    return jax.lax.cond(
        jnp.all(greedy), lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32), draw, operand=logits
    )


@jax.jit
def sample(
    logits: Float[Array, "b V"],
    key: Array,
    *,
    temperature: float | Float[Array, " b"] = 0.0,
    top_k: int | Int32[Array, " b"] = 0,
    top_p: float | Float[Array, " b"] = 1.0,
    min_p: float | Float[Array, " b"] = 0.0,
) -> Int32[Array, " b"]:
    """One token for each row.

    Args:
      logits: float32.
      key: a threefry key, from which each row takes its own.
      temperature: and the others as in :class:`Sampling`, for all rows or for each.
    """
    rows = logits.shape[0]
    spread = lambda x, dtype: jnp.broadcast_to(jnp.asarray(x, dtype), (rows,))  # noqa: E731
    settings = RowSettings(
        temperature=spread(temperature, jnp.float32),
        top_k=spread(top_k, jnp.int32),
        top_p=spread(top_p, jnp.float32),
        min_p=spread(min_p, jnp.float32),
        repetition_penalty=jnp.ones((rows,), jnp.float32),
        key=jax.random.key_data(jax.random.split(key, rows)),
    )
    seen = jnp.zeros(logits.shape, bool)
    return choose(logits, seen, jnp.zeros((rows,), jnp.int32), settings)


def penalise(
    logits: Float[Array, "b V"], seen: Bool[Array, "b V"], penalty: Float[Array, " b"]
) -> Float[Array, "b V"]:
    """Make tokens that were seen less likely (for a penalty above 1), as Hugging Face's repetition penalty."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def restrict(
    logits: Float[Array, "b V"],
    top_k: Int32[Array, " b"],
    top_p: Float[Array, " b"],
    min_p: Float[Array, " b"],
) -> Float[Array, "b V"]:
    """``logits`` with -inf for tokens outside top-k, top-p or min-p; see :class:`Sampling` for the three."""
    logits = jax.lax.cond(jnp.any(top_k > 0), lambda x: _top_k(x, top_k), lambda x: x, logits)
    logits = jax.lax.cond(jnp.any(top_p < 1), lambda x: _top_p(x, top_p), lambda x: x, logits)
    # log(0) is -inf: no limit. Shares against the likeliest do not change with what top-k and top-p took out.
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(logits < least, -jnp.inf, logits)


def _top_k(logits: Float[Array, "b V"], top_k: Int32[Array, " b"]) -> Float[Array, "b V"]:
    wanted = jnp.minimum(jnp.where(top_k == 0, logits.shape[-1], top_k), logits.shape[-1])
    ordinals = _ordinals(logits)

    def too_many_left_out(least: Array) -> Array:
        return jnp.sum(ordinals > least[:, None], axis=-1) < wanted

    # The k-th largest is the smallest value that fewer than k exceed.
    return jnp.where(ordinals < _smallest(too_many_left_out, logits.shape[0])[:, None], -jnp.inf, logits)


def _top_p(logits: Float[Array, "b V"], top_p: Float[Array, " b"]) -> Float[Array, "b V"]:
    ordinals, shares = _ordinals(logits), jax.nn.softmax(logits, axis=-1)

    def short_of_p(least: Array) -> Array:
        return jnp.sum(jnp.where(ordinals > least[:, None], shares, 0), axis=-1) < top_p

    # A token stays while the likelier ones hold less than top_p: the likeliest always does.
    kept = ordinals >= _smallest(short_of_p, logits.shape[0])[:, None]
    return jnp.where(kept | (top_p == 1)[:, None], logits, -jnp.inf)


def _ordinals(x: Float[Array, "b V"]) -> Int32[Array, "b V"]:
    """Integers in the order of floats; both zeros alike."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _smallest(holds: Any, rows: int) -> Int32[Array, " b"]:
    """The smallest ordinal for which ``holds`` is true in each row; it must stay true for all larger ones.

    Bisected in 32 passes over the vocabulary: sorting it takes many times as long.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # of the two rounded down, with no overflow
        true = holds(middle)
        return jnp.where(true, low, middle + 1), jnp.where(true, middle, high)

    least = jnp.full((rows,), -(2**31), jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, (least, jnp.full((rows,), 2**31 - 1, jnp.int32)))[1]
