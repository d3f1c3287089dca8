"""Posteriors in files: what is saved comes back bit for bit, and nothing else passes for it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import QUIET, TRAIN, X, Y, assert_same, delicate, network, says, unchanged
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import Lambda, TiedLanguageModel

import nullbayes as nb
from nullbayes.constraints import preserve as constraints
from nullbayes.likelihood import base, epistemic_variance
from nullbayes.posterior import description as description_module
from nullbayes.posterior import posterior_file, storage


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


# -- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, -1000, -1])
def test_truncated_files(saved: Path, keep: float) -> None:
    whole = saved.read_bytes()
    length = int(len(whole) * keep) if isinstance(keep, float) else keep % len(whole)
    saved.write_bytes(whole[:length])
    with says(nb.StorageError, str(saved), "truncated", "save it again"):
        nb.load(saved, network(nn.BatchNorm1d(6)))


def test_files_of_others(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "p.safetensors"
    with says(nb.StorageError, "no file", str(path), "posterior.save(path)"):
        nb.load(path, model)
    with says(nb.StorageError, "no file", str(tmp_path)):
        nb.load(tmp_path, model)
    path.write_text("weights, honest\n" * 100)
    with says(nb.StorageError, "cannot be read", "not a posterior file"):
        nb.load(path, model)
    torch.save(model.state_dict(), path)
    with says(nb.StorageError, "cannot be read", "not a posterior file"):
        nb.load(path, model)
    save_file({"samples": torch.zeros(3, 45)}, path)
    with says(nb.StorageError, "safetensors file, but not one"):
        nb.load(path, model)
    for text in ("[]", "{}", '{"format": "nullbayes-posterior"}'):
        save_file({"samples": torch.zeros(3, 45)}, path, {"nullbayes": text})
        with says(nb.StorageError, "posterior.save"):
            nb.load(path, model)
    save_file({"samples": torch.zeros(3, 45)}, path, {"nullbayes": "{not json"})
    with says(nb.StorageError, "cannot be read"):
        nb.load(path, model)


def rewrite(path: Path, **changes: Any) -> None:
    """Edit the description in a file; None takes an entry out of the settings."""
    with safe_open(str(path), framework="pt") as file:
        meta, samples = json.loads(file.metadata()["nullbayes"]), file.get_tensor("samples")
    for key, value in changes.items():
        where = meta if key in meta else meta["settings"]
        if value is None:
            del where[key]
        else:
            where[key] = value
    sign(path, meta, samples)


def sign(path: Path, meta: dict[str, Any], samples: Tensor) -> None:
    """Write a file whose checksum is right, whatever else is wrong with it."""
    tensors = {"samples": samples.contiguous()}
    save_file(tensors, path, posterior_file.signed(json.dumps(meta), tensors))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 99}, ("version 99", "Upgrade nullbayes")),
        ({"format": "else"}, ("'else'", "nullbayes-posterior")),
        ({"class": "MyPosterior"}, ("MyPosterior", "another version")),
        ({"certificate": None}, ("certificate", "another version")),
        ({"certificate": {"method": "x"}}, ("another version", "Fit and save it again")),
        ({"options": {"gamma": 1}}, ("gamma", "another version")),
        (
            {"likelihood": {"name": "nobody-knows"}},
            ("'nobody-knows'", "register_likelihood", "Import the module"),
        ),
        ({"likelihood": {"name": "regression", "colour": 1}}, ("regression", "colour")),
        (
            {"preserve": "nobody-knows"},
            ("'nobody-knows'", "register_preserve", "Import the module"),
        ),
    ],
    ids=str,
)
def test_settings_from_elsewhere(
    saved: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    rewrite(saved, **changes)
    with says(nb.StorageError, str(saved), *words):
        nb.load(saved, network(nn.BatchNorm1d(6)))


def test_samples_that_do_not_fit(saved: Path) -> None:
    with safe_open(str(saved), framework="pt") as file:
        meta, samples = json.loads(file.metadata()["nullbayes"]), file.get_tensor("samples")
    for wrong in (samples[:, :-1], samples[0], samples[:0]):
        sign(saved, meta, wrong)
        with says(nb.StorageError, str(saved), str(tuple(wrong.shape)), "save it again"):
            nb.load(saved, network(nn.BatchNorm1d(6)))
    samples[1, 3] = torch.nan
    sign(saved, meta, samples)
    with says(nb.StorageError, str(saved), "NaN", "save it again"):
        nb.load(saved, network(nn.BatchNorm1d(6)))


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    """Anyone can read it, and nothing in it is code."""
    raw = saved.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert set(header) == {"__metadata__", "samples"}
    assert header["samples"]["shape"] == [3, 57] and header["samples"]["dtype"] == "F32"
    meta = json.loads(header["__metadata__"]["nullbayes"])
    assert meta["format"] == "nullbayes-posterior" and meta["settings"]["certificate"]["held"] in (
        True,
        False,
    )
    assert set(meta["fingerprint"]) == set(network(nn.BatchNorm1d(6)).state_dict())


# -- nothing half-written ------------------------------------------------------------------------


def fail(error: type[BaseException]) -> Any:
    def run(*args: Any, **_: Any) -> None:
        if args and isinstance(args[0], dict):
            Path(args[1]).write_bytes(b"half a file")
        raise error("no space left on device")

    return run


@pytest.mark.parametrize("existing", [True, False], ids=["over", "new"])
@pytest.mark.parametrize("where", ["save_file", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError, storage.SafetensorError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, where: str, existing: bool
) -> None:
    posterior = nb.NullSpacePosterior(network()).fit(TRAIN, 3, **QUIET)
    target = tmp_path / "p.safetensors"
    if existing:
        posterior.save(target)
        posterior.prior_precision = 3.0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(*((storage, where) if where == "save_file" else (Path, where)), fail(error))
        with pytest.raises(nb.StorageError if error is not KeyboardInterrupt else error) as caught:
            posterior.save(target)
    if error is not KeyboardInterrupt:
        assert str(target) in str(caught.value) and "no space left" in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    posterior.save(target)
    assert nb.load(target, posterior.model).prior_precision == posterior.prior_precision


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    posterior = nb.NullSpacePosterior(network()).fit(TRAIN, 3, **QUIET)
    with says(nb.StorageError, "could not write", str(tmp_path)):
        posterior.save(tmp_path)  # a folder
    file = tmp_path / "file"
    file.write_text("in the way")
    with says(nb.StorageError, "could not write", str(file)):
        posterior.save(file / "p.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and file.read_text() == "in the way"


def test_permissions_are_the_usual_ones(saved: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    assert saved.stat().st_mode == ordinary.stat().st_mode


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


# -- what is not as it was written ---------------------------------------------------------------


def description(path: Path) -> tuple[dict[str, Any], Tensor, dict[str, str]]:
    with safe_open(str(path), framework="pt") as file:
        head = dict(file.metadata())
        return json.loads(head["nullbayes"]), file.get_tensor("samples"), head


def test_a_changed_number_or_word_is_noticed(saved: Path) -> None:
    meta, samples, head = description(saved)
    model = network(nn.BatchNorm1d(6))
    moved = samples.clone()
    moved[0, 0] += 1e-6
    save_file({"samples": moved}, saved, head)
    with says(nb.StorageError, str(saved), "checksum differs", "save it again"):
        nb.load(saved, model)
    meta["settings"]["certificate"]["residual"] = 1e-9
    save_file({"samples": samples}, saved, {**head, "nullbayes": json.dumps(meta)})
    with says(nb.StorageError, "checksum differs"):
        nb.load(saved, model)
    save_file({"samples": samples}, saved, {"nullbayes": head["nullbayes"]})
    with says(nb.StorageError, "checksum differs"):
        nb.load(saved, model)
    meta["version"] = 1  # those of version 0.1 have no checksum
    save_file({"samples": samples}, saved, {"nullbayes": json.dumps(meta)})
    assert nb.load(saved, model).num_samples == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["0.weight"]}, "do not go together"),
        ({"shapes": [[-1]]}, "'shapes'"),
        ({"dtype": "torch.int16"}, "'dtype'"),
        ({"dtype": "torch.int8"}, "expected 'samples' of torch.int8"),
        ({"fingerprint": [1]}, "'fingerprint'"),
        ({"settings": "x"}, "'settings'"),
        ({"seed": 2**70}, "'seed'"),
        ({"seed": True}, "'seed'"),
        ({"prior_precision": 0}, "'prior_precision'"),
        ({"prior_precision": 1e-320}, "'prior_precision'"),
        ({"prior": {"0.weight": -1.0}}, "'prior'"),
        ({"directions": 0}, "'directions'"),
        ({"options": {"delta": "x"}}, "'options'"),
        ({"likelihood": {}}, "'likelihood'"),
        ({"likelihood": {"name": "classification", "class_axis": "x"}}, "'likelihood'"),
        ({"likelihood": {"name": "classification", "seen_axes": {"x": 1}}}, "'likelihood'"),
        ({"likelihood": {"name": "classification", "seen_axes": {"2": 2}}}, "'likelihood'"),
        ({"likelihood": {"name": "regression", "noise_variance": ["x"]}}, "'likelihood'"),
        ({"calibration": {"chosen": "x"}}, "calibration: 'chosen'"),
        ({"certificate": {"residual": "x"}}, "certificate: 'residual'"),
        ({"certificate": {"stages": {"a": "x"}}}, "certificate: 'stages'"),
        ({"certificate": {"notes": [1]}}, "certificate: 'notes'"),
        ({"randomness": {"seed": "x"}}, "'randomness'"),
    ],
    ids=str,
)
def test_entries_that_cannot_be(saved: Path, changes: dict[str, Any], words: str) -> None:
    rewrite(saved, **changes)
    with says(nb.StorageError, str(saved), words):
        nb.load(saved, network(nn.BatchNorm1d(6)))


def test_descriptions_within_bounds(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, samples, _ = description(saved)
    tensors = {"samples": samples}
    text = json.dumps(meta)
    deep = text.replace('"seed": 0', f'"seed": {"[" * 5000}{"]" * 5000}')
    for changed, words in (
        (deep, "not JSON"),
        (text.replace('"seed": 0', f'"seed": {"[" * 40}{"]" * 40}'), "nested more than"),
        (text.replace('"seed": 0', '"seed": 0, "seed": 1'), "twice"),
        (text.replace('"seed": 0', f'"seed": 1{"0" * 5000}'), "not JSON"),
    ):
        assert changed != text
        save_file(tensors, saved, posterior_file.signed(changed, tensors))
        with says(nb.StorageError, "cannot be read", words):
            nb.load(saved, network(nn.BatchNorm1d(6)))
    save_file(tensors, saved, posterior_file.signed(text, tensors))
    for name, limit, words in (
        ("MAX_CHARACTERS", 100, "characters"),
        ("MAX_ENTRIES", 9, "entries"),
    ):
        with monkeypatch.context() as m:
            m.setattr(description_module, name, limit)
            with says(nb.StorageError, "cannot be read", words):
                nb.load(saved, network(nn.BatchNorm1d(6)))


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    posterior = nb.NullSpacePosterior(network()).fit(TRAIN, 3, **QUIET)
    with says(nb.StorageError, "could not write"):
        posterior.save(tmp_path / "a\0b")
    with pytest.raises(nb.StorageError):
        nb.load(tmp_path / "a\0b", posterior.model)
    assert not list(tmp_path.iterdir())
