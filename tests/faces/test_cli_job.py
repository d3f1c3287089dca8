"""``nullbayes plan|fit|check|evaluate|inspect`` on job files: files, exit codes, kills, and what is wrong in a job."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nullbayes as nb
from nullbayes import cli
from nullbayes.common.writing import read_signed_json
from nullbayes.job import read_job

JOB = """
import torch
from torch import nn

generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).eval()

def data(count, shift=0.0):
    x = torch.randn(count, 3, generator=generator) + shift
    return x, x.argmax(1)

train = data(20)
def validation():
    return data(30)
test = data(40)
shifted = {"far": data(20, 3.0)[0]}
slices = {"first": lambda x, y: x[:, 0] > 0}
options = {"num_samples": 3, "seed": 1}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.py"

    def write(extra="", text=JOB):
        path.write_text(text + "\n" + extra + "\n")
        return path

    write()
    return write


@pytest.fixture(autouse=True)
def random_state():
    with torch.random.fork_rng(devices=[]):
        yield


def run(arguments, capsys):
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def test_evaluate_from_nothing_to_the_page(job, capsys, tmp_path):
    code, out, _ = run(["evaluate", "job.py", "--out", "deep/run"], capsys)
    folder = tmp_path / "deep" / "run"
    assert code in (0, 3) and "Evaluation on 40 test examples" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        "log.txt",
        "posterior.safetensors",
        "report.html",
        "results.json",
    ]
    results = read_signed_json(folder / "results.json", "")
    assert results["settings"]["made by"] == "nullbayes evaluate job.py"
    assert results["settings"]["samples"] == 3 and results["settings"]["seed"] == 1
    assert set(results["figures"]) == {"network", "temperature", "evidence", "calibrated"}
    assert set(results["slices"]) == {"first"} and set(results["data"]["shifted"]) == {"far"}
    log = (folder / "log.txt").read_text()
    assert "fit: job.py" in log and "calibrated: " in log and "written: results.json" in log
    # The same as from Python: fitted, calibrated, saved, loaded, evaluated.
    made = read_job(tmp_path / "job.py")
    posterior = nb.load(folder / "posterior.safetensors", made.model)
    assert posterior.calibration is not None
    wanted = posterior.evaluate(made.test, validation=made.validation, progress=False)
    got = results["figures"]["calibrated"]["nll"]["value"]
    assert got == pytest.approx(wanted.figures["calibrated"]["nll"].value)
    # Again: the posterior that is there is used, and every byte is the same.
    before = (folder / "results.json").read_bytes(), (folder / "report.html").read_bytes()
    stamp = (folder / "posterior.safetensors").stat().st_mtime_ns
    assert run(["evaluate", "job.py", "--out", "deep/run"], capsys)[0] == code
    assert before == ((folder / "results.json").read_bytes(), (folder / "report.html").read_bytes())
    assert (folder / "posterior.safetensors").stat().st_mtime_ns == stamp
    (folder / "report.html").unlink()
    assert run(["report", folder / "results.json"], capsys)[0] == 0
    assert (folder / "report.html").read_bytes() == before[1]


def test_json_is_all_that_standard_output_holds(job, capsys):
    code, out, _ = run(["plan", "job.py", "--json"], capsys)
    plan = json.loads(out)
    assert code == 0 and plan["fits"] is True and plan["examples"] == 20
    code, out, err = run(["fit", "job.py", "--out", "run", "--json"], capsys)
    certificate = json.loads(out)
    assert code == (0 if certificate["held"] else 3) and "written" in err
    code, out, _ = run(["check", "job.py", "--out", "run", "--json"], capsys)
    check = json.loads(out)
    assert check["examples"] == 20 and check["network"] == check["posterior"]
    code, out, _ = run(["inspect", "run/posterior.safetensors", "--json"], capsys)
    told = json.loads(out)
    assert told["certificate"] == certificate and told["kind"] == "NullSpacePosterior"
    code, out, _ = run(["evaluate", "job.py", "--out", "run", "--json"], capsys)
    assert json.loads(out)["kind"] == "nullbayes-evaluation"


def test_people_get_text(job, capsys):
    assert "constraints × weights" in run(["plan", "job.py"], capsys)[1]
    assert "Certificate" in run(["fit", "job.py"], capsys)[1]
    assert "guarantee" in run(["check", "job.py"], capsys)[1]
    assert "prior precision" in run(["inspect", "run/posterior.safetensors"], capsys)[1]


