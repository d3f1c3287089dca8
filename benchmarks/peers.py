"""``LaplacePosterior`` beside laplace-torch's full Laplace: the same posterior, computed twice.

    make peers && python -m benchmarks.peers [--repeats 5]

Same trained network, data, prior precision and noise on both sides, in float64. What is compared:

- the outputs at the trained weights;
- exact output variances on test points: ``novelty(x, exact=True)`` against the trace of laplace-torch's
  linearised (GLM) output covariance;
- the same from 2,000 samples, and the predicted class probabilities, in standard errors;
- 20,000 weight samples against laplace-torch's posterior precision: mean and covariance after whitening,
  which looks at stiff and free directions alike.

``tests_peers`` holds the same comparisons to bounds (`make test-peers`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nullbayes as nb
from benchmarks import common
from benchmarks.peers_page import OUTPUT_SAMPLES, PEERS, REFERENCE, WEIGHT_SAMPLES, report
from nullbayes import datasets

FIT_SAMPLES = 30
# Weight samples are whitened in memory several times over: only where they are few numbers.
MOST_WEIGHTS = 500

SOLVERS: dict[str, Callable[[], nb.solvers.Solver]] = {
    "dual Cholesky": nb.solvers.DualCholesky,
    "primal QR": nb.solvers.PrimalQR,
}
PROBLEMS = ("wine", "diabetes", "in-between", "digits")

Prior = float | dict[str, float]


@dataclass(frozen=True)
class Problem:
    """A trained network and what both sides are told about it."""

    name: str
    likelihood: str  # "classification" or "regression", the same word on both sides
    model: nn.Module
    train: datasets.Split
    inputs: Tensor  # where predictions are compared
    prior_precision: float
    noise: float | None  # standard deviation; None: classification

    @property
    def weights(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def loader(self) -> DataLoader[Any]:
        """Batches with a partial one at the end."""
        return self.train.loader(60)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def problem(name: str) -> Problem:
    """One of ``PROBLEMS``, its network trained to the posterior mode (seconds, or less)."""
    double: dict[str, Any] = {"dtype": torch.float64}
    if name == "wine":
        data, widths, alpha, noise = datasets.wine(**double), (13, 14, 8, 3), 0.3, None
    elif name == "diabetes":
        data, widths, alpha, noise = datasets.diabetes(**double), (10, 16, 8, 1), 2.0, 0.7
    elif name == "in-between":  # more examples than weights, one input, little noise
        train = datasets.in_between(400, **double)
        grid = torch.linspace(-3, 3, 61, **double)[:, None]
        split = datasets.Split(grid, grid)
        data = datasets.Dataset("in-between", train, split, split)
        widths, alpha, noise = (1, 16, 16, 1), 0.5, 0.1
    elif name == "digits":
        data, widths, alpha, noise = datasets.digits(**double), (64, 32, 16, 10), 0.3, None
    else:
        raise ValueError(f"unknown problem {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(*widths).double()
    train = data.train
    if name == "digits":
        train = datasets.Split(train.inputs.flatten(1), train.targets)
    fit_mode(model, train, alpha, noise)
    inputs = data.test.inputs.flatten(1)[:61]
    kind = "classification" if noise is None else "regression"
    return Problem(name, kind, model.eval(), train, inputs, alpha, noise)


def fit_mode(model: nn.Module, train: datasets.Split, alpha: float, noise: float | None) -> None:
    """Minimise the negative log posterior with L-BFGS."""
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=300, line_search_fn="strong_wolfe", history_size=30
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        f = model(train.inputs)
        if noise is None:
            fit = nn.functional.cross_entropy(f, train.targets, reduction="sum")
        else:
            fit = 0.5 * (f - train.targets).square().sum() / noise**2
        value = fit + 0.5 * alpha * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimiser.step(loss)


# -- the two sides -----------------------------------------------------------------------------------


def ours(
    case: Problem,
    solver: str = "auto",
    samples: int = FIT_SAMPLES,
    *,
    prior_precision: Prior | str | None = None,
    kind: type[Any] = nb.LaplacePosterior,
    loader: Any = None,
) -> Any:
    likelihood: Any = case.likelihood
    if case.noise is not None:
        likelihood = nb.likelihood.Regression(noise_variance=case.noise**2)
    posterior = kind(
        case.model,
        likelihood,
        prior_precision=case.prior_precision if prior_precision is None else prior_precision,
        solver=SOLVERS[solver]() if solver in SOLVERS else solver,
    )
    return posterior.fit(loader or case.loader(), samples, progress=False)


def theirs(
    case: Problem,
    peer: str = REFERENCE,
    *,
    prior_precision: Prior | None = None,
    temperature: float = 1.0,
    noise: float | None = None,
) -> Any:
    """laplace-torch fitted on a copy (it sets attributes and hooks), its factorisation included."""
    with quiet():
        from laplace import Laplace
        from laplace.curvature import BackPackGGN, CurvlinopsGGN

    prior: Any = case.prior_precision if prior_precision is None else prior_precision
    if isinstance(prior, dict):  # one per parameter tensor, in the model's order
        prior = [prior[name] for name, _ in case.model.named_parameters()]
        prior = torch.tensor(prior, dtype=torch.float64)
    options: dict[str, Any] = {}
    if case.noise is not None:
        options["sigma_noise"] = case.noise if noise is None else noise
    dtype = torch.float64 if "float64" in peer else torch.get_default_dtype()
    with quiet(), default_dtype(dtype):
        laplace = Laplace(
            copy.deepcopy(case.model),
            case.likelihood,
            subset_of_weights="all",
            hessian_structure="full",
            prior_precision=prior,
            temperature=temperature,
            backend=BackPackGGN if peer == REFERENCE else CurvlinopsGGN,
            **options,
        )
        laplace.fit(case.loader())
    _ = laplace.posterior_scale  # computed on first use
    return laplace


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the peers about torch's own deprecations and their hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def output_moments(laplace: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """laplace-torch's linearised predictive: mean ``(B, O)`` and covariance ``(B, O, O)``."""
    with quiet():
        jacobians, mean = laplace.backend.jacobians(x)
    return mean.detach(), laplace.functional_variance(jacobians).detach()


