"""Which sites are worth eight bits: a budget of bytes, spent where it saves most of the modelled loss.

Rounding a site to MXFP4 costs, to second order, what :mod:`torq_jax.sensitivity` says of its activation and of its
weights, for rounding that acts as it does after a Hadamard transform of each block. MXFP8 makes 1/18 of the squared
error, at every site alike. So sites are taken in the order of modelled loss a byte; one that no longer fits is passed
over, and the budget is never exceeded.

Energies rather than the rounding errors themselves: projected on the gradients, these make little of a site where
one token has one huge value, since its error lies along the activation then. Yet keeping the one such site of
SmolLM2-135M, mlp_out of layer 11, at MXFP8 saved a ninth of the loss, about what its energies say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from torq_jax.config import SITES, DecoderConfig
from torq_jax.errors import ConversionError
from torq_jax.mxfp4 import BLOCK, padded_size
from torq_jax.mxfp8 import ScaleRule

SCALE_RULE: ScaleRule = "ceil"
"""Of both operands at MXFP8: it has the smaller error (see :func:`torq_jax.mxfp8.quantize`)."""

ERROR = {"mxfp4": 0.0125, "mxfp8": 0.0007}
"""Mean squared error of each format on normally distributed values of variance one, under the default scale rules."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A site, what rounding it to MXFP4 costs, and what it would take at MXFP8."""

    layer: int
    site: str
    activation_loss: float
    """Modelled, in nats a token, for rounding the activation to MXFP4."""
    weight_loss: float
    """The same for rounding the weights, each to its nearest value."""
    extra_bytes: int
    """At MXFP8, beyond MXFP4."""

    @property
    def loss(self) -> float:
        """Modelled loss of the site at MXFP4, in nats a token."""
        return self.activation_loss + self.weight_loss

    @property
    def name(self) -> str:
        """As people write it: ``layer 3 mlp_out``."""
        return f"layer {self.layer} {self.site}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The sites at MXFP8, layer by layer, and what they were chosen from."""

    budget: float
    budget_bytes: int
    smallest_bytes: int
    """What the cheapest of all sites would take."""
    loss: float
    """Modelled, of all sites at MXFP4, in nats a token."""
    sites: tuple[Candidate, ...]

    @property
    def extra_bytes(self) -> int:
        """What the chosen sites take beyond MXFP4."""
        return sum(c.extra_bytes for c in self.sites)

    def share(self, candidate: Candidate) -> float:
        """Part of the modelled loss of all sites."""
        return candidate.loss / self.loss if self.loss else 0.0

    def holds(self, layer: int, site: str) -> bool:
        """Whether a site is among the chosen ones."""
        return any((c.layer, c.site) == (layer, site) for c in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for the manifest and the report."""
        return {
            "budget": self.budget,
            "budget_bytes": self.budget_bytes,
            "extra_bytes": self.extra_bytes,
            "modelled_loss": self.loss,
            "sites": [dataclasses.asdict(c) | {"share": self.share(c)} for c in self.sites],
        }


def check(budget: float, *, sensitivity: str, weights: str, activations: str) -> None:
    """Raise ConversionError for a budget that is no share of the bytes, or settings that it does not go with."""
    if not 0 < budget <= 1:  # NaN included
        raise ConversionError(
            f"--mixed {budget}: must be a share of the linear layers' bytes, above 0 and at most 1: 0.05 allows 5 % "
            "more; leave it out to keep every site at MXFP4"
        )
    if sensitivity != "loss":
        raise ConversionError(
            f"--mixed needs to know what the loss reacts to, and sensitivity is {sensitivity!r}: pass --sensitivity "
            "loss, or leave --mixed out"
        )
    for what, form in (("weights", weights), ("activations", activations)):
        if form != "mxfp4":
            raise ConversionError(
                f"--mixed keeps a few sites of an MXFP4 model at MXFP8, and {what} are {form!r}: pass "
                f"--{what} mxfp4, or leave --mixed out"
            )


def candidate(config: DecoderConfig, layer: int, site: str, costs: Iterable[float]) -> Candidate:
    """A site with ``costs`` of its activation and of its weights (:meth:`convert.gradients.Sensitivity.costs`).

    Raises:
      ConversionError: costs that are not finite.
    """
    activation, weights = (float(c) * ERROR["mxfp4"] / 2 for c in costs)
    if not math.isfinite(activation + weights):
        raise ConversionError(f"layer {layer}, {site}: gradients became NaN or infinite")
    return Candidate(
        layer, site, activation, weights, _elements(config, site) // 2
    )  # four bits more a weight


def linear_bytes(config: DecoderConfig) -> int:
    """Bytes of all linear layers in MXFP4, padding included."""
    return config.num_layers * sum(_elements(config, s) // 2 + _elements(config, s) // BLOCK for s in SITES)


def choose(config: DecoderConfig, candidates: Sequence[Candidate], budget: float) -> Choice:
    """Spend a budget.

    Args:
      config: of the decoder.
      candidates: every site of every layer.
      budget: bytes as a share of :func:`linear_bytes`.

    Returns:
      The choice. Sites of equal loss a byte are taken in the order of layers, then of
      :data:`torq_jax.config.SITES`; one without any loss is never taken.
    """
    # As written: 0.05 is a twentieth, not the binary number beside it.
    allowed = math.floor(Fraction(str(budget)) * linear_bytes(config))
    place = lambda c: (c.layer, SITES.index(c.site))  # noqa: E731
    chosen, spent = [], 0
    for one in sorted(candidates, key=lambda c: (-c.loss / c.extra_bytes, *place(c))):
        if one.loss > 0 and spent + one.extra_bytes <= allowed:
            chosen.append(one)
            spent += one.extra_bytes
    return Choice(
        budget,
        allowed,
        min(c.extra_bytes for c in candidates),
        math.fsum(c.loss for c in candidates),  # in whatever order they come
        tuple(sorted(chosen, key=place)),
    )


def nothing_chosen(config: DecoderConfig, choice: Choice) -> str:
    """Why a choice is empty, for the report."""
    if not choice.loss:
        return "--mixed: the loss reacts to no site, so none is kept at MXFP8"
    least = math.ceil(1e6 * choice.smallest_bytes / linear_bytes(config)) / 1e6
    return (
        f"--mixed {choice.budget} allows {choice.budget_bytes} bytes, and the smallest site takes "
        f"{choice.smallest_bytes}: none is kept at MXFP8; raise it to {least:g} at least"
    )


def _elements(config: DecoderConfig, site: str) -> int:
    """Weights of a site as stored, in whole blocks."""
    return sum(config.site_out_features(site).values()) * padded_size(config.site_in_features(site))
