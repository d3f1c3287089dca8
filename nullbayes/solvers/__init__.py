"""Projections onto the null space of the Jacobian rows."""

from nullbayes.solvers.alternating import AlternatingProjections as AlternatingProjections
from nullbayes.solvers.base import Cost as Cost
from nullbayes.solvers.base import Projection as Projection
from nullbayes.solvers.base import Size as Size
from nullbayes.solvers.base import Solver as Solver
from nullbayes.solvers.base import Spectrum as Spectrum
from nullbayes.solvers.base import State as State
from nullbayes.solvers.base import Status as Status
from nullbayes.solvers.conjugate_gradient import ConjugateGradient as ConjugateGradient
from nullbayes.solvers.dual import DualCholesky as DualCholesky
from nullbayes.solvers.eigen import PrimalEigen as PrimalEigen
from nullbayes.solvers.preconditioners import Kronecker as Kronecker
from nullbayes.solvers.preconditioners import Pivoted as Pivoted
from nullbayes.solvers.preconditioners import Preconditioner as Preconditioner
from nullbayes.solvers.preconditioners import Rows as Rows
from nullbayes.solvers.preconditioners import Sketch as Sketch
from nullbayes.solvers.preconditioners import Subset as Subset
from nullbayes.solvers.primal import PrimalQR as PrimalQR
from nullbayes.solvers.registry import Choice as Choice
from nullbayes.solvers.registry import choose as choose
from nullbayes.solvers.registry import register_solver as register_solver
