"""What an observation at an input would tell of the weights, in nats: ``½ log det(I + J(x) Σ J(x)ᵀ)``.

(MacKay, *Information-based objective functions for active data selection*, Neural Computation 1992, eq. 4.) Outputs are
observed with the noise of the likelihood, logits with variance one. Where the variance adds up what is open, this asks
in how many directions it is: an input at which one class wavers is less new than one at which they all do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nullbayes.model.batch import Inputs
from nullbayes.posterior.novelty import Scorer
from nullbayes.solvers.block_cg import blocks

# Rows written out at a time, where covariances are exact.
_ROWS = 1024


def novelty_information(scorer: Scorer, x: Inputs, exact: bool | None) -> Tensor:
    """``(B,)`` in the model's dtype; see :meth:`nullbayes.Posterior.novelty`."""
    outputs = scorer.outputs(x)
    exact = scorer.is_exact(exact, outputs)
    precision = natural_precision(scorer)
    if not exact and scorer.too_many_rows(outputs):
        parts = iter([scorer.likelihood.observed(scorer.changes(x))])
    else:
        parts = _pieces(scorer, x, outputs, exact)
    told = [_log_det(part, precision, exact) for part in parts]
    return torch.cat(told).to(scorer.functional.dtype)


def natural_precision(scorer: Scorer) -> float:
    """The prior precision at which information is counted: ``γ / ‖θ̂‖²``, whatever the posterior's was set to since.

    With another one the order of inputs would be another; `calibrate` shall not change what is new. One where the
    weights have no size.
    """
    if scorer.settings.precision_by_name is not None:
        return 1.0
    functional = scorer.functional
    size = float(functional.space.flatten(functional.weights()).double().square().sum())
    return max(1, scorer.fit.certificate.rank) / size if size else 1.0


def _pieces(scorer: Scorer, x: Inputs, outputs: int, exact: bool) -> Iterator[Tensor]:
    """Changes ``(S, b, *out)`` of some examples at a time, or covariances ``(b, O, O)``, at prior precision one."""
    state, unit = scorer.fit.state, scorer.isotropic
    for point, operator in scorer.rows(x, outputs, scorer.likelihood.observed):
        if not exact:
            yield operator.matvec(unit).reshape(len(unit), *point.shape)
            continue
        assert state is not None
        rows = operator.iter_rows(max(1, _ROWS // outputs) * outputs)
        prior = torch.cat([blocks(values.double().T, outputs) for values in rows])
        yield prior - state.explained(operator, outputs)


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
