"""At use: batches that the fit has not seen the like of, and such as it has but that take another way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.audit.network import NetworkCopy
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from tests.cases.dense import normal, rows


class Centred(nn.Module):
    """Subtracts half of the batch's mean: of one example alone, nobody can tell."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(3, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return self.out(h - 0.5 * h.mean(0))


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype).eval()


def fitted(model: nn.Module, sizes: list[int], x: Tensor, outputs: int) -> nb.NullSpacePosterior:
    parts = [(part, normal(len(part), outputs, seed=4)) for part in x.split(sizes)]
    posterior = nb.NullSpacePosterior(
        model, "regression", preserve="outputs", prior_precision=1.0, solver="dual Cholesky"
    )
    return posterior.fit(parts, 3, progress=False)


ASK: dict[str, Callable[[nb.NullSpacePosterior, Tensor], object]] = {
    "linearised": lambda p, x: p.predict(x),
    "sampled": lambda p, x: p.predict(x, method="sampled"),
    "novelty": lambda p, x: p.novelty(x, score="variance"),
    "novelty of samples": lambda p, x: p.novelty(x, score="variance", exact=False),
    "joint": lambda p, x: p.joint(x, exact=False),
}


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize("outputs", [1, 9], ids=["rows", "forward mode"])
def test_a_batch_that_is_mixed_at_use_is_refused(ask: str, outputs: int) -> None:
    posterior = fitted(seeded(lambda: Centred(outputs)), [1, 1, 1], normal(3, 3), outputs)
    ASK[ask](posterior, normal(1, 3, seed=1))
    with pytest.raises(nb.ModelError, match="mixes the examples of a batch"):
        ASK[ask](posterior, normal(4, 3, seed=2))


class Detour(nn.Module):
    """Examples that reach far use a weight a second time, in a way that no module shows."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(3, 3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        far = (x.abs().amax(1, keepdim=True) > 5).to(x)
        return self.out(h + far * torch.tanh(h @ self.body.weight))


@pytest.mark.parametrize("outputs", [1, 2, 9])
def test_another_way_through_the_network_is_noticed_at_use(outputs: int) -> None:
    """The batch looks like those of the fit: same shapes, as many examples."""
    model = seeded(lambda: Detour(outputs))
    posterior = fitted(model, [4], normal(4, 3), outputs)
    x = normal(4, 3, seed=2)
    for far in (x, torch.cat([x[:3], 9 * x[3:]])):
        dense = rows(copy.deepcopy(model), far.split(1))
        moved = torch.einsum("nop,sp->sno", dense, posterior._samples().double())
        prediction = posterior.predict(far)
        change = prediction.outputs - prediction.point
        assert_close(change.flatten(2), moved, rtol=1e-8, atol=1e-8)
        spread = posterior.novelty(far, score="variance", exact=False)
        assert_close(spread, moved.square().mean(0).sum(1), rtol=1e-8, atol=1e-10)


class Masked(nn.Module):
    """Attention under one mask ``(T, T)`` that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attend = nn.MultiheadAttention(4, 1, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(x)
        return self.out(self.attend(h, h, h, attn_mask=mask, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("exact", [True, False])
def test_novelty_under_a_shared_mask_as_long_as_the_batch(exact: bool) -> None:
    model = seeded(Masked)
    mask = ~torch.tril(torch.ones(4, 4, dtype=torch.bool))
    tokens = torch.arange(40).remainder(7).reshape(10, 4)
    posterior = nb.NullSpacePosterior(
        model, "regression", preserve="outputs", prior_precision=1.0, solver="dual Cholesky"
    )
    posterior.fit([((tokens[:6], mask), normal(6, 2))], 3, progress=False)
    four = tokens[6:]  # as many as there are tokens
    together = posterior.novelty((four, mask), score="variance", exact=exact)
    alone = [
        posterior.novelty((four[n : n + 1], mask), score="variance", exact=exact) for n in range(4)
    ]
    assert_close(together, torch.cat(alone), rtol=1e-8, atol=1e-10)
    information = posterior.novelty((four, mask), score="information", exact=exact)
    assert information.shape == (4,)


def test_rounding_of_an_ill_conditioned_network_is_no_mismatch() -> None:
    """Two features under a LayerNorm are one and minus one: gradients cancel, and are rounding to a large part."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm = nn.Embedding(7, 2), nn.LSTM(2, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
            self.out = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.encoder(self.lstm(self.embed(x))[0]).amax(1))

    for seed in range(6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Narrow().double().eval()
            x = torch.randint(0, 7, (8, 3))
            queries = torch.randint(0, 7, (5, 3))
        posterior = fitted(model, [3, 3, 2], x, 2)
        posterior.predict(queries)
        assert posterior.novelty(queries).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_precise_copy_has_the_networks_own_epsilon(dtype: torch.dtype) -> None:
    """`nn.RMSNorm` without one takes that of its precision: a float64 copy would be another network."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)), dtype)
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
        model[0].bias.zero_()
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    x = normal(4, 3).to(dtype)
    precise = NetworkCopy(functional, torch.float64).outputs(x)
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    assert_close(precise, model(x).detach().double(), rtol=bound, atol=bound)
    assert model[1].eps is None


SOLVERS = ["dual Cholesky", "primal QR", "conjugate gradients"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_that_are_all_zero_constrain_nothing_and_raise_nothing(solver: str) -> None:
    """A loss without curvature where the residuals are large: the basis of the rows is empty."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1))
    )

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.smooth_l1_loss(outputs, targets, reduction="none").flatten(1).sum(1)

    x, y = normal(4, 2, 3), 100 + normal(4, 1)
    posterior = nb.NullSpacePosterior(model, loss=loss, prior_precision=1.0, solver=solver)
    posterior.fit([(x[:2], y[:2]), (x[2:], y[2:])], 3, progress=False)
    assert posterior.certificate.rank == 0
    dense = rows(copy.deepcopy(model), x.split(1))
    for exact in (True, False):
        variance = posterior.novelty(x, score="variance", exact=exact)
        moved = torch.einsum("nop,sp->sno", dense, posterior._samples())
        wanted = dense.square().sum((1, 2)) if exact else moved.square().mean(0).sum(1)
        assert_close(variance, wanted, rtol=1e-6, atol=1e-8)
    assert posterior.predict(x).outputs.shape == (3, 4, 1)


def test_products_of_no_vectors_are_empty() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1))
    )
    operator = fitted(model, [3], normal(3, 2, 3), 1)._fit.state.operator
    m, p = operator.shape
    none = torch.empty(0, p, dtype=torch.float64)
    assert operator.matvec(none).shape == (0, m)
    assert operator.rmatvec(torch.empty(0, m, dtype=torch.float64)).shape == (0, p)
    assert [t.shape for t in operator.normal(none)] == [(0, p), (0,)]
