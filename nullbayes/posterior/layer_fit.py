"""From data to a layer posterior: proof of the rules, one pass, factors, the prior precision, the certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nullbayes.audit.company import check_company
from nullbayes.common.memory import peak_bytes
from nullbayes.common.progress import CERTIFICATE, FACTORISATION, Laps, Stages
from nullbayes.constraints.shared_rows import everyones
from nullbayes.errors import InputError
from nullbayes.likelihood import Likelihood
from nullbayes.model.fingerprint import fingerprint
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.probe import Probe
from nullbayes.model.shares import Share
from nullbayes.moments.blocks import Block, Blocks
from nullbayes.moments.gather import Batch, Gathered, drawn, first_batch, gather, unlabelled
from nullbayes.moments.shared import Part
from nullbayes.moments.sketch import Sketch
from nullbayes.moments.verify import verified_blocks
from nullbayes.posterior.layer_certificate import LayerCertificate, LayerReport
from nullbayes.posterior.layer_guarantee import (
    CHECKED_SAMPLES,
    guarded_precision,
    measure,
)
from nullbayes.posterior.layer_left_out import left_out_divergence
from nullbayes.posterior.layer_leverage import Leverages
from nullbayes.posterior.layer_state import LayerState

INPUTS = "layer inputs"
# Layers with more columns than that are sketched whatever the memory.
WIDEST = 16_384
# Rank of a sketch, at most; and what share of the columns.
RANK, RANK_SHARE = 1024, 4
# Matrices of a layer's width that a fit holds: sums, root, a copy for leverages.
COPIES = 3


@dataclass(frozen=True)
class LayerFit:
    """What a fit left: the sums and what follows from them.

    ``left_out``: divergence of examples left out, at prior precision one.
    """

    state: LayerState
    likelihood: Likelihood
    alpha: float
    left_out: float | None
    certificate: LayerCertificate
    fingerprint: dict[str, str]

    @property
    def gathered(self) -> Gathered:
        return self.state.gathered


def sketch_ranks(blocks: list[Block], budget: int) -> list[int | None]:
    """By block: None for whole second moments, or the rank of a sketch where they do not fit in ``budget`` bytes."""
    ranks: list[int | None] = [None] * len(blocks)
    widest = sorted(range(len(blocks)), key=lambda i: -blocks[i].columns)
    total = sum(_dense_bytes(b) for b in blocks)
    for i in widest:
        block = blocks[i]
        if block.columns <= WIDEST and total <= budget:
            break
        rank = max(1, min(RANK, block.columns // RANK_SHARE))
        while rank > 16 and total - _dense_bytes(block) + _sketch_bytes(block, rank) > budget:
            rank //= 2
        ranks[i] = rank
        total += _sketch_bytes(block, rank) - _dense_bytes(block)
    return ranks


def _dense_bytes(block: Block) -> int:
    groups, _, columns = block.size
    return 0 if not block.multiplied and not block.biases else COPIES * 8 * groups * columns**2


def _sketch_bytes(block: Block, rank: int) -> int:
    groups, _, columns = block.size
    return 4 * 8 * groups * rank * columns


@dataclass(frozen=True)
class Source:
    """Data, what messages call them, the seed of what is drawn from them, and in what their products are made."""

    loader: Any
    name: str
    seed: int
    products: torch.dtype


def collect(
    functional: FunctionalModel,
    likelihood: Likelihood | None,
    source: Source,
    stage: Stages,
    budget: int,
    known: tuple[Blocks, list[int | None]] | None = None,
) -> tuple[Blocks, Gathered]:
    """One pass over the data; without ``known`` blocks and ranks, rules are proved on its first batch.

    ``likelihood``: estimates its observation noise from this pass, where it has to; None: not from these data.
    """
    name, seed = source.name, source.seed
    read = unlabelled(source.loader, functional.device, name)
    batches = drawn(functional, stage.track(read, INPUTS))
    everything: Iterator[Batch] | Part
    if isinstance(source.loader, Share):
        probe = unlabelled(source.loader.probe, functional.device, name)
        first, _ = first_batch(drawn(functional, probe))
        own = iter(()) if source.loader.empty else batches
        everything = Part(own, source.loader, functional.draws)
    else:
        first, everything = first_batch(batches)
    if known is not None:
        blocks, ranks = known
    else:
        outputs = functional.outputs(first, f"{name}, batch 0")  # wrong inputs are said to be that
        if not outputs.is_floating_point():
            raise InputError(
                f"{name}, batch 0: the outputs have dtype {outputs.dtype}, expected real floating point: raw logits or "
                "regression outputs, before any argmax or comparison."
            )
        blocks = verified_blocks(functional, first, f"{name}, batch 0")
        ranks = sketch_ranks(blocks.blocks, budget)
        if not blocks.blocks:
            reasons = "; ".join(f"{n}: {r}" for n, r in list(blocks.fixed.items())[:3])
            raise InputError(
                f"no parameter takes part: all stay fixed ({reasons}). Choose weights of layers that have a rule "
                "(`parameters=`), or register one (`nb.moments.register`)."
            )
    if likelihood is None or not likelihood.needs_noise_fit:
        return blocks, gather(
            functional, blocks, everything, ranks, seed, name, dtype=source.products
        )
    residuals = _Residuals(likelihood)
    out = gather(functional, blocks, everything, ranks, seed, name, residuals.add, source.products)
    residuals.finish(source.loader)
    return blocks, out


class _Residuals:
    """Squared residuals for the observation noise of a regression, from the same pass."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Tensor, targets: Any) -> None:
        if not isinstance(targets, Tensor):
            raise InputError(
                "a regression's observation noise is estimated from residuals, and these batches have no targets: "
                "pass (inputs, targets), or the noise, `likelihood=nb.Regression(noise_variance=...)`."
            )
        self.likelihood.validate(outputs, targets, "the training data")
        self.pairs.append((outputs.detach().cpu(), targets.detach().cpu()))

    def finish(self, loader: Any) -> None:
        """``loader``: those of all processes, where it is a `Share`."""
        self.likelihood.fit_noise(list(everyones(iter(self.pairs), loader)))


