"""The trained network alone, and the same with one temperature chosen on validation data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from experiments.methods.base import Case, Draws, Method, Variant, network_outputs, tune

# Temperatures need a finer path than variances do: 0.03 to 30 in eighths of a decade, then in thirds of those.
EIGHTHS = tuple(k / 8 for k in range(-12, 13))
FINER = (-1 / 12, -1 / 24, 1 / 24, 1 / 12)


def tuned_temperature(case: Case, draws: Draws) -> tuple[float, dict[str, list[float]]]:
    """The temperature of least validation NLL for draws at the validation inputs."""

    def nll(values: list[float]) -> list[float]:
        return [
            case.nll(Draws(draws.outputs, draws.centre, {}, t), case.validation.targets)
            for t in values
        ]

    best = tune(1.0, nll, EIGHTHS, FINER)
    return best.value, best.path


def temperature_words(case: Case) -> str:
    return "temperature" if case.task.kind == "classification" else "noise"


class PointEstimate(Method):
    """The trained network; its score is the entropy of its prediction."""

    name = "point"

    def build(self, case: Case) -> None:
        self.network = case.network

    def tune(self, case: Case) -> dict[str, Variant]:
        return {"point": Variant("point estimate", "nothing", headline=True)}

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        return {key: Draws(network_outputs(self.network, x)[None]) for key in only}


class TemperatureScaling(Method):
    """Guo, Pleiss, Sun, Weinberger, *On calibration of modern neural networks*, ICML 2017.

    For regression the noise variance takes the place of the temperature.
    """

    name = "temperature"

    def build(self, case: Case) -> None:
        self.network = case.network

    def tune(self, case: Case) -> dict[str, Variant]:
        draws = Draws(network_outputs(self.network, case.validation.inputs)[None])
        self.temperature, path = tuned_temperature(case, draws)
        what = temperature_words(case)
        title = "temperature scaling" if what == "temperature" else "point estimate, tuned noise"
        return {
            "temperature": Variant(title, what, self.temperature, headline=True, path=path),
        }

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        out = network_outputs(self.network, x)[None]
        return {key: Draws(out, temperature=self.temperature) for key in only}
