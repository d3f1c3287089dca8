"""Layer posteriors of networks that draw random numbers: frozen for each example, or refused."""

import pytest
import torch
from support import says, unchanged
from torch import nn
from torch.nn import functional as F

import nullbayes as nb


class Noisy(nn.Module):
    """Noise on the input, and dropout that is meant to stay."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 60), nn.Linear(60, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x + 0.3 * torch.randn_like(x)))
        return self.second(F.dropout(h, 0.2, training=True))


def make(count=12, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Noisy().double().eval(), torch.randn(count, 40, dtype=torch.float64)


def fitted(model, x, **options):
    posterior = nb.LayerNullSpacePosterior(model, **options)
    return posterior.fit([x[:7], x[7:]], num_samples=4, progress=False)


def test_without_frozen_randomness_it_is_refused():
    model, x = make()
    with says(nb.ModelError, "random"):
        fitted(model, x)
    with says(nb.ModelError, 'randomness="frozen"'):
        fitted(nn.Sequential(nn.Linear(40, 3), nn.Dropout(0.5)).double(), x)
    with says(nb.InputError, "`draws` is 2"):
        nb.LayerNullSpacePosterior(model, draws=2)


@pytest.mark.parametrize("draws", [1, 2])
def test_outputs_with_the_frozen_draws_stand(draws):
    model, x = make()
    with unchanged(model):
        posterior = fitted(model, x, delta=0, prior_precision=1.0, randomness="frozen", draws=draws)
    certificate = posterior.certificate
    assert certificate.held and certificate.examples == len(x)
    assert certificate.weight_change > 0.1
    for draw in range(draws):
        found = posterior.predict(x, draw=draw)
        assert (found.outputs - found.point).abs().max() < 1e-9
    # Another draw was not seen by any layer.
    found = posterior.predict(x, draw=draws)
    assert (found.outputs - found.point).abs().max() > 1e-2
    # An example is the same in every batch and order.
    one = posterior.predict(x[3:4])
    torch.testing.assert_close(one.outputs, posterior.predict(x.flip(0)).outputs[:, -4:-3])


def test_the_sums_are_those_of_the_noisy_inputs():
    model, x = make()
    posterior = fitted(model, x, randomness="frozen", draws=2, prior_precision=1.0)
    seen = []
    handle = model.first.register_forward_hook(lambda m, a, out: seen.append(a[0].detach()))
    functional = posterior.functional
    with handle, torch.no_grad():
        functional(functional.weights(), functional.keyed(x, [0, 1]))
    a = torch.cat([seen[-1], torch.ones(24, 1, dtype=torch.float64)], 1)
    found = posterior._fitted().gathered.sums[0].inputs.values[0]
    torch.testing.assert_close(found, a.T @ a)


def test_scores_updates_and_files(tmp_path):
    model, x = make()
    options = {"randomness": "frozen", "draws": 2, "prior_precision": 1.0}
    posterior = fitted(model, x, **options)
    for score in ("information", "variance", "leverage"):
        alone = torch.cat([posterior.novelty(one[None], score) for one in x])
        torch.testing.assert_close(posterior.novelty(x, score), alone, rtol=1e-6, atol=1e-9)
    part = nb.LayerNullSpacePosterior(model, **options).fit(x[:5], 4, progress=False)
    part.update(x[5:], progress=False)
    torch.testing.assert_close(part.novelty(x), posterior.novelty(x))
    part.remove(x[5:], progress=False)
    assert part.certificate.examples == 5
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = nb.load(tmp_path / "posterior.safetensors", model)
    torch.testing.assert_close(loaded.novelty(x), posterior.novelty(x))
    other = fitted(model, x, randomness="frozen", prior_precision=1.0)
    with says(nb.InputError, "randomness"):
        other.merged(posterior)
    with says(nb.InputError, "exported"):
        posterior.export_module(x)
    assert posterior.joint(x[:2], draw=1).covariance.shape == (6, 6)
