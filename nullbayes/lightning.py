"""A Lightning callback that fits a posterior when training ends, on what the module was trained on.

```python
from nullbayes.lightning import NullSpaceCallback

callback = NullSpaceCallback("classification")
Trainer(max_epochs=20, callbacks=[callback]).fit(module, data)
callback.posterior.predict(x)
```
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from nullbayes.certificate.certificate import Certificate
from nullbayes.common.arguments import check_count
from nullbayes.errors import InputError, MissingExtraError
from nullbayes.likelihood import Likelihood
from nullbayes.model.data import Batches, Split
from nullbayes.posterior.base import Posterior
from nullbayes.posterior.loading import load
from nullbayes.posterior.posterior import NullSpacePosterior

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities import rank_zero_info
else:
    try:
        # The same code under two names; a trainer of either calls the hooks of both.
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            from pytorch_lightning import Callback
            from pytorch_lightning.utilities import rank_zero_info
        else:
            from lightning.pytorch import Callback
            from lightning.pytorch.utilities import rank_zero_info
    except ImportError:
        try:
            from pytorch_lightning import Callback
            from pytorch_lightning.utilities import rank_zero_info
        except ImportError as error:
            raise MissingExtraError(
                "`nullbayes.lightning` needs Lightning: `pip install nullbayes[lightning]`."
            ) from error

Maker = Callable[[Any], Posterior]
FILE = "posterior.safetensors"
# Of a certificate: what a logger gets, as numbers.
LOGGED = (
    "held",
    "prior_precision",
    "residual",
    "drift",
    "network_score",
    "posterior_score",
    "prior_share",
    "examples",
    "num_samples",
    "seconds",
)


class NullSpaceCallback(Callback):  # type: ignore[misc]
    """Fits a posterior to the module as training leaves it, saves it beside the checkpoint, logs its certificate.

    All training examples count: the module's own training data are read in order, without shuffling and without
    dropping the last batch, whatever the loader does while it trains.

    Args:
        likelihood: as that of `nullbayes.NullSpacePosterior`; the module's ``forward`` returns what it explains.
        make: ``make(module) -> posterior``, not fitted: of one of its networks, with other options, or a
            `nullbayes.LaplacePosterior`. In place of ``likelihood``.
        targets, split: where a batch has its targets, as in `nullbayes.Batches`.
        calibrate: choose the prior precision on the validation data afterwards.
        num_samples, seed, max_examples: of ``fit``.
        path: the file; None: ``posterior.safetensors`` in the folder of the checkpoints. ``posterior.ckpt`` beside it
            has the weights that it belongs to, since the best checkpoint may be an earlier one.

    Attributes:
        posterior: the fitted posterior; None before. Where Lightning moved the module off its device after training, it
            is the one that was saved.
        certificate: its certificate; None before.

    Raises:
        InputError: arguments that do not fit together.
    """

    def __init__(
        self,
        likelihood: str | Likelihood | Callable[..., Any] | None = None,
        *,
        make: Maker | None = None,
        targets: str | None = None,
        split: Split | None = None,
        calibrate: bool = False,
        num_samples: int = 30,
        seed: int = 0,
        max_examples: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if make is not None and (likelihood is not None or not callable(make)):
            raise InputError(
                "`make` is a function from the module to a posterior, in place of `likelihood`; pass one of them."
            )
        Batches([], targets=targets, split=split)  # what it says of these two
        self.likelihood, self.make = likelihood or "classification", make
        self.targets, self.split, self.calibrate = targets, split, calibrate
        self.num_samples = check_count(num_samples, "num_samples")
        self.seed = check_count(seed, "seed", 0)
        self.max_examples = (
            None if max_examples is None else check_count(max_examples, "max_examples")
        )
        self.path = None if path is None else Path(path)
        self.posterior: Posterior | None = None
        self.certificate: Certificate | None = None
        self._file: Path | None = None

    # -- hooks of Lightning --------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """What cannot work is said before the training, not after it."""
        self._made(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit, save and log."""
        made = self._made(pl_module)
        data = self._data(trainer, trainer.train_dataloader, "train_dataloader")
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        try:
            made.fit(
                data,
                self.num_samples,
                self.seed,
                max_examples=self.max_examples,
                progress=False,
            )
            if self.calibrate:
                held_out = self._data(trainer, trainer.val_dataloaders, "val_dataloaders")
                made.calibrate(held_out, progress=False)
        finally:
            for module, training in modes.items():
                module.training = training
        self.posterior, self.certificate = made, made.certificate
        if not trainer.fast_dev_run:
            self._save(trainer, made)
        self._log(trainer, made.certificate)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The module may be on another device now than it was trained on, and fitted on."""
        made, file = self.posterior, self._file
        self._file = None
        if made is None or file is None or not trainer.is_global_zero:
            return
        if any(p.device != made.space.device for p in made.model.parameters()):
            found = load(
                file, made.model, likelihood=made.likelihood, forward=made.functional.user_forward
            )
            assert isinstance(found, Posterior)
            self.posterior = found

    # -- how -------------------------------------------------------------------------------------------

    def _made(self, module: nn.Module) -> Posterior:
        if self.make is None:
            return NullSpacePosterior(module, self.likelihood)
        made = self.make(module)
        if not isinstance(made, Posterior):
            raise InputError(
                f"`make` returned {type(made).__name__}; expected a posterior, such as `nb.NullSpacePosterior(module)`."
            )
        return made

    def _data(self, trainer: Any, loader: Any, name: str) -> Any:
        """All examples of a loader of the trainer, once and in order; a few batches of them in a trial run."""
        if isinstance(loader, list) and len(loader) == 1:
            loader = loader[0]
        if loader is None:
            raise InputError(f"`calibrate=True`, but the trainer has no `{name}`.")
        if isinstance(loader, (list, tuple, Mapping)) or not isinstance(loader, Iterable):
            raise InputError(
                f"`trainer.{name}` is {type(loader).__name__}; a posterior is fitted on one loader. Leave the callback "
                "out, and call `nb.NullSpacePosterior(module).fit(loader)` after the training."
            )
        batches: Any = whole(loader)
        if trainer.fast_dev_run:
            batches = list(itertools.islice(batches, int(trainer.fast_dev_run)))
        if self.targets is None and self.split is None:
            return batches
        return Batches(batches, targets=self.targets, split=self.split)

    def _save(self, trainer: Any, made: Posterior) -> None:
        path = self.path
        if path is None:
            keeper = trainer.checkpoint_callback
            folder = getattr(keeper, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
            path = Path(folder) / FILE
        trainer.save_checkpoint(path.with_suffix(".ckpt"), weights_only=True)
        if trainer.is_global_zero:
            made.save(path)
        self._file = path

    def _log(self, trainer: Any, certificate: Certificate) -> None:
        rank_zero_info(f"nullbayes: {certificate.verdict}")
        found = {name: float(getattr(certificate, name)) for name in LOGGED}
        for logger in trainer.loggers:
            logger.log_metrics({f"nullbayes/{k}": v for k, v in found.items()}, trainer.global_step)
            logger.save()


def whole(loader: Any) -> Any:
    """``loader`` over all its examples in order; as it is, where its sampler says which examples there are."""
    sampler = getattr(loader, "sampler", None)
    every = isinstance(sampler, (SequentialSampler, DistributedSampler)) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    if type(loader) is not DataLoader or not every or loader.batch_size is None:
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )
