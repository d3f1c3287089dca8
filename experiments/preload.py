"""What every process of a run needs, imported once by the server that they are forked from."""

import torch
import torchmetrics

import nullbayes
import nullbayes.demo.models

__all__ = ["nullbayes", "torch", "torchmetrics"]
