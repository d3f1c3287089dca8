"""A job for the command line: ``nullbayes evaluate examples/job.py --out run``.

The file defines ``model`` and ``train``; everything else is optional. Data may be loaders, data sets, ``(X, y)``, or
functions that return one.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nullbayes import datasets

data = datasets.digits(train=200, validation=150, held_out=(0, 4))


def trained() -> nn.Module:
    """Your own trained network goes here: build it, load its checkpoint, `eval()`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(network(data.train.inputs), data.train.targets).backward()
        optimiser.step()
    return network.eval()


model = trained()
train = data.train.loader(100)
validation = data.validation.loader(150)
test = data.test.loader(300)

likelihood = "classification"
shifted = {
    "rotated by 90°": datasets.rotated(data.test.inputs[:300], (90,)),
    "noise": datasets.noise_like(data.test.inputs[:300], seed=0),
}
slices = {"dark images": lambda inputs, targets: inputs.flatten(1).mean(1) < 0.3}
title = "Handwritten digits"
# Arguments of `NullSpacePosterior` and of `fit`; "posterior": "laplace" for the other kind.
options = {"num_samples": 30, "seed": 0}
