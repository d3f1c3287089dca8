"""The layer null space: sampled networks as fitted, tuned, and tuned without the bound of the guarantee."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import nullbayes as nb
from experiments.methods.base import Case, Draws, Method, Variant, tune
from experiments.methods.posteriors import BATCH, SAMPLED_DECADES, likelihood, weight_changes
from experiments.methods.weights import sampled
from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE

DECLARED = "combined"  # the library's default score
SCORES = ("combined", "leverage")
# Training examples that the parts of the score are measured against.
REFERENCES = 300


class LayerNullSpace(Method):
    """``nb.LayerNullSpacePosterior`` on all training examples, as sampled networks, which its guarantee is about.

    ``layers``: as fitted, without validation data. ``layers_tuned``: the prior precision of least validation NLL,
    raised until training predictions move by no more than the guarantee allows. ``layers_free``: without that bound,
    which shows what the guarantee costs.
    """

    name = "layers"

    def build(self, case: Case) -> None:
        data = case.train
        batches = list(zip(data.inputs.split(BATCH), data.targets.split(BATCH), strict=True))
        self.posterior = nb.LayerNullSpacePosterior(case.network, likelihood(case))
        self.posterior.fit(batches, case.samples, case.seed, progress=False)
        certificate = self.posterior.certificate
        self.details = {
            "held": certificate.held,
            "divergence": certificate.divergence,
            "left_out_divergence": certificate.left_out_divergence,
            "free_share": certificate.free_share,
            "free": {layer.name: layer.share for layer in certificate.layers},
            "fixed": sorted(certificate.fixed),
            "prior_precision": self.posterior.prior_precision,
            "natural_precision": self._natural(),
        }
        self.centres, self.spreads = self._references(data.inputs[:REFERENCES])

    def tune(self, case: Case) -> dict[str, Variant]:
        own = float(self.posterior.prior_precision)
        self.names, self.changes = weight_changes(self.posterior)
        x, y = case.validation.inputs, case.validation.targets

        def nll(values: list[float]) -> list[float]:
            return [
                case.nll(
                    Draws(torch.cat([self._sampled(part, a) for part in x.split(BATCH)], 1)), y
                )
                for a in values
            ]

        best = tune(own, nll, SAMPLED_DECADES)
        title, what = "layer null space", "prior precision"
        bounded = self._bounded(best.value)
        self.alphas = {"layers": own, "layers_tuned": bounded, "layers_free": best.value}
        return {
            "layers": Variant(title, "nothing", own, DECLARED, headline=True),
            "layers_tuned": Variant(f"{title}, tuned", what, bounded, DECLARED, path=best.path),
            "layers_free": Variant(f"{title}, tuned, no bound", what, best.value, DECLARED),
        }

    def _bounded(self, alpha: float) -> float:
        """The first of ``alpha · 10^(k/3)`` at which training predictions stand, by the certificate."""
        start, found = self.posterior.prior_precision, {}
        while not found or found["divergence"] > ALLOWED_DIVERGENCE:
            alpha *= 10 ** (1 / 3) if found else 1.0
            self.posterior.prior_precision = alpha
            found = {"divergence": self.posterior.certificate.divergence}
            self.details.setdefault("divergence_free", found["divergence"])
        self.details["divergence_tuned"] = found["divergence"]
        self.posterior.prior_precision = start
        return alpha

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        scores = {name: self.posterior.novelty(x, name).double() for name in SCORES}
        scores |= self.parts(x)
        return {key: Draws(self._sampled(x, self.alphas[key]), None, scores) for key in only}

    def _sampled(self, x: Tensor, alpha: float) -> Tensor:
        return sampled(self.posterior.model, self.names, self.changes, x, alpha**-0.5)

    def _natural(self) -> float:
        """Weights drawn from the prior are as large as the trained ones, of those that take part and have a rule."""
        fixed = self.posterior.certificate.fixed
        named = self.posterior.model.named_parameters()
        moving = [
            p.detach().double()
            for n, p in named
            if n in self.posterior.space.by_name and n not in fixed
        ]
        return sum(p.numel() for p in moving) / sum(float(p.square().sum()) for p in moving)

    # -- what the score is made of ---------------------------------------------------------------

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """The three parts of the default score by themselves ``(B,)``, and the layer that says most."""
        excess = ((self._columns(x) - self.centres) / self.spreads).clamp_min(0).nan_to_num(0.0)
        layers = (excess.shape[1] - self.energies) // 2
        squares = excess.square()
        found = {
            "sizes of all layers": squares[:, :layers].mean(1),
            "direction, last layer": squares[:, 2 * layers - 1],
        }
        return found | ({"energy part": squares[:, -1]} if self.energies else {})

    def _references(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.energies = (
            1 if self.posterior.likelihood.energy(self._outputs(x[:2])) is not None else 0
        )
        every = torch.cat([self._columns(part) for part in x.split(BATCH)])
        centre = every.nanquantile(0.5, 0)
        return centre, (every.nanquantile(0.84, 0) - centre).clamp_min(1e-2)

    def _columns(self, x: Tensor) -> Tensor:
        """Log leverages of all layers, the same by directions, and energies, ``(B, 2 L + 0 or 1)``."""
        sizes, directions, outputs = self.posterior._of_layers().means(x)
        columns = [part.clamp_min(1e-300).log() for part in (sizes, directions)]
        energy = self.posterior.likelihood.energy(outputs)
        if energy is not None:
            columns.append(energy.double().reshape(len(x), -1).mean(1, keepdim=True))
        return torch.cat(columns, 1)

    def _outputs(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.posterior.model(x)
        return found
