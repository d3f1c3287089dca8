"""The guarantee measured by someone else: plain derivatives and forward passes, no captured row.

This room imports the model, the likelihoods and what is below them, and never what it judges: rows, solvers, fits. The
lint contracts enforce that.
"""

from nullbayes.audit.audit import Audit as Audit
