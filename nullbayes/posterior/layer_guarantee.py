"""The guarantee measured on the network itself: what samples do to training examples, and to examples left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE, ALLOWED_LEFT_OUT
from nullbayes.errors import InputError, NonFiniteError
from nullbayes.likelihood import Binary, Classification, Likelihood, Regression
from nullbayes.model.batch import Inputs, take
from nullbayes.posterior.layer_certificate import loses
from nullbayes.posterior.layer_state import Checked, LayerState

CHECKED_SAMPLES = 4
# Samples that a search for the prior precision goes by.
SEARCH_SAMPLES = 2
# And training examples.
SEARCH_EXAMPLES = 16
# What predictions that are turned over, and move by few nats, count as: times what is allowed.
TURNED_OVER = 4.0
# Bytes of outputs of all samples that are held at a time.
OUTPUT_BYTES = 2**28


@dataclass(frozen=True)
class Measured:
    """What sampled networks do to training examples drawn from all the data.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the network's prediction, nats an observation.
        change: root mean square change of the raw outputs, relative to that of the outputs.
        network_score, posterior_score: of the trained network and of the samples' mean prediction; None without labels.
        observed: numbers of which ``divergence`` is the mean.
    """

    divergence: float
    change: float
    network_score: float | None
    posterior_score: float | None
    examples: int
    observed: int


def targets_for(likelihood: Likelihood, point: Tensor, targets: Any, inputs: Inputs) -> Any:
    """The targets of a batch, or stand-ins of the right shape: divergences between predictions do not depend on them.

    Raises `InputError` for a likelihood of one's own, whose divergence may.
    """
    if targets is not None:
        likelihood.validate(point, targets, "the training data")
        return likelihood.prepare_targets(point, targets)
    if isinstance(likelihood, Classification):
        axis = likelihood.class_axis
        if axis is None:
            axis = 1 if point.ndim == 2 else -1
        return point.argmax(axis)
    if isinstance(likelihood, Binary):
        return (point > 0).to(point.dtype)
    if isinstance(likelihood, Regression):
        return point.clone()
    if likelihood.layouts is not None:
        return inputs
    raise InputError(
        f"{likelihood!r} needs targets to say how far predictions move: pass batches of (inputs, targets)."
    )


def measure(
    state: LayerState, likelihood: Likelihood, alpha: float, samples: int, examples: int = 0
) -> Measured:
    """Run the re-weighted network itself on training examples that the pass over the data kept.

    Args:
        examples: about so many of them; 0: all that the guarantee is measured on.
    """
    key = (alpha, samples, examples)
    if key not in state.measured:
        groups = _few(state.checked, examples) if examples else state.checked
        each = _outputs(state, groups, alpha**-0.5, samples)
        state.measured[key] = _measured(likelihood, samples, each)
    found: Measured = state.measured[key]
    return found


def measure_on(
    state: LayerState,
    likelihood: Likelihood,
    alpha: float,
    samples: int,
    batches: Iterable[tuple[Inputs, Any]],
) -> Measured:
    """The same on batches ``(inputs, targets or None)`` that are not kept; each sample is made for each batch."""
    functional = state.functional
    groups = ((x, y, functional.outputs(x, "the training data")) for x, y in batches)
    each = ((group, state.sampled(group[0], alpha**-0.5, samples)) for group in groups)
    return _measured(likelihood, samples, each)


def _few(groups: list[Checked], examples: int) -> list[Checked]:
    out: list[Checked] = []
    for inputs, targets, point in groups:
        size, room = len(point), examples - sum(len(p) for _, _, p in out)
        if size <= room:
            out.append((inputs, targets, point))
        elif room > 0:
            labels = None if targets is None else take(targets, 0, room, size)
            out.append((take(inputs, 0, room, size), labels, point[:room]))
    return out


def _measured(
    likelihood: Likelihood, samples: int, each: Iterable[tuple[Checked, Tensor]]
) -> Measured:
    divergence, count, moved, size = 0.0, 0, 0.0, 0.0
    before, after, examples = [0.0, 0], [0.0, 0], 0
    labelled = True
    with torch.no_grad():
        for (inputs, targets, point), outputs in each:
            if not bool(outputs.isfinite().all()):
                return Measured(math.inf, math.inf, None, None, 0, 1)
            labels = targets_for(likelihood, point, targets, inputs)
            values = likelihood.divergence(point, outputs, labels)
            divergence += float(values.double().sum())
            count += values.numel()
            moved += float((outputs - point).double().square().sum()) / samples
            size += float(point.double().square().sum())
            examples += len(point)
            labelled &= targets is not None
            if targets is None:
                continue
            for sums, made in ((before, point[None].expand(2, *point.shape)), (after, outputs)):
                total, number = likelihood.score_draws(
                    made, point, linearised=False, targets=labels
                )
                sums[0] += total
                sums[1] += number
    first, last = (
        likelihood.final_score(s[0], int(s[1])) if labelled else None for s in (before, after)
    )
    change = math.sqrt(moved / size) if size else 0.0
    return Measured(divergence / max(1, count), change, first, last, examples, count)


def _outputs(
    state: LayerState, groups: list[Checked], scale: float, samples: int
) -> Iterator[tuple[Checked, Tensor]]:
    """Outputs ``(S, B, *out)`` by group; each sample is made once, where all outputs together are small."""
    if samples * sum(point.nbytes for _, _, point in groups) > OUTPUT_BYTES:
        for group in groups:
            yield group, state.sampled(group[0], scale, samples)
        return
    made: list[list[Tensor]] = [[] for _ in groups]
    for index in range(samples):
        network = state.functional.bound(state.moved(index, scale))
        for out, (inputs, _, _) in zip(made, groups, strict=True):
            out.append(network(inputs))
    for group, out in zip(groups, made, strict=True):
        yield group, torch.stack(out)


def guarded_precision(
    state: LayerState, likelihood: Likelihood, left_out: float | None, samples: int
) -> float:
    """The natural prior precision, or the least larger one (to a tenth) at which the guarantee holds.

    Training predictions of the sampled network may move by 0.005 nats on average, those of examples left out by 0.02;
    and accuracy shall not fall, see :func:`nullbayes.posterior.layer_certificate.loses`.
    """

    def excess(alpha: float, *, whole: bool = False) -> float:
        count, examples = (samples, 0) if whole else (min(SEARCH_SAMPLES, samples), SEARCH_EXAMPLES)
        measured = measure(state, likelihood, alpha, count, examples)
        found = measured.divergence / ALLOWED_DIVERGENCE
        scores = measured.network_score, measured.posterior_score
        if state.delta != 0 and loses(likelihood.score_name, *scores, measured.examples):
            found = max(found, TURNED_OVER)
        unseen = 0.0 if left_out is None else left_out / alpha / ALLOWED_LEFT_OUT
        return max(found, unseen) if not math.isnan(found) else math.inf

    high = state.natural_precision
    if left_out is not None:
        high = max(high, left_out / ALLOWED_LEFT_OUT)
    low, value = high, excess(high)
    while value > 1:
        if high > 1e30:
            raise NonFiniteError(
                "the training outputs of sampled networks are NaN or infinite at any prior precision; check that the "
                "network's outputs are finite, and that `delta` is 0 or more."
            )
        low, high = high, high * max(1.1, 1.02 * min(value, 1e3))
        value = excess(high)
    while high / low > 1.1 and value < 0.8:
        middle = math.sqrt(low * high)
        found = excess(middle)
        if found <= 1:
            high, value = middle, found
        else:
            low = middle
    # The search went by few samples; what it found has to do for all that the certificate looks at.
    while (value := excess(high, whole=True)) > 1:
        high *= max(1.05, 1.02 * min(value, 1e3))
    return high
