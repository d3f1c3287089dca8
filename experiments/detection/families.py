"""The problems, by family; which are for choices and which are judged was written down before anything was measured.

Digits: all 45 pairs of classes held out; pairs whose sum is a multiple of three are for tuning. Clothes: five pairs
of classes that people confuse or that look alike, the first two for tuning. Tables: what comes with scikit-learn,
statsmodels and vega-datasets; the top tenths of one column held out. Gaps: regressions without the middle fifth of a
column. In every family ``near`` sets resemble the training data and ``far`` sets do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments import shifts
from experiments.detection import tabular
from experiments.detection.base import Given
from experiments.detection.training import OneCycle, trained
from experiments.devices import device
from experiments.runner import Unavailable
from experiments.tasks import digits_network, small_resnet
from nullbayes import datasets
from nullbayes.datasets import Dataset, Split
from nullbayes.demo.training import Recipe
from nullbayes.errors import InputError

TUNING, JUDGING = "tuning", "judging"


@dataclass(frozen=True)
class Problem:
    """A trained network, inputs like its training data, and inputs unlike them."""

    given: Given
    test: Split
    near: dict[str, Tensor]
    far: dict[str, Tensor]
    #: The network trained anew, from other initial weights and in another order: what an ensemble is made of.
    again: Callable[[int], nn.Module] | None = None
    #: With targets; ``given.reference`` are its inputs.
    validation: Split | None = None

    @property
    def accuracy(self) -> float:
        """Of the network on test inputs; R² of a regression."""
        outputs = self.given.logits(self.test.inputs)
        if self.given.kind == "classification":
            return float((outputs.argmax(1) == self.test.targets).double().mean())
        residual = (outputs - self.test.targets).square().mean()
        return float(1 - residual / self.test.targets.var(correction=0))


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    train: int | None = None
    test: int = 1000
    sets: int = 400
    preserved: int = 500
    recipe: Recipe = field(default_factory=lambda: Recipe(60, 64, 3e-3, 1e-2))
    #: Channels of a residual network's stages, and the stride of its first convolution.
    widths: tuple[int, ...] = (16, 32, 64)
    stem_stride: int = 2

    def config(self) -> dict[str, Any]:
        """What a piece depends on; the network only where it is not the usual one."""
        usual = {"widths": Size.widths, "stem_stride": Size.stem_stride}
        return {k: v for k, v in asdict(self).items() if k not in usual or v != usual[k]}


@dataclass(frozen=True)
class Family:
    """Problems of one kind: their names with their roles, how one is made, and how large it is in each setting."""

    name: str
    words: str
    members: dict[str, str]
    make: Callable[[str, int, Size], Problem]
    sizes: dict[str, Size]
    seeds: dict[str, int]
    some: dict[str, tuple[str, ...]]  # members of a setting that has not all of them

    def chosen(self, setting: str) -> Iterator[tuple[str, str]]:
        for member, role in self.members.items():
            if member in self.some.get(setting, self.members):
                yield member, role


def problem(
    train: Callable[[int], nn.Module],
    data: Dataset,
    size: Size,
    seed: int,
    near: dict[str, Tensor],
) -> Problem:
    """Of images: far sets are made from test images."""
    network, test = train(seed), data.test[: size.test]
    given = Given(
        network, data.train, data.validation.inputs, size.preserved, "classification", seed
    )
    far = shifts.altogether(test[: size.sets].inputs, seed)
    return Problem(
        given, test, {k: v[: size.sets] for k, v in near.items()}, far, train, data.validation
    )


def placed(found: Problem, place: torch.device) -> Problem:
    """The network and all inputs on ``place``; targets stay on the CPU, where scores are compared."""
    if place.type == "cpu":
        return found
    torch.backends.cudnn.allow_tf32 = False  # products of ten bits are no float32
    given, test = found.given, found.test
    near, far = ({k: v.to(place) for k, v in sets.items()} for sets in (found.near, found.far))
    given = replace(
        given,
        train=replace(given.train, inputs=given.train.inputs.to(place)),
        network=given.network.to(place),
        reference=given.reference.to(place),
    )
    test = replace(test, inputs=test.inputs.to(place))
    return replace(found, given=given, test=test, near=near, far=far)


# -- digits --------------------------------------------------------------------------------------

PAIRS = {
    f"{a} and {b}": TUNING if (a + b) % 3 == 0 else JUDGING for a in range(10) for b in range(a)
}


def digits(member: str, seed: int, size: Size) -> Problem:
    pair = tuple(int(c) for c in member.split(" and "))
    data = datasets.digits(train=size.train or 500, validation=200, held_out=pair, seed=seed)
    assert data.held_out is not None
    build = functools.partial(digits_network, len(data.classes))
    train = functools.partial(trained, ("digits", member), build, data.train, size.recipe)
    return problem(train, data, size, seed, {"held-out classes": data.held_out.inputs})


# -- clothes -------------------------------------------------------------------------------------

CLOTHES = {
    "T-shirt and shirt": ((0, 6), TUNING),
    "pullover and coat": ((2, 4), TUNING),
    "sandal and sneaker": ((5, 7), JUDGING),
    "trouser and dress": ((1, 3), JUDGING),
    "bag and ankle boot": ((8, 9), JUDGING),
}


def clothes(member: str, seed: int, size: Size) -> Problem:
    try:
        data = datasets.fashion_mnist(train=size.train, validation=2000, seed=seed)
    except InputError as error:
        raise Unavailable(str(error)) from error
    pair = CLOTHES[member][0]
    train, _ = datasets.hold_out_classes(data.train, pair)
    validation, _ = datasets.hold_out_classes(data.validation, pair)
    test, outside = datasets.hold_out_classes(data.test, pair)
    kept = Dataset(data.name, train, validation, test)
    build = functools.partial(small_resnet, 8, widths=size.widths, stem_stride=size.stem_stride)
    recipe = functools.partial(
        trained, ("clothes", member), build, train, size.recipe, augmented=True
    )
    small = datasets.digits(train=1, validation=0, seed=seed).test.inputs[: size.sets]
    found = problem(recipe, kept, size, seed, {"held-out classes": outside.inputs})
    found = replace(found, far={"digits": datasets.rescaled(small, 28), **found.far})
    return placed(found, device()) if size.train is None else found


# -- tables --------------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, rate: float = 0.0) -> nn.Module:
    """Two hidden layers of 64 rectified units."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, outputs),
    )  # fmt: skip


