"""Real tables that come with packages, numbers only, split by one of their columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.runner import Unavailable
from nullbayes.datasets import Split

ROWS = 3000  # at most
#: table -> (role, the column whose top fifth is held out)
CLASSIFICATION: dict[str, str] = {
    "breast cancer": "tuning", "cars": "tuning", "travel": "tuning", "wine": "tuning",
    "affairs": "judging", "vote": "judging", "doctor": "judging", "schools": "judging", "weather": "judging",
}  # fmt: skip
REGRESSION: dict[str, str] = {
    "diabetes": "tuning", "cars, fuel": "tuning",
    "weather, warmth": "judging", "marriage, years": "judging", "schools, income": "judging",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Numbers ``(N, d)``, what is to be predicted ``(N,)``, and the column of ``x`` to split by."""

    x: np.ndarray
    y: np.ndarray
    by: int


@dataclass(frozen=True)
class Parts:
    """Standardised by the training part."""

    name: str
    train: Split
    validation: Split
    test: Split
    near: dict[str, Tensor]
    far: dict[str, Tensor]


def _sklearn(loader: str, by: str) -> Table:
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, loader)()
    return Table(bunch.data, bunch.target, [str(c) for c in bunch.feature_names].index(by))


def _statsmodels(name: str) -> Any:
    try:
        import statsmodels.api
    except ModuleNotFoundError as error:
        raise Unavailable("statsmodels is not installed: `pip install statsmodels`") from error
    return getattr(statsmodels.api.datasets, name).load_pandas().data


def _vega(name: str) -> Any:
    try:
        from vega_datasets import local_data
    except ModuleNotFoundError as error:
        raise Unavailable("vega-datasets is not installed: `pip install vega-datasets`") from error
    return getattr(local_data, name)()


def _frame(frame: Any, target: Any, by: str, without: tuple[str, ...] = ()) -> Table:
    x = frame.drop(columns=list(without)).select_dtypes("number")
    whole = x.notna().all(axis=1) & target.notna()
    y = np.asarray(target[whole])
    return Table(np.asarray(x[whole], dtype=np.float64).copy(), y.copy(), list(x.columns).index(by))


def _thirds(values: Any) -> Any:
    """0, 1, 2: below, within and above the middle third."""
    low, high = values.quantile([1 / 3, 2 / 3])
    return (values > low).astype(int) + (values > high).astype(int)


def _cars() -> Table:
    frame = _vega("cars")
    return _frame(frame, frame["Origin"].map({"USA": 0, "Europe": 1, "Japan": 2}), "Horsepower")


def _travel() -> Table:
    frame = _statsmodels("modechoice")
    chosen = frame[frame["choice"] == 1]  # one row a person: the mode taken
    return _frame(chosen, chosen["mode"].astype(int) - 1, "hinc", ("individual", "mode", "choice"))


def _affairs() -> Table:
    frame = _statsmodels("fair")
    return _frame(frame, (frame["affairs"] > 0).astype(int), "age", ("affairs",))


def _vote() -> Table:
    frame = _statsmodels("anes96")
    return _frame(frame, frame["vote"].astype(int), "age", ("vote", "popul"))


def _doctor() -> Table:
    frame = _statsmodels("randhie")
    return _frame(frame, (frame["mdvis"] > 2).astype(int), "disea", ("mdvis",))


def _schools(target: str = "") -> Table:
    frame = _statsmodels("star98")
    if target:
        return _frame(frame, frame[target], "PTRATIO", (target, "NABOVE", "NBELOW"))
    share = frame["NABOVE"] / (frame["NABOVE"] + frame["NBELOW"])
    return _frame(frame, _thirds(share), "AVYRSEXP", ("NABOVE", "NBELOW"))


def _weather() -> Table:
    frame = _vega("seattle_weather")
    wet = frame["weather"].isin(["rain", "drizzle", "snow"]).astype(int)
    return _frame(frame, wet, "temp_max", ("precipitation",))


