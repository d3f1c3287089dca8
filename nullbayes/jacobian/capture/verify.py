"""Proof on a probe batch that every use of every parameter is accounted for.

Layer rules see modules, not mathematics: a weight used through ``F.linear(x, self.w.T)`` or a
module called with its batch on another axis would be missed in silence. So each fit compares the
rows of a few examples with plain automatic differentiation of the whole model, one example at a
time. What does not match goes to the generic path by name; what then still differs is an error.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nullbayes.audit.network import NetworkCopy
from nullbayes.audit.precision import tolerance
from nullbayes.errors import InputError, ModelError, NonFiniteError, NullBayesError
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.capture.checking import captured
from nullbayes.jacobian.capture.mending import cannot, next_layout
from nullbayes.jacobian.capture.plan import CapturePlan, make_plan
from nullbayes.jacobian.capture.single_module import LocalFailed, LocalSite, ancestors
from nullbayes.jacobian.capture.spreading import candidates
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.size import is_large

PROBE_EXAMPLES = 3
# Of large networks, whose rows written out are gigabytes, one: the comparison of the first batch has several as well.
PROBE_COTANGENTS, PROBE_COTANGENTS_OF_LARGE = 2, 1


def prove(functional: FunctionalModel, inputs: Inputs) -> CapturePlan:
    """A capture plan whose rows equal those of automatic differentiation on the first of ``inputs``.

    Raises:
        InputError: the network fails in its own precision.
        ModelError: the output has no batch axis, an example's output depends on the other examples
            of its batch or on chance, or rows still differ when every doubtful parameter is on the generic path.
        NonFiniteError: outputs or their gradients are no numbers.
    """
    _check_frequencies(functional)
    inputs = functional.batch(inputs)
    inputs = take(inputs, 0, min(batch_size(inputs), PROBE_EXAMPLES))
    size = batch_size(inputs)
    outputs = functional.outputs(inputs)
    _check_outputs(functional, inputs, outputs, size)
    _check_runs(functional, inputs)
    generator = torch.Generator().manual_seed(0)
    count = PROBE_COTANGENTS_OF_LARGE if is_large(functional.model) else PROBE_COTANGENTS
    cots = torch.randn(count, *outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    plan = make_plan(functional)
    truth = _reference_rows(functional, plan, inputs, cots)
    _check_gradients(functional, truth)
    while True:
        bad = _mismatches(functional, _captured(functional, plan, inputs, cots), truth)
        if not bad:
            break
        _repair(plan, bad)
    if plan.generic and size > 1:
        _spread(functional, plan, inputs, cots, truth)
    if set(plan.generic) - set(plan.spread) and size > 1 and functional.randomness is None:
        _localise(functional, plan, inputs, cots, truth)
    plan.written_out.clear()
    for site in plan.sites:
        site.axis_proved = size > 1
    plan.settled = True
    return plan


def _check_outputs(functional: FunctionalModel, inputs: Inputs, outputs: Tensor, size: int) -> None:
    if not bool(outputs.isfinite().all()):
        raise NonFiniteError(
            "the model's outputs on the first batch hold NaN or infinity; check the inputs' "
            "scaling and the weights."
        )
    scale = outputs.abs().max()
    allowed = tolerance(functional.rounding) * scale
    again = functional.outputs(inputs)
    if not bool((again - outputs).abs().max() <= allowed):
        raise ModelError(
            f"two forward passes on the same inputs differ (by {float((again - outputs).abs().max()):.2e}, outputs "
            f"reach {float(scale):.2e}): the model draws random numbers"
            + (
                '. Pass `randomness="frozen"` to freeze them for each example, or call `model.eval()`.'
                if functional.randomness is None
                else " that do not come from PyTorch (NumPy, `random`), or keeps a state between calls, which "
                '`randomness="frozen"` does not cover. Draw them with torch, or pass them as inputs.'
            )
        )
    alone = _one_by_one(functional, inputs, outputs)
    if not bool((alone - outputs).abs().max() <= allowed):
        raise ModelError(
            "an example's output changes when it is evaluated alone "
            f"(by {float((alone - outputs).abs().max()):.2e}, outputs reach {float(scale):.2e}): "
            "the model mixes the examples of a batch, or draws random numbers for the batch as a whole. Call "
            "`model.eval()`, replace layers that use batch statistics, and draw random numbers one per example, "
            "the batch on the first axis."
        )


def _check_frequencies(functional: FunctionalModel) -> None:
    """Raise `ModelError` for tables whose gradient is divided by how often the batch reads a row."""
    chosen = {
        id(p) for n, p in functional.model.named_parameters() if n in functional.space.by_name
    }
    bad = [
        path
        for path, module in functional.model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and module.scale_grad_by_freq
        and id(module.weight) in chosen
    ]
    if bad:
        raise ModelError(
            f"{bad} divide their gradients by how often a batch reads a row (`scale_grad_by_freq=True`), so these are "
            "no derivatives. That is for training alone: set `module.scale_grad_by_freq = False` now."
        )


def _check_runs(functional: FunctionalModel, inputs: Inputs) -> None:
    """Raise `InputError` where weights of several precisions do not fit together: rows are computed in one."""
    parameters = functional.model.parameters()
    kinds = sorted({str(p.dtype) for p in parameters if p.is_floating_point()})
    if functional.widened is None or len(kinds) == 1:
        return
    try:
        NetworkCopy(functional).outputs(take(inputs, 0, 1))
    except (NullBayesError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"the network itself fails on the first example: {type(error).__name__}: {error}. Its weights are "
            f"{' and '.join(kinds)}; rows are computed in {functional.widened}, where it runs. Convert at the joint "
            "(`x.to(self.head.weight.dtype)`), convert the model (`model.to(dtype)`), or pass `forward=` that calls "
            "it as it was trained (under `torch.autocast`)."
        ) from error


def _one_by_one(functional: FunctionalModel, inputs: Inputs, outputs: Tensor) -> Tensor:
    """Outputs of each example alone."""
    alone = []
    for n in range(len(outputs)):
        one = take(inputs, n, n + 1)
        out = functional.model_output(one)
        if out is None:  # the model's own words
            out = functional.outputs(one, "one example alone")
        if out.shape == outputs[:1].shape:
            alone.append(out)
            continue
        raise ModelError(
            f"one example alone gives outputs of shape {tuple(out.shape)}, {len(outputs)} together give "
            f"{tuple(outputs.shape)}: the batch axis of length one is removed on the way. Look for `.squeeze()` "
            "without an axis in the forward pass (or in `forward=`), and name the axis (`.squeeze(-1)`)."
        )
    return torch.cat(alone)


def _reference_rows(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, cots: Tensor
) -> Tensor:
    """Rows ``(B*C, P)`` by automatic differentiation of the whole model, one example at a time."""
    count, size = cots.shape[:2]
    space = functional.space
    rows = torch.zeros(size * count, space.total, dtype=space.dtype, device=space.device)
    for n in range(size):
        weights = functional.weights(requires_grad=True)
        try:
            with torch.enable_grad():
                out = functional(weights, take(inputs, n, n + 1))
        except (NullBayesError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an operation that runs without gradients alone
            raise cannot(functional, inputs, error, "the first examples") from error
        if not out.requires_grad:
            continue
        for c in range(count):
            try:
                grads = torch.autograd.grad(
                    out,
                    list(weights.values()),
                    cots[c, n : n + 1],
                    retain_graph=c + 1 < count,
                    allow_unused=True,
                )
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise cannot(functional, inputs, error, "the first examples") from error
            for slot, g in zip(space.slots, grads, strict=True):
                if g is not None:
                    plan.unreached.discard(slot.name)
                    g = g.to_dense() if g.is_sparse else g
                    rows[n * count + c, slot.start : slot.stop] = g.reshape(-1)
    return space.fix_(rows)


def _captured(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, cots: Tensor
) -> Block:
    """Rows as the plan gives them, changed where it did not run."""
    made = SimpleNamespace(values=cots)
    return captured(functional, plan, inputs, lambda _: made, where="the first examples")[0]


def block_rows(functional: FunctionalModel, block: Block) -> Tensor:
    """All rows of a block written out: ``(B*C, P)``. For probes and tests."""
    space = functional.space
    out = torch.zeros(block.num_rows, space.total, dtype=space.dtype, device=space.device)
    for factor in block.factors.values():
        start, rows = 0, factor.rows()
        for slot in factor.slots:
            out[:, slot.start : slot.stop] += rows[:, start : start + slot.numel]
            start += slot.numel
    return out


def _check_gradients(functional: FunctionalModel, rows: Tensor) -> None:
    """Raise `NonFiniteError` where the model's own gradients are no numbers."""
    if not bool(rows.isfinite().all()):
        slots = functional.space.slots
        names = [s.name for s in slots if not rows[:, s.start : s.stop].isfinite().all()]
        raise NonFiniteError(
            f"the outputs on the first batch are finite, their gradients with respect to {names[:4]} are not (of "
            f"{len(names)} of {len(slots)} parameters): automatic differentiation of the model gives NaN or infinity. "
            "Look for a root or a norm at zero, a division whose result is masked out, or an attention row that is "
            "masked as a whole; try another attention implementation, or leave these out of `parameters=`."
        )


