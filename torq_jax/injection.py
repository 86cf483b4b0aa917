"""MXFP4 in other people's Flax modules: a ``dot_general`` for theirs, and quantised layers in place of theirs.

:class:`DotGeneral` rounds both operands of a product each time it runs, and needs no calibration::

    nnx.Linear(64, 64, dot_general=DotGeneral(), rngs=rngs)
    linen.Dense(64, dot_general=DotGeneral())            # or dot_general_cls=DotGeneral

:func:`quantize_linears` stores weights in MXFP4, folded with a rotation that calibration found::

    quantised = quantize_linears(model, [Rule(r"layers/.*/mlp/.*", rounding="gptq")], batch)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from torq_jax import mxfp4, rotation, rounding, solvers, statistics
from torq_jax.errors import TorqError
from torq_jax.matmul import matmul
from torq_jax.mxfp4 import SCALE_RULES, MXFP4Array, ScaleRule
from torq_jax.rotation import TwoLevelRotation

RoundingName = Literal["nearest", "gptq"]

LAYERS = (nnx.Linear, nnx.LinearGeneral)
"""What :func:`quantize_linears` knows."""

FLOAT_TOLERANCE = 1e-4
"""Largest relative difference that folding may make before anything is rounded: the converter's own limit."""


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """``jax.lax.dot_general`` with both operands rounded to MXFP4 along the contracted axis.

    Gradients pass the rounding as if it were not there (a straight-through estimate), to both operands.
    """

    weight_scale: ScaleRule | None = "mse"
    """Scale rule of the right operand; None leaves it in float."""
    activation_scale: ScaleRule | None = "even"
    """The same for the left one."""
    pad: bool = False
    """Whether a contracted axis that is no multiple of 32 is filled up with zeros; otherwise it is an error."""

    def __post_init__(self) -> None:
        for name in ("weight_scale", "activation_scale"):
            _check_choice(name, getattr(self, name), (None, *SCALE_RULES))

    def __call__(
        self,
        lhs: Float[Array, ...],
        rhs: Float[Array, ...],
        dimension_numbers: tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]],
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> Float[Array, ...]:
        """As ``jax.lax.dot_general``.

        Raises:
          TorqError: no or several contracted axes, or one that is no multiple of 32 without ``pad``.
        """
        (left, right), _ = dimension_numbers
        if len(left) != 1 or len(right) != 1:
            raise TorqError(
                f"axes {tuple(left)} and {tuple(right)} are contracted: blocks of 32 lie along one axis, so reshape "
                "to one"
            )
        return jax.lax.dot_general(
            _cast(lhs, self.activation_scale, left[0], self.pad),
            _cast(rhs, self.weight_scale, right[0], self.pad),
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **kwargs,
        )


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of the ``nnx.Linear`` and ``nnx.LinearGeneral`` layers whose path matches."""

    path: str
    """A regular expression that a whole path such as ``"layers/0/up"`` must match."""
    method: str = "two_level"
    """One of :data:`torq_jax.METHODS`."""
    rounding: RoundingName = "nearest"
    """Of the weights: ``"gptq"`` weighs errors by the calibration activations."""
    weight_scale: ScaleRule = "mse"
    activation_scale: ScaleRule | None = "even"
    """Scale rule of the activations' cast; None leaves activations in float."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The method's own, see :func:`torq_jax.solvers.method_options`."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.path)
        except re.error as error:
            raise TorqError(f"path {self.path!r} is no regular expression: {error}") from error
        _check_choice("rounding", self.rounding, get_args(RoundingName))
        _check_choice("weight_scale", self.weight_scale, SCALE_RULES)
        _check_choice("activation_scale", self.activation_scale, (None, *SCALE_RULES))
        solvers.check_options(self.method, self.options)