# -- the comparisons ---------------------------------------------------------------------------------


def variance_error(posterior: Any, covariance: Tensor, x: Tensor) -> float:
    """Largest relative difference of an example's exact output variance (trace over its outputs)."""
    wanted = covariance.diagonal(dim1=1, dim2=2).sum(1)
    return float((posterior.novelty(x, score="variance", exact=True) / wanted - 1).abs().max())


def output_scores(posterior: Any, covariance: Tensor, x: Tensor) -> dict[str, float]:
    """How many standard errors sampled output moments are off, at worst (the samples' mean is known)."""
    prediction = posterior.predict(x)
    wanted = covariance.diagonal(dim1=1, dim2=2)
    change = prediction.outputs - prediction.point
    count = len(change)
    found = torch.einsum("sbi,sbj->bij", change, change) / count
    error = ((wanted[:, :, None] * wanted[:, None, :] + covariance.square()) / count).sqrt()
    return {
        "variance": float(((prediction.variance / wanted - 1) * (count / 2) ** 0.5).abs().max()),
        "covariance": float(((found - covariance) / error).abs().max()),
    }


def probability_score(posterior: Any, laplace: Any, x: Tensor, draws: int = 20_000) -> float:
    """Predicted class probabilities against laplace-torch's Monte-Carlo link, in standard errors."""
    prediction = posterior.predict(x)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = laplace(x, pred_type="glm", link_approx="mc", n_samples=draws)
    spread = prediction.outputs.softmax(-1).var(0)
    error = (spread * (1 / len(prediction.outputs) + 1 / draws)).sqrt()
    return float(((prediction.mean - wanted) / error).abs().max())


def weight_samples(posterior: Any) -> Tensor:
    """Changes ``(S, P)`` of the weights in the model's own order, from the public state dicts."""
    model = posterior.model
    names = [name for name, _ in model.named_parameters()]
    mode = nn.utils.parameters_to_vector(model.parameters()).detach()
    return torch.stack(
        [torch.cat([w[n].flatten() for n in names]) for w in posterior.sample()]
    ).sub_(mode)


def weight_scores(changes: Tensor, precision: Tensor) -> dict[str, float]:
    """Samples against the Gaussian with this precision, in standard errors.

    With ``precision = L Lᵀ`` the rows of ``changes @ L`` are standard normal: the squared length of their
    sum is ``S`` times chi-squared with P degrees of freedom (``mean``), the trace of their covariance has
    error ``√(2P/S)``, its entries ``1/√S`` and on the diagonal ``√(2/S)`` (``whitened``; ``covariance`` is
    the same before whitening). The singular values of ``changes @ L / √S`` leave ``1 ± (√P + t)/√S`` with
    probability at most ``2 exp(-t²/2)`` (Davidson & Szarek 2001); ``excess`` is the ``t`` they need.
    """
    count, p = changes.shape
    white = changes @ torch.linalg.cholesky(precision)
    chi2 = float(white.mean(0).square().sum()) * count
    covariance = white.T @ white / count
    eye = torch.eye(p, dtype=white.dtype)
    wanted = torch.linalg.inv(precision)
    raw_error = ((wanted.diagonal()[:, None] * wanted.diagonal() + wanted.square()) / count).sqrt()
    raw = (changes.T @ changes / count - wanted) / raw_error
    roots = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    return {
        "mean": (chi2 - p) / math.sqrt(2 * p),
        "trace": (float(covariance.trace()) - p) / math.sqrt(2 * p / count),
        "covariance": float(raw.abs().max()),
        "whitened": float(((covariance - eye) * (count / (1 + eye)).sqrt()).abs().max()),
        "excess": float((roots - 1).abs().max()) * math.sqrt(count) - math.sqrt(p),
        "smallest": float(roots[0] ** 2),
        "largest": float(roots[-1] ** 2),
    }


