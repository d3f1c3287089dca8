"""The same weights in another network: a posterior is of a function, and its certificate of no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.model.probe import Probe
from tests.support import says

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3
TRAIN = [(X[:10], Y[:10]), (X[10:], Y[10:])]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.o = nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)
        self.scale, self.calls = 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * self.o(self.act(self.a(x)))


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(x)))


def made(kind: type[nn.Module] = Net) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


POSTERIORS: dict[str, Callable[[nn.Module], Any]] = {
    "rows": lambda m: nb.NullSpacePosterior(m),
    "layers": lambda m: nb.LayerNullSpacePosterior(m),
}


def fitted(kind: str) -> tuple[Any, Any]:
    model = made()
    return model, POSTERIORS[kind](model).fit(TRAIN, 2, progress=False)


def rescaled(model: Any) -> Callable[[], None]:
    model.scale = 3.0
    return lambda: setattr(model, "scale", 1.0)


def exchanged(model: Any) -> Callable[[], None]:
    before, model.act = model.act, nn.ReLU()
    return lambda: setattr(model, "act", before)


def hooked(model: Any) -> Callable[[], None]:
    return model.a.register_forward_hook(lambda module, args, out: 2 * out).remove


def replaced(model: Any) -> Callable[[], None]:
    model.forward = lambda x: -Net.forward(model, x)
    return lambda: delattr(model, "forward")


@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("change", [rescaled, exchanged, hooked, replaced])
def test_another_function_of_the_same_weights_is_refused_until_it_is_restored(
    change: Callable[[Any], Callable[[], None]], kind: str
) -> None:
    model, posterior = fitted(kind)
    before = posterior.predict(X[:4]).mean
    restore = change(model)
    for ask in (posterior.predict, posterior.novelty):
        with says(nb.ModelError, "made-up inputs", "fit anew"):
            ask(X[:4])
    restore()
    torch.testing.assert_close(posterior.predict(X[:4]).mean, before)
    change(model)
    posterior.fit(TRAIN, 2, progress=False)  # around the new one
    posterior.predict(X[:4])


@pytest.mark.parametrize("kind", POSTERIORS)
def test_calls_of_the_users_and_another_precision_change_nothing(kind: str) -> None:
    model, posterior = fitted(kind)
    before = posterior.predict(X[:4]).mean
    model(X)  # counts
    torch.testing.assert_close(posterior.predict(X[:4]).mean, before)
    model.double()
    found = posterior.predict(X[:4].double()).mean
    torch.testing.assert_close(found.float(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_a_file_belongs_to_a_function(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, posterior = fitted(kind)
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    loaded = nb.load(path, made())
    assert loaded.certificate.held
    torch.testing.assert_close(loaded.predict(X[:4]).mean, posterior.predict(X[:4]).mean)
    with says(nb.StorageError, "does not belong to this network", "another version of its class"):
        nb.load(path, made(Other))
    loaded.save(path)  # again, from what was loaded
    with says(nb.StorageError, "does not belong to this network"):
        nb.load(path, made(Other))
    monkeypatch.setattr(Probe, "as_dict", lambda _: None)  # as files of earlier versions
    posterior.save(path)
    nb.load(path, made(Other))


class Structured(nn.Module):
    """Several inputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.o = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        kept = mask.unsqueeze(-1).to(self.table.weight)
        h = (self.table(ids) * kept).sum(1)
        return self.o(h if weight is None else h * weight)


def test_inputs_are_made_up_of_whatever_they_consist() -> None:
    model = made(Structured)
    ids = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids, "mask": ids > 1, "weight": torch.ones(6, 4)}
    posterior = nb.NullSpacePosterior(model)
    posterior.fit([(batch, torch.arange(6) % 3)], 2, progress=False)
    probe = posterior.functional.probe
    assert probe is not None and len(probe.outputs) == 3
    assert Probe.from_dict(probe.as_dict()) == probe
    assert probe.difference(posterior.functional) == 0
    with torch.no_grad():
        model.o.weight.mul_(-1)
    assert probe.difference(posterior.functional) > 0.1
    about = probe.inputs["dict"]["ids"]["tensor"]
    assert set(about) == {"shape", "dtype", "low", "high"}  # and no data


@pytest.mark.parametrize(
    "broken", [None, {}, {"inputs": 1, "outputs": 2}, {"inputs": {}, "outputs": [[1.0]]},
               {"inputs": {"tensor": {"shape": [10**9], "dtype": "float32", "mean": 0, "spread": 1}}, "outputs": [[1]]},
               {"inputs": {"tensor": {"shape": [2], "dtype": "nonsense"}}, "outputs": [[1.0], [2.0]]}]
)  # fmt: skip
def test_what_nobody_wrote_says_nothing(broken: Any) -> None:
    probe = Probe.from_dict(broken)
    functional = nb.NullSpacePosterior(made()).functional
    assert probe is None or probe.difference(functional) == 0
