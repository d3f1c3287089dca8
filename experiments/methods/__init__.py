"""The methods of the comparison, one file for each family, and their registry."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.methods.base import Case, Draws, Method, Variant
from experiments.methods.dropout import MCDropout
from experiments.methods.ensemble import DeepEnsemble
from experiments.methods.layers import LayerNullSpace
from experiments.methods.peer_laplace import DiagonalLaplace, KroneckerLaplace, LastLayerLaplace
from experiments.methods.point import PointEstimate, TemperatureScaling
from experiments.methods.posteriors import (
    FullLaplace,
    NullSpaceLast,
    NullSpaceLastOutputs,
    NullSpaceLoss,
    NullSpaceOutputs,
    NullSpacePart,
    NullSpacePartOutputs,
    NullSpacePredictions,
)
from experiments.methods.swag import SWAG

# In the order of the tables.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        PointEstimate,
        TemperatureScaling,
        MCDropout,
        DeepEnsemble,
        SWAG,
        DiagonalLaplace,
        KroneckerLaplace,
        LastLayerLaplace,
        FullLaplace,
        NullSpacePredictions,
        NullSpaceOutputs,
        NullSpaceLoss,
        NullSpaceLast,
        NullSpaceLastOutputs,
        NullSpacePart,
        NullSpacePartOutputs,
        LayerNullSpace,
    )
}


#: What takes longest; in the small setting digits and tables alone have it.
LONGEST = (
    "swag",
    "laplace_diag",
    "laplace_full",
    "null_outputs",
    "null_loss",
    "null_last_outputs",
    "null_part",
    "null_part_outputs",
)


def brief(names: Iterable[str], setting: str) -> list[str]:
    """These methods; in the small setting without :data:`LONGEST`."""
    return [name for name in names if setting != "small" or name not in LONGEST]


def usual(setting: str) -> list[str]:
    """What a task measures where nothing is named.

    Fewer weights than all are for large networks; in the full setting the last layer's stand beside Laplace's.
    """
    left_out = (NullSpacePart,) if setting == "full" else (NullSpacePart, NullSpaceLast)
    return [name for name, method in METHODS.items() if not issubclass(method, left_out)]


OURS = NullSpacePredictions.name
POINT = PointEstimate.name

__all__ = ["METHODS", "OURS", "POINT", "Case", "Draws", "Method", "Variant", "brief", "usual"]
