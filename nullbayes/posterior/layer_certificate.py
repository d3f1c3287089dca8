"""Did the network's own predictions stand? The certificate of a layer null-space posterior."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE, ALLOWED_LEFT_OUT
from nullbayes.common.memory import format_bytes
from nullbayes.likelihood.score import score_named
from nullbayes.posterior.calibration_path import ALLOWED_LOSS, BY_CHANCE

LAYERS = "layer null-space"
# With `delta=0`: how far outputs may move, relative to themselves, by rounding.
ALLOWED_CHANGE = {"torch.float64": 1e-9, "torch.float32": 1e-4}
HALF_CHANGE = 5e-2
# A share of free directions below which a layer counts as fixed by the data.
LITTLE = 0.01


def loses(name: str, before: float | None, after: float | None, examples: int) -> bool:
    """Whether accuracy falls by more than a point and by more than four examples; False of scores of other names."""
    if before is None or after is None or not examples or not score_named(name).higher_is_better:
        return False
    lost = score_named(name).worsened(before, after)
    return lost > max(ALLOWED_LOSS, BY_CHANCE / examples)


@dataclass(frozen=True)
class LayerReport:
    """One block of weights.

    Attributes:
        name: of its weight; ``parameters``: with its biases.
        outputs, inputs: size of the matrix (of each group), the biases' columns included; ``groups``.
        seen: inputs that it received from the training data.
        free: directions of a row that are left, of ``inputs``: ``tr P``.
        sketch_error: what a sketch of its second moments cut off, relative to the mean eigenvalue; None: no sketch.
    """

    name: str
    parameters: tuple[str, ...]
    groups: int
    outputs: int
    inputs: int
    seen: int
    free: float
    sketch_error: float | None = None

    @property
    def share(self) -> float:
        """Of the directions of a row."""
        return self.free / max(1, self.inputs)


@dataclass(frozen=True)
class LayerCertificate:
    """What samples of the weights do to the network's own outputs, in figures and in words (``verdict``). ``print`` it.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the trained network's prediction to that of a sampled network,
            on training examples drawn from all the data, in nats an observation.
        change: root mean square change of their raw outputs, relative to the outputs.
        left_out_divergence: the divergence for an example had it been left out of the fit, linearised, closed form; an
            estimate for other data of the same kind. None where it does not apply.
        network_score, posterior_score: training score (``score_name``) of the trained network, and of the sampled
            networks together; None without labels.
        weight_change: ``‖Δ‖ / ‖θ̂‖`` over the weights that take part, root mean square over samples.
        delta: where the null space ends, relative to the mean eigenvalue of each layer's second moments; 0: exact.
        prior_precision: the ``α`` that these figures are for.
        layers: by block of weights: sizes, inputs seen, directions left.
        fixed: parameters that stay as they are, with the reason.
        examples, checked_examples, checked_samples: in the fit; run through sampled networks; how many of those.
        dtype: of the network. ``seconds``, ``peak_memory``: of the fit.
    """

    divergence: float
    change: float
    left_out_divergence: float | None
    network_score: float | None
    posterior_score: float | None
    score_name: str
    weight_change: float
    free_share: float
    delta: float
    prior_precision: float
    layers: tuple[LayerReport, ...]
    fixed: dict[str, str]
    examples: int
    checked_examples: int
    checked_samples: int
    dtype: str
    seconds: float
    peak_memory: int
    notes: tuple[str, ...] = field(default=())

    @property
    def promises(self) -> bool:
        """Whether a guarantee was promised: it always is."""
        return True

    @property
    def exact(self) -> bool:
        """Whether the exact null space was asked for."""
        return self.delta == 0.0

    @property
    def held(self) -> bool:
        """Training predictions stand on sampled networks, and there are directions left to move in.

        Exact: outputs moved by rounding alone. With a soft edge: by 0.005 nats at most on average, and accuracy falls
        by no more than a point or four examples: where predictions are close to a tie, few nats turn them over.
        """
        if not self.free_share > 0 or math.isnan(self.divergence):
            return False
        if self.exact:
            return self.change <= ALLOWED_CHANGE.get(self.dtype, HALF_CHANGE)
        return self.divergence <= ALLOWED_DIVERGENCE * 1.0001 and not self.loses_score

    @property
    def loses_score(self) -> bool:
        """Whether samples classify training examples worse than the network, see :func:`loses`."""
        scores = self.network_score, self.posterior_score
        return loses(self.score_name, *scores, self.checked_examples)

    @property
    def verdict(self) -> str:
        """The certificate in words."""
        moved = (
            f"Sampled networks change the weights by {100 * self.weight_change:.1f} % of their norm; on "
            f"{self.checked_examples} training examples drawn from {self.examples:,}, outputs move by "
            f"{self.change:.1e} of their size and predictions by {self.divergence:.2g} nats."
        )
        if self.network_score is not None and self.posterior_score is not None:
            name = "RMSE" if self.score_name == "rmse" else self.score_name
            moved += f" Training {name} {self.network_score:.4f} → {self.posterior_score:.4f}."
        start = "The guarantee held." if self.held else "The guarantee is weak."
        return " ".join([start, moved, *self._advice()])

    def _advice(self) -> list[str]:
        out = []
        if self.loses_score and not self.exact:
            out.append(
                "Predictions are so close to ties that few nats turn them over: raise `prior_precision`, or use "
                "`delta=0`."
            )
        free = [layer.name for layer in self.layers if layer.share >= LITTLE]
        if not self.free_share > 0:
            out.append(
                "No direction is left in any layer: the training inputs span all of them. Use `delta` > 0 (a soft "
                "edge), fewer examples, or `NullSpacePosterior`, whose null space is that of the outputs."
            )
        elif len(free) < len(self.layers):
            out.append(
                f"{len(free)} of {len(self.layers)} layers have more than {100 * LITTLE:.0f} % of their "
                "directions left."
            )
        if self.left_out_divergence is not None:
            out.append(f"Examples left out would move by {self.left_out_divergence:.2g} nats.")
            if self.left_out_divergence > ALLOWED_LEFT_OUT * 1.0001:
                out.append(
                    "That is much: calibrate on validation data, or raise `prior_precision`."
                )
        cut = [layer.name for layer in self.layers if layer.sketch_error]
        if cut:
            out.append(
                f"Second moments of {cut[:3]} were sketched and cut off: the posterior there is narrower than exact"
                + (", and no direction of them is certain to be free." if self.exact else ".")
            )
        if self.fixed:
            out.append(f"{len(self.fixed)} parameters stay fixed: {sorted(self.fixed)[:4]}.")
        return out + list(self.notes)

    def as_dict(self) -> dict[str, Any]:
        """All fields, with ``method``, ``held`` and ``verdict``; JSON-able."""
        said = {"method": LAYERS, "held": self.held, "verdict": self.verdict}
        return {**asdict(self), **said, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerCertificate:
        """The inverse of :meth:`as_dict`."""
        known = {k: v for k, v in values.items() if k not in ("method", "held", "verdict")}
        layers = tuple(
            LayerReport(**(layer | {"parameters": tuple(layer["parameters"])}))
            for layer in known.pop("layers")
        )
        return cls(layers=layers, **(known | {"notes": tuple(known.get("notes", ()))}))

    def __str__(self) -> str:
        lines = [
            self.verdict,
            f"delta {self.delta:g}, prior precision {self.prior_precision:.4g}, {100 * self.free_share:.1f} % of the "
            f"prior's variance left, {self.seconds:.1f} s, peak memory {format_bytes(self.peak_memory)}",
            f"{'layer':<32} {'matrix':>16} {'inputs seen':>12} {'free':>10}",
        ]
        for layer in self.layers:
            groups = f"{layer.groups}×" if layer.groups > 1 else ""
            size = f"{groups}{layer.outputs}×{layer.inputs}"
            lines.append(
                f"{layer.name:<32} {size:>16} {layer.seen:>12,} {100 * layer.share:>8.1f} %"
            )
        lines += [f"{name:<32} fixed: {reason}" for name, reason in self.fixed.items()]
        return "\n".join(lines)
