"""Rows of the Jacobian of all training outputs, in the shape in which the layers give them."""

from nullbayes.jacobian import convolution, linear, normalisation  # noqa: F401  (register rules)
from nullbayes.jacobian.operator import DenseOperator as DenseOperator
from nullbayes.jacobian.operator import JacobianOperator as JacobianOperator
from nullbayes.jacobian.operator import RowOperator as RowOperator
from nullbayes.jacobian.parameters import ParameterSpace as ParameterSpace
from nullbayes.jacobian.registry import LayerRule as LayerRule
from nullbayes.jacobian.registry import Lookup as Lookup
from nullbayes.jacobian.registry import Outer as Outer
from nullbayes.jacobian.registry import Rows as Rows
from nullbayes.jacobian.registry import register as register
from nullbayes.jacobian.registry import registered as registered
