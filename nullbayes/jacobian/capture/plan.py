"""Who accounts for which parameter: layers with a rule, the smallest module around others, or the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nullbayes.audit.route import Route
from nullbayes.audit.signatures import Signature, SignatureSet
from nullbayes.errors import ModelError
from nullbayes.jacobian.capture.single_module import LocalSite
from nullbayes.jacobian.layers.rule import LayerRule, rule_for
from nullbayes.model.checks import QUANTISED_MEND, quantised
from nullbayes.model.functional import FunctionalModel


@dataclass
class Site:
    """One module with a rule: its parameters' canonical names by local name."""

    path: str
    module: nn.Module
    rule: LayerRule
    names: dict[str, str]
    batch_axis: int = 0
    # Whether the axis was proved on more than one example: one alone is the same on either.
    axis_proved: bool = False
    # Whether an output that all examples share is given to each of them, see `spreading.py`: None until one came.
    spread: bool | None = None


@dataclass
class CapturePlan:
    """Who accounts for which parameter. Settled by the probe, then fixed for the whole fit."""

    sites: list[Site]
    # Without a rule. Those of `local` cost one module's passes, the others those of the whole model.
    generic: list[str]
    local: list[LocalSite] = field(default_factory=list)
    # Those of `generic` that are given to each example, see `spreading.py`.
    spread: list[str] = field(default_factory=list)
    # Whether the probe is done: from then on what does not run locally is served by the whole model.
    settled: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    batched_backward: bool = True
    vmapped: bool = True
    # Numbers per example that pass through the recorded layers, measured by the last capture.
    activations: int = 0
    # Whether an outer-product factor is written out; fixed by the first batch so that the blocks
    # of all batches can be multiplied with one another.
    written_out: dict[tuple[str, ...], bool] = field(default_factory=dict)

    # Kinds of batches whose rows were proved.
    proved: SignatureSet = field(default_factory=SignatureSet)
    # Ways through the network on which all rows of a batch were compared with plain differentiation; any change of the
    # plan ends them.
    routes: set[Route] = field(default_factory=set)
    # Ways on which several examples were proved in reverse order as well.
    turned_routes: set[Route] = field(default_factory=set)
    # Examples of the batch that comes next which were evaluated in other company, see `spot_checks.py`.
    shown: Any = None
    # The shape of one example's outputs, by the kind of batch.
    shapes: dict[Signature, torch.Size] = field(default_factory=dict)
    # Parameters that no example so far has a gradient path to.
    unreached: set[str] = field(default_factory=set)
    # Those that some outputs depend on, though no gradient path led to them where that was seen.
    felt: set[str] = field(default_factory=set)
    # The number of the next example of the training data.
    numbered: int = 0
    # What comparing captured rows with plain differentiation has taken.
    checking_seconds: float = 0.0
    # Batches of several examples that were compared in full, and those of them that were proved in reverse order, too.
    compared: int = 0
    turned: int = 0
    # The batch that is being captured, for messages.
    where: str = "the training data"
    # Which of the ways to differentiate along a weight change this model takes, see `linearise.py`.
    product: int = 0
    # The one of them that was last compared with a reverse pass.
    confirmed: int | None = None

    def check_reached(self, functional: FunctionalModel) -> None:
        """Let parameters stay where they are that no output of any example depends on.

        Raises:
            ModelError: outputs depend on a parameter that no gradient path leads to, or on no parameter at all; or
                those of more data on one that has stayed since the fit.
        """
        space = functional.space
        hidden = sorted(self.unreached & self.felt)
        if hidden:
            raise ModelError(
                f"no gradient path leads from the output to {hidden} on any example, though outputs depend on them: "
                "nothing can be preserved by them. Leave them out with `parameters=lambda name, p: name not in "
                f"{{{', '.join(map(repr, hidden[:2]))}{', ...' if len(hidden) > 2 else ''}}}`, or look for `.detach()` "
                f"/ `torch.no_grad()` / integer conversions in the forward pass.{_packed(functional)}"
            )
        if self.unreached >= set(space.names):
            raise ModelError(
                f"no output of any example depends on a parameter that takes part: {sorted(self.unreached)[:4]}. Name "
                f"those that the network uses in `parameters=`, or give them `requires_grad`.{_packed(functional)}"
            )
        if moved := set(space.idle) - self.unreached:
            raise ModelError(
                f"outputs of these examples depend on {sorted(moved)[:4]}, on which none did when the posterior was "
                "fitted, so no sample moves them. Fit anew, with all data."
            )
        for name in self.unreached:
            space.leave(name)

    def owners(self, name: str) -> list[Site]:
        return [site for site in self.sites if name in site.names.values()]

    def to_generic(self, name: str, reason: str) -> None:
        """Give up the rules of ``name``; the other parameters of its layers keep theirs."""
        for site in self.owners(name):
            site.names = {k: v for k, v in site.names.items() if v != name}
        self.sites = [site for site in self.sites if site.names]
        if name not in self.generic:
            self.generic.append(name)
        self.reasons[name] = reason


def _packed(functional: FunctionalModel) -> str:
    """Why weights may be without a gradient, or seem to move nothing: rounded away where a layer is quantised."""
    found = quantised(functional.model)
    return f" Quantised layers have no derivative: {found[:5]}. {QUANTISED_MEND}" if found else ""


def make_plan(functional: FunctionalModel) -> CapturePlan:
    """Assign every chosen parameter to the layers that own it, or to the generic path."""
    model, space = functional.model, functional.space
    space.rejoin()
    canonical = {id(p): n for n, p in model.named_parameters()}
    aliases = {n: canonical[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    sites: list[Site] = []
    covered: set[str] = set()
    seen: set[int] = set()
    for path, module in model.named_modules():
        rule = rule_for(module)
        if rule is None or id(module) in seen:
            continue
        seen.add(id(module))
        prefix = f"{path}." if path else ""
        names = {
            local: aliases[prefix + local]
            for local in rule.parameters
            if module._parameters.get(local) is not None
            and aliases[prefix + local] in space.by_name
            and aliases[prefix + local] not in space.masks
        }
        if names:
            sites.append(Site(path, module, rule, names))
            covered.update(names.values())
    plan = CapturePlan(sites, [], unreached=set(space.names))
    owned = _owner_descriptions(model)
    for name in space.names:
        if name not in covered:
            masked = name in space.masks
            why = f"no rule for {owned.get(name, 'its module')}"
            plan.to_generic(name, "single weights of it take part" if masked else why)
    return plan


def _owner_descriptions(model: nn.Module) -> dict[str, str]:
    out = {}
    for path, module in model.named_modules():
        for local, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            out[f"{path}.{local}" if path else local] = type(module).__name__
    return out
