"""What layer posteriors say besides predictions: of data, covariances, of themselves to an evaluation, as a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE
from nullbayes.common.arguments import check_choice, check_count, check_positive
from nullbayes.constraints.within import LayerPrior, Root
from nullbayes.errors import InputError
from nullbayes.model.batch import Inputs, batch_size
from nullbayes.model.fingerprint import fingerprint
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.loader import first_inputs
from nullbayes.model.undisturbed import reading_method, undisturbed_method
from nullbayes.moments.gather import drawn, unlabelled
from nullbayes.posterior import layer_change
from nullbayes.posterior.calibration import calibration_path
from nullbayes.posterior.calibration_path import CalibrationPath, warn_of_closed
from nullbayes.posterior.joint import Joint
from nullbayes.posterior.judged import Judged
from nullbayes.posterior.layer_export import LEVERAGE, TOLERANCE, Export, LayerModule, export_module
from nullbayes.posterior.layer_export import SCORES as EXPORTED
from nullbayes.posterior.layer_fit import set_precision
from nullbayes.posterior.layer_guarantee import measure_on
from nullbayes.posterior.layer_predict import as_fit
from nullbayes.posterior.layer_rows import joint_covariance, output_covariance
from nullbayes.posterior.measuring.methods import GIVEN, GUARANTEE
from nullbayes.posterior.measuring.subject import Moved
from nullbayes.posterior.validation import checked, search_of

if TYPE_CHECKING:
    from nullbayes.posterior.layers import LayerNullSpacePosterior


class LayerJudged(Judged):
    """Mixin of `nullbayes.LayerNullSpacePosterior`. Evaluations look at sampled networks, as `predict` does."""

    linearises = False

    @undisturbed_method
    def covariance(self, x: Inputs, *, draw: int = 0) -> Tensor:
        """Covariance of the linearised outputs, ``Σ_l J_l (I ⊗ P_l) J_lᵀ / α``, closed form: ``(B, O, O)``."""
        own = cast("LayerNullSpacePosterior", self)
        x = own._inputs(x, draw)
        fit, plan = own._fitted(), own._plan_of_rows(x)
        found = output_covariance(fit.state, plan, x, lambda t: t) / fit.alpha
        return found.to(own.functional.dtype)

    @undisturbed_method
    def joint(self, x: Inputs, *, draw: int = 0) -> Joint:
        """Mean ``(B, *out)`` and covariance ``(B·D, B·D)`` of the raw outputs of all inputs together, linearised.

        In closed form: entry ``(b·D + i, c·D + j)`` is ``Σ_l J_l(x_b)_i (I ⊗ P_l) J_l(x_c)_jᵀ / α``.

        Raises:
            InputError: inputs that cannot be used, or too many for one matrix.
        """
        own = cast("LayerNullSpacePosterior", self)
        x = own._inputs(x, draw)
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
        with self._together("divergence") as processes:
            fit = own._ready()
            part = own._part(own._data(data, "data"), "data", processes)
            batches = unlabelled(part, own.functional.device, "data")
            pairs = ((inputs, targets) for _, inputs, targets in drawn(own.functional, batches))
            samples = max(2, own.num_samples)
            found = measure_on(fit.state, own.likelihood, fit.alpha, samples, pairs)
            if processes is None:
                return found.divergence
            total, count = processes.total(found.divergence * found.observed, found.observed)
            return total / max(1.0, count)

    @reading_method
    def calibrate(
        self,
        val_loader: Any,
        *,
        ood_loader: Iterable[Any] | None = None,
        metric: str = "nll",
        tune: str | None = None,
        progress: bool = True,
    ) -> CalibrationPath:
        """Choose the prior precision on validation data, see :meth:`nullbayes.Posterior.calibrate`.

        The path is that of linearised predictions. It does not go below the precision at which the guarantee holds.
        """
        own = cast("LayerNullSpacePosterior", self)
        fit = own._ready()
        loaders = checked(own.functional, val_loader, ood_loader, metric)
        if tune == "temperature":
            warn_of_closed(own.calibration, own.prior_precision)
        asked = {"metric": metric, "tune": tune, "ood_loader": ood_loader is not None}
        with self._together("calibrate", **asked) as processes:
            plan = own._plan_of_rows(first_inputs(own.functional, loaders[0], "val_loader"))
            search = search_of(loaders, metric, tune, progress, processes)
            path = calibration_path(as_fit(fit, own.likelihood), plan, search)
            if path.tuned == "prior":
                fit = set_precision(fit, path.prior_precision[path.chosen])
                guarded = fit.certificate.divergence > ALLOWED_DIVERGENCE
                own._fit = set_precision(fit, layer_change.guarded(fit)) if guarded else fit
            elif path.noise_scale is not None:
                noised = own.likelihood.with_noise(path.noise_scale[path.chosen])
                assert noised is not None
                own.likelihood = noised
        own.calibration = path
        return path

    @undisturbed_method
    def as_prior(self, functional: FunctionalModel) -> LayerPrior:
        """This covariance as a prior, for ``NullSpacePosterior(within=)``.

        Raises:
            InputError: not a posterior with ``delta`` above 0 around the network and weights of ``functional``.
        """
        own = cast("LayerNullSpacePosterior", self)
        fit, space = own._ready(), own.space
        if own.delta == 0:
            raise InputError(
                "`within` has delta=0: its samples leave all outputs on the training data as they are, so that rows of "
                "these data have nothing to take away. Fit it with a soft edge, say delta=0.1."
            )
        same = functional.space.names == space.names and not functional.space.masks
        if fingerprint(functional.model) != fit.fingerprint or not same:
            raise InputError(
                "`within` is a posterior around another network, or around other parameters of it; fit both with the "
                "same `model` and `parameters=`."
            )
        roots = [Root.of(factor) for factor in fit.state.factors]
        blocks = fit.state.blocks.blocks
        return LayerPrior(functional.space, blocks, roots, dict(fit.fingerprint))

    @undisturbed_method
    def export_module(
        self,
        x: Inputs,
        *,
        samples: int = 0,
        tolerance: float | None = None,
        score: str = LEVERAGE,
    ) -> LayerModule:
        """Outputs and novelty in one forward pass of one plain module, for `torch.export` and ONNX.

        The module is a copy: it holds no hooks, and neither the model nor this posterior is needed with it. It is made
        for any number of examples, and compared with this posterior on ``x`` before it is returned: outputs within
        1e-4 of their norm and ``"combined"`` within 1e-3 of one plus itself (in float64 1e-9); ``"leverage"``, a sum of
        logarithms, within ``log(1 + tolerance)`` and .02 for each layer (in float64 1e-6).

        Args:
            x: two inputs or more, as the network takes them.
            samples: sampled networks whose mean prediction it gives as well, 2 or more; each is one more network in it.
            tolerance: how far off each layer's leverage may be, as a share; where the inputs of a layer vary in few
                directions this saves most of its cost. 0: as `novelty` has it. None: 0.2, and 0 for ``"combined"``.
            score: ``"leverage"``, which costs least, or ``"combined"``, the default of `novelty`, which also measures
                the size of what layers receive and the energy of logits.

        Raises:
            InputError: inputs that cannot be used; one example alone; ``"combined"`` with a tolerance, or of a
                posterior from a file without references. ModelError: a network that cannot be exported.
        """
        own = cast("LayerNullSpacePosterior", self)
        if own.functional.randomness is not None:
            raise InputError(
                "a network whose randomness is frozen has no exported form: its noise follows from a hash of the "
                "inputs. Export one that draws nothing."
            )
        x = own._inputs(x)
        if batch_size(x) < 2:
            raise InputError(
                "`x` holds one example; pass two or more, by which the axis of the batch is found."
            )
        samples = check_count(samples, "samples", 0)
        if samples == 1:
            raise InputError(
                "`samples` is 1; expected 0 (no prediction), or 2 and more to average."
            )
        check_choice(score, EXPORTED, "score")
        if tolerance is None:
            tolerance = TOLERANCE if score == LEVERAGE else 0.0
        elif tolerance != 0:
            tolerance = check_positive(tolerance, "tolerance")
        return export_module(own, own._fitted(), x, Export(samples, float(tolerance), score))

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
