"""Inputs of layers: one rule a layer kind, their second moments, factorisations and leverages.

The layer null space (docs/layers.md): where no layer's map moves on the inputs that it receives from the training
data, no output of the network does, at any size of the weight change.
"""

from nullbayes.moments import attention as attention
from nullbayes.moments import convolution as convolution
from nullbayes.moments import embedding as embedding
from nullbayes.moments import linear as linear
from nullbayes.moments import normalisation as normalisation
from nullbayes.moments import recurrent as recurrent
from nullbayes.moments.rule import InputRule as InputRule
from nullbayes.moments.rule import Layout as Layout
from nullbayes.moments.rule import Read as Read
from nullbayes.moments.rule import Seen as Seen
from nullbayes.moments.rule import register as register
from nullbayes.moments.rule import rule_for as rule_for
