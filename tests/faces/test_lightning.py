"""The Lightning callback inside the real trainer, against posteriors fitted by hand."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import QUIET, X, Y, says
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb

lightning = pytest.importorskip("lightning.pytorch")

from nullbayes.lightning import NullSpaceCallback, whole  # noqa: E402

# Of Lightning: few workers, few logged steps; and what it uses of a newer torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*")


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Points(lightning.LightningDataModule):  # type: ignore[misc, name-defined]
    def setup(self, stage: str) -> None:
        self.data = TensorDataset(X, Y)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, 2, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X + 0.1, Y), 4)

    def test_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X + 0.2, Y), 4)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return lightning.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            **options,
        }
    )


def test_a_posterior_of_the_trained_module_beside_its_checkpoint(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    module, callback = Classifier(), NullSpaceCallback("classification", num_samples=5, seed=3)
    assert callback.posterior is None and callback.certificate is None
    logger = CSVLogger(tmp_path / "logs")
    trainer(tmp_path, callback, logger=logger).fit(module, Points())
    found = callback.posterior
    assert found is not None and found.model is module and module.training
    module.eval()
    wanted = nb.NullSpacePosterior(module).fit([(X, Y)], 5, 3, **QUIET)
    assert_close(found.predict(X + 1).mean, wanted.predict(X + 1).mean, rtol=1e-3, atol=1e-4)
    assert callback.certificate is found.certificate and found.certificate.held
    assert found.certificate.examples == len(X)  # whatever the loader drops
    # beside the checkpoint, with the weights that it belongs to
    (file,) = tmp_path.rglob("posterior.safetensors")
    assert list(file.parent.glob("epoch=*.ckpt"))
    again = Classifier.load_from_checkpoint(file.with_suffix(".ckpt")).eval()
    loaded = nb.load(file, again)
    assert_close(loaded.predict(X).mean, found.predict(X).mean)
    # the certificate is in the log
    (log,) = (tmp_path / "logs").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row.get("nullbayes/held")]
    assert float(rows[0]["nullbayes/held"]) == 1.0
    assert float(rows[0]["nullbayes/prior_precision"]) == pytest.approx(found.prior_precision)


def test_options_of_the_posterior_and_calibration(tmp_path: Path) -> None:
    file = tmp_path / "mine" / "p.safetensors"
    callback = NullSpaceCallback(
        make=lambda module: nb.LaplacePosterior(module.net, parameters="last-layer"),
        calibrate=True,
        num_samples=4,
        path=file,
    )
    module = Classifier()
    trainer(tmp_path, callback, enable_checkpointing=False).fit(module, Points())
    found = callback.posterior
    assert isinstance(found, nb.LaplacePosterior) and found.model is module.net
    assert found.space.names == ("3.weight", "3.bias")
    assert found.calibration is not None and found.calibration.examples == len(X)
    assert file.exists() and file.with_suffix(".ckpt").exists()


def test_labels_elsewhere(tmp_path: Path) -> None:
    class Named(Classifier):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self(batch["x"]), batch["label_ids"])

    records = [{"x": x, "label_ids": y} for x, y in zip(X, Y, strict=True)]
    for options in (
        {"targets": "label_ids"},
        {"split": lambda b: (b["x"], b["label_ids"])},
    ):
        module, callback = Named(), NullSpaceCallback(num_samples=3, **options)
        loader = DataLoader(records, 3)  # type: ignore[arg-type]
        trainer(tmp_path, callback, max_epochs=1).fit(module, loader)
        assert callback.posterior is not None
        module.eval()
        wanted = nb.NullSpacePosterior(module).fit([(X, Y)], 3, **QUIET)
        found = callback.posterior.predict(X).outputs
        assert_close(found, wanted.predict(X).outputs, rtol=1e-3, atol=1e-4)


def test_a_module_that_was_moved_after_training(tmp_path: Path) -> None:
    """As Lightning moves it off an accelerator: the posterior is read from its file, around where the module is now."""
    model = Classifier().eval()
    posterior = nb.NullSpacePosterior(model).fit([(X, Y)], 3, **QUIET)
    callback = NullSpaceCallback()
    callback.posterior, callback._file = posterior, tmp_path / "p.safetensors"
    posterior.save(callback._file)
    callback.on_fit_end(SimpleNamespace(is_global_zero=True), model)
    assert callback.posterior is posterior
    wanted, callback._file = posterior.predict(X).outputs, tmp_path / "p.safetensors"
    posterior.space.device = torch.device("meta")  # where the fit was
    callback.on_fit_end(SimpleNamespace(is_global_zero=True), model)
    assert callback.posterior is not posterior
    assert_close(callback.posterior.predict(X).outputs, wanted)


PARALLEL = """
import lightning.pytorch, test_lightning as t
from nullbayes.lightning import NullSpaceCallback