def concluded(
    state: LayerState, likelihood: Likelihood, prior: float | None, stage: Stages, laps: Laps
) -> LayerFit:
    """Factors, prior precision and certificate of ``state``. ``prior``: None: chosen by the guarantee.

    Raises `ModelError` where examples depend on one another: what stands for a batch stands for none of them.
    """
    for _ in stage.track(list(range(1)), FACTORISATION):
        _ = state.factors
    laps.lap(FACTORISATION)
    for index, (inputs, _, outputs) in enumerate(state.checked):
        check_company(state.functional, inputs, outputs, "the training data", index)
    samples = min(CHECKED_SAMPLES, max(2, state.num_samples))
    left_out = left_out_divergence(state, likelihood, prior or state.natural_precision)
    alpha = guarded_precision(state, likelihood, left_out, samples) if prior is None else prior
    certificate = certify(state, likelihood, alpha, left_out, samples)
    laps.lap(CERTIFICATE)
    certificate = replace(
        certificate, seconds=laps.total, peak_memory=peak_bytes(state.functional.device)
    )
    digest = fingerprint(state.functional.model)
    if state.gathered.kept:
        state.functional.probe = Probe.taken(state.functional, state.gathered.kept[0][0])
    return LayerFit(state, likelihood, alpha, left_out, certificate, digest)


def certify(
    state: LayerState, likelihood: Likelihood, alpha: float, left_out: float | None, samples: int
) -> LayerCertificate:
    """Run sampled networks on the kept training examples, and say what they do."""
    found = measure(state, likelihood, alpha, samples)
    weights = state.functional.weights()
    names = [n for block in state.blocks.blocks for n in block.names]
    size = math.sqrt(sum(float(weights[n].double().square().sum()) for n in names))
    squares = [
        sum(float(t.double().square().sum()) for t in state.change(i).values())
        for i in range(min(2, samples))
    ]
    moved = math.sqrt(sum(squares) / len(squares) / alpha)
    return LayerCertificate(
        divergence=found.divergence if found.examples else math.nan,
        change=found.change,
        left_out_divergence=None if left_out is None else left_out / alpha,
        network_score=found.network_score,
        posterior_score=found.posterior_score,
        score_name=likelihood.score_name,
        weight_change=moved / size if size else math.inf,
        free_share=state.free_share,
        delta=state.delta,
        prior_precision=alpha,
        layers=tuple(reports(state)),
        fixed=dict(state.blocks.fixed),
        examples=state.gathered.examples,
        checked_examples=found.examples,
        checked_samples=samples,
        dtype=str(state.functional.dtype),
        seconds=0.0,
        peak_memory=0,
    )


def reports(state: LayerState) -> list[LayerReport]:
    """By block: its size and what is left of it."""
    out = []
    parts = zip(state.blocks.blocks, state.gathered.sums, state.factors, strict=True)
    for block, sums, factor in parts:
        groups, outputs, columns = block.size
        error = None
        if isinstance(sums.inputs, Sketch):
            mean = sums.inputs.trace.mean() / columns
            error = float(sums.inputs.cut.max() / mean) if bool(mean > 0) else 0.0
        out.append(
            LayerReport(
                block.name, block.names, groups, outputs, columns, sums.count, factor.free, error
            )
        )
    return out


def leverages(state: LayerState, *, pooling: bool = False) -> Leverages:
    """Scorer of inputs for ``state``; ``pooling``: with the mean input of each block."""
    return Leverages(
        state.functional,
        state.blocks,
        state.gathered,
        state.delta,
        factors=state.factors,
        pooling=pooling,
    )


def set_precision(fit: LayerFit, alpha: float) -> LayerFit:
    """The same at another prior precision; its certificate measured anew where training examples are at hand."""
    if not fit.gathered.kept:  # loaded from a file, which holds no data
        ratio, old = fit.alpha / alpha, fit.certificate
        left_out = old.left_out_divergence
        note = "Figures rescaled from those of the fit, to first order: the file holds no training examples."
        certificate = replace(
            old,
            divergence=old.divergence * ratio,
            change=old.change * math.sqrt(ratio),
            left_out_divergence=None if left_out is None else left_out * ratio,
            weight_change=old.weight_change * math.sqrt(ratio),
            posterior_score=None,
            prior_precision=alpha,
            notes=(note,),
        )
        return replace(fit, alpha=alpha, certificate=certificate)
    samples = fit.certificate.checked_samples
    found = certify(fit.state, fit.likelihood, alpha, fit.left_out, samples)
    found = replace(found, seconds=fit.certificate.seconds, peak_memory=fit.certificate.peak_memory)
    return replace(fit, alpha=alpha, certificate=found)
