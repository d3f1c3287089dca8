"""A layer posterior judged: evaluations of its sampled networks, joint covariances, the page, the command line."""

import functools
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support import QUIET, says, unchanged
from torch import nn
from torch.utils.data import TensorDataset

import nullbayes as nb
from nullbayes import cli


def data(seed, count, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=g, dtype=torch.float64) + shift
    return x, x[:, :3].argmax(1)


@functools.cache
def fitted():
    x, y = data(0, 60)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return nb.LayerNullSpacePosterior(model.eval()).fit((x, y), num_samples=6, **QUIET)


def sampled_outputs(posterior, x):
    with torch.no_grad():
        return torch.stack(
            [torch.func.functional_call(posterior.model, s, (x,)) for s in posterior.sample()]
        )


def test_figures_are_those_of_sampled_networks():
    posterior, (x, y), far = fitted(), data(1, 80), data(2, 50, 2.0)[0]
    with unchanged(posterior.model):
        found = posterior.evaluate(
            (x, y), shifted={"far": far}, train=data(0, 60), validation=data(3, 50), **QUIET
        )
    assert posterior.calibration is None  # a copy was calibrated
    assert list(found.figures) == ["network", "temperature", "guarantee", "calibrated"]
    probabilities = sampled_outputs(posterior, x).softmax(-1).mean(0)
    chosen = probabilities[torch.arange(len(y)), y]
    assert found.figures["guarantee"]["nll"].value == pytest.approx(float(-chosen.log().mean()))
    accuracy = float((probabilities.argmax(1) == y).double().mean())
    assert found.figures["guarantee"]["accuracy"].value == pytest.approx(accuracy)
    scores = [*posterior.novelty(x).tolist(), *posterior.novelty(far).tolist()]
    area = roc_auc_score([0] * len(x) + [1] * len(far), scores)
    row = next(d for d in found.detection if d["score"] == "novelty")
    assert row["sets"]["far"]["auroc"].value == pytest.approx(area)
    before, after = (found.train[k]["nll"].value for k in ("network", "guarantee"))
    assert abs(after - before) < 0.01 and after != before
    settings = found.details["settings"]
    assert settings["predictive"] == "sampled" and settings["seed"] == 0
    assert json.loads(json.dumps(found.as_dict()))["certificate"]["held"] is True


@pytest.mark.filterwarnings("ignore::nullbayes.NullBayesWarning")  # these data ask for nothing
def test_beside_another_posterior_and_after_calibration():
    posterior, test = fitted(), data(1, 40)
    other = nb.LaplacePosterior(posterior.model).fit(data(0, 60), num_samples=4, **QUIET)
    found = other.evaluate(test, against=posterior, **QUIET)
    own = posterior.evaluate(test, against={"laplace": other}, **QUIET)
    name = "LayerNullSpacePosterior"
    assert found.figures[name]["nll"].value == own.figures["guarantee"]["nll"].value
    assert own.figures["laplace"]["nll"].value == found.figures["evidence"]["nll"].value
    given = nb.LayerNullSpacePosterior(posterior.model).fit(data(0, 60), num_samples=4, **QUIET)
    given.prior_precision = 40.0
    assert "given" in given.evaluate(test, **QUIET).figures
    given.calibrate(data(3, 50), progress=False)
    assert set(given.evaluate(test, **QUIET).figures) == {"network", "given", "calibrated"}


def test_not_fitted_and_bad_data_are_named():
    posterior = fitted()
    with says(nb.NotFittedError, "fit(train)"):
        nb.LayerNullSpacePosterior(posterior.model).evaluate(data(1, 10), **QUIET)
    with says(nb.InputError, "`test`", "targets"):
        posterior.evaluate(data(1, 10)[0], **QUIET)
    with says(nb.InputError, "against"):
        posterior.evaluate(data(1, 10), against=["posterior"], **QUIET)


