"""The posterior of the layer null space: exactness on whole networks, and dense references."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from tests.moments.layer_networks import NETWORKS, network, quiet


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_sampled_networks_keep_their_outputs(name: str, dtype: torch.dtype) -> None:
    model, x, likelihood = network(name, dtype)
    posterior = quiet(
        model, [x[: len(x) // 2], x[len(x) // 2 :]], likelihood, delta=0, prior_precision=1.0
    )
    size = sum(p.detach().double().square().sum() for p in model.parameters()).sqrt()
    count = sum(p.numel() for p in model.parameters())
    posterior.prior_precision = float(count / size**2)
    with torch.no_grad():
        point = model(x)
    trained = dict(model.named_parameters())
    copy = deepcopy(model)
    other = NETWORKS[name][1]() if x.is_floating_point() else (x + 10) % 40
    for sample in posterior.sample():
        moved = sum(
            (sample[n] - p.detach()).double().square().sum() for n, p in trained.items()
        ).sqrt()
        assert moved > 0.1 * size
        with torch.no_grad():
            copy.load_state_dict(sample)
            out, off = copy(x), copy(other.to(x))
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4
            assert (out - point).norm() <= tolerance * point.norm()
            assert (off - model(other.to(x))).norm() > 1e-2 * point.norm()
    certificate = posterior.certificate
    assert certificate.held, certificate.verdict
    assert certificate.free_share > 0.1
    assert certificate.weight_change > 0.1
    assert "held" in str(certificate)


def test_the_guarantee_does_not_depend_on_the_size_of_the_change() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0, prior_precision=0.5)  # many times the prior's size
    assert posterior.certificate.weight_change > 15
    assert posterior.certificate.change < 1e-9


def test_a_soft_edge_keeps_what_it_promises() -> None:
    model, _, _ = network("mlp", torch.float32)
    torch.manual_seed(0)
    many = torch.randn(300, 60)  # no exact null space is left
    assert not quiet(model, many, delta=0, prior_precision=10.0).certificate.held
    posterior = quiet(model, (many, torch.randint(0, 4, (300,))))
    certificate = posterior.certificate
    assert certificate.held
    assert certificate.divergence <= 0.005
    assert certificate.left_out_divergence <= 0.0201
    assert certificate.network_score is not None
    # An independent measurement, of all examples.
    with torch.no_grad():
        p = model(many).log_softmax(1)
        total = 0.0
        for sample in posterior.sample(8):
            q = torch.func.functional_call(model, sample, (many,)).log_softmax(1)
            total += float((p.exp() * (p - q)).sum(1).mean()) / 8
    assert total <= 2 * 0.005
    # A weak prior breaks it, and the certificate says so.
    posterior.prior_precision = 1e-3
    assert not posterior.certificate.held
    assert "weak" in posterior.certificate.verdict


def dense_covariance(
    posterior: Any, model: nn.Module, x: Tensor, delta: float, data: Tensor
) -> Tensor:
    """``J Σ Jᵀ`` of a perceptron written out: its weights' covariance from plain sums over the data."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    names = [n for n, m in model.named_children() if isinstance(m, nn.Linear)]
    h, inputs = data, []
    for module in model:
        if isinstance(module, nn.Linear):
            inputs.append(torch.cat([h, torch.ones_like(h[:, :1])], dim=1))
        h = module(h)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def f(w: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, w, (one[None],))[0]

    rows = torch.func.vmap(torch.func.jacrev(f), (None, 0))(weights, x)
    total = torch.zeros(len(x), 4, 4, dtype=x.dtype)
    for name, a, layer in zip(names, inputs, linears, strict=True):
        c = (a.T @ a).detach()
        edge = delta * c.trace() / len(c)
        p = edge * torch.linalg.inv(c + edge * torch.eye(len(c), dtype=c.dtype))
        j = torch.cat([rows[f"{name}.weight"], rows[f"{name}.bias"][..., None]], dim=-1)
        assert j.shape[2:] == (layer.out_features, layer.in_features + 1)
        total += torch.einsum("bpoi,ij,bqoj->bpq", j, p, j)
    return total / posterior.prior_precision


