"""The softmax Hessian ``diag(p) - p pᵀ``: a closed-form factor of it, and its leading directions."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh
from nullbayes.likelihood.helpers import to_float64

# Elements of the float64 blocks held at a time (32 MB each).
_BLOCK = 1 << 22


def softmax_factor(logits: Tensor, scale: Tensor | None = None) -> Tensor:
    """Columns of a factor of ``scale_n (diag(p_n) - p_n p_nᵀ)``: ``(O - 1, N, O)``.

    ``logits`` ``(N, O)``, ``scale`` ``(N,)``. With the remaining mass ``q_i = Σ_{j>i} p_j`` column i is

        sqrt(p_i q_i / q_{i-1}) at i,   -p_j sqrt(p_i / (q_i q_{i-1})) at j > i,   0 before,

    the LDLᵀ factor of a multinomial covariance, Tanabe & Sagae, *An exact Cholesky decomposition and
    the generalized inverse of the variance-covariance matrix of the multinomial distribution*, JRSS B
    54 (1992). The masses are summed from the far end: ``1 - cumsum(p)`` cancels once one class is
    nearly certain. They are kept in float64, since ``p`` as small as 1e-52 (logits of ±60) still gives
    columns of 1e-26, which float32 holds. Where a mass underflows the column is zero, never NaN.
    """
    rows, classes = logits.shape
    p = to_float64(logits).softmax(-1)  # (N, O)
    mass = p.flip(-1).cumsum(-1).flip(-1)  # q_{i-1} = p_i + q_i, at i
    before, after = mass[:, :-1], mass[:, 1:]  # (N, O - 1) each
    share = torch.where(before > 0, p[:, :-1] / before, 0).sqrt()  # where: 0 / 0 after underflow
    if scale is not None:
        share = share * to_float64(scale).sqrt().unsqueeze(-1)
    on_diagonal = share * after.sqrt()
    beside = torch.where(after > 0, share / after.sqrt(), 0)

    columns = torch.empty(classes - 1, rows, classes, dtype=logits.dtype, device=logits.device)
    index = torch.arange(classes, device=p.device)
    step = max(1, _BLOCK // max(1, rows * classes))
    for start in range(0, classes - 1, step):  # blocks: all columns at once in float64 may not fit
        these = index[start : min(start + step, classes - 1)]
        later = index > these.view(-1, 1, 1)  # (k, 1, O)
        block = -beside[:, these].T.unsqueeze(-1) * p * later
        block.diagonal(offset=start, dim1=0, dim2=2).copy_(on_diagonal[:, these])
        columns[start : start + these.numel()] = block.to(columns)
    return columns


def softmax_directions(logits: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigen-directions of ``diag(p_n) - p_n p_nᵀ`` for ``logits`` ``(N, O)``.

    Returns, in float64 and longest first, the eigenvectors times √eigenvalue ``(N, k, O)``, the
    eigenvalues ``(N, k)`` and the trace ``(N,)``; ``k = directions`` must be below O.

    With ``p`` in descending order eigenvalue i lies between p_{i+1} and p_i and solves
    ``Σ_j p_j / (p_j - λ) = 0``; its vector is ``p_j / (p_j - λ)`` (Golub, *Some modified matrix
    eigenvalue problems*, SIAM Review 15 (1973), with ``Σ p = 1`` put in: the textbook form
    ``1 - Σ p_j² / (p_j - λ)`` cancels for confident predictions). Cost ``O k`` a step, no O×O matrix.
    """
    step = max(1, _BLOCK // max(1, directions * logits.shape[1]))
    blocks = [_secular(to_float64(part), directions) for part in logits.split(step)]
    scaled, eigenvalues, trace = zip(*blocks, strict=True)
    return torch.cat(scaled), torch.cat(eigenvalues), torch.cat(trace)


def _secular(logits: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    p, order = logits.softmax(-1).sort(-1, descending=True)
    count = p.shape[-1]
    before = p.cumsum(-1) - p
    after = p.flip(-1).cumsum(-1).flip(-1)
    # Mass of the other classes as a sum: 1 - p cancels. `before` of the first class is exactly 0.
    trace = (p[:, :-1] * (before[:, :-1] + after[:, 1:])).sum(-1) + p[:, -1] * before[:, -1]
    # Equal probabilities would leave no gap for a root. Parting them by 1e-13 moves each entry of the
    # Hessian by that share, and the vectors of the parted roots still span the same space.
    p = p * (1 - 1e-13 * torch.arange(count, dtype=p.dtype, device=p.device))

    upper, lower = p[:, :directions], p[:, 1 : directions + 1]
    half = (upper - lower) / 2
    from_upper = p.unsqueeze(1) - upper.unsqueeze(-1)  # (N, k, O)
    from_lower = p.unsqueeze(1) - lower.unsqueeze(-1)
    weight = p.unsqueeze(1)
    # The root is sought as an offset from its nearer pole: p_j - λ then has no cancellation.
    at_middle = (weight / (from_upper + half.unsqueeze(-1))).sum(-1)
    near_upper = at_middle < 0  # the sum rises from -inf at the lower pole to +inf at the upper
    poles = torch.where(near_upper.unsqueeze(-1), from_upper, from_lower)
    sign = torch.where(near_upper, 1.0, -1.0).to(p)
    # Bisect the logarithm of the offset: it may be as small as the second largest probability.
    high = half.clamp_min(1e-300)
    low = (high * 1e-290).clamp_min(1e-300)
    for _ in range(64):
        middle = low.sqrt() * high.sqrt()
        value = (weight / (poles + (sign * middle).unsqueeze(-1))).sum(-1)
        inside = value * sign < 0  # the root is nearer to the pole than `middle`
        high = torch.where(inside, middle, high)
        low = torch.where(inside, low, middle)
    offset = low.sqrt() * high.sqrt()
    eigenvalues = torch.where(near_upper, upper - offset, lower + offset)
    vectors = weight / (poles + (sign * offset).unsqueeze(-1))
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # Below a probability that underflowed there is no gap and no curvature: a zero row, not NaN.
    flat = (lower <= 0) | (half < 1e-290)
    eigenvalues = eigenvalues.masked_fill(flat, 0)
    scaled = (vectors * eigenvalues.sqrt().unsqueeze(-1)).masked_fill(flat.unsqueeze(-1), 0)
    index = order.unsqueeze(1).expand_as(scaled)
    return torch.zeros_like(scaled).scatter(-1, index, scaled), eigenvalues, trace


def position_directions(
    logits: Tensor, scale: Tensor, directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigen-directions over all positions of an example, for ``logits`` ``(B, T, O)``.

    The Hessian is block-diagonal over positions, weighted by ``scale`` ``(B, T)``: each (O, O) block is
    decomposed by itself, and the longest of all T (O - 1) directions are kept. Nothing of the size of
    the whole (T O)² matrix, or of its T (O - 1) columns, is formed.

    Returns, longest first, the directions times √eigenvalue ``(B, k, T, O)`` in the dtype of ``logits``,
    and in float64 the eigenvalues ``(B, k)`` and traces ``(B,)``; ``k`` is at most T (O - 1).
    """
    batch, positions, classes = logits.shape
    keep = min(directions, positions * (classes - 1))
    rows = logits.new_zeros(batch, keep, positions, classes)
    values, traces = [], []
    step = max(1, _BLOCK // max(1, positions * classes**2))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        p, weight = to_float64(logits[part]).softmax(-1), to_float64(scale[part])
        # The mass of the other classes as a sum: 1 - p cancels for a confident prediction.
        others = (1 - torch.eye(classes, dtype=p.dtype, device=p.device)) @ p.unsqueeze(-1)
        diagonal = p * others.squeeze(-1) * weight.unsqueeze(-1)
        hessian = -p.unsqueeze(-1) * p.unsqueeze(-2) * weight[..., None, None]
        hessian.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        found, vectors = eigh(hessian)  # (b, T, O), (b, T, O, O)
        found = found.clamp_min(0)
        top, index = found.flatten(1).topk(keep, dim=1)
        position, which = index // classes, index % classes
        example = torch.arange(len(p), device=p.device).unsqueeze(1)
        longest = vectors.movedim(-1, -2)[example, position, which]  # (b, k, O)
        longest = longest * top.sqrt().unsqueeze(-1)
        row = torch.arange(keep, device=p.device).unsqueeze(0)
        rows[part][example, row, position] = longest.to(rows)
        values.append(top)
        traces.append(diagonal.sum((1, 2)))
    return rows, torch.cat(values), torch.cat(traces)
