"""Losses, their output-Hessian factors, and the observation noise.

A likelihood knows how the model's outputs explain the targets. `resolve_likelihood` turns a name into an
object; a new one subclasses `Likelihood`, and `register_likelihood` makes it known by name.
"""

from nullbayes.likelihood.base import Likelihood as Likelihood
from nullbayes.likelihood.base import Moments as Moments
from nullbayes.likelihood.base import likelihood_from_config as likelihood_from_config
from nullbayes.likelihood.base import register_likelihood as register_likelihood
from nullbayes.likelihood.base import resolve_likelihood as resolve_likelihood
from nullbayes.likelihood.binary import Binary as Binary
from nullbayes.likelihood.callable import CallableLoss as CallableLoss
from nullbayes.likelihood.callable import LossFunction as LossFunction
from nullbayes.likelihood.callable import resolve_loss as resolve_loss
from nullbayes.likelihood.choices import Choices as Choices
from nullbayes.likelihood.classification import Classification as Classification
from nullbayes.likelihood.helpers import epistemic_variance as epistemic_variance
from nullbayes.likelihood.regression import Regression as Regression
from nullbayes.likelihood.softmax import softmax_directions as softmax_directions
from nullbayes.likelihood.softmax import softmax_factor as softmax_factor
