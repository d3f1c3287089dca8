"""Predictions, novelty, calibration, evidence and plans of fitted posteriors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

import nullbayes as nb
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.fit.evidence import fixed_point
from nullbayes.jacobian import linearise
from tests.posterior.posterior_setup import EXACT, QUIET, dense_rows, loader, problem


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Any], list[Any]]:
    """A small network trained on three overlapping blobs, long enough to overfit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
        y = torch.arange(180) % 3
        x = centres[y] + 1.2 * torch.randn(180, 2)
        model = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)
        )
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[:120]), y[:120]).backward()
            optimiser.step()
    return model.eval(), loader(x[:120], y[:120], 32), loader(x[120:], y[120:], 25)


def test_the_guarantee_on_a_trained_network(
    trained: tuple[nn.Module, list[Any], list[Any]],
) -> None:
    model, train, _ = trained
    posterior = nb.NullSpacePosterior(model).fit(train, num_samples=30, **QUIET)
    c = posterior.certificate
    assert c.posterior_score == c.network_score
    assert c.held and "held" in c.verdict and c.null_dim > 0
    assert c.drift < 0.01 and c.residual < 0.05
    laplace = nb.LaplacePosterior(model).fit(train, num_samples=30, **QUIET).certificate
    assert laplace.drift > 10 * c.drift and not laplace.held
    assert "does not promise" in laplace.verdict


def test_linearised_predictions_are_jacobian_products(trained: Any) -> None:
    model, train, val = trained
    posterior = nb.NullSpacePosterior(model).fit(train, num_samples=5, **QUIET)
    x = val[0][0][:4]
    prediction = posterior.predict(x)
    change = (posterior._samples() @ dense_jacobian(model, x).T).reshape(5, 4, 3)
    assert_close(prediction.outputs, model(x) + change, atol=1e-4, rtol=1e-4)
    both = torch.cat([prediction.point + change, prediction.point - change])
    assert_close(prediction.mean, both.softmax(2).mean(0), atol=1e-4, rtol=1e-4)
    assert_close(prediction.variance, change.square().mean(0), atol=1e-4, rtol=1e-4)
    assert_close(prediction.total, prediction.aleatoric + prediction.epistemic, atol=1e-5, rtol=0)
    # The same functions for every batch: cutting a batch in two changes nothing.
    halves = torch.cat([posterior.predict(x[:1]).outputs, posterior.predict(x[1:]).outputs], dim=1)
    assert_close(halves, prediction.outputs, atol=1e-5, rtol=1e-5)


