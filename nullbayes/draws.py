"""The home that sampled functions had in version 0.1; leaves with version 0.4.

Nothing of it was promised, but scripts import it: `nullbayes.fit.prior_samples` and `nullbayes.jacobian.linearise` have
what was here.
"""

from nullbayes.common.deprecation import warn_deprecated
from nullbayes.fit.prior_samples import generator_for as generator_for
from nullbayes.fit.prior_samples import standard_normal as standard_normal
from nullbayes.jacobian.linearise import forward_mode as forward_mode
from nullbayes.jacobian.linearise import output_rows as output_rows
from nullbayes.jacobian.linearise import state_dicts as state_dicts

__all__ = [
    *("forward_mode", "generator_for", "linearised", "output_rows", "sampled"),
    *("standard_normal", "state_dicts"),
]

warn_deprecated("`nullbayes.draws`", "`nullbayes.fit.prior_samples` or `.jacobian.linearise`")
