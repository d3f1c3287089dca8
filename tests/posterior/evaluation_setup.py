"""Small networks to evaluate, and dense references of what is measured."""

import torch

N = 120


def make(seed, n, shift=0.0, classes=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64) + shift
    noise = 0.8 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    way = torch.tensor([[1.0, -1, 0.3], [0.2, 1, -1], [-0.7, 0.1, 1]], dtype=torch.float64)
    return x, (2 * x @ way[:, :classes] + noise).argmax(1)


def trained(model, x, loss):
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        optimiser.zero_grad()
        loss(model(x)).backward()
        optimiser.step()
    return model.eval()


def dense_ece(confidence, hit, bins=15):
    total = 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        inside = (confidence >= low) & ((confidence < high) | (k == bins - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    return total
