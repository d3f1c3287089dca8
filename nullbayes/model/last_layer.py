"""The last layer of a network, found by itself, and proved on data to be that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.errors import InputError, ModelError
from nullbayes.model.batch import Inputs
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.precision import tolerance

LAST_LAYER = "last-layer"
# How far weights are moved, in units of their own size: far enough for any curvature to show.
STEP = 3.0


def last_layer(model: nn.Module) -> list[str]:
    """Names of the parameters of the module that was registered last, of those that hold some themselves.

    Raises:
        InputError: a model without parameters.
    """
    holders = [
        path for path, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))
    ]
    if not holders:
        raise InputError(f"`parameters` is {LAST_LAYER!r}, but the model has no parameters.")
    path = holders[-1]
    names = (n for n, _ in model.get_submodule(path).named_parameters(recurse=False))
    return [f"{path}.{name}" if path else name for name in names]


def check_last_layer(functional: FunctionalModel, inputs: Inputs) -> None:
    """Raise `ModelError` unless outputs are linear in the chosen weights, as they are in those of a last layer.

    The outputs at twice a random change of the weights move twice as far as at once the change.
    """
    weights = functional.weights()
    generator = torch.Generator().manual_seed(0)

    def moved(times: float) -> Tensor:
        generator.manual_seed(0)
        change = {
            n: times
            * torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w)
            * _size(w)
            for n, w in weights.items()
        }
        out: Tensor = functional({n: w + change[n] for n, w in weights.items()}, inputs)
        return out.double()

    with torch.no_grad():
        base = functional(weights, inputs).double()
        once, twice = moved(1.0) - base, moved(2.0) - base
    allowed = 10 * tolerance(functional.rounding, functional.device)
    size = float(once.norm()) + float(base.norm())
    if float((twice - 2 * once).norm()) > allowed * size or not float(once.norm()) > 0:
        raise ModelError(
            f"parameters={LAST_LAYER!r} took {sorted(weights)}, which the model registers last, but its outputs are "
            "not linear in them, so they are no last layer. Name its parameters (`parameters=['head.weight', ...]`)."
        )


def _size(weight: Tensor) -> float:
    return STEP * (float(weight.double().square().mean().sqrt()) or 1.0)


def resolved(model: nn.Module, choice: Any) -> Any:
    """``choice`` of parameters with names in the place of ``"last-layer"``."""
    return last_layer(model) if isinstance(choice, str) and choice == LAST_LAYER else choice
