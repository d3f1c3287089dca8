"""Passes over data: every method on every batch, each posterior's rows computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nullbayes.common.processes import Processes
from nullbayes.common.progress import Stages
from nullbayes.errors import InputError
from nullbayes.jacobian.shared import serve
from nullbayes.likelihood import Classification, Likelihood
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.loader import batches
from nullbayes.model.shares import Share
from nullbayes.posterior.measuring.methods import Method, Source
from nullbayes.posterior.measuring.observing import (
    Observed,
    kind_of,
    observe,
    sample_log_likelihoods,
    scores,
)
from nullbayes.posterior.measuring.records import Recorder, Records
from nullbayes.posterior.measuring.showing import Keeper
from nullbayes.posterior.measuring.subject import Moved

#: numbers of output samples held at a time
MOST_NUMBERS = 1 << 25
NOVELTY = "novelty"

Slice = Any  # a mask (N,), or a function (inputs, targets) -> (B,)
Scores = dict[str, dict[str, Tensor]]  # method -> score -> (N,)


@dataclass
class Passed:
    """What a pass over one data set found.

    Attributes:
        records: by method; empty for data without targets.
        scores: by method, then by score.
        masks: of slices, ``(N,)``.
        keepers: the inputs to be shown.
    """

    name: str
    examples: int = 0
    records: dict[str, Records] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    keepers: dict[str, Keeper] = field(default_factory=dict)


class Pass:
    """One pass under way.

    Args:
        sources: posteriors and their methods; the first method is the trained network.
        main: key of the method whose mistakes are shown.
        slices: see `nullbayes.Posterior.evaluate`.
        shown: how many inputs to keep of each sort; 0: none.
        processes: those that read the other shares of the data; what is found is of all.
    """

    def __init__(
        self,
        sources: list[Source],
        main: str,
        slices: Mapping[str, Slice] | None = None,
        shown: int = 0,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes
        self._raw: list[tuple[str, str, Observed, Tensor]] = []
        self.sources, self.main = sources, main
        self.slices, self.shown = dict(slices or {}), shown
        self.functional: FunctionalModel = sources[0].posterior.functional
        self._recorders: dict[str, Recorder] = {}
        self._scores: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._masks: dict[str, list[Tensor]] = defaultdict(list)

    def labelled(self, loader: Iterable[Any], name: str, stage: Stages) -> Passed:
        """Figures, scores and slices of data with targets."""
        passed = self._passed(name, ("novel", "wrong"))
        free = self.functional.layouts is not None
        tracked = stage.track(loader, name)
        for index, inputs, targets in self._batches(loader, tracked, name, free=free):
            where = f"{name}, batch {index}"
            self._add_slices(inputs, targets)
            for piece, some in self._pieces(inputs, targets, where):
                self._add(passed, piece, some, where)
        self._join(passed)
        self._finish(passed)
        for key, recorder in self._recorders.items():
            passed.records[key] = recorder.records()
        passed.masks = {key: self._mask(key, passed.examples) for key in self.slices}
        return passed

    def unlabelled(self, loader: Iterable[Any], name: str, stage: Stages) -> Passed:
        """Scores of data whose targets, if there are any, do not matter."""
        passed = self._passed(name, ("novel",))
        tracked = stage.track(loader, name)
        for index, inputs, _ in self._batches(loader, tracked, name, free=True):
            where = f"{name}, batch {index}"
            for piece, _ in self._pieces(inputs, None, where):
                self._add_scores(passed, piece, where)
        self._join(passed)
        self._finish(passed)
        return passed

    def training(self, loader: Iterable[Any], name: str, stage: Stages) -> dict[str, Records]:
        """Figures alone, without scores: what is preserved can be looked up in them."""
        free = self.functional.layouts is not None
        tracked = stage.track(loader, name)
        for index, inputs, targets in self._batches(loader, tracked, name, free=free):
            where = f"{name}, batch {index}"
            for piece, some in self._pieces(inputs, targets, where):
                for source, method, point, moved in self._outcomes(piece, where):
                    self._record(source, method, (point, moved), some, where)
        self._join(None)
        self._nonempty(self._recorders, name)
        return {key: recorder.records() for key, recorder in self._recorders.items()}

    # -- batches ---------------------------------------------------------------------------------

    def _pieces(self, inputs: Inputs, targets: Any, where: str) -> Iterator[tuple[Inputs, Any]]:
        """Parts of a batch small enough for all samples of its outputs."""
        size = batch_size(inputs, where)
        if not size:
            return
        outputs = self.functional.outputs(self._keyed(take(inputs, 0, 1)), where)[0].numel()
        samples = max(s.posterior.num_samples for s in self.sources)
        step = max(1, MOST_NUMBERS // max(1, 2 * samples * outputs))
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield take(inputs, start, stop), take(targets, start, stop, size)

    def _keyed(self, inputs: Inputs) -> Inputs:
        return self.functional.keyed(inputs, [0])

    def _outcomes(
        self, inputs: Inputs, where: str
    ) -> Iterator[tuple[Source, Method, Tensor, Moved]]:
        """For every method the network's outputs, and what gives those of samples of any scale."""
        for source in self.sources:
            posterior = source.posterior
            point, moved = posterior._moved(posterior.functional.keyed(inputs, [0]), where)
            for method in source.methods:
                yield source, method, point, moved

    def _record(
        self,
        source: Source,
        method: Method,
        outputs: tuple[Tensor, Moved],
        targets: Any,
        where: str,
    ) -> tuple[Observed, Tensor]:
        """Observe one batch under one method; its targets are checked by that method's likelihood."""
        samples, point = method.samples(*outputs)
        checked = source.posterior.likelihood.checked_targets(outputs[0], targets, where)
        with torch.no_grad():
            moments = method.likelihood.moments(samples, point, linearised=method.linearised)
            observed = observe(method.likelihood, moments, samples, point, checked)
            together = sample_log_likelihoods(method.likelihood, samples, checked)
        name = method.likelihood.score_name
        if self.processes is not None:  # counted once those of all are there
            self._raw.append((method.key, name, observed, together))
        else:
            self._recorders.setdefault(method.key, Recorder(name)).add(observed, together)
        return observed, moments.mean

    def _add(self, passed: Passed, inputs: Inputs, targets: Any, where: str) -> None:
        shown: Callable[[int], str] | None = None
        wrong, unit = torch.empty(0), ""
        for source, method, point, moved in self._outcomes(inputs, where):
            observed, mean = self._record(source, method, (point, moved), targets, where)
            self._score(method.key, observed.scores)
            if method.key == self.main:
                wrong = _mistakes(method.likelihood, observed, mean)
                unit = _unit(method.likelihood, mean)
                shown = _captions(method.likelihood, mean, targets)
        novelty = self._add_novelty(passed, inputs)
        if self.shown and shown is not None:
            passed.keepers["novel"].offer(novelty, inputs, shown)
            passed.keepers["wrong"].unit = unit
            passed.keepers["wrong"].offer(wrong, inputs, shown)
        passed.examples += len(novelty)

    def _add_scores(self, passed: Passed, inputs: Inputs, where: str) -> None:
        shown: Callable[[int], str] | None = None
        for _, method, point, moved in self._outcomes(inputs, where):
            samples, centre = method.samples(point, moved)
            with torch.no_grad():
                moments = method.likelihood.moments(samples, centre, linearised=method.linearised)
                self._score(method.key, scores(method.likelihood, moments, centre))
            if method.key == self.main:
                shown = _captions(method.likelihood, moments.mean, None)
        novelty = self._add_novelty(passed, inputs)
        if self.shown and shown is not None:
            passed.keepers["novel"].offer(novelty, inputs, shown)
        passed.examples += len(novelty)

    def _score(self, key: str, found: Mapping[str, Tensor]) -> None:
        for name, values in found.items():
            self._scores[key][name].append(values)

    def _add_novelty(self, passed: Passed, inputs: Inputs) -> Tensor:
        """Novelty of a batch under every posterior; returns that of the first."""
        found = []
        for source in self.sources:
            found.append(source.posterior.novelty(inputs).detach().cpu().double())
            self._scores[source.methods[-1].key][NOVELTY].append(found[-1])
        return found[0]

    # -- slices ----------------------------------------------------------------------------------

    def _add_slices(self, inputs: Inputs, targets: Any) -> None:
        for name, slice_ in self.slices.items():
            if not callable(slice_):
                continue
            size = batch_size(inputs)
            try:
                mask = torch.as_tensor(slice_(inputs, targets)).cpu()
            except Exception as error:
                raise InputError(
                    f"slices[{name!r}] failed: {type(error).__name__}: {error}. A function gets the inputs and targets "
                    "of a batch and returns one True or False an example."
                ) from error
            if mask.shape != (size,) or mask.dtype != torch.bool:
                raise InputError(
                    f"slices[{name!r}] returned shape {tuple(mask.shape)} of {mask.dtype}; expected ({size},) of bool."
                )
            self._masks[name].append(mask)

    def _mask(self, name: str, examples: int) -> Tensor:
        slice_ = self.slices[name]
        if callable(slice_):
            mask = torch.cat(self._masks[name])
        else:
            values = slice_.cpu() if isinstance(slice_, Tensor) else np.asarray(slice_)
            mask = torch.as_tensor(values)
        if mask.shape != (examples,) or mask.dtype != torch.bool:
            raise InputError(
                f"slices[{name!r}] has shape {tuple(mask.shape)} of {mask.dtype}; expected a mask of ({examples},) "
                "bool, one entry for each test example in order, or a function (inputs, targets) -> mask."
            )
        if not bool(mask.any()):
            raise InputError(f"slices[{name!r}] holds none of the {examples} test examples.")
        return mask

    def _batches(
        self, loader: Iterable[Any], tracked: Iterable[Any], name: str, *, free: bool
    ) -> Iterator[tuple[int, Inputs, Any]]:
        if isinstance(loader, Share) and loader.empty:
            return iter(())
        return batches(tracked, self.functional, name, free=free)

    def _join(self, passed: Passed | None) -> None:
        """What all processes have found, in the order of the data."""
        if self.processes is None:
            return
        serve(self.processes)
        scores = {key: dict(found) for key, found in self._scores.items()}
        kept = {} if passed is None else {k: v.kept for k, v in passed.keepers.items()}
        own = (self._raw, scores, dict(self._masks), kept, 0 if passed is None else passed.examples)
        everyone = self.processes.gather(own)
        self._scores.clear()
        self._masks.clear()
        for raw, found, masks, _, _ in everyone:
            for key, name, observed, together in raw:
                self._recorders.setdefault(key, Recorder(name)).add(observed, together)
            for key, by_name in found.items():
                for name, values in by_name.items():
                    self._scores[key][name] += values
            for name, parts in masks.items():
                self._masks[name] += parts
        if passed is not None:
            passed.examples = sum(each[-1] for each in everyone)
            for sort, keeper in passed.keepers.items():
                keeper.merge([each[3][sort] for each in everyone])

    # -- ends ------------------------------------------------------------------------------------

    def _passed(self, name: str, sorts: tuple[str, ...]) -> Passed:
        return Passed(name, keepers={sort: Keeper(self.shown) for sort in sorts if self.shown})

    def _finish(self, passed: Passed) -> None:
        self._nonempty(self._scores, passed.name)
        passed.scores = {
            key: {name: torch.cat(parts) for name, parts in found.items()}
            for key, found in self._scores.items()
        }

    def _nonempty(self, found: Mapping[str, Any], name: str) -> None:
        if not found:
            raise InputError(f"`{name}` holds no examples: every batch is empty.")


