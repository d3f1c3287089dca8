"""Who accounts for which parameter: layers with a rule, the smallest module around others, or the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from nullbayes.jacobian.capture.single_module import LocalSite
from nullbayes.jacobian.layers.rule import LayerRule, rule_for
from nullbayes.model.functional import FunctionalModel


@dataclass
class Site:
    """One module with a rule: its parameters' canonical names by local name."""

    path: str
    module: nn.Module
    rule: LayerRule
    names: dict[str, str]
    batch_axis: int = 0


@dataclass
class CapturePlan:
    """Who accounts for which parameter. Settled by the probe, then fixed for the whole fit."""

    sites: list[Site]
    # Without a rule. Those of `local` cost one module's passes, the others those of the whole model.
    generic: list[str]
    local: list[LocalSite] = field(default_factory=list)
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


def make_plan(functional: FunctionalModel) -> CapturePlan:
    """Assign every chosen parameter to the layers that own it, or to the generic path."""
    model, space = functional.model, functional.space
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
        }
        if names:
            sites.append(Site(path, module, rule, names))
            covered.update(names.values())
    plan = CapturePlan(sites, [])
    owned = _owner_descriptions(model)
    for name in space.names:
        if name not in covered:
            plan.to_generic(name, f"no rule for {owned.get(name, 'its module')}")
    return plan


def _owner_descriptions(model: nn.Module) -> dict[str, str]:
    out = {}
    for path, module in model.named_modules():
        for local in module._parameters:
            out[f"{path}.{local}" if path else local] = type(module).__name__
    return out
