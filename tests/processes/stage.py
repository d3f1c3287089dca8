"""The network, the data and what is compared, of the scenes of several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb

BATCH = 4


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
        return nn.Sequential(*layers).to(dtype).eval()


def data(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(0, 3, (count,), generator=generator),
    )


def loader(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(count, dtype, seed)), batch_size=BATCH)


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    x, y = data(count, seed=seed)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def fitted(posterior: Any, train: Any, samples: int = 4, **kwargs: Any) -> dict[str, Any]:
    """What a fit leaves; nothing in it depends on how many processes there are."""
    # Fewer audited than there are: by which numbers they are chosen is the same, too.
    posterior.fit(train, samples, progress=False, audit=5, **kwargs)
    return certified(posterior)


def certified(posterior: Any) -> dict[str, Any]:
    """Samples and certificate."""
    c = posterior.certificate
    names = "residual row_drift drift output_drift sampled_drift left_out_divergence prior_share prior_precision"
    counts = "rank examples checked_examples constraints held network_score posterior_score"
    audit = (c.audit.examples, c.audit.total, c.audit.passed, round(c.audit.moved, 7))
    return {
        "unit": posterior._fitted().unit.clone(),
        **{name: getattr(c, name) for name in names.split()},
        **{name: getattr(c, name) for name in counts.split()},
        "audit": audit,
        "residual": max(c.residual, 1e-9),  # what is left of it is rounding
    }


def posterior(model: nn.Module | None = None, **options: Any) -> nb.NullSpacePosterior:
    """By the dual Cholesky factor, around the network or another one."""
    return nb.NullSpacePosterior(model or network(), solver="dual Cholesky", **options)


def told(call: Callable[[], Any]) -> tuple[str, str]:
    """The error that a call ends with."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""
