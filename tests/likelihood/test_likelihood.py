"""What likelihoods refuse, the observation noise, storage, and likelihoods of one's own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from nullbayes.errors import InputError, NonFiniteError, NotFittedError
from nullbayes.likelihood import (
    Binary,
    Classification,
    Likelihood,
    Moments,
    Regression,
    epistemic_variance,
    likelihood_from_config,
    register_likelihood,
    resolve_likelihood,
)
from tests.likelihood.likelihood_setup import F64, each_case, gram, labels, normal

# -- messages ------------------------------------------------------------------------------------

BAD = [
    (
        Classification(),
        normal(3, 10),
        torch.tensor([0, 10, 3]),
        "labels reach 10, model has 10 outputs, expected 0..9",
    ),
    (Classification(), normal(3, 10), torch.tensor([0, -1, 3]), r"down to -1.*ignore_index=-1"),
    (Classification(), normal(3, 3), torch.tensor([1, 2, 3]), r"start at 1: pass `targets - 1`"),
    (
        Classification(),
        normal(3, 10),
        torch.zeros(3),
        r"float32 and shape \(3,\).*targets.long\(\).*regression",
    ),
    (
        Classification(),
        normal(3, 10),
        labels(10, 3, 1),
        r"expected \(3,\)\. `targets.reshape\(\(3,\)\)`",
    ),
    (Classification(), normal(3, 5), F.one_hot(labels(5, 3), 5), "one-hot"),
    (Classification(), normal(3, 5, 4), labels(5, 3, 7), r"classes on axis 2.*class_axis"),
    (Classification(), normal(3, 1), labels(1, 3), 'likelihood="binary"'),
    (Classification(), normal(3), labels(2, 3), 'likelihood="binary"'),
    (Classification(), normal(3, 5), torch.full((3, 5), 0.5), r"sum to 2\.5 .* expected 1"),
    (Classification(), normal(3, 5), normal(3, 5), "soft labels go down to -"),
    (Classification(weight=[1, 2]), normal(3, 5), labels(5, 3), "`weight` has 2 entries"),
    (Classification(), normal(3, 5), labels(5, 4), "one target per example, 3"),
    (Classification(), labels(5, 3, 5), labels(5, 3), "dtype torch.int64, expected real floating"),
    (Classification(), normal(0, 5), labels(5, 0), "at least one example"),
    (Classification(), normal(3, 5), [1, 2, 3], "targets are a list"),
    (Classification(), {"logits": 1}, labels(5, 3), r"outputs are a dict.*forward="),
    (Binary(), normal(3, 4), labels(4, 3), 'likelihood="classification"'),
    (Binary(), normal(3, 4), labels(2, 3, 5), "expected the same shape"),
    (Binary(), normal(3), torch.tensor([-1, 1, 1]), r"\(targets \+ 1\) / 2"),
    (Binary(), normal(3, 1), torch.tensor([0, 1, 2]), r"lie in \[0, 2\].*classification"),
    (Regression(1.0), normal(3, 2), normal(3), "broadcasting"),
    (Regression([1.0, 2.0]), normal(3, 4), normal(3, 4), r"noise_variance has shape \(2,\)"),
    (Regression(), normal(3, 1), normal(3, 1).to(torch.complex64), "complex64"),
]


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"), BAD, ids=[b[3] for b in BAD]
)
def test_refusals_name_place_finding_and_mend(likelihood, outputs, targets, message):
    with pytest.raises(InputError, match=r"(?s)^train_loader, batch 3: .*" + message):
        likelihood.validate(outputs, targets, "train_loader, batch 3")


@pytest.mark.parametrize(
    "likelihood", [Classification(), Binary(), Regression(1.0)], ids=lambda x: x.name
)
def test_nan_and_infinity_are_refused(likelihood):
    good = torch.full((4, 2), 0.5)
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[2, 0] = value
        with pytest.raises(NonFiniteError, match=r"batch 3: the outputs .* 1 of 4 .*example 2"):
            likelihood.validate(bad, good, "batch 3")
        with pytest.raises(NonFiniteError, match=r"batch 3: the targets .* 1 of 4 .*example 2"):
            likelihood.validate(good, bad, "batch 3")
    likelihood.validate(good, good, "batch 3")


def test_bad_settings_are_refused():
    for weight in ([-1.0, 2.0], [[1.0]], [0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(InputError, match="weight is"):
            Classification(weight=weight)
    for noise in (0.0, -1.0, [1.0, math.nan], [], "fitted"):
        with pytest.raises(InputError, match="noise_variance is"):
            Regression(noise)
    for value in ("softmax", None, Classification, 3):
        with pytest.raises(InputError, match=r"'binary', .*'classification'.*'regression'"):
            resolve_likelihood(value)


# -- observation noise ---------------------------------------------------------------------------


class Unread:
    def __iter__(self):
        raise AssertionError("the batches were read")


def test_noise_is_the_mean_squared_residual_of_each_channel():
    outputs, targets = normal(7, 2, dtype=torch.float32), normal(7, 2, seed=2, dtype=torch.float32)
    regression = Regression()
    assert regression.needs_noise_fit and regression.noise_variance is None
    with pytest.raises(NotFittedError, match="fit_noise"):
        regression.loss(outputs, targets)
    regression.validate(outputs, targets, "batch 0")  # possible before the fit
    regression.fit_noise(iter([(outputs[:3], targets[:3]), (outputs[3:], targets[3:])]))
    expected = (outputs.double() - targets.double()).square().mean(0)
    assert_close(regression.noise_variance, expected)
    # The estimate is the minimum of the summed loss over the noise.
    variance = expected.clone().requires_grad_()
    nll = (
        -torch.distributions.Normal(outputs.double(), variance.sqrt())
        .log_prob(targets.double())
        .sum()
    )
    assert_close(regression.loss(outputs.double(), targets.double()).sum(), nll.detach())
    assert_close(
        torch.autograd.grad(nll, variance)[0], torch.zeros(2, dtype=F64), atol=1e-10, rtol=0
    )
    regression.fit_noise([(2 * outputs, 2 * targets)])  # new data fits it anew
    assert_close(regression.noise_variance, 4 * expected)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((6,), (0,)), ((6, 3), (0,)), ((6, 4, 3), (0, 1)), ((6, 3, 2, 2), (0, 2, 3))],
)
def test_noise_channels_by_output_shape(shape, dims):
    outputs, targets = normal(*shape), normal(*shape, seed=2)
    regression = Regression()
    regression.fit_noise([(outputs, targets)])
    expected = (outputs - targets).square().mean(dims, keepdim=True)
    assert_close(regression.noise_variance, expected.flatten())
    aleatoric = regression.moments(outputs[None], outputs, linearised=True).aleatoric
    assert_close(aleatoric, expected.expand(shape))


def test_noise_refusals():
    with pytest.raises(InputError, match="no examples"):
        Regression().fit_noise([])
    with pytest.raises(InputError, match=r"fits an output exactly.*noise_variance="):
        Regression().fit_noise([(normal(3, 2), normal(3, 2))])
    with pytest.raises(InputError, match="batch 1: 3 output channels"):
        Regression().fit_noise([(normal(3, 2), 2 * normal(3, 2)), (normal(3, 3), 2 * normal(3, 3))])
    with pytest.raises(InputError, match=r"batch 0: .*same shape"):
        Regression().fit_noise([(normal(3, 2), normal(3))])


@pytest.mark.parametrize(
    "likelihood", [Classification(), Binary(), Regression(2.0)], ids=lambda x: x.name
)
def test_noise_fit_leaves_batches_unread_when_there_is_nothing_to_fit(likelihood):
    assert not likelihood.needs_noise_fit
    before = likelihood.config()
    likelihood.fit_noise(Unread())
    assert likelihood.config() == before


# -- registry, storage and subclasses ------------------------------------------------------------


@each_case
def test_config_round_trip(case):
    likelihood, outputs, targets = case
    stored = json.loads(json.dumps(likelihood.config()))
    loaded = likelihood_from_config(stored)
    assert type(loaded) is type(likelihood) and loaded.config() == stored
    assert_close(loaded.loss(outputs, targets), likelihood.loss(outputs, targets), rtol=0, atol=0)
    assert repr(loaded) == repr(likelihood)


def test_settings_are_kept_in_float64():
    assert Regression(0.1).noise_variance.item() == 0.1
    assert Classification(weight=[0.1, 0.7]).weight.tolist() == [0.1, 0.7]
    own = torch.tensor([0.5, 2.0], dtype=F64)
    regression = Regression(own)
    own.zero_()  # the caller's tensor stays the caller's
    assert regression.noise_variance.tolist() == [0.5, 2.0]


def test_fitted_noise_survives_storage():
    regression = Regression()
    regression.fit_noise([(normal(5, 2), normal(5, 2, seed=1))])
    loaded = likelihood_from_config(json.loads(json.dumps(regression.config())))
    assert_close(loaded.noise_variance, regression.noise_variance, rtol=0, atol=0)
    assert loaded.needs_noise_fit


def test_resolve_and_registry():
    for name in ("classification", "binary", "regression"):
        assert resolve_likelihood(name).name == name
        assert resolve_likelihood(name) is not resolve_likelihood(name)
    own = Classification(ignore_index=None)
    assert resolve_likelihood(own) is own
    with pytest.raises(InputError, match=r"'nobody'.*register_likelihood"):
        likelihood_from_config({"name": "nobody"})
    with pytest.raises(InputError, match="stored settings"):
        likelihood_from_config({"name": "binary", "colour": "red"})
    with pytest.raises(InputError, match="belongs to Binary"):
        register_likelihood(type("Impostor", (Poisson,), {"name": "binary"}))


@register_likelihood
class Poisson(Likelihood):
    """What a user writes: `loss` and `moments`, nothing else."""

    name = "poisson"

    def loss(self, outputs, targets):
        nll = outputs.exp() - targets * outputs + torch.lgamma(targets + 1)
        return nll.flatten(1).sum(1)

    def moments(self, draws, point, linearised):
        rate, variance = draws.exp(), epistemic_variance(draws, point, linearised=linearised)
        return Moments(
            rate.mean(0), variance, rate.mean(0) + rate.var(0), rate.mean(0), rate.var(0)
        )


def test_a_subclass_gets_the_rest():
    likelihood, outputs, targets = (
        resolve_likelihood("poisson"),
        normal(4, 3),
        1.0 * labels(5, 4, 3),
    )
    likelihood.validate(outputs, targets, "batch 0")
    assert_close(likelihood.loss_gradient(outputs, targets), outputs.exp() - targets)
    factor = likelihood.hessian_factor(outputs, targets)
    assert factor.shape[0] == likelihood.hessian_rank((3,)) == 3
    assert_close(gram(factor), torch.diag_embed(outputs.exp()))
    draws = outputs + normal(6, 4, 3, seed=9)
    joint = torch.distributions.Poisson(draws.exp()).log_prob(targets).sum(-1).exp().mean(0).log()
    assert_close(likelihood.log_predictive(draws, targets), joint)
    assert_close(
        likelihood_from_config(likelihood.config()).loss(outputs, targets),
        likelihood.loss(outputs, targets),
    )
    with pytest.raises(NonFiniteError, match="batch 1: the outputs"):
        likelihood.validate(outputs / 0, targets, "batch 1")


class Odd(Poisson):
    """A loss set by the test, not registered."""

    def __init__(self, function):
        self.function = function

    def loss(self, outputs, targets):
        return self.function(outputs)


def test_default_factor_of_awkward_losses():
    outputs, targets = normal(4, 2), normal(4, 2)
    linear = Odd(lambda f: f.sum(1))  # no second derivative at all
    assert linear.hessian_factor(outputs, targets).count_nonzero() == 0
    saddle = Odd(lambda f: (f[:, 0].square() - f[:, 1].square()) / 2)  # Hessian diag(1, -1)
    positive = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)
    assert_close(gram(saddle.hessian_factor(outputs, targets)), positive.expand(4, 2, 2))
    with pytest.raises(InputError, match=r"one value per example, shape \(4,\), got \(\)"):
        Odd(lambda f: f.square().mean()).hessian_factor(outputs, targets)
