"""Keys and values of the tokens so far: in float, or rounded to MXFP8 or MXFP4 after a rotation of each head.

Before they are rounded in blocks of 32 along its ``d`` elements, a head is rotated by an orthogonal Hadamard-like
matrix ``R``, which spreads the few channels in which keys are far larger than in others. Queries meet keys that carry
rope already, which does not commute with ``R``: both are rotated online, and ``(q R) (k R)^T = q k^T``. Values are
rotated online as well, and their weighted sum back, unless :func:`fold_values` has put ``R`` into the weights around
them.

Letters in shapes: b batch, t new tokens, s slots, g key and value heads, d head size, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from torq_jax import mxfp4, mxfp8
from torq_jax.errors import TorqError
from torq_jax.mxfp4 import BLOCK, BlockArray, MXFP4Array
from torq_jax.mxfp8 import MXFP8Array
from torq_jax.solvers.hadamard import hadamard_matrix

if TYPE_CHECKING:
    from torq_jax.decoder import Decoder, DecoderLayer
    from torq_jax.sharding import Partition

FORMATS = ("float32", "bf16", "mxfp8", "mxfp4")
"""What a cache can be stored in."""

ROTATED = ("mxfp8", "mxfp4")
"""Those that are rounded to blocks, before which heads are rotated."""

_FLOATS = {"float32": jnp.float32, "bf16": jnp.bfloat16}
_SCALE_RULES = {"mxfp8": "ceil", "mxfp4": "mse"}
"""The rule with the least error that each format has; of a token, little is rounded."""

AXES = (None, "batch", "kv_heads", None, None)
"""Logical axes of keys and values on a mesh, and of their codes and scales."""

Stored = Float[Array, "*L b g s d"] | MXFP4Array | MXFP8Array
"""Keys or values as stored."""


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far; a pytree. Slot j holds position j.

    ``length`` tokens are valid: one number for all rows, or one for each row where prompts of different lengths
    share a batch. What lies in later slots is seen by no query before a token overwrites it, so rows may be padded
    on the right. Slots of one head lie side by side: attention reads them as they lie.
    """

    keys: Stored
    values: Stored
    length: Int32[Array, ""] | Int32[Array, " b"]
    rotated: bool = False
    """Whether keys and values are stored rotated; static."""

    @property
    def room(self) -> int:
        """Slots of a row."""
        return self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


jax.tree_util.register_dataclass(KVCache, ["keys", "values", "length"], ["rotated"])


def check_format(kv: str | None, head_dim: int) -> None:
    """Raise TorqError for a format that does not exist, or whose blocks a head does not fill."""
    if kv is not None and kv not in FORMATS:
        raise TorqError(f"kv format {kv!r} does not exist: must be one of {', '.join(FORMATS)}")
    if kv in ROTATED and head_dim % BLOCK:
        raise TorqError(
            f"kv format {kv!r} has blocks of {BLOCK}, which heads of {head_dim} do not fill: use 'bf16'"
        )


def empty(
    shape: tuple[int, ...],
    dtype: Any,
    kv: str | None,
    rotate: bool | None = None,
    own: Partition | None = None,
) -> KVCache:
    """A cache without tokens.

    Args:
      shape: ``[L, b, g, s, d]``.
      dtype: of keys and values where ``kv`` is None.
      kv: one of :data:`FORMATS`.
      rotate: whether heads are rotated; None where they are rounded to blocks.
      own: the mesh that rows and heads are divided over.

    Raises:
      TorqError: as :func:`check_format`.
    """
    check_format(kv, shape[-1])
    rotated = kv in ROTATED if rotate is None else rotate
    keys, values = (_zeros(shape, dtype, kv, own) for _ in range(2))
    return KVCache(keys, values, jnp.int32(0), rotated)


