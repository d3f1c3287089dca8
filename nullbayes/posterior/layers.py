"""The layer null space: a posterior whose samples leave the network's own outputs on the training data as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from nullbayes.common.arguments import check_choice, check_count, check_delta, check_positive
from nullbayes.common.memory import available_bytes, explained_out_of_memory, parse_bytes
from nullbayes.common.processes import Processes
from nullbayes.common.progress import Laps, stages
from nullbayes.constraints.memory_budget import default_budget
from nullbayes.errors import InputError, NotFittedError
from nullbayes.fit.together import own_budget
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.likelihood import Likelihood, LossFunction, resolve_loss
from nullbayes.model.batch import Inputs, batch_size, check_inputs, to_device
from nullbayes.model.checks import check_mode
from nullbayes.model.data import as_loader, is_array
from nullbayes.model.fingerprint import Watch, check_unchanged, quick_digest
from nullbayes.model.functional import Forward, FunctionalModel, unwrapped
from nullbayes.model.parameters import ParameterChoice, ParameterSpace
from nullbayes.model.randomness import FrozenRandomness, resolve_randomness
from nullbayes.model.shares import shared
from nullbayes.model.undisturbed import reading_method, undisturbed_method
from nullbayes.moments.products import working_dtype
from nullbayes.posterior import layer_change
from nullbayes.posterior.calibration_path import CalibrationPath, temperature_of
from nullbayes.posterior.layer_certificate import LayerCertificate
from nullbayes.posterior.layer_fit import (
    INPUTS,
    LayerFit,
    Source,
    collect,
    concluded,
    set_precision,
)
from nullbayes.posterior.layer_judged import LayerJudged
from nullbayes.posterior.layer_plan import LayerPlan, plan_layers
from nullbayes.posterior.layer_predict import METHODS, closed_prediction
from nullbayes.posterior.layer_rows import output_covariance
from nullbayes.posterior.layer_scored import LayerScored
from nullbayes.posterior.layer_state import LayerState
from nullbayes.posterior.prediction import Prediction, make_prediction, structured
from nullbayes.posterior.projector import LayerProjector

CLASSIFICATION = "classification"
AUTO = "auto"
# Edge of the null space, relative to the mean eigenvalue of a layer's second moments: among tenths, hundredths and
# thousandths the one that told inputs apart best over networks (benchmarks/layers.py).
DELTA = 1e-2


class LayerNullSpacePosterior(LayerScored, LayerJudged):
    """``N(θ̂, α⁻¹ ⊕_l I ⊗ P_l)``, where ``P_l`` leaves what layer ``l`` makes of its training inputs.

    Where no layer's map moves on the inputs that it receives from the training data, no output of the network does, at
    any size of the weight change: what stands is the re-weighted network itself, not its first order. One forward pass
    over the data gives the second moments of all layer inputs; labels are not needed, samples are not stored, and data
    can be added and removed exactly. Parameters that no rule accounts for stay fixed and are named in the certificate.

    Args:
        model: the trained network, in evaluation mode. It is never written to.
        likelihood: as for :class:`nullbayes.Posterior`; says in what units predictions move. ``loss=`` is another name.
        delta: where the null space of a layer ends, relative to the mean eigenvalue of its inputs' second moments:
            ``P = δ (C + δ I)⁻¹``. 0: the exact null space, which layers narrower than their data do not have.
        prior_precision: ``α``, or ``"auto"``: weights from the prior are as large as the trained ones, or so much
            smaller that training predictions of sampled networks move by at most 0.005 nats on average, and those of
            examples left out by 0.02.
        parameters: which weights take part: all that require a gradient (None), names, or a filter.
        forward: ``forward(model, inputs) -> outputs`` where ``model(inputs)`` does not do.
        memory: what a fit may take, e.g. ``"8GB"``; second moments of layers that are too wide for it are sketched.
        randomness: None: the model must not draw random numbers. ``"frozen"`` (or ``nb.FrozenRandomness(seed)``): an
            example gets the same ones in every batch and call, and what stands are its outputs with those.
        draws: with how many draws of that noise each training example is read.
        process_group: the processes that read the data together, as for :class:`nullbayes.NullSpacePosterior`.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | LossFunction = CLASSIFICATION,
        *,
        delta: float = DELTA,
        prior_precision: float | str = AUTO,
        loss: LossFunction | None = None,
        parameters: ParameterChoice = None,
        forward: Forward | None = None,
        memory: str | int | None = None,
        randomness: str | FrozenRandomness | None = None,
        draws: int | None = None,
        process_group: Any = None,
    ) -> None:
        self.model = unwrapped(model, frozen=parameters is not None)
        self.likelihood = resolve_loss(likelihood, loss, CLASSIFICATION)
        self.delta, self.process_group = check_delta(delta), process_group
        if isinstance(prior_precision, str):
            check_choice(prior_precision, (AUTO,), "prior_precision")
            self._prior: float | None = None
        else:
            self._prior = check_positive(prior_precision, "prior_precision")
        self.space = ParameterSpace.from_model(self.model, parameters)
        if self.space.masks:
            raise InputError(
                f"`parameters` holds masks, of {sorted(self.space.masks)[:4]}: the null space of a layer is that of "
                "whole rows of its weight. Name whole parameters, or use `NullSpacePosterior`."
            )
        frozen = resolve_randomness(randomness, draws)
        self.functional = FunctionalModel(
            self.model, self.space, forward, layouts=self.likelihood.layouts, randomness=frozen
        )
        self.functional.serve(self.likelihood)
        self._memory = None if memory is None else parse_bytes(memory)
        self.calibration: CalibrationPath | None = None
        self._fit: LayerFit | None = None
        self._given = False  # whether the prior precision was set by hand after the fit
        self._rows: CapturePlan | None = None
        self._seen: int | None = None
        self._watch: Watch | None = None

    # -- fit -------------------------------------------------------------------------------------

    @reading_method
    def fit(
        self, train: Any, num_samples: int = 30, seed: int = 0, *, progress: bool = True
    ) -> LayerNullSpacePosterior:
        """Build the posterior from one pass over the training inputs; an earlier fit stands until it is done.

        Args:
            train: a loader, read once; a list of batches; a tensor or array of all inputs; ``(X, y)`` of them; a data
                set; a Lightning data module. A batch is ``(x, y)``, ``x``, ``(x,)``, a mapping, or ``(x1, x2, None)``.
                Labels serve the certificate's scores, and a regression's noise.
            num_samples: how many samples `predict` and `sample` use; they are made when needed.
            seed: sample ``s`` depends on ``(seed, s)`` and the data alone.

        Raises:
            InputError, ModelError, NonFiniteError, MemoryBudgetError: each names what was found and the mend; the model
                and an earlier fit stay as they were.
        """
        num_samples = check_count(num_samples, "num_samples")
        seed = check_count(seed, "seed", 0)
        with self._together("fit", num_samples=num_samples) as processes:
            data = self._part(self._data(train, "train"), "train", processes, seed)
            self._check_mode()
            self.space.check_finite(self.model)
            budget = self._memory or own_budget(self.functional.device, processes)
            if processes is None:
                return self._fitted_to(data, num_samples, seed, budget, progress=progress)
            budget = -round(processes.largest(-budget))
            progress &= processes.leads
            return self._fitted_to(data, num_samples, seed, budget, progress=progress)

    def _fitted_to(
        self, data: Any, num_samples: int, seed: int, budget: int, *, progress: bool
    ) -> LayerNullSpacePosterior:
        likelihood = layer_change.fresh(self.likelihood)
        with stages(show=progress) as stage, explained_out_of_memory(budget):
            laps, products = Laps(), working_dtype(self.functional.dtype, self.delta)
            blocks, gathered = collect(
                self.functional, likelihood, Source(data, "train", seed, products), stage, budget
            )
            laps.lap(INPUTS)
            state = LayerState(self.functional, blocks, gathered, self.delta, seed, num_samples)
            fit = concluded(state, likelihood, self._prior, stage, laps)
        self._accept(fit)
        self.calibration, self._given = None, False
        return self

    def _data(self, data: Any, name: str) -> Any:
        """Arrays, data sets and data modules as loaders; what else may be read as it is."""
        several = isinstance(data, tuple) and len(data) > 1 and all(is_array(t) for t in data)
        if (
            is_array(data)
            or several
            or isinstance(data, Dataset)
            or hasattr(data, "train_dataloader")
        ):
            return as_loader(data, name, self.functional.dtype, labelled=False)
        return data

    def _part(self, data: Any, name: str, processes: Processes | None, seed: int = 0) -> Any:
        """What this process reads of ``data``, of a network and arguments that are those of all."""
        if processes is None:
            return data
        space = self.space
        settings = (self.delta, self._prior, self._memory, repr(self.likelihood), space.names, seed)
        weights = quick_digest(self.model)
        processes.agree({"weights": weights, "settings": settings})
        return shared(data, processes, name)

    def _accept(self, fit: LayerFit) -> None:
        self._fit, self.likelihood = fit, fit.likelihood
        self.functional.probe = fit.state.functional.probe
        self._forget_scores()

    @reading_method
    def plan(self, train: Any) -> LayerPlan:
        """What a fit would cost: seconds, memory, and which layers take part; from the first batch of ``train``."""
        self._check_mode()
        budget = self._memory or default_budget(available_bytes(self.functional.device))
        data, products = (
            self._data(train, "train"),
            working_dtype(self.functional.dtype, self.delta),
        )
        return plan_layers(self.functional, data, budget, products)

    # -- data come and go ------------------------------------------------------------------------

    @reading_method
    def update(self, more: Any, *, progress: bool = True) -> LayerNullSpacePosterior:
        """Add training data: the sums of all, as if fitted together. Raises as `fit`; what was fitted stays then."""
        with self._together("update") as processes:
            fit = self._ready()
            data = self._part(self._data(more, "more"), "more", processes)
            shows = progress and (processes is None or processes.leads)
            self._accept(layer_change.updated(fit, data, self._prior, progress=shows))
        return self

    @reading_method
    def remove(self, some: Any, *, progress: bool = True) -> LayerNullSpacePosterior:
        """Take training data out again: as if it had never been there. Of several processes each reads a part of it.

        Raises:
            InputError: data that were never added, or all of them; nothing is removed then.
        """
        with self._together("remove") as processes:
            fit = self._ready()
            data = self._part(self._data(some, "some"), "some", processes)
            shows = progress and (processes is None or processes.leads)
            self._accept(layer_change.removed(fit, data, self._prior, progress=shows))
        return self

    @undisturbed_method
    def merged(self, other: LayerNullSpacePosterior) -> LayerNullSpacePosterior:
        """The posterior of both sets of data, around this model; neither of the two changes.

        Raises:
            InputError: another network, other weights that take part, or another ``delta``.
        """
        fit, theirs = self._ready(), other._ready()
        out = LayerNullSpacePosterior(
            self.model,
            layer_change.fresh(self.likelihood),
            delta=self.delta,
            prior_precision=AUTO if self._prior is None else self._prior,
            parameters=self.space.names,
            forward=self.functional.user_forward,
            memory=self._memory,
            randomness=self.functional.randomness,
            process_group=self.process_group,
        )
        out._accept(layer_change.merged(fit, theirs, self._prior))
        return out

    @undisturbed_method
    def follow(self) -> LayerNullSpacePosterior:
        """Take the model's present weights for the trained ones, after training inside the null space.

        What the layers receive from the old data is what it was, so the sums stand and no old data are needed; `update`
        then adds the new ones.

        Raises:
            ModelError: outputs on training examples moved, so the sums are those of another network.
        """
        fit = self._fitted()
        self._check_mode()
        self.space.check_finite(self.model)
        self._accept(layer_change.followed(fit, self._prior))
        self._rows = None
        return self

    # -- what was fitted -------------------------------------------------------------------------

    def _fitted(self) -> LayerFit:
        if self._fit is None:
            raise NotFittedError(
                "this LayerNullSpacePosterior has not been fitted; call `fit(train)` first, or "
                "`nb.load(path, model)`."
            )
        return self._fit

    def _ready(self) -> LayerFit:
        """The fit, of a model that is still the one that was fitted."""
        fit = self._fitted()
        self._check_mode()
        digest = quick_digest(self.model)
        if digest != self._seen:
            check_unchanged(self.model, fit.fingerprint)
            self._seen = digest
            self._watch = None
        return fit

    def _check_mode(self) -> None:
        check_mode(self.model, frozen=self.functional.randomness is not None)

    def _watched(self) -> LayerFit:
        """The same for less than a forward pass, see :class:`Watch`."""
        if self._fit is None or self._watch is None or not self._watch.same(self.model):
            fit, watch = self._ready(), Watch(self.model)
            self.functional.check_same()
            self._watch = watch
            return fit
        return self._fit

    def _inputs(self, x: Inputs, draw: int = 0) -> Inputs:
        """Checked, on the device, and keyed for one draw of the frozen noise, where there is any."""
        self._watched()
        x = self.functional.as_called(to_device(x, self.functional.device))
        if not batch_size(x, "`x`"):
            raise InputError(
                "`x` holds no examples: its first axis has length 0. Pass at least one."
            )
        check_inputs(x, "`x`")
        return self.functional.keyed(x, [check_count(draw, "draw", 0)])

    def _plan_of_rows(self, x: Inputs) -> CapturePlan:
        if self._rows is None:
            self.functional.outputs(x, "`x`")
            self._rows = prove(self.functional, x)
        return self._rows

    @property
    def certificate(self) -> LayerCertificate:
        """The guarantee, measured on sampled networks, at the current prior precision."""
        return self._fitted().certificate

    @property
    def num_samples(self) -> int:
        """Weight samples that `predict` uses."""
        return self._fitted().state.num_samples

    @property
    def prior_precision(self) -> float:
        """``α``. Setting it rescales the samples and measures the certificate anew."""
        return self._fitted().alpha

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        self._set_precision(value)
        self._given = True

    @undisturbed_method
    def _set_precision(self, value: float) -> None:
        self._fit = set_precision(self._fitted(), check_positive(value, "prior_precision"))

    # -- use -------------------------------------------------------------------------------------

    @undisturbed_method
    def predict(self, x: Inputs, method: str = "sampled", *, draw: int = 0) -> Prediction:
        """Predict a batch ``x`` (tensor, tuple or mapping of tensors).

        Args:
            method: ``"sampled"`` (default): the re-weighted networks, which the guarantee is about; ``"linearised"``;
                or ``"closed"``: the Gaussian of the linearised outputs in closed form, without weight samples.
            draw: which draw of the frozen noise, where the model draws any.
        """
        check_choice(method, METHODS, "method")
        x = self._inputs(x, draw)
        fit, scale = self._fitted(), self._fitted().alpha ** -0.5
        point, heat = self.functional.outputs(x, "`x`"), temperature_of(self.calibration)
        if method == "sampled":
            outputs = fit.state.sampled(x, scale, max(2, self.num_samples))
            flat = make_prediction(self.likelihood, point, outputs, method, temperature=heat)
        elif method == "linearised":
            change = fit.state.linearised(x, self.num_samples)
            moved = point + scale * change
            flat = make_prediction(self.likelihood, point, moved, method, temperature=heat)
        else:
            plan = self._plan_of_rows(x)
            covariance = output_covariance(fit.state, plan, x, lambda t: t) / fit.alpha
            flat = closed_prediction(self.likelihood, point, covariance, fit.state.seed, heat)
        return flat if self.likelihood.layouts is None else structured(flat, self.likelihood)

    def sample(self, count: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield ``count`` samples (default: as many as were asked for) as state dicts for ``load_state_dict``."""
        fit = self._ready()
        count = self.num_samples if count is None else check_count(count, "count")
        return fit.state.state_dicts(fit.alpha**-0.5, count)

    def draw(self, count: int) -> None:
        """Use ``count`` samples more from now on; they continue the stream of the fit's seed."""
        self._fitted().state.num_samples += check_count(count, "count")

    def projector(self) -> LayerProjector:
        """Projects weight changes on the null space: for fine-tuning that leaves the training outputs as they are.

        Exact with ``delta=0``; see :meth:`LayerProjector.attach` for an optimiser.
        """
        state = self._ready().state
        return LayerProjector(self.model, state.blocks, state.factors)

    @undisturbed_method
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write sums, settings, certificate and a fingerprint of the model to one file; no data, no samples."""
        from nullbayes.posterior.layer_storage import write_layers

        write_layers(path, self, self._ready())
