"""A language model that answers with one of some tokens, as a classifier of those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nullbayes.errors import InputError
from nullbayes.likelihood.base import register_likelihood
from nullbayes.likelihood.classification import Classification
from nullbayes.model.own_loss import IGNORED

#: The input that says at which position the answer is read, where labels told so.
ANSWER = "answer_position"
LAST = "last"


class Picked:
    """The logits of some tokens at one position of each example.

    Args:
        token_ids, position: as those of :class:`Choices`.
    """

    def __init__(self, token_ids: tuple[int, ...], position: str | int) -> None:
        self.token_ids, self.position = token_ids, position
        named = isinstance(position, str) and position != LAST
        self.names: tuple[str, ...] = (ANSWER, str(position)) if named else (ANSWER,)

    def __call__(self, outputs: Tensor, inputs: Any) -> Tensor:
        """``(B, T, V)`` (or ``(B, V)``, of one position already) ``-> (B, C)``.

        Raises:
            InputError: a vocabulary or a sequence that is too short, or no position.
        """
        if outputs.ndim not in (2, 3):
            raise InputError(
                f"`Choices` picks tokens from outputs (B, T, V) or (B, V); the network returned shape "
                f"{tuple(outputs.shape)}."
            )
        if max(self.token_ids) >= outputs.shape[-1]:
            raise InputError(
                f"`Choices`: token {max(self.token_ids)} is not in the vocabulary of {outputs.shape[-1]} outputs."
            )
        ids = torch.tensor(self.token_ids, device=outputs.device)
        chosen = outputs.index_select(-1, ids)
        if outputs.ndim == 2:
            return chosen
        at = self._positions(inputs, *outputs.shape[:2]).to(outputs.device)
        # A graph that is traced knows no numbers.
        traced = torch.compiler.is_compiling()
        if not traced and (int(at.min()) < 0 or int(at.max()) >= outputs.shape[1]):
            raise InputError(
                f"`Choices(position={self.position!r})`: positions from {int(at.min())} to {int(at.max())} of outputs "
                f"with {outputs.shape[1]} positions."
            )
        return chosen.gather(1, at.reshape(-1, 1, 1).expand(-1, 1, len(ids))).squeeze(1)

    def _positions(self, inputs: Any, size: int, length: int) -> Tensor:
        """Which of ``length`` positions is read, ``(B,)``."""
        named = inputs if isinstance(inputs, Mapping) else {}
        tokens = named.get("decoder_input_ids", named.get("input_ids"))
        # Prompt tuning puts tokens of its own before those of the inputs.
        before = length - tokens.shape[1] if isinstance(tokens, Tensor) else 0
        for name in self.names:
            if isinstance(named.get(name), Tensor):
                return named[name].reshape(size) + before
        if isinstance(self.position, int):
            start = before if self.position >= 0 else length
            return torch.full((size,), self.position + start)
        if self.position != LAST:
            raise InputError(
                f"`Choices(position={self.position!r})`: the inputs hold {sorted(map(str, named))}, and none of that "
                "name."
            )
        mask = named.get(
            "decoder_attention_mask" if "decoder_input_ids" in named else "attention_mask"
        )
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return torch.full((size,), length - 1)
        places = torch.arange(mask.shape[1], device=mask.device) * (mask != 0)
        return places.amax(1) + before

    def prepared(
        self, inputs: Any, targets: Tensor, where: str, shifts: bool | None
    ) -> tuple[Any, Tensor]:
        """Places ``(B,)`` as they are; labels ``(B, T)`` of which one an example is a choice, as places and a position.

        Args:
            shifts: whether the network scores the label of a position against the position before; None: not known.
        """
        if targets.ndim != 2 or targets.is_floating_point():
            self._check_places(targets, where)
            return inputs, targets
        kept = targets != IGNORED
        if not bool(kept.any(1).all()):
            raise InputError(
                f"{where}: an example has no label that is not -100, so no answer; leave it out."
            )
        if shifts is None or not isinstance(inputs, Mapping):
            raise InputError(
                f"{where}: labels of shape {tuple(targets.shape)}, one a token, say where the answer is only beside "
                "named inputs of a network of the transformers library. Pass the places of the answers in `token_ids`, "
                "shape (B,)."
            )
        first, answer, hits = self._answers(targets, kept)
        if not bool(hits.any(1).all()):
            wrong = int((~hits.any(1)).nonzero()[0])
            raise InputError(
                f"{where}: the first label of example {wrong} that is not -100 is token {int(answer[wrong])}, which is "
                f"none of `token_ids` {list(self.token_ids)}. Labels of the prompt have to be -100."
            )
        at = first - int(shifts)
        if int(at.min()) < 0:
            raise InputError(f"{where}: an answer stands first, where nothing predicts it.")
        return {**inputs, ANSWER: at}, hits.int().argmax(1)

    def placed(self, inputs: Any, labels: Any, shifts: bool | None) -> Any:
        """Inputs of a prediction, whose labels are not asked for, with the position of the answer where they say it."""
        if shifts is None or not isinstance(labels, Tensor) or labels.is_floating_point():
            return inputs
        if labels.ndim != 2 or any(name in inputs for name in self.names):
            return inputs
        kept = labels != IGNORED
        first, _, hits = self._answers(labels, kept)
        known = bool((kept.any(1) & hits.any(1) & (first >= int(shifts))).all())
        return {**inputs, ANSWER: first - int(shifts)} if known else inputs

    def _answers(self, labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of labels ``(B, T)``: where the first is that counts, ``(B,)``, which it is ``(B, 1)`` and whether it is each
        of the choices ``(B, C)``.
        """
        first = kept.int().argmax(1)
        answer = labels.gather(1, first[:, None])
        return first, answer, answer == torch.tensor(self.token_ids, device=labels.device)

    def _check_places(self, targets: Tensor, where: str) -> None:
        if targets.is_floating_point() or not targets.numel():
            return
        count, most = len(self.token_ids), int(targets.max())
        if most >= count and most in self.token_ids:
            raise InputError(
                f"{where}: labels reach {most}, which is one of `token_ids`; expected the places of the answers there, "
                f"0 to {count - 1}."
            )


