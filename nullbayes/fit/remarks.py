"""What a certificate says beside its figures: of data, outputs and rows that are not what they seem."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sized
from typing import Any

from nullbayes.audit.reading import Rereading
from nullbayes.common.memory import format_bytes
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.errors import NullBayesWarning
from nullbayes.jacobian.operator import JacobianOperator


def not_kept(loader: Iterable[Any], rows: TrainingRows, limit: int | None) -> list[str]:
    """A word on examples that ``max_examples`` left out, where the loader can say how many it has."""
    drawn = getattr(loader, "sampler", None)
    if limit is None or not isinstance(drawn, Sized) or limit >= len(drawn):
        return []
    return [
        f"{rows.examples:,} of {len(drawn):,} examples are constrained; the {len(drawn) - rows.examples:,} others get "
        "inflated novelty scores, which lowers AUROC against out-of-distribution inputs. Constrain all that the "
        "network learned from where that fits: `preserve='loss'` and `directions='auto'` take fewer rows."
    ]


def doubts(reading: Rereading | None, rows: TrainingRows, limit: int | None) -> list[str]:
    """What to say, and mostly to warn of, where data or outputs are not what they seem."""
    again = None if reading is None else reading.note(limit)
    found = [] if again is None else [again]
    found += [] if rows.doubtful is None else [(rows.doubtful, True)]
    for text, loud in found:
        if loud:
            warnings.warn(text, NullBayesWarning, stacklevel=2)
    return [text[0].upper() + text[1:] for text, _ in found]


def where_kept(operator: JacobianOperator) -> list[str]:
    """A word on rows that are not in memory."""
    places = operator.kept()
    if set(places) <= {"memory"}:
        return []
    text = ", ".join(
        f"{format_bytes(n)} {'in memory' if w == 'memory' else 'on disk' if w == 'disk' else w}"
        for w, n in places.items()
    )
    return [f"Rows: {text}."]
