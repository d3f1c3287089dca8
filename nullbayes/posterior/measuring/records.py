"""What was observed over a data set under one method, and the figures that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nullbayes.posterior.measuring.curves import Answers, bin_sums, binned_error
from nullbayes.posterior.measuring.estimates import (
    GROUPS,
    Estimate,
    from_sums,
    mean,
    ratio,
    root,
    verdict,
)
from nullbayes.posterior.measuring.observing import LEVELS, Observed, half_width

#: inputs in a group of the joint log-likelihood
JOINT = 10


@dataclass(frozen=True)
class Metric:
    """A figure as people read it: ``better`` is 1 (higher), -1 (lower) or 0 (neither)."""

    label: str
    better: int
    digits: int
    meaning: str

    def judged(self, difference: float, error: float) -> str:
        """`verdict` of a paired difference of this figure."""
        better = self.better > 0
        return verdict(difference, error, higher_is_better=better, digits=self.digits)


METRICS = {
    "accuracy": Metric("accuracy", 1, 4, "share of observations predicted right"),
    "rmse": Metric("RMSE", -1, 4, "root mean squared error of the mean prediction"),
    "loss": Metric("loss", -1, 4, "mean loss over the samples"),
    "nll": Metric("NLL", -1, 4, "negative log predictive density, nats an example"),
    "joint_nll": Metric(
        "joint NLL",
        -1,
        3,
        f"the same of {JOINT} inputs together, drawn from two examples, nats a group",
    ),
    "brier": Metric("Brier score", -1, 4, "mean squared error of the probabilities"),
    "crps": Metric("CRPS", -1, 4, "continuous ranked probability score of the Gaussian prediction"),
    "ece": Metric("ECE", -1, 4, "expected calibration error, 15 bins of equal width"),
    "adaptive_ece": Metric("adaptive ECE", -1, 4, "the same, bins with equal numbers of answers"),
    "classwise_ece": Metric(
        "class-wise ECE", -1, 4, "of every class's probability, mean of classes"
    ),
    "gap": Metric("confidence − accuracy", 0, 4, "above zero: overconfident"),
    "aurc": Metric("AURC", -1, 4, "mean error rate over all shares of inputs answered"),
    "coverage_at_risk": Metric(
        "coverage at 5 % risk", 1, 3, "largest share that can be answered with 5 % errors"
    ),
    **{
        f"coverage_{100 * level:g}": Metric(
            f"{100 * level:g} % interval covers", 0, 3, "share of targets inside"
        )
        for level in LEVELS
    },
    "width_90": Metric("90 % interval width", 0, 4, "mean width, in the unit of the targets"),
    "z_squared": Metric(
        "mean squared z", 0, 3, "squared error over predicted variance; calibrated: 1"
    ),
}


@dataclass(frozen=True)
class Records:
    """All observations of ``N`` examples under one method.

    Attributes:
        nll, count, score, sums: as in `Observed`, ``(N,)`` each.
        log_likelihoods: ``(S, N)`` of each sample by itself; None where there is no likelihood to join.
        answers: confidences and hits; None without classes.
        error, group, example: ``(K,)`` squared errors where there are no classes, and what they belong to.
        z: ``(K,)`` errors of a regression in units of the predicted standard deviation; None otherwise.
        classwise: ``(G, O, bins, 3)`` sums of class-wise calibration by jackknife group; None: too many classes.
    """

    score_name: str
    nll: Tensor
    count: Tensor
    score: Tensor
    sums: dict[str, Tensor]
    log_likelihoods: Tensor | None
    answers: Answers | None
    group: Tensor
    example: Tensor
    error: Tensor | None
    classwise: Tensor | None
    z: Tensor | None = None

    def __len__(self) -> int:
        return len(self.nll)

    def figures(self) -> dict[str, Estimate]:
        """Every figure that these observations allow, by the names of `METRICS`."""
        score = ratio(self.score, self.count)
        out = {self.score_name: root(score) if self.score_name == "rmse" else score}
        out["nll"] = mean(self.nll)
        if self.log_likelihoods is not None and len(self) >= 2:
            out["joint_nll"] = mean(joint_nll(self.log_likelihoods))
        for name, values in self.sums.items():
            if name in METRICS:
                out[name] = ratio(values, self.count)
        if self.answers is not None:
            out |= calibration(self.answers)
            if self.classwise is not None:
                out["classwise_ece"] = from_sums(binned_error, self.classwise)
            out |= {
                "aurc": self.answers.aurc(),
                "coverage_at_risk": self.answers.coverage_at_risk(),
            }
        return {name: out[name] for name in METRICS if name in out}

    def where(self, mask: Tensor) -> Records:
        """The examples that ``mask (N,)`` lets through, without what is not additive over classes."""
        inside = mask[self.example]
        return replace(
            self,
            nll=self.nll[mask],
            count=self.count[mask],
            score=self.score[mask],
            sums={name: values[mask] for name, values in self.sums.items()},
            log_likelihoods=None,
            answers=None if self.answers is None else self.answers.where(inside),
            group=self.group[inside],
            example=self.example[inside],
            error=None if self.error is None else self.error[inside],
            z=None if self.z is None else self.z[inside],
            classwise=None,
        )

    def part(self) -> dict[str, Estimate]:
        """The figures of a slice: score, NLL and calibration."""
        score = ratio(self.score, self.count)
        out = {self.score_name: root(score) if self.score_name == "rmse" else score}
        out["nll"] = mean(self.nll)
        if self.answers is not None:
            out["ece"], out["gap"] = self.answers.ece(), self.answers.gap()
        for name in ("coverage_90", "z_squared"):
            if name in self.sums:
                out[name] = ratio(self.sums[name], self.count)
        return out

    def of_group(self, number: int) -> dict[str, Estimate]:
        """The figures of one class, label or output."""
        inside = self.group == number
        if self.answers is None:
            if self.error is None:
                return {}
            error, example = self.error[inside], self.example[inside]
            out = {"rmse": root(_by_example(error, example, len(self)))}
            if self.z is not None:
                z = self.z[inside]
                within = (z.abs() <= half_width(0.9)).double()
                out["coverage_90"] = _by_example(within, example, len(self))
                out["z_squared"] = _by_example(z.square(), example, len(self))
            return out
        answers = self.answers.where(inside)
        hits = _by_example(answers.hit, answers.example, len(self))
        return {"accuracy": hits, "ece": answers.ece(), "gap": answers.gap()}


def calibration(answers: Answers) -> dict[str, Estimate]:
    """Calibration errors of the answers, and mean confidence minus accuracy."""
    return {"ece": answers.ece(), "adaptive_ece": answers.adaptive_ece(), "gap": answers.gap()}


def _by_example(values: Tensor, example: Tensor, count: int) -> Estimate:
    totals = torch.zeros(count, dtype=torch.float64).index_add_(0, example, values)
    numbers = torch.zeros_like(totals).index_add_(0, example, torch.ones_like(values))
    held = numbers > 0
    return ratio(totals[held], numbers[held])


def joint_nll(log_likelihoods: Tensor, seed: int = 0) -> Tensor:
    """Negative joint log-likelihood of groups of `JOINT` inputs under samples, ``(N // 2,)`` nats.

    Dyadic sampling (Osband et al., *Evaluating high-order predictive distributions in deep learning*, UAI 2022): a
    group repeats two anchor examples, so that its joint likelihood tells whether samples are right or wrong *together*.
    Examples are paired at random, each once; the expectation over how often either anchor is repeated, binomial, is
    taken exactly. ``-log mean_s Π_t p_s(y_t | x_t)``; for a single sample that is `JOINT` times the mean NLL.

    Args:
        log_likelihoods: ``(S, N)``.
    """
    samples, n = log_likelihoods.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    first, second = order[: n // 2], order[n // 2 : 2 * (n // 2)]
    a, b = (log_likelihoods[:, index].double() for index in (first, second))
    total = torch.zeros(n // 2, dtype=torch.float64)
    for k in range(JOINT + 1):
        weight = math.comb(JOINT, k) / 2**JOINT
        together = (k * a + (JOINT - k) * b).logsumexp(0) - math.log(samples)
        total -= weight * together
    return total


@dataclass
class Recorder:
    """Collects batches; bounded by a few dozen numbers an example, whatever the outputs are."""

    score_name: str
    seen: int = 0
    parts: list[Observed] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    log_likelihoods: list[Tensor] = field(default_factory=list)
    classwise: Tensor | None = None
    too_many: bool = False

    def add(self, observed: Observed, log_likelihoods: Tensor | None) -> None:
        """One batch, in the order of the data."""
        self.offsets.append(self.seen)
        self._count_classes(observed)
        # What was summed need not stay.
        self.parts.append(replace(observed, classwise=None, scores={}))
        if log_likelihoods is not None:
            self.log_likelihoods.append(log_likelihoods)
        self.seen += len(observed.nll)

    def _count_classes(self, observed: Observed) -> None:
        if observed.classwise is None:
            self.too_many = True
            return
        probs, happened = observed.classwise
        classes = probs.shape[1]
        if self.classwise is None:
            self.classwise = torch.zeros(GROUPS, classes, 15, 3, dtype=torch.float64)
        rows = observed.example if len(probs) == len(observed.example) else torch.arange(len(probs))
        groups = ((rows + self.seen) % GROUPS)[:, None] * classes + torch.arange(classes)
        sums = bin_sums(probs.flatten(), happened.flatten(), groups.flatten())
        flat = self.classwise.view(-1, *sums.shape[1:])
        flat[: len(sums)] += sums

    def records(self) -> Records:
        """Everything that was added."""
        parts, offsets = self.parts, self.offsets
        example = torch.cat([p.example + o for p, o in zip(parts, offsets, strict=True)])
        answers = None
        confidences = [p.confidence for p in parts if p.confidence is not None]
        hits = torch.cat([p.hit for p in parts if p.hit is not None] or [torch.empty(0)])
        if confidences:
            answers = Answers(torch.cat(confidences), hits, example, self.seen)
        squared = answers is None and len(hits) == len(example)
        scaled = [p.z for p in parts if p.z is not None]
        return Records(
            self.score_name,
            torch.cat([p.nll for p in parts]),
            torch.cat([p.count for p in parts]),
            torch.cat([p.score for p in parts]),
            {name: torch.cat([p.sums[name] for p in parts]) for name in parts[0].sums},
            torch.cat(self.log_likelihoods, 1) if self.log_likelihoods else None,
            answers,
            torch.cat([p.group for p in parts]),
            example,
            hits if squared else None,
            None if self.too_many else self.classwise,
            torch.cat(scaled) if scaled else None,
        )
