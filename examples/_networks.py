"""The networks of the generative examples, and the loss that each is trained with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Output = dict[str, Tensor]
TIMES = 100  # steps of the diffusion's forward process


class Vae(nn.Module):
    """Images (B, 1, 28, 28) to logits of their pixels, with mean and log variance of the latent code."""

    def __init__(self, width: int, hidden: int, latent: int) -> None:
        super().__init__()
        features = 2 * width * 7 * 7
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(features, hidden), nn.SiLU(),
        )  # fmt: skip
        self.mean, self.log_variance = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, features), nn.SiLU(),
            nn.Unflatten(1, (2 * width, 7, 7)), nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor | None = None, z: Tensor | None = None) -> Output:
        """Reconstruct ``x``, or decode ``z (B, latent)``."""
        if z is not None:
            return {"logits": self.decoder(z)}
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return {"logits": self.decoder(code), "mean": mean, "log_variance": log_variance}


def negative_elbo(out: Output, x: Tensor) -> Tensor:
    """Nats per image ``(B,)``: Bernoulli cross-entropy of the pixels and the divergence from the prior."""
    pixels = F.binary_cross_entropy_with_logits(out["logits"], x, reduction="none")
    mean, log_variance = out["mean"], out["log_variance"]
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return pixels.flatten(1).sum(1) + divergence.sum(1)


class Block(nn.Module):
    """Two convolutions with a shortcut, scaled and shifted by the time step."""

    def __init__(self, width: int, time: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, width) for _ in range(2)])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.time = nn.Linear(time, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.convs[0](F.silu(self.norms[0](x)))
        return x + self.convs[1](F.silu(self.norms[1](h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Self-attention over the pixels, four heads."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, width)
        self.query_key_value, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, wide = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, T, width)
        parts = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, heads, T, width / heads) each
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(3)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        return x + self.merge(mixed).transpose(1, 2).reshape(batch, width, height, wide)


class Denoiser(nn.Module):
    """Images (B, 1, 8, 8) in [-1, 1]: draws a time step and noise for each, and predicts the noise.

    Given a noisy image and its time step instead, it predicts the noise in that.
    """

    def __init__(self, width: int, times: int = TIMES) -> None:
        super().__init__()
        time = 2 * width
        self.embed = nn.Sequential(nn.Linear(16, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first, self.last = Block(width, time), Block(width, time)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.middle = nn.ModuleList([Block(2 * width, time) for _ in range(2)])
        self.attention = Attention(2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.norm, self.out = nn.GroupNorm(4, width), nn.Conv2d(width, 1, 3, padding=1)
        # The cosine schedule of Nichol & Dhariwal, Improved denoising diffusion, 2021.
        at = torch.arange(1, times + 1, dtype=torch.float64) / times
        kept = ((at * 0.98 + 0.01) * math.pi / 2).cos().square()
        self.register_buffer("signal", kept.float())  # variance left of the image at each step
        self.register_buffer("frequencies", torch.logspace(0, 2, 8) * math.pi / 2)

    def forward(
        self, x: Tensor | None = None, noisy: Tensor | None = None, t: Tensor | None = None
    ) -> Output:
        """``t (B,)`` counts from 0."""
        if x is None:
            return {"predicted": self.predict(noisy, t)}
        t = torch.randint(0, len(self.signal), (len(x),), device=x.device)
        noise = torch.randn_like(x)
        signal = self.signal[t][:, None, None, None]
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        return {"predicted": self.predict(noisy, t), "noise": noise}

    def predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        phase = (t[:, None] + 1) / len(self.signal) * self.frequencies
        time = self.embed(torch.cat([phase.sin(), phase.cos()], dim=1).to(noisy))
        wide = self.first(self.stem(noisy), time)
        deep = self.attention(self.middle[0](self.down(wide), time))
        rise = self.up(self.middle[1](deep, time))
        h = self.last(self.merge(torch.cat([wide, rise], dim=1)), time)
        return self.out(F.silu(self.norm(h)))


def denoising_loss(out: Output, x: Tensor) -> Tensor:
    """Squared error of the predicted noise, summed over the pixels: ``(B,)``."""
    return 0.5 * (out["predicted"] - out["noise"]).square().flatten(1).sum(1)


def generate(model: nn.Module, start: Tensor, steps: int) -> Tensor:
    """Images in [0, 1] from noise ``start``, without further noise (Song, Meng & Ermon, DDIM, 2021)."""
    signal, x = model.signal, start
    times = torch.linspace(len(signal) - 1, 0, steps).round().long()
    with torch.no_grad():
        for i, t in enumerate(times.tolist()):
            noise = model(noisy=x, t=torch.full((len(x),), t))["predicted"]
            clean = ((x - (1 - signal[t]).sqrt() * noise) / signal[t].sqrt()).clamp(-1, 1)
            after = signal[times[i + 1]] if i + 1 < steps else torch.tensor(1.0)
            # The noise that goes with the clipped image; the predicted one would add up with the clipping.
            noise = (x - signal[t].sqrt() * clean) / (1 - signal[t]).sqrt()
            x = after.sqrt() * clean + (1 - after).sqrt() * noise
    return (x + 1) / 2
