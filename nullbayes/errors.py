"""Every error that nullbayes raises on purpose: each message says what was found, what is expected, and the mend."""

from __future__ import annotations


class NullBayesError(Exception):
    """Base class: ``except nb.NullBayesError`` catches all errors raised on purpose by this package."""


class InputError(NullBayesError, ValueError):
    """An argument, a batch or a label that cannot be used."""


class ModelError(NullBayesError, ValueError):
    """A model in a state, or with a part, for which the guarantee would not hold."""


class NonFiniteError(NullBayesError, ArithmeticError):
    """NaN or infinity in the weights, the data, the outputs or a result."""


class MemoryBudgetError(NullBayesError, MemoryError):
    """The work asked for does not fit in the memory budget."""


class SolverError(NullBayesError, ArithmeticError):
    """A factorisation or an iteration that could not be completed."""


class NotFittedError(NullBayesError, RuntimeError):
    """A question asked of a posterior before ``fit``."""


class StorageError(NullBayesError, OSError):
    """A posterior file that cannot be read, or that belongs to another model."""


class MissingExtraError(NullBayesError, ImportError):
    """An optional dependency that is not installed."""


class ProcessError(NullBayesError, RuntimeError):
    """Another process of a fit on several died, stalled, failed, or has something else than the rest."""


class NullBayesWarning(UserWarning):
    """A result that stands, but that the user should look at."""


class FidelityError(NullBayesError, ArithmeticError):
    """A distilled module that does not follow its posterior closely enough; ``fidelity`` says how closely it does."""

    def __init__(self, message: str, fidelity: object = None) -> None:
        super().__init__(message)
        self.fidelity = fidelity
