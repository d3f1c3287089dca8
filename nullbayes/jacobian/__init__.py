"""Rows of the Jacobian of all training outputs, in the shape in which the layers give them."""

from nullbayes.jacobian.layers import convolution, linear, normalisation  # noqa: F401  (register rules)
from nullbayes.jacobian.layers.rule import LayerRule as LayerRule
from nullbayes.jacobian.layers.rule import Lookup as Lookup
from nullbayes.jacobian.layers.rule import Outer as Outer
from nullbayes.jacobian.layers.rule import Rows as Rows
from nullbayes.jacobian.layers.rule import register as register
from nullbayes.jacobian.layers.rule import registered as registered
from nullbayes.jacobian.operator import DenseOperator as DenseOperator
from nullbayes.jacobian.operator import JacobianOperator as JacobianOperator
from nullbayes.jacobian.operator import RowOperator as RowOperator
from nullbayes.model.parameters import ParameterSpace as ParameterSpace