def _mismatches(
    functional: FunctionalModel, block: Block, truth: Tensor, asked: set[str] | None = None
) -> list[str]:
    """Parameters whose rows are not those of ``truth (B*C, P)``, one factor written out at a time.

    All rows of a network of 100 million weights would take as much memory as its samples.

    Args:
        asked: the parameters that are looked at; None: all.
    """
    space = functional.space
    asked = set(space.names) if asked is None else asked
    away: dict[str, Tensor] = {}
    for factor in block.factors.values():  # each parameter is in one of them
        if asked.isdisjoint(slot.name for slot in factor.slots):
            continue
        values, at = factor.rows(), 0
        for slot in factor.slots:
            theirs = truth[:, slot.start : slot.stop]
            away[slot.name] = (values[:, at : at + slot.numel] - theirs).norm()
            at += slot.numel
        del values
    allowed = tolerance(functional.rounding)
    # A gradient that is zero in exact arithmetic (a key's bias under softmax) is pure rounding:
    # it is held against the whole row, not against itself.
    floor = 10 * torch.finfo(truth.dtype).eps * truth.norm().double()
    good = []
    slots = [slot for slot in space.slots if slot.name in asked]
    for slot in slots:
        size = truth[:, slot.start : slot.stop].norm()
        good.append(away.get(slot.name, size).double() <= allowed * size.double() + floor)
    told = torch.stack(good).tolist()  # of all parameters by one read
    return [slot.name for slot, fine in zip(slots, told, strict=True) if not fine]


