"""A plan whose rows did not run, or were wrong, changed step by step until they do and are."""

from __future__ import annotations

from nullbayes.errors import ModelError, NullBayesError
from nullbayes.jacobian.capture.capture import GenericPathFailed, RuleMismatch
from nullbayes.jacobian.capture.plan import CapturePlan, Site
from nullbayes.jacobian.capture.spreading import no_longer_spread
from nullbayes.model.batch import Inputs
from nullbayes.model.functional import FunctionalModel


def other_way(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, error: Exception, where: str
) -> None:
    """Change the plan so that what failed is done in another way."""
    plan.routes.clear()
    plan.turned_routes.clear()
    if isinstance(error, RuleMismatch):
        for site in [s for s in plan.sites if s.path == error.path]:
            next_layout(plan, site, str(error))
        return
    if isinstance(error, GenericPathFailed):
        if plan.vmapped:
            plan.vmapped = False
            return
    elif no_longer_spread(plan):
        return
    elif plan.batched_backward:
        plan.batched_backward = False
        return
    root = error.__cause__ if isinstance(error, GenericPathFailed) else error
    assert isinstance(root, Exception)
    raise cannot(functional, inputs, root, where) from root


def cannot(
    functional: FunctionalModel, inputs: Inputs, error: Exception, where: str
) -> NullBayesError:
    """What is wrong with a model whose rows no path computes."""
    text = f"{type(error).__name__}: {error}"
    if "use_reentrant" in text or "heckpoint" in type(error).__name__:
        return reentrant(where)
    functional.outputs(inputs, where)  # says so where the inputs are to blame
    return ModelError(
        f"{where}: derivatives of the network's outputs could not be computed ({text}). Each operation between the "
        "chosen parameters and the output needs a derivative; leave parameters before one that has none out with "
        "`parameters=`, or replace it."
    )


def reentrant(where: str) -> ModelError:
    """What to say of activation checkpointing that allows no derivatives of single examples."""
    return ModelError(
        f"{where}: the network recomputes activations in the backward pass (`torch.utils.checkpoint`) in a way "
        "that gives no derivatives for single examples. Pass `use_reentrant=False` there, or turn checkpointing off in "
        "evaluation mode (`model.gradient_checkpointing_disable()` in transformers)."
    )


def mend(plan: CapturePlan, bad: list[str], where: str) -> None:
    """The next explanation for each parameter whose rows are wrong."""
    plan.routes.clear()
    plan.turned_routes.clear()
    wrong = set(bad)
    local = [site for site in plan.local if wrong & set(site.names)]
    served = {name for site in plan.local for name in site.names} | set(plan.spread)
    stuck = sorted((wrong & set(plan.generic)) - served)
    if stuck and not plan.vmapped:
        raise ModelError(
            f"{where}: the Jacobian rows of {stuck} differ from automatic differentiation even on the "
            "generic path; the forward pass is not a fixed function of weights and the inputs of one example "
            "(randomness, caches, a custom backward, examples that depend on one another). Make it one, or leave "
            "them out of `parameters=`."
        )
    if stuck:
        plan.vmapped = False
    plan.local = [site for site in plan.local if site not in local]
    plan.spread = [name for name in plan.spread if name not in wrong]
    for name in bad:
        for site in plan.owners(name):
            next_layout(plan, site, "its rows did not match automatic differentiation")


def next_layout(plan: CapturePlan, site: Site, reason: str) -> None:
    """Batch on the second axis (sequence-first layers); after that, or where the axis is proved, the generic path."""
    if site.spread:
        site.spread = False
        return
    if site.batch_axis == 0 and not site.axis_proved:
        site.batch_axis = 1
        return
    for name in list(site.names.values()):
        plan.to_generic(name, reason)
