"""Tables of rules for kinds of modules, of which rooms above have one each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from torch import nn


class Supports(Protocol):
    """What every rule says: whether it holds for a module's settings."""

    def supports(self, module: Any) -> bool: ...


Rule = TypeVar("Rule", bound=Supports)


class ModuleRules(Generic[Rule]):
    """Rules by class of module; classes of packages that need not be installed stand by their qualified name."""

    def __init__(self) -> None:
        self.table: dict[type[nn.Module] | str, Rule] = {}

    def register(self, *kinds: type[nn.Module] | str) -> Callable[[type[Rule]], type[Rule]]:
        """Class decorator: use this rule for modules of these classes (or of these ``"module.Class"`` names)."""

        def decorate(rule: type[Rule]) -> type[Rule]:
            for kind in kinds:
                self.table[kind] = rule()
            return rule

        return decorate

    def rule_for(self, module: nn.Module) -> Rule | None:
        """The rule of the nearest registered ancestor whose ``forward`` the class still runs."""
        for kind in type(module).__mro__:
            rule = self.table.get(kind) or self.table.get(f"{kind.__module__}.{kind.__qualname__}")
            if rule is not None:
                same = type(module).forward is getattr(kind, "forward", None)
                return rule if same and rule.supports(module) else None
        return None