def tables(member: str, seed: int, size: Size) -> Problem:
    return _table(tabular.shifted(member, seed), member, seed, size)


def gaps(member: str, seed: int, size: Size) -> Problem:
    return _table(tabular.with_gap(member, seed), member, seed, size)


def _table(table: tabular.Parts, member: str, seed: int, size: Size) -> Problem:
    kind = "regression" if table.train.targets.is_floating_point() else "classification"
    outputs = 1 if kind == "regression" else int(table.train.targets.max()) + 1
    build = functools.partial(mlp, table.train.inputs.shape[1], outputs)
    train = functools.partial(
        trained, (table.name, member), build, table.train, size.recipe, kind=kind
    )
    given = Given(train(seed), table.train, table.validation.inputs, size.preserved, kind, seed)
    near = {k: v[: size.sets] for k, v in table.near.items()}
    far = {k: v[: size.sets] for k, v in table.far.items()}
    return Problem(given, table.test[: size.test], near, far, train, table.validation)


SETTINGS = ("small", "processor", "full")
SEEDS = {"small": 1, "processor": 1, "full": 3}
_LARGE = OneCycle(20, 512, 0.3, 1e-3)  # 48,000 images to 93 % and more
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "digits",
            "scikit-learn's digits (8 × 8) without two classes; two convolutions and two dense layers, tanh",
            PAIRS,
            digits,
            {**dict.fromkeys(SETTINGS, Size(500)), "small": Size(300, 200, 80, 150)},
            SEEDS,
            {
                "small": ("3 and 0", "4 and 0"),
                "processor": ("3 and 0", "4 and 0", "7 and 1", "9 and 8"),
            },
        ),
        Family(
            "clothes",
            "Fashion-MNIST without two classes; residual network with BatchNorm, trained with shifts and flips",
            {name: role for name, (_, role) in CLOTHES.items()},
            clothes,
            {
                "small": Size(800, 80, 30, 40, Recipe(6, 64, 3e-3, 1e-2)),
                "processor": Size(5000, 500, 200, 300, Recipe(6, 64, 3e-3, 1e-2)),
                "full": Size(None, 1000, 300, 500, _LARGE, (32, 64, 128), 1),
            },
            SEEDS,
            dict.fromkeys(("small", "processor"), ("T-shirt and shirt", "sandal and sneaker")),
        ),
        Family(
            "tables",
            "classification of tables without the top fifth of one column; two hidden layers of 64 rectified units",
            tabular.CLASSIFICATION,
            tables,
            dict.fromkeys(SETTINGS, Size()),
            SEEDS,
            {},
        ),
        Family(
            "gaps",
            "regression of tables without the middle fifth of one column; two hidden layers of 64 rectified units",
            tabular.REGRESSION,
            gaps,
            dict.fromkeys(SETTINGS, Size()),
            SEEDS,
            {},
        ),
    )
}
