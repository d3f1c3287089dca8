"""The user's model stays as it was: what of it, and of the random state, is compared before and after."""

from __future__ import annotations

from typing import Any

import torch

from tests.torture.problems import Problem


def state_of(problem: Problem) -> dict[str, Any]:
    """Values, modes, hooks, flags and attributes of the model, and torch's random state."""
    model = problem.model
    return {
        "values": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "flags": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state().clone(),
        "module dictionaries": [sorted(vars(m)) for m in model.modules()],
    }


def disturbed(problem: Problem, before: dict[str, Any]) -> list[str]:
    """What a user would find changed. (A network that counts its calls changes itself.)"""
    if problem.hostile == "counter":
        return []
    after, out = state_of(problem), []
    moved = [k for k, v in before["values"].items() if not torch.equal(v, after["values"][k])]
    if moved:
        out.append(f"the model's tensors changed: {moved[:3]}")
    if not torch.equal(before["random"], after["random"]) and not problem.hostile:
        out.append("torch's random state changed")
    out += [
        f"the model's {k} changed"
        for k in ("modes", "hooks", "flags", "module dictionaries")
        if before[k] != after[k]
    ]
    if any(p.grad is not None for p in problem.model.parameters()):
        out.append("the model's parameters have gradients")
    return out