LOADERS: dict[str, Callable[[], Table]] = {
    "breast cancer": lambda: _sklearn("load_breast_cancer", "mean radius"),
    "wine": lambda: _sklearn("load_wine", "alcohol"),
    "diabetes": lambda: _sklearn("load_diabetes", "bmi"),
    "cars": _cars,
    "travel": _travel,
    "affairs": _affairs,
    "vote": _vote,
    "doctor": _doctor,
    "schools": _schools,
    "weather": _weather,
    "cars, fuel": lambda: _frame(
        _vega("cars"), _vega("cars")["Miles_per_Gallon"], "Weight_in_lbs", ("Miles_per_Gallon",)
    ),
    "weather, warmth": lambda: _frame(
        _vega("seattle_weather"), _vega("seattle_weather")["temp_max"], "temp_min", ("temp_max",)
    ),
    "marriage, years": lambda: _frame(
        _statsmodels("fair"), _statsmodels("fair")["yrs_married"], "age", ("yrs_married",)
    ),
    "schools, income": lambda: _schools("LOWINC"),
}


def shifted(name: str, seed: int) -> Parts:
    """Trained on the lower four fifths of the column; the next tenth is near, the last tenth far.

    Beside the last tenth stand test inputs whose columns were each shuffled for themselves.
    """
    table = LOADERS[name]()
    values = table.x[:, table.by]
    low, high = np.quantile(values, [0.8, 0.9])
    inside = values < low if (values < low).sum() > 0.5 * len(values) else values <= low
    near = ~inside & (values <= high)
    far = ~inside & (values > high)
    if not near.any():  # many rows share one value
        near = ~inside
    return _parts("tables", table, seed, inside, {"next tenth": near}, {"last tenth": far})


def with_gap(name: str, seed: int) -> Parts:
    """Trained without the middle fifth of the column, which is near; far: columns shuffled for themselves."""
    table = LOADERS[name]()
    values = table.x[:, table.by]
    low, high = np.quantile(values, [0.4, 0.6])
    gap = (values > low) & (values < high)
    if not gap.any():  # few values, each of many rows
        gap = (values >= low) & (values <= high)
    return _parts("gaps", table, seed, ~gap, {"gap": gap}, {})


def _parts(
    name: str,
    table: Table,
    seed: int,
    inside: np.ndarray,
    near: dict[str, np.ndarray],
    far: dict[str, np.ndarray],
) -> Parts:
    generator = np.random.default_rng(seed)
    order = generator.permutation(np.flatnonzero(inside))[:ROWS]
    count = len(order)
    pieces = np.split(order, [int(0.6 * count), int(0.75 * count)])
    mean, deviation = table.x[pieces[0]].mean(0), table.x[pieces[0]].std(0)
    deviation = np.where(deviation > 1e-9, deviation, 1.0)

    def inputs(rows: np.ndarray) -> Tensor:
        return torch.from_numpy((table.x[rows] - mean) / deviation).float()

    if np.issubdtype(table.y.dtype, np.floating):
        centre, spread = table.y[pieces[0]].mean(), table.y[pieces[0]].std()
        targets = torch.from_numpy((table.y - centre) / spread).float()[:, None]
        if len(np.unique(table.y)) <= 5:
            targets = torch.from_numpy(table.y.astype(np.int64))
    else:
        targets = torch.from_numpy(table.y.astype(np.int64))
    train, validation, test = (
        Split(inputs(rows), targets[torch.from_numpy(rows)], part)
        for rows, part in zip(pieces, ("train", "validation", "test"), strict=True)
    )
    mixed = test.inputs.clone()
    shuffle = torch.Generator().manual_seed(seed)
    for column in range(mixed.shape[1]):
        mixed[:, column] = mixed[torch.randperm(len(mixed), generator=shuffle), column]
    outside = {k: inputs(generator.permutation(np.flatnonzero(v))) for k, v in near.items()}
    beyond = {k: inputs(generator.permutation(np.flatnonzero(v))) for k, v in far.items()}
    beyond = {k: v for k, v in beyond.items() if len(v) >= 10}
    return Parts(name, train, validation, test, outside, {**beyond, "columns shuffled": mixed})