def _repair(plan: CapturePlan, bad: list[str]) -> None:
    """Try the next explanation for each mismatching parameter."""
    stuck = [name for name in bad if name in plan.generic]
    if stuck and not plan.vmapped:
        raise ModelError(
            f"the Jacobian rows of {stuck} differ from automatic differentiation even on the "
            "generic path; the forward pass is not a fixed function of weights and inputs "
            "(randomness, caches, custom backward). Make it one, or leave them out of "
            "`parameters=`."
        )
    if stuck:
        plan.vmapped = False
    doubtful = {id(site): site for name in bad for site in plan.owners(name)}
    for site in doubtful.values():
        next_layout(plan, site, "its rows did not match automatic differentiation")


def _spread(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, cots: Tensor, truth: Tensor
) -> None:
    """Give to each example those parameters that all share, where that yields the right rows."""
    plan.spread = candidates(plan, functional.space)
    while plan.spread:
        block = _captured(functional, plan, inputs, cots)
        wrong = set(_mismatches(functional, block, truth))
        if not wrong:
            break
        kept = [name for name in plan.spread if name not in wrong]
        # Given to each, one parameter may change what arrives at another.
        plan.spread = kept if len(kept) < len(plan.spread) else []


def _localise(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, cots: Tensor, truth: Tensor
) -> None:
    """Serve what has no rule from the smallest module that gives the right rows by itself.

    From a parameter's owner outwards; what no module near it can serve stays with the whole model. One example alone
    would not tell an axis of the batch from any other.
    """
    modules = dict(functional.model.named_modules())
    owners = _owners(functional)
    # What is yet to be tried. Only the whole model leaves out single weights.
    done = functional.space.masks.keys() | set(plan.spread)
    alone = [name for name in plan.generic if name not in done]
    line = {name: list(ancestors(owners[name])) for name in alone}
    trying = _sites(line, modules, list(line))
    kept: list[LocalSite] = []
    while trying:
        plan.local = kept + trying
        hopeless: list[LocalSite] = []
        try:
            block = _captured(functional, plan, inputs, cots)
        except LocalFailed as failure:
            bad = [site for site in failure.sites if site in trying]
            hopeless = failure.hopeless
            if not bad:  # what ran before does not run now: not to be relied on
                kept = []
                break
        else:
            tried = {name for site in trying for name in site.names}
            wrong = set(_mismatches(functional, block, truth, tried))
            bad = [site for site in trying if wrong & set(site.names)]
            kept += [site for site in trying if site not in bad]
            trying = []
        for site in bad:
            trying = [other for other in trying if other is not site]
            if site not in hopeless and _next_try(site):
                trying.append(site)
                continue
            for name in site.names:
                line[name].pop(0)
            trying += _sites(line, modules, site.names)
    plan.local = kept


def _sites(
    line: dict[str, list[str]], modules: dict[str, nn.Module], names: list[str]
) -> list[LocalSite]:
    """One site for each module that is next in line for some of ``names``."""
    by_path: dict[str, list[str]] = {}
    for name in names:
        if line[name]:
            by_path.setdefault(line[name][0], []).append(name)
    return [LocalSite(path, modules[path], names) for path, names in by_path.items()]


def _next_try(site: LocalSite) -> bool:
    """A loop instead of one vectorised pass, then the batch on the second axis; False: neither is left."""
    site.batched = {}
    if site.vmapped:
        site.vmapped = False
    elif site.axis == 0:
        site.axis, site.vmapped = 1, True
    else:
        return False
    return True


def _owners(functional: FunctionalModel) -> dict[str, str]:
    """Path of the module that owns each parameter."""
    return {name: name.rpartition(".")[0] for name, _ in functional.model.named_parameters()}
