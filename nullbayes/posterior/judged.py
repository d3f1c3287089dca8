"""What every posterior can say about how good it is: `evaluate` and `report`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from torch import Tensor

from nullbayes.common.alike import Rounded
from nullbayes.common.crowd import Crowd, groups_of
from nullbayes.common.processes import Processes, resolve
from nullbayes.common.writing import json_digest
from nullbayes.errors import InputError
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.jacobian.shared import serve
from nullbayes.model.batch import Inputs
from nullbayes.model.undisturbed import reading_method
from nullbayes.posterior.measuring.methods import EVIDENCE, GIVEN
from nullbayes.posterior.measuring.subject import Moved

if TYPE_CHECKING:
    from nullbayes.posterior.base import Posterior
    from nullbayes.posterior.evaluation import Evaluation
    from nullbayes.posterior.measuring.subject import Subject


Self = TypeVar("Self", bound="Judged")

# Calls that need nothing of an earlier fit.
_ANEW = ("fit", "plan")
# Figures of certificates of either kind.
_TELLING = ("prior_precision", "prior_share", "row_drift", "divergence", "free_share")


class Judged:
    """Mixin of all posteriors; what it asks of them is `nullbayes.posterior.measuring.subject.Subject`."""

    linearises = True
    #: those that work on it together, see `NullSpacePosterior`; False: this process alone
    process_group: Any = False
    #: those that hold the other samples
    sample_group: Any = False

    def __copy__(self: Self) -> Self:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__reduce_ex__(4)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(
            f"a {type(self).__name__} is neither pickled nor copied with its model and rows. To store one or to send "
            "it to another process: `posterior.save(path)`, and there `nb.load(path, model)`."
        )

    def _shared_by(self, process_group: Any, device_mesh: Any) -> None:
        """Raises `InputError` for both at once, or a mesh of other dimensions than data and samples."""
        self.process_group = process_group
        if device_mesh is None:
            return
        if process_group is not None:
            raise InputError(
                "both `process_group` and `device_mesh` are given; expected one of them: the mesh says which processes "
                "share the examples, `mesh['data']`, and which the samples."
            )
        self.process_group, self.sample_group = groups_of(device_mesh)

    @contextmanager
    def _together(self, where: str, **asked: Any) -> Iterator[Processes | None]:
        """The length of a call that all processes make: these, or None for one alone.

        Args:
            asked: arguments, which are to be the same in each; so is what the posterior was fitted to.
        """
        processes, crowd = resolve(self.process_group), Crowd.of(self.sample_group)
        if processes is not None or crowd.processes is not None:
            asked |= {"class": type(self).__name__}
            asked |= {} if where in _ANEW else self._identity()
        with crowd.call(where, asked):
            if processes is None:
                yield None
                return
            with processes.call(where, asked) as outermost:
                yield processes
                if outermost:  # others may still need products with the rows that are here
                    serve(processes)

    def _identity(self) -> dict[str, Any]:
        """What tells this posterior from others, in facts that are the same in every process."""
        own = cast("Posterior", self)
        fit = own._fit
        if fit is None:
            return {"state": "not fitted"}
        c = fit.certificate
        return {
            "weights": json_digest(fit.fingerprint)[:16],
            "samples": (own._described()["seed"], own.num_samples),
            "training data": (c.examples, getattr(c, "constraints", None)),
            # They depend on the data, the settings and the samples.
            "certificate": Rounded(float(getattr(c, name, None) or 0.0) for name in _TELLING),
        }

    @reading_method
    def evaluate(
        self,
        test: Any,
        *,
        shifted: Mapping[str, Any] | None = None,
        train: Any = None,
        validation: Any = None,
        against: Sequence[Judged] | Mapping[str, Judged] = (),
        slices: Mapping[str, Any] | None = None,
        show: Callable[[Any], Any] | None = None,
        progress: bool = True,
    ) -> Evaluation:
        """Figures with standard errors for the trained network, its temperature scaling, and this posterior.

        Args:
            test: data that neither training nor calibration saw: a loader, a data set, or ``(X, y)``.
            shifted: ``{name: data}`` of out-of-distribution inputs; targets are not needed.
            train: training data, for score and NLL there.
            validation: fits the temperature, calibrates a copy of this posterior where `calibrate` was not called, and
                gives the threshold of novelty.
            against: further fitted posteriors, as a list or ``{name: posterior}``.
            slices: ``{name: mask (N,) of the test examples, or function(inputs, targets) -> (B,)}``.
            show: ``show(input)`` to a string or an array to be drawn, for the examples of a report.
            progress: bars on standard error.

        Raises:
            NotFittedError: not fitted. InputError: data, slices or posteriors that cannot be used, by name.
        """
        from nullbayes.posterior.evaluation import Question, evaluate

        posterior = cast("Subject", self)
        others = cast("Mapping[str, Subject]", against)
        names = {
            "data": [n for n, d in (("train", train), ("validation", validation)) if d is not None],
            "shifted": _names(shifted),
            "slices": _names(slices),
            "against": _names(against),
        }
        with self._together("evaluate", **names) as processes:
            return evaluate(
                Question(
                    posterior,
                    test,
                    shifted,
                    train,
                    validation,
                    others,
                    slices,
                    show,
                    progress and (processes is None or processes.leads),
                    processes,
                )
            )

    def report(
        self,
        path: str | os.PathLike[str],
        test: Any,
        *,
        shifted: Mapping[str, Any] | None = None,
        train: Any = None,
        validation: Any = None,
        against: Sequence[Judged] | Mapping[str, Judged] = (),
        slices: Mapping[str, Any] | None = None,
        show: Callable[[Any], Any] | None = None,
        title: str | None = None,
        progress: bool = True,
    ) -> Path:
        """:meth:`evaluate`, and one self-contained HTML page about it: no script, no font, no request to anywhere.

        Args:
            path: the file; it appears whole or not at all.
            title: of the page; the name of the model's class if not given.
            test, shifted, train, validation, against, slices, show, progress: as those of :meth:`evaluate`.

        Raises:
            MissingExtraError: matplotlib or jinja2 is not installed; found before the work.
            NotFittedError, InputError: as :meth:`evaluate`.
        """
        # The one import that points upwards in the house: people look for the report at the posterior.
        from nullbayes.report import require_packages, write_report

        require_packages()
        found = self.evaluate(
            test,
            shifted=shifted,
            train=train,
            validation=validation,
            against=against,
            slices=slices,
            show=show,
            progress=progress,
        )
        results = found.as_dict()
        if title is not None:
            results["title"] = title
        results["settings"]["made by"] = f"posterior.report({Path(path).name!r}, ...)"
        return write_report(results, Path(path))


def _names(several: Any) -> Any:
    """Of what ``evaluate`` is given more than one of: by name, or how many."""
    if isinstance(several, Mapping):
        return list(map(str, several))
    return len(several) if isinstance(several, Sequence) else type(several).__name__


class RowJudged(Judged):
    """Mixin of `nullbayes.Posterior`, which has rows and stored samples."""

    def _moved(self, inputs: Inputs, where: str) -> tuple[Tensor, Moved]:
        own = cast("Posterior", self)
        plan, unit = own._capture_plan(inputs), own._fitted().stored
        point, change = linearised_outputs(own.functional, plan, unit, inputs, where)
        change = own._fitted().crowd.joined(change)
        return point, lambda scale: point + scale * change

    def _prior_chosen_by(self) -> tuple[str, str]:
        own = cast("Posterior", self)
        chosen = own.problem.by_evidence
        if own.calibration is None and own.certificate.promises:
            chosen = chosen and own.certificate.evidence is not None
        return (EVIDENCE, "by evidence") if chosen else (GIVEN, "prior as given")

    def _described(self) -> dict[str, Any]:
        own = cast("Posterior", self)
        preserves = own.preserve.describe() if own._settings.target.preserves else "nothing"
        return {"preserves": preserves, "seed": own._fitted().seed, "predictive": "linearised"}