def _unit(likelihood: Likelihood, mean: Tensor) -> str:
    """What :func:`_mistakes` counts in: confidence where each example has one class, else its NLL."""
    return "confidence" if kind_of(likelihood) == "classification" and mean.ndim == 2 else "NLL"


def _mistakes(likelihood: Likelihood, observed: Observed, mean: Tensor) -> Tensor:
    """How confidently wrong each example is ``(B,)``: confidence in a wrong class, or the NLL; -inf where right."""
    if _unit(likelihood, mean) == "NLL" or observed.confidence is None or observed.hit is None:
        return observed.nll
    # Examples whose label is ignored have no answer.
    out = torch.full_like(observed.nll, -torch.inf)
    out[observed.example] = torch.where(observed.hit > 0, -torch.inf, observed.confidence)
    return out


def _captions(likelihood: Likelihood, mean: Tensor, targets: Any) -> Callable[[int], str]:
    """What is predicted for example ``n`` of a batch, and what was observed."""
    kind = kind_of(likelihood)

    def caption(n: int) -> str:
        values = mean[n].flatten()
        if isinstance(likelihood, Classification) and mean.ndim > 2:
            return _of_positions(
                likelihood, mean[n : n + 1], None if targets is None else take(targets, n, n + 1)
            )
        if kind == "classification" and mean.ndim == 2:
            text = f"predicted {int(values.argmax())} ({float(values.max()):.3f})"
            if targets is not None:
                target = targets[n].argmax() if targets.is_floating_point() else targets[n]
                text += f", labelled {int(target)}"
            return text
        if kind == "other" or len(values) > 4:
            return f"{len(values)} outputs"
        text = "predicted " + ", ".join(f"{v:.3g}" for v in values.tolist())
        if targets is not None:
            text += "; observed " + ", ".join(f"{v:.3g}" for v in targets[n].flatten().tolist())
        return text

    return caption


def _of_positions(likelihood: Classification, mean: Tensor, targets: Any) -> str:
    """What is predicted at the positions of one example ``mean (1, *out)``, and how many are wrong."""
    axis = likelihood._axis(tuple(mean.shape))
    top, predicted = mean.movedim(axis, -1).flatten(0, -2).max(-1)
    said = f"mean confidence {float(top.mean()):.3f}"
    if targets is None:
        return f"{len(top)} positions, {said}"
    _, labels, _ = likelihood._flatten(mean, targets)
    if labels.is_floating_point():
        label, kept = labels[0].argmax(-1), torch.ones(len(top), dtype=torch.bool)
    else:
        label, kept = labels[0], likelihood._kept(labels[0]).cpu()
    wrong = (predicted.cpu() != label.cpu())[kept]
    return f"{int(wrong.sum())} of {len(wrong)} positions wrong, {said}"
