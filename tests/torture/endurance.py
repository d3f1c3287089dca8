"""Two hundred fits in one process, and the memory that a fit takes of what it was allowed, each in a fresh process."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nullbayes as nb

# Name: layers, shape of an input, examples, budget in MB, options.
BUDGETS: dict[str, tuple[str, tuple[int, ...], int, int, dict[str, Any]]] = {
    "MLP, predictions": ("mlp", (64,), 300, 200, {}),
    "MLP, outputs": ("mlp", (64,), 250, 200, {"preserve": "outputs"}),
    "MLP, loss": ("mlp", (64,), 4000, 200, {"preserve": "loss"}),
    "MLP, rows on disk": ("mlp", (64,), 3000, 50, {"solver": "cg"}),
    "MLP, Laplace": ("mlp", (64,), 300, 200, {"kind": "Laplace"}),
    "convolutions": ("conv", (1, 14, 14), 300, 200, {}),
    "convolutions, rows on disk": ("conv", (1, 14, 14), 600, 50, {"solver": "cg"}),
    "convolutions, loss": ("conv", (1, 14, 14), 1500, 200, {"preserve": "loss"}),
    "tokens": ("tokens", (12, 32), 300, 200, {}),
    "tokens, conjugate gradients": ("tokens", (12, 32), 600, 150, {"solver": "cg"}),
    "few weights": ("narrow", (20,), 1000, 200, {"solver": "primal QR"}),
}


def network(kind: str) -> nn.Module:
    """Between eight and twenty-two thousand weights (``narrow``: a thousand), ten outputs."""
    if kind == "mlp":
        layers: list[nn.Module] = [
            nn.Linear(64, 128),
            nn.Tanh(),
            nn.Linear(128, 96),
            nn.Tanh(),
            nn.Linear(96, 10),
        ]
    elif kind == "narrow":
        layers = [nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10)]
    elif kind == "conv":
        layers = [
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1600, 10),
        ]
    else:
        layers = [nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Flatten(), nn.Linear(384, 10)]
    return nn.Sequential(*layers).eval()


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _posterior(model: nn.Module, options: dict[str, Any], **more: Any) -> Any:
    options = dict(options)
    kind = nb.LaplacePosterior if options.pop("kind", "") == "Laplace" else nb.NullSpacePosterior
    if options.get("solver") == "cg":
        options["solver"] = nb.solvers.ConjugateGradient(max_iterations=40)
    return kind(model, **options, **more)


def budget(name: str) -> dict[str, Any]:
    """One fit in this process: what it took beside what was there, as the kernel's high-water mark tells."""
    kind, shape, examples, megabytes, options = BUDGETS[name]
    torch.manual_seed(0)
    model, x = network(kind), torch.randn(examples, *shape)
    y = torch.randint(0, 10, (examples,))
    batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, examples, 100)]
    # Libraries are loaded and pools filled by a first, small fit: they are not the budget's.
    _posterior(model, options).fit([(x[:4], y[:4])], 2, progress=False)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS:")
    posterior = _posterior(model, options, memory=f"{megabytes}MB").fit(batches, 10, progress=False)
    taken = (_status("VmHWM:") - before) / 2**20
    certificate = posterior.certificate
    return {
        "problem": name,
        "rows": certificate.constraints,
        "weights": certificate.parameters,
        "solver": certificate.solver,
        "budget": megabytes,
        "taken": round(taken, 1),
        "share": round(taken / megabytes, 3),
        "notes": [n for n in certificate.notes if n.startswith("Rows:")],
    }


def budgets() -> list[dict[str, Any]]:
    """All of them, each in a fresh process."""
    out = []
    for name in BUDGETS:
        command = [sys.executable, "-m", "tests.torture.endurance", "--budget", name]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=dict(os.environ)
        )
        if done.returncode:
            out.append({"problem": name, "error": done.stderr.strip().splitlines()[-1][:300]})
        else:
            out.append(json.loads(done.stdout))
    return out


def _held() -> dict[str, int]:
    gc.collect()
    return {
        "resident": _status("VmRSS:"),
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),  # noqa: PTH208
    }


def many(count: int, warm: int = 20) -> dict[str, Any]:
    """``count`` fits of one model, of all kinds, with predictions: what is held after ``warm`` and at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    x, y = torch.randn(40, 8), torch.randint(0, 4, (40,))
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 40, 16)]
    dictionaries = [sorted(vars(m)) for m in model.modules()]
    kinds: list[dict[str, Any]] = [
        {},
        {"preserve": "outputs", "memory": "300kB"},
        {"preserve": "loss", "solver": "cg"},
        {"kind": "Laplace"},
        {"directions": "auto"},
    ]
    early: dict[str, int] = {}
    for i in range(count):
        posterior = _posterior(model, kinds[i % len(kinds)]).fit(batches, 4, seed=i, progress=False)
        posterior.predict(x[:3])
        posterior.novelty(x[:3])
        if i + 1 == warm:
            early = _held()
    late = _held()
    hooks = sum(
        len(getattr(m, h))
        for m in model.modules()
        for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    faults = [k for k in ("descriptors", "threads", "tasks") if late[k] > early[k]]
    if late["resident"] > early["resident"] + 20 * 2**20:
        faults.append("resident")
    if hooks or dictionaries != [sorted(vars(m)) for m in model.modules()]:
        faults.append("the model")
    return {
        "fits": count,
        "after warming": early,
        "at the end": late,
        "hooks": hooks,
        "faults": faults,
    }


def main() -> int:
    """Exit status 1 where something was left over or a budget exceeded by more than 5 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", choices=list(BUDGETS))
    parser.add_argument("--fits", type=int, default=200)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.budget:
        print(json.dumps(budget(asked.budget)))
        return 0
    found = {"fits": many(asked.fits), "budgets": budgets()}
    text = json.dumps(found, indent=1)
    print(text)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n")
    over = [b for b in found["budgets"] if b.get("share", 9) > 1.05]
    return int(bool(found["fits"]["faults"] or over))


if __name__ == "__main__":
    sys.exit(main())
