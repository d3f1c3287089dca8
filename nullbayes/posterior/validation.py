"""Validation data as the posteriors' ``calibrate`` take them: checked, and a part for each process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nullbayes.common.processes import Processes
from nullbayes.model.data import as_loader, is_array
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.shares import shared
from nullbayes.posterior.calibration import Search, check_arguments


def checked(
    functional: FunctionalModel, val_loader: Any, ood_loader: Iterable[Any] | None, metric: str
) -> tuple[Any, Iterable[Any] | None]:
    """Both as loaders. Raises `InputError` for what cannot be used, or a ``metric`` that is not known."""
    dtype, free = functional.dtype, functional.layouts is not None
    if ood_loader is not None and is_array(ood_loader):
        ood_loader = as_loader(ood_loader, "ood_loader", dtype, labelled=False)
    check_arguments(metric, ood_loader)
    return as_loader(val_loader, "val_loader", dtype, labelled=not free, pieces=free), ood_loader


def search_of(
    loaders: tuple[Any, Iterable[Any] | None],
    metric: str,
    tune: str | None,
    progress: bool,
    processes: Processes | None,
) -> Search:
    """What is searched, on this process's part of the ``loaders`` of :func:`checked`."""
    val_loader, ood_loader = loaders
    if processes is not None:
        val_loader = shared(val_loader, processes, "val_loader")
        if ood_loader is not None:
            ood_loader = shared(ood_loader, processes, "ood_loader")
    shows = progress and (processes is None or processes.leads)
    return Search(val_loader, ood_loader, metric, tune, shows, processes)