def test_two_classes_never_change_places() -> None:
    """Draws and their mirror images: whatever the samples, the more probable of two sides stays so, anywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        two = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
        one = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
        x, elsewhere = torch.randn(8, 3), 3 * torch.randn(400, 3)
    classes = nb.NullSpacePosterior(two, prior_precision=3.0)
    classes.fit([(x, torch.arange(8) % 2)], 3, **QUIET)
    labels = nb.NullSpacePosterior(one, "binary", prior_precision=3.0)
    labels.fit([(x, torch.arange(24).reshape(8, 3) % 2)], 3, **QUIET)
    moved = classes.predict(elsewhere)
    assert bool((moved.outputs.argmax(2) != moved.point.argmax(1)).any())  # single draws do change
    assert_close(moved.mean.argmax(1), moved.point.argmax(1))
    moved = labels.predict(elsewhere)
    assert_close(moved.mean >= 0.5, moved.point >= 0)
    # The network with sampled weights has no such symmetry, and is not given one.
    sampled = classes.predict(elsewhere, method="sampled")
    assert_close(sampled.mean, sampled.outputs.softmax(2).mean(0))


def test_forward_mode_agrees_with_rows(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, val = trained
    posterior = nb.NullSpacePosterior(model).fit(train, num_samples=5, **QUIET)
    x = val[0][0]
    by_rows = posterior.predict(x).outputs
    monkeypatch.setattr(linearise, "REVERSE_OUTPUTS_PER_SAMPLE", 0)
    assert_close(posterior.predict(x).outputs, by_rows, atol=1e-5, rtol=1e-5)

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no forward mode")

    monkeypatch.setattr(torch.func, "jvp", refuse)
    assert_close(posterior.predict(x).outputs, by_rows, atol=1e-5, rtol=1e-5)


def test_sampled_predictions_and_state_dicts(trained: Any) -> None:
    model, train, val = trained
    posterior = nb.NullSpacePosterior(model).fit(train, num_samples=4, **QUIET)
    x = val[0][0]
    prediction = posterior.predict(x, method="sampled")
    clone = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)
    )
    dicts = list(posterior.sample())
    assert len(dicts) == 4
    for weights, outputs in zip(dicts, prediction.outputs, strict=True):
        clone.load_state_dict(weights)
        assert_close(clone(x).detach(), outputs)
    assert_close(prediction.point, model(x).detach())


def test_one_seed_gives_one_posterior_and_draw_continues_it(trained: Any) -> None:
    model, train, _ = trained

    def make(n: int, seed: int) -> nb.NullSpacePosterior:
        return nb.NullSpacePosterior(model, prior_precision=1.0).fit(train, n, seed, **QUIET)

    long, short, other = make(6, 0), make(4, 0), make(4, 1)
    assert_close(long._samples()[:4], short._samples(), atol=1e-4, rtol=1e-3)
    assert float((other._samples() - short._samples()).abs().max()) > 0.1
    assert len(list(short.sample(6))) == 6
    assert short.num_samples == short.certificate.num_samples == 6
    assert_close(short._samples(), long._samples(), atol=1e-4, rtol=1e-3)
    laplace = nb.LaplacePosterior(model).fit(train, 4, **QUIET)
    longer = nb.LaplacePosterior(model).fit(train, 6, **QUIET)
    laplace.draw(2)
    assert_close(laplace._samples(), longer._samples(), atol=1e-4, rtol=1e-3)


def test_evidence_is_stationary(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The evidence alone, without the bounds that predictions set it.
    monkeypatch.setattr(GuaranteeCheck, "bounded_precision", lambda _, alpha: alpha)
    model, train, _ = trained
    model = copy.deepcopy(model)
    norm = sum(float(p.detach().square().sum()) for p in model.parameters())
    exact = nb.NullSpacePosterior(model.double(), delta=0)
    double = [(x.double(), y) for x, y in train]
    exact.fit(double, **QUIET)
    assert exact.prior_precision == pytest.approx(exact.certificate.rank / norm)
    laplace = nb.LaplacePosterior(model, solver=nb.solvers.DualCholesky()).fit(double, **QUIET)
    x, y = torch.cat([b[0] for b in double]), torch.cat([b[1] for b in double])
    squared = torch.linalg.svdvals(dense_rows(model, x, y, "predictions")).square()
    gamma = float((squared / (squared + laplace.prior_precision)).sum())
    assert laplace.prior_precision == pytest.approx(gamma / norm, rel=1e-6)
    numerical = nb.NullSpacePosterior(model, delta=0.1).fit(double, num_samples=400, **QUIET)
    start = fixed_point(
        nb.solvers.Spectrum(squared, torch.ones_like(squared), True),
        torch.full((1,), norm**0.5),
        0.1,
    )
    share = (0.1 * start / (squared + 0.1 * start)) ** numerical.certificate.iterations
    assert numerical.prior_precision == pytest.approx(float((1 - share**2).sum()) / norm, rel=0.05)


@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LaplacePosterior])
@pytest.mark.parametrize(
    "solver", [nb.solvers.DualCholesky(), nb.solvers.PrimalQR()], ids=lambda s: s.name
)
def test_novelty_exact_and_from_samples(trained: Any, kind: Any, solver: nb.solvers.Solver) -> None:
    model, train, val = trained
    posterior = kind(model, solver=solver).fit(train, num_samples=600, **QUIET)
    near, far = val[0][0][:8], 6 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for x in (near, far):
        exact = posterior.novelty(x, score="variance", exact=True)
        estimate = posterior.novelty(x, score="variance", exact=False)
        assert_close(
            estimate,
            exact,
            rtol=0.35,
            atol=1e-4 * float(posterior.novelty(far, score="variance").max()),
        )
        prediction = posterior.predict(x)
        change = posterior.likelihood.centre(prediction.outputs - prediction.point)
        assert_close(estimate, change.square().mean(0).sum(1), rtol=1e-3, atol=1e-3)
        share = posterior.novelty(x, score="share", exact=True)
        rows = dense_jacobian(model, x)
        rows = rows.reshape(8, -1, rows.shape[1])
        prior = (rows - rows.mean(1, keepdim=True)).square().sum((1, 2))
        assert_close(share * prior / posterior.prior_precision, exact, rtol=1e-3, atol=1e-3)
        assert bool(((share >= 0) & (share <= 1)).all())
    assert float(posterior.novelty(far, score="variance").mean()) > float(
        posterior.novelty(near, score="variance").mean()
    )
    assert_close(posterior.novelty(near, score="entropy"), posterior.predict(near).total)
    assert_close(
        posterior.novelty(near, score="mutual_information"), posterior.predict(near).epistemic
    )


def test_calibration_is_one_pass_over_the_whole_path(trained: Any) -> None:
    model, train, val = trained
    posterior = nb.NullSpacePosterior(model).fit(train, num_samples=20, **QUIET)
    before = posterior.prior_precision
    ood = [
        (6 * torch.randn(40, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(40).long())
    ]
    path = posterior.calibrate(val, ood_loader=ood, **QUIET)
    assert path.start == before and len(path.prior_precision) == len(path.nll) == len(
        path.auroc or []
    )
    assert path.nll[path.chosen] == min(path.nll) and not path.at_edge
    assert path.nll[path.chosen] <= (path.point["nll"] or 0)
    assert posterior.prior_precision == path.prior_precision[path.chosen]
    assert posterior.certificate.prior_precision == posterior.prior_precision
    # Any point of the path is what a prediction at that prior precision gives.
    x, y = torch.cat([b[0] for b in val]), torch.cat([b[1] for b in val])
    for i in (5, path.chosen, 40):
        posterior.prior_precision = path.prior_precision[i]
        p = posterior.predict(x).mean.gather(1, y[:, None])
        assert path.nll[i] == pytest.approx(-float(p.log().mean()), rel=1e-3)
    assert path.nll[-1] == pytest.approx(path.point["nll"], rel=1e-2)


def test_calibration_warns_when_the_posterior_adds_nothing(trained: Any) -> None:
    model, train, val = trained
    posterior = nb.NullSpacePosterior(model).fit(train, num_samples=5, **QUIET)
    every = torch.cat([x for x, _ in val])
    best, labels = model(every).softmax(1).max(1)
    # The network is sure, and right: doubt can only cost.
    sure = [(every[best > 0.9], labels[best > 0.9])]
    assert len(sure[0][1]) > 5
    with pytest.warns(nb.NullBayesWarning, match="trained network"):
        posterior.calibrate(sure, **QUIET)
    assert math.isfinite(posterior.prior_precision)


@pytest.fixture(scope="module")
def overfitted() -> Any:
    """A network that follows the noise of 40 points, two outputs wide; and 200 points that it has not seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(240, 2).double()
        y = torch.cat([x.sin(), x.cos()], 1)[:, 1:3] + 0.5 * torch.randn(240, 2).double()
        model = nn.Sequential(nn.Linear(2, 60), nn.Tanh(), nn.Linear(60, 2)).double()
        optimiser = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(800):
            optimiser.zero_grad()
            nn.functional.mse_loss(model(x[:40]), y[:40]).backward()
            optimiser.step()
    return model.eval(), [(x[:40], y[:40])], [(x[40:100], y[40:100]), (x[100:], y[100:])]


