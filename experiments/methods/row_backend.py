"""A curvature backend for laplace-torch: the diagonal of the GGN from this library's rows.

The package's own diagonal takes Jacobians by ``torch.func``, minutes for a thousand images through a convolution, or
BackPACK, which does not know residual networks. The numbers are the same;
``tests_peers/test_experiments_peers.py`` compares them.
"""

from __future__ import annotations

from typing import Any

import torch
from laplace.curvature import CurvlinopsGGN
from torch import Tensor

from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.linearise import output_rows
from nullbayes.likelihood.softmax import softmax_factor
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace

ELEMENTS = 2**24  # numbers of rows written out at a time


class RowsGGN(CurvlinopsGGN):
    """Curvlinops but for the diagonal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.functional = FunctionalModel(self.model, ParameterSpace.from_model(self.model), None)
        self.plan: Any = None

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and diagonal ``(P,)`` over a batch, in the package's units."""
        if self.plan is None:
            self.plan = prove(self.functional, x)
        total = self.functional.space.total
        out = torch.zeros(total, dtype=torch.float64)
        loss = 0.0
        outputs = self.functional.outputs(x, "x").shape[1]
        step = max(1, ELEMENTS // (total * outputs))
        for part, labels in zip(x.split(step), y.split(step), strict=True):
            room = torch.zeros(0, total, dtype=x.dtype)
            done = 0
            for point, rows in output_rows(self.functional, self.plan, part, outputs, room):
                every = torch.cat(list(rows.iter_rows(len(point) * outputs)))
                jacobian = every.reshape(len(point), outputs, total)
                if self.likelihood == "classification":
                    factor = softmax_factor(point)  # (O - 1, B, O)
                    jacobian = torch.einsum("kbo,bop->kbp", factor, jacobian).reshape(-1, total)
                out += jacobian.reshape(-1, total).square().sum(0)
                loss += float(self.lossfunc(point, labels[done : done + len(point)]))
                done += len(point)
        return self.factor * torch.tensor(loss), out.to(x.dtype)
