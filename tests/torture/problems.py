"""A random network with data, likelihood and settings: everything that one fit needs, from one integer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from tests.torture import layers as own
from tests.torture.choices import Choices
from tests.torture.networks import LONGEST, Drawing, draw

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Task:
    """What the outputs explain, in terms that the judge and the library both get: plain values.

    Attributes:
        kind: classification, soft, binary, regression, squares (a callable loss) or heads (of a dictionary).
        weight: of classes; ``noise``: the given observation variance, None: estimated.
    """

    kind: str
    outputs: int
    weight: list[float] | None = None
    ignored: bool = False
    noise: float | None = None
    flat: bool = False  # outputs (B,) instead of (B, 1)


@dataclass
class Problem:
    """One fit: the model, its batches, and how to ask for the posterior.

    Attributes:
        batches: ``(inputs, targets)``, inputs a tuple of tensors ``(x, mask, positions)`` of which some are absent.
        shared: indices into the inputs of tensors that all examples share.
        queries: batches of inputs to predict.
        options: of the posterior's constructor; ``solver`` by name.
    """

    words: list[str]
    model: nn.Module
    task: Task
    batches: list[tuple[tuple[Tensor, ...], Tensor]]
    shared: tuple[int, ...]
    names: tuple[str, ...]
    queries: list[tuple[Tensor, ...]]
    dtype: torch.dtype
    kind: str
    options: dict[str, Any]
    samples: int = 4
    hostile: str = ""
    mapping: bool = False
    no_disk: bool = False
    stored: bool = False
    more: int = 0
    frozen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = [len(y) for _, y in self.batches]
        options = {k: v for k, v in self.options.items() if v is not None}
        return (
            f"{'; '.join(self.words)} | {self.task} | {self.dtype} | {self.kind} {options} | batches {sizes} of "
            f"{[tuple(t.shape[1:]) for t in self.batches[0][0]]}, queries {[len(q[0]) for q in self.queries]}"
        )


def problem(c: Choices, torch_seed: int) -> Problem:
    """The problem that ``c`` decides on, with tensors from ``torch_seed``; torch's global stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)
        return _problem(c)


def _problem(c: Choices) -> Problem:
    d = draw(c)
    dtype = DTYPES[c.pick(["float64"] * 9 + ["float32"] * 7 + ["bfloat16"])]
    if dtype == torch.bfloat16 and any("orthogonal" in word for word in c.words):
        dtype = torch.float32  # torch has no Householder product in half precision
    task = _task(c, d)
    model = _warmed(_headed(c, d, task)).to(dtype).eval()
    frozen = _frozen(c, model)
    sizes = c.pick(
        [[4, 2], [3, 3, 1], [6], [1, 1, 1, 1], [1, 4], [4, 1], [1, 3, 3], [2, 2, 2, 2, 2]]
    )
    data = [_batch(d, size, dtype, c) for size in sizes]
    batches = [(x, _targets(task, d, size, dtype)) for x, size in zip(data, sizes, strict=True)]
    length = d.start.size[0] if d.start.kind in ("tokens", "ids") else 3
    queries = [_batch(d, size, dtype, c) for size in sorted({1, 5, length})]
    here = [True, d.mask, bool(d.positions)]
    names = tuple(n for n, there in zip(("x", "mask", "positions"), here, strict=True) if there)
    together = {"mask": d.shared, "positions": d.positions == "shared"}
    kind, options = _options(c, task, model)
    chosen = Problem(
        c.words,
        model,
        task,
        batches,
        tuple(i for i, n in enumerate(names) if together.get(n, False)),
        names,
        queries,
        dtype,
        kind,
        options,
        hostile=d.hostile,
        frozen=frozen,
    )
    # Positions without a mask can only be named; otherwise a mapping is one more way to pass the same.
    chosen.mapping = names == ("x", "positions") or c.rarely(8)
    with (
        torch.no_grad()
    ):  # a network that does not run is a fault of the drawing, not of the library
        for inputs in [*data, *queries]:
            model(**dict(zip(names, inputs, strict=True)))
    chosen.no_disk, chosen.stored, chosen.more = c.rarely(2), c.rarely(6), c.pick([0, 0, 0, 2])
    return chosen


def _task(c: Choices, d: Drawing) -> Task:
    kind = c.pick(["regression", "classification", "binary", "soft", "squares", "heads"])
    outputs = c.pick([2, 3, 1, 4])
    task = Task(kind, outputs)
    if kind in ("classification", "soft"):
        task.outputs = max(2, outputs)
        if c.rarely(4):
            task.weight = [1.0, 0.25, 2.0, 0.5][: task.outputs]
        task.ignored = kind == "classification" and c.rarely(4)
    elif kind == "regression":
        task.noise = c.pick([1.0, None, 0.1])
    if kind == "heads" and d.out.kind != "vector":
        task.kind = "squares"
    c.say(f"-> {task.kind}({task.outputs})")
    return task