class QuantizedLinear(nnx.Module):
    """A linear layer with its weight in MXFP4: rotate, round, multiply, add the bias.

    Where it stands for an ``nnx.LinearGeneral``, the features of several axes lie one after the other in blocks.
    ``codes [out, in/2]`` and ``scales [out, in/32]`` are those of :class:`torq_jax.MXFP4Array`; ``inter`` and
    ``intra`` those of :class:`torq_jax.TwoLevelRotation`.
    """

    def __init__(
        self,
        weight: MXFP4Array,
        transform: TwoLevelRotation,
        bias: Float[Array, " out"] | None,
        activation_scale: ScaleRule | None,
        ends: _Ends,
    ) -> None:
        self.codes, self.scales = nnx.Param(weight.codes), nnx.Param(weight.scales)
        self.inter = None if transform.inter is None else nnx.Param(transform.inter)
        self.intra = None if transform.intra is None else nnx.Param(transform.intra)
        self.bias = None if bias is None else nnx.Param(bias)
        self.activation_scale = activation_scale
        self.ends = ends
        self.in_features, self.out_features = math.prod(ends.inputs), weight.shape[0]
        self.features = transform.features

    @property
    def weight(self) -> MXFP4Array:
        """The stored weight ``[out, in]``, folded with :attr:`transform`."""
        return MXFP4Array(self.codes[...], self.scales[...], self.features, -1)

    @property
    def transform(self) -> TwoLevelRotation:
        """What runs on the activations before the cast."""
        inter, intra = (None if m is None else m[...] for m in (self.inter, self.intra))
        return TwoLevelRotation(inter, intra, self.features)

    def __call__(self, x: Float[Array, ...], out_sharding: Any = None) -> Float[Array, ...]:
        """As the layer that it stands for, ``[..., in] -> [..., out]``, in the dtype of ``x``.

        Raises:
          TorqError: activations of another size, or ``out_sharding``, which nothing here would heed.
        """
        if out_sharding is not None:
            raise TorqError("out_sharding is not heeded by a quantised layer: constrain its output instead")
        x = self.ends.flat(x)
        y = matmul(x, self.weight, self.transform, activation_scale=self.activation_scale)
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y.reshape(*y.shape[:-1], *self.ends.outputs)


