"""Processes in two dimensions: examples over one, samples over the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from processes.answers import CG
from processes.asked import asked_of_data
from processes.stage import certified, data, fitted, loader, network, told

import nullbayes as nb
from nullbayes import solvers


def same_on_a_mesh() -> dict[str, Any]:
    """Samples spread over the second dimension of a mesh; in one process, all of them there."""
    mesh = None
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "samples"))
    out: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "dual": {"solver": solvers.DualCholesky(1e-13)},
        "exact": {"solver": solvers.DualCholesky(1e-13), "delta": 0},
        "primal": {"solver": solvers.PrimalQR()},
        "searched": {"solver": CG(1e-11), "delta": 1e-2},
        "Laplace": {"solver": solvers.DualCholesky(1e-13)},
    }
    for name, options in cases.items():
        make = nb.LaplacePosterior if name == "Laplace" else nb.NullSpacePosterior
        p = make(network(), device_mesh=mesh, **options)
        found = fitted(p, loader(23), 5)
        held = found.pop("unit")
        out[name] = found | {"samples": p.num_samples}
        out[name]["residual"] = max(p.certificate.residual, 1e-7)
        some, x = loader(9, seed=5), data(5, seed=7)[0]
        prediction = p.predict(some)
        out[name] |= {"mean": prediction.mean, "outputs": prediction.outputs}
        out[name]["sampled"] = p.predict(x, method="sampled").outputs
        # Without a shift what the factorisation tells of an input is a difference that rounding reaches.
        exact = None if name in ("dual", "primal", "Laplace") else False
        for score in ("information", "variance", "share", "entropy"):
            out[name][score] = p.novelty(x, score=score, exact=exact)
            out[name][score + ", sampled"] = p.novelty(x, score=score, exact=False)
        out[name]["joint"] = p.joint(x, exact=False).covariance
        if name in ("searched", "Laplace"):
            out[name] |= asked_of_data(p, exact)
        if name in ("dual", "Laplace"):
            p.prior_precision = 3.0
            out[name]["drift"] = torch.tensor([p.certificate.drift, p.certificate.sampled_drift])
            p.update(loader(7, seed=9), progress=False)
            held = p._fitted().unit
            out[name]["updated"] = certified(p) | {"mean": p.predict(some).mean}
            out[name]["updated"].pop("unit")
            out[name]["updated"].pop("audit")
        if mesh is not None:
            assert len(held) == 2 + mesh.get_local_rank("samples")
            for refused in (lambda p=p: p.draw(1), lambda p=p: p.sample()):  # type: ignore[misc]
                kind, text = told(refused)
                assert (kind, "device_mesh" in text) == ("InputError", True)
    return out


def same_on_flat_meshes() -> dict[str, Any]:
    """All processes along one of the two dimensions; both posteriors."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    out: dict[str, Any] = {}
    for shape in ((1, -1), (-1, 1)):
        mesh = None
        if dist.is_initialized():
            from torch.distributed.device_mesh import init_device_mesh

            sides = tuple(size if side < 0 else side for side in shape)
            mesh = init_device_mesh("cpu", sides, mesh_dim_names=("data", "samples"))
        for name, make in {
            "null space": nb.NullSpacePosterior,
            "Laplace": nb.LaplacePosterior,
        }.items():
            p = make(network(), solver=solvers.DualCholesky(1e-13), device_mesh=mesh)
            found = fitted(p, loader(23), 5)
            found.pop("unit")
            # By how much: each process moves the examples by samples of its own.
            found["audit"] = found["audit"][:3]
            x = data(5, seed=7)[0]
            found |= {"mean": p.predict(x).mean, "novelty": p.novelty(x)}
            out[f"{name}, {shape}"] = found
    if mesh is not None:
        kind, text = told(
            lambda: nb.LaplacePosterior(network(), process_group=False, device_mesh=mesh)
        )
        assert (kind, "process_group" in text) == ("InputError", True)
    return out
