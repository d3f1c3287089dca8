"""What a posterior can be asked about inputs: predictions, joint covariances, novelty, which inputs to label next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nullbayes.common.arguments import check_choice, check_count
from nullbayes.common.deprecation import formerly_positional
from nullbayes.common.processes import Processes
from nullbayes.errors import InputError
from nullbayes.fit.result import Fit
from nullbayes.jacobian.linearise import by_known_shapes, linearised_outputs, sampled_outputs
from nullbayes.jacobian.shared import serve
from nullbayes.likelihood.links import LINKS, linked
from nullbayes.model.batch import Inputs, to_device
from nullbayes.model.data import as_inputs, is_stream
from nullbayes.model.fingerprint import check_unchanged
from nullbayes.model.shares import inputs_of_share
from nullbayes.model.undisturbed import undisturbed, undisturbed_method
from nullbayes.posterior.calibration_path import temperature_of
from nullbayes.posterior.differentiable import (
    changes_with_graph,
    check_requires_grad,
    covariance_term,
    joint_with_graph,
    point_with_graph,
    rows_with_graph,
)
from nullbayes.posterior.joint import Joint, covariances, factorised, joint
from nullbayes.posterior.novelty import (
    ENTROPIES,
    ROW_SCORES,
    SCORES,
    Scorer,
    check_has_entropy,
    information_and_variance,
)
from nullbayes.posterior.prediction import (
    METHODS,
    Prediction,
    everyones,
    gathered,
    make_prediction,
    of_samples,
    per_example,
    structured,
)
from nullbayes.posterior.selection import CRITERIA, Features, select

if TYPE_CHECKING:
    from nullbayes.posterior.base import Posterior


@dataclass(frozen=True)
class How:
    """How a prediction is to be made: see `nullbayes.Posterior.predict`."""

    method: str = METHODS[0]
    draw: int = 0
    link: str = LINKS[0]
    differentiable: bool = False

    def __post_init__(self) -> None:
        check_choice(self.method, METHODS, "method")
        check_choice(self.link, LINKS, "link")
        check_count(self.draw, "draw", 0)
        if self.method != METHODS[0] and self.link != LINKS[0]:
            raise InputError(
                f"link={self.link!r} needs Gaussian outputs, which `method={self.method!r}` does not have; use "
                "method='linearised'."
            )


class Predicts:
    """Mixin of `nullbayes.Posterior`."""

    @formerly_positional("method")
    def predict(
        self,
        x: Inputs,
        *,
        method: str = METHODS[0],
        draw: int = 0,
        link: str = LINKS[0],
        differentiable: bool = False,
    ) -> Prediction:
        """Predict a batch ``x`` (tensor, array, tuple or mapping of them), or all batches of a loader or data set.

        Of a loader, what stands for targets is left out, and the predictions of all its batches are put together.

        Args:
            method: ``"linearised"`` (default; what the guarantee covers) or ``"sampled"``, the
                network with re-weighted parameters.
            draw: which draw of the frozen noise, where the model draws any; ``fit`` saw those below its ``draws``.
            link: how mean probabilities follow from the outputs' distribution: ``"samples"``, or one of the
                approximations of `laplace-torch`: ``"probit"``, ``"bridge"`` (linearised only).
            differentiable: keep the graph from ``x``, so that gradients by it flow through every field; some tensor
                of ``x`` must require one.

        Returns:
            With a callable loss and a model that returns several tensors, each field in the model's structure.

        Raises:
            InputError: inputs or arguments that cannot be used. ModelError: a network that cannot be differentiated
                by its weights and inputs at once.
        """
        own, how = cast("Posterior", self), How(method, draw, link, differentiable)
        own._fitted()
        if is_stream(x):
            if differentiable:
                raise InputError(
                    "`differentiable=True` with a loader: pass one batch of inputs at a time, which require a gradient."
                )
            with own._together("predict", how=(method, draw, link)) as processes:
                stream = _streamed(own, x, processes)
                parts = [self._predict(part, how) for part in stream]
                if processes is not None:
                    parts = everyones(parts, processes)
                return structured(gathered(parts), own.likelihood)
        return structured(self._predict(x, how), own.likelihood)

    @undisturbed_method
    def _predict(self, x: Inputs, how: How) -> Prediction:
        own = cast("Posterior", self)
        fit, x = own._fitted(), own._inputs(x, [how.draw])
        if how.differentiable:
            fit.check_whole("predict(differentiable=True)")
            check_requires_grad(x)
        point, outputs = self._outputs(fit, x, how)
        with torch.set_grad_enabled(how.differentiable):
            temperature = temperature_of(own.calibration)
            made = make_prediction(
                own.likelihood,
                point,
                outputs,
                how.method,
                differentiable=how.differentiable,
                temperature=temperature,
            )
            made = replace(made, _covariance=_Covariance(own, fit, x, made, how))
            if how.link == LINKS[0]:
                return made
            scaled = made.covariance / temperature**2
            mean, total = linked(own.likelihood, point / temperature, scaled, how.link)
            epistemic = (total - made.aleatoric).clamp(min=0)
        return replace(made, mean=mean, total=total, epistemic=epistemic)

    def _outputs(self, fit: Fit, x: Inputs, how: How) -> tuple[Tensor, Tensor]:
        """``f(θ̂, x) (B, *out)`` and those of the samples, ``(S, B, *out)``."""
        own = cast("Posterior", self)
        functional = own.functional
        # Samples at prior precision one, and what they do scaled: a scaled copy of them may be gigabytes.
        scale = fit.alpha**-0.5
        if how.method != METHODS[0]:
            if how.differentiable:
                return point_with_graph(functional, x), sampled_with_graph(fit, x)
            point, outputs = sampled_outputs(functional, fit.stored, x, "`x`", scale)
            return point, fit.crowd.joined(outputs)
        plan = own._capture_plan(x)
        with torch.no_grad():
            point, change = linearised_outputs(functional, plan, fit.stored, x, "`x`")
            change = fit.crowd.joined(change)
        if how.differentiable:
            point = point_with_graph(functional, x)
            change = changes_with_graph(functional, plan, fit.unit, x, change)
        return point, point + scale * change

    @undisturbed_method
    def joint(
        self,
        x: Inputs,
        *,
        exact: bool | None = None,
        draw: int = 0,
        differentiable: bool = False,
    ) -> Joint:
        """Mean ``(B, *out)`` and covariance ``(B·D, B·D)`` of the raw outputs of all inputs together, linearised.

        Args:
            exact: from the factorisation instead of the samples; None: where there is one in this process. After a
                fit on several with `DualCholesky` it is spread over them: ``exact=True`` is a call of all.
            draw: which draw of the frozen noise, where the model draws any.
            differentiable: keep the graph from ``x``: gradients of first order flow through mean and covariance.

        Raises:
            InputError: inputs that cannot be used, or too many for one matrix.
            NotFittedError: ``exact=True`` of a posterior that was loaded from a file.
        """
        own = cast("Posterior", self)
        fit, x = own._fitted(), own._inputs(x, [check_count(draw, "draw", 0)])
        scorer = Scorer(fit, own._capture_plan(x), exact)
        with own._together("joint") if exact and not _alone(fit) else nullcontext():
            if differentiable:
                fit.check_whole("joint(differentiable=True)")
                check_requires_grad(x)
                return joint_with_graph(scorer, x)
            with torch.no_grad():
                return joint(scorer, x)

    @undisturbed_method
    def select(self, pool: Any, k: int, *, criterion: str = CRITERIA[0]) -> Tensor:
        """Which ``k`` inputs of ``pool`` to label next: their indices ``(k,)``, the most valuable first.

        Chosen one after the other, each given those before it, so that no two tell the same; from the stored samples
        (their number bounds what they can tell apart: `draw` more for a large ``k``), and no label. Of several
        processes each reads a part of a loader, and all get the same choice.

        Args:
            pool: inputs, or a loader or data set of which targets are left out; read in order, once.
            k: how many.
            criterion: what a label is worth: ``"pool"``, how much it makes predictions on the whole pool more
                certain; ``"weights"``, how much it tells of the weights.

        Raises:
            InputError: fewer inputs than ``k``, or inputs that cannot be used.
        """
        own = cast("Posterior", self)
        check_choice(criterion, CRITERIA, "criterion")
        wanted = check_count(k, "k")
        own._fitted()
        if is_stream(pool):
            with own._together("select", k=wanted, criterion=criterion) as processes:
                features = self._features(_streamed(own, pool, processes), processes)
        else:
            features = self._features(iter([pool]), None)
        if len(features) < wanted:
            raise InputError(
                f"`k` is {wanted}, but `pool` holds {len(features)} inputs; ask for fewer."
            )
        return select(features, wanted, criterion)[0]

    def _features(self, parts: Iterator[Any], processes: Processes | None) -> Features:
        """Of all inputs of a pool, of which ``parts`` are what this process reads."""
        own = cast("Posterior", self)
        checked = (own._inputs(part, [0]) for part in parts)
        return Features.of(own._fitted(), own._capture_plan, checked, processes)

    @formerly_positional("score", "exact", "targets")
    def novelty(
        self,
        x: Inputs,
        *,
        score: str = "information",
        exact: bool | None = None,
        targets: Any = None,
    ) -> Tensor:
        """How much the training data leave unconstrained at ``x``: ``(B,)``, larger is less known.

        Where the model draws random numbers: the mean over the ``draws`` that were fitted.

        Args:
            x: one batch of inputs; or a loader or data set, of which targets are left out. After a fit on several
                processes with `DualCholesky`, all of them call this, each with inputs of its own; of a loader each
                takes a part, and all get the scores of the whole.
            score: ``"information"``: what an observation at ``x`` would tell of the weights, in nats:
                ``½ log det(I + J(x) Σ J(x)ᵀ)`` (of logits without what is common to all, which no prediction
                depends on), whatever `calibrate` made of the prior precision;
                ``"variance"``: ``tr J(x) Σ J(x)ᵀ``, the epistemic variance of the same outputs;
                ``"share"``: the variance's share of the prior's, in [0, 1]; ``"entropy"`` of the mean
                prediction; ``"mutual_information"`` between label and weights; ``"loss"``: the epistemic
                variance of each example's own loss, which costs one row however many outputs there are.
            exact: variance, information and share from the factorisation instead of the samples. None: where the
                posterior was fitted here and it takes at most twice as long, by the operations and bytes that are
                counted, for one input and for 32.
            targets: for ``"loss"``; may be left out with a callable loss, which then gets the inputs.
        """
        check_choice(score, SCORES, "score")
        own = cast("Posterior", self)
        fit = own._fitted()
        if not is_stream(x):
            if _alone(fit) or exact is False or score in ENTROPIES:
                return self._novelty(x, score, exact, targets)
            with own._together("novelty"):
                return self._novelty(x, score, exact, targets)
        if targets is not None:
            raise InputError("`targets` of a loader: score one batch at a time with its targets.")
        with own._together("novelty", score=score, exact=exact) as processes:
            parts = _streamed(own, x, processes)
            values = [self._novelty(part, score, exact, None) for part in parts]
            if processes is not None:
                serve(processes)
                values = [v for part in processes.gather(values) for v in part]
            return torch.cat(values)

    @undisturbed_method
    def _novelty(self, x: Inputs, score: str, exact: bool | None, targets: Any) -> Tensor:
        own = cast("Posterior", self)
        x = own._inputs(x, None)
        drawn = range(own.functional.draws)
        if score in ENTROPIES:
            check_has_entropy(own.likelihood, score)
            parts = [self._predict(x, How(draw=draw)) for draw in drawn]
            values = [per_example(p.total if score == "entropy" else p.epistemic) for p in parts]
            return torch.stack(values).mean(0)
        beside = targets
        if score == "loss" and targets is not None:
            beside = to_device(as_inputs(targets, own.functional.dtype), own.functional.device)
            x, beside = own.functional.targets_for(x, beside, "`x`")
        values = []
        for draw in drawn:
            some = own.functional.keyed(x, [draw])
            scorer = Scorer(own._fitted(), own._capture_plan(some), exact)
            ask = partial(ROW_SCORES[score], scorer, some, beside)
            values.append(by_known_shapes(scorer.plan, ask))
        return torch.stack(values).mean(0)


def _alone(fit: Fit) -> bool:
    """Whether nothing of what exact answers need is in other processes."""
    return fit.state is None or fit.state.alone


def scores_of(own: Posterior, x: Inputs) -> Tensor:
    """Information and variance ``(B, 2)`` of prepared inputs, of a network without random numbers."""
    state = own._fitted().state
    if state is not None and not state.alone:
        both = [own.novelty(x, score=score) for score in ("information", "variance")]
        return torch.stack(both, 1)
    scorer = Scorer(own._fitted(), own._capture_plan(x))
    return by_known_shapes(scorer.plan, partial(information_and_variance, scorer, x))


def sampled_with_graph(fit: Fit, x: Inputs) -> Tensor:
    """``f(θ̂ + Δ_s, x) (S, B, *out)`` with a graph to ``x``."""
    functional = fit.problem.functional
    weights, x = functional.weights(), functional.batch(x)
    with torch.enable_grad():
        scaled = (delta.to(fit.problem.dtype) * fit.alpha**-0.5 for delta in fit.stored)
        moved = map(functional.space.unflatten, scaled)
        return torch.stack(
            [functional({n: weights[n] + d for n, d in change.items()}, x) for change in moved]
        )


@dataclass(frozen=True)
class _Covariance:
    """The covariance of a prediction, once somebody asks for it."""

    posterior: Posterior
    fit: Fit
    x: Inputs
    made: Prediction
    how: How

    def __call__(self) -> Tensor:
        functional, made = self.posterior.functional, self.made
        linear = self.how.method == METHODS[0]
        scorer = None
        if linear:
            scorer = Scorer(self.fit, self.posterior._capture_plan(self.x))
        with undisturbed(functional.device), torch.set_grad_enabled(self.how.differentiable):
            if scorer is None or not factorised(scorer):
                return of_samples(made.outputs, made.point if linear else None)
            check_unchanged(functional.model, self.fit.fingerprint)
            with torch.no_grad():
                found = torch.cat(list(covariances(scorer, self.x))).to(made.point.dtype)
            if not self.how.differentiable:
                return found
            size, outputs = found.shape[:2]
            rows = rows_with_graph(scorer, self.x, made.point.numel())
            moved = covariance_term(scorer, rows)
            place = torch.arange(size, device=found.device)
            moved = moved.reshape(size, outputs, size, outputs)[place, :, place]
            return found + moved - moved.detach()


def _streamed(own: Posterior, x: Any, processes: Processes | None) -> Iterator[Any]:
    functional = own.functional
    labelled = functional.conventions is not None
    return inputs_of_share(x, functional.dtype, processes, labelled=labelled)
