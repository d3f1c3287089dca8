"""Data-parallel wrappers: posteriors of what they wrap, under its own names."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import QUIET, TRAIN, X, network, says
from torch import distributed, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.model.parameters import ParameterSpace
from nullbayes.posterior.posterior_file import signed

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Any] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled inside": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_samples_and_files_are_those_of_the_plain_network(
    wrapper: str, tmp_path: Path
) -> None:
    plain = network()
    wrapped = WRAPPERS[wrapper](network())
    wanted = nb.NullSpacePosterior(plain).fit(TRAIN, 3, **QUIET)
    found = nb.NullSpacePosterior(wrapped).fit(TRAIN, 3, **QUIET)
    assert found.space.names == NAMES
    assert torch.equal(found.predict(X + 1).outputs, wanted.predict(X + 1).outputs)
    plain.load_state_dict(next(found.sample()))  # strictly
    file = tmp_path / "p.safetensors"
    found.save(file)
    for model in (network(), wrapped, WRAPPERS[wrapper](network())):
        loaded: Any = nb.load(file, model)
        assert_close(loaded.predict(X).outputs, found.predict(X).outputs)
    layers = nb.LayerNullSpacePosterior(wrapped).fit(TRAIN, **QUIET)
    assert layers.space.names == NAMES


def test_names_with_the_prefix_are_understood() -> None:
    wrapped = nn.DataParallel(network())
    posterior = nb.LaplacePosterior(wrapped, parameters=["module.2.weight", "2.bias"])
    assert posterior.space.names == ("2.weight", "2.bias")
    with says(nb.InputError, "3.weight", "2.weight"):
        nb.LaplacePosterior(wrapped, parameters=["module.3.weight"])


@pytest.mark.parametrize("prior", ["evidence", dict.fromkeys(NAMES, 2.0)])
def test_files_that_have_the_prefix(prior: Any, tmp_path: Path) -> None:
    """As version 0.1 wrote them, around a wrapper."""
    posterior = nb.NullSpacePosterior(network(), prior_precision=prior).fit(TRAIN, 3, **QUIET)
    file = tmp_path / "p.safetensors"
    posterior.save(file)
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()["nullbayes"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    meta["names"] = [f"module.{n}" for n in meta["names"]]
    meta["fingerprint"] = {f"module.{n}": v for n, v in meta["fingerprint"].items()}
    if prior != "evidence":
        named = meta["settings"]["prior"]
        meta["settings"]["prior"] = {f"module.{n}": v for n, v in named.items()}
    save_file(tensors, file, metadata=signed(json.dumps(meta), tensors))
    for model in (network(), nn.DataParallel(network())):
        loaded: Any = nb.load(file, model)
        assert loaded.space.names == NAMES
        assert_close(loaded.predict(X).outputs, posterior.predict(X).outputs)


def test_models_without_values_are_refused() -> None:
    empty = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).eval()
    empty[0].to("meta")
    for make in (nb.NullSpacePosterior, nb.LaplacePosterior, nb.LayerNullSpacePosterior):
        with says(nb.ModelError, "0.weight", "meta device", "assign=True"):
            make(empty)
        with says(nb.ModelError, "0.weight", "meta device"):
            make(empty, parameters=["2.weight"])


def test_devices_without_float64_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.zeros

    def single(*sizes: Any, **options: Any) -> Any:
        if options.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return real(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", single)
    weights = {"weight": torch.ones(2, device="meta")}
    with says(nb.ModelError, "'meta'", "no float64", "model.to('cpu')"):
        ParameterSpace(weights)


def test_posteriors_are_not_copied_and_say_what_to_do() -> None:
    layers = nb.LayerNullSpacePosterior(network())
    for posterior in (nb.NullSpacePosterior(network()), layers):
        for copied in (copy.deepcopy, pickle.dumps):
            with says(nb.InputError, type(posterior).__name__, "nb.load(path, model)"):
                copied(posterior)
        assert copy.copy(posterior).model is posterior.model