@register_likelihood
class Choices(Classification):
    """A language model that answers with one of some tokens: a classifier of those, ``C - 1`` constraints an example.

    Outputs ``(B, T, V)`` of the network become ``(B, C)``: the logits of the choices where the answer is read.
    Probabilities are those of the choices among themselves, whatever the rest of the vocabulary gets.

    Targets are the places of the right answers in ``token_ids``, ``(B,)``; or labels ``(B, T)`` as a network of the
    transformers library takes them, -100 but for the answer (and what follows it): these say themselves where the
    answer is read, and prompts may be of any length.

    Args:
        token_ids: the tokens that are answers, two or more.
        position: where the answer is read: ``"last"``, the last position that is not padding (by the
            ``attention_mask``); a whole number, from the end if it is negative; or the name of an input ``(B,)`` that
            says it for each example, and that the network itself does not get.

    Raises:
        InputError: arguments that cannot be used.
    """

    name = "choices"

    def __init__(self, token_ids: Iterable[int], position: str | int = LAST) -> None:
        super().__init__(class_axis=-1)
        given: list[Any] = [t.item() if hasattr(t, "item") else t for t in token_ids]
        whole = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in given)
        if not whole or len(given) < 2 or len(set(given)) < len(given):
            raise InputError(
                f"`token_ids` is {given!r}; expected two or more different token numbers, 0 or more."
            )
        if isinstance(position, bool) or not isinstance(position, (str, int)):
            raise InputError(
                f"`position` is {position!r}; expected 'last', a whole number, or the name of an input."
            )
        self.token_ids, self.position = tuple(given), position
        self.reading = Picked(self.token_ids, position)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "token_ids": list(self.token_ids), "position": self.position}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Choices:
        return cls(config["token_ids"], config["position"])
