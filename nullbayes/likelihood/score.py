"""How well predictions fit their targets, in one number: which number, and what may happen to it."""

from __future__ import annotations

from dataclasses import dataclass

from nullbayes.errors import InputError


@dataclass(frozen=True)
class Score:
    """A score over a data set.

    Attributes:
        name: what a likelihood's ``score_name`` says; ``label``: for tables.
        higher_is_better: accuracy is, errors and losses are not.
        allowed_growth: by how much of itself it may worsen on training data while the guarantee holds.
        bounds_prior: whether the prior precision is raised until the score worsens by no more than half of that.
    """

    name: str
    label: str
    higher_is_better: bool = False
    allowed_growth: float = 0.0
    bounds_prior: bool = False

    def worsened(self, before: float, after: float) -> float:
        """How much worse ``after`` is than ``before``; negative where it is better."""
        return before - after if self.higher_is_better else after - before


SCORES = {
    score.name: score
    for score in (
        Score("accuracy", "accuracy", higher_is_better=True),
        Score("rmse", "RMSE", allowed_growth=1e-3),
        # Over the samples a loss is of second order: it grows however well they keep it to first order.
        Score("loss", "loss", allowed_growth=1e-2, bounds_prior=True),
    )
}


def score_named(name: str) -> Score:
    """The score of that name. Raises `InputError` for any other."""
    if name not in SCORES:
        raise InputError(
            f"`score_name` is {name!r}; expected one of {', '.join(map(repr, SCORES))}."
        )
    return SCORES[name]
