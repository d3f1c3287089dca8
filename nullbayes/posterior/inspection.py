"""What a posterior's file says of itself, without the model that it belongs to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nullbayes.certificate import Certificate
from nullbayes.errors import StorageError
from nullbayes.posterior.layer_certificate import LayerCertificate
from nullbayes.posterior.layer_storage import is_layer_file, read_layers
from nullbayes.posterior.storage import read_posterior


@dataclass(frozen=True)
class Inspection:
    """A file's contents but for its tensors.

    Attributes:
        kind: the class that wrote it; likelihood: its settings; calibrated: whether `calibrate` was called.
        weak: whether a guarantee was promised and did not hold.
    """

    kind: str
    likelihood: dict[str, Any]
    prior_precision: float
    calibrated: bool
    certificate: Certificate | LayerCertificate
    weak: bool

    def as_dict(self) -> dict[str, Any]:
        """All fields; JSON-able."""
        return {**vars(self), "certificate": self.certificate.as_dict()}

    def __str__(self) -> str:
        return f"{self.kind}, prior precision {self.prior_precision:.4g}\n{self.certificate}"


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read a file of any posterior. Raises `StorageError` for one that is missing, damaged, or not ours."""
    certificate: Certificate | LayerCertificate
    try:
        if is_layer_file(path):
            settings = read_layers(Path(path))[0]["settings"]
            certificate = LayerCertificate.from_dict(settings["certificate"])
            weak = not certificate.held
        else:
            settings = read_posterior(path).settings
            certificate = Certificate.from_dict(settings["certificate"])
            weak = certificate.promises and not certificate.held
        return Inspection(
            settings["class"],
            settings["likelihood"],
            settings["prior_precision"],
            settings["calibration"] is not None,
            certificate,
            weak,
        )
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{path} lacks, or does not understand, a setting ({type(error).__name__}: {error}); it was written by "
            "another version of nullbayes or changed since."
        ) from error