def test_covariance_predictions_and_scores_against_dense() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0.1)
    torch.manual_seed(3)
    new = torch.randn(6, 60, dtype=torch.float64)
    want = dense_covariance(posterior, model, new, 0.1, x)
    torch.testing.assert_close(posterior.covariance(new), want, rtol=1e-8, atol=1e-12)
    closed = posterior.predict(new, "closed")
    torch.testing.assert_close(closed.variance, want.diagonal(dim1=1, dim2=2))
    centre = torch.eye(4, dtype=torch.float64) - 0.25
    centred = centre @ want @ centre
    torch.testing.assert_close(
        posterior.novelty(new, "variance"), centred.diagonal(dim1=1, dim2=2).sum(1)
    )
    natural = sum(p.numel() for p in model.parameters()) / sum(
        p.square().sum() for p in model.parameters()
    )
    scaled = centred * posterior.prior_precision / natural
    information = 0.5 * torch.logdet(torch.eye(4, dtype=torch.float64) + scaled)
    torch.testing.assert_close(
        posterior.novelty(new, "information"), information, rtol=1e-6, atol=1e-9
    )
    # Samples have that covariance, within four standard errors.
    posterior.draw(796)
    changes = posterior.predict(new, "linearised").outputs - closed.point
    found = torch.einsum("sbp,sbq->bpq", changes, changes) / len(changes)
    var = want.diagonal(dim1=1, dim2=2)
    error = ((var[:, :, None] * var[:, None] + want.square()) / len(changes)).sqrt()
    assert ((found - want).abs() <= 4.5 * error).all()


def test_sampled_and_linearised_agree_for_small_changes() -> None:
    model, x, _ = network("encoder")
    posterior = quiet(model, x, delta=1e-2, prior_precision=1e12)
    new = torch.randn(3, 5, 96, dtype=torch.float64)
    sampled, linear = posterior.predict(new), posterior.predict(new, "linearised")
    torch.testing.assert_close(
        sampled.outputs - sampled.point, linear.outputs - linear.point, rtol=1e-3, atol=1e-9
    )


def test_leverage_against_dense() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0.1)
    torch.manual_seed(3)
    new = torch.randn(6, 60, dtype=torch.float64)
    total, h, g = 0.0, x, new
    for module in model:
        if isinstance(module, nn.Linear):
            a, b = (torch.cat([t, torch.ones_like(t[:, :1])], dim=1) for t in (h, g))
            c = a.T @ a
            edge = 0.1 * c.trace() / len(c)
            inverse = torch.linalg.inv(c + edge * torch.eye(len(c), dtype=c.dtype))
            total = total + (((b @ inverse) * b).sum(1) / b.square().sum(1)).log()
        h, g = module(h), module(g)
    torch.testing.assert_close(posterior.novelty(new, "leverage"), total.detach())


@pytest.mark.parametrize("name", ["convnet", "encoder", "decoder", "lstm"])
def test_leverage_of_a_batch_is_that_of_its_examples(name: str) -> None:
    model, x, likelihood = network(name)
    posterior = quiet(model, x, likelihood, delta=0.1)
    whole = posterior.novelty(x, "leverage")
    single = torch.cat([posterior.novelty(x[i : i + 1], "leverage") for i in range(len(x))])
    torch.testing.assert_close(whole, single)


class TimeFirst(nn.Module):
    """Examples on the second axis of what the layer receives, and windows that fold them into the first."""

    def __init__(self, fold: bool) -> None:
        super().__init__()
        self.fold, self.a, self.head = fold, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.fold:  # mixed: neither axis is that of the examples
            h = self.a(x.transpose(0, 1).reshape(-1, 6)).reshape(x.shape[1], len(x), 8)
        else:
            h = self.a(x.transpose(0, 1))
        return self.head(torch.tanh(h).mean(0))


@pytest.mark.parametrize("fold", [False, True])
def test_leverage_finds_the_axis_of_the_examples(fold: bool) -> None:
    torch.manual_seed(0)
    model, x = TimeFirst(fold).double().eval(), torch.randn(5, 4, 6, dtype=torch.float64)
    posterior = quiet(model, x, delta=0.1)
    whole = posterior.novelty(x, "leverage")
    single = torch.cat([posterior.novelty(x[i : i + 1], "leverage") for i in range(5)])
    torch.testing.assert_close(whole, single)