if __name__ == "__main__":
    callback = NullSpaceCallback(num_samples=3, path="p.safetensors")
    run = t.trainer(".", callback, max_epochs=1, devices=2, strategy="ddp_fork", enable_checkpointing=False)
    run.fit(t.Classifier(), t.DataLoader(t.TensorDataset(t.X, t.Y), 2, shuffle=True))
"""


def test_two_processes_fit_one_posterior(tmp_path: Path) -> None:
    tests, root = Path(__file__).parents[1], Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (tests / "faces", tests, root)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", PARALLEL], cwd=tmp_path, env=environment, check=True, timeout=300
    )
    module = Classifier.load_from_checkpoint(tmp_path / "p.ckpt").eval()
    found: Any = nb.load(tmp_path / "p.safetensors", module)
    assert found.certificate.examples == len(X)  # each once, whichever process had it
    wanted = nb.NullSpacePosterior(module).fit((X, Y), 3, **QUIET)
    assert_close(found.predict(X + 1).outputs, wanted.predict(X + 1).outputs, rtol=1e-3, atol=1e-3)


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    callback = NullSpaceCallback(num_samples=3)
    trainer(tmp_path, callback, fast_dev_run=True).fit(Classifier(), Points())
    assert callback.certificate is not None and callback.certificate.examples == 2
    assert not list(tmp_path.rglob("posterior*"))


def test_the_other_name_of_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):  # type: ignore[misc, name-defined]
        __init__ = Classifier.__init__
        forward, training_step = Classifier.forward, Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    def init(self: Any) -> None:
        other.LightningModule.__init__(self)
        self.net = Classifier().net

    Module.__init__ = init  # type: ignore[method-assign]
    callback = NullSpaceCallback(num_samples=3)
    run = other.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[callback],
        enable_progress_bar=False,
        logger=False,
    )
    run.fit(Module(), DataLoader(TensorDataset(X, Y), 3))
    assert callback.certificate is not None and callback.certificate.held


def test_data_modules_are_data() -> None:
    module = Classifier().eval()
    posterior = nb.NullSpacePosterior(module).fit(Points(), 3, **QUIET)
    assert posterior.certificate.examples == 6  # of seven, in batches of two
    assert posterior.predict(Points()).mean.shape == (7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        assert posterior.calibrate(Points(), progress=False).examples == 7


def test_which_loaders_are_read_whole() -> None:
    data = TensorDataset(X, Y)
    shuffled = DataLoader(data, 2, shuffle=True, drop_last=True)
    assert torch.equal(torch.cat([x for x, _ in whole(shuffled)]), X)
    shard = torch.utils.data.DistributedSampler(data, 2, 1)
    assert torch.equal(torch.cat([x for x, _ in whole(DataLoader(data, 2, sampler=shard))]), X)
    for loader in (
        DataLoader(data, 2, sampler=torch.utils.data.SubsetRandomSampler([0, 3])),
        DataLoader(data, 2, sampler=torch.utils.data.RandomSampler(data, num_samples=3)),
        [(X, Y)],
    ):
        assert whole(loader) is loader


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with says(nb.InputError, "`make`", "`likelihood`"):
        NullSpaceCallback("regression", make=nb.NullSpacePosterior)
    with says(nb.InputError, "`split`", "`targets`"):
        NullSpaceCallback(split=lambda b: b, targets="y")
    with says(nb.InputError, "`num_samples`"):
        NullSpaceCallback(num_samples=0)
    module = Classifier()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    for callback, words in (
        (NullSpaceCallback("classifcation"), ("classifcation",)),
        (NullSpaceCallback(make=lambda m: m), ("`make` returned", "Classifier")),
    ):
        with says(nb.InputError, *words):  # before anything is trained
            trainer(tmp_path, callback).fit(module, Points())
        assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    two = [DataLoader(TensorDataset(X, Y), 3)] * 2

    class Two(Classifier):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self(batch[0][0]), batch[0][1])

    module = Two()
    with says(nb.InputError, "`trainer.train_dataloader`", "one loader"):
        trainer(tmp_path, NullSpaceCallback(), max_epochs=1).fit(module, two)
    assert module.training
    with says(nb.InputError, "`calibrate=True`", "val_dataloaders"):
        trainer(tmp_path, NullSpaceCallback(calibrate=True), max_epochs=1).fit(
            Classifier(), DataLoader(TensorDataset(X, Y), 3)
        )


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "nullbayes.lightning")
    with says(nb.MissingExtraError, "nullbayes[lightning]"):
        importlib.import_module("nullbayes.lightning")
