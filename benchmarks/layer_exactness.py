"""The exact null space by layer kind: one small network for each rule, weights moved as far as they are large.

The networks are those of the tests (``tests/moments/layer_kinds.py``); outputs are those of the module itself, called
with the moved weights by `torch.func.functional_call`.
"""

from __future__ import annotations

from typing import Any

import torch

from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.moments.factor import Edge, factorise
from nullbayes.moments.verify import seen_by, verified_blocks
from tests.moments.layer_kinds import KINDS, Kind

DTYPES = (torch.float64, torch.float32)


def moved(kind: Kind, dtype: torch.dtype) -> tuple[float, float]:
    """Relative change of the weights that have a free direction, and the largest one of an output."""
    model, inputs = kind.make(dtype)
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    blocks = verified_blocks(functional, inputs)
    sums, _ = seen_by(functional, blocks, inputs)
    trained = functional.weights()
    weights, change, size = dict(trained), 0.0, 0.0
    generator = torch.Generator().manual_seed(7)
    for block, moments in zip(blocks.blocks, sums, strict=True):
        factor = factorise(moments, Edge.of(moments, 0.0), block.columns)
        z = torch.randn(block.size, generator=generator, dtype=torch.float64)
        scale = block.matrix({n: trained[n] for n in block.names}).double().square().mean().sqrt()
        for name, value in block.tensors((scale * factor.spread(z)).to(dtype)).items():
            weights[name] = trained[name] + value
            if block.name in kind.free:
                change += float((weights[name] - trained[name]).double().square().sum())
                size += float(trained[name].double().square().sum())
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        before = model(*args)
        after = torch.func.functional_call(model, weights, args)
    off = float((after - before).abs().max() / before.abs().max())
    return (change / size) ** 0.5, off


def by_kind() -> list[dict[str, Any]]:
    """One row a kind."""
    rows = []
    for kind in KINDS:
        row: dict[str, Any] = {"kind": kind.name, "free": len(kind.free)}
        for dtype in DTYPES:
            weights, outputs = moved(kind, dtype)
            name = str(dtype).removeprefix("torch.")
            row |= {f"weights {name}": weights, f"outputs {name}": outputs}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of markdown."""
    lines = [
        "",
        "By layer kind, one small network for each rule: weights of all blocks moved in the null space at once, by "
        "about as much as they are large. The change of the weights is that of the blocks which have free directions; "
        "that of the outputs is the largest of any, relative to the largest output.",
        "",
        "| kind | weights change | outputs, float64 | outputs, float32 |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {r['kind']} | {100 * r['weights float64']:.0f} % | {r['outputs float64']:.1e} | "
        f"{r['outputs float32']:.1e} |"
        for r in rows
    ]


if __name__ == "__main__":
    print("\n".join(table(by_kind())))