def test_joint_covariance_against_dense():
    posterior, x = fitted(), data(4, 4)[0]
    model, names = posterior.model, [n for n, _ in posterior.model.named_parameters()]

    def f(weights):
        return torch.func.functional_call(model, weights, (x,))

    rows = torch.func.jacrev(f)({n: p.detach() for n, p in model.named_parameters()})
    inputs, h = {}, data(0, 60)[0]
    for place, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            inputs[place] = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
        h = layer(h).detach()
    want = torch.zeros(12, 12, dtype=torch.float64)
    for place, a in inputs.items():
        c = a.T @ a
        edge = posterior.delta * c.trace() / len(c)
        p = edge * torch.linalg.inv(c + edge * torch.eye(len(c), dtype=c.dtype))
        assert {f"{place}.weight", f"{place}.bias"} <= set(names)
        j = torch.cat([rows[f"{place}.weight"], rows[f"{place}.bias"][..., None]], -1)
        j = j.reshape(12, *j.shape[2:])
        want += torch.einsum("aoi,ij,boj->ab", j, p, j)
    found = posterior.joint(x)
    torch.testing.assert_close(found.mean, model(x).detach())
    torch.testing.assert_close(found.covariance, want / posterior.prior_precision)
    blocks = found.covariance.reshape(4, 3, 4, 3)[torch.arange(4), :, torch.arange(4)]
    torch.testing.assert_close(posterior.covariance(x), blocks)


def test_divergence_on_data_against_dense():
    posterior, (x, y) = fitted(), data(5, 30)
    with torch.no_grad():
        p = posterior.model(x).log_softmax(-1)
    q = sampled_outputs(posterior, x).log_softmax(-1)
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert posterior.divergence((x, y)) == pytest.approx(want, rel=1e-6)
    assert posterior.divergence(x) == pytest.approx(want, rel=1e-6)


def test_the_page(tmp_path):
    path = fitted().report(
        tmp_path / "report.html", data(1, 40), shifted={"far": data(2, 30, 2.0)[0]}, **QUIET
    )
    page = path.read_text()
    assert "The guarantee held" in page and "Change of the outputs" in page
    assert "Layer null-space, by the guarantee" in page


def test_data_in_every_form_give_one_posterior():
    posterior, (x, y) = fitted(), data(0, 60)
    wanted = posterior.novelty(data(1, 5)[0])
    forms = [(x.numpy(), y.numpy()), TensorDataset(x, y), x.numpy(), [(x[:20], y[:20]), x[20:]]]
    for form in forms:
        other = nb.LayerNullSpacePosterior(posterior.model).fit(form, num_samples=6, **QUIET)
        torch.testing.assert_close(other.novelty(data(1, 5)[0]), wanted)
    with says(nb.InputError, "array has dtype"):
        nb.LayerNullSpacePosterior(posterior.model).fit(np.array(["a", "b"]), **QUIET)


JOB = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 3)).eval()
x = torch.randn(40, 3)
train, validation, test = (x, x.argmax(1)), (x + 0.1, x.argmax(1)), (-x, (-x).argmax(1))
shifted = {"far": 3 * x}
options = {"posterior": "layer-null-space", "num_samples": 4, "seed": 1}
"""


@pytest.mark.parametrize("command", ["plan", "fit", "check", "evaluate"])
def test_command_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    with torch.random.fork_rng(devices=[]):
        arguments = [command, "job.py", "--json"] + ([] if command == "plan" else ["--out", "run"])
        assert cli.main(arguments) == 0
        found = json.loads(capsys.readouterr().out)
    if command == "plan":
        assert found["fits"] and found["layers"]["0.weight"] == [1, 20, 4]
        return
    assert cli.main(["inspect", "run/posterior.safetensors"]) == 0
    assert "LayerNullSpacePosterior" in capsys.readouterr().out
    if command == "fit":
        assert found["method"] == "layer null-space"
    elif command == "check":
        assert found["held"] and found["examples"] == 40
    else:
        assert set(found["figures"]) == {"network", "temperature", "guarantee", "calibrated"}
        assert "nats" in (tmp_path / "run/report.html").read_text()


def test_a_job_says_what_this_posterior_does_not_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB + "\noptions['max_examples'] = 3\n")
    with torch.random.fork_rng(devices=[]):
        assert cli.main(["plan", "job.py"]) == 2
    assert "no 'max_examples'" in capsys.readouterr().err
    (tmp_path / "job.py").write_text(JOB)
    with torch.random.fork_rng(devices=[]):
        assert cli.main(["fit", "job.py", "--out", "run"]) == 0
        (tmp_path / "job.py").write_text(JOB.replace("layer-null-space", "laplace"))
        assert cli.main(["check", "job.py", "--out", "run"]) == 2
    assert "asks for a LaplacePosterior" in " ".join(capsys.readouterr().err.split())