@pytest.mark.parametrize("name", ["mlp", "convnet", "decoder"])
def test_left_out_divergence_against_refits(name: str) -> None:
    """Closed form against the posterior that is really fitted without the example, second order."""
    model, x, likelihood = network(name)
    delta = 0.05
    if name == "decoder":
        delta = 0.5
    posterior = quiet(model, x, likelihood, delta=delta, prior_precision=1.0)
    from nullbayes.moments.second import BlockMoments
    from nullbayes.posterior import layer_left_out
    from nullbayes.posterior.layer_state import LayerState

    state = posterior._fit.state
    probes, layer_left_out.PROBES = layer_left_out.PROBES, 1
    try:
        generator = torch.Generator().manual_seed(0)
        one, rest = x[:1], x[1:]
        found = layer_left_out._left_out(state, posterior.likelihood, one, None, generator)
    finally:
        layer_left_out.PROBES = probes
    sums = [BlockMoments.zeros(b, x.device, None) for b in state.blocks.blocks]
    from nullbayes.moments.verify import seen_by

    sums, _ = seen_by(posterior.functional, state.blocks, rest)
    without = LayerState(state.functional, state.blocks, state.gathered, delta, 0, 2)
    gathered = type(state.gathered)(sums, state.gathered.members, len(rest))
    without.gathered = gathered
    without.edges = state.edges  # the edge stays; only the sums change
    # The same random direction of the output Hessian, and plain autograd for its row.
    weights = state.functional.weights(requires_grad=True)
    point = state.functional(weights, one)
    labels = point.detach().argmax(-1)
    columns = posterior.likelihood.hessian_factor(point.detach(), labels)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, len(columns), generator=generator, dtype=torch.float64)
    row = torch.autograd.grad(
        point, list(weights.values()), torch.einsum("c,c...->...", z[0], columns)
    )
    named = dict(zip(weights, row, strict=True))
    variance = 0.0
    for block, factor in zip(state.blocks.blocks, without.factors, strict=True):
        variance += float(factor.whiten(block.matrix(named)).square().sum())
    want = variance / (2 * labels[0].numel())
    # Inputs of a tied layer are not taken out of its sums: a little less, never more.
    if name == "decoder":
        assert 0.5 * want < found <= want * (1 + 1e-9)
    else:
        assert found == pytest.approx(want, rel=1e-6)


def test_calibration_raises_or_lowers_the_prior_precision() -> None:
    model, x, _ = network("mlp", torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(30)  # wrong, and sure of it: wider functions score better
    posterior = quiet(model, x, delta=1e-2)
    start = posterior.prior_precision
    torch.manual_seed(5)
    new = torch.randn(200, 60)
    path = posterior.calibrate([(new, torch.randint(0, 4, (200,)))], progress=False)
    assert path.nll[path.chosen] == min(path.nll)
    assert posterior.certificate.divergence <= 0.005
    # The path asks for wider functions than the guarantee allows; it is the guarantee that decides.
    assert path.prior_precision[path.chosen] < posterior.prior_precision
    assert posterior.prior_precision == pytest.approx(start, rel=0.2)
    # Labels that the network always has right ask for narrower ones.
    right = model(new).argmax(1)
    with pytest.warns(nb.NullBayesWarning):
        path = posterior.calibrate([(new, right)], progress=False)
    assert posterior.prior_precision == path.prior_precision[path.chosen] > start


@pytest.mark.parametrize("names", [["0.bias", "2.bias"], ["2.weight"]], ids=str)
def test_some_parameters_alone(names: list[str]) -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0.1, parameters=names, prior_precision=1.0)
    assert {n for b in posterior._fit.state.blocks.blocks for n in b.names} == set(names)
    for sample in posterior.sample(1):
        for name, parameter in model.named_parameters():
            assert torch.equal(sample[name], parameter) == (name not in names)
    rows = torch.autograd.functional.jacobian(
        lambda *w: torch.func.functional_call(model, dict(zip(names, w, strict=True)), (x[:1],))[0],
        tuple(model.get_parameter(n).detach() for n in names),
    )
    # Of one example's own inputs: closed form from the factors that plain sums give.
    want = torch.zeros(4, 4, dtype=torch.float64)
    h = torch.tanh(x @ model[0].weight.T + model[0].bias).detach()
    for name, row in zip(names, rows, strict=True):
        c = torch.tensor([[20.0]], dtype=torch.float64) if "bias" in name else h.T @ h
        edge = 0.1 * c.trace() / len(c)
        p = edge * torch.linalg.inv(c + edge * torch.eye(len(c), dtype=c.dtype))
        j = row.reshape(4, -1, len(c))
        want += torch.einsum("poi,ij,qoj->pq", j, p, j)
    torch.testing.assert_close(posterior.covariance(x[:1])[0], want)
    assert posterior.novelty(x, "leverage").isfinite().all()
