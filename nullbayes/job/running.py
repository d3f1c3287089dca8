"""What the command line does with a job: plan, fit, check and evaluate, in a folder that survives a kill.

Each step leaves a whole file or none, and goes on from the files that are there. A posterior is always read back from
its file before it is used, so that a run that was killed and one that was not use the same one.
"""

from __future__ import annotations

import datetime
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE
from nullbayes.common.progress import stages
from nullbayes.common.writing import make_folder, not_written, write_signed_json, write_text
from nullbayes.errors import NullBayesWarning, StorageError
from nullbayes.fit.plan import Plan
from nullbayes.fit.result import AUDITED
from nullbayes.job.file import KINDS, Fitted, Job
from nullbayes.likelihood.score import score_named
from nullbayes.posterior.evaluation import Evaluation
from nullbayes.posterior.layer_plan import LayerPlan
from nullbayes.posterior.layers import LayerNullSpacePosterior
from nullbayes.posterior.loading import load
from nullbayes.posterior.measuring.data import as_loader
from nullbayes.posterior.measuring.methods import NETWORK, own_source
from nullbayes.posterior.measuring.passing import Pass
from nullbayes.posterior.measuring.running import Question, check_first
from nullbayes.report import render_report

POSTERIOR, RESULTS, REPORT, LOG = "posterior.safetensors", "results.json", "report.html", "log.txt"
CHECKPOINT = "fit.checkpoint"

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunFolder:
    """Where a job leaves its files.

    Attributes:
        path: made if need be.
        say: prints a line for people.
    """

    path: Path
    say: Say

    def note(self, text: str) -> None:
        """A line for the log and for people."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        place = self.path / LOG
        try:
            with place.open("a", encoding="utf-8") as log:
                log.write(f"{now} {text}\n")
        except OSError as error:
            raise not_written(place, error) from error
        self.say(text)

    @contextmanager
    def noting_warnings(self) -> Iterator[None]:
        """Within it, our warnings go to the log."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NullBayesWarning)
            yield
        for warning in caught:
            if issubclass(warning.category, NullBayesWarning):
                self.note(f"warning: {warning.message}")
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )


@dataclass(frozen=True)
class Check:
    """What `check` measured on all training data, apart from the fit's own rows.

    Attributes:
        score_name: accuracy, RMSE or loss; network, posterior: its values.
        held: the certificate's guarantee, and this score not worse than it allows.
        verdict: the certificate in words.
    """

    score_name: str
    network: float
    posterior: float
    examples: int
    held: bool
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """All fields; JSON-able."""
        return dict(vars(self))


def run_plan(job: Job) -> Plan | LayerPlan:
    """Sizes, memory and time of the fit; nothing is written."""
    options: dict[str, Any] = {
        k: v for k, v in job.fit.items() if k in ("num_samples", "max_examples")
    }
    posterior = job.posterior()
    loader = _loader(job, "train", posterior)
    with job.blamed("`train`"):
        if isinstance(posterior, LayerNullSpacePosterior):
            return posterior.plan(loader)
        return posterior.plan(loader, **options)


def open_folder(path: Path, say: Say) -> RunFolder:
    """Make the folder. Raises `InputError` where that is impossible."""
    make_folder(path)
    return RunFolder(path, say)


def run_fit(job: Job, folder: RunFolder, *, progress: bool) -> Fitted:
    """Fit, calibrate where there are validation data, save; returns what the file holds."""
    posterior, options = job.posterior(), dict(job.fit)
    loader = _loader(job, "train", posterior)
    folder.note(f"fit: {job.path.name}, {type(posterior).__name__}")
    with folder.noting_warnings(), job.blamed("`train`"):
        if isinstance(posterior, LayerNullSpacePosterior):
            posterior.fit(loader, **options, progress=progress)
        else:
            place = folder.path / CHECKPOINT
            # All examples of the audit: how many fit into a time would differ from run to run.
            options.setdefault("audit", AUDITED)
            posterior.fit(loader, **options, progress=progress, checkpoint=place)
    if job.calibrate and job.validation is not None:
        validation = _loader(job, "validation", posterior)
        with folder.noting_warnings(), job.blamed("`validation`"):
            path = posterior.calibrate(validation, progress=progress)
        folder.note(f"calibrated: {path!r}")
    posterior.save(folder.path / POSTERIOR)
    folder.note(f"written: {POSTERIOR}. {posterior.certificate.verdict}")
    return _load(job, folder)