def test_regression_is_calibrated_by_its_noise(overfitted: Any, tmp_path: Path) -> None:
    model, train, val = overfitted
    posterior = nb.NullSpacePosterior(model, "regression").fit(train, num_samples=30, **QUIET)
    found, alpha = posterior.likelihood.noise_variance, posterior.prior_precision
    assert found is not None
    path = posterior.calibrate(val, **QUIET)
    assert path.tuned == "noise" and not path.at_edge and path.noise_scale is not None
    assert path.noise_scale[path.chosen] > 1.5  # its residuals understate the noise
    assert posterior.prior_precision == alpha and set(path.prior_precision) == {alpha}
    kept = posterior.likelihood.noise_variance
    assert_close(kept, found * path.noise_scale[path.chosen])
    # Any point of the path is what a prediction with that noise gives: the mean over draws of each output's density.
    x, y = torch.cat([b[0] for b in val]), torch.cat([b[1] for b in val])
    draws = posterior.predict(x).outputs
    both = torch.cat([draws, 2 * model(x).detach() - draws])
    for i in (3, path.chosen, 30):
        normal = torch.distributions.Normal(both, (found * path.noise_scale[i]).sqrt())
        density = (normal.log_prob(y).logsumexp(0) - math.log(len(both))).sum(1)
        assert path.nll[i] == pytest.approx(-float(density.mean()), rel=1e-9)
    assert path.nll[path.chosen] == min(path.nll) < path.nll[12] - 0.05  # 12: as estimated
    mean = model(x).detach()
    alone = [
        -float(torch.distributions.Normal(mean, (found * c).sqrt()).log_prob(y).sum(1).mean())
        for c in path.noise_scale
    ]
    assert path.point["nll"] == pytest.approx(min(alone), rel=1e-9)  # as much for the network alone
    before = posterior.predict(train[0][0])
    assert_close(before.mean, model(train[0][0]).detach())
    posterior.save(tmp_path / "p.safetensors")
    again = nb.load(tmp_path / "p.safetensors", model)
    assert_close(again.likelihood.noise_variance, kept)
    assert again.calibration == path
    assert_close(again.predict(x).total, posterior.predict(x).total)
    posterior.fit(train, num_samples=3, **QUIET)
    assert_close(posterior.likelihood.noise_variance, found)


