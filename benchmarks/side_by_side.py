"""The benchmarks in two versions of the library by turns: what a change has cost or saved.

    python -m benchmarks.side_by_side --before CHECKOUT [--cases direct,direct_full,...] [--repeats 2]

Each benchmark in short, some seconds, and in the setting of its own page where that is affordable twice: cases that end
with ``_full`` (60,000 images become 10,000, the 512 of the Swin 64). Every run is a process of its own with one thread,
which imports `nullbayes` from one of the two checkouts; the two take turns. Processor seconds, so that what else runs
on the machine counts little; the least of the repeats. Results are written after each run, and a run that they hold
already is not repeated: what was cut off goes on. What was written by hand below the table stays there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Steps of refinement that an exact solution takes at most: no passes of a search.
MOST_REFINED = 4


def _lenet(path: str, count: int) -> tuple[Any, Any, Any]:
    import torch

    from nullbayes import datasets
    from nullbayes.demo.models import lenet

    model, data = lenet(10), datasets.fashion_mnist().train
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval(), data.inputs[:count], data.targets[:count]


def _batches(x: Any, y: Any, size: int = 250) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


def _fitted(model: Any, batches: Any, samples: int, **options: Any) -> dict[str, float]:
    import nullbayes as nb

    started = time.process_time()
    p = nb.NullSpacePosterior(model, **options).fit(batches, samples, progress=False)
    c = p.certificate
    found = {"seconds": time.process_time() - started, "residual": c.residual}
    return found | ({"passes": c.iterations} if c.iterations > MOST_REFINED else {})


def _direct(path: str, count: int, **options: Any) -> dict[str, float]:
    import nullbayes as nb

    model, x, y = _lenet(path, count)
    return _fitted(model, _batches(x, y), 20, solver=nb.solvers.DualCholesky(), **options)


def direct(path: str) -> dict[str, float]:
    """Dual Cholesky, every direction: 400 images, 20 samples."""
    return _direct(path, 400)


def direct_full(path: str) -> dict[str, float]:
    """Dual Cholesky, every direction: 1,000 images, 20 samples."""
    return _direct(path, 1000)


def versus(path: str) -> dict[str, float]:
    """The setting of the published method: the exact projection of 300 images, 20 samples."""
    return _direct(path, 300, delta=0)


def versus_full(path: str) -> dict[str, float]:
    """The setting of the published method: the exact projection of 600 images, 20 samples."""
    return _direct(path, 600, delta=0)


def versus_search_full(path: str) -> dict[str, float]:
    """The same 600 images by block conjugate gradients to 1e-2."""
    import nullbayes as nb

    model, x, y = _lenet(path, 600)
    solver = nb.solvers.ConjugateGradient(1e-2)
    return _fitted(model, _batches(x, y), 20, solver=solver, delta=0)


def _searched(
    path: str, tolerance: float, count: int = 1500, samples: int = 10
) -> dict[str, float]:
    import nullbayes as nb

    model, x, y = _lenet(path, count)
    # What `solver="auto"` takes for 60,000 images, where that can be asked for.
    try:
        from nullbayes.solvers import Size, choose

        chosen: Any = choose("auto", Size(540_000, 61_706, 30), 2**34, tolerance).solver
    except (ImportError, TypeError):
        chosen = nb.solvers.ConjugateGradient(tolerance, equilibrate=0.5)
    chosen.max_iterations = 150
    return _fitted(model, _batches(x, y), samples, solver=chosen)


def whole(path: str) -> dict[str, float]:
    """What many images take: 1,500 images, 10 samples, conjugate gradients to 5e-2."""
    return _searched(path, 0.05)


def finer(path: str) -> dict[str, float]:
    """The same to 2e-2."""
    return _searched(path, 0.02)


def whole_full(path: str) -> dict[str, float]:
    """What many images take: 10,000 images, 30 samples, conjugate gradients to 5e-2."""
    return _searched(path, 0.05, 10_000, 30)


def finer_full(path: str) -> dict[str, float]:
    """The same 10,000 images to 2e-2."""
    return _searched(path, 0.02, 10_000, 30)


def _swin(path: str, count: int, size: int, samples: int, memory: str) -> dict[str, float]:
    import torch
    from torch.nn.functional import interpolate
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=2, num_channels=1, num_labels=10, window_size=2)
    config._attn_implementation = "eager"
    model = SwinForImageClassification(config).eval()
    _, x, y = _lenet(path, count)
    batches = _batches(interpolate(x, size=(32, 32)), y, size)
    return _fitted(
        model,
        batches,
        samples,
        preserve="loss",
        forward=lambda m, inputs: m(inputs).logits,
        memory=memory,
    )


def swin(path: str) -> dict[str, float]:
    """Swin-T, 27.5 million weights: the losses of 8 images, 2 samples."""
    return _swin(path, 8, 4, 2, "6GB")


def swin_full(path: str) -> dict[str, float]:
    """Swin-T: the losses of 64 images, 4 samples."""
    return _swin(path, 64, 16, 4, "5GB")


def prediction(path: str) -> dict[str, float]:
    """256 inputs, 30 samples: linearised, and their novelty; ten of each."""
    import nullbayes as nb

    model, x, y = _lenet(path, 356)
    p = nb.NullSpacePosterior(model).fit(_batches(x[:100], y[:100]), 30, progress=False)
    p.predict(x[100:])
    p.novelty(x[100:])
    started = time.process_time()
    for _ in range(10):
        p.predict(x[100:])
        p.novelty(x[100:])
    return {"seconds": (time.process_time() - started) / 10}


def prediction_full(path: str) -> dict[str, float]:
    """ResNet-18, 11.2 million weights: 256 inputs, 30 samples, linearised, and their novelty."""
    import torch
    from networks import resnet18  # of this folder, whichever version of the library it is

    import nullbayes as nb

    torch.manual_seed(0)
    model, x = resnet18().eval(), torch.randn(256, 3, 32, 32)
    p = nb.NullSpacePosterior(model, preserve="loss", prior_precision=1e6)
    p.fit([(torch.randn(8, 3, 32, 32), torch.arange(8))], num_samples=6, progress=False)
    while p.num_samples < 30:
        p.draw(6)
    started = time.process_time()
    p.predict(x)
    p.novelty(x, exact=False)
    return {"seconds": time.process_time() - started}


CASES: dict[str, Callable[[str], dict[str, float]]] = {
    f.__name__: f
    for f in (
        direct, versus, whole, finer, swin, prediction,
        direct_full, versus_full, versus_search_full, whole_full, prediction_full, swin_full, finer_full,
    )
}  # fmt: skip


def run(case: str, checkout: Path, weights: str) -> dict[str, float]:
    """One case in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", case, "--weights", weights]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("library")).is_relative_to(checkout.resolve())
    return found


