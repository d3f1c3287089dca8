"""Uncertainty that preserves what your trained network learned.

``nullbayes`` builds fully correlated Gaussian posteriors over all weights of a trained PyTorch model in
the null space of its generalized Gauss-Newton matrix: every sample preserves the training predictions.
"""

from importlib.metadata import PackageNotFoundError, version

from nullbayes import errors as errors
from nullbayes import jacobian as jacobian
from nullbayes import moments as moments
from nullbayes import solvers as solvers
from nullbayes.certificate.certificate import Certificate as Certificate
from nullbayes.constraints.fisher import EmpiricalFisher as EmpiricalFisher
from nullbayes.constraints.fisher import SampledFisher as SampledFisher
from nullbayes.constraints.preserve import Preserve as Preserve
from nullbayes.constraints.preserve import register_preserve as register_preserve
from nullbayes.errors import FidelityError as FidelityError
from nullbayes.errors import InputError as InputError
from nullbayes.errors import MemoryBudgetError as MemoryBudgetError
from nullbayes.errors import MissingExtraError as MissingExtraError
from nullbayes.errors import ModelError as ModelError
from nullbayes.errors import NonFiniteError as NonFiniteError
from nullbayes.errors import NotFittedError as NotFittedError
from nullbayes.errors import NullBayesError as NullBayesError
from nullbayes.errors import NullBayesWarning as NullBayesWarning
from nullbayes.errors import ProcessError as ProcessError
from nullbayes.errors import SolverError as SolverError
from nullbayes.errors import StorageError as StorageError
from nullbayes.fit.plan import Plan as Plan
from nullbayes.likelihood import Binary as Binary
from nullbayes.likelihood import Choices as Choices
from nullbayes.likelihood import Classification as Classification
from nullbayes.likelihood import Likelihood as Likelihood
from nullbayes.likelihood import Regression as Regression
from nullbayes.likelihood import register_likelihood as register_likelihood
from nullbayes.model.data import Batches as Batches
from nullbayes.model.ragged import bags as bags
from nullbayes.model.ragged import ragged as ragged
from nullbayes.model.randomness import FrozenRandomness as FrozenRandomness
from nullbayes.posterior.base import Posterior as Posterior
from nullbayes.posterior.calibration_path import CalibrationPath as CalibrationPath
from nullbayes.posterior.layers import LayerNullSpacePosterior as LayerNullSpacePosterior
from nullbayes.posterior.loading import load as load
from nullbayes.posterior.posterior import LaplacePosterior as LaplacePosterior
from nullbayes.posterior.posterior import NullSpacePosterior as NullSpacePosterior
from nullbayes.posterior.posterior import plan as plan
from nullbayes.posterior.prediction import Prediction as Prediction
from nullbayes.solvers import register_solver as register_solver

try:
    __version__ = version("nullbayes")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"
