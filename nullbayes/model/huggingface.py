"""What networks of the transformers library do with a batch around their forward pass.

Such a network takes labels as an input and computes its own loss from them: a causal language model shifts them by one
position, an encoder-decoder makes the decoder's inputs from them, a segmenter resizes its logits to the masks. Whoever
calls the network without labels has to do the same. What a network does is found out by asking it: its own loss on a
few examples is compared with what it may have meant. Where that does not tell, there is a warning.

Nothing here imports transformers: a network that comes from it has it loaded.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.errors import InputError, NullBayesWarning
from nullbayes.model.adapters import adapted, pretrained, task_inputs, tokens_before
from nullbayes.model.batch import batch_size, changed, plain
from nullbayes.model.decoding import check_no_cache, decoder_inputs, generates
from nullbayes.model.own_loss import (
    IGNORED,
    Kind,
    candidates,
    entry,
    fitting,
    kind_of,
    main_loss_alone,
    undecided,
    unknown,
)
from nullbayes.model.own_outputs import OwnOutputs
from nullbayes.model.parameters import HALF

LABELS = ("labels", "label", "label_ids")
# What networks for time series call them.
VALUES = ("target_values", "future_values")
SPANS = ("start_positions", "end_positions")
# Ends of the names of networks that score a label where it stands.
UNSHIFTED = ("TokenClassification", "MaskedLM", "FrameClassification", "PreTraining")
# Examples on which a network is asked for its own loss.
ASKED = 4
# Relative difference of two losses that are the same: the library computes some of them in float32.
SAME, SAME_IN_HALF = 1e-3, 3e-2

_LIKELIHOODS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "binary",
}


class HuggingFace:
    """Batches and outputs of one network of the transformers library.

    Args:
        model: as the user has it, with an adapter around it or without; it is called, never written to.
        base: the network itself; ``passive``: the user's own ``forward`` says what outputs are, so batches stay as
            they are.

    Attributes:
        kind: what the network predicts, once a batch with labels was seen.
        shifts: whether position t is scored against the label of t + 1; None: not known yet.
        size: what logits of a segmenter are resized to: that of the inputs, or ``(height, width)``.
    """

    def __init__(self, model: nn.Module, base: Any, *, passive: bool = False) -> None:
        self.model, self.base, self.passive = model, base, passive
        self.kind: Kind | None = None
        self.shifts: bool | None = None
        self.size: Literal["inputs"] | tuple[int, int] | None = None
        # The label that the likelihood ignores, and what the likelihood is called.
        self.ignore: int | None = IGNORED
        self.likelihood: str | None = None
        # Whether labels came shifted by hand, as far as a batch told.
        self._by_hand: bool | None = None
        self._told: set[str] = set()
        names = inspect.signature(base.forward).parameters
        self._parameters = tuple(n for n, p in names.items() if p.kind != p.VAR_KEYWORD)
        self._parameters += task_inputs(model)
        # A forward pass of the user's own may hand everything on without naming it.
        self._named = getattr(base, "main_input_name", "input_ids") in self._parameters

    @staticmethod
    def of(model: nn.Module, *, passive: bool) -> HuggingFace | None:
        """None for a network of any other origin."""
        base = pretrained(model)
        return None if base is None else HuggingFace(model, base, passive=passive)

    # -- kept in files ---------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """What was found out, JSON-able."""
        return {"kind": self.kind, "shifts": self.shifts, "size": self.size}

    def restore(self, config: Mapping[str, Any]) -> None:
        """The inverse of :meth:`config`."""
        size = config.get("size")
        self.kind, self.shifts = config.get("kind"), config.get("shifts")
        self.size = tuple(size) if isinstance(size, list) else size

    # -- batches ---------------------------------------------------------------------------------

    def split(self, batch: Mapping[Any, Any], *, free: bool) -> tuple[Any, Any] | None:
        """``(inputs, targets)`` of a batch whose targets have names of this library; None: names of anyone."""
        if all(key in batch for key in SPANS):
            inputs = {k: v for k, v in batch.items() if k not in SPANS}
            if free:
                return inputs, {k: batch[k] for k in SPANS}
            spans = [torch.as_tensor(batch[k]) for k in SPANS]
            return inputs, torch.stack([s.reshape(len(s)) for s in spans], 1)
        values = [
            k for k in VALUES if k in self._parameters and not any(n in batch for n in LABELS)
        ]
        for name in ("label_ids", *values):
            if name in batch:
                return {k: v for k, v in batch.items() if k != name}, batch[name]
        return None

    def inputs(self, inputs: Any, labels: Any = None, reserved: tuple[str, ...] = ()) -> Any:
        """What the network is called with: without labels and what it does not take, with inputs of a decoder.

        Args:
            labels: of the batch, where they came apart from the inputs.
            reserved: names that are taken by someone else than the network.
        """
        if self.passive or not isinstance(inputs, Mapping):
            return inputs
        check_no_cache(inputs)
        found = self.labels_of(inputs)
        found = labels if found is None else found
        given = {k: v for k, v in inputs.items() if k not in (*LABELS, *SPANS)}
        extra = [k for k in given if k not in (*self._parameters, *reserved)] if self._named else []
        if extra:
            self._warn(
                "extra",
                f"the batches hold {sorted(map(str, extra))}, which {type(self.base).__name__} does not take; they are "
                "left out, as the Trainer does. Check for a misspelt name.",
            )
            given = {k: v for k, v in given.items() if k not in extra}
        if generates(self.base, self._parameters) and not any(
            k.startswith("decoder_input") for k in given
        ):
            if not isinstance(found, Tensor) or found.ndim != 2:
                raise InputError(
                    f"{type(self.base).__name__} needs `decoder_input_ids`, or `labels (B, T)` to make them from; the "
                    f"batch holds {sorted(map(str, given))}."
                )
            given["decoder_input_ids"] = decoder_inputs(self.base, found)
        return given

    @staticmethod
    def labels_of(inputs: Any) -> Any:
        """The labels among ``inputs``; None where there are none."""
        named = isinstance(inputs, Mapping)
        return next((inputs[k] for k in LABELS if k in inputs), None) if named else None

    def prepared(self, inputs: Any, targets: Any, where: str) -> Any:
        """Targets of a batch as the outputs are scored against.

        Args:
            inputs: as :meth:`inputs` returns them; targets: as the network itself would take them.

        Raises:
            InputError: labels that contradict those of earlier batches.
        """
        if not isinstance(targets, Tensor):
            return targets
        if self.passive:
            self._warn_passive(inputs, targets)
            return targets
        if self.kind is None:
            self._learn(inputs, targets)
        if self.kind == "tokens":
            return self._token_targets(inputs, targets, where)
        if self.kind == "frames":
            return targets.argmax(-1)
        if self.kind == "alignments":
            raise InputError(
                f"{where}: {type(self.base).__name__} is trained with a loss that sums over alignments (CTC), so "
                f"that labels of shape {tuple(targets.shape)} belong to no position of its outputs. Pass that loss as "
                '`loss=` with `preserve="loss"`; it takes the network\'s outputs and the labels, and returns one '
                "value for each example."
            )
        if self.kind == "segmentation" and not targets.is_floating_point():
            return self._without(targets, targets == self._background())
        if self.kind == "questions":
            length = self._length(inputs)
            targets = targets.clamp(min=0)
            return targets if length is None else self._without(targets, targets >= length)
        return targets

    def shifting(self, inputs: Any, labels: Tensor) -> bool | None:
        """Whether position t is scored against the label of t + 1; None: not known."""
        if self.passive or labels.ndim != 2:
            return None
        if self.kind is None:
            self._learn(inputs, labels)
        return self.shifts

    def _token_targets(self, inputs: Any, labels: Tensor, where: str) -> Tensor:
        labels = self._padded(self._unpadded(inputs, labels))
        if not self.shifts or self._shifted_by_hand(inputs, labels, where):
            return labels
        if self.ignore is None:
            raise InputError(
                f"{where}: the last position of a causal language model has no label, but the likelihood ignores none. "
                "Leave its `ignore_index` at -100."
            )
        return F.pad(labels[:, 1:], (0, 1), value=self.ignore)

    def _padded(self, labels: Tensor) -> Tensor:
        """With labels to be ignored at the tokens that prompt tuning puts before the inputs."""
        if not self.before or self.ignore is None:
            return labels
        return F.pad(labels, (self.before, 0), value=self.ignore)

    @property
    def before(self) -> int:
        """How many tokens of its own prompt tuning puts before those of the inputs, in the outputs too."""
        return 0 if self._pairs() else tokens_before(adapted(self.model))

    def _pairs(self) -> bool:
        return bool(getattr(self.base.config, "is_encoder_decoder", False))

    def _unpadded(self, inputs: Any, labels: Tensor) -> Tensor:
        """Without the labels of padding."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if not isinstance(mask, Tensor) or mask.shape != labels.shape or self._pairs():
            return labels
        padding = (mask == 0) & self._kept(labels)
        if not bool(padding.any()) or self._by_hand:
            return labels
        self._warn(
            "padding",
            f"{int(padding.sum())} labels of the first such batch belong to padding (`attention_mask` is 0 there); "
            "they are ignored. The network's own loss counts them: write -100 there for training as well.",
        )
        return self._without(labels, padding)

    def _kept(self, labels: Tensor) -> Tensor:
        every = torch.ones_like(labels, dtype=torch.bool)
        return every if self.ignore is None else torch.ne(labels, self.ignore)

    def _without(self, targets: Tensor, ignored: Tensor) -> Tensor:
        if self.ignore is None or not bool(ignored.any()):
            return targets
        return targets.masked_fill(ignored, self.ignore)

    def _shifted_by_hand(self, inputs: Any, labels: Tensor, where: str) -> bool:
        """Whether labels hold the next token at each position already."""
        tokens = self._tokens(inputs)
        if tokens is None or tokens.shape != labels.shape:
            return bool(self._by_hand)
        kept = self._kept(labels)
        there, before = _agree(labels, tokens, kept), _agree(labels[:, :-1], tokens[:, 1:], kept)
        if there == before:  # nothing to tell by, or labels that are not the tokens
            if not there and bool(kept.any()):
                self._warn(
                    "other",
                    "the labels are neither the tokens of the inputs nor those one position on; each is taken for the "
                    "position before it, as the network's own loss does.",
                )
            return bool(self._by_hand)
        if self._by_hand is not None and self._by_hand != before:
            raise InputError(
                f"{where}: labels of earlier batches were {'the next tokens' if before else 'the tokens themselves'} "
                "where those of this one are not; expected the same in each batch."
            )
        self._by_hand = before
        if before:
            self._warn(
                "hand",
                "the labels hold the next token at each position already, so they are taken as they are. The network's "
                "own loss would shift them once more: for training with it, pass the tokens themselves.",
            )
        return before

    def _warn_passive(self, inputs: Any, labels: Tensor) -> None:
        tokens = self._tokens(inputs)
        if tokens is None or tokens.shape != labels.shape or not self._named_causal():
            return
        if _agree(labels, tokens, labels != IGNORED):
            self._warn(
                "passive",
                "the labels are the tokens of the inputs, which a causal language model scores against the position "
                "before; with `forward=`, they are taken as they are. Leave `forward` out, or shift the labels.",
            )

    # -- outputs ---------------------------------------------------------------------------------

    @property
    def outputs(self) -> OwnOutputs | None:
        """How outputs are read, without the network; None where the user's own ``forward`` says it."""
        return None if self.passive else OwnOutputs(self.kind, self.size, self._parameters)

    def output(self, value: Any, inputs: Any) -> Tensor | None:
        """The tensor in what the network returned that its own loss is computed from; None: not known here."""
        read = self.outputs
        return None if read is None else read(value, inputs)

    # -- what the network's own loss says ----------------------------------------------------------

    def _learn(self, inputs: Any, targets: Tensor) -> None:
        """Find out, from the network's own loss on a few examples, what it makes of labels."""
        kept = targets.reshape(len(targets), -1) != IGNORED
        index = kept.any(1).nonzero()[:ASKED, 0]
        if not len(index):
            return
        some = changed(plain(inputs), lambda t: t[index], batch_size(inputs))
        labels = targets[index]
        try:
            value, problem = self._called_with(some, labels)
            loss = entry(value, "loss")
            logits = self.output(value, some)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a network says to labels of another kind
            loss, logits, problem = None, None, type(error).__name__
        if logits is None:
            self._named_kind(targets, f"it does not take the labels ({problem})")
            return
        self.kind = kind_of(value, logits, labels)
        if loss is None or self.kind is None:
            self._named_kind(targets, "it returned no loss")
            return
        self._compared(float(loss), logits.detach(), labels, some, problem)

    def _called_with(self, inputs: Any, labels: Tensor) -> tuple[Any, str | None]:
        """The network's outputs with its loss, and what kind of problem it found; its configuration stays."""
        given = self._by_name(inputs)
        spans = "start_positions" in self._parameters and labels.ndim == 2 and labels.shape[1] == 2
        if spans:
            given |= dict(zip(SPANS, labels.unbind(1), strict=True))
        else:
            names = (n for n in (*LABELS[:1], *VALUES) if n in self._parameters)
            whole = not labels.is_floating_point()
            given[next(names, LABELS[0])] = labels.long() if whole else labels
        if getattr(self.base.config, "return_dict", True) is False:
            given["return_dict"] = True
        config = self.base.config
        with (
            main_loss_alone(config, self.base, adapted(self.model)),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            value = self.model(**given)
            return value, getattr(config, "problem_type", None)

    def _compared(
        self, loss: float, logits: Tensor, labels: Tensor, inputs: Any, problem: str | None
    ) -> None:
        same = SAME_IN_HALF if logits.dtype in HALF else SAME
        found = self._candidates(logits.double(), labels, inputs, problem)
        fits = fitting(found, loss, same)
        if self.kind == "tokens":
            self.shifts = "shifted" in fits if len(fits) == 1 else self._named_causal()
            if len(fits) > 1 and not (self._pairs() or self._named_tokens()):
                self._warn("near", undecided(type(self.base).__name__, loss, found))
        if "one-hot" in fits:
            self.kind = "frames"
        if self.kind == "tokens" and not found and type(self.base).__name__.endswith("ForCTC"):
            self.kind = "alignments"
            return
        if "resized" in fits:
            height, width = labels.shape[-2:]
            same_size = self._image_size(inputs) == (height, width)
            self.size = "inputs" if same_size else (int(height), int(width))
        if self.kind == "sequence":
            self._check_likelihood(problem, logits)
        if not fits:
            self._warn("loss", unknown(type(self.base).__name__, loss, found))

    def _candidates(
        self, logits: Tensor, labels: Tensor, inputs: Any, problem: str | None
    ) -> dict[str, float]:
        """Losses that the network may mean, by what distinguishes them."""
        if self.kind == "tokens" and logits.shape[1] != labels.shape[1]:
            labels = self._padded(labels)
        return candidates(self.kind, logits, labels, problem, self._background())

    def _check_likelihood(self, problem: str | None, logits: Tensor) -> None:
        wanted = _LIKELIHOODS.get(problem or "")
        if wanted is None or self.likelihood in (None, wanted):
            return
        if self.likelihood not in _LIKELIHOODS.values():
            return
        text = (
            f"the network's own loss is that of problem_type={problem!r}, which is likelihood={wanted!r}; the "
            f"posterior has likelihood={self.likelihood!r}."
        )
        if self.likelihood == "classification" and logits.shape[-1] == 1:
            raise InputError(f"{text} Pass likelihood={wanted!r} ('binary' for a lone logit).")
        self._warn("problem", f"{text} Keep it only if the network was trained so.")

    def _named_kind(self, targets: Tensor, why: str) -> None:
        """Where the network cannot be asked: what its class name says, with a warning."""
        name = type(self.base).__name__
        if targets.ndim == 2 and not targets.is_floating_point() and self._named_causal():
            self.kind, self.shifts = "tokens", True
        self._warn(
            "asked",
            f"what {name} does with labels could not be found out: {why}. "
            + ("They are shifted by one, as its name says." if self.shifts else "They stay."),
        )

    def _named_tokens(self) -> bool:
        return self._named_causal() or type(self.base).__name__.endswith(UNSHIFTED)

    def _named_causal(self) -> bool:
        name = type(self.base).__name__
        return not self._pairs() and name.endswith(("ForCausalLM", "LMHeadModel"))

    # -- its inputs ------------------------------------------------------------------------------

    def _by_name(self, inputs: Any) -> dict[str, Any]:
        return dict(OwnOutputs(self.kind, self.size, self._parameters).by_name(inputs))

    def _tokens(self, inputs: Any) -> Tensor | None:
        tokens = self._by_name(plain(inputs)).get("input_ids")
        return self._padded(tokens) if isinstance(tokens, Tensor) and tokens.ndim == 2 else None

    def _length(self, inputs: Any) -> int | None:
        tokens = self._tokens(inputs)
        return None if tokens is None else tokens.shape[1]

    def _image_size(self, inputs: Any) -> tuple[int, int] | None:
        return OwnOutputs(self.kind, self.size, self._parameters).image_size(inputs)

    def _background(self) -> int:
        return int(getattr(self.base.config, "semantic_loss_ignore_index", 255))

    def _warn(self, topic: str, text: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(text, NullBayesWarning, stacklevel=3)


def _agree(labels: Tensor, tokens: Tensor, kept: Tensor) -> bool:
    """Whether labels are the tokens wherever they are not to be ignored."""
    where = kept[:, : labels.shape[1]]
    return bool(where.any()) and bool(torch.eq(labels, tokens)[where].all())
