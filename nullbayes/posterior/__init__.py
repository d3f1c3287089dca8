"""The posteriors and what they answer: predictions, novelty, calibration, files."""

from nullbayes.posterior.base import Posterior as Posterior
from nullbayes.posterior.layers import LayerNullSpacePosterior as LayerNullSpacePosterior
from nullbayes.posterior.posterior import LaplacePosterior as LaplacePosterior
from nullbayes.posterior.posterior import NullSpacePosterior as NullSpacePosterior
