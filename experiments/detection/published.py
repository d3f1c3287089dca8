"""Scores as pytorch-ood publishes them (Kirchheim, Filax, Ortmeier, 2022); it was written to be compared with.

Its detectors need torch, SciPy and scikit-learn. Its data sets and pretrained networks need torchvision, which brings
another torch with it; where that is missing an empty module stands in for it while pytorch-ood is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.detection.base import BATCH, Given, Score, score
from experiments.runner import Unavailable

STANDS_IN = (
    "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets",
    "torchvision.datasets.utils", "torchvision.models", "torchvision.models.resnet",
)  # fmt: skip


class _Empty(types.ModuleType):
    """Whatever is asked of it is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def detectors() -> Any:
    """``pytorch_ood.detector``."""
    missing = importlib.util.find_spec("torchvision") is None
    added = [n for n in STANDS_IN if missing and n not in sys.modules]
    for name in added:
        sys.modules[name] = _Empty(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        return importlib.import_module("pytorch_ood.detector")
    except ModuleNotFoundError as error:
        raise Unavailable(f"pytorch-ood is not installed ({error}): `make peers`") from error
    finally:
        for name in added:  # nobody else is to find them
            sys.modules.pop(name, None)


class _Logits(Score):
    """A function of the logits."""

    detector: ClassVar[str]

    def fit(self, given: Given) -> None:
        self.given = given
        self.made = getattr(detectors(), self.detector)(None)

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.made.predict_logits(self.given.logits(x))
        return found


@score
class MaxSoftmax(_Logits):
    name = family = "max-softmax"
    detector = "MaxSoftmax"
    source = "Hendrycks, Gimpel, ICLR 2017"


@score
class Energy(_Logits):
    name = family = "energy"
    detector = "EnergyBased"
    source = "Liu, Wang, Owens, Li, NeurIPS 2020"


@score
class MaxLogit(_Logits):
    name = family = "max-logit"
    detector = "MaxLogit"
    source = "Hendrycks et al., ICML 2022"


@score
class GEN(_Logits):
    name = family = "GEN"
    detector = "GEN"
    source = "Liu, Lochman, Zach, CVPR 2023"


class _Features(Score):
    """A function of the features, fitted on those of the training data."""

    detector: ClassVar[str]

    def arguments(self, given: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of the detector: by position, and by name. Where its encoder would be, there is none."""
        return (None,), {}

    def fit(self, given: Given) -> None:
        self.given = given
        positional, named = self.arguments(given)
        self.made = getattr(detectors(), self.detector)(*positional, **named)
        labels = torch.zeros(len(given.train), dtype=torch.long)  # all are known; classes follow
        if given.kind == "classification":
            labels = given.train.targets
        self.made.fit_features(given.train_features, labels)

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.made.predict_features(self.given.features(x))
        return found


@score
class Mahalanobis(_Features):
    name = family = "Mahalanobis"
    source = "Lee, Lee, Lee, Shin, NeurIPS 2018 (last layer)"
    detector = "Mahalanobis"


@score
class RelativeMahalanobis(_Features):
    name = family = "relative Mahalanobis"
    source = "Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan, 2021"
    detector = "RMD"


class _KNN(_Features):
    family = "KNN"
    source = "Sun, Ming, Zhu, Li, ICML 2022"
    any_output = True
    k: ClassVar[int]
    detector = "KNN"

    def arguments(self, given: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (None,), {"k": min(self.k, len(given.train))}


@score
class KNN1(_KNN):
    name, k = "KNN, k=1", 1


@score
class KNN10(_KNN):
    name, k = "KNN, k=10", 10


@score
class KNN50(_KNN):
    name, k = "KNN, k=50", 50


class _ViM(_Features):
    family = "ViM"
    source = "Wang, Li, Feng, Zhang, CVPR 2022"
    share: ClassVar[float]
    detector = "ViM"

    def arguments(self, given: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
        width = given.head.in_features
        weight, bias = given.head_here.weight.detach(), given.head_here.bias
        shift = torch.zeros(len(weight)) if bias is None else bias.detach()
        return (None, max(1, round(self.share * width)), weight, shift), {}


@score
class ViMHalf(_ViM):
    name, share = "ViM, half the directions", 0.5


@score
class ViMQuarter(_ViM):
    name, share = "ViM, a quarter", 0.25


@score
class FDBD(_Features):
    name = family = "fDBD"
    source = "Liu, Qin, ICML 2024"
    detector = "fDBD"

    def arguments(self, given: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.nn.Identity(), given.head_here), {}


@score
class NNGuide(_Features):
    name = family = "NNGuide"
    source = "Park, Jung, Teoh, ICCV 2023"
    detector = "NNGuide"

    def arguments(self, given: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.nn.Identity(), given.head_here), {"k": min(10, len(given.train))}


class _Shaped(Score):
    """Energy of features that were clipped, pruned or scaled; each feature is a map of one pixel."""

    detector: ClassVar[str]
    options: ClassVar[dict[str, Any]]

    def fit(self, given: Given) -> None:
        self.given = given
        head = given.head_here
        make = getattr(detectors(), self.detector)
        self.made = make(torch.nn.Identity(), lambda maps: head(maps.flatten(1)), **self.options)
        if hasattr(self.made, "fit_feature_maps"):
            self.made.fit_feature_maps(given.train_features[:, :, None, None], given.train.targets)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        maps = self.given.features(x)[:, :, None, None]
        found: Tensor = self.made.predict_feature_maps(maps.clone())
        return found


@score
class ReAct(_Shaped):
    name = family = "ReAct"
    source = "Sun, Guo, Li, NeurIPS 2021"
    detector, options = "ReAct", {"percentile": 0.9}


@score
class ASH(_Shaped):
    name = family = "ASH-S"
    source = "Djurisic, Bozanic, Ashok, Liu, ICLR 2023"
    detector, options = "ASH", {"variant": "ash-s", "percentile": 0.65}


@score
class SCALE(_Shaped):
    name = family = "SCALE"
    source = "Xu, Chen, Franchi, Yao, ICLR 2024"
    detector, options = "SCALE", {"percentile": 0.65}


@score
class GradNorm(Score):
    name = family = "GradNorm"
    source = "Huang, Geng, Li, NeurIPS 2021"

    def fit(self, given: Given) -> None:
        names = {n for n, p in given.network.named_parameters() if p is given.head.weight}
        self.made = detectors().GradNorm(given.network, param_filter=lambda name: name in names)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.made.predict(part).cpu() for part in x.split(BATCH)])
