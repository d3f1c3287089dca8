"""The demonstration on tiny settings: both files, one seed one result, nothing half-done."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from nullbayes import datasets
from nullbayes.common.writing import read_signed_json
from nullbayes.demo import Settings, models, run_demo, running, training
from nullbayes.demo.evaluation import Method, Shift, evaluate, number_of_inputs, point_method
from nullbayes.demo.tasks import make_task
from nullbayes.errors import InputError

TINY = {"examples": 40, "samples": 4, "epochs": 60, "regression_epochs": 40, "test_images": 50}
FIGURES = (
    "train_accuracy",
    "test_accuracy",
    "nll",
    "brier",
    "ece",
    "auroc",
    "fit_seconds",
    "prior_precision",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "deep" / "out"
    said = io.StringIO()
    state = torch.random.get_rng_state()
    results = run_demo(Settings(**TINY), out, console=Console(file=said, width=80))
    assert torch.equal(state, torch.random.get_rng_state())
    return out, said.getvalue(), results


def test_both_files_are_written_and_nothing_else(demo):
    out, _, results = demo
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    assert read_signed_json(out / "results.json", "") == results
    assert "://" not in (out / "report.html").read_text(encoding="utf-8")


def test_every_method_has_the_same_figures(demo):
    _, _, results = demo
    assert set(results["methods"]) == {
        "point",
        "null_space",
        "laplace",
        "null_space_evidence",
        "laplace_evidence",
    }
    for figures in results["methods"].values():
        assert set(FIGURES) <= set(figures)
        assert set(figures["auroc"]) == {"held_out", "rotated", "noise"}
    assert results["certificate"] == results["certificates"]["null_space"]
    for field in (
        "residual",
        "drift",
        "sampled_drift",
        "constraints",
        "rank",
        "null_dim",
        "solver",
        "held",
        "verdict",
    ):
        assert field in results["certificate"]
    assert results["certificate"]["constraints"] == 40 * 7
    assert results["certificate"]["examples"] == results["dataset"]["kept"] == 40


def test_what_takes_no_network_is_said(demo):
    """The distance to the nearest training image, by scikit-learn."""
    out, said, results = demo
    task = make_task(Settings(**TINY))
    known = NearestNeighbors(n_neighbors=1).fit(task.data.train.inputs.flatten(1))

    def distances(images):
        return known.kneighbors(images.flatten(1))[0][:, 0]

    inside = distances(task.data.test.inputs)
    for key, shift in task.shifts.items():
        outside = distances(shift.inputs)
        new = [0] * len(inside) + [1] * len(outside)
        wanted = roc_auc_score(new, np.concatenate([inside, outside]))
        found = results["nearest_input"]["auroc"][key]
        assert found == pytest.approx(wanted, abs=1e-6)
        assert f"{shift.title} {found:.3f}" in " ".join(said.split())
    page = (out / "report.html").read_text(encoding="utf-8")
    mean = sum(results["nearest_input"]["auroc"].values()) / len(task.shifts)
    assert f"(nearest training image, no network: {mean:.2f})" in page
    assert "Nearest training image" in page


def test_the_guarantee_holds_here_too(demo):
    _, _, results = demo
    point, ours = results["methods"]["point"], results["methods"]["null_space"]
    assert ours["train_accuracy"] == point["train_accuracy"]
    assert results["methods"]["null_space_evidence"]["train_accuracy"] == point["train_accuracy"]
    assert ours["train_nll"] == pytest.approx(point["train_nll"], abs=0.01)
    curve = results["regression"]["methods"]["null_space"]
    assert curve["train_sd"] < 0.02 * curve["gap_sd"]
    assert curve["train_rmse"] == pytest.approx(
        results["regression"]["point"]["train_rmse"], rel=1e-3
    )


def test_the_terminal_shows_table_certificate_and_files(demo):
    _, said, results = demo
    for words in (
        "point",
        "null-space",
        "Laplace",
        "AUROC",
        "train accuracy",
        "ECE",
        "prior precision",
    ):
        assert words in said
    assert f"{results['methods']['null_space']['nll']:.4f}" in said
    assert "Certificate" in said and "results.json" in said.replace("\n", "")
    assert max(map(len, said.splitlines())) <= 80


def test_one_seed_one_result(demo, tmp_path):
    _, _, results = demo
    again = run_demo(Settings(**TINY), tmp_path, console=Console(quiet=True))
    for key, figures in results["methods"].items():
        for name in ("train_accuracy", "test_accuracy", "nll", "ece", "auroc"):
            assert again["methods"][key][name] == pytest.approx(figures[name], rel=1e-4), (
                key,
                name,
            )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset": "mnist"}, "digits, fashion-mnist"),
        ({"samples": 1}, "`samples` must be at least 2"),
        ({"examples": 0}, "`examples` must be at least 1"),
        ({"epochs": -1}, "`epochs`"),
        ({"test_images": 0}, "`test_images`"),
        ({"examples": 5000}, "ask for fewer"),
        ({"held_out": (3, 11)}, "not among the labels"),
        ({"data_dir": "somewhere"}, "fashion-mnist"),
        ({"dataset": "fashion-mnist", "held_out": (1,)}, "ten classes"),
        ({"dataset": "fashion-mnist", "data_dir": "no/such/folder"}, "dataset-fashion-mnist"),
    ],
)
def test_wrong_settings_stop_before_any_work(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(InputError, match=words):
        run_demo(Settings(**arguments), tmp_path, console=Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        run_demo(out=tmp_path / "file", console=Console(quiet=True))


def test_ctrl_c_leaves_the_files_of_the_run_before(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("before")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_regression", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(Settings(**TINY), tmp_path, console=Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "before"


def test_evaluation_by_a_method_that_knows_the_answers():
    """A method that is always right and scores by its inputs: every figure is known."""
    inputs, targets = torch.arange(1.0, 7.0)[:, None], torch.tensor([0, 1, 0, 1, 0, 1])
    answers = dict(zip(inputs.flatten().tolist(), targets.tolist(), strict=True))

    def probs(x):
        return torch.nn.functional.one_hot(
            torch.tensor([answers[v] for v in x.flatten().tolist()]), 2
        ).float()

    split = datasets.Split(inputs, targets)
    data = datasets.Dataset("made up", split, split, split)
    shift = Shift(
        "far", "far away", torch.tensor([[10.0], [20.0], [3.5]]), (("near", 1), ("rest", 2))
    )
    counted = []
    method = Method("oracle", probs, lambda x: x.flatten(), "value")
    figures, curves, estimates = evaluate(method, data, {"far": shift}, advance=counted.append)
    assert (
        figures["train_accuracy"],
        figures["test_accuracy"],
        figures["nll"],
        figures["ece"],
    ) == (1, 1, 0, 0)
    assert figures["auroc"]["far"] == pytest.approx((6 + 6 + 3) / 18)
    assert figures["auroc_by_group"]["far"] == pytest.approx({"near": 1.0, "rest": 9 / 12})
    assert sum(counted) == number_of_inputs(data, {"far": shift}) == 6 + 6 + 6 + 3
    assert {name: e.value for name, e in estimates.items()} == pytest.approx(
        {"train_accuracy": 1, "nll": 0, "ece": 0, "auroc": figures["auroc"]["far"]}
    )
    histogram = curves["histogram"]
    assert sum(histogram["inside"]) == 6 and sum(histogram["outside"]["far"]) == 3


def test_the_networks_have_the_promised_sizes_and_seeds():
    sizes = {models.lenet: (10, (1, 28, 28), 61_706), models.digits_net: (8, (1, 8, 8), 38_152)}
    for make, (classes, shape, weights) in sizes.items():
        one, again, other = (models.seeded(make, classes, seed=seed) for seed in (0, 0, 1))
        assert sum(p.numel() for p in one.parameters()) == weights
        assert point_method(one).probs(torch.zeros(3, *shape)).shape == (3, classes)
        first, second, third = (next(m.parameters()) for m in (one, again, other))
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_training_is_seeded_and_learns():
    data = datasets.digits(train=100, validation=10)
    trained = [
        training.train(
            models.seeded(models.digits_net, 10, seed=0), data.train, training.Recipe(20), seed=0
        )
        for _ in range(2)
    ]
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not trained[0].training
    probs = point_method(trained[0]).probs(data.train.inputs)
    assert float((probs.argmax(1) == data.train.targets).double().mean()) > 0.9
