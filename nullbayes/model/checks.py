"""Models that no per-example guarantee can be given for, refused before anything is computed."""

from __future__ import annotations

from torch import nn

from nullbayes.errors import ModelError


def check_mode(model: nn.Module, *, frozen: bool = False) -> None:
    """Refuse modules whose training mode ties examples together or, unless ``frozen``, makes outputs random."""

    def random(module: nn.Module) -> bool:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return module.p > 0
        return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0

    noisy = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module.training
        and (isinstance(module, nn.modules.batchnorm._BatchNorm) or (random(module) and not frozen))
    ]
    if noisy:
        raise ModelError(
            f"the model is in training mode: {noisy[:5]} would make its outputs random or tie the "
            "examples of a batch together. Call `model.eval()` first (dropout that is meant to stay: "
            '`randomness="frozen"`).'
        )
    batch_tied = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and module.running_mean is None
    ]
    if batch_tied:
        raise ModelError(
            f"{batch_tied[:5]} keep no running statistics (`track_running_stats=False`), so each "
            "output depends on the whole batch and no per-example guarantee exists. Use running "
            "statistics, GroupNorm or LayerNorm."
        )
    renormed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    if renormed:
        raise ModelError(
            f"{renormed} rewrite their own weights during a forward pass (`max_norm`). Renormalise "
            "once, then set `max_norm=None`."
        )
