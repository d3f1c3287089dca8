"""The library's own posteriors: null-space with each thing to preserve, and the full linearised Laplace posterior."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import nullbayes as nb
from experiments.methods.base import Case, Draws, Method, Tuned, Variant, information, tune
from experiments.methods.weights import last_weights, sampled
from experiments.tasks import Scale
from nullbayes.certificate.certificate import RENAMED
from nullbayes.datasets import Split

BATCH = 250
# Each prior of a full Laplace posterior is a fit of its own, so its path is coarser: whole decades from the evidence's
# precision up (below it the posterior only grows wider), then half a decade to either side.
LAPLACE_DECADES = (0.0, 1.0, 2.0, 3.0, 4.0)
HALVES = (-0.5, 0.5)
SAMPLED_DECADES = tuple(float(k) for k in range(-2, 7))
# Of a large network: the share of the weights that move, and how many times as many examples that leaves room for.
SHARE, MORE = 0.05, 4
DECLARED = "information"  # the library's default, which stands for its posteriors in every table


def likelihood(case: Case) -> str | nb.Likelihood:
    return "classification" if case.task.kind == "classification" else nb.Regression(case.noise)


def fitted(kind: Any, case: Case, split: Split | None = None, **options: Any) -> Any:
    """A posterior around the case's network, fitted on the task's constrained examples (or ``split``)."""
    scale: Scale = case.task.scale
    if "solver" not in options and "tolerance" not in options:
        options["tolerance"] = scale.solver_tolerance
    posterior = kind(case.network, likelihood(case), memory=scale.memory, **options)
    data = case.task.constrained if split is None else split
    size = scale.fit_batch
    batches = list(zip(data.inputs.split(size), data.targets.split(size), strict=True))
    return posterior.fit(batches, scale.samples, case.seed, progress=False)


def slim(posterior: Any) -> Any:
    """The same samples without the training rows, which take gigabytes; it cannot draw more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.safetensors"
        posterior.save(path)
        return nb.load(path, posterior.model)


