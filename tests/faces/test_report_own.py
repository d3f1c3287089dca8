"""The report on one's own model: what it says, what it escapes, when it says better, and that it asks for nothing."""

import base64
import copy
import functools
import io
import re

import pytest
import torch
from pages import Reader
from support import QUIET, network
from torch import nn

import nullbayes as nb
from nullbayes.errors import MissingExtraError, StorageError
from nullbayes.posterior.measuring.showing import png
from nullbayes.report import own_words, read_results, render_report, write_report
from nullbayes.report.drawing import label

HOSTILE = (
    '<script>alert(\'$x_\')</script> & "#010101" id="a" url(#b) $\\frac{ \x00\x07 日本 ' + "w" * 60
)


def data(seed, n, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g) + shift
    return x, (x + 0.5 * torch.randn(n, 3, generator=g)).argmax(1)


@functools.cache
def results():
    model, (x, y) = network(), data(0, 30)
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    posterior = nb.NullSpacePosterior(model).fit([(x, y)], num_samples=4, **QUIET)
    found = posterior.evaluate(
        data(1, 80),
        shifted={HOSTILE: data(2, 40, 2.0)[0], "near": data(3, 40, 0.5)[0]},
        train=(x, y),
        validation=data(4, 60),
        slices={"<b>bold</b>": lambda x, y: x[:, 0] > 0},
        show=lambda v: f"<img src=x> {v.sum():.2f}" if v[0] > 0 else v.reshape(1, 3),
        **QUIET,
    ).as_dict()
    found["title"] = "A <i>title</i>"
    return found


@pytest.fixture
def mine():
    return copy.deepcopy(results())


@functools.cache
def page():
    return render_report(results())


@functools.cache
def regression_results():
    x, _ = data(0, 30)
    y = x.sum(1, keepdim=True)
    model = network(outputs=1)
    posterior = nb.NullSpacePosterior(model, "regression").fit([(x, y)], num_samples=4, **QUIET)
    x, _ = data(1, 40)
    return posterior.evaluate(
        (x, x.sum(1, keepdim=True)), validation=(x[:20], x[:20].sum(1)), **QUIET
    ).as_dict()


def text_of(html):
    return " ".join("".join(Reader(html).text).split())


def test_the_page_is_whole_and_asks_for_nothing():
    for html in (page(), render_report(regression_results())):
        reader = Reader(html)
        assert all(request.startswith("data:image/png;base64,") for request in reader.requests)
        assert "://" not in html and "@import" not in html and "<script" not in html
        assert len(reader.ids) == len(set(reader.ids))
        assert set(reader.references) - {"b"} <= set(reader.ids)  # that one is text of a label
        assert html.count("<figure>") == html.count("<svg viewBox") == html.count('role="img"')
        assert 'name="viewport"' in html and "@media print" in html


