"""Rows of some examples, with the layer null space of all of them as the prior: against dense float64."""

import pytest
import torch
from support import QUIET, says, unchanged
from torch import nn

import nullbayes as nb


class Tokens(nn.Module):
    """A table, attention, a normalisation."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, t):
        h = self.table(t)
        return self.head(self.norm(h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


def perceptron():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


NETWORKS = {
    "perceptron": (perceptron, lambda: torch.randn(30, 5, dtype=torch.float64)),
    "convolutions": (convolutions, lambda: torch.randn(30, 2, 4, 4, dtype=torch.float64)),
    "tokens": (Tokens, lambda: torch.randint(0, 8, (30, 4))),
}


def make(name, delta=0.1):
    build, data = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = build().double().eval(), data(), torch.randint(0, 3, (30,))
    return model, x, y, nb.LayerNullSpacePosterior(model, delta=delta).fit((x, y), **QUIET)


def jacobian(model, space, x):
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def f(w):
        return torch.func.functional_call(model, w, (x,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        rows = torch.func.jacrev(f)(weights)
    return space.flatten(rows).reshape(-1, space.total)


def dense(model, posterior, layers, some):
    """The covariance written out: that of the layers, conditioned on the rows of ``some``."""
    space = posterior.space
    prior = torch.zeros(space.total, space.total, dtype=torch.float64)
    at = {slot.name: slice(slot.start, slot.stop) for slot in space.slots}
    for block, factor in zip(
        layers._fit.state.blocks.blocks, layers._fit.state.factors, strict=True
    ):
        index = torch.cat([torch.arange(space.total)[at[n]] for n in block.names])
        eye = torch.eye(len(index), dtype=torch.float64)
        parts = eye.split([at[n].stop - at[n].start for n in block.names], dim=1)
        shapes = [space.by_name[n].shape for n in block.names]
        tensors = {n: p.reshape(-1, *s) for n, p, s in zip(block.names, parts, shapes, strict=True)}
        projected = block.tensors(factor.project(block.matrix(tensors)))
        flat = torch.cat([projected[n].reshape(len(index), -1) for n in block.names], 1)
        prior[index[:, None], index] = flat
    rows = jacobian(model, space, some)
    gram = rows @ prior @ rows.T
    return (
        prior - prior @ rows.T @ torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ rows @ prior
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_covariance_is_that_of_the_layers_given_the_rows(name):
    model, x, y, layers = make(name)
    posterior = nb.NullSpacePosterior(
        model, preserve="outputs", within=layers, prior_precision=3.0, delta=0
    )
    with unchanged(model):
        posterior.fit((x[:6], y[:6]), num_samples=4, **QUIET)
    assert posterior.certificate.audit.passed
    new = x[20:23]
    rows = jacobian(model, posterior.space, new)
    covariance = dense(model, posterior, layers, x[:6])
    wanted = rows @ covariance @ rows.T / 3
    torch.testing.assert_close(posterior.joint(new).covariance, wanted, rtol=1e-7, atol=1e-10)
    # Samples leave the rows' outputs as they are, and what no layer moves.
    assert (posterior._fit.unit @ jacobian(model, posterior.space, x[:6]).T).abs().max() < 1e-8
    blocks = wanted.reshape(3, 3, 3, 3)[torch.arange(3), :, torch.arange(3)]
    centre = torch.eye(3, dtype=torch.float64) - 1 / 3
    variance = (centre @ blocks @ centre).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(
        posterior.novelty(new, score="variance", exact=True), variance, rtol=1e-6, atol=1e-10
    )
    posterior.draw(1500)
    for score in ("variance", "information"):
        exact = posterior.novelty(new, score=score, exact=True)
        sampled = posterior.novelty(new, score=score, exact=False)
        torch.testing.assert_close(sampled, exact, rtol=0.2, atol=1e-6)
    moved = posterior._fit.unit @ rows.T
    found = moved.T @ moved / len(moved) / 3
    var = wanted.diagonal()
    error = ((var[:, None] * var + wanted.square()) / len(moved)).sqrt()
    assert ((found - wanted).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize(
    "solver", ["dual Cholesky", nb.solvers.ConjugateGradient(tolerance=1e-12), "primal QR"], ids=str
)
def test_every_solver_and_more_data(solver):
    model, x, y, layers = make("perceptron")
    options = {"within": layers, "prior_precision": 3.0, "solver": solver, "delta": 0}
    one = nb.NullSpacePosterior(model, **options).fit((x[:8], y[:8]), num_samples=5, **QUIET)
    reference = nb.NullSpacePosterior(model, **options | {"solver": "dual Cholesky"})
    reference.fit((x[:8], y[:8]), num_samples=5, **QUIET)
    size = reference._fit.unit.norm()
    assert (one._fit.unit - reference._fit.unit).norm() < 1e-8 * size
    part = nb.NullSpacePosterior(model, **options).fit((x[:5], y[:5]), num_samples=5, **QUIET)
    part.update((x[5:8], y[5:8]), **QUIET)
    assert (part._fit.unit - reference._fit.unit).norm() < 1e-8 * size


def test_evidence_gradients_and_files(tmp_path):
    model, x, y, layers = make("perceptron")
    posterior = nb.NullSpacePosterior(model, within=layers).fit((x[:8], y[:8]), 6, **QUIET)
    certificate = posterior.certificate
    assert certificate.held and certificate.left_out_divergence <= 0.0201
    new = x[20:23].clone().requires_grad_()
    joint = posterior.joint(new, differentiable=True)
    torch.testing.assert_close(joint.covariance.detach(), posterior.joint(new.detach()).covariance)
    gradient = torch.autograd.grad(joint.covariance.trace(), new)[0]
    step = 1e-5 * torch.eye(5, dtype=torch.float64)[0]
    up, down = (posterior.joint(x[20:23] + s * step).covariance.trace() for s in (1, -1))
    assert float(gradient[:, 0].sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-4)
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    loaded = nb.load(path, model)
    wanted = posterior.novelty(x[20:23], exact=False)
    torch.testing.assert_close(loaded.novelty(x[20:23]), wanted)
    torch.testing.assert_close(loaded.predict(x[20:23]).mean, posterior.predict(x[20:23]).mean)


def test_what_does_not_fit_together_is_named():
    model, x, y, layers = make("perceptron")
    with says(nb.InputError, "delta=0"):
        nb.NullSpacePosterior(model, within=make("perceptron", 0.0)[3])
    with says(nb.InputError, "another network"):
        nb.NullSpacePosterior(make("convolutions")[0], within=layers)
    with says(nb.InputError, "other parameters"):
        nb.NullSpacePosterior(model, within=layers, parameters=["0.weight"])
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    masks["0.weight"][0] = False
    with says(nb.InputError, "masks"):
        nb.LayerNullSpacePosterior(model, parameters=masks)
    with says(nb.InputError, "other parameters"):
        nb.NullSpacePosterior(model, within=layers, parameters=masks)
    with says(nb.NotFittedError, "has not been fitted"):
        nb.NullSpacePosterior(model, within=nb.LayerNullSpacePosterior(model))
    names = [n for n, _ in model.named_parameters()]
    with says(nb.InputError, "within"):
        nb.NullSpacePosterior(model, within=layers, prior_precision=dict.fromkeys(names, 1.0))
    posterior = nb.NullSpacePosterior(model, within=layers).fit((x[:8], y[:8]), 6, **QUIET)
    with says(nb.InputError, "share"):
        posterior.novelty(x[20:23], score="share")
