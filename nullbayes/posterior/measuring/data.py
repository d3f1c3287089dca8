"""Data as an evaluation takes them: as every other method does."""

from nullbayes.model.data import as_loader as as_loader
