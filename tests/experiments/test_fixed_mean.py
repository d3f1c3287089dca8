"""Processes whose mean is the network against dense formulas and scikit-learn; conformal sets against MAPIE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch import Tensor

from experiments.methods.fixed_mean import Activations, FixedMean, Seen, total

G = torch.Generator


def classes(count: int = 60) -> Seen:
    g = G().manual_seed(0)
    x = torch.randn(count, 3, generator=g)
    y = torch.arange(count) % 3
    outputs = 2.0 * torch.nn.functional.one_hot(y, 3) + torch.randn(count, 3, generator=g)
    return Seen(x, outputs, y)


@pytest.fixture(scope="module")
def fitted() -> FixedMean:
    return FixedMean(classes(), steps=30)


def prior(process: FixedMean, x: Tensor, y: Tensor) -> Tensor:
    """``(N, O, M, O)`` between every output at ``x`` and at ``y``, entry by entry."""
    width, lower = process.width.exp(), process.between.tril()
    out = torch.zeros(len(x), 3, len(y), 3, dtype=torch.float64)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            k = process.amplitude.exp() * torch.exp(-0.5 * (((a - b) / width) ** 2).sum())
            out[i, :, j] = k * (lower @ lower.T)
    return out


def test_the_variance_is_that_of_the_variational_posterior(fitted: FixedMean) -> None:
    """``S = (K⁻¹ + LLᵀ)⁻¹``, and ``Σ = k - K_xz K⁻¹ (K - S) K⁻¹ K_zx``, with inverses written out."""
    query = torch.randn(4, 3, generator=G().manual_seed(2))
    x, z, which = fitted.scaled(query), fitted.places, fitted.which
    picked = torch.arange(len(z))
    middle = prior(fitted, z, z)[picked, which][:, picked, which]
    cross = prior(fitted, x, z)[:, :, picked, which]
    middle = middle + 1e-10 * torch.eye(len(z), dtype=torch.float64)
    inverse, lower = torch.linalg.inv(middle), fitted.root.tril()
    spread = torch.linalg.inv(inverse + lower @ lower.T)
    gain = inverse @ (middle - spread) @ inverse
    own = torch.stack([prior(fitted, one[None], one[None])[0, :, 0] for one in x])
    torch.testing.assert_close(
        fitted.covariance(query), own - cross @ gain @ cross.mT, rtol=1e-4, atol=1e-5
    )
    q = torch.distributions.MultivariateNormal(torch.zeros(len(z)).double(), spread)
    p = torch.distributions.MultivariateNormal(torch.zeros(len(z)).double(), middle)
    expected = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(fitted.divergence(middle), expected, rtol=1e-4, atol=1e-4)


def test_samples_have_the_covariance(fitted: FixedMean) -> None:
    query = torch.randn(5, 3, generator=G().manual_seed(2))
    found = fitted.samples(query, 20_000, 0)
    expected = fitted.covariance(query)
    own = torch.einsum("snk,snl->nkl", found, found) / len(found)
    assert float((own - expected).norm() / expected.norm()) < 0.03
    twice = fitted.samples(torch.cat([query[:1], query[:1]]), 10, 0)
    torch.testing.assert_close(twice[:, 0], twice[:, 1], atol=1e-2, rtol=0)  # one function


def test_with_all_data_as_inducing_it_is_a_gaussian_process() -> None:
    """scikit-learn's, at the same kernel and noise: ``LLᵀ = I / σ²``."""
    g = G().manual_seed(1)
    x = torch.randn(25, 2, generator=g)
    y = x.sum(1, keepdim=True)
    process = FixedMean(Seen(x, y, y, "regression"), steps=0)
    noise = 0.3
    process.places = process.scaled(x)
    process.which = torch.zeros(len(x), dtype=torch.long)
    process.root = torch.eye(len(x), dtype=torch.float64) / noise**0.5
    query = torch.randn(6, 2, generator=g)
    kernel = ConstantKernel(1.0) * RBF(process.width.exp().numpy())
    reference = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
    reference.fit(process.scaled(x).numpy(), y.numpy())
    _, deviation = reference.predict(process.scaled(query).numpy(), return_std=True)
    found = process.covariance(query)[:, 0, 0]
    np.testing.assert_allclose(found.numpy(), np.asarray(deviation).ravel() ** 2, rtol=1e-6)


def test_optimising_raises_the_density_of_the_training_data() -> None:
    """A network without errors: the noise falls, and the variance on data stays below that far away."""
    g = G().manual_seed(1)
    x = torch.rand(80, 1, generator=g) * 4
    y = x.sin() + 0.1 * torch.randn(80, 1, generator=g)
    seen = Seen(x, x.sin(), y, "regression")
    before, after = FixedMean(seen, steps=0), FixedMean(seen, steps=300)
    args = (before.scaled(x), x.sin().double(), y, len(x))
    assert float(after.loss(*args)) < float(before.loss(*args)) - 10
    far = torch.tensor([[20.0]])
    assert float(after.covariance(x).mean()) < 0.5 * float(after.covariance(far))
    assert 0.001 < after.noise < 0.1  # .01 was drawn


def test_activations_near_all_data_are_a_gaussian_process() -> None:
    g = G().manual_seed(1)
    x, head = torch.randn(30, 3, generator=g), torch.randn(2, 3, generator=g)
    process = Activations(x, head, nearest=30)
    kernel = ConstantKernel(1.0) * RBF(process.width)
    reference = GaussianProcessRegressor(kernel, alpha=Activations.JITTER, optimizer=None)
    reference.fit(process.vectors.numpy(), np.zeros(30))
    query = torch.randn(7, 3, generator=g)
    _, deviation = reference.predict(query.double().numpy(), return_std=True)
    np.testing.assert_allclose(process.share(query).numpy(), deviation**2, rtol=1e-4, atol=1e-7)
    weight = head.double()
    expected = process.share(query[:1]) * (weight * process.variance) @ weight.T
    torch.testing.assert_close(process.covariance(query[:1])[0], expected)
    assert float(process.share(x).max()) < 1e-3  # nothing is left on the training data
    assert float(process.share(x + 100).min()) == 1.0


def test_what_all_outputs_share_does_not_count() -> None:
    ones = torch.ones(1, 3, 3, dtype=torch.float64)
    assert float(total(ones)) == pytest.approx(0)
    assert float(total(ones[:, :1, :1])) == 1.0
    two = torch.diag_embed(torch.tensor([[1.0, 2.0]]))
    assert float(total(two)) == pytest.approx(1.5)  # of the difference, halved
