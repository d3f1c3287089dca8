"""laplace-torch's posteriors: diagonal, Kronecker-factored, last layer.

Daxberger, Kristiadi, Immer, Eschenhagen, Bauer, Hennig, *Laplace Redux*, NeurIPS 2021. Curvature, evidence and weight
draws are theirs; the linearised predictive of those draws is computed by this library's products, because explicit
Jacobians of a whole batch do not fit in memory. ``make peers`` installs the package.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.methods.base import Case, Draws, Method, Tuned, Variant, tune
from experiments.methods.posteriors import SAMPLED_DECADES
from experiments.methods.weights import Linearised, sampled
from experiments.runner import Unavailable
from nullbayes.datasets import Split

FIT_BATCH = 50  # the diagonal takes explicit Jacobians of a batch
BACKPACK_LAYERS = (
    nn.Sequential, nn.Linear, nn.Conv2d, nn.Tanh, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d, nn.Flatten,
)  # fmt: skip
CHUNK = 5  # prior precisions whose draws are carried through one pass
EVIDENCE_STEPS = 200
FULL_LAST_LAYER = 4000  # weights of a last layer whose GGN is kept whole


@contextmanager
def quiet() -> Iterator[None]:
    """Without the packages' warnings about torch's own deprecations, and without a trace in torch's random state."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def require_laplace() -> None:
    if importlib.util.find_spec("laplace") is None:
        raise Unavailable("laplace-torch is not installed: `make peers` does that.")


class PeerLaplace(Method):
    """What the structures share."""

    structure: ClassVar[str]
    subset: ClassVar[str] = "all"
    title: ClassVar[str]

    def build(self, case: Case) -> None:
        require_laplace()
        with quiet():
            self.laplace = self._fitted(case)
            self.evidence = self._evidence()
        self.generator_seed, self.samples = case.seed, case.samples

    def _fitted(self, case: Case) -> Any:
        from laplace import Laplace

        network = copy.deepcopy(case.network)  # it sets attributes and hooks
        self.names = self._covered(network)
        self.network = case.network
        self.linearised = Linearised(case.network, self.names, case.train.inputs[:2])
        return self._fit(Laplace, network, case)

    def _covered(self, network: nn.Module) -> list[str]:
        """Weights that the approximation takes part for, by name."""
        return [name for name, _ in network.named_parameters()]

    def _fit(self, make: Any, network: nn.Module, case: Case) -> Any:
        options: dict[str, Any] = {}
        if case.task.kind == "regression":
            assert case.noise is not None
            options["sigma_noise"] = case.noise**0.5
        laplace = make(
            network,
            case.task.kind,
            subset_of_weights=self.subset,
            hessian_structure=self._structure(network),
            backend=self._backend(),
            **options,
        )
        laplace.fit(self._data(case).loader(FIT_BATCH))
        return laplace

    def _data(self, case: Case) -> Split:
        return case.task.constrained

    def _structure(self, network: nn.Module) -> str:
        return self.structure

    def _backend(self) -> Any:
        from laplace.curvature import CurvlinopsGGN

        return CurvlinopsGGN

    def _evidence(self) -> float:
        """The prior precision of most marginal likelihood, by its own gradient steps."""
        self.laplace.optimize_prior_precision(
            pred_type="glm",
            method="marglik",
            prior_structure="scalar",
            init_prior_prec=torch.ones(1, dtype=self.laplace.mean.dtype),
            n_steps=EVIDENCE_STEPS,
        )
        return float(self.laplace.prior_precision)

    def changes(self, alpha: float) -> Tensor:
        """Weight draws less their mean at this prior precision ``(S, P)``: the same noise at each."""
        with quiet():
            self.laplace.prior_precision = alpha
            generator = torch.Generator().manual_seed(self.generator_seed)
            drawn = self.laplace.sample(self.samples, generator=generator)
            return (drawn - self.laplace.mean).detach()

    # -- tuning ----------------------------------------------------------------------------------

    def tune(self, case: Case) -> dict[str, Variant]:
        best = tune(self.evidence, lambda values: self._linearised_nll(case, values))
        drawn = tune(self.evidence, lambda values: self._sampled_nll(case, values), SAMPLED_DECADES)
        return self._variants(best, drawn)

    def _variants(self, best: Tuned, drawn: Tuned | None) -> dict[str, Variant]:
        name, title, what = self.name, self.title, "prior precision"
        variants = {
            name: Variant(title, what, best.value, headline=True, path=best.path),
            f"{name}_evidence": Variant(f"{title}, by evidence", "nothing", self.evidence),
        }
        if drawn is not None:
            variants[f"{name}_sampled"] = Variant(
                f"{title}, sampled", what, drawn.value, path=drawn.path
            )
        self.kept = {
            key: self.changes(float(variant.value))  # type: ignore[arg-type]
            for key, variant in variants.items()
        }
        return variants

    def _linearised_nll(self, case: Case, values: list[float]) -> list[float]:
        x, y = case.validation.inputs, case.validation.targets
        out = []
        for start in range(0, len(values), CHUNK):
            alphas = values[start : start + CHUNK]
            stacked = torch.cat([self.changes(a) for a in alphas])
            parts = [self.linearised(stacked, part) for part in x.split(FIT_BATCH)]
            point = torch.cat([p for p, _ in parts])
            change = torch.cat([c for _, c in parts], 1)
            groups = change.split(self.samples)
            out += [case.nll(Draws(point + group, point), y) for group in groups]
        return out

    def _sampled_nll(self, case: Case, values: list[float]) -> list[float]:
        x, y = case.validation.inputs, case.validation.targets
        return [
            case.nll(Draws(sampled(self.network, self.names, self.changes(a), x)), y)
            for a in values
        ]

    # -- use -------------------------------------------------------------------------------------

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        out: dict[str, Draws] = {}
        linear = [key for key in only if not key.endswith("sampled")]
        if linear:
            point, change = self.linearised(torch.cat([self.kept[key] for key in linear]), x)
            for key, group in zip(linear, change.split(self.samples), strict=True):
                out[key] = Draws(point + group, point)
        for key in only:
            if key.endswith("sampled"):
                out[key] = Draws(sampled(self.network, self.names, self.kept[key], x))
        return out


