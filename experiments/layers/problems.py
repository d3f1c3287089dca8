"""Every task of the evaluation and three new ones as problems with roles: what is tuned on and what is judged.

Families of which members are for tuning come with both; tasks of which there is one network alone are judged only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments import (
    fashion_lenet,
    fashion_resnet,
    networks,
    shifts,
    swin,
    tabular,
    tasks,
    toy,
)
from experiments.detection.base import Given
from experiments.detection.families import (
    FAMILIES,
    JUDGING,
    SETTINGS,
    TUNING,
    Family,
    Problem,
    Size,
)
from experiments.detection.families import trained as trained_as_asked
from experiments.layers import sequences
from experiments.tasks import Scale, Task
from nullbayes.datasets import hold_out_classes, in_between
from nullbayes.demo.models import curve_net
from nullbayes.demo.training import Recipe

#: The evaluation's own tasks, with their small or full scale.
SCALES: dict[str, dict[str, Scale]] = {
    "fashion_lenet": fashion_lenet.SCALES,
    "fashion_resnet": fashion_resnet.SCALES,
    "swin": swin.SCALES,
    **dict.fromkeys(tabular.SETS, tabular.SCALES),
}
THREE = {"small": 1, "processor": 3, "full": 3}
TEN = {"small": 1, "processor": 3, "full": 10}
#: Validation examples that anything is tuned on, at most.
VALIDATION = 150


def settled(member: str, seed: int, size: Size, setting: str) -> Problem:
    """A task of the evaluation with something held out, which is near; far are its sets from elsewhere.

    Of clothes two classes (sandals and sneakers, as of the residual network of ``clothes``), of a table the rows that
    are in the top fifth of its first column.
    """
    task = tasks.make(member, seed, SCALES[member]["full" if setting == "full" else "small"])
    task, near = _without_classes(task) if task.kind == "classification" else _without_rows(task)
    network, data = networks.trained(task), task.data
    kind = task.kind
    given = Given(network, data.train, data.validation.inputs, size.preserved, kind, seed)
    far = dict(task.outside) or {"columns shuffled": _mixed(data.test.inputs, seed)}
    near, far = ({k: v[: size.sets] for k, v in sets.items()} for sets in (near, far))
    again = functools.partial(_member, task)
    return Problem(given, data.test[: size.test], near, far, again, data.validation)


#: Sandals and sneakers.
HELD_OUT = (5, 7)


def _without_classes(task: Task) -> tuple[Task, dict[str, Tensor]]:
    """The task with eight classes, and images of the other two that no network saw."""
    data, options = task.data, task.scale.options
    (train, _), (validation, _), (test, outside) = (
        hold_out_classes(split, HELD_OUT) for split in (data.train, data.validation, data.test)
    )
    builds: dict[str, Callable[[float], torch.nn.Module]] = {
        "fashion_lenet": functools.partial(tasks.lenet, 8),
        "fashion_resnet": functools.partial(tasks.small_resnet, 8, **options),
        "swin": functools.partial(swin.build, {**options, "num_labels": 8}),
    }
    kept = replace(data, train=train, validation=validation, test=test)
    inside = task.data.test[: task.scale.outside].inputs
    elsewhere = {"digits": task.outside["digits"], **shifts.altogether(inside, task.seed)}
    return (
        replace(
            task,
            data=kept,
            build=builds[task.name],
            identity={**task.identity, "held_out": HELD_OUT},
            outside=elsewhere,
            pretrained=None,
        ),
        {"held-out classes": outside.inputs},
    )


def _without_rows(task: Task) -> tuple[Task, dict[str, Tensor]]:
    """The task below the top fifth of the first column, by its training data, and all rows that are in it."""
    data = task.data
    edge = data.train.inputs[:, 0].quantile(0.8)
    splits = (data.train, data.validation, data.test)
    kept = [split[split.inputs[:, 0] <= edge] for split in splits]
    above = torch.cat([split.inputs[split.inputs[:, 0] > edge] for split in splits])
    data = replace(data, train=kept[0], validation=kept[1], test=kept[2])
    found = replace(task, data=data, identity={**task.identity, "below": 0.8})
    return found, {"top fifth": above}


def _member(task: Task, seed: int) -> torch.nn.Module:
    return networks.trained(task, f"member-{seed // 1000}")


def _mixed(x: Tensor, seed: int) -> Tensor:
    """Each column in an order of its own."""
    order = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).argsort(0)
    return x.gather(0, order)


def pictures(member: str, seed: int, size: Size) -> Problem:
    """The pictures in one and two dimensions: a curve with a gap, and two moons."""
    return (curve if member == "curve" else moons)(member, seed, size)


def curve(member: str, seed: int, size: Size) -> Problem:
    """Near: inside the gap; far: beyond the data on both sides."""
    c = toy.CURVE
    train, validation, test = (
        in_between(n, noise=c["noise"], seed=seed + at, dtype=torch.float64)
        for n, at in ((c["points"], 0), (50, 500), (400, 1000))
    )
    recipe = Recipe(c["epochs"], c["points"], 1e-2, c["weight_decay"])
    make = functools.partial(
        trained_as_asked, ("curve", member), _curve, train, recipe, kind="regression"
    )
    gap = torch.linspace(-c["gap"], c["gap"], 200, dtype=torch.float64)[:, None]
    side = torch.linspace(2.1, c["reach"], 100, dtype=torch.float64)[:, None]
    given = Given(make(seed), train, validation.inputs, size.preserved, "regression", seed)
    far = {"beyond the data": torch.cat([-side, side])}
    return Problem(given, test, {"gap": gap}, far, make, validation)


def _curve(_: float) -> torch.nn.Module:
    return curve_net(toy.CURVE["width"]).double()


def moons(member: str, seed: int, size: Size) -> Problem:
    """Near: between .6 and 1 from every training point; far: more than 1 away."""
    c = toy.MOONS
    train, validation, test = (
        toy.moons(seed + at, n) for at, n in ((0, 200), (500, 200), (1000, 1000))
    )
    recipe = Recipe(c["epochs"], 50, 1e-2, c["weight_decay"])
    make = functools.partial(trained_as_asked, ("moons", member), _moons, train, recipe)
    side = torch.linspace(-4, 4, c["grid"], dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    apart = torch.cdist(grid, train.inputs).amin(1)
    given = Given(make(seed), train, validation.inputs, size.preserved, "classification", seed)
    near, far = grid[(apart > 0.6) & (apart <= 1.0)], grid[apart > 1.0]
    return Problem(given, test, {"around the moons": near}, {"far away": far}, make, validation)


def _moons(_: float) -> torch.nn.Module:
    return toy.moons_network(toy.MOONS["width"])


# -- families ------------------------------------------------------------------------------------


def _one(
    name: str,
    words: str,
    make: Callable[..., Problem],
    seeds: dict[str, int],
    size: Size,
    *,
    member: str = "",
    small: bool = False,
) -> Family:
    """One problem, named ``member`` if not as the family; ``small``: that setting has it, too."""
    some: dict[str, tuple[str, ...]] = {} if small else {"small": ()}
    sizes = dict.fromkeys(SETTINGS, size)
    return Family(name, words, {member or name: JUDGING}, make, sizes, seeds, some)


#: What a piece of these depends on beside its size: what is held out; or which texts.
MARKS: dict[str, Any] = {
    **{key: {"held_out": list(HELD_OUT)} for key in ("fashion_lenet", "fashion_resnet", "swin")},
    "tabular": {"below": 0.8},
    "texts": {"edition": 2},
}


def _sequences(few: Size) -> list[Family]:
    """Networks over words, sounds and outlines."""
    sequence = replace(few, recipe=Recipe(40, 32, 3e-3, 1e-2))
    text = replace(few, recipe=Recipe(12, 64, 2e-3, 1e-2), preserved=300)
    return [
        Family(
            name, words, members, make,
            sizes=dict.fromkeys(SETTINGS, size), seeds=TEN,
            some={"small": tuple(members)[:2] if name == "voices" else (), "processor": tuple(members)[:2]},
        )
        for name, words, members, make, size in (
            (
                "texts",
                "**new**: what a docstring is about, one subject held out; one transformer layer over 40 words",
                sequences.TEXTS, sequences.docstrings, text,
            ),
            (
                "voices",
                "**new**: who speaks two vowels, two of nine speakers held out; LSTM over 25 times",
                sequences.VOICES, sequences.voices, sequence,
            ),
            (
                "leaves",
                "**new**: species by the outline of a leaf, two of six held out; three convolutions with BatchNorm",
                sequences.LEAVES, sequences.leaves, sequence,
            ),
        )
    ]  # fmt: skip


def _sizes(few: Size, family: Family) -> dict[str, Size]:
    return {**dict.fromkeys(SETTINGS, few), "full": family.sizes["full"]}


def families(setting: str) -> dict[str, Family]:
    """By name, those of the evaluation first."""
    few = Size(preserved=500, test=500, sets=200)
    clothes = Size(3000, 300, 100, 200, Recipe(6, 64, 3e-3, 1e-2))
    own = functools.partial(settled, setting=setting)
    found = [
        replace(
            FAMILIES["digits"],
            seeds=THREE,
            sizes=_sizes(replace(few, train=500), FAMILIES["digits"]),
            some={"small": ("3 and 0", "4 and 0"), "processor": ("3 and 0", "4 and 0", "7 and 1")},
        ),
        *(
            replace(
                FAMILIES[name],
                seeds=TEN,
                sizes=_sizes(few, FAMILIES[name]),
                some={"small": small},
            )
            for name, small in (
                ("tables", ("cars", "travel", "vote", "schools")),
                ("gaps", ("cars, fuel", "weather, warmth")),
            )
        ),
        Family(
            "tabular",
            "regression of tables without the top fifth of a column; two hidden layers of 50 tanh units, float64",
            dict.fromkeys(tabular.SETS, JUDGING),
            own,
            dict.fromkeys(SETTINGS, few),
            TEN,
            {"small": ("diabetes", "wine")},
        ),
        _one("pictures", "a curve with a gap", pictures, TEN, few, member="curve", small=True),
        _one(
            "moons", "two moons in the plane; two hidden layers of 32 tanh units, float64", pictures, TEN, few,
            small=True,
        ),
        *_sequences(few),
        _one(
            "fashion_lenet", "Fashion-MNIST without two classes, LeNet", own, THREE, replace(few, preserved=300),
            small=True,
        ),
        _one("fashion_resnet", "Fashion-MNIST without two classes, residual network with BatchNorm", own, THREE, few),
        replace(
            FAMILIES["clothes"],
            seeds=THREE,
            sizes=_sizes(clothes, FAMILIES["clothes"]),
            some={"small": (), "processor": FAMILIES["clothes"].some["processor"]},
        ),
        _one(
            "swin", "Fashion-MNIST without two classes, Swin transformer", own, {**THREE, "full": 1},
            replace(few, preserved=100),
        ),
    ]  # fmt: skip
    return {family.name: family for family in found}


__all__ = ["JUDGING", "TUNING", "Family", "Problem", "Size", "families"]
