"""What an evaluation asks of a posterior, whichever class it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace

if TYPE_CHECKING:
    from nullbayes.posterior.calibration_path import CalibrationPath

#: outputs ``(S, B, *out)`` of the samples, given the scale of samples at prior precision one
Moved = Callable[[float], Tensor]


class Subject(Protocol):
    """`nullbayes.Posterior` and `nullbayes.LayerNullSpacePosterior`, as far as an evaluation is concerned.

    Attributes:
        linearises: whether `predict` does by default: outputs of samples then come with their mirror images.
    """

    calibration: CalibrationPath | None
    linearises: bool

    @property
    def functional(self) -> FunctionalModel: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def space(self) -> ParameterSpace: ...
    @property
    def likelihood(self) -> Likelihood: ...
    @property
    def certificate(self) -> Any: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def prior_precision(self) -> float: ...
    def novelty(self, x: Inputs) -> Tensor: ...
    def calibrate(self, val_loader: Any, *, progress: bool) -> CalibrationPath: ...

    def _check_model(self) -> None:
        """Raises where it is not fitted, or the model is in training mode or another one than was fitted."""

    def _moved(self, inputs: Inputs, where: str) -> tuple[Tensor, Moved]:
        """``f(θ̂, x) (B, *out)``, and what gives the outputs of samples of any scale."""

    def _prior_chosen_by(self) -> tuple[str, str]:
        """Key and words for what chose the prior precision before any calibration."""

    def _described(self) -> dict[str, Any]:
        """``preserves``, ``seed`` and ``predictive`` of the settings that a results file has."""
