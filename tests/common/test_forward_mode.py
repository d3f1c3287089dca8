"""Derivatives of several threads at the same time."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from nullbayes.common.forward_mode import jvp


def test_threads_do_not_delete_each_others_levels() -> None:
    """Without turns two of three derivatives fail, and of the rest some are wrong."""
    found: list[object] = []

    def differentiate(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        w, d, x = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64)
        wanted = (1 - (x[0] @ w[0]).tanh().square()) * (x[0] @ d)  # of tanh(x w) along each d

        def along(direction: Tensor) -> Tensor:
            made: Tensor = jvp(lambda w: (x[0] @ w).tanh(), (w[0],), (direction,))
            return made

        try:
            found.extend(float((torch.vmap(along)(d) - wanted).abs().max()) for _ in range(50))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=differentiate, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 150
    assert all(isinstance(off, float) and off < 1e-12 for off in found)