# -- evidence ----------------------------------------------------------------------------------------


def evidence_slope(case: Problem, laplace: Any, solver: str) -> float:
    """Slope of laplace-torch's log marginal likelihood at our prior precision, by ``‖θ̂‖²/2``; 0: its maximum.

    Its two terms, ``γ/2α`` and ``‖θ̂‖²/2``, cancel there: so this is the relative error of ``α``, up to a factor.
    """
    alpha = ours(case, solver, prior_precision="evidence").prior_precision
    at = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    before = laplace.prior_precision
    (slope,) = torch.autograd.grad(laplace.log_marginal_likelihood(at), at)
    laplace.prior_precision = before
    return abs(float(slope) / (0.5 * float(laplace.mean.square().sum())))


# -- the table ---------------------------------------------------------------------------------------


def turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each function, taking turns; the first turn, which imports, does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def compare(case: Problem, repeats: int) -> dict[str, Any]:
    """Every solver against every peer on one problem."""
    x = case.inputs
    peers = {peer: theirs(case, peer) for peer in PEERS}
    posteriors = {solver: ours(case, solver) for solver in SOLVERS}
    moments = {peer: output_moments(laplace, x) for peer, laplace in peers.items()}
    reference = peers[REFERENCE]
    stiffest = float(torch.linalg.eigvalsh(reference.posterior_precision)[-1])
    fits: dict[str, Callable[[], Any]] = {}
    predictions: dict[str, Callable[[], Any]] = {}
    for solver, posterior in posteriors.items():
        fits[solver] = functools.partial(ours, case, solver)
        predictions[solver] = functools.partial(posterior.novelty, x, exact=True)
    for peer, laplace in peers.items():
        fits[peer] = functools.partial(theirs, case, peer)
        predictions[peer] = functools.partial(output_moments, laplace, x)
    result: dict[str, Any] = {
        "weights": case.weights,
        "examples": len(case.train),
        "rows": next(iter(posteriors.values())).certificate.constraints,
        "test_points": len(x),
        "prior_precision": case.prior_precision,
        "noise": case.noise,
        "stiffness": stiffest / case.prior_precision,
        "automatic": ours(case).certificate.solver,
        "fit_seconds": turns(fits, repeats),
        "variance_seconds": turns(predictions, repeats),
        "solvers": {},
    }
    for solver, posterior in posteriors.items():
        point = posterior.predict(x).point
        entry: dict[str, Any] = {
            "mean_difference": {p: float((point - m).abs().max()) for p, (m, _) in moments.items()},
            "variance_error": {p: variance_error(posterior, c, x) for p, (_, c) in moments.items()},
            "evidence_slope": evidence_slope(case, reference, solver),
        }
        covariance = moments[REFERENCE][1]
        posterior.draw(OUTPUT_SAMPLES - FIT_SAMPLES)
        entry["output_scores"] = output_scores(posterior, covariance, x)
        if case.noise is None:
            entry["probability_score"] = probability_score(posterior, reference, x)
        if case.weights <= MOST_WEIGHTS:
            posterior.draw(WEIGHT_SAMPLES - OUTPUT_SAMPLES)
            changes = weight_samples(posterior)
            entry["weight_scores"] = weight_scores(changes, reference.posterior_precision)
        result["solvers"][solver] = entry
        print(f"{case.name}, {solver}: {entry['variance_error'][REFERENCE]:.1e}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    options = parser.parse_args()
    try:
        version = importlib.metadata.version("laplace-torch")
    except importlib.metadata.PackageNotFoundError:
        parser.exit(1, "laplace-torch is not installed: `make peers` does that.\n")
    results = {name: compare(problem(name), options.repeats) for name in options.problems}
    table = report(results, version)
    everything = {
        "problems": results,
        "output_samples": OUTPUT_SAMPLES,
        "weight_samples": WEIGHT_SAMPLES,
        "fit_samples": FIT_SAMPLES,
        "laplace_torch": version,
        "environment": common.environment(),
    }
    print(table)
    print(common.write_results("peers", everything, table))


if __name__ == "__main__":
    main()
