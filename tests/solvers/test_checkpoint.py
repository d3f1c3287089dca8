"""Checkpoints: what cannot be written is a warning, what is damaged or of another fit is refused."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import nullbayes as nb
from nullbayes.solvers import checkpoint
from nullbayes.solvers.checkpoint import Watch

STATE = {
    "x": torch.randn(3, 20),
    "done": torch.tensor(7),
    "active": torch.tensor([True, False, True]),
}


def watch(path: Any, identity: str = "weights", **options: Any) -> Watch:
    out = Watch(path=path, problem="the problem", **options)
    out.identity = identity
    return out


def head_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def same(found: dict[str, Tensor] | None) -> bool:
    return found is not None and all(torch.equal(found[k], v) for k, v in STATE.items())


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "fit.ckpt"
    watch(path).offer(STATE, now=True)
    assert same(watch(path).resume()) and [p.name for p in path.parent.iterdir()] == ["fit.ckpt"]
    watch(path).finish()
    assert not list(path.parent.iterdir()) and watch(path).resume() is None


@pytest.mark.parametrize("where", ["a\0b", "file/fit.ckpt", "folder"])
def test_places_that_cannot_be_written_are_a_warning_once(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    w = watch(tmp_path / where)
    if where != "folder":
        assert w.resume() is None
    with pytest.warns(nb.NullBayesWarning, match=r"could not be written.*goes on"):
        w.offer(STATE, now=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w.offer(STATE, now=True)
        w.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fit.ckpt"
    w = watch(path)
    w.offer(STATE, now=True)
    before = path.read_bytes()

    def full(tensors: object, part: Path, head: object) -> None:
        part.write_bytes(b"half")
        raise checkpoint.SafetensorError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_file", full)
        with pytest.warns(nb.NullBayesWarning, match="no space left"):
            w.offer({**STATE, "x": STATE["x"] + 1}, now=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["fit.ckpt"]  # noqa: PTH208
    w.offer({**STATE, "x": STATE["x"] + 1}, now=True)  # there is space again
    assert path.read_bytes() != before


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    watch(path).offer(STATE, now=True)
    whole, tensors, head = path.read_bytes(), load_file(path), head_of(path)
    damaged = [whole[:-1], whole[:40], b"", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(nb.StorageError, match=r"cannot be read.*remove it"):
            watch(path).resume()
    for other in (
        {**head, "problem": "x"},
        {**head, "identity": ""},
        {**head, "checksum": "0" * 64},
    ):
        save_file(tensors, path, other)
        with pytest.raises(nb.StorageError, match="not what was written"):
            watch(path).resume()
    save_file(tensors, path, {**head, "format": "nullbayes-checkpoint-99"})
    with pytest.raises(nb.StorageError, match=r"this version.*checkpoint-99"):
        watch(path).resume()
    lacking = {k: v for k, v in STATE.items() if k != "active"}
    watch(path).offer(lacking, now=True)
    with pytest.raises(nb.StorageError, match="cannot be read"):
        watch(path).resume()


def test_of_another_problem_or_network(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    watch(path).offer(STATE, now=True)
    with pytest.raises(nb.StorageError, match="another fit"):
        watch(path, identity="other weights").resume()
    with pytest.raises(nb.StorageError, match="another fit"):
        Watch(path=path, problem="another").resume()
    after = Watch(path=path, problem="what comes next", before="the problem")
    assert after.resume() is None


def test_one_of_version_0_1_has_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    old = {"format": "nullbayes-checkpoint-1", "problem": "the problem"}
    save_file(STATE, path, old)
    assert same(watch(path).resume())
    save_file({**STATE, "x": STATE["x"] / 0}, path, old)
    with pytest.raises(nb.StorageError, match="cannot be read"):
        watch(path).resume()


@pytest.mark.parametrize("delta", [0.0, 1e-4])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_fit_goes_on_from_each_of_its_checkpoints(
    delta: float, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a solver that carries nothing else: what it first measured has to be in the file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)
        ).double()
        batches = [(torch.randn(30, 5).double(), torch.randint(0, 3, (30,)))]

    def fit(path: Path | None) -> Tensor:
        solver = nb.solvers.ConjugateGradient(1e-8, 500, equilibrate=scale)
        posterior = nb.NullSpacePosterior(
            model.eval(), delta=delta, solver=solver, prior_precision=1.0
        )
        posterior.fit(batches, 4, progress=False, checkpoint=path, checkpoint_every=1e-9)
        return torch.stack(
            [torch.cat([t.flatten() for t in s.values()]) for s in posterior.sample()]
        )

    wanted, kept = fit(None), []
    offer = Watch.offer

    def keeping(self: Watch, state: dict[str, Tensor], *, now: bool = False) -> None:
        offer(self, state, now=now)
        kept.append(path.read_bytes())

    path = tmp_path / "fit.ckpt"
    with monkeypatch.context() as m:
        m.setattr(Watch, "offer", keeping)
        fit(path)
    assert len(kept) >= 3
    for data in kept[:: max(1, len(kept) // 5)]:
        path.write_bytes(data)
        torch.testing.assert_close(fit(path), wanted, rtol=1e-5, atol=1e-5)
        assert not path.exists()
