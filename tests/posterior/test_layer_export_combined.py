"""The default score in exported modules: the posterior's own, to rounding."""

import pytest
import torch
from support import says, unchanged
from torch import nn

import nullbayes as nb
from tests.moments.layer_networks import NETWORKS, network, quiet
from tests.posterior.test_layer_export import exported_program, extended, inferred, kinds, session


def close(found, wanted, tolerance=1e-5):
    """Squares of deviations reach far: relative to themselves, and to one."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert off(found, wanted) < tolerance, off(found, wanted)


def off(found, wanted):
    return float(((found - wanted).abs() / (1 + wanted.abs())).max())


def by_hand(posterior, x):
    """The score from its description: deviations above the median of training examples, squared."""
    references = posterior._references()
    sizes, directions, outputs = posterior._of_layers().means(x)
    columns = [sizes.log(), directions.log()[:, references.last, None]]
    energy = posterior.likelihood.energy(outputs)
    if energy is not None:
        columns.append(energy.double().reshape(len(x), -1).mean(1, keepdim=True))
    centre, spread = references.values
    excess = ((torch.cat(columns, 1) - centre) / spread).clamp_min(0).square()
    layers = sizes.shape[1]
    total = excess[:, :layers].mean(1) + excess[:, layers]
    return total if energy is None else total + 0.5 * excess[:, layers + 1]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_module_gives_the_default_score(name):
    model, x, likelihood = network(name)
    posterior = quiet(model, x, likelihood)
    with unchanged(model):
        module = posterior.export_module(x, score="combined")
    strange = extended(x, len(x) + 2)
    if strange.is_floating_point():
        strange = 3 * strange
    for some in (x[:1], x, strange):
        wanted = posterior.novelty(some)
        close(module(some)[-1], wanted, 1e-9)
        close(by_hand(posterior, some).to(wanted.dtype), wanted, 1e-9)
        torch.testing.assert_close(module(some)[0], model(some).detach())
    assert module(strange)[-1].max() > 0


def test_a_regression_has_no_energy():
    model, x, _ = network("mlp")
    posterior = nb.LayerNullSpacePosterior(model, nb.Regression(0.1)).fit(x, progress=False)
    module = posterior.export_module(x, score="combined")
    assert not module.excess.energetic
    close(module(3 * x)[-1], posterior.novelty(3 * x), 1e-9)


def test_layers_of_every_kind():
    model, x = kinds()
    posterior = nb.LayerNullSpacePosterior(model).fit([(*x, None)], progress=False)
    module = posterior.export_module(x, score="combined")
    some = tuple(2 * extended(t, 9) for t in x)
    close(module(*some)[-1], posterior.novelty(some), 1e-9)


@pytest.mark.parametrize("name", ["mlp", "decoder"])
def test_onnx_runtime_gives_the_default_score(name):
    model, x, likelihood = network(name, torch.float32)
    posterior = quiet(model, x, likelihood)
    made = session(posterior.export_module(x, score="combined"), x)
    assert [o.name for o in made.get_outputs()][-1] == "novelty"
    for count in (1, len(x) + 2):
        some = extended(x, count)
        close(inferred(made, some)[-1], posterior.novelty(some))


def test_torch_export_gives_the_default_score():
    model, x, likelihood = network("convnet", torch.float32)
    posterior = quiet(model, x, likelihood)
    program = exported_program(posterior.export_module(x, score="combined", samples=2), x)
    for count in (1, len(x) + 2):
        some = extended(x, count)
        wanted = posterior.novelty(some)
        # On some processors the posterior's own score of an input moves with the batch that it is in.
        moved = off(torch.cat([posterior.novelty(one[None]) for one in some]), wanted)
        close(program.module()(some)[-1], wanted, 1e-5 + moved)


def test_what_cannot_be_exported_is_named(tmp_path):
    model, x, _ = network("mlp")
    posterior = quiet(model, x)
    with says(nb.InputError, "`score`", "'leverage', 'combined'"):
        posterior.export_module(x, score="information")
    with says(nb.InputError, "`tolerance` is 0.2", "combined", "leverage"):
        posterior.export_module(x, score="combined", tolerance=0.2)
    posterior.save(tmp_path / "with.safetensors")  # the file holds the references
    loaded = nb.load(tmp_path / "with.safetensors", model)
    close(loaded.export_module(x, score="combined")(x)[-1], posterior.novelty(x), 1e-9)
    state = loaded._fitted().state
    state.references, state.gathered.kept = None, []
    with says(nb.InputError, "score='combined'", "Fit and save it again"):
        loaded.export_module(x, score="combined")
    assert loaded.export_module(x)(x)[-1].shape == (len(x),)


def test_where_some_weights_alone_take_part():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = nb.LayerNullSpacePosterior(model, parameters=["0.weight", "0.bias"])
    posterior.fit(x, progress=False)
    module = posterior.export_module(x, score="combined")
    close(module(2 * x)[-1], posterior.novelty(2 * x), 1e-9)