def test_what_regression_is_calibrated_by_can_be_said(overfitted: Any) -> None:
    model, train, val = overfitted
    posterior = nb.NullSpacePosterior(model, "regression").fit(train, num_samples=5, **QUIET)
    found = posterior.likelihood.noise_variance
    path = posterior.calibrate(val, tune="prior", **QUIET)
    assert path.tuned == "prior" and path.noise_scale is None
    assert posterior.prior_precision == path.prior_precision[path.chosen]
    assert_close(posterior.likelihood.noise_variance, found)
    given = nb.NullSpacePosterior(model, nb.Regression(0.2)).fit(train, num_samples=5, **QUIET)
    assert given.calibrate(val, **QUIET).tuned == "prior"
    with pytest.raises(nb.errors.InputError, match="tune='noise' needs a regression"):
        given.calibrate(val, tune="noise", **QUIET)
    with pytest.raises(nb.errors.InputError, match="tune"):
        posterior.calibrate(val, tune="both", **QUIET)


def test_regression_noise_and_intervals() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.cat([torch.rand(40, 1) - 2, torch.rand(40, 1) + 1])
        y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)
        model = nn.Sequential(
            nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
        )
        optimiser = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(400):
            optimiser.zero_grad()
            (model(x) - y).square().mean().backward()
            optimiser.step()
    model.eval()
    posterior = nb.NullSpacePosterior(model, nb.Regression(estimate="training")).fit(
        loader(x, y, 30), num_samples=100, **QUIET
    )
    residual = (model(x) - y).detach().square().mean()
    prediction = posterior.predict(x)
    assert_close(prediction.aleatoric, residual.expand(80, 1), rtol=1e-3, atol=0)
    assert_close(prediction.mean, model(x).detach())
    gap = posterior.predict(torch.zeros(1, 1))
    assert float(gap.epistemic) > 10 * float(prediction.epistemic.mean())
    c = posterior.certificate
    assert (
        c.score_name == "rmse"
        and c.held
        and c.network_score == pytest.approx(float(residual.sqrt()), rel=1e-3)
    )


