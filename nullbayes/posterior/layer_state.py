"""What a layer posterior consists of: sums by block, their factors, and samples that are made when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nullbayes.fit.prior_samples import generator_for
from nullbayes.jacobian.linearise import double_reverse_product, forward_product
from nullbayes.model.batch import Inputs, batch_size, select, tensor_leaves
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.smooth import written_out
from nullbayes.moments.blocks import Block, Blocks
from nullbayes.moments.capture import plain_paths
from nullbayes.moments.factor import Edge, Factor, factorise
from nullbayes.moments.gather import Gathered
from nullbayes.moments.products import working_dtype
from nullbayes.moments.second import BlockMoments, DenseMoments

Changes = dict[str, Tensor]

# Inputs, targets or None, and the network's outputs.
Checked = tuple[Inputs, Any, Tensor]

# Samples are remembered up to so many bytes.
CACHE_BYTES = 2**28
# The guarantee is measured on one in so many examples, on so many at least, or all.
CHECKED_SHARE, LEAST_CHECKED = 32, 32


class LayerState:
    """Posterior ``α⁻¹ I ⊗ P`` of each block.

    Sample ``i`` depends on ``(seed, i)`` and the sums alone: a block's standard normal numbers times the root of ``P``.
    It is made anew whenever it is needed, so a posterior holds no samples.

    Args:
        delta: where the null space ends, see :class:`Edge`; 0: exact.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        blocks: Blocks,
        gathered: Gathered,
        delta: float,
        seed: int,
        num_samples: int,
    ) -> None:
        self.functional, self.blocks, self.gathered = functional, blocks, gathered
        self.delta, self.seed, self.num_samples = delta, seed, num_samples
        self._cache: dict[int, Changes] = {}
        self.references: Any = None  # of the combined score, once it was asked for or loaded
        # What was measured, by prior precision, samples and examples.
        self.measured: dict[tuple[float, int, int], Any] = {}

    @property
    def products(self) -> torch.dtype:
        """What sums and samples are multiplied in."""
        return working_dtype(self.functional.dtype, self.delta)

    @cached_property
    def checked(self) -> list[Checked]:
        """Training examples that the guarantee is measured on: some of those that were kept, with their outputs."""
        groups = self.gathered.kept
        held = sum(batch_size(inputs) for inputs, _ in groups)
        room = min(held, max(LEAST_CHECKED, self.gathered.examples // CHECKED_SHARE))
        # Few groups rather than few examples of each: a pass over one example costs nearly what one over several does.
        wanted = -(-len(groups) * room // max(1, held))
        out: list[Checked] = []
        for place in torch.linspace(0, len(groups) - 1, wanted).round().long().tolist():
            inputs, targets = groups[place]
            size, left = batch_size(inputs), room - sum(len(point) for _, _, point in out)
            if not left:
                break
            if left < size:
                index = torch.linspace(0, size - 1, left).round().long()
                if targets is not None and all(
                    t.ndim and len(t) == size for t in tensor_leaves(targets)
                ):
                    targets = select(targets, index)
                inputs = select(inputs, index)
            out.append((inputs, targets, self.functional.outputs(inputs, "the training data")))
        return out

    @cached_property
    def edges(self) -> list[Edge]:
        """By block."""
        return [Edge.of(sums, self.delta) for sums in self.gathered.sums]

    @cached_property
    def factors(self) -> list[Factor]:
        """By block, at prior precision one."""
        parts = zip(self.blocks.blocks, self.gathered.sums, self.edges, strict=True)
        out: list[Factor] = []
        for i, (block, sums, edge) in enumerate(parts):
            # Queries, keys and values: one input, one factor.
            if i and _same(sums, self.gathered.sums[i - 1]):
                out.append(out[-1])
            else:
                out.append(factorise(sums, edge, block.columns))
        return out

    @cached_property
    def natural_precision(self) -> float:
        """The prior precision at which weights drawn from the prior are as large as the trained ones."""
        weights, squares, count = self.functional.weights(), 0.0, 0
        for name in (n for block in self.blocks.blocks for n in block.names):
            squares += float(weights[name].double().square().sum())
            count += weights[name].numel()
        return count / squares if squares else 1.0

    @cached_property
    def free_share(self) -> float:
        """Share of the prior's variance that is left, over all blocks."""
        free = total = 0.0
        for block, factor in zip(self.blocks.blocks, self.factors, strict=True):
            groups, outputs, columns = block.size
            free += groups * outputs * factor.free
            total += groups * outputs * columns
        return free / max(1.0, total)

    def flat(self, vectors: Tensor, of: Callable[[Factor, Tensor], Tensor]) -> Tensor:
        """A map of every block's factor, on flat weight vectors ``(n, P)``; zero where a parameter stays fixed.

        ``Factor.project`` gives ``v Σ``, ``Factor.spread`` ``v R`` and ``Factor.whiten`` ``v Rᵀ``, with ``RᵀR = Σ``,
        the covariance at prior precision one.
        """
        space = self.functional.space
        tensors = space.unflatten(vectors)
        out = {name: torch.zeros_like(t) for name, t in tensors.items()}
        for block, factor in zip(self.blocks.blocks, self.factors, strict=True):
            matrix = block.matrix({n: tensors[n] for n in block.names})
            out.update(block.tensors(self._standing(block, of(factor, matrix))))
        return space.flatten(out)

    def _standing(self, block: Block, matrix: Tensor) -> Tensor:
        """A block's changes ``(*lead, G, O, I)``, in place without those of rows of padding.

        These are no weights, whether the data have padding or not. The whole row stands, its bias in an output layer
        that shares the table too: the null space balances a bias against its row.
        """
        if rows := self.functional.space.fixed_rows.get(block.name):
            matrix[..., list(rows), :] = 0
        return matrix

    def change(self, index: int) -> Changes:
        """Sample ``index`` as changes of the weights, at prior precision one."""
        if index in self._cache:
            return self._cache[index]
        generator, out = generator_for(self.seed, index), {}
        for block, factor in zip(self.blocks.blocks, self.factors, strict=True):
            z = torch.empty(block.size, dtype=self.products).normal_(generator=generator)
            change = factor.spread(z.to(self.functional.device))
            change = self._standing(block, change.to(self.functional.dtype))
            out.update(block.tensors(change))
        each = sum(t.nbytes for t in out.values())
        if each * (len(self._cache) + 1) <= CACHE_BYTES:
            self._cache[index] = out
        return out

    def moved(self, index: int, scale: float) -> Changes:
        """The weights of sample ``index`` times ``scale = α^{-1/2}``, those of all parameters that take part."""
        weights = self.functional.weights()
        for name, change in self.change(index).items():
            weights[name] = torch.add(weights[name], change, alpha=scale)
        return weights

    def sampled(self, inputs: Inputs, scale: float, count: int) -> Tensor:
        """Outputs ``(S, B, *out)`` of the re-weighted network itself."""
        with torch.no_grad():
            return torch.stack(
                [self.functional(self.moved(i, scale), inputs) for i in range(count)]
            )

    def linearised(self, inputs: Inputs, count: int) -> Tensor:
        """``J(x) Δ_s (S, B, *out)`` at prior precision one: forward mode, or two reverse passes where there is none."""
        product, out = forward_product, []
        zeros = {n: torch.zeros_like(t) for n, t in self.functional.weights().items()}
        # Attention by its plain operations has derivatives of both kinds.
        with plain_paths(), written_out():
            for index in range(count):
                tangent: Mapping[str, Tensor] = zeros | self.change(index)
                try:
                    change = product(self.functional, dict(tangent), inputs)
                except (NotImplementedError, RuntimeError):
                    if product is double_reverse_product:
                        raise
                    product = double_reverse_product
                    change = product(self.functional, dict(tangent), inputs)
                out.append(change.detach())
        return torch.stack(out)

    def state_dicts(self, scale: float, count: int) -> Iterator[Changes]:
        """``θ̂ + Δ_s`` as state dicts of the whole model."""
        model = self.functional.model
        canonical = {id(p): n for n, p in model.named_parameters()}
        for index in range(count):
            moved, out = self.moved(index, scale), {}
            for key, value in model.state_dict(keep_vars=True).items():
                name = canonical.get(id(value), key)
                out[key] = moved[name].clone() if name in moved else value.detach().clone()
            yield out


def _same(one: BlockMoments, two: BlockMoments) -> bool:
    dense = isinstance(one.inputs, DenseMoments) and isinstance(two.inputs, DenseMoments)
    if not dense or one.rows is not None or two.rows is not None:
        return False
    assert isinstance(one.inputs, DenseMoments) and isinstance(two.inputs, DenseMoments)
    return torch.equal(one.inputs.values, two.inputs.values)
