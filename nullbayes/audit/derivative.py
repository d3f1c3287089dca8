"""``J(x) Δ`` of one example alone, by whatever way the network's operations allow, without a captured row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from nullbayes.audit.batches import counter_generator
from nullbayes.audit.network import Exchanged, NetworkCopy, WrittenOut
from nullbayes.audit.precision import tolerance
from nullbayes.common.forward_mode import jvp
from nullbayes.errors import ModelError
from nullbayes.model.batch import Inputs, Keyed
from nullbayes.model.functional import FunctionalModel

FORWARD, TWICE, ROWS = "forward mode", "two reverse passes", "reverse mode"
DIFFERENCES = "central differences"
#: in this order: the later ones are slower, or share more with the backward passes that rows come from
WAYS = (FORWARD, TWICE, ROWS, DIFFERENCES)
# Half steps of central differences, relative to the weights: short, as a step across the kink of a ReLU counts in full;
# longer where a network rounds to less than float64 inside.
STEPS = (3e-8, 3e-6, 3e-4, 1e-2)
# The same in float32.
COARSE_STEPS = (1e-4, 1e-3, 1e-2)
# One step that says as much where it agrees with a derivative, and nothing where it does not: in float64 and float32.
QUICK, QUICK_COARSE = 3e-7, 3e-4
# Two steps agree, relative.
SAME = 1e-4
# A change of outputs, relative to them, that the shortest step makes as well as one ten times as long: no derivative.
JUMP, STAYS = 1e-3, 0.5


class Derivative:
    """``J(x) Δ_k (K, *out)`` of one example for directions ``(K, P)``, by the first way that works.

    A way that fails on one example is not tried again on the others.

    Args:
        copy: the network that central differences call; None: a copy in float64.
        fresh: that copy is a fresh one for each call.

    Attributes:
        doubt: largest distance that the last result may have from the derivative, where that is known.
        bend: by how much steps ahead and steps back of the last differences part: the whole change at a kink, such as
            that of a ReLU of zero, where there is no derivative.
        jump: by how much outputs change, relative to them, however short the step: weights that are rounded down on the
            grid that they lie on, a choice between equals. 0: not at all.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        ways: Sequence[str] = WAYS,
        copy: NetworkCopy | Exchanged | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        self.functional, self._fresh = functional, fresh
        self.doubt = self.bend = self.jump = 0.0
        self._left = list(ways)
        self._together = True
        self._precise = copy

    @property
    def way(self) -> str:
        """By which the last result was, or the next one will be, computed."""
        return self._left[0]

    def __call__(self, inputs: Inputs, directions: Tensor) -> Tensor:
        """Raises ModelError: every way failed."""
        run = {
            FORWARD: self._forward,
            TWICE: self._twice,
            ROWS: self._rows,
            DIFFERENCES: self._differences,
        }
        while True:
            # Fused attention has neither forward mode nor a derivative of its backward pass.
            plain = self.way in (ROWS, DIFFERENCES)
            try:
                with nullcontext() if plain else WrittenOut():
                    return run[self.way](inputs, directions).detach()
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                # An operation without a derivative of that kind, in whatever words.
                if len(self._left) == 1:
                    raise ModelError(
                        "the guarantee could not be audited: no way was found to differentiate the network along a "
                        f"weight change, one example alone; {self.way} ended with {type(error).__name__}: {error}. "
                        "Leave out the parameters before the operation named there (`parameters=`), or replace it."
                    ) from error
                self._left.pop(0)

    def _forward(self, inputs: Inputs, directions: Tensor) -> Tensor:
        functional = self.functional
        weights = functional.weights()

        def one(delta: Tensor) -> Tensor:
            tangent = functional.space.unflatten(delta)
            change: Tensor = jvp(lambda w: functional(w, inputs), (weights,), (tangent,))
            return change[0]

        # Frozen randomness knows its examples by the first axis, which `vmap` takes away.
        if self._together and not isinstance(inputs, Keyed):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of operations that `vmap` takes one by one
                    together: Tensor = torch.vmap(one)(directions)
                return together
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # whatever `vmap` makes of a network
                self._together = False
        return torch.stack([one(delta).detach() for delta in directions])

    def _twice(self, inputs: Inputs, directions: Tensor) -> Tensor:
        """The derivative of ``wᵀ J Δ`` by ``w``."""
        weights = self.functional.weights(requires_grad=True)
        with torch.enable_grad():
            outputs = self.functional(weights, inputs)
            dual = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, list(weights.values()), dual, create_graph=True, allow_unused=True
            )
            pairs = zip(weights, pulled, strict=True)
            used = {n: g for n, g in pairs if g is not None and g.requires_grad}
            found = []
            for delta in directions:
                tangent = self.functional.space.unflatten(delta)
                parts = [(g * tangent[n]).sum() for n, g in used.items()]
                along = torch.stack(parts).sum() if parts else dual.sum() * 0
                found.append(torch.autograd.grad(along, dual, retain_graph=True)[0][0])
        self._confirm(inputs, directions[0], found[0])
        return torch.stack(found)

    def _confirm(self, inputs: Inputs, delta: Tensor, change: Tensor) -> None:
        """Raise `ValueError` unless ``wᵀ(J Δ) = (Jᵀ w)ᵀ Δ`` by one plain backward pass, for a random ``w``.

        An operation that may be differentiated once only drops out of a second pass without a word.
        """
        w = torch.randn(change.shape, generator=counter_generator(0, 2), dtype=torch.float64)
        parts = self._pulled(inputs, w.to(change)[None]).double() * delta.double()
        here = (w.to(change.device) * change.double()).sum()
        allowed = tolerance(self.functional.rounding, self.functional.device)
        if not float((parts.sum() - here).abs()) <= allowed * float(parts.norm() + here.abs()):
            raise ValueError("two reverse passes disagree with one: no second derivative")

    def _pulled(self, inputs: Inputs, cotangent: Tensor) -> Tensor:
        """``Jᵀ w (P,)`` by one backward pass."""
        space, weights = self.functional.space, self.functional.weights(requires_grad=True)
        with torch.enable_grad():
            outputs = self.functional(weights, inputs)
        out = torch.zeros(space.total, dtype=space.dtype, device=space.device)
        if not outputs.requires_grad:
            return out
        gradients = torch.autograd.grad(
            outputs, list(weights.values()), cotangent.to(outputs), allow_unused=True
        )
        for slot, g in zip(space.slots, gradients, strict=True):
            if g is not None:
                dense = g.to_dense() if g.is_sparse else g
                out[slot.start : slot.stop] = dense.reshape(-1)
        return out

    def _rows(self, inputs: Inputs, directions: Tensor) -> Tensor:
        """One backward pass an output."""
        with torch.no_grad():
            outputs = self.functional(self.functional.weights(), inputs)
        columns = []
        for o in range(outputs.numel()):
            unit = torch.zeros_like(outputs)
            unit.view(-1)[o] = 1
            columns.append(directions @ self._pulled(inputs, unit))
        return torch.stack(columns, 1).reshape(len(directions), *outputs.shape[1:])

    def _differences(self, inputs: Inputs, directions: Tensor) -> Tensor:
        """By the shortest step that a longer one agrees with; how far they agree is the doubt."""
        if self._precise is None:
            self._precise = NetworkCopy(self.functional, torch.float64, fresh=self._fresh)
        precise = self._precise
        coarse = precise.dtype is None and self.functional.dtype != torch.float64
        here = precise.outputs(inputs).double()
        found, bends, changed = [], list[float](), list[float]()
        away: list[float] = []
        for step in COARSE_STEPS if coarse else STEPS:
            central, bend, change = self._stepped(precise, inputs, directions, (step, here))
            found.append(central)
            bends.append(_largest(bend))
            changed.append(change)
            if len(found) == 1:
                continue
            away.append(_largest(found[-1] - found[-2]))
            if away[-1] <= SAME * _largest(found[-1]):
                break
        best = min(range(len(away)), key=lambda k: away[k])
        self.doubt = away[best]
        self.bend = min(bends[best : best + 2])
        size = float(here.norm())
        jumps = changed[0] > JUMP * size and changed[0] > STAYS * changed[1]
        self.jump = changed[0] / max(size, 1e-300) if jumps else 0.0
        # Where short steps are rounding, the longer of the two is the better one.
        return found[best if best == 0 else best + 1]

    def quickly(self, inputs: Inputs, directions: Tensor) -> Tensor:
        """Central differences ``(K, *out)`` by one step, whatever they are worth."""
        precise = self._precise
        assert precise is not None
        step = QUICK if self.functional.dtype == torch.float64 else QUICK_COARSE
        unknown = torch.zeros((), dtype=torch.float64)  # outputs that a difference does not need
        return self._stepped(precise, inputs, directions, (step, unknown))[0].detach()

    def _stepped(
        self,
        precise: NetworkCopy | Exchanged,
        inputs: Inputs,
        directions: Tensor,
        step_from: tuple[float, Tensor],
    ) -> tuple[Tensor, Tensor, float]:
        """Central differences ``(K, *out)``, by how much those ahead and those behind part, and the largest change.

        Args:
            step_from: half the step, relative to the weights, and the outputs at these.
        """
        relative, here = step_from
        weights = self.functional.weights().values()
        size = math.sqrt(sum(float(w.double().square().sum()) for w in weights)) or 1.0
        out, bends, changed = [], [], 0.0
        for delta in directions.double():
            step = relative * size / max(float(delta.norm()), 1e-300)
            ahead = precise.outputs(inputs, step * delta).double()
            behind = precise.outputs(inputs, -step * delta).double()
            out.append((ahead - behind)[0] / (2 * step))
            bends.append((ahead + behind - 2 * here)[0] / (2 * step))
            changed = max(changed, float((ahead - here).norm()), float((behind - here).norm()))
        return torch.stack(out), torch.stack(bends), changed


def _largest(changes: Tensor) -> float:
    """Norm of the largest of ``changes (K, *out)``."""
    return float(changes.reshape(len(changes), -1).norm(dim=1).max())
