"""Rows within the layer null space: nothing left, other networks, files, soft edges, more data and more samples."""

import pytest
import torch
from support import QUIET, says, unchanged
from torch import nn

import nullbayes as nb
from tests.posterior.test_within import dense, jacobian, make


def covered(delta, weights=1.0):
    """A last layer alone: features of four inputs span all of its three columns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double().eval()
        x, y = weights * torch.randn(40, 3, dtype=torch.float64), torch.randint(0, 2, (40,))
    layers = nb.LayerNullSpacePosterior(model, delta=delta, parameters=["2.weight", "2.bias"])
    return model, x, y, layers.fit((x, y), **QUIET)


def test_no_direction_left_after_both():
    """Rows of all outputs on more examples than there are weights: no variance is left, and none is invented."""
    model, x, y, layers = covered(0.1)
    posterior = nb.NullSpacePosterior(
        model, preserve="outputs", within=layers, parameters=["2.weight", "2.bias"], delta=0
    )
    with unchanged(model):
        posterior.fit((x, y), 4, **QUIET)
    assert posterior.certificate.rank == posterior.space.total == 6
    size = layers._fitted().state.change(0)["2.weight"].norm()
    assert posterior._fit.unit.norm() <= 1e-7 * size
    assert posterior.novelty(3 * x[:5], score="variance").max() <= 1e-12
    assert posterior.joint(3 * x[:3]).covariance.abs().max() <= 1e-12
    mean = posterior.predict(x[:5]).mean
    torch.testing.assert_close(mean, model(x[:5]).softmax(-1).detach())


def test_layers_that_leave_next_to_nothing():
    """An edge far below every eigenvalue: samples shrink with its root, and the rows still hold."""
    sizes = []
    for delta in (1e-2, 1e-8):
        model, x, y, layers = covered(delta)
        posterior = nb.NullSpacePosterior(
            model, preserve="outputs", within=layers, parameters=["2.weight", "2.bias"],
            prior_precision=1.0, delta=0,
        )  # fmt: skip
        posterior.fit((x[:1], y[:1]), 8, **QUIET)
        assert posterior._fit.unit.isfinite().all()
        rows = jacobian_of_last(model, posterior.space, x[:1])
        assert (posterior._fit.unit @ rows.T).norm() <= 1e-9 * posterior._fit.unit.norm()
        sizes.append(float(posterior._fit.unit.norm()))
    assert sizes[1] == pytest.approx(1e-3 * sizes[0], rel=0.1)


def jacobian_of_last(model, space, x):
    weights = {n: p.detach() for n, p in model.named_parameters() if n in space.by_name}
    rows = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(weights)
    return space.flatten(rows).reshape(-1, space.total)


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_soft_rows_within_soft_layers(delta):
    """``delta`` of the rows, in the units of the prior's coordinates: against the dense shrinkage."""
    model, x, y, layers = make("perceptron")
    posterior = nb.NullSpacePosterior(
        model, preserve="outputs", within=layers, prior_precision=1.0, delta=delta
    )
    posterior.fit((x[:4], y[:4]), 4, **QUIET)
    rows, prior = jacobian(model, posterior.space, x[:4]), dense(model, posterior, layers, x[:0])
    gram = rows @ prior @ rows.T
    edge = delta * float(gram.diagonal().mean()) if delta else 0.0
    inverse = torch.linalg.pinv(gram + edge * torch.eye(len(gram)), rtol=1e-12, hermitian=True)
    wanted = prior - prior @ rows.T @ inverse @ rows @ prior
    new = jacobian(model, posterior.space, x[20:23])
    found = posterior.joint(x[20:23]).covariance
    hard = new @ dense(model, posterior, layers, x[:4]) @ new.T
    if delta:  # more is left than by hard rows, less than by none
        assert found.trace() >= hard.trace() * (1 - 1e-9)
        assert found.trace() <= (new @ prior @ new.T).trace() * (1 + 1e-9)
    else:
        torch.testing.assert_close(found, new @ wanted @ new.T, rtol=1e-7, atol=1e-10)


def test_other_networks_and_changed_weights_are_refused():
    model, x, y, layers = make("perceptron")
    with torch.no_grad():
        model[0].weight[0, 0] += 1.0
    with says(nb.ModelError, "0.weight"):
        nb.NullSpacePosterior(model, within=layers)
    with torch.no_grad():
        model[0].weight[0, 0] -= 1.0
    twin, _, _, theirs = make("perceptron")
    with torch.no_grad():
        twin[3].weight.mul_(1.01)
    theirs = nb.LayerNullSpacePosterior(twin, delta=0.1).fit((x, y), **QUIET)
    with says(nb.InputError, "`within`", "another network"):
        nb.NullSpacePosterior(model, within=theirs)
    with says(nb.InputError, "`within` is 4", "LayerNullSpacePosterior"):
        nb.NullSpacePosterior(model, within=4)
    with says(nb.InputError, "`parameters` is a function of (name)", "lambda name, parameter"):
        nb.NullSpacePosterior(model, parameters=lambda name: True)