@dataclasses.dataclass(frozen=True)
class _Ends:
    """The axes of a layer's input and output that hold features."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axis: tuple[int, ...] = (-1,)
    """Where those of the input are."""

    def flat(self, x: Any) -> Any:
        """``x`` as ``[..., features]``, a jax or numpy array."""
        if x.ndim < len(self.axis) or tuple(x.shape[a] for a in self.axis) != self.inputs:
            raise TorqError(
                f"activations of shape {x.shape} have no axes {self.axis} of {self.inputs} features, which this "
                "layer takes"
            )
        last = tuple(range(-len(self.axis), 0))
        if self.axis != last:
            x = (jnp if isinstance(x, jax.Array) else np).moveaxis(x, self.axis, last)
        return x.reshape(*x.shape[: x.ndim - len(last)], math.prod(self.inputs))


def _ends(layer: nnx.Linear | nnx.LinearGeneral) -> _Ends:
    if isinstance(layer, nnx.Linear):
        return _Ends((layer.in_features,), (layer.out_features,))
    if layer.batch_axis:
        raise TorqError(f"batch axes {dict(layer.batch_axis)} give each its own weight: narrow the rule")
    sizes = (tuple(map(int, layer.in_features)), tuple(map(int, layer.out_features)))
    return _Ends(*sizes, tuple(map(int, layer.axis)))


def quantize_linears(
    model: nnx.Module, rules: Sequence[Rule], *calibration: Any, seed: int = 0, **calibration_kwargs: Any
) -> Any:
    """A copy of ``model`` with the ``nnx.Linear`` and ``nnx.LinearGeneral`` layers that the rules name in MXFP4.

    The latter are those of ``nnx.MultiHeadAttention``: ``query``, ``key``, ``value`` and ``out``.

    The float model runs once, as ``model(*calibration, **calibration_kwargs)``, outside ``jit``, to see what enters
    each layer. Layers are solved one by one, each with its own rotation, even where several read the same activation.

    Args:
      model: any; it is left as it was. Subclasses of these layers and other layers are left alone.
      rules: the first whose path matches holds; a layer that none matches stays in float.
      *calibration: what the model is called with.
      seed: of everything random in the methods.
      **calibration_kwargs: likewise.

    Returns:
      The copy, with a :class:`QuantizedLinear` for each such layer.

    Raises:
      TorqError: a rule that no layer matches; a layer with batch axes; one that calibration does not reach, or
        reaches only inside ``jit`` or ``scan``; activations that are not finite; or a folded layer that is not the
        original's equal.
    """
    if not rules:
        raise TorqError("no rules: nothing would be quantised; pass Rule('.*') for every linear layer")
    seen: dict[str, list[np.ndarray]] = {}

    def watched(path: tuple[Any, ...], node: Any) -> Any:
        if type(node) in LAYERS:
            name = "/".join(map(str, path))
            own = getattr(node, "dot_general_cls", None)
            inner = own() if own is not None else node.dot_general or jax.lax.dot_general
            node.dot_general, node.dot_general_cls = _recorder(name, seen.setdefault(name, []), inner), None
        return node

    nnx.recursive_map(watched, nnx.clone(model))(*calibration, **calibration_kwargs)
    chosen = {name: rule for name in seen if (rule := _first_match(rules, name)) is not None}
    for rule in rules:
        if not any(re.fullmatch(rule.path, name) for name in seen):
            raise TorqError(
                f"rule {rule.path!r} matches no linear layer: there are {', '.join(sorted(seen)) or 'none'}"
            )
    for name in chosen:
        if not seen[name]:
            raise TorqError(f"{name}: the calibration batch never reached this layer; narrow the rule")

    def replaced(path: tuple[Any, ...], node: Any) -> Any:
        name = "/".join(map(str, path))
        if type(node) not in LAYERS or name not in chosen:
            return node
        try:
            ends = _ends(node)
            flat = [ends.flat(x).reshape(-1, math.prod(ends.inputs)) for x in seen[name]]
            return _quantised(node, ends, chosen[name], np.concatenate(flat), seed)
        except TorqError as error:
            raise TorqError(f"{name}: {error}") from error

    return nnx.recursive_map(replaced, nnx.clone(model))


def _quantised(
    linear: nnx.Linear | nnx.LinearGeneral,
    ends: _Ends,
    rule: Rule,
    x: Float[np.ndarray, "tokens in"],
    seed: int,
) -> QuantizedLinear:
    """Statistics, solver, fold, round: the way of a layer."""
    w = np.asarray(linear.kernel[...], np.float32).reshape(x.shape[1], -1).T  # [out, in]
    moments = "full" if rule.rounding == "gptq" else solvers.needs_moments(rule.method)
    gathered = dataclasses.replace(
        statistics.gather(jnp.asarray(x), moments=moments),
        gain=statistics.output_gain(w),
        outputs=len(w),
    )
    solution = solvers.solve(rule.method, gathered, seed=seed, **rule.options)
    # Folded with the inverse of the matrices as stored, so that bfloat16 costs no equivalence.
    transform = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), solution.rotation)
    missing = transform.features - w.shape[1]
    folded = jnp.asarray(rotation.fold_host(np.pad(w, ((0, 0), (0, missing))), transform).astype(np.float32))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    ours = np.asarray(matmul(jnp.asarray(x, jnp.float32), folded, transform), np.float64)
    size = float(np.linalg.norm(exact))
    difference = float(np.linalg.norm(ours - exact)) / size if size else 0.0
    if not difference <= FLOAT_TOLERANCE:
        raise TorqError(
            f"before rounding, the folded layer differs from the original by {difference:.1e}, more than "
            f"{FLOAT_TOLERANCE:.0e}: the transform is too ill-conditioned; choose another method"
        )
    if rule.rounding == "gptq":
        assert gathered.second is not None  # moments="full"
        half = rotation.rotate_host(gathered.second, transform)
        second = rotation.rotate_host(np.ascontiguousarray(half.T), transform)
        weight = rounding.gptq(folded, (second + second.T) / 2, rule.weight_scale).weight
    else:
        weight = mxfp4.quantize(folded, rule.weight_scale)
    bias = None if linear.bias is None else linear.bias[...].reshape(-1)
    return QuantizedLinear(weight, transform, bias, rule.activation_scale, ends)


def _recorder(name: str, rows: list[np.ndarray], inner: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's own ``dot_general``, which keeps what enters it."""

    def dot_general(lhs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(lhs, jax.core.Tracer):
            raise TorqError(
                f"{name} runs inside jit, scan or vmap, where no activation can be seen: calibrate a model without"
            )
        rows.append(np.asarray(lhs, np.float32))
        return inner(lhs, *args, **kwargs)

    return dot_general


def _first_match(rules: Sequence[Rule], name: str) -> Rule | None:
    return next((rule for rule in rules if re.fullmatch(rule.path, name)), None)


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise TorqError(f"{name} is {value!r}: must be one of {', '.join(map(str, choices))}")


def _cast(x: Array, rule: ScaleRule | None, axis: int, pad: bool) -> Array:
    return x if rule is None else mxfp4.quantize_dequantize(x, rule, axis=axis, pad=pad)