def _headed(c: Choices, d: Drawing, task: Task) -> nn.Module:
    width = d.out.width
    heads: list[nn.Module] = [nn.Linear(width, task.outputs)]
    how = ""
    if task.kind == "heads":
        heads, how = [nn.Linear(width, task.outputs), nn.Linear(width, 2)], "dict"
    elif task.outputs == 1 and task.kind in ("regression", "binary") and d.out.kind == "vector":
        how = c.pick(["", "", "squeeze(-1)", "squeeze()"])
    task.flat = how.startswith("squeeze")
    if how:
        c.say(how)
    return own.Network(list(d.model), heads, how)  # type: ignore[arg-type]


def _warmed(model: nn.Module) -> nn.Module:
    """Norms and PReLU away from their trivial starting values, and a head that is not all confident."""
    for module in model.modules():
        if isinstance(
            module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
        ):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point():
                    tensor.data.copy_(torch.rand_like(tensor) + 0.5)
    return model


def _frozen(c: Choices, model: nn.Module) -> list[str]:
    """Some parameters do not ask for a gradient; at least one does."""
    if not c.rarely(5):
        return []
    names = [n for n, _ in model.named_parameters()]
    start = c.pick(list(range(len(names))))
    chosen = names[start : start + 2]
    if len(chosen) < len(names):
        for n in chosen:
            model.get_parameter(n).requires_grad_(False)
        c.say(f"frozen {chosen}")
        return chosen
    return []


def _batch(d: Drawing, size: int, dtype: torch.dtype, c: Choices) -> tuple[Tensor, ...]:
    shape = d.start.size
    if d.varying:
        shape = (c.pick([shape[0], 2, LONGEST - 1]), *shape[1:])
    if d.start.kind == "ids":
        x = torch.randint(0, d.vocabulary, (size, *shape))
    else:
        x = torch.randn(size, *shape, dtype=torch.float64).to(dtype)
    out = [x]
    if d.mask:
        lead = shape[0] if d.shared else size
        mask = torch.rand(lead, shape[0]) < 0.6
        mask[:, 0] = True
        out.append(torch.tril(torch.ones_like(mask)) if d.shared else mask)
    if d.positions:
        lead = 1 if d.positions == "shared" else size
        out.append(torch.arange(shape[0]).flip(0).expand(lead, -1).contiguous())
    return tuple(out)


def _targets(task: Task, d: Drawing, size: int, dtype: torch.dtype) -> Tensor:
    lead = (size,) if d.out.kind == "vector" else (size, d.out.size[0])
    width = () if task.flat else (task.outputs,)
    if task.kind == "classification":
        labels = torch.randint(0, task.outputs, lead)
        return torch.where(torch.rand(lead) < 0.3, -100, labels) if task.ignored else labels
    if task.kind == "soft":
        return torch.rand(*lead, task.outputs, dtype=torch.float64).softmax(-1).to(dtype)
    if task.kind == "binary":
        return torch.randint(0, 2, (*lead, *width)).to(dtype)
    if task.kind == "heads":
        return torch.randint(0, 2, (size,))
    return torch.randn(*lead, *width, dtype=torch.float64).to(dtype)


# -- how to ask --------------------------------------------------------------------------------------

SOLVERS: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "dual": lambda: nb.solvers.DualCholesky(),
    "primal": lambda: nb.solvers.PrimalQR(),
    "cg": lambda: nb.solvers.ConjugateGradient(),
    "cg tight": lambda: nb.solvers.ConjugateGradient(1e-8, max_iterations=2000),
    "cg subset": lambda: nb.solvers.ConjugateGradient(preconditioner="subset"),
    "cg kronecker": lambda: nb.solvers.ConjugateGradient(preconditioner="kronecker"),
    "alternating": lambda: nb.solvers.AlternatingProjections(),
}


def _options(c: Choices, task: Task, model: nn.Module) -> tuple[str, dict[str, Any]]:
    kind = c.pick(["null space", "null space", "Laplace"])
    preserve = c.pick(["predictions", "outputs", "loss"])
    out: dict[str, Any] = {
        "preserve": preserve,
        "solver": c.pick(["auto", "auto", *list(SOLVERS)[1:]]),
        "prior": c.pick(["one", "evidence", "by tensor"]),
        "memory": c.pick([None] * 6 + ["100kB", "300kB", "1MB"]),
        "directions": c.pick([None, None, 1, 2, "auto"]) if preserve == "predictions" else None,
        "delta": c.pick([0.0, 1e-4, 1e-2]) if kind == "null space" else None,
    }
    if c.rarely(6):
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        out["parameters"] = names[c.pick([0, 1]) :: 2] or names
    return kind, out


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """A robust loss of the user's own: (B,)."""
    return F.smooth_l1_loss(outputs, targets, reduction="none", beta=0.5).flatten(1).sum(1)


def heads(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """A loss of two outputs: (B,)."""
    cost = outputs["first"].square().flatten(1).sum(1)
    return cost + F.cross_entropy(outputs["second"], targets, reduction="none")


def likelihood(task: Task) -> Any:
    """The library's object, or callable, for ``task``."""
    if task.kind in ("classification", "soft"):
        return nb.Classification(weight=task.weight)
    if task.kind == "binary":
        return nb.Binary()
    if task.kind == "regression":
        return nb.Regression(task.noise)
    return squares if task.kind == "squares" else heads