def test_a_weak_guarantee_ends_with_3(job, capsys):
    # 45 weights under 1,200 rows: nothing is free.
    job("train = data(400)\noptions = {'num_samples': 2, 'preserve': 'outputs', 'delta': 0.0}")
    code, out, _ = run(["fit", "job.py", "--json"], capsys)
    assert json.loads(out)["held"] is False and code == 3
    assert run(["check", "job.py"], capsys)[0] == 3
    assert run(["inspect", "run/posterior.safetensors"], capsys)[0] == 3
    code, out, _ = run(["evaluate", "job.py"], capsys)
    assert code == 3 and Path("run/report.html").exists()  # measured all the same
    # A Laplace posterior promises nothing, so nothing is weak.
    job("options = {'num_samples': 2, 'posterior': 'laplace'}")
    assert run(["fit", "job.py", "--out", "other"], capsys)[0] == 0
    assert run(["check", "job.py", "--out", "other"], capsys)[0] == 0


def test_check_measures_all_training_data_itself(job, capsys):
    assert run(["fit", "job.py"], capsys)[0] in (0, 3)
    job("train = (train[0], (train[1] + 1) % 3)")  # other labels than those of the fit
    first = json.loads(run(["check", "job.py", "--json"], capsys)[1])
    job()
    second = json.loads(run(["check", "job.py", "--json"], capsys)[1])
    assert first["network"] != second["network"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 3", "`model` is int, expected a trained torch.nn.Module"),
        ("model = nn.Linear", "`model` is the class Linear"),
        ("del model", "job.py defines no `model`"),
        ("trian = train; del train", "job.py defines no `train` (there is `trian`)"),
        ("del test", "job.py defines no `test`, which `nullbayes evaluate` needs"),
        ("1 / 0", "line 21: ZeroDivisionError: division by zero"),
        ("x = (", "job.py, line 21: '(' was never closed"),
        ("raise SystemExit(0)", "line 21: SystemExit"),
        ("options = [1]", "`options` is list, expected a dictionary"),
        ("options = {'num_sample': 3}", "no 'num_sample'. Did you mean 'num_samples'?"),
        ("options = {'likelihood': 'binary'}", "Define it in the file itself"),
        ("options = {'posterior': 'flat'}", "'flat'; expected 'null-space' or 'laplace'"),
        ("options = {'posterior': ['flat']}", "['flat']; expected 'null-space' or 'laplace'"),
        ("options = {'calibrate': 'no'}", "'no'; expected True or False"),
        ("options = {'num_samples': 2**70}", "expected a whole number below 2**63"),
        ("title = nn.Linear(1, 1)", "`title` is Linear, expected a string"),
        ("def model(): raise SystemExit(0)", "`model()` failed: SystemExit"),
        ("options = {'preserve': 'nothing'}", "job.py, `options`: "),
        ("likelihood = 'gaussian'", "likelihood is 'gaussian'"),
        ("shifted = [test]", "`shifted` is list, expected a dictionary"),
        ("def train(): return 1 / 0", "`train()` failed: ZeroDivisionError"),
        ("train = (train[0], train[1] + 5)", "job.py, `train`: train_loader, batch 0"),
        ("train = (train[0], train[1][:3])", "`train` holds 20 inputs but 3 targets"),
        ("def validation(): return torch.zeros(4, 3)", "job.py, `validation`: "),
        ("shifted = {'odd': torch.zeros(2, 5)}", "shifted['odd'], batch 0"),
        ("slices = {'s': [True]}", "slices['s']"),
        ("test = (test[0], test[1] + 5)", "job.py, the data: test, batch 0"),
        ("test = (test[0][:, :2], test[1])", "job.py, the data: test, batch 0"),
        ("validation = (train[0], train[1] + 5)", "job.py, `validation`: val_loader, batch 0"),
        ("model.train(); model.append(nn.Dropout())", "training mode"),
    ],
)
def test_what_is_wrong_in_a_job_is_named_and_nothing_is_half_written(job, text, words, capsys):
    job(text)
    code, out, err = run(["evaluate", "job.py"], capsys)
    assert code == 2, (out, err)
    assert words in err and "Traceback" not in err and err.startswith("nullbayes: ")
    left = {p.name for p in Path("run").iterdir()} if Path("run").exists() else set()
    assert left <= {"log.txt", "posterior.safetensors"}


def test_a_wrong_test_set_is_found_before_the_fit(job, capsys):
    for text in ("test = (test[0], test[1] + 5)", "shifted = {'odd': torch.zeros(2, 5)}"):
        job(text)
        assert run(["evaluate", "job.py", "--out", "early"], capsys)[0] == 2
        assert not (Path("early") / "posterior.safetensors").exists()


