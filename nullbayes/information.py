"""What an observation at an input would tell of the weights, in nats: ``½ log det(I + J(x) Σ J(x)ᵀ)``.

(MacKay, *Information-based objective functions for active data selection*, Neural Computation 1992, eq. 4.) Outputs are
observed with the noise of the likelihood, logits with variance one. Where the variance adds up what is open, this asks
in how many directions it is: an input at which one class wavers is less new than one at which they all do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nullbayes.assembly import Fit, Settings
from nullbayes.draws import (
    REVERSE_OUTPUTS_PER_SAMPLE,
    first_output,
    forward_mode,
    output_rows,
)
from nullbayes.jacobian.functional import FunctionalModel, Inputs
from nullbayes.jacobian.plan import CapturePlan
from nullbayes.likelihood import Likelihood
from nullbayes.novelty import is_exact, isotropic
from nullbayes.solvers.krylov import blocks

# Rows written out at a time, where covariances are exact.
_ROWS = 1024


def novelty_information(
    functional: FunctionalModel,
    plan: CapturePlan,
    fit: Fit,
    settings: Settings,
    likelihood: Likelihood,
    x: Inputs,
    exact: bool | None,
) -> Tensor:
    """``(B,)`` in the model's dtype; see :meth:`nullbayes.Posterior.novelty`."""
    outputs = first_output(functional, x, "`x`").numel()
    exact = is_exact(exact, fit, outputs)
    precision = natural_precision(functional, fit, settings)
    if not exact and outputs > REVERSE_OUTPUTS_PER_SAMPLE * len(fit.unit):
        parts = iter([likelihood.observed(forward_mode(functional, plan, fit.unit, x))])
    else:
        parts = _pieces(functional, plan, fit, settings, likelihood, x, outputs, exact)
    told = [_log_det(part, precision, exact) for part in parts]
    return torch.cat(told).to(functional.dtype)


def natural_precision(functional: FunctionalModel, fit: Fit, settings: Settings) -> float:
    """The prior precision at which information is counted: ``γ / ‖θ̂‖²``, whatever the posterior's was set to since.

    With another one the order of inputs would be another; `calibrate` shall not change what is new. One where the
    weights have no size.
    """
    if settings.precision_by_name is not None:
        return 1.0
    size = float(functional.space.flatten(functional.weights()).double().square().sum())
    return max(1, fit.certificate.rank) / size if size else 1.0


def _pieces(
    functional: FunctionalModel,
    plan: CapturePlan,
    fit: Fit,
    settings: Settings,
    likelihood: Likelihood,
    x: Inputs,
    outputs: int,
    exact: bool,
) -> Iterator[Tensor]:
    """Changes ``(S, b, *out)`` of some examples at a time, or covariances ``(b, O, O)``, at prior precision one."""
    unit = isotropic(functional, fit, settings)
    pieces = output_rows(
        functional, plan, x, outputs, unit, settings.scale_by_name, "`x`", likelihood.observed
    )
    for point, operator in pieces:
        if not exact:
            yield operator.matvec(unit).reshape(len(unit), *point.shape)
            continue
        assert fit.state is not None
        rows = operator.iter_rows(max(1, _ROWS // outputs) * outputs)
        prior = torch.cat([blocks(values.double().T, outputs) for values in rows])
        yield prior - fit.state.explained(operator, outputs)


def _log_det(part: Tensor, precision: float, exact: bool) -> Tensor:
    """``½ log det(I + C / precision) (b,)`` float64; from ``S`` changes in as many dimensions at most."""
    if exact:
        covariance = (part + part.mT) / 2
    else:
        changes = part.double().flatten(2)
        samples, _, outputs = changes.shape
        between = "sbo,tbo->bst" if samples < outputs else "sbo,sbp->bop"
        covariance = torch.einsum(between, changes, changes) / samples
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    return 0.5 * torch.log1p(values / precision).sum(-1)