def unit_draws(posterior: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, O)`` and linearised changes at prior precision one ``(S, B, O)``; of any number of inputs."""
    parts = [posterior.predict(part) for part in x.split(BATCH)]
    point = torch.cat([p.point for p in parts])
    change = torch.cat([p.outputs - p.point for p in parts], 1)
    return point, change * posterior.prior_precision**0.5


def weight_changes(posterior: Any) -> tuple[list[str], Tensor]:
    """Names, and the changes of the weights at prior precision one ``(S, P)``."""
    named = {
        n: p.detach() for n, p in posterior.model.named_parameters() if n in posterior.space.by_name
    }
    rows = [
        torch.cat([(state[n] - p).flatten() for n, p in named.items()])
        for state in posterior.sample()
    ]
    return list(named), torch.stack(rows) * posterior.prior_precision**0.5


def natural_precision(posterior: Any) -> float:
    """``γ / ‖θ̂‖²``, as wide as the weights are: what the evidence says before the library raises it."""
    named = posterior.model.named_parameters()
    weights = [p.detach().double() for n, p in named if n in posterior.space.by_name]
    return max(1, posterior.certificate.rank) / sum(float(w.square().sum()) for w in weights)


def told(point: Tensor, unit: Tensor, natural: float) -> Tensor:
    """Information ``(B,)`` of draws at prior precision one, counted at the natural one as the library counts it."""
    return information(Draws(point + unit * natural**-0.5, point).around)


def certificate_details(posterior: Any) -> dict[str, Any]:
    keys = (
        "method", "preserve", "delta", "residual", "drift", "sampled_drift", "row_drift", "output_drift",
        "prior_share", "constraints", "parameters", "rank", "null_dim", "map_accuracy", "posterior_accuracy",
        "prior_precision", "solver", "iterations", "status", "examples", "seconds", "held", "verdict",
        "unseen_divergence", "notes",
    )  # fmt: skip
    every = posterior.certificate.as_dict()
    return {
        key: every.get(RENAMED.get(key, key)) for key in keys
    }  # pieces have the names of version 0.1


class NullSpace(Method):
    """``nb.NullSpacePosterior``: by the evidence, which needs no validation data; calibrated; as sampled networks."""

    version = 3
    preserve: ClassVar[str]
    title: ClassVar[str]

    def build(self, case: Case) -> None:
        self.posterior = self.around(case)
        self.details = {"certificate": certificate_details(self.posterior)}
        # The library computes novelty exactly where that is cheap; elsewhere it is the variance of the draws, which
        # are there already.
        few = case.validation.inputs[:4]
        _, unit = unit_draws(self.posterior, few)
        unit = self.posterior.likelihood.centre(unit).double()
        drawn = unit.square().mean(0).sum(-1) / self.posterior.prior_precision
        default = self.posterior.novelty(few, score="variance").double()
        self.exact = not torch.allclose(default, drawn, rtol=1e-3)
        if not self.exact:
            self.posterior = slim(self.posterior)

    def around(self, case: Case) -> nb.NullSpacePosterior:
        posterior: nb.NullSpacePosterior = fitted(
            nb.NullSpacePosterior,
            case,
            self.kept(case),
            preserve=self.preserve,
            **self.choices(case),
        )
        return posterior

    def kept(self, case: Case) -> Split | None:
        """The examples whose predictions are kept; None: the task's own choice."""
        return None

    def choices(self, case: Case) -> dict[str, Any]:
        """Further arguments of the posterior."""
        return {}

    def tune(self, case: Case) -> dict[str, Variant]:
        self.evidence = float(self.posterior.prior_precision)
        self.natural = natural_precision(self.posterior)
        x, y = case.validation.inputs, case.validation.targets
        point, unit = unit_draws(self.posterior, x)

        def nll(values: list[float]) -> list[float]:
            return [case.nll(Draws(point + unit * a**-0.5, point), y) for a in values]

        calibrated = tune(self.evidence, nll)
        self.names, self.changes = weight_changes(self.posterior)

        def nll_sampled(values: list[float]) -> list[float]:
            return [
                case.nll(
                    Draws(torch.cat([self._sampled(part, a) for part in x.split(BATCH)], 1)), y
                )
                for a in values
            ]

        sampled_best = tune(self.evidence, nll_sampled, SAMPLED_DECADES)
        return self._variants(calibrated, sampled_best)

    def _variants(self, calibrated: Tuned, drawn: Tuned) -> dict[str, Variant]:
        name, alpha = self.name, "prior precision"
        self.alphas = {
            name: calibrated.value,
            f"{name}_evidence": self.evidence,
            f"{name}_sampled_evidence": self.evidence,
            f"{name}_sampled": drawn.value,
        }
        return {
            name: Variant(
                self.title, alpha, calibrated.value, DECLARED, headline=True, path=calibrated.path
            ),
            f"{name}_evidence": Variant(
                f"{self.title}, by evidence", "nothing", self.evidence, DECLARED
            ),
            f"{name}_sampled": Variant(
                f"{self.title}, sampled", alpha, drawn.value, DECLARED, path=drawn.path
            ),
            f"{name}_sampled_evidence": Variant(
                f"{self.title}, sampled, by evidence", "nothing", self.evidence, DECLARED
            ),
        }

    def _sampled(self, x: Tensor, alpha: float) -> Tensor:
        return sampled(self.posterior.model, self.names, self.changes, x, alpha**-0.5)

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        out: dict[str, Draws] = {}
        linear = [key for key in only if "sampled" not in key]
        if linear:
            point, unit = unit_draws(self.posterior, x)
            exact = self.posterior.novelty(x, score="variance") if self.exact else None
            tells = told(point, unit, self.natural)
            for key in linear:
                alpha = self.alphas[key]
                scores = {"information": tells}
                if exact is not None:
                    # At the evidence's precision; the order is the same at any other.
                    scores["variance"] = exact * (self.evidence / alpha)
                out[key] = Draws(point + unit * alpha**-0.5, point, scores)
        for key in only:
            if "sampled" in key:
                out[key] = Draws(self._sampled(x, self.alphas[key]))
        return out


class NullSpacePredictions(NullSpace):
    """The library's default."""

    name, preserve, title = "null_predictions", "predictions", "null-space"


class NullSpaceOutputs(NullSpace):
    """Every raw output kept."""

    name, preserve, title = "null_outputs", "outputs", "null-space, outputs"


class NullSpaceLoss(NullSpace):
    """One row for each example."""

    name, preserve, title = "null_loss", "loss", "null-space, loss"