def fitted(job: Job, folder: RunFolder, *, progress: bool) -> Fitted:
    """The posterior in the folder, or a new one. Raises `StorageError` where that of the folder is another model's."""
    if (folder.path / POSTERIOR).exists():
        folder.note(f"using {POSTERIOR} of {folder.path.name}")
        return _load(job, folder)
    return run_fit(job, folder, progress=progress)


def _load(job: Job, folder: RunFolder) -> Fitted:
    given = None if isinstance(job.likelihood, str) else job.likelihood
    forward = job.constructor.get("forward")
    found = load(folder.path / POSTERIOR, job.model, likelihood=given, forward=forward)
    kind = KINDS[job.kind]
    if not isinstance(found, kind):
        raise StorageError(
            f"{folder.path / POSTERIOR} holds a {type(found).__name__}, the job asks for a {kind.__name__}; move it "
            "away, or choose another `--out`."
        )
    return found


def run_check(job: Job, folder: RunFolder, *, progress: bool) -> Check:
    """The certificate, and the score on all training data with the posterior as it is in its file.

    Of a layer posterior, what its guarantee says as well: how far sampled networks move those predictions.
    """
    posterior = fitted(job, folder, progress=progress)
    loader = _loader(job, "train", posterior)
    source = own_source(posterior, None, lambda: iter(()))
    main = source.methods[-1].key
    moved = ""
    with stages(show=progress) as stage, job.blamed("`train`"):
        records = Pass([source], main).training(loader, "train", stage)
        name = posterior.likelihood.score_name
        before, after = (records[key].part()[name].value for key in (NETWORK, main))
        kind, certificate = score_named(name), posterior.certificate
        worse = kind.worsened(before, after)
        stands = not math.isnan(worse) and worse <= kind.allowed_growth * abs(before) + 1e-12
        if isinstance(posterior, LayerNullSpacePosterior):
            divergence = posterior.divergence(loader)
            stands = divergence <= ALLOWED_DIVERGENCE * 1.0001
            moved = f", predictions moved by {divergence:.2g} nats"
    count = len(records[NETWORK])
    measured = f"training {kind.label} {before:.4f} → {after:.4f}{moved} on all {count:,} examples"
    found = Check(
        name,
        before,
        after,
        count,
        certificate.held and stands,
        certificate.verdict if stands else f"The guarantee is weak: {measured}.",
    )
    folder.note(f"check: {measured}")
    return found


def run_evaluate(job: Job, folder: RunFolder, *, progress: bool) -> Evaluation:
    """Fit where need be, evaluate, write ``results.json`` and ``report.html``."""
    test = job.need("test", "evaluate")
    if job.kind in ("null-space", "laplace"):  # hours of fitting are not to be lost to a wrong set
        asked = Question(
            job.posterior(), test, job.shifted, None, None, (), None, None, progress=False
        )
        with job.blamed("the data"):
            check_first(asked)
    posterior = fitted(job, folder, progress=progress)
    with folder.noting_warnings(), job.blamed("the data"):
        found = posterior.evaluate(
            test,
            shifted=job.shifted,
            train=job.train,
            validation=job.validation,
            slices=job.slices,
            show=job.show,
            progress=progress,
        )
    if job.title is not None:
        found.details["title"] = job.title
    found.details["settings"]["made by"] = f"nullbayes evaluate {job.path.name}"
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    page = None if missing else render_report(found.as_dict())  # before either file is written
    write_signed_json(folder.path / RESULTS, found.as_dict())
    if page is None:
        folder.note(
            f"written: {RESULTS}; no report without {' and '.join(missing)}: pip install 'nullbayes[report]'"
        )
    else:
        write_text(folder.path / REPORT, page)
        folder.note(f"written: {RESULTS} and {REPORT}")
    return found


def _loader(job: Job, name: str, posterior: Fitted) -> Any:
    functional = posterior.functional
    with job.blamed(f"`{name}`"):
        return as_loader(
            getattr(job, name), name, functional.dtype, labelled=functional.layouts is None
        )
