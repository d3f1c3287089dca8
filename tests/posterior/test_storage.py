"""What comes back from a file, around which models, and what users register."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import QUIET, TRAIN, X, Y, assert_same, delicate, network, says, unchanged
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import Lambda, TiedLanguageModel

import nullbayes as nb
from nullbayes.constraints import preserve as constraints
from nullbayes.likelihood import base, epistemic_variance


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "posterior.safetensors"  # in a folder that does not exist yet


def answers(posterior: Any, x: Any) -> list[Any]:
    out: list[Any] = []
    for method in ("linearised", "sampled"):
        p = posterior.predict(x, method=method)
        out += [p.mean, p.outputs, p.point, p.variance, p.total, p.aleatoric, p.epistemic]
    out += [posterior.novelty(x, score=s, exact=False) for s in ("variance", "share", "entropy")]
    out += [posterior.certificate, posterior.certificate.as_dict(), str(posterior.certificate)]
    out += [posterior.prior_precision, posterior.num_samples, posterior.likelihood.config()]
    out += [type(posterior), posterior.preserve.name, posterior.directions, posterior.delta]
    out += [posterior.space.names, posterior.problem.prior, posterior._fitted().seed]
    out += [None if posterior.calibration is None else posterior.calibration.as_dict()]
    return out + [list(weights.values()) for weights in posterior.sample()]


def assert_comes_back(posterior: Any, path: Path, x: Any = X, **options: Any) -> Any:
    wanted = answers(posterior, x)
    posterior.save(path)
    with unchanged(posterior.model):
        loaded = nb.load(path, posterior.model, **options)
        assert_same(answers(loaded, x), wanted)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return loaded


PRIOR = {"0.weight": 1.0, "0.bias": 2.0, "2.weight": 3.0, "2.bias": 0.1 + 0.2}
CONFIGURATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "defaults": (nb.NullSpacePosterior, {}),
    "laplace": (nb.LaplacePosterior, {}),
    "options": (
        nb.NullSpacePosterior,
        {"preserve": "outputs", "delta": 0.1, "prior_precision": 0.1 + 0.2},
    ),
    "loss": (nb.NullSpacePosterior, {"preserve": "loss", "delta": 0}),
    "directions": (nb.NullSpacePosterior, {"directions": "auto"}),
    "per-tensor": (nb.NullSpacePosterior, {"prior_precision": PRIOR}),
    "laplace-per-tensor": (nb.LaplacePosterior, {"prior_precision": PRIOR}),
    "subset": (nb.NullSpacePosterior, {"parameters": ["2.weight", "0.bias"]}),
    "weights": (
        nb.NullSpacePosterior,
        {"likelihood": nb.Classification(weight=[1.0, 0.1, 1 / 3], ignore_index=2)},
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_round_trip(case: str, path: Path) -> None:
    kind, options = CONFIGURATIONS[case]
    posterior = kind(network(), **options).fit(TRAIN, 4, seed=7, **QUIET)
    assert_comes_back(posterior, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_trip_of_regression(dtype: torch.dtype, path: Path) -> None:
    model, x = network(outputs=2).to(dtype), X.to(dtype)
    posterior = nb.NullSpacePosterior(model, "regression").fit([(x, x[:, :2])], 4, **QUIET)
    loaded = assert_comes_back(posterior, path, x)
    assert_close(
        loaded.likelihood.noise_variance, posterior.likelihood.noise_variance, rtol=0, atol=0
    )
    assert loaded.likelihood.noise_variance.shape == (2,)


# Too few data to calibrate on.
@pytest.mark.filterwarnings("ignore::nullbayes.errors.NullBayesWarning")
def test_round_trip_after_calibration_and_more_draws(path: Path) -> None:
    posterior = nb.NullSpacePosterior(network()).fit(TRAIN, 4, **QUIET)
    posterior.draw(3)
    path_found = posterior.calibrate(TRAIN, ood_loader=[(5 * X, Y)], **QUIET)
    loaded = assert_comes_back(posterior, path)
    assert loaded.num_samples == 7 and loaded.calibration == path_found
    again = assert_comes_back(loaded, path.with_name("posterior.safetensors"))  # over itself
    assert again.calibrate(TRAIN, **QUIET).start == loaded.prior_precision


def test_round_trip_of_a_tied_model(path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = TiedLanguageModel().eval(), torch.randint(0, 7, (6, 5))
    posterior = nb.NullSpacePosterior(model).fit([(x, x[:, 0])], 3, **QUIET)
    loaded = assert_comes_back(posterior, path, x)
    clone = TiedLanguageModel()
    clone.load_state_dict(model.state_dict())
    assert_same(nb.load(path, clone.eval()).predict(x).outputs, posterior.predict(x).outputs)
    weights = next(loaded.sample())
    assert torch.equal(weights["embed.weight"], weights["out.weight"])


def test_round_trip_of_a_model_with_everything(path: Path) -> None:
    posterior = nb.NullSpacePosterior(delicate()).fit(TRAIN, 3, **QUIET)
    assert_comes_back(posterior, path)
    assert "out.weight" not in posterior.space.names  # it is frozen


def test_convolutions_predict_the_same_bits_after_loading(path: Path) -> None:
    """The plan of a fit, which saw many cotangents, and that of a load must agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), Lambda(lambda h: h.mean((2, 3)))
        model, x = nn.Sequential(*layers).eval(), torch.randn(9, 1, 8, 8)
    y = torch.arange(9) % 5
    posterior = nb.NullSpacePosterior(model, preserve="loss").fit(
        [(x[:5], y[:5]), (x[5:], y[5:])], 4, **QUIET
    )
    assert_comes_back(posterior, path, x)


