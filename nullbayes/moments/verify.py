"""Does every use of a weight pass through a rule, and is each rule right? Asked of the network, not of the rules.

1. Every use. The weights of all blocks are replaced by others, while each module with a rule is made to give what it
   gives with the old ones. If an output of the network moves, some weight is used elsewhere: in a function call, by
   a module that has no rule, by a fused operation that calls no module.
2. Every rule. Weights move by as much as they have, in the exact null space of a few examples' inputs. If an output
   for these examples moves, some rule does not see all that its weight multiplies.

Either way the blocks are then tried one by one; the parameters of those that fail are fixed and named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nullbayes.errors import ModelError
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.precision import Watch
from nullbayes.moments.blocks import Block, Blocks, Site, find_blocks
from nullbayes.moments.capture import TransformedCall, plain_paths, recording, restored
from nullbayes.moments.collector import Collector
from nullbayes.moments.factor import Edge, Factor, LowRankFactor, factorise
from nullbayes.moments.second import BlockMoments, DenseMoments
from nullbayes.moments.sketch import Sketch

OTHER_USE = "it is used outside of the layers that have a rule"
WRONG_RULE = "outputs move although the inputs that its rule names would allow it"
# Largest change of an output, relative to the largest output, that rounding explains.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
HALF_TOLERANCE = 0.1
EXAMPLES = 3
# Columns from which on the proof takes the span of its few inputs instead of their second moments.
WIDE = 256


def verified_blocks(
    functional: FunctionalModel, inputs: Inputs, where: str = "the inputs"
) -> Blocks:
    """The blocks of the model whose weights pass both proofs on the first few of ``inputs``.

    Raises `ModelError` where outputs move and no single block can be blamed, `NonFiniteError` where a layer's inputs
    are not finite.
    """
    few = take(inputs, 0, min(EXAMPLES, batch_size(inputs)))
    blocks = find_blocks(functional.model, functional.space)
    while True:
        try:
            seen_by(functional, blocks, few, where, ranks=proof_ranks(blocks.blocks))
            break
        except TransformedCall as call:
            places = blocks.sites[call.site].places.values()
            names = {n for i, _ in places for n in blocks.blocks[i].names}
            fixed = blocks.fixed | dict.fromkeys(names, call.reason)
            blocks = find_blocks(functional.model, functional.space, fixed)
    for change_of, reason in ((other_uses, OTHER_USE), (_null_space, WRONG_RULE)):
        with torch.no_grad():
            change = change_of(functional, blocks, few)
            if not change(range(len(blocks.blocks))):
                continue
            bad = _failing(change, list(range(len(blocks.blocks))))
        fixed = {n: reason for i in bad for n in blocks.blocks[i].names}
        blocks = find_blocks(functional.model, functional.space, blocks.fixed | fixed)
        with torch.no_grad():
            again = change_of(functional, blocks, few)(range(len(blocks.blocks)))
        if again or not bad:
            raise ModelError(
                f"outputs of the first examples move although no layer's input should let them ({reason}), and "
                "no single weight is to blame. Does the model keep state between calls, or draw random numbers? "
                "Narrow `parameters=` to layers that are called as modules."
            )
    return blocks


Moves = Callable[[range | list[int]], bool]


def _failing(change: Moves, among: list[int]) -> list[int]:
    """Which blocks move outputs by themselves: by halves, since most of them do not."""
    if len(among) == 1:
        return among
    middle = len(among) // 2
    halves = (among[:middle], among[middle:])
    return [i for half in halves if half and change(half) for i in _failing(change, half)]


def other_uses(functional: FunctionalModel, blocks: Blocks, few: Inputs) -> Moves:
    """Whether outputs for ``few`` move by other weights of some blocks, while layers give what they do with these."""
    weights = functional.weights()
    sites = blocks.sites
    originals = [{local: _local(site, local).detach() for local in site.claimed} for site in sites]
    # The same road as below, so that rounding is the same.
    with restored(sites, originals):
        point = functional(weights, few)
    allowed = _allowed(functional, few)

    def moves(which: range | list[int]) -> bool:
        changed = dict(weights)
        for i in which:
            for name in blocks.blocks[i].names:
                changed[name] = weights[name] + _like(weights[name], i)
        with restored(sites, originals):
            return _moved(point, functional(changed, few), allowed)

    return moves


def _null_space(functional: FunctionalModel, blocks: Blocks, few: Inputs) -> Moves:
    weights = functional.weights()
    sums, point = seen_by(functional, blocks, few, ranks=proof_ranks(blocks.blocks))
    allowed = _allowed(functional, few)
    changes: list[Mapping[str, Tensor]] = []
    for i, (block, moments) in enumerate(zip(blocks.blocks, sums, strict=True)):
        factor = _beside(moments, block.columns)
        change = factor.spread(_drawn(block, weights, i))
        changes.append(block.tensors(change.to(functional.dtype)))

    def moves(which: range | list[int]) -> bool:
        changed = dict(weights)
        for i in which:
            for name, value in changes[i].items():
                changed[name] = weights[name] + value
        with plain_paths():
            other = functional(changed, few)
            if not _moved(point, other, allowed):
                return False
            # Outputs may be nothing (of weights that are zero): rounding is that of changes outside of the null space.
            for i in which:
                block = blocks.blocks[i]
                free = block.tensors(_drawn(block, weights, i).to(functional.dtype))
                changed |= {name: weights[name] + value for name, value in free.items()}
            usual = functional(changed, few)
        size = torch.maximum(point.abs().amax(), (usual - point).abs().amax())
        return not bool((other - point).abs().amax() <= allowed * size)

    return moves


def _drawn(block: Block, weights: Mapping[str, Tensor], seed: int) -> Tensor:
    """Random numbers ``(G, O, I)`` as large as the weights."""
    z = torch.empty(block.size, dtype=torch.float64).normal_(
        generator=torch.Generator().manual_seed(seed)
    )
    scale = _size(block.matrix({n: weights[n] for n in block.names}))
    return scale * z.to(weights[block.names[0]].device)


def seen_by(
    functional: FunctionalModel,
    blocks: Blocks,
    inputs: Inputs,
    where: str = "the inputs",
    dtype: torch.dtype = torch.float64,
    ranks: list[int | None] | None = None,
) -> tuple[list[BlockMoments], Tensor]:
    """The sums of one batch of inputs, and the outputs ``(B, *out)``.

    Raises `NonFiniteError` where a layer's inputs are not finite.

    Args:
        dtype: of products.
        ranks: by block, the rank of a sketch, or None for the whole matrix.
    """
    chosen = ranks or [None] * len(blocks.blocks)
    pairs = zip(blocks.blocks, chosen, strict=True)
    sums = [BlockMoments.zeros(block, functional.device, rank) for block, rank in pairs]
    collector = Collector(blocks, sums, dtype)
    with torch.no_grad(), recording(blocks.sites, collector.receive, collector.summers):
        point = functional(functional.weights(), inputs)
    collector.end_batch(where)
    return collector.finish(), point


def proof_ranks(blocks: list[Block]) -> list[int | None]:
    """The inputs themselves for wide layers: few examples span few directions, and eigenvalues of all cost minutes."""
    return [block.columns if block.columns > WIDE and not block.table else None for block in blocks]


def _beside(moments: BlockMoments, columns: int) -> Factor:
    """The exact null space; the space beside the inputs themselves, where these are few and were stored as they are."""
    inputs = moments.inputs
    if isinstance(inputs, Sketch):
        groups, count, _ = inputs.rows.shape
        if count < columns:
            directions = torch.linalg.qr(inputs.rows.mT).Q
            gains = directions.new_zeros(groups, count)
            return LowRankFactor(directions, gains, directions.new_ones(groups))
        moments = BlockMoments(DenseMoments(inputs.rows.mT @ inputs.rows), None)
    return factorise(moments, Edge.of(moments, 0.0), columns)


def _local(site: Site, local: str) -> Tensor:
    *folders, leaf = local.split(".")
    module = site.module
    for folder in folders:
        module = getattr(module, folder)
    value = module._parameters[leaf]
    assert value is not None
    return value


def _size(values: Tensor) -> float:
    """Root mean square, or 1 of zeros."""
    return float(values.double().square().mean().sqrt()) or 1.0


def _like(tensor: Tensor, seed: int) -> Tensor:
    noise = torch.empty(tensor.shape, dtype=torch.float32).normal_(
        generator=torch.Generator().manual_seed(seed)
    )
    return noise.to(tensor) * _size(tensor)


def _allowed(functional: FunctionalModel, few: Inputs) -> float:
    """What rounding explains: by the least precise numbers on the way, such as float32 norms in a float64 network."""
    found = functional.dtype
    if found == torch.float64:
        # Some networks do not run under a mode; they ran without one.
        with contextlib.suppress(RuntimeError, NotImplementedError), Watch(found, ()) as watch:
            functional(functional.weights(), few)
        found = watch.found
    return TOLERANCE.get(found, HALF_TOLERANCE)


def _moved(point: Tensor, other: Tensor, tolerance: float) -> bool:
    change = (other - point).abs().amax()
    return not bool(change <= tolerance * point.abs().amax().clamp_min(1e-30))