def test_weights_that_change_after_the_fit_are_refused():
    model, x, y, layers = make("perceptron")
    posterior = nb.NullSpacePosterior(model, within=layers).fit((x[:8], y[:8]), 3, **QUIET)
    with torch.no_grad():
        model[0].weight[0, 0] += 1.0
    with says(nb.ModelError, "0.weight"):
        posterior.predict(x[:2])
    before = posterior._fit
    with says(nb.ModelError, "`within`", "0.weight", "fit it anew"):
        posterior.fit((x[:8], y[:8]), 3, **QUIET)
    assert posterior._fit is before


def test_the_layers_may_go_on_without_it():
    """What was fitted is a copy: data that the layer posterior gets later change nothing."""
    model, x, y, layers = make("perceptron")
    posterior = nb.NullSpacePosterior(model, within=layers).fit((x[:8], y[:8]), 3, **QUIET)
    before, unit = posterior.novelty(x[20:25]), posterior._fit.unit.clone()
    layers.update((3 * x, y), **QUIET)
    torch.testing.assert_close(posterior.novelty(x[20:25]), before, rtol=0, atol=0)
    posterior.fit((x[:8], y[:8]), 3, **QUIET)
    torch.testing.assert_close(posterior._fit.unit, unit, rtol=0, atol=0)
    later = nb.NullSpacePosterior(model, within=layers).fit((x[:8], y[:8]), 3, **QUIET)
    assert (later._fit.unit - unit).norm() > 0.01 * unit.norm()


def test_a_loaded_layer_posterior_serves_as_well(tmp_path):
    model, x, y, layers = make("convolutions")
    layers.save(tmp_path / "layers.safetensors")
    loaded = nb.load(tmp_path / "layers.safetensors", model)
    first, second = (
        nb.NullSpacePosterior(model, within=prior, prior_precision=2.0).fit(
            (x[:6], y[:6]), 3, **QUIET
        )
        for prior in (layers, loaded)
    )
    torch.testing.assert_close(second._fit.unit, first._fit.unit, rtol=1e-12, atol=0)


def test_a_file_holds_samples_and_says_what_it_cannot(tmp_path):
    model, x, y, layers = make("tokens")
    posterior = nb.NullSpacePosterior(model, within=layers).fit((x[:6], y[:6]), 5, **QUIET)
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = nb.load(tmp_path / "posterior.safetensors", model)
    torch.testing.assert_close(loaded._fit.unit, posterior._fit.unit, rtol=0, atol=0)
    assert loaded.prior_precision == posterior.prior_precision
    assert loaded.certificate.left_out_divergence == posterior.certificate.left_out_divergence
    for a, b in zip(loaded.sample(2), posterior.sample(2), strict=True):
        for name, value in b.items():
            torch.testing.assert_close(a[name], value, rtol=0, atol=0)
    with says(nb.NotFittedError, "loaded from a file", "fit"):
        loaded.draw(2)
    with says(
        nb.InputError, "`within=`", "comes from a file", "NullSpacePosterior(model, within=layers)"
    ):
        loaded.fit((x[:6], y[:6]), 5, **QUIET)  # not as if it had never been within anything
    with says(nb.InputError, "share", "within"):
        loaded.novelty(x[20:23], score="share")
    loaded.save(tmp_path / "again.safetensors")
    with says(nb.InputError, "`within=`"):
        nb.load(tmp_path / "again.safetensors", model).fit((x[:6], y[:6]), 5, **QUIET)
    plain = nb.NullSpacePosterior(model).fit((x[:6], y[:6]), 5, **QUIET)
    plain.save(tmp_path / "plain.safetensors")
    nb.load(tmp_path / "plain.safetensors", model).fit((x[:6], y[:6]), 5, **QUIET)


@pytest.mark.parametrize("name", ["perceptron", "tokens"])
def test_more_samples_continue_the_stream(name):
    model, x, y, layers = make(name)
    options = {"within": layers, "prior_precision": 3.0, "delta": 0}
    few = nb.NullSpacePosterior(model, **options).fit((x[:6], y[:6]), 3, **QUIET)
    many = nb.NullSpacePosterior(model, **options).fit((x[:6], y[:6]), 8, **QUIET)
    few.draw(5)
    torch.testing.assert_close(few._fit.unit, many._fit.unit, rtol=1e-9, atol=1e-11)


def test_an_update_is_a_fit_on_all():
    model, x, y, layers = make("convolutions")
    options = {"within": layers, "prior_precision": 3.0, "delta": 0, "preserve": "outputs"}
    whole = nb.NullSpacePosterior(model, **options).fit((x[:7], y[:7]), 4, **QUIET)
    part = nb.NullSpacePosterior(model, **options).fit((x[:3], y[:3]), 4, **QUIET)
    with unchanged(model):
        part.update((x[3:7], y[3:7]), **QUIET)
    size = whole._fit.unit.norm()
    assert (part._fit.unit - whole._fit.unit).norm() < 1e-8 * size
    rows = jacobian(model, part.space, x[:7])
    assert (part._fit.unit @ rows.T).abs().max() < 1e-8 * size * rows.norm()
