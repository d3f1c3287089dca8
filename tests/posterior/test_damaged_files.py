"""Files that are damaged, changed, of others, or half-written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import QUIET, TRAIN, network, says
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.posterior import description as description_module
from nullbayes.posterior import posterior_file, storage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "posterior.safetensors"  # in a folder that does not exist yet


# -- other models --------------------------------------------------------------------------------


@pytest.fixture
def saved(path: Path) -> Path:
    nb.NullSpacePosterior(network(nn.BatchNorm1d(6))).fit(TRAIN, 3, **QUIET).save(path)
    return path


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