def test_a_forward_is_given_again(path: Path) -> None:
    forward = lambda model, inputs: model(inputs["x"])  # noqa: E731
    loader = [{"x": X, "labels": Y}]
    posterior = nb.NullSpacePosterior(network(), forward=forward).fit(loader, 3, **QUIET)
    assert_comes_back(posterior, path, {"x": X}, forward=forward)
    with says(nb.InputError, "`x`", "forward="):
        nb.load(path, posterior.model).predict({"x": X})


def test_what_a_file_does_not_hold(path: Path) -> None:
    posterior = nb.NullSpacePosterior(network()).fit(TRAIN, 3, **QUIET)
    posterior.save(path)
    loaded = nb.load(path, posterior.model)
    with says(nb.NotFittedError, "exact novelty", "not stored", "exact=False"):
        loaded.novelty(X, exact=True)
    with says(nb.NotFittedError, "3 samples", "num_samples"):
        loaded.draw(2)
    with says(nb.NotFittedError, "3 samples", "num_samples"):
        loaded.sample(5)
    assert_same(loaded.novelty(X), posterior.novelty(X, exact=False))
    loaded.prior_precision = 4.0  # rescales, without the training data
    posterior.prior_precision = 4.0
    assert_same(loaded.predict(X).outputs, posterior.predict(X).outputs)
    # Drifts are measured on training examples: without them the certificate speaks of where it was.
    assert loaded.certificate == nb.load(path, posterior.model).certificate
    loaded.fit(TRAIN, 3, **QUIET).prior_precision = 4.0
    assert_same(loaded.novelty(X, exact=True), posterior.novelty(X, exact=True))


def test_numbers_that_json_does_not_know(path: Path) -> None:
    """NaN and infinity in the certificate come back as what they were."""
    lost = torch.full_like(Y, -100)
    with pytest.warns(nb.NullBayesWarning, match="no direction"):
        posterior = nb.NullSpacePosterior(network(), prior_precision="evidence").fit(
            [(X, lost)], 3, **QUIET
        )
    assert posterior.certificate.network_score != posterior.certificate.network_score
    assert (
        not posterior.certificate.held and "no training accuracy" in posterior.certificate.verdict
    )
    posterior.save(path)
    loaded = nb.load(path, posterior.model)
    assert str(loaded.certificate) == str(posterior.certificate)
    assert_same(loaded.predict(X).outputs, posterior.predict(X).outputs)


# -- other models --------------------------------------------------------------------------------


@pytest.fixture
def saved(path: Path) -> Path:
    nb.NullSpacePosterior(network(nn.BatchNorm1d(6))).fit(TRAIN, 3, **QUIET).save(path)
    return path


