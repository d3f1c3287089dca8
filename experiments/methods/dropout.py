"""Monte-Carlo dropout: Gal, Ghahramani, *Dropout as a Bayesian approximation*, ICML 2016.

The tasks' networks have no dropout, so this is another network: the same with dropout, trained by the same recipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments import networks
from experiments.methods.base import Case, Draws, Method, Variant
from experiments.methods.point import temperature_words, tuned_temperature
from experiments.tasks import DROPOUT, Scale


class MCDropout(Method):
    """Draws with dropout left on, as trained and with a temperature."""

    name = "dropout"

    @classmethod
    def required(cls, scale: Scale) -> tuple[str, ...]:
        return (networks.WITH_DROPOUT,)

    def build(self, case: Case) -> float:
        self.network = networks.trained(case.task, networks.WITH_DROPOUT)
        for module in self.network.modules():  # BatchNorm stays in evaluation mode
            if isinstance(module, nn.Dropout):
                module.train()
        self.samples, self.seed = case.samples, case.seed
        return networks.seconds(case.task, networks.WITH_DROPOUT)

    def tune(self, case: Case) -> dict[str, Variant]:
        what = temperature_words(case)
        draws = torch.cat([self._outputs(x) for x in case.validation.inputs.split(500)], 1)
        self.temperature, path = tuned_temperature(case, Draws(draws))
        note = f"another network, trained with dropout {DROPOUT:g}; "
        return {
            "dropout": Variant("MC dropout", note + "nothing"),
            "dropout_tuned": Variant(
                f"MC dropout, tuned {what}", note + what, self.temperature, headline=True, path=path
            ),
        }

    def _outputs(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return torch.stack([self.network(x) for _ in range(self.samples)])

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        out = self._outputs(x)
        temperatures = {"dropout": 1.0, "dropout_tuned": self.temperature}
        return {key: Draws(out, temperature=temperatures[key]) for key in only}
