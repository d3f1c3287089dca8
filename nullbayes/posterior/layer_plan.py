"""What a layer posterior would cost, from the first batch of its data."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nullbayes.common.memory import format_bytes
from nullbayes.model.batch import batch_size
from nullbayes.model.functional import FunctionalModel
from nullbayes.moments.gather import drawn, first_batch, unlabelled
from nullbayes.moments.verify import seen_by, verified_blocks
from nullbayes.posterior.layer_fit import sketch_ranks


@dataclass(frozen=True)
class LayerPlan:
    """The cost of a fit. ``print`` it.

    Attributes:
        forward_seconds, pass_seconds: of one example: the network alone, and with the moments of its layers' inputs.
        memory: bytes of second moments and their factors, whatever the number of examples.
        layers: name of each block's weight -> ``(G, O, I)``.
        sketched: name -> rank of the sketch that stands for its second moments.
        fixed: parameters that would stay fixed, with the reason.
    """

    forward_seconds: float
    pass_seconds: float
    memory: int
    layers: dict[str, tuple[int, int, int]]
    sketched: dict[str, int]
    fixed: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether the memory is enough: it always is, since layers that are too wide for it are sketched."""
        return True

    def seconds(self, examples: int) -> float:
        """Of the pass over ``examples``; factorisations and the certificate come on top."""
        return examples * self.pass_seconds

    def as_dict(self) -> dict[str, Any]:
        """All fields; JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"One pass, {self.pass_seconds * 1e3:.2g} ms an example (the network alone: "
            f"{self.forward_seconds * 1e3:.2g} ms), {format_bytes(self.memory)} for any number of examples.",
            f"{len(self.layers)} blocks of weights take part"
            + (f", {len(self.sketched)} of them sketched" if self.sketched else "")
            + f"; {len(self.fixed)} parameters stay fixed.",
        ]
        return "\n".join(lines + [f"{name}: fixed, {why}" for name, why in self.fixed.items()])


def plan_layers(
    functional: FunctionalModel, train: Any, budget: int, products: torch.dtype
) -> LayerPlan:
    """Prove the rules on the first batch of ``train`` and time a pass over it, with products of that dtype."""
    inputs, _ = first_batch(drawn(functional, unlabelled(train, functional.device, "train")))
    functional.outputs(inputs, "train, batch 0")
    found = verified_blocks(functional, inputs)
    start = time.perf_counter()
    functional.outputs(inputs)
    middle = time.perf_counter()
    sums, _ = seen_by(functional, found, inputs, dtype=products)
    end = time.perf_counter()
    size = batch_size(inputs)
    ranks = sketch_ranks(found.blocks, budget)
    names = [block.name for block in found.blocks]
    return LayerPlan(
        forward_seconds=(middle - start) / size,
        pass_seconds=(end - middle) / size,
        memory=3 * sum(s.nbytes for s in sums),
        layers={block.name: block.size for block in found.blocks},
        sketched={n: rank for n, rank in zip(names, ranks, strict=True) if rank is not None},
        fixed=found.fixed,
    )