def test_other_architectures_and_weights(saved: Path) -> None:
    fit_again = "other weights"
    wider = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 3)).eval()
    with says(nb.StorageError, str(saved), "'0.weight'", "(7, 3)", "(6, 3)", "same architecture"):
        nb.load(saved, wider)
    with says(
        nb.StorageError, str(saved), "['2.bias', '2.weight', '3.bias', '3.weight']", "Sequential"
    ):
        nb.load(saved, nn.Sequential(nn.Linear(3, 6)))
    changed = network(nn.BatchNorm1d(6))
    changed[0].bias.data[2] += 1e-3
    with says(
        nb.StorageError, fit_again, "1 tensors differ", "'0.bias'", "load_state_dict", "fit anew"
    ):
        nb.load(saved, changed)
    statistics = network(nn.BatchNorm1d(6))
    statistics[2].running_mean += 0.1
    with says(nb.StorageError, fit_again, "'2.running_mean'"):
        nb.load(saved, statistics)
    # More layers: the last ones are called otherwise.
    frozen = network(nn.BatchNorm1d(6), nn.Linear(6, 6))
    with says(nb.StorageError, "3.weight"):
        nb.load(saved, frozen)
    with says(nb.InputError, "`model` is str", "torch.nn.Module"):
        nb.load(saved, "model.pt")
    assert nb.load(saved, network(nn.BatchNorm1d(6)).requires_grad_(False)).num_samples == 3


@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LayerNullSpacePosterior])
def test_a_file_is_of_the_weights_that_were_fitted(kind: Any, path: Path) -> None:
    model: Any = network()
    posterior = kind(model).fit(TRAIN, 3, **QUIET)
    wanted, weight = posterior.predict(X).mean, model[0].weight.data.clone()
    model[0].weight.data.mul_(1.5)  # trained on, before anybody saved
    with contextlib.suppress(nb.ModelError):  # that of layers looks first
        posterior.save(path)
        with says(nb.StorageError, "fitted around other weights"):
            nb.load(path, model)
    model[0].weight.data.copy_(weight)
    posterior.save(path)
    assert torch.equal(nb.load(path, model).predict(X).mean, wanted)


def test_a_model_that_changes_after_loading_is_refused(saved: Path) -> None:
    model: Any = network(nn.BatchNorm1d(6))
    again = nb.load(saved, model)
    again.predict(X)
    model[0].weight.data.mul_(1.5)
    with says(nb.ModelError, "changed since"):
        again.predict(X)


