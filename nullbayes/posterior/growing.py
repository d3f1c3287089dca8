"""What a posterior does with its training rows after the fit: take in more data, and tell their evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor

from nullbayes.common.arguments import check_count
from nullbayes.common.processes import Processes
from nullbayes.errors import InputError
from nullbayes.fit.marginal import Evidence, log_marginal_likelihood
from nullbayes.fit.result import AUDITED, Run
from nullbayes.fit.together import check_alike
from nullbayes.fit.update import updated
from nullbayes.model.shares import shared
from nullbayes.model.undisturbed import reading_method, undisturbed_method

if TYPE_CHECKING:
    from nullbayes.posterior.base import Posterior

Self = TypeVar("Self", bound="Grows")


class Grows:
    """Mixin of `nullbayes.Posterior`."""

    @reading_method
    def update(
        self: Self,
        more: Any,
        *,
        max_examples: int | None = None,
        progress: bool = True,
        audit: int | None = None,
    ) -> Self:
        """More training examples, preserved from now on beside the earlier ones, whose data are not needed.

        With a direct solver the posterior is that of one fit on all data: the same samples, prior precision and
        certificate, to rounding. A solver that iterates solves for its samples again, on all rows. The network has to
        be the one that was fitted. Two things stay as the first fit has them: the observation noise, and the choice of
        the solver. A calibration is void: `calibrate` again.

        Args:
            more: data in any form that ``fit`` takes.
            max_examples: the first so many of them only.
            progress: bars on standard error.
            audit: as in ``fit``, of the new examples; those of earlier calls are audited again.

        Raises:
            NotFittedError: not fitted, or loaded from a file, which holds no rows.
            InputError, ModelError, NonFiniteError, MemoryBudgetError, SolverError: as ``fit``; the posterior stays as
                it was.
        """
        own = cast("Posterior", self)
        fit = own._fitted()
        run = Run(
            own.num_samples,
            fit.seed,
            None if max_examples is None else check_count(max_examples, "max_examples"),
            progress,
            None,
            AUDITED if audit is None else check_count(audit, "audit"),
            None if fit.stored.dtype == own.functional.dtype else fit.stored.dtype,
            fit.crowd,
            patient=audit is not None,
        )
        own._check_model()
        with own._as_fitted("update") as processes:
            data = own._data(more, "more")
            for everyone in filter(None, (processes, run.crowd.processes)):
                check_alike(own.problem, own._settings, run, everyone)
            if processes is not None:
                run = replace(run, progress=progress and processes.leads)
                data = shared(data, processes, "more", run.max_examples)
            own._take(updated(fit, own._settings, data, run))
        own.calibration = None
        return self

    @contextmanager
    def _as_fitted(self, where: str) -> Iterator[Processes | None]:
        """The length of a call of all processes that hold the rows; None, where this one has them all.

        Raises:
            InputError: `process_group` is no longer what it was.
        """
        own = cast("Posterior", self)
        fit = own._fitted()
        held = None if fit.state is None else fit.state.operator.processes
        if held is None and fit.crowd.processes is None:
            yield None
            return
        with own._together(where) as processes:
            if processes is not held:
                raise InputError(
                    f"`{where}` is called on other processes than `fit` was, which hold the rows of the data between "
                    "them: expected the same `process_group`. Fit again on all of the data."
                )
            yield processes

    @undisturbed_method
    def log_marginal_likelihood(
        self,
        prior_precision: float | Tensor | Mapping[str, float | Tensor] | None = None,
        *,
        noise_factor: float | Tensor | None = None,
    ) -> Tensor:
        """Log evidence of the training data under the linearised Laplace approximation, in nats: a float64 scalar.

        ``log p(D | θ̂) − ½ (θ̂ − m)ᵀΛ(θ̂ − m) − ½ log det(I + Λ⁻¹G)``, whichever posterior this is, with a prior about
        ``m = prior_mean`` (MacKay 1992; Immer et al., *Scalable marginal likelihood estimation*, 2021, eq. 6).

        Args:
            prior_precision: a number or a tensor; with one precision for each parameter tensor, a factor on all of
                them. ``{name: number or tensor}``: one for each parameter tensor, whatever the fit's were, at the cost
                of one Gram matrix a tensor. None: as it is. Gradients flow to tensors.
            noise_factor: factor on the observation variance that a regression was fitted with; gradients flow to a
                tensor.

        Raises:
            NotFittedError: not fitted, loaded from a file, or fitted with a solver that iterates.
            InputError: rows other than those of ``preserve="predictions"`` with all directions; a factor on noise
                that the likelihood does not have; a value that is not positive.
        """
        own = cast("Posterior", self)
        return log_marginal_likelihood(own._fitted(), Evidence(prior_precision, noise_factor))
