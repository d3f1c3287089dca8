"""Deep ensembles: Lakshminarayanan, Pritzel, Blundell, *Simple and scalable predictive uncertainty*, NeurIPS 2017."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments import networks
from experiments.methods.base import Case, Draws, Method, Variant
from experiments.methods.point import temperature_words, tuned_temperature
from experiments.tasks import Scale


def members(count: int) -> tuple[str, ...]:
    """Names of the networks of an ensemble; the first is the one that all methods share."""
    return tuple(f"member-{k}" for k in range(count))


class DeepEnsemble(Method):
    """Networks trained alike from different initial weights, in different orders of the data."""

    name = "ensemble"
    single_network = False

    @classmethod
    def required(cls, scale: Scale) -> tuple[str, ...]:
        return members(scale.members)[1:]

    def build(self, case: Case) -> float:
        names = members(case.task.scale.members)
        self.members = [networks.trained(case.task, name) for name in names]
        return sum(networks.seconds(case.task, name) for name in names[1:])

    def tune(self, case: Case) -> dict[str, Variant]:
        what = temperature_words(case)
        draws = Draws(self._outputs(case.validation.inputs))
        self.temperature, path = tuned_temperature(case, draws)
        count = len(self.members)
        return {
            "ensemble": Variant(f"ensemble of {count}", "nothing"),
            "ensemble_tuned": Variant(
                f"ensemble of {count}, tuned {what}",
                what,
                self.temperature,
                headline=True,
                path=path,
            ),
        }

    def _outputs(self, x: Tensor) -> Tensor:
        return torch.stack([networks.outputs(network, x) for network in self.members])

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        out = self._outputs(x)
        temperatures = {"ensemble": 1.0, "ensemble_tuned": self.temperature}
        return {key: Draws(out, temperature=temperatures[key]) for key in only}
