"""Solvers: the statistics of a site -> a :class:`torq_jax.rotation.TwoLevelRotation`.

Every method is one module with ``solve(statistics, *, seed, **options) -> Solution`` and one line here;
nothing downstream knows a method by name.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from torq_jax import statistics as site_statistics
from torq_jax.errors import TorqError
from torq_jax.rotation import TwoLevelRotation
from torq_jax.solvers import full_hadamard, hadamard, none, random, torq, two_level, wush
from torq_jax.solvers.micro import codebook_histogram, entropy_bits
from torq_jax.solvers.solution import Solution
from torq_jax.statistics import Moments, SiteStatistics

_SOLVERS: dict[str, Callable[..., Solution]] = {
    "none": none.solve,
    "hadamard": hadamard.solve,
    "random": random.solve,
    "full_hadamard": full_hadamard.solve,
    "torq": torq.solve,
    "wush": wush.solve,
    "two_level": two_level.solve,
}

METHODS: tuple[str, ...] = tuple(_SOLVERS)
"""Names that :func:`solve` knows."""

_MOMENTS: dict[str, Moments] = {"torq": "inter", "wush": "full", "two_level": "full"}

__all__ = [
    "METHODS",
    "Solution",
    "check_options",
    "codebook_histogram",
    "entropy_bits",
    "fit",
    "method_options",
    "needs_moments",
    "solve",
]


def fit(
    x: Float[Array, "tokens features"],
    method: str = "torq",
    *,
    weight: Float[Array, "out features"] | None = None,
    seed: int = 0,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> TwoLevelRotation:
    """The rotation that ``method`` finds for activations, ready for ``fold``, ``rotate`` and ``matmul``.

    Args:
      x: a sample of the activations that will be quantised, any float dtype.
      method: one of :data:`METHODS`.
      weight: that reads the activations, or several stacked; "wush" and "two_level" need it.
      seed: of everything random.
      dtype: of the matrices; fold weights with the rotation as returned, and the float product stays exact.
      **options: the method's own, see :func:`method_options`.

    Returns:
      A rotation of ``features`` rounded up to a multiple of 32.

    Raises:
      TorqError: as :func:`solve`, or activations that are no matrix or not finite.
    """
    method_options(method)  # a misspelt name is told before anything is gathered
    gathered = site_statistics.gather(x, moments=needs_moments(method))
    if weight is not None:
        if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
            raise TorqError(
                f"weight has shape {weight.shape}, the activations {x.shape}: must be [out, features]"
            )
        gain = site_statistics.output_gain(np.asarray(weight))
        gathered = dataclasses.replace(gathered, gain=gain, outputs=len(weight))
    solution = solve(method, gathered, seed=seed, **options)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), solution.rotation)


def needs_moments(method: str) -> Moments:
    """The second moments that ``method`` looks at, which cost time to gather."""
    return _MOMENTS.get(method, "none")


def method_options(method: str) -> dict[str, Any]:
    """The options of a method with their defaults, ``seed`` apart.

    Raises:
      TorqError: an unknown method.
    """
    if method not in _SOLVERS:
        raise TorqError(f"unknown method {method!r}: must be one of {', '.join(METHODS)}")
    parameters = inspect.signature(_SOLVERS[method]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "seed"}


def solve(method: str, statistics: SiteStatistics, *, seed: int = 0, **options: Any) -> Solution:
    """Solve a site.

    Args:
      method: one of :data:`METHODS`.
      statistics: of the activations that enter the site.
      seed: of everything random; the same seed gives the same rotation.
      **options: the method's own, see :func:`method_options`.

    Returns:
      A rotation with float64 numpy leaves, and a report.

    Raises:
      TorqError: as :func:`check_options`, or what the method itself refuses.
    """
    check_options(method, options)
    return _SOLVERS[method](statistics, seed=seed, **options)


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a method does not have, or whose values are not of the kind that it declares.

    Raises:
      TorqError: an unknown method or option, or a value of another type or none of the names to choose from.
    """
    known = method_options(method)
    kinds = typing.get_type_hints(_SOLVERS[method])
    for option, value in options.items():
        if option not in known:
            raise TorqError(
                f"method {method!r} has no option {option!r}: "
                + (f"its options are {', '.join(known)}" if known else "it takes none but seed")
            )
        kind = kinds[option]
        if typing.get_origin(kind) is typing.Literal:
            if value not in typing.get_args(kind):
                choices = ", ".join(typing.get_args(kind))
                raise TorqError(f"{option} of method {method!r} is {value!r}: must be one of {choices}")
        elif not _is_of_kind(value, typing.get_args(kind) or (kind,)):
            name = getattr(kind, "__name__", str(kind))
            raise TorqError(f"{option} of method {method!r} is {value!r}: must be of type {name}")


def _is_of_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # an integer to Python, but nobody means it as one
        return bool in kinds
    numbers_too: dict[type, type] = {int: numbers.Integral, float: numbers.Real}
    return isinstance(value, tuple(numbers_too.get(kind, kind) for kind in kinds))
