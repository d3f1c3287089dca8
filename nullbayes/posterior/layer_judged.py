"""What a layer posterior says of itself to an evaluation, and of the outputs of several inputs together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from nullbayes.model.batch import Inputs
from nullbayes.model.functional import undisturbed_method
from nullbayes.moments.gather import unlabelled
from nullbayes.posterior.joint import Joint
from nullbayes.posterior.judged import Judged
from nullbayes.posterior.layer_guarantee import measure_on
from nullbayes.posterior.layer_rows import joint_covariance
from nullbayes.posterior.measuring.methods import GIVEN, GUARANTEE
from nullbayes.posterior.measuring.subject import Moved

if TYPE_CHECKING:
    from nullbayes.posterior.layers import LayerNullSpacePosterior


class LayerJudged(Judged):
    """Mixin of `nullbayes.LayerNullSpacePosterior`. Evaluations look at sampled networks, as `predict` does."""

    linearises = False

    @undisturbed_method
    def joint(self, x: Inputs) -> Joint:
        """Mean ``(B, *out)`` and covariance ``(B·D, B·D)`` of the raw outputs of all inputs together, linearised.

        In closed form: entry ``(b·D + i, c·D + j)`` is ``Σ_l J_l(x_b)_i (I ⊗ P_l) J_l(x_c)_jᵀ / α``.

        Raises:
            InputError: inputs that cannot be used, or too many for one matrix.
        """
        own = cast("LayerNullSpacePosterior", self)
        x = own._inputs(x)
        fit, plan = own._fitted(), own._plan_of_rows(x)
        point, covariance = joint_covariance(fit.state, plan, x)
        return Joint(point, (covariance / fit.alpha).to(own.functional.dtype))

    @undisturbed_method
    def divergence(self, data: Any) -> float:
        """Mean divergence in nats from the trained network's predictions to those of sampled networks, on ``data``.

        What `certificate.divergence` is on some training examples; here on all of ``data``, in any form that `fit`
        takes.
        """
        own = cast("LayerNullSpacePosterior", self)
        fit = own._ready()
        batches = unlabelled(own._data(data, "data"), own.functional.device, "data")
        pairs = ((inputs, targets) for _, inputs, targets in batches)
        samples = max(2, own.num_samples)
        return measure_on(fit.state, own.likelihood, fit.alpha, samples, pairs).divergence

    # -- being judged, see `nullbayes.posterior.measuring.subject` ----------------------------------

    def _check_model(self) -> None:
        cast("LayerNullSpacePosterior", self)._ready()

    def _moved(self, inputs: Inputs, where: str) -> tuple[Tensor, Moved]:
        own = cast("LayerNullSpacePosterior", self)
        state, count = own._fitted().state, max(2, own.num_samples)
        point = own.functional.outputs(inputs, where)
        return point, lambda scale: state.sampled(inputs, scale, count)

    def _prior_chosen_by(self) -> tuple[str, str]:
        own = cast("LayerNullSpacePosterior", self)
        chosen = own._prior is None and not own._given
        return (GUARANTEE, "by the guarantee") if chosen else (GIVEN, "prior as given")

    def _described(self) -> dict[str, Any]:
        own = cast("LayerNullSpacePosterior", self)
        return {
            "preserves": "the outputs of every layer",
            "seed": own._fitted().state.seed,
            "predictive": "sampled",
        }