class NullSpaceLast(NullSpace):
    """The last layer's weights alone; all training examples, also where all weights leave room for a few."""

    name, preserve, title = "null_last", "predictions", "null-space, last layer"
    version = 4

    def kept(self, case: Case) -> Split:
        return case.train

    def choices(self, case: Case) -> dict[str, Any]:
        # Many rows on few weights: the tolerance that a task has for all weights does not apply.
        return {"parameters": last_weights(case.network), "tolerance": None}


class NullSpaceLastOutputs(NullSpaceLast):
    """The same, every raw output kept."""

    name, preserve, title = "null_last_outputs", "outputs", "null-space, last layer, outputs"


class NullSpacePart(NullSpace):
    """The last twentieth of a large network's weights, which leave room for more examples than all of them."""

    name, preserve, title = "null_part", "predictions", "null-space, last twentieth"
    version = 1

    def kept(self, case: Case) -> Split:
        return case.train[: MORE * len(case.task.constrained)]

    def choices(self, case: Case) -> dict[str, Any]:
        return {"parameters": last_weights(case.network, SHARE)}


class NullSpacePartOutputs(NullSpacePart):
    """The same, every raw output kept."""

    name, preserve, title = "null_part_outputs", "outputs", "null-space, last twentieth, outputs"


class FullLaplace(Method):
    """``nb.LaplacePosterior``: by the evidence; tuned, which is a fit for each prior precision; tempered; sampled."""

    name = "laplace_full"
    version = 2

    def build(self, case: Case) -> None:
        self.posterior = slim(fitted(nb.LaplacePosterior, case))
        self.details = {"certificate": certificate_details(self.posterior)}

    def tune(self, case: Case) -> dict[str, Variant]:
        self.evidence = float(self.posterior.prior_precision)
        x, y = case.validation.inputs, case.validation.targets
        least = {"linearised": math.inf, "sampled": math.inf}
        tried: dict[float, float] = {}  # NLL of the sampled networks of the same fits

        def nll(values: list[float]) -> list[float]:
            return [one(alpha) for alpha in values]

        def one(alpha: float) -> float:
            posterior = self.posterior
            if alpha != self.evidence:
                posterior = slim(fitted(nb.LaplacePosterior, case, prior_precision=alpha))
            point, unit = unit_draws(posterior, x)
            found = case.nll(Draws(point + unit * alpha**-0.5, point), y)
            if found < least["linearised"]:
                least["linearised"], self.tuned = found, posterior
            weights = weight_changes(posterior)
            draws = [self._sampled(part, weights, alpha) for part in x.split(BATCH)]
            tried[alpha] = case.nll(Draws(torch.cat(draws, 1)), y)
            if tried[alpha] < least["sampled"]:
                least["sampled"], self.drawn, self.drawn_alpha = tried[alpha], weights, alpha
            return found

        best = tune(self.evidence, nll, LAPLACE_DECADES, HALVES)
        point, unit = unit_draws(self.posterior, x)

        def nll_tempered(values: list[float]) -> list[float]:
            return [case.nll(Draws(point + unit * a**-0.5, point), y) for a in values]

        tempered = tune(self.evidence, nll_tempered)
        self.tempered = tempered.value
        order = sorted(tried)
        drawn = {"value": order, "nll": [tried[a] for a in order]}
        title, name, what = "full Laplace", self.name, "prior precision"
        return {
            name: Variant(title, what, best.value, headline=True, path=best.path),
            f"{name}_evidence": Variant(f"{title}, by evidence", "nothing", self.evidence),
            f"{name}_tempered": Variant(
                f"{title}, tempered",
                "scale of the covariance at the evidence's prior",
                tempered.value,
                path=tempered.path,
            ),
            f"{name}_sampled": Variant(f"{title}, sampled", what, self.drawn_alpha, path=drawn),
        }

    def _sampled(self, x: Tensor, weights: tuple[list[str], Tensor], alpha: float) -> Tensor:
        return sampled(self.posterior.model, *weights, x, alpha**-0.5)

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        out: dict[str, Draws] = {}
        if self.name in only:
            prediction = self.tuned.predict(x)
            out[self.name] = Draws(prediction.outputs, prediction.point)
        at = {f"{self.name}_evidence": self.evidence, f"{self.name}_tempered": self.tempered}
        if wanted := [key for key in only if key in at]:
            point, unit = unit_draws(self.posterior, x)
            for key in wanted:
                out[key] = Draws(point + unit * at[key] ** -0.5, point)
        if (key := f"{self.name}_sampled") in only:
            out[key] = Draws(self._sampled(x, self.drawn, self.drawn_alpha))
        return out