class DiagonalLaplace(PeerLaplace):
    """The diagonal of the GGN."""

    name, structure, title = "laplace_diag", "diag", "diagonal Laplace"

    def _backend(self) -> Any:
        from laplace.curvature import BackPackGGN

        if all(isinstance(m, BACKPACK_LAYERS) for m in self.network.modules()):
            return BackPackGGN
        from experiments.methods.row_backend import RowsGGN

        return RowsGGN


class KroneckerLaplace(PeerLaplace):
    """One Kronecker factorisation a layer; weights of other layers (BatchNorm) stay fixed."""

    name, structure, title = "laplace_kron", "kron", "Kronecker Laplace"

    def _covered(self, network: nn.Module) -> list[str]:
        covered: list[str] = []
        for prefix, module in network.named_modules():
            own = dict(module.named_parameters(prefix, recurse=False))
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                covered += own
            else:
                for parameter in own.values():  # its curvature backend refuses them
                    parameter.requires_grad_(False)
        self.details = {"covered": len(covered)}
        names = [name for name, _ in network.named_parameters()]
        return [name for name in names if name in covered]


class LastLayerLaplace(PeerLaplace):
    """The GGN of the last linear layer, full or, where that is large, Kronecker-factored.

    Linear in its weights, so linearised and sampled are one. In double precision where it is full: after 60,000 images
    the GGN is so far from the identity that in single precision it has negative eigenvalues beyond the prior's.
    """

    name, structure, subset, title = "laplace_last", "full", "last_layer", "last-layer Laplace"
    version = 2

    def _fitted(self, case: Case) -> Any:
        from laplace import Laplace

        self.network = case.network
        network = copy.deepcopy(case.network)
        if self._structure(network) == "full":
            network = network.double()
        self.dtype = next(network.parameters()).dtype
        return self._fit(Laplace, network, case)

    def _data(self, case: Case) -> Split:
        data = case.task.constrained
        targets = data.targets.to(self.dtype) if data.targets.is_floating_point() else data.targets
        return replace(data, inputs=data.inputs.to(self.dtype), targets=targets)

    def _structure(self, network: nn.Module) -> str:
        last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        structure = "full" if last.weight.numel() <= FULL_LAST_LAYER else "kron"
        self.details = {"structure": structure}
        return structure

    def _backend(self) -> Any:
        from laplace.curvature import BackPackGGN  # Jacobians of the last layer, in closed form

        return BackPackGGN

    def tune(self, case: Case) -> dict[str, Variant]:
        x, y = case.validation.inputs, case.validation.targets
        point, features = self._features(x)

        def nll(values: list[float]) -> list[float]:
            return [
                case.nll(Draws(point + self._change(features, self.changes(a)), point), y)
                for a in values
            ]

        return self._variants(tune(self.evidence, nll), None)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``f(θ̂, x) (B, O)`` and the input of the last layer ``(B, F)``."""
        with torch.no_grad(), quiet():
            parts = [part.to(self.dtype) for part in x.split(FIT_BATCH)]
            pairs = [self.laplace.model.forward_with_features(part) for part in parts]
        return torch.cat([f for f, _ in pairs]), torch.cat([h for _, h in pairs])

    def _change(self, features: Tensor, changes: Tensor) -> Tensor:
        """``(S, B, O)`` for changes of weight and bias ``(S, P)``."""
        last = self.laplace.model.last_layer
        size = last.weight.numel()
        weight = changes[:, :size].reshape(len(changes), *last.weight.shape)
        out = torch.einsum("bf,sof->sbo", features, weight)
        return out if last.bias is None else out + changes[:, None, size:]

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        point, features = self._features(x)
        return {key: Draws(point + self._change(features, self.kept[key]), point) for key in only}
