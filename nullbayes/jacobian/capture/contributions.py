"""What each layer contributes to the rows of its parameters, settled on one factor for each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nullbayes.jacobian.capture.plan import CapturePlan, Site
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.lookup import LookupFactor
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.factors.products import flushed
from nullbayes.jacobian.layers.rule import Contribution, Lookup, Outer, Rows, working
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import HALF, Slot


class RuleMismatch(Exception):
    """A rule could not digest what its layer was given; ``path`` names the layer."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path or 'the model'}: {why}")
        self.path = path


class Contributions:
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
        self.fixed, self.idle = functional.space.fixed_rows, functional.space.idle
        self.outer: dict[tuple[str, str | None, bool], list[tuple[Tensor, Tensor]]]
        self.outer = defaultdict(list)
        self.rows: dict[str, list[Tensor]] = defaultdict(list)
        self.lookup: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        #: how many layers have each parameter
        self.owners = Counter(name for site in plan.sites for name in set(site.names.values()))

    def _split(self, t: Tensor, axis: int, where: str) -> Tensor:
        """Split the leading axis ``N = B * k`` after ``axis`` leading axes into ``(B, k)``."""
        n = t.shape[axis]
        if n % self.size:
            raise RuleMismatch(where, f"leading axis {n} is no multiple of the batch")
        return t.unflatten(axis, (self.size, n // self.size))

    def take(self, records: Sequence[Any], grads: Sequence[Tensor | None]) -> None:
        """What recorded calls of layers contribute, each with the gradients of its outputs ``(C, *output)``."""
        for record, g in zip(records, grads, strict=False):
            if g is None:
                continue
            if record.x._version != record.version:
                raise RuleMismatch(record.site.path, "its input was changed in place")
            self.add(record.site, record.x, g)

    def add(self, site: Site, x: Tensor, g: Tensor) -> None:
        if site.batch_axis:
            if x.ndim < 3:
                raise RuleMismatch(site.path, "no second axis to hold the batch")
            x, g = x.transpose(0, 1), g.transpose(1, 2)
        if x.shape[0] != g.shape[1]:
            raise RuleMismatch(site.path, "input and output differ in their leading axis")
        names = self._moving(site)
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

    def _moving(self, site: Site) -> dict[str, str]:
        """Without the parameters that stay because no training example depends on them: others may."""
        return {local: name for local, name in site.names.items() if name not in self.idle}

    def _add_outer(self, site: Site, item: Outer) -> None:
        names = self._moving(site)
        a = self._split(item.a, 0, site.path).flatten(1, 2)
        g = self._split(item.g, 1, site.path).flatten(2, 3).transpose(0, 1)
        weight = names.get(item.weight)
        bias = names.get(item.bias) if item.bias else None
        shared = any(n is not None and self.owners[n] > 1 for n in (weight, bias))
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
        if name in self.idle:
            values = torch.zeros_like(values)
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
