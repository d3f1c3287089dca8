"""scikit-learn estimators around a trained network, or around a skorch net that is trained first.

```python
from nullbayes.sklearn import NullSpaceClassifier

estimator = NullSpaceClassifier(model).fit(X, y)  # X, y: what the network was trained on
estimator.predict_proba(X_new), estimator.score_samples(X_new)
```
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nullbayes.errors import InputError, MissingExtraError
from nullbayes.likelihood import Likelihood, Regression
from nullbayes.posterior.base import Posterior
from nullbayes.posterior.loading import load
from nullbayes.posterior.posterior import LaplacePosterior, NullSpacePosterior

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, check_X_y
except ImportError as error:
    raise MissingExtraError(
        "`nullbayes.sklearn` needs scikit-learn: `pip install nullbayes[sklearn]`."
    ) from error

Array = NDArray[Any]
Self = TypeVar("Self", bound="_Estimator")
KINDS: dict[str, type[NullSpacePosterior] | type[LaplacePosterior]] = {
    "null-space": NullSpacePosterior,
    "laplace": LaplacePosterior,
}


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """What the classifier and the regressor share.

    Parameters are stored as they are given, which `sklearn.base.clone` needs, and checked by ``fit``.
    """

    def __init__(
        self,
        module: Any,
        *,
        posterior: str = "null-space",
        prior_precision: Any = "evidence",
        parameters: Any = None,
        preserve: str = "predictions",
        num_samples: int = 30,
        random_state: int = 0,
        calibration_share: float = 0.0,
    ) -> None:
        self.module = module
        self.posterior = posterior
        self.prior_precision = prior_precision
        self.parameters = parameters
        self.preserve = preserve
        self.num_samples = num_samples
        self.random_state = random_state
        self.calibration_share = calibration_share

    # -- what a subclass says ----------------------------------------------------------------------

    def _read(self, X: Any, y: Any) -> tuple[Array, Array]:
        raise NotImplementedError

    def _likelihood(self, outputs: int) -> Likelihood | str:
        raise NotImplementedError

    # -- fit ---------------------------------------------------------------------------------------

    def fit(self: Self, X: Any, y: Any) -> Self:
        """Fit the posterior on what the network was trained on; a skorch net is trained first, on the same.

        Args:
            X: ``(N, ...)`` numbers; ``y``: ``(N,)``, for regression also ``(N, O)``.

        Raises:
            InputError: parameters or data that cannot be used.
        """
        if self.posterior not in KINDS:
            raise InputError(f"`posterior` is {self.posterior!r}; expected {sorted(KINDS)}.")
        share = self.calibration_share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise InputError(f"`calibration_share` is {share!r}; expected a number from 0 up to 1.")
        X, y = self._read(X, y)
        self._tokens = _takes_tokens(self.module)
        X = self._features(X)
        held = round(share * len(X))
        order = np.random.default_rng(self.random_state).permutation(len(X))
        rest, held_out = np.sort(order[held:]), order[:held]
        model = self._trained(X[rest], y[rest])
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            given = torch.as_tensor(X[:1], dtype=dtype if X.dtype.kind == "f" else None)
            outputs = model(given.to(next(model.parameters()).device))
        kind = KINDS[self.posterior]
        made = kind(
            model,
            self._likelihood(outputs[0].numel()),
            self.preserve,
            prior_precision=self.prior_precision,
            parameters=self.parameters,
        )
        targets = self._targets(y, outputs)
        made.fit((X[rest], targets[rest]), self.num_samples, self.random_state, progress=False)
        if held:
            made.calibrate((X[held_out], targets[held_out]), progress=False)
        self.posterior_: Posterior = made
        self.n_features_in_ = X.shape[1] if X.ndim > 1 else 1
        return self

    def _features(self, X: Array) -> Array:
        """Whole numbers are features like others, but where the network looks them up."""
        return X if X.dtype.kind == "f" or self._tokens else X.astype(np.float64)

    def _trained(self, X: Array, y: Array) -> nn.Module:
        """The module itself; that of a skorch net after it was trained, on a clone."""
        net = self.module
        if hasattr(net, "initialize") and hasattr(net, "fit"):
            given = X.astype(np.float32) if X.dtype.kind == "f" else X
            self.net_ = clone(net).fit(given, self._net_targets(y))
            net = self.net_.module_
            net.eval()
        elif isinstance(net, nn.Module):
            # Later changes of the user's are not those of a fitted estimator.
            net = copy.deepcopy(net)
        else:
            raise InputError(
                f"`module` is {type(net).__name__}; expected a trained torch.nn.Module or a skorch net."
            )
        return net

    def _net_targets(self, y: Array) -> Array:
        return y

    def _targets(self, y: Array, outputs: torch.Tensor) -> Array:
        return y

    # -- pickles -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """With the posterior as its file, which holds no rows: scores of a copy come from its samples."""
        state = dict(super().__getstate__())
        posterior = state.pop("posterior_", None)
        if posterior is not None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "posterior.safetensors"
                posterior.save(file)
                state["_stored"] = (file.read_bytes(), posterior.model)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state.pop("_stored", None)
        super().__setstate__(state)
        if stored is not None:
            content, model = stored
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "posterior.safetensors"
                file.write_bytes(content)
                loaded = load(file, model)
            assert isinstance(loaded, Posterior)
            self.posterior_ = loaded

    # -- use ---------------------------------------------------------------------------------------

    def _checked(self, X: Any) -> Array:
        check_is_fitted(self, "posterior_")
        X = _numbers(X)
        if X.ndim > 1 and X.shape[1] != self.n_features_in_:
            raise InputError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input."
            )
        return self._features(X)

    def score_samples(self, X: Any) -> Array:
        """How much each input is like the training data ``(N,)``: minus its novelty in nats, as scikit-learn has it."""
        checked = self._checked(X)
        return -self.posterior_.novelty(checked).cpu().numpy()

    @property
    def certificate_(self) -> Any:
        """The measured guarantee."""
        check_is_fitted(self, "posterior_")
        return self.posterior_.certificate


class NullSpaceClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A classifier whose training predictions are those of the network, and whose doubt grows elsewhere.

    Args:
        module: a trained `torch.nn.Module` that returns logits ``(N, classes)``, or one for two classes ``(N, 1)``; in
            the order of the sorted labels. Or a skorch net, which ``fit`` trains, on a clone.
        posterior: ``"null-space"`` or ``"laplace"``.
        prior_precision, parameters, preserve, num_samples: as those of `nullbayes.NullSpacePosterior`, and of its
            ``fit``.
        random_state: the seed of samples, and of which examples are held out.
        calibration_share: share of the data that is held out to calibrate on; of these a prefit network should not have
            learned.

    Attributes:
        posterior_: the fitted posterior; ``classes_ (classes,)``: labels; ``certificate_``: the measured guarantee.
    """

    def _read(self, X: Any, y: Any) -> tuple[Array, Array]:
        X, y = check_X_y(X, y, allow_nd=True, dtype="numeric")
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(
                f"y holds one class only, {self.classes_.tolist()}; NullSpaceClassifier can't train when only one "
                "class is present."
            )
        return X, codes.astype(np.int64)

    def _likelihood(self, outputs: int) -> Likelihood | str:
        if outputs == 1 and len(self.classes_) == 2:
            return "binary"
        if outputs != len(self.classes_):
            raise InputError(
                f"y holds {len(self.classes_)} classes, {self.classes_.tolist()[:10]}, but the network has {outputs} "
                "outputs; expected one for each class in the order of the sorted labels."
            )
        return "classification"

    def _targets(self, y: Array, outputs: torch.Tensor) -> Array:
        return y.reshape(-1, 1).astype(np.float64) if outputs.shape[-1] == 1 else y

    def predict_proba(self, X: Any) -> Array:
        """Mean probabilities ``(N, classes)``, which sum to one."""
        checked = self._checked(X)
        mean = self.posterior_.predict(checked).mean.double().cpu().numpy()
        if mean.shape[1] == 1:
            mean = np.concatenate([1 - mean, mean], axis=1)
        return mean / mean.sum(1, keepdims=True)

    def predict(self, X: Any) -> Array:
        """The most probable label ``(N,)``."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]


class NullSpaceRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A regressor whose training predictions are those of the network, with standard deviations that grow elsewhere.

    Args:
        module: a trained `torch.nn.Module` that returns ``(N, O)``, or a skorch net, which ``fit`` trains, on a clone.
        noise_variance: of the targets around the outputs; None: estimated.
        posterior, prior_precision, parameters, preserve, num_samples, random_state, calibration_share: as those of
            `NullSpaceClassifier`.
    """

    def __init__(
        self,
        module: Any,
        *,
        noise_variance: float | None = None,
        posterior: str = "null-space",
        prior_precision: Any = "evidence",
        parameters: Any = None,
        preserve: str = "predictions",
        num_samples: int = 30,
        random_state: int = 0,
        calibration_share: float = 0.0,
    ) -> None:
        super().__init__(
            module,
            posterior=posterior,
            prior_precision=prior_precision,
            parameters=parameters,
            preserve=preserve,
            num_samples=num_samples,
            random_state=random_state,
            calibration_share=calibration_share,
        )
        self.noise_variance = noise_variance

    def _read(self, X: Any, y: Any) -> tuple[Array, Array]:
        X, y = check_X_y(X, y, allow_nd=True, dtype="numeric", multi_output=True, y_numeric=True)
        self._flat = y.ndim == 1
        return X, y.astype(np.float64)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _likelihood(self, outputs: int) -> Likelihood | str:
        return Regression(self.noise_variance)

    def _net_targets(self, y: Array) -> Array:
        return y.reshape(len(y), -1).astype(np.float32)

    def _targets(self, y: Array, outputs: torch.Tensor) -> Array:
        return y.reshape(len(y), -1) if outputs.ndim > 1 else y

    def predict(self, X: Any, return_std: bool = False) -> Any:  # scikit-learn's signature
        """Mean ``(N,)`` or ``(N, O)``; ``return_std``: with the standard deviation of a new target."""
        checked = self._checked(X)
        prediction = self.posterior_.predict(checked)
        mean, std = prediction.mean, prediction.total.sqrt()
        out = [t.double().cpu().numpy() for t in (mean, std)]
        out = [t.reshape(len(t)) if self._flat else t for t in out]
        return tuple(out) if return_std else out[0]


def _takes_tokens(net: Any) -> bool:
    """Whether whole numbers are looked up in a table by the network, or by that of a skorch net."""
    if not isinstance(net, nn.Module):
        try:
            with torch.random.fork_rng(devices=[]):
                net = clone(net).initialize().module_
        except Exception:  # a net whose sizes follow from the data cannot be made before
            return False
    return any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in net.modules())


def _numbers(X: Any) -> Array:
    return check_array(X, allow_nd=True, dtype="numeric")