def _zeros(shape: tuple[int, ...], dtype: Any, kv: str | None, own: Partition | None) -> Stored:
    *outer, d = shape
    place = None if own is None else own.fit(shape, *AXES)
    zeros = functools.partial(jnp.zeros, device=place)
    if kv not in ROTATED:
        return zeros(shape, dtype if kv is None else _FLOATS[kv])
    kind, code_bytes = (MXFP4Array, d // 2) if kv == "mxfp4" else (MXFP8Array, d)
    # Zero codes under any scale are zeros.
    return kind(zeros((*outer, code_bytes), jnp.uint8), zeros((*outer, d // BLOCK), jnp.uint8), d, -1)


def encode(x: Float[Array, "b g t d"], store: Stored) -> Stored:
    """``x`` in the format of ``store``, in blocks along d where that is one of blocks."""
    if isinstance(store, MXFP4Array):
        return mxfp4.quantize(x, _SCALE_RULES["mxfp4"])  # type: ignore[arg-type]  # a rule's name
    if isinstance(store, MXFP8Array):
        return mxfp8.quantize(x, _SCALE_RULES["mxfp8"])  # type: ignore[arg-type]
    return x.astype(store.dtype)


def decode(store: Stored, dtype: Any) -> Float[Array, "b g s d"]:
    """The values of a layer's keys or values in ``dtype``."""
    if isinstance(store, MXFP4Array):
        return mxfp4.dequantize(store, dtype)
    if isinstance(store, MXFP8Array):
        return mxfp8.dequantize(store, dtype)
    return store.astype(dtype)


def write(
    store: Stored,
    new: Float[Array, "b t g d"],
    index: Int32[Array, ""],
    start: Int32[Array, ""] | Int32[Array, " b"] | int,
    own: Partition | None = None,
) -> Stored:
    """``store [L, b, g, s, d]`` with ``new`` encoded into layer ``index`` from ``start`` on, in each row its own.

    On a mesh each device writes its own rows and heads; left to itself, XLA would gather the new ones.
    """
    encoded = encode(new.swapaxes(1, 2), store)
    put = _write if own is None else functools.partial(_write_divided, own)
    return jax.tree.map(lambda old, one: put(old, one, index, start), store, encoded)


def _write_divided(own: Partition, store: Array, new: Array, index: Array, start: Any) -> Array:
    start = jnp.asarray(start, jnp.int32)
    arrays = (store, new, index, start)
    axes = (AXES, AXES[1:], (), ("batch",)[: start.ndim])
    specs = tuple(own.fit(a.shape, *names).spec for a, names in zip(arrays, axes, strict=True))
    return jax.shard_map(_write, mesh=own.mesh, in_specs=specs, out_specs=specs[0])(*arrays)


def _write(store: Array, new: Array, index: Array, start: Any) -> Array:
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice(store, new[None], (index, 0, 0, start, 0))
    rows, tokens = jnp.arange(new.shape[0])[:, None], jnp.arange(new.shape[2], dtype=jnp.int32)
    # A row whose slots are all used writes nowhere; an update of a slice would move back onto its last slot.
    at = store.at[index, rows, :, start[:, None] + tokens]
    return at.set(new.swapaxes(1, 2), mode="drop")


def layer(store: Stored, index: Int32[Array, ""]) -> Stored:
    """One layer of ``store``."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), store)


def head_rotation(head_dim: int) -> Float[np.ndarray, "d d"]:
    """The orthogonal, symmetric matrix that rotates a head.

    Sylvester's Hadamard matrix for powers of two; otherwise, on the diagonal, one of the largest power of two that
    divides ``head_dim``.
    """
    power = head_dim & -head_dim
    return np.kron(np.eye(head_dim // power), hadamard_matrix(power))


def rotate_heads(x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
    """Each head times :func:`head_rotation`, which is its own inverse; computed in float32, in the dtype of ``x``."""
    matrix = jnp.asarray(head_rotation(x.shape[-1]), jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def foldable(stack: DecoderLayer) -> bool:
    """Whether the rotation of the values can lie in the weights of v and o with nothing lost.

    Both are float32 and nothing happens to o's activation: a rotation or a cast there is made for the values as they
    are, and rounded weights would have to be rounded again.
    """
    read, out = stack.attn_in, stack.attn_out
    plain = not out.form.rotated and out.form.activation_scale is None
    if read.form.weights != "float" or out.form.weights != "float" or not plain:
        return False
    weights = (read.weight("v"), out.weight("o"))
    return all(isinstance(w, jax.Array) and w.dtype == jnp.float32 for w in weights)


def fold_values(model: Decoder) -> Decoder:
    """``model``, which lies on one device, with the rotation of the values in its weights where :func:`foldable`.

    It is changed, but its function stays what it is, with any cache or none. Other layers rotate online.
    """
    heads = model.config.num_kv_heads
    for stack in model.stacks():
        if stack.values_rotated or not foldable(stack):
            continue
        read: Any = stack.attn_in
        out: Any = stack.attn_out
        read.v = nnx.Param(_fold(read.v[...], heads, -2))
        if hasattr(read, "v_bias"):
            read.v_bias = nnx.Param(_fold(read.v_bias[...][..., None], heads, -2)[..., 0])
        out.o = nnx.Param(_fold(out.o[...], model.config.num_heads, -1))
        stack.values_rotated = True
    return model


def _fold(weight: Array, heads: int, axis: int) -> Array:
    """``weight [L, out, in]`` with each head along ``axis`` rotated; in float64, since it happens once."""
    wide = np.moveaxis(np.asarray(weight, np.float64), axis, -1)
    turned = wide.reshape(*wide.shape[:-1], heads, -1) @ head_rotation(wide.shape[-1] // heads)
    return jnp.asarray(np.moveaxis(turned.reshape(wide.shape), -1, axis), weight.dtype)


def bytes_per_token(num_layers: int, kv_heads: int, head_dim: int, kv: str) -> int:
    """Bytes that a token takes in all layers, keys and values together.

    Raises:
      TorqError: as :func:`check_format`.
    """
    check_format(kv, head_dim)
    shape = (num_layers, 1, kv_heads, 1, head_dim)
    one = jax.eval_shape(lambda: empty(shape, jnp.float32, kv).keys)
    each = one.nbytes if isinstance(one, BlockArray) else one.size * one.dtype.itemsize
    return 2 * each