@pytest.mark.parametrize("shape", ["BTO", "BOHW", "multilabel"])
def test_outputs_of_any_shape(shape: str) -> None:
    torch.manual_seed(0)
    if shape == "BTO":
        model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(5, 6, 3)
        y = torch.randint(0, 4, (5, 6))
        y[0, :3] = -100
    elif shape == "BOHW":
        model, x = (
            nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1)),
            torch.randn(5, 1, 4, 4),
        )
        y = torch.randint(0, 3, (5, 4, 4))
    else:
        model, x = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 4)), torch.randn(5, 3)
        y = torch.randint(0, 2, (5, 4))
    kind = "binary" if shape == "multilabel" else "classification"
    model.double().eval()
    posterior = nb.NullSpacePosterior(model, kind, preserve="loss", **EXACT).fit(
        loader(x.double(), y, 2), num_samples=6, **QUIET
    )
    assert posterior.certificate.constraints == 5
    assert posterior.certificate.residual <= 1e-9
    prediction = posterior.predict(x.double())
    assert prediction.mean.shape == prediction.point.shape
    assert posterior.novelty(x.double()).shape == (5,)
    full = nb.NullSpacePosterior(model, kind, preserve="predictions").fit(
        loader(x.double(), y, 2), 4, **QUIET
    )
    per_example = {"BTO": 18, "BOHW": 32, "multilabel": 4}[shape]
    assert full.certificate.constraints == 5 * per_example


def test_directions_are_fewer_and_reported() -> None:
    model, x, y = problem()
    full = nb.NullSpacePosterior(model).fit(loader(x, y), 4, **QUIET).certificate
    one = nb.NullSpacePosterior(model, directions=1).fit(loader(x, y), 4, **QUIET).certificate
    assert (full.constraints, one.constraints) == (14, 7)
    assert full.discarded_trace == 0 and 0 < one.discarded_trace < 1
    assert "left out" in str(one)


def test_max_examples_and_unsized_loaders() -> None:
    model, x, y = problem()

    class Unsized:
        def __iter__(self) -> Any:
            return iter(loader(x, y))

    limited = nb.NullSpacePosterior(model).fit(Unsized(), 4, max_examples=5, **QUIET)
    assert limited.certificate.examples == 5
    direct = nb.NullSpacePosterior(model).fit(loader(x[:5], y[:5]), 4, **QUIET)
    assert_close(limited._samples(), direct._samples())


def test_the_plan_agrees_with_the_fit(trained: Any) -> None:
    model, train, _ = trained
    plan = nb.plan(model, train)
    certificate = nb.NullSpacePosterior(model).fit(train, 4, **QUIET).certificate
    assert (plan.rows, plan.parameters) == (certificate.constraints, certificate.parameters)
    assert plan.solver == certificate.solver and plan.fits
    assert "dual Cholesky" in str(plan)
    small = nb.plan(model, train, memory="100 kB")
    assert not small.fits and any("directions='auto'" in text for text in small.advice)
    with pytest.raises(nb.MemoryBudgetError):
        nb.NullSpacePosterior(model, memory="100 kB").fit(train, 4, **QUIET)


def test_a_model_that_changed_after_the_fit_is_refused(trained: Any) -> None:
    model, train, val = trained
    posterior = nb.NullSpacePosterior(model).fit(train, 4, **QUIET)
    x = val[0][0]
    before = posterior.predict(x).mean
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model[0].bias.add_(0.1)
    for ask in (posterior.predict, posterior.novelty, lambda _: posterior.calibrate(val, **QUIET)):
        with pytest.raises(nb.ModelError, match=r"changed since .*0\.bias"):
            ask(x)
    model.load_state_dict(kept)  # the same values again, though written anew
    assert_close(posterior.predict(x).mean, before, atol=0, rtol=0)


def test_novelty_does_not_see_what_all_logits_share(trained: Any) -> None:
    """A last layer that adds one number to all logits changes no prediction, and no novelty."""
    model, train, val = trained
    x = val[0][0][:8]

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.shift = model, nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.model(x) + (x @ self.shift)[:, None]
            return out

    plain = nb.NullSpacePosterior(model).fit(train, num_samples=300, **QUIET)
    shifted = nb.NullSpacePosterior(Shifted().eval()).fit(train, num_samples=300, **QUIET)
    for exact, rtol in ((True, 1e-3), (False, 0.4)):
        a, b = (
            p.novelty(x, score="variance", exact=exact) * p.prior_precision
            for p in (plain, shifted)
        )
        assert_close(a, b, rtol=rtol, atol=1e-3 * float(a.max()))
