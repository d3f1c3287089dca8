"""What every process of a run needs, imported once by the server that they are forked from."""

import torch
import torch._decomp.decompositions_for_jvp
import torch._dynamo
import torchmetrics

import nullbayes
import nullbayes.demo.models

__all__ = ["nullbayes", "torch", "torchmetrics"]
