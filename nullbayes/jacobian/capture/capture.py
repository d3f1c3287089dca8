"""From a batch to its Jacobian rows: forward hooks, one batched backward, layer rules.

Hooks record what each layer with a rule saw; one backward pass, batched over the cotangents, gives
the gradients of all their outputs. Examples do not interact, so one backward of a whole batch
carries every example's own gradient. Parameters without a rule go through ``generic.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nullbayes.audit.precision import tolerance
from nullbayes.audit.route import Route, route_of
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.capture.contributions import Contributions
from nullbayes.jacobian.capture.contributions import RuleMismatch as RuleMismatch
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
from nullbayes.model.batch import Inputs, batch_size
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.private import Hooks


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
    both = with_tags(cotangents[None], tags).to(outputs.dtype)
    grads = batched_grad(outputs, edges, both, batched=plan.batched_backward)
    _places_agree(functional, (records, uses), grads, tags)


def with_tags(cotangents: Tensor, tags: Tensor) -> Tensor:
    """``(C, B, *out)``, and behind them the same times a number of each example: ``(2 C, B, *out)``."""
    return torch.cat([cotangents, cotangents * tags.reshape(-1, *[1] * (cotangents.ndim - 2))])


def _places_agree(
    functional: FunctionalModel,
    recorded: tuple[Sequence[_Record], Sequence[LocalUse]],
    grads: Sequence[Tensor | None],
    tags: Tensor,
) -> None:
    """See :func:`check_places`, of gradients for cotangents that :func:`with_tags` made."""
    records, uses = recorded
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
    moved = g.movedim(axis, 1).unflatten(1, (len(tags), -1)).double()
    plain, tagged = moved.tensor_split(2)
    wanted = plain * tags.double().reshape(-1, *[1] * (plain.ndim - 2))
    return (tagged - wanted).norm() <= allowed * wanted.norm()


def capture(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    make_cotangents: Any,
    scales: dict[str, float] | None = None,
    routes: list[Route] | None = None,
) -> tuple[Block, Any]:
    """The rows of one batch, zero where it reaches no parameter, and what ``make_cotangents`` returned.

    Args:
        make_cotangents: ``outputs (B, *out) -> object`` whose ``.values`` is ``(C, B, *out)``; where it has ``.tags``,
            by which :func:`with_tags` made them, places are checked with the same gradients.
        scales: what to multiply the columns of each parameter by.
        routes: takes the way that the network took (:func:`nullbayes.audit.route.route_of`).

    Raises:
        Misplaced: see :func:`check_places`, with ``.tags``.
        RuleMismatch, GenericPathFailed, LocalFailed: for ``checking.py``, which mends the plan.
    """
    examples = batch_size(inputs)
    hooks, records, uses = _recorders(plan, examples)
    leaves = functional.weights(requires_grad=True)
    weights, shared = spread_weights(plan, leaves, examples)
    with torch.enable_grad():
        outputs = functional(weights, inputs, hooks)
    # Copies: activation checkpointing calls modules, and so the hooks, once more in the backward pass.
    records, uses = list(records), list(uses)
    if routes is not None:
        routes[:] = _routes(outputs, leaves, records, uses)
    made = make_cotangents(outputs.detach())
    cotangents = made.values.to(outputs.dtype)
    count, size = cotangents.shape[:2]
    contributions = Contributions(functional, plan, size, scales or {})
    served = {n for site in plan.local for n in site.names} | set(plan.spread)
    whole = [n for n in plan.generic if n not in served]
    if not outputs.requires_grad:
        return Block({}, size, count), made
    if records or uses or shared:
        edges = [r.edge for r in records] + [u.edge for u in uses] + shared
        grads = batched_grad(outputs, edges, cotangents, batched=plan.batched_backward)
        grads, given = grads[: len(grads) - len(shared)], grads[len(grads) - len(shared) :]
        if getattr(made, "tags", None) is not None:
            _places_agree(functional, (records, uses), grads, made.tags)
        with torch.no_grad():
            contributions.take(records, grads)
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
        for name, values in _by_whole_model(functional, plan, whole, inputs, cotangents).items():
            contributions.add_rows(name, values)
    with torch.no_grad():
        return Block(contributions.factors(count), size, count), made


def _routes(
    outputs: Tensor,
    leaves: dict[str, Tensor],
    records: Sequence[_Record],
    uses: Sequence[LocalUse],
) -> list[Route]:
    """The way that the network took, if it can be told."""
    called = [(r.site.path, r.x.shape, r.shape) for r in records]
    route = route_of(outputs, leaves, (*called, *(u.site.path for u in uses)))
    return [] if route is None else [route]


def _by_whole_model(
    functional: FunctionalModel,
    plan: CapturePlan,
    names: list[str],
    inputs: Inputs,
    cotangents: Tensor,
) -> dict[str, Tensor]:
    try:
        return generic_rows(functional, names, inputs, cotangents, vmapped=plan.vmapped)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise GenericPathFailed(str(error)) from error


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
