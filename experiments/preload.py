"""What every process of a run needs, imported once by the server that they are forked from."""

import gc

import torch
import torch._decomp.decompositions_for_jvp
import torch._dynamo
import torchmetrics

import nullbayes
import nullbayes.demo.models

# Collections in a process would write to what it shares with the server, and so copy it: a second a piece.
gc.collect()
gc.freeze()

__all__ = ["nullbayes", "torch", "torchmetrics"]