def test_hostile_strings_are_escaped_in_text_and_figures():
    html = page()
    assert "<img src=x>" not in html and "<b>bold" not in html and "<i>title" not in html
    assert "&lt;img src=x&gt;" in html and "A &lt;i&gt;title&lt;/i&gt;" in html
    drawn = re.findall(r"<svg.*?</svg>", html, re.S)
    titles = [t for svg in drawn for t in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    # As it was given, cut, without control characters; neither mathematics nor colours nor ids were made of it.
    assert "&lt;script&gt;alert('$x_')&lt;/scrip…" in titles
    assert "var(--ink)" not in " ".join(titles)
    hostile = '\x07$a$ id="x" #010101 ‮'
    assert label(hostile) == '\\$a\\$ id="x" #010101 '


def test_text_between_the_tags_of_a_figure_stays(mine):
    name = '#010101 id="a" url(#b)'
    for value in (
        mine["curves"]["roc"],
        mine["curves"]["novelty"]["outside"],
        mine["data"]["shifted"],
        *(d["sets"] for d in mine["detection"]),
        *(t["shifted"] for t in mine["thresholds"]["rates"] if "shifted" in t),
        mine["examples"],
    ):
        value[name] = value.pop("near")
    html = render_report(mine)
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", html)
    assert drawn.count(name) == 2  # histogram and ROC curve


def test_figures_of_the_page_are_those_of_the_results():
    found, text = results(), text_of(page())
    for key, figures in found["figures"].items():
        assert found["methods"][key]["title"] in text
        for name, digits in (("accuracy", 4), ("nll", 4), ("ece", 4), ("joint_nll", 3)):
            assert f"{figures[name]['value']:.{digits}f}" in text
            assert f"± {figures[name]['error']:.{digits}f}" in text
    for entry in found["detection"]:
        for figure in entry["sets"].values():
            assert f"{figure['auroc']['value']:.3f}" in text
    for entry in found["thresholds"]["rates"][1:]:
        assert f"{entry['value']:.4g}" in text
        assert f"{100 * entry['test']['value']:.1f} ± {100 * entry['test']['error']:.1f} %" in text
    assert "Worst calibrated: " in text or "In no class" in text
    assert found["certificate"]["verdict"] in text and "too few inputs" in text


def test_better_is_said_beyond_two_standard_errors_only(mine):
    for verdicts in mine["verdicts"].values():
        for name in verdicts:
            verdicts[name] = "same"
    for entry in mine["detection"]:
        for found in entry["sets"].values():
            found["verdict"] = "same"
    for part in mine["slices"].values():
        for figures in part["differences"].values():
            for figure in figures.values():
                figure.update(value=0.01, error=0.006)
    quiet = render_report(mine)
    assert 'class="tag better"' not in quiet and 'class="tag worse"' not in quiet
    assert "no figure differs" in own_words.headline(mine)
    mine["verdicts"][mine["main"]].update(nll="better", ece="worse")
    mine["slices"]["<b>bold</b>"]["differences"][mine["main"]]["nll"].update(value=0.02)
    loud = render_report(mine)
    assert loud.count('class="tag better"') == 2  # tile and table
    assert loud.count('class="tag worse"') == 3  # and the slice
    assert "better NLL and worse ECE" in own_words.headline(mine)


def test_the_worst_part_is_named_and_noise_is_not(mine):
    figures = {n: p["methods"][mine["main"]]["gap"] for n, p in mine["classes"].items()}
    for gap in figures.values():
        gap.update(value=0.01, error=0.02)
    assert "In no class" in own_words.worst(mine, "classes")
    figures["class 0"].update(value=0.30, error=0.20)  # large, and noise
    figures["class 2"].update(value=-0.10, error=0.02)
    assert own_words.worst(mine, "classes").startswith(
        "Worst calibrated: class 2, underconfident by 0.100"
    )


def test_a_weak_guarantee_is_not_dressed_up(mine):
    mine["certificate"].update(
        held=False, verdict="The guarantee is weak: the null space is empty."
    )
    html = render_report(mine)
    assert '<span class="tag weak"' in html and "The guarantee is weak; on test data" in html
    mine["certificate"]["method"] = "Laplace"
    assert "No guarantee promised" in own_words.headline(mine)
    assert "nothing promised" in render_report(mine)


def test_the_audit_is_shown_where_there_is_one(mine):
    assert mine["audit"].startswith("Audited on") and "Audited on" in text_of(page())
    mine["audit"] = "12 examples <one at a time>"
    assert "12 examples &lt;one at a time&gt;" in render_report(mine)
    assert "<b>Audit.</b>" not in page()  # the certificate's verdict says it already


def test_regression_says_intervals():
    found, text = regression_results(), text_of(render_report(regression_results()))
    assert "90 % interval covers" in text and "RMSE" in text and "CRPS" in text
    assert "Least expected targets" in text and "Does it notice" not in text
    assert f"{found['figures']['evidence']['crps']['value']:.4f}" in text


def test_pictures_are_png_files():
    pixels = torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8)
    plt = pytest.importorskip("matplotlib.pyplot")
    read = plt.imread(io.BytesIO(png(pixels)), format="png")
    assert torch.equal((torch.tensor(read) * 255).round().to(torch.uint8), pixels)
    shown = [e for group in results()["examples"].values() for e in group]
    assert any("png" in e for e in shown) and any("text" in e for e in shown)
    for e in shown:
        if "png" in e:
            assert base64.b64decode(e["png"]).startswith(b"\x89PNG")


def test_from_the_file_the_same_page(tmp_path, mine):
    from nullbayes.common.writing import write_signed_json

    write_signed_json(tmp_path / "results.json", mine)
    again = read_results(tmp_path / "results.json")
    assert render_report(again) == page()
    write_signed_json(tmp_path / "old.json", {**mine, "schema": 99})
    with pytest.raises(StorageError, match="99"):
        read_results(tmp_path / "old.json")
    del mine["curves"]
    write_signed_json(tmp_path / "part.json", mine)
    with pytest.raises(StorageError, match="curves"):
        read_results(tmp_path / "part.json")
    with pytest.raises(StorageError, match="changed"):
        write_report({**results(), "detection": 3}, tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


def test_posterior_report_writes_the_page(tmp_path):
    posterior = nb.NullSpacePosterior(network()).fit([data(0, 20)], num_samples=3, **QUIET)
    path = posterior.report(
        tmp_path / "deep" / "r.html", data(1, 30), title="Mine & yours", **QUIET
    )
    html = path.read_text(encoding="utf-8")
    Reader(html)
    assert "Mine &amp; yours" in html and "posterior.report" in html


def test_missing_packages_are_named_before_the_work(monkeypatch, tmp_path):
    posterior = nb.NullSpacePosterior(network()).fit([data(0, 20)], num_samples=3, **QUIET)
    monkeypatch.setattr("nullbayes.report.render.find_spec", lambda name: None)
    monkeypatch.setattr("nullbayes.posterior.evaluation.evaluate", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib and jinja2"):
        posterior.report(tmp_path / "r.html", data(1, 30), **QUIET)
    assert not list(tmp_path.iterdir())
