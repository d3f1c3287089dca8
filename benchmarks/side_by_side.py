"""The benchmarks in short, in two versions of the library by turns: what a change has cost or saved.

    python -m benchmarks.side_by_side --before CHECKOUT [--cases direct,whole,...] [--repeats 2]

Every run is a process of its own with one thread, which imports `nullbayes` from one of the two checkouts; the two take
turns. Processor seconds, so that what else runs on the machine counts little; the least of the repeats.
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


def _lenet(path: str, count: int) -> tuple[Any, Any, Any]:
    import torch

    from nullbayes import datasets
    from nullbayes.demo.models import lenet

    model, data = lenet(10), datasets.fashion_mnist().train
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval(), data.inputs[:count], data.targets[:count]


def _batches(x: Any, y: Any, size: int = 250) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


def direct(path: str) -> dict[str, float]:
    """Dual Cholesky, every direction: 400 images, 20 samples."""
    import nullbayes as nb

    model, x, y = _lenet(path, 400)
    started = time.process_time()
    p = nb.NullSpacePosterior(model, solver=nb.solvers.DualCholesky())
    p.fit(_batches(x, y), 20, progress=False)
    return {"seconds": time.process_time() - started, "residual": p.certificate.residual}


def versus(path: str) -> dict[str, float]:
    """The setting of the published method: the exact projection of 300 images, 20 samples."""
    import nullbayes as nb

    model, x, y = _lenet(path, 300)
    started = time.process_time()
    p = nb.NullSpacePosterior(model, solver=nb.solvers.DualCholesky(), delta=0)
    p.fit(_batches(x, y), 20, progress=False)
    return {"seconds": time.process_time() - started, "residual": p.certificate.residual}


def _searched(path: str, tolerance: float) -> dict[str, float]:
    import nullbayes as nb

    model, x, y = _lenet(path, 1500)
    started = time.process_time()
    # What `solver="auto"` takes for 60,000 images, where that can be asked for.
    try:
        from nullbayes.solvers import Size, choose

        chosen: Any = choose("auto", Size(540_000, 61_706, 30), 2**34, tolerance).solver
    except (ImportError, TypeError):
        chosen = nb.solvers.ConjugateGradient(tolerance, equilibrate=0.5)
    chosen.max_iterations = 150
    p = nb.NullSpacePosterior(model, solver=chosen)
    p.fit(_batches(x, y), 10, progress=False)
    c = p.certificate
    return {
        "seconds": time.process_time() - started,
        "residual": c.residual,
        "passes": c.iterations,
    }


def whole(path: str) -> dict[str, float]:
    """What many images take: 1,500 images, 10 samples, conjugate gradients to 5e-2."""
    return _searched(path, 0.05)


def finer(path: str) -> dict[str, float]:
    """The same to 2e-2."""
    return _searched(path, 0.02)


def swin(path: str) -> dict[str, float]:
    """Swin-T, 27.5 million weights: the losses of 8 images, 2 samples."""
    import torch
    from torch.nn.functional import interpolate
    from transformers import SwinConfig, SwinForImageClassification

    import nullbayes as nb

    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=2, num_channels=1, num_labels=10, window_size=2)
    config._attn_implementation = "eager"
    model = SwinForImageClassification(config).eval()
    _, x, y = _lenet(path, 8)
    batches = _batches(interpolate(x, size=(32, 32)), y, 4)
    started = time.process_time()
    p = nb.NullSpacePosterior(
        model, preserve="loss", forward=lambda m, inputs: m(inputs).logits, memory="6GB"
    )
    p.fit(batches, 2, progress=False)
    return {"seconds": time.process_time() - started, "residual": p.certificate.residual}


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


CASES: dict[str, Callable[[str], dict[str, float]]] = {
    f.__name__: f for f in (direct, versus, whole, finer, swin, prediction)
}


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


def table(found: dict[str, dict[str, list[dict[str, float]]]], before: str, repeats: int) -> str:
    lines = [
        "# Two versions side by side",
        "",
        f"The benchmarks in short, processor seconds with one thread, the least of {repeats}; versions take turns.",
        f"Before: {before}. `python -m benchmarks.side_by_side --before CHECKOUT`",
        "",
        "| case | | before | now | ratio | residual before | now | passes before | now |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, both in found.items():
        ends = [min(runs, key=lambda r: r["seconds"]) for runs in (both["before"], both["now"])]
        seconds = [end["seconds"] for end in ends]
        cells = [f"{s:.3g}" for s in seconds] + [f"{seconds[1] / seconds[0]:.2f}"]
        for name, form in (("residual", ".1e"), ("passes", ".0f")):
            cells += [f"{end[name]:{form}}" if name in end else "" for end in ends]
        about = (CASES[case].__doc__ or "").rstrip(".")
        lines.append(f"| {case} | {about} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="side_by_side", help="of the results' files")
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
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "lenet.pt")
        torch.save(common.trained_lenet(1, epochs=2)[0].state_dict(), weights)
        for case in options.cases.split(","):
            runs: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
            for _ in range(options.repeats):
                for which, checkout in (("before", options.before), ("now", ROOT)):
                    runs[which].append(run(case, checkout, weights))
                    print(case, which, runs[which][-1], flush=True)
            found[case] = runs
            text = table(found, told, options.repeats)
            results = {"runs": found, "before": told, "environment": common.environment()}
            common.write_results(options.name, results, text)
    print(text)


if __name__ == "__main__":
    main()
