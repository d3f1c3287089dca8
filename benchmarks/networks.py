"""Networks that several benchmarks share; none is trained, for cost does not depend on the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut (He, Zhang, Ren, Sun, 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(classes: int = 10, channels: int = 3) -> nn.Module:
    """ResNet-18 for small images: a 3 × 3 stem, no pooling after it, 11.2 million weights."""
    stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
    blocks, before = [], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Residual(before, width, stride), Residual(width, width, 1)]
        before = width
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)
    return nn.Sequential(*stem, *blocks, *head)


def swin_t(classes: int = 10) -> nn.Module:
    """Swin-T for 32 × 32 images, 27.5 million weights (Liu et al., 2021); needs ``transformers``."""
    try:
        from transformers import SwinConfig, SwinForImageClassification
    except ImportError as error:
        raise SystemExit(
            "Swin-T needs transformers: pip install 'nullbayes[experiments]'"
        ) from error
    config = SwinConfig(
        image_size=32,
        patch_size=2,
        window_size=2,
        num_labels=classes,
        drop_path_rate=0.0,
        attn_implementation="eager",
    )
    model: nn.Module = SwinForImageClassification(config)
    return model