def test_another_dtype_warns_and_works(tmp_path: Path) -> None:
    single, double = network(), network().double()
    for model, other in ((single, double), (double, single)):
        data = [(x.to(model[0].weight.dtype), y) for x, y in TRAIN]
        posterior = nb.NullSpacePosterior(model).fit(data, 3, **QUIET)
        posterior.save(tmp_path / "p.safetensors")
        with pytest.warns(nb.NullBayesWarning, match=r"torch\.float(32|64) samples.*the model is"):
            loaded = nb.load(tmp_path / "p.safetensors", other)
        dtype = other[0].weight.dtype
        found = loaded.predict(X.to(dtype))
        assert found.mean.dtype == dtype == next(loaded.sample())["0.weight"].dtype
        wanted = posterior.predict(X.to(model[0].weight.dtype)).outputs.to(dtype)
        assert_close(found.outputs, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_float64_model_that_float32_would_round(path: Path) -> None:
    """The fingerprint is the same before and after a conversion, in either direction."""
    model = network().double()
    model[0].weight.data += 1e-12
    nb.NullSpacePosterior(model).fit([(X.double(), Y)], 3, **QUIET).save(path)
    with pytest.warns(nb.NullBayesWarning, match="converted"):
        assert nb.load(path, model.float()).num_samples == 3


def test_parameters_registered_in_another_order(path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return, operator]

    one, other = Net("ab").eval(), Net("ba").eval()
    other.load_state_dict(one.state_dict())
    posterior = nb.NullSpacePosterior(one).fit(TRAIN, 3, **QUIET)
    posterior.save(path)
    assert_close(nb.load(path, other).predict(X).outputs, posterior.predict(X).outputs)


def test_a_compiled_model(saved: Path) -> None:
    compiled = torch.compile(network(nn.BatchNorm1d(6)), backend="eager")
    assert nb.load(saved, compiled).num_samples == 3


# -- what users register -------------------------------------------------------------------------


def poisson() -> type[nb.Likelihood]:
    class Poisson(nb.Likelihood):
        """Log rates, with an exposure as its setting."""

        name = "poisson-of-these-tests"

        def __init__(self, exposure: float = 1.0) -> None:
            self.exposure = exposure

        def config(self) -> dict[str, Any]:
            return {"name": self.name, "exposure": self.exposure}

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            rate = self.exposure * outputs.exp()
            return (rate - targets * rate.log()).flatten(1).sum(1)

        def moments(self, draws: Tensor, point: Tensor, linearised: bool) -> base.Moments:
            rate = self.exposure * draws.exp()
            mean, spread = rate.mean(0), rate.var(0)
            variance = epistemic_variance(draws, point, linearised=linearised)
            return base.Moments(mean, variance, mean + spread, mean, spread)

    return Poisson


def test_a_likelihood_of_ones_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    kind, model, counts = poisson(), network(outputs=2), (X[:, :2].abs() * 3).round()
    loader = [(X[:4], counts[:4]), (X[4:], counts[4:])]
    posterior = nb.NullSpacePosterior(model, kind(exposure=0.1 + 0.2)).fit(loader, 4, **QUIET)
    posterior.save(path)
    with says(nb.StorageError, str(path), "poisson-of-these-tests", "@register_likelihood"):
        nb.load(path, model)
    assert_comes_back(posterior, path, likelihood=kind(exposure=0.1 + 0.2))
    nb.register_likelihood(kind)
    loaded = assert_comes_back(posterior, path)
    assert isinstance(loaded.likelihood, kind) and loaded.likelihood.exposure == 0.1 + 0.2
    assert (
        nb.NullSpacePosterior(model, "poisson-of-these-tests").likelihood.config()["exposure"]
        == 1.0
    )


def test_settings_that_json_cannot_hold(path: Path) -> None:
    class Bad(nb.Regression):
        def config(self) -> dict[str, Any]:
            return {"name": "regression", "noise_variance": torch.ones(1)}

    posterior = nb.NullSpacePosterior(network(), Bad(1.0)).fit([(X, X)], 3, **QUIET)
    with says(nb.StorageError, "JSON", "`config()`", "plain numbers"):
        posterior.save(path)
    assert not path.exists() and not path.parent.exists()


def test_something_of_ones_own_to_preserve(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "_REGISTRY", dict(constraints._REGISTRY))

    class FirstOutput(nb.Preserve):
        name = "first-output-of-these-tests"

        def num_rows(self, likelihood: nb.Likelihood, output_shape: tuple[int, ...]) -> int:
            return 1

        def build(self, likelihood: nb.Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
            values = torch.zeros_like(outputs).unsqueeze(0)
            values[0, :, 0] = 1
            return values

        def describe(self) -> str:
            return "the first output of each example"

    model = network()
    posterior = nb.NullSpacePosterior(model, preserve=FirstOutput(), delta=0).fit(TRAIN, 4, **QUIET)
    assert posterior.certificate.constraints == 7
    assert "the first output of each example" in str(posterior.certificate)
    change = posterior.predict(X).outputs - posterior.predict(X).point
    assert float(change[..., 0].abs().max()) < 1e-3 * float(change[..., 1:].abs().max())
    posterior.save(path)
    with says(nb.StorageError, "first-output-of-these-tests", "@nb.register_preserve"):
        nb.load(path, model)
    nb.register_preserve(FirstOutput)
    assert_comes_back(posterior, path)


def test_a_network_is_hashed_once_for_a_fit_and_its_use(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = network()
    posterior = nb.NullSpacePosterior(model).fit(TRAIN, 3, **QUIET)
    with monkeypatch.context() as m:
        m.setattr("nullbayes.model.fingerprint.fingerprint", lambda model: pytest.fail("hashed"))
        wanted = posterior.predict(X).mean
    posterior.save(path)
    again = nb.load(path, model)
    with monkeypatch.context() as m:
        m.setattr("nullbayes.model.fingerprint.fingerprint", lambda model: pytest.fail("hashed"))
        assert torch.equal(again.predict(X).mean, wanted)
    model[0].weight.data.mul_(1.5)
    for changed in (posterior, again):
        with says(nb.ModelError, "changed since"):
            changed.predict(X)
