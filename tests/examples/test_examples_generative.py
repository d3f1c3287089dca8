"""The generative examples at tiny sizes: they run, they say what they measured, and their parts do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import nullbayes as nb

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import diffusion, vae
from nullbayes import datasets
from nullbayes.errors import InputError


@pytest.fixture(autouse=True)
def _fashion_mnist(request: pytest.FixtureRequest) -> None:
    if "vae" in request.node.name:
        try:
            datasets.find_fashion_mnist()
        except InputError as error:
            pytest.skip(str(error))


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_vae_runs_and_its_figures_stand(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    figures = vae.run(vae.SMALL, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    names = ("reconstructions", "samples", "interpolation", "novelty")
    assert pictures(tmp_path) == {"vae.json", *(f"vae_{name}.png" for name in names)}
    assert json.loads((tmp_path / "vae.json").read_text()) == figures
    certificate = figures["certificate"]
    assert certificate["constraints"] == vae.SMALL.train
    assert certificate["held"], certificate["verdict"]
    loss = figures["training_loss"]
    assert loss["first_order"] < 1e-6
    assert loss["linearised"] <= 1.01 * vae.GROWTH
    assert abs(figures["test_elbo"]["linearised"]) < 0.01
    assert set(figures["auroc"]) >= {"digits", "dimmed", "noise"}
    assert all(0 <= v <= 1 for scores in figures["auroc"].values() for v in scores.values())
    assert figures["interpolation"]["variance"][4] == pytest.approx(1, rel=0.2)
    assert "AUROC" in vae.summary(figures) and f"{figures['parameters']:,}" in vae.summary(figures)


def test_vae_has_a_million_weights_and_the_elbo_is_one() -> None:
    full = vae.Sizes()
    model = vae.Vae(full.width, full.hidden, full.latent).double().eval()
    assert sum(p.numel() for p in model.parameters()) >= 1_000_000
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        out = model(x)
        pixels = torch.distributions.Bernoulli(logits=out["logits"]).logits
        log_p = x * pixels.sigmoid().log() + (1 - x) * (1 - pixels.sigmoid()).log()
        code = torch.distributions.Normal(out["mean"], (0.5 * out["log_variance"]).exp())
        prior = torch.distributions.Normal(torch.zeros_like(out["mean"]), 1.0)
        divergence = torch.distributions.kl_divergence(code, prior).sum(1)
        assert_close(vae.negative_elbo(out, x), divergence - log_p.flatten(1).sum(1))


def test_shuffled_moves_patches_and_keeps_pixels() -> None:
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    moved = vae.shuffled(images, seed=0)
    assert_close(moved.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert not torch.equal(moved, images)
    places = [slice(7 * i, 7 * i + 7) for i in range(4)]
    whole = {tuple(images[0, 0][r, c].flatten().tolist()) for r in places for c in places}
    assert tuple(moved[0, 0, :7, :7].flatten().tolist()) in whole


def test_diffusion_runs_and_its_figures_stand(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    figures = diffusion.run(diffusion.SMALL, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert pictures(tmp_path) == {"diffusion.json", "diffusion_ranked.png", "diffusion_scatter.png"}
    certificate = figures["certificate"]
    assert certificate["constraints"] == diffusion.SMALL.train * diffusion.SMALL.draws
    assert certificate["held"], certificate["verdict"]
    assert certificate["generic"] == []  # attention and the rest by layer rules
    loss = figures["training_loss"]
    assert loss["first_order"] < 1e-6
    assert 0 <= loss["linearised"] <= 1.01 * diffusion.GROWTH
    assert "unprojected" in diffusion.summary(figures)


def test_generation_is_a_fixed_function_of_the_noise_and_the_weights() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusion.Denoiser(8).eval()
    start = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = diffusion.generate(model, start, 5)
    assert images.shape == (4, 1, 8, 8) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert_close(diffusion.generate(model, start[1:2], 5), images[1:2])
    same = diffusion.redrawn(model, [model.state_dict()], start, 5)
    assert_close(same[0], images)
    made = diffusion.Generated(images, torch.stack([images, images + 0.2]), start)
    assert_close(made.spread, torch.full((4,), 64 * 0.02))


def test_the_denoiser_reaches_what_it_predicts() -> None:
    """With the true noise for a network, the reverse process ends where the image was."""
    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    reference = diffusion.Denoiser(8)

    class Oracle(torch.nn.Module):
        signal = reference.signal

        def forward(self, noisy: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
            signal = self.signal[t][:, None, None, None]
            return {"predicted": (noisy - signal.sqrt() * image) / (1 - signal).sqrt()}

    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(diffusion.generate(Oracle(), start, 20) * 2 - 1, image, rtol=0, atol=1e-4)


def test_ranking_knows_good_from_bad() -> None:
    score = torch.arange(10.0)
    looks = {"entropy": score**2, "distance": -score, "confidence": 1 - score / 10}
    found = diffusion.ranking(score, looks)
    assert found["entropy_correlation"] == pytest.approx(1)
    assert found["distance_correlation"] == pytest.approx(-1)
    assert found["doubtful_auroc"] == 1
    assert found["confidence_best"] == pytest.approx(0.95)
    assert found["confidence_worst"] == pytest.approx(0.15)


def test_unprojected_networks_have_the_scale_of_the_prior() -> None:
    model = diffusion.Denoiser(8).eval()
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = nb.NullSpacePosterior(
        model,
        loss=diffusion.denoising_loss,
        preserve="loss",
        randomness="frozen",
        prior_precision=25.0,
    ).fit([x], 2, progress=False)
    states = diffusion.unprojected(posterior, model, 3)
    moved = torch.cat([(states[0][n] - p.detach()).flatten() for n, p in model.named_parameters()])
    assert float(moved.std()) == pytest.approx(0.2, rel=0.05)
    assert_close(states[0]["signal"], model.signal)
