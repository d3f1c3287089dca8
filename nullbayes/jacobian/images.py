"""The last products of an operator with vectors, for the next one who asks for the same.

A fit needs the product of the rows with the same few tensors again and again: prior samples before the solve, within
it, for what is left out, for the certificate; samples at its end and for the certificate. Of eight products with
22 million weights five were such repetitions, each as dear as the first.
"""

from __future__ import annotations

import weakref

from torch import Tensor

# How many are kept, how large they may be in bytes, and numbers of the vectors from which it pays.
KEPT, LARGEST, FROM = 8, 2**25, 2**20


class Images:
    """Products by the identity of the vectors; whatever is written to those since makes them others."""

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[Tensor], int, Tensor]] = []

    def of(self, vectors: Tensor) -> Tensor | None:
        """A copy of the product with ``vectors``, if it is kept."""
        self._kept = [entry for entry in self._kept if entry[0]() is not None]
        for known, version, image in self._kept:
            if known() is vectors and version == vectors._version:
                return image.clone()
        return None

    def keep(self, vectors: Tensor, image: Tensor) -> None:
        """Take note of a product, unless it is small work or a large result."""
        if vectors.numel() < FROM or image.nbytes > LARGEST or vectors.is_inference():
            return
        entry = (weakref.ref(vectors), vectors._version, image.clone())
        self._kept = [entry, *self._kept[: KEPT - 1]]