def table(found: dict[str, dict[str, list[dict[str, float]]]], before: str, notes: str = "") -> str:
    """The page: a row for each case that both versions ran, and the ``notes`` below."""
    lines = [
        "# Two versions side by side",
        "",
        "The benchmarks in short, and those named `_full` in the setting of their own pages or a part of it that is",
        "affordable twice; processor seconds with one thread, the least of some runs; versions take turns.",
        f"Before: {before}. `python -m benchmarks.side_by_side --before CHECKOUT`",
        "",
        "| case | | before | now | ratio | runs | residual before | now | passes before | now |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        both = found.get(case, {"before": [], "now": []})
        if not (both["before"] and both["now"]):
            continue
        ends = [min(runs, key=lambda r: r["seconds"]) for runs in (both["before"], both["now"])]
        seconds = [end["seconds"] for end in ends]
        cells = [f"{s:.3g}" for s in seconds] + [f"{seconds[1] / seconds[0]:.2f}"]
        cells += [str(min(len(both["before"]), len(both["now"])))]
        for name, form in (("residual", ".1e"), ("passes", ".0f")):
            cells += [f"{end[name]:{form}}" if name in end else "" for end in ends]
        about = (CASES[case].__doc__ or "").rstrip(".")
        lines.append(f"| {case} | {about} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + (f"\n{notes}\n" if notes else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="side_by_side", help="of the results' files")
    parser.add_argument("--anew", action="store_true", help="without the runs that results hold")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        import warnings

        import torch

        import nullbayes

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        print(json.dumps(CASES[options.one](options.weights) | {"library": nullbayes.__file__}))
        return
    import torch

    from benchmarks import common

    command = ["git", "-C", str(options.before), "log", "-1", "--format=%h, %ad", "--date=short"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    path = common.RESULTS / f"{options.name}.json"
    stored = json.loads(path.read_text()) if path.exists() and not options.anew else {}
    found: dict[str, dict[str, list[dict[str, float]]]] = stored.get("runs", {})
    notes = common.notes_of(path.with_suffix(".md"))
    text = table(found, told, notes)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "lenet.pt")
        torch.save(common.trained_lenet(1, epochs=2)[0].state_dict(), weights)
        for case in options.cases.split(","):
            runs = found.setdefault(case, {"before": [], "now": []})
            for n in range(options.repeats):
                for which, checkout in (("before", options.before), ("now", ROOT)):
                    if len(runs[which]) > n:
                        continue
                    runs[which].append(run(case, checkout, weights))
                    print(case, which, runs[which][-1], flush=True)
                    text = table(found, told, notes)
                    results = {"runs": found, "before": told, "environment": common.environment()}
                    common.write_results(options.name, results, text)
    print(text)


if __name__ == "__main__":
    main()
