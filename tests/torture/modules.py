"""PyTorch's own database of modules as one more source: each is right, or refused with an error of the library's.

What is right is found out by the same dense reference as for random networks. Modules that mix the examples of a batch
along every axis have to be refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.torture.judge import Verdict, judge
from tests.torture.problems import Problem, Task
from tests.torture.reference import separate

BATCHES = (3, 2)
# Modules of the database that make no outputs from weights or inputs that a loader could bring.
LEFT_OUT = ("Loss", "LazyConv", "Flatten", "Transformer_")


@dataclass
class Sample:
    """A module as the database makes it, with one of its inputs."""

    name: str
    number: int
    module: nn.Module
    inputs: tuple[Any, ...]
    options: dict[str, Any]


class Around(nn.Module):
    """The module with its examples on the first axis and its output flat; a layer before it, where it has no weights.

    Args:
        axis: of the examples, in what the module itself takes and gives.
        along: which of the further inputs bring one entry an example (``a1``, ``a2``, ...); the rest stay.
    """

    def __init__(self, sample: Sample, axis: int, along: list[int]) -> None:
        super().__init__()
        self.core, self.given, self.options = sample.module, sample.inputs, sample.options
        self.axis, self.along = axis, along
        first = sample.inputs[0]
        bare = not any(True for _ in sample.module.parameters())
        self.before = (
            nn.Linear(first.shape[-1], first.shape[-1]).to(first.dtype) if bare else nn.Identity()
        )

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        given = [self.before(x).movedim(0, self.axis), *self.given[1:]]
        for i in self.along:
            given[i] = more[f"a{i}"].movedim(0, self.axis)
        out = self.core(*given, **self.options)
        while isinstance(out, (tuple, list)):
            out = out[0]
        return out.movedim(self.axis, 0).reshape(len(x), -1)


def samples() -> Iterator[Sample]:
    """Every input of every module of the database, on the processor, in float64 and evaluation mode."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if any(part in info.name for part in LEFT_OUT) or torch.float64 not in info.dtypes:
            continue
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=False, training=False
            )
            for number, one in enumerate(made):
                if one.forward_input is None:
                    continue
                build = one.constructor_input
                try:
                    module = info.module_cls(*build.args, **build.kwargs).double().eval()
                except Exception:  # not on this machine
                    continue
                given = one.forward_input
                yield Sample(info.name, number, module, tuple(given.args), dict(given.kwargs))


def problem_of(sample: Sample) -> Problem | None:
    """The fit of a module; None where no loader could bring its input, or the module does not run on other batches.

    Examples lie on the first axis along which they are separate; where there is none, only a refusal is right.
    """
    first = sample.inputs[0] if sample.inputs else None
    if not isinstance(first, Tensor) or not first.ndim or first.is_complex() or not first.numel():
        return None
    weights = sum(p.numel() for p in sample.module.parameters())
    if weights > 20_000 or (not weights and not first.is_floating_point()):
        return None
    found = [made for axis in (0, 1) if (made := _along(sample, axis)) is not None]
    apart = [made for made in found if separate(made)]
    if apart:
        return apart[0]
    # (Of several inputs, some may be taken for shared by all examples, and then the examples are separate after all.)
    if found and len(found[0].names) == 1:
        found[0].hostile = "mixed examples"
        return found[0]
    return None


def _along(sample: Sample, axis: int) -> Problem | None:
    first = sample.inputs[0]
    if first.ndim <= axis:
        return None
    count = first.shape[axis]
    along = [
        i
        for i, t in enumerate(sample.inputs)
        if i and isinstance(t, Tensor) and t.ndim > axis and t.shape[axis] == count
    ]
    model = Around(sample, axis, along).eval()
    batches = []
    try:
        for size in BATCHES:
            parts = []
            for i in (0, *along):
                t = sample.inputs[i].detach().movedim(axis, 0)[torch.arange(size) % count].clone()
                parts.append(t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t)
            with torch.no_grad():
                out = model(parts[0], **{f"a{i}": t for i, t in zip(along, parts[1:], strict=True)})
            batches.append((tuple(parts), torch.randn_like(out)))
        single = tuple(t[:1] for t in batches[1][0])
        with torch.no_grad():
            model(single[0], **{f"a{i}": t for i, t in zip(along, single[1:], strict=True)})
    except Exception:  # it takes no other number of examples than it was given
        return None
    if not out.is_floating_point() or not 0 < out.shape[1] <= 120 or not bool(out.isfinite().all()):
        return None
    options: dict[str, Any] = {
        "preserve": "outputs",
        "solver": "auto",
        "prior": "one",
        "delta": 0.0,
    }
    return Problem(
        words=[f"{sample.name} {sample.number}"],
        model=model,
        task=Task("regression", int(out.shape[1]), noise=1.0),
        batches=batches,
        shared=(),
        names=("x", *(f"a{i}" for i in along)),
        queries=[single, batches[0][0]],
        dtype=torch.float64,
        kind="null space",
        options=options | {"memory": None, "directions": None},
        samples=3,
        mapping=bool(along),
    )


def run(every: int = 1) -> list[tuple[str, Verdict]]:
    """Judge every ``every``-th module and input of the database."""
    out = []
    with torch.random.fork_rng(devices=[]):
        for number, sample in enumerate(samples()):
            if number % every:
                continue
            chosen = problem_of(sample)
            if chosen is not None:
                out.append((chosen.words[0], judge(chosen)))
    return out
