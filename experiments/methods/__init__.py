"""The methods of the comparison, one file for each family, and their registry."""

from __future__ import annotations

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
    "laplace_full",
    "null_outputs",
    "null_loss",
    "null_last_outputs",
    "null_part",
    "null_part_outputs",
)


def usual(setting: str, *, brief: bool = False) -> list[str]:
    """What a task measures where nothing is named.

    Fewer weights than all are for large networks; in the full setting the last layer's stand beside Laplace's.

    Args:
        brief: without :data:`LONGEST` in the small setting.
    """
    if brief and setting == "small":
        return [name for name in usual(setting) if name not in LONGEST]
    left_out = (NullSpacePart,) if setting == "full" else (NullSpacePart, NullSpaceLast)
    return [name for name, method in METHODS.items() if not issubclass(method, left_out)]


OURS = NullSpacePredictions.name
POINT = PointEstimate.name

__all__ = ["METHODS", "OURS", "POINT", "Case", "Draws", "Method", "Variant", "usual"]
