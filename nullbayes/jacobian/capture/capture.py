"""From a batch to its Jacobian rows: forward hooks, one batched backward, layer rules.

Hooks record what each layer with a rule saw; one backward pass, batched over the cotangents, gives
the gradients of all their outputs. Examples do not interact, so one backward of a whole batch
carries every example's own gradient. Parameters without a rule go through ``generic.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nullbayes.audit.precision import tolerance
from nullbayes.audit.route import route_of
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.capture.generic import generic_rows
from nullbayes.jacobian.capture.plan import CapturePlan, Site
from nullbayes.jacobian.capture.single_module import (
    LocalFailed,
    LocalSite,
    LocalUse,
    local_rows,
    record_use,
)
from nullbayes.jacobian.capture.spreading import spread_output, spread_rows, spread_weights
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.lookup import LookupFactor
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.factors.products import flushed
from nullbayes.jacobian.layers.rule import Contribution, Lookup, Outer, Rows, working
from nullbayes.model.batch import Inputs, batch_size
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import HALF, Slot
from nullbayes.model.private import Hooks


class RuleMismatch(Exception):
    """A rule could not digest what its layer was given; ``path`` names the layer."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path or 'the model'}: {why}")
        self.path = path


class Misplaced(Exception):
    """Layers whose outputs do not have the examples where the plan says; ``names``: their parameters."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class GenericPathFailed(Exception):
    """The vectorised generic path does not run on this model."""


@dataclass
class _Record:
    site: Site
    x: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size


def _recorders(plan: CapturePlan, size: int) -> tuple[Hooks, list[_Record], list[LocalUse]]:
    """Forward hooks for the sites' modules on a batch of ``size``, and the lists that they fill."""
    records: list[_Record] = []
    uses: list[LocalUse] = []

    def hook_for(site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(out, Tensor) or not out.requires_grad:
                return None  # such a use is not accounted for; the check will say so
            if x.is_nested or out.is_nested:
                return None  # nor is this one, which has no axes to tell examples by
            # The edge, not the tensor: a later in-place activation would move the tensor's own
            # place in the graph behind itself.
            x, out = spread_output(site, x, out, size)
            edge = get_gradient_edge(out)
            records.append(_Record(site, x.detach(), x._version, edge, out.shape))
            # In place on a view, an activation would rewrite the view's own history, and leave the edge aside
            # (a linear layer on a batch of one, token axes and all, returns a view).
            return out.clone() if out._is_view() else None

        return hook

    def local_hook_for(site: LocalSite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
            use = record_use(site, args, kwargs, out)
            if use is not None:
                uses.append(use)

        return hook

    hooks = [(site.path, hook_for(site)) for site in plan.sites]
    hooks += [(site.path, local_hook_for(site)) for site in plan.local]
    return hooks, records, uses


def batched_grad(
    outputs: Tensor, inputs: Sequence[Any], cotangents: Tensor, *, batched: bool
) -> list[Tensor | None]:
    """Vector-Jacobian products for ``cotangents (C, *outputs.shape)``: one ``(C, ...)`` each."""
    if len(cotangents) == 1 or not batched:
        runs = [
            torch.autograd.grad(
                outputs, inputs, c, retain_graph=i + 1 < len(cotangents), allow_unused=True
            )
            for i, c in enumerate(cotangents)
        ]
        return [None if row[0] is None else torch.stack(row) for row in zip(*runs, strict=True)]
    return list(
        torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, allow_unused=True)
    )


def check_places(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, cotangents: Tensor, tags: Tensor
) -> None:
    """Raise :class:`Misplaced` unless each recorded layer has the examples on its axis, in their order.

    Gradients of its outputs for ``tags · cotangents`` are then ``tags`` times those for ``cotangents``, example by
    example: whatever the layer's parameters do there, even nothing.

    Args:
        cotangents: ``(B, *out)``; ``tags``: a number ``(B,)`` for each example.
    """
    hooks, records, uses = _recorders(plan, len(cotangents))
    with torch.enable_grad():
        outputs = functional(functional.weights(requires_grad=True), inputs, hooks)
    records, uses = list(records), list(uses)
    if not outputs.requires_grad or not (records or uses):
        return
    edges = [r.edge for r in records] + [u.edge for u in uses]
    tagged = cotangents * tags.reshape(-1, *[1] * (cotangents.ndim - 1))
    both = torch.stack([cotangents, tagged]).to(outputs.dtype)
    grads = batched_grad(outputs, edges, both, batched=plan.batched_backward)
    places = [(r.site.batch_axis, list(r.site.names.values())) for r in records]
    places += [(u.site.axis, u.site.names) for u in uses]
    allowed = tolerance(functional.rounding, functional.device)
    found = [
        (names, _in_place(g, axis + 1, tags, allowed))
        for (axis, names), g in zip(places, grads, strict=True)
        if g is not None
    ]
    if not found:
        return
    right: list[bool] = torch.stack([good for _, good in found]).tolist()
    wrong = [
        name for (names, _), good in zip(found, right, strict=True) if not good for name in names
    ]
    if wrong:
        raise Misplaced(wrong)


def _in_place(g: Tensor, axis: int, tags: Tensor, allowed: float) -> Tensor:
    """Whether the examples are on that axis: a boolean without axes, on the device."""
    if g.ndim <= axis or g.shape[axis] % len(tags):
        return torch.zeros((), dtype=torch.bool, device=g.device)
    plain, tagged = g.movedim(axis, 1).unflatten(1, (len(tags), -1)).double()
    wanted = plain * tags.double().reshape(-1, *[1] * (plain.ndim - 1))
    return (tagged - wanted).norm() <= allowed * wanted.norm()


def capture(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    make_cotangents: Any,
    scales: dict[str, float] | None = None,
    routes: list[Hashable] | None = None,
) -> tuple[Block, Any]:
    """The rows of one batch, and what ``make_cotangents`` returned.

    Args:
        make_cotangents: ``outputs (B, *out) -> object`` whose ``.values`` is ``(C, B, *out)``.
        scales: what to multiply the columns of each parameter by.
        routes: takes the way that the network took (:func:`nullbayes.audit.route.route_of`).

    A batch that reaches no parameter has rows of zero.

    Raises:
        RuleMismatch, GenericPathFailed, LocalFailed: for ``checking.py``, which mends the plan.
    """
    hooks, records, uses = _recorders(plan, batch_size(inputs))
    leaves = functional.weights(requires_grad=True)
    weights, shared = spread_weights(plan, leaves, batch_size(inputs))
    with torch.enable_grad():
        outputs = functional(weights, inputs, hooks)
    # Copies: activation checkpointing calls modules, and so the hooks, once more in the backward pass.
    records, uses = list(records), list(uses)
    if routes is not None:
        called = [(r.site.path, r.x.shape, r.shape) for r in records]
        route = route_of(outputs, leaves, (*called, *(u.site.path for u in uses)))
        routes[:] = [] if route is None else [route]
    made = make_cotangents(outputs.detach())
    cotangents = made.values.to(outputs.dtype)
    count, size = cotangents.shape[:2]
    contributions = _Contributions(functional, plan, size, scales or {})
    served = {n for site in plan.local for n in site.names} | set(plan.spread)
    whole = [n for n in plan.generic if n not in served]
    if not outputs.requires_grad:
        return Block({}, size, count), made
    if records or uses or shared:
        edges = [r.edge for r in records] + [u.edge for u in uses] + shared
        grads = batched_grad(outputs, edges, cotangents, batched=plan.batched_backward)
        given = grads[len(grads) - len(shared) :]
        grads = grads[: len(grads) - len(shared)]
        with torch.no_grad():
            for record, g in zip(records, grads, strict=False):
                if g is None:
                    continue
                if record.x._version != record.version:
                    raise RuleMismatch(record.site.path, "its input was changed in place")
                contributions.add(record.site, record.x, g)
        passed = sum(r.x.numel() + r.shape.numel() for r in records) + sum(u.numel for u in uses)
        plan.activations = passed // size
        found = _local(functional, plan, uses, grads[len(records) :], size)
        whole += [name for site in found.failed for name in site.names if name not in whole]
        for name, values in [*found.rows, *spread_rows(plan, given, size)]:
            if name not in whole:
                contributions.add_rows(name, values)
        del grads, given, found
    del outputs, records, uses, weights, leaves
    if whole:
        try:
            rows = generic_rows(functional, whole, inputs, cotangents, vmapped=plan.vmapped)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise GenericPathFailed(str(error)) from error
        for name, values in rows.items():
            contributions.add_rows(name, values)
    with torch.no_grad():
        return Block(contributions.factors(count), size, count), made


@dataclass
class _Local:
    rows: list[tuple[str, Tensor]] = field(default_factory=list)
    failed: list[LocalSite] = field(default_factory=list)


def _local(
    functional: FunctionalModel,
    plan: CapturePlan,
    uses: Sequence[LocalUse],
    grads: Sequence[Tensor | None],
    size: int,
) -> _Local:
    """Rows by running single modules; before the plan is settled, a failure is the probe's to mend."""
    out = _Local()
    for use, g in zip(uses, grads, strict=True):
        if g is None or use.site in out.failed:
            continue
        try:
            out.rows += local_rows(functional, use, g, size, settled=plan.settled).items()
        except Exception:  # whatever a module does where it was not written to be run alone
            out.failed.append(use.site)
    if not plan.settled:
        able = [use.site for use in uses if use.takes_tensors]
        hopeless = [site for site in plan.local if site not in able]
        failed = out.failed + [site for site in hopeless if site not in out.failed]
        if failed:
            raise LocalFailed(failed, hopeless)
    return out


class _Contributions:
    """Collects what layers contribute per parameter and settles on one factor for each."""

    def __init__(
        self,
        functional: FunctionalModel,
        plan: CapturePlan,
        size: int,
        scales: dict[str, float],
    ) -> None:
        self.functional, self.plan, self.size, self.scales = functional, plan, size, scales
        self.slots = functional.space.by_name
        # Rows of tables that stay where they are: nothing is contributed to them.
        self.fixed = functional.space.fixed_rows
        self.outer: dict[tuple[str, str | None, bool], list[tuple[Tensor, Tensor]]]
        self.outer = defaultdict(list)
        self.rows: dict[str, list[Tensor]] = defaultdict(list)
        self.lookup: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def _split(self, t: Tensor, axis: int, where: str) -> Tensor:
        """Split the leading axis ``N = B * k`` after ``axis`` leading axes into ``(B, k)``."""
        n = t.shape[axis]
        if n % self.size:
            raise RuleMismatch(where, f"leading axis {n} is no multiple of the batch")
        return t.unflatten(axis, (self.size, n // self.size))

    def add(self, site: Site, x: Tensor, g: Tensor) -> None:
        if site.batch_axis:
            if x.ndim < 3:
                raise RuleMismatch(site.path, "no second axis to hold the batch")
            x, g = x.transpose(0, 1), g.transpose(1, 2)
        if x.shape[0] != g.shape[1]:
            raise RuleMismatch(site.path, "input and output differ in their leading axis")
        names = site.names
        x, g = (_single(t) for t in (x, g))
        try:
            items = list(site.rule.contributions(site.module, x, g))
        except Exception as error:  # any shape a rule was not written for; the plan decides
            raise RuleMismatch(site.path, f"its rule failed ({error})") from error
        for item in items:
            item = working(item, self.functional.dtype)
            self._check_sizes(site, item, len(g))
            if isinstance(item, Rows):
                if item.name in names:
                    values = self._split(item.values, 1, site.path).sum(2)
                    self.add_rows(names[item.name], values.transpose(0, 1))
            elif isinstance(item, Lookup):
                if item.name in names:
                    index = self._split(item.index, 0, site.path).flatten(1, 2)
                    for row in self.fixed.get(names[item.name], ()):
                        index = torch.where(index == row, -1, index)
                    grads = self._split(item.g, 1, site.path).flatten(2, 3).transpose(0, 1)
                    self.lookup[names[item.name]].append((index, grads))
            else:
                self._add_outer(site, item)

    def _check_sizes(self, site: Site, item: Contribution, count: int) -> None:
        """A rule given a layout that it was not written for may return other sizes than the parameters have."""
        if isinstance(item, Rows):
            sizes = {item.name: item.values[0, 0].numel()}
            lead = [item.values.shape[0]]
        elif isinstance(item, Lookup):
            table = self.slots.get(site.names.get(item.name, ""))
            rows = 0 if table is None else table.shape[0]
            sizes, lead = {item.name: rows * item.g.shape[-1]}, [item.g.shape[0]]
            if item.g.shape[1:3] != item.index.shape:
                raise RuleMismatch(
                    site.path, "its rule looks up other tokens than it has gradients of"
                )
        else:
            outputs = item.g.shape[3] * item.g.shape[4]
            sizes = {item.weight: outputs * item.a.shape[3]}
            sizes |= {item.bias: outputs} if item.bias else {}
            lead = [item.g.shape[0]]
            if item.a.shape[:3] != item.g.shape[1:4]:
                raise RuleMismatch(site.path, "its rule has other positions than gradients")
        wanted = {n: self.slots[site.names[n]].numel for n in sizes if n in site.names}
        if lead != [count] or any(sizes[n] != numel for n, numel in wanted.items()):
            raise RuleMismatch(site.path, "its rule gives rows of another size")

    def _add_outer(self, site: Site, item: Outer) -> None:
        names = site.names
        a = self._split(item.a, 0, site.path).flatten(1, 2)
        g = self._split(item.g, 1, site.path).flatten(2, 3).transpose(0, 1)
        weight = names.get(item.weight)
        bias = names.get(item.bias) if item.bias else None
        shared = any(n and len(self.plan.owners(n)) > 1 for n in (weight, bias))
        fixed = self.fixed.get(weight or "", ())
        fuse = weight is not None and bias is not None and not (shared or fixed)
        if bias is not None and not fuse:
            self.add_rows(bias, g.sum(2).flatten(2))
        if fixed:
            if item.transposed or g.shape[3] > 1:
                raise RuleMismatch(site.path, "some rows of its weight stay where they are")
            g = g.clone()
            g[..., list(fixed)] = 0
        if weight is not None:
            key = (weight, bias if fuse else None, item.transposed)
            self.outer[key].append((a, g))

    def add_rows(self, name: str, values: Tensor) -> None:
        """``values (B, C, numel)``."""
        values = values.to(self.functional.dtype)
        if name in self.fixed:
            values = values.clone()
            values.unflatten(-1, (self.slots[name].shape[0], -1))[
                ..., list(self.fixed[name]), :
            ] = 0
        self.rows[name].append(values)

    def factors(self, cotangents: int) -> dict[tuple[str, ...], Factor]:
        """One factor for each parameter, all written-out rows side by side in one."""
        out: dict[tuple[str, ...], Factor] = {}
        uses: dict[str, int] = defaultdict(int)
        for key in self.outer:
            uses[key[0]] += 1
        for name in (*self.rows, *self.lookup):
            uses[name] += 1
        dense: dict[str, Tensor] = {}
        for (weight, bias, transposed), parts in self.outer.items():
            scale, bias_scale = self._scale(weight), self._scale(bias)
            # The same weight used twice is one use with the tokens of both.
            a = torch.cat([p[0] for p in parts], dim=1) if len(parts) > 1 else parts[0][0]
            g = torch.cat([p[1] for p in parts], dim=2) if len(parts) > 1 else parts[0][1]
            a, g = flushed(a if scale == 1.0 else a * scale), flushed(g)
            slot = self.slots[weight]
            bias_slot = None if bias is None else self.slots[bias]
            factor = OuterFactor(
                slot, bias_slot, a, g, transposed=transposed, bias_scale=bias_scale
            )
            names = tuple(s.name for s in factor.slots)
            mixed = uses[weight] > 1
            if self.plan.written_out.setdefault(names, mixed or factor.prefers_dense):
                rows = factor.rows().reshape(self.size, cotangents, -1)
                for s, part in zip(
                    factor.slots, rows.split([s.numel for s in factor.slots], 2), strict=True
                ):
                    dense[s.name] = dense[s.name] + part if s.name in dense else part
            else:
                out[names] = factor
        for name, looked in self.lookup.items():
            index = torch.cat([p[0] for p in looked], dim=1)
            g = flushed(torch.cat([p[1] for p in looked], dim=2) * self._scale(name))
            lookup = LookupFactor(self.slots[name], index, g)
            # A table used in other ways too (tied to an output layer) has no sparse rows.
            if uses[name] > 1:
                rows = lookup.rows().reshape(self.size, cotangents, -1)
                dense[name] = dense[name] + rows if name in dense else rows
            else:
                out[(name,)] = lookup
        for name, values in self.rows.items():
            total = sum(values[1:], values[0]) * self._scale(name)
            dense[name] = dense[name] + total if name in dense else total
        if dense:
            order: list[Slot] = [s for s in self.functional.space.slots if s.name in dense]
            joined = flushed(torch.cat([dense[s.name] for s in order], dim=2))
            out[tuple(s.name for s in order)] = DenseFactor(order, joined)
        return out

    def _scale(self, name: str | None) -> float:
        return 1.0 if name is None else self.scales.get(name, 1.0)


def _single(t: Tensor) -> Tensor:
    """Half precision (of autocast) as float32: products of rows are not to round a second time."""
    return t.float() if t.dtype in HALF else t