def test_inspect_reads_a_layer_posterior(job, capsys, tmp_path):
    made = read_job(job())
    nb.LayerNullSpacePosterior(made.model).fit([made.train[0][:4]]).save(tmp_path / "layers.st")
    code, out, _ = run(["inspect", "layers.st", "--json"], capsys)
    told = json.loads(out)
    assert told["kind"] == "LayerNullSpacePosterior"
    assert code == (0 if told["certificate"]["held"] else 3)


def test_files_that_are_no_job(capsys, tmp_path, job):
    assert "cannot be read" in run(["plan", "no.py"], capsys)[2]
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in run(["plan", "bytes.py"], capsys)[2]
    code, _, err = run(["inspect", "job.py"], capsys)
    assert code == 2 and err.startswith("nullbayes: ")
    (tmp_path / "file").write_text("")
    code, _, err = run(["fit", "job.py", "--out", "file"], capsys)
    assert code == 2 and "cannot be made" in err


def test_places_that_cannot_be_written_are_said(job, capsys, tmp_path):
    job()
    for name, command in (
        ("log.txt", "fit"),
        ("results.json", "evaluate"),
        ("report.html", "evaluate"),
    ):
        place = tmp_path / "taken" / name
        place.mkdir(parents=True)
        code, _, err = run([command, "job.py", "--out", "taken"], capsys)
        assert code == 2 and f"{name} cannot be written" in err and err.startswith("nullbayes: ")
        place.rmdir()
    results = tmp_path / "taken" / "results.json"
    code, _, err = run(["report", results, "--out", tmp_path], capsys)
    assert code == 2 and f"{tmp_path} cannot be written" in err
    left = {p.name for p in results.parent.iterdir()}
    assert left == {"log.txt", "posterior.safetensors", "results.json"}


def test_a_job_may_leave_the_folder_and_the_path(job, capsys, tmp_path):
    (tmp_path / "away").mkdir()
    job("import os, sys; os.chdir('away'); sys.path = list(sys.path[1:])")
    path = tmp_path / "job.py"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert run(["fit", "job.py", "--out", "here ü"], capsys)[0] in (0, 3)
    assert (tmp_path / "here ü" / "posterior.safetensors").exists()


def test_another_model_is_not_given_the_posterior_of_this_one(job, capsys):
    assert run(["fit", "job.py"], capsys)[0] in (0, 3)
    before = Path("run/posterior.safetensors").read_bytes()
    job("model[0].weight.data += 1")
    code, _, err = run(["evaluate", "job.py"], capsys)
    assert code == 2 and "nullbayes: " in err
    assert Path("run/posterior.safetensors").read_bytes() == before


def test_a_job_sees_its_own_folder_and_leaves_the_path_alone(job, tmp_path):
    (tmp_path / "beside_the_job.py").write_text("answer = 3")
    before = list(sys.path)
    found = read_job(job("from beside_the_job import answer\noptions = {'num_samples': answer}"))
    assert found.fit == {"num_samples": 3} and sys.path == before


def test_the_readme_of_the_example_is_true():
    """``examples/job.py`` is a job."""
    found = read_job(Path(__file__).parents[2] / "examples" / "job.py")
    assert set(found.shifted) == {"rotated by 90°", "noise"} and found.title
    assert found.fit == {"num_samples": 30, "seed": 0} and found.kind == "null-space"


@pytest.mark.slow
def test_killed_and_restarted_the_results_are_the_same(job, tmp_path, monkeypatch, capsys):
    """A process that is killed while it evaluates and started again, and one that is not."""
    job(
        "shifted = {}\nslices = {'all': lambda x, y: (time.sleep(float(os.environ['NAP'])), x[:, 0] < 9)[1]}"
    )
    with (tmp_path / "job.py").open("a") as file:
        file.write("import os, time\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "nullbayes", "evaluate", "job.py", "--out", "a"],
        env={**os.environ, "PYTHONPATH": str(Path(nb.__file__).parents[1]), "NAP": "100"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    a, b = tmp_path / "a", tmp_path / "b"
    deadline = time.monotonic() + 90
    while not (a / "posterior.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (a / "results.json").exists() and (a / "posterior.safetensors").exists()
    b.mkdir()
    (b / "posterior.safetensors").write_bytes((a / "posterior.safetensors").read_bytes())
    monkeypatch.setenv("NAP", "0")
    for out in ("a", "b"):
        assert run(["evaluate", "job.py", "--out", out], capsys)[0] in (0, 3)
    assert (a / "results.json").read_bytes() == (b / "results.json").read_bytes()
    assert not re.search(r"\d{4}-\d\d-\d\dT", (a / "results.json").read_text())
