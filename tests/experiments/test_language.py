"""The language experiment on a tiny encoder with random weights and texts of random tokens, packed as the real one."""

from __future__ import annotations

import importlib.util
import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from experiments.language import causal, encoder, methods, problem, running, texts
from experiments.language.problem import Problem, Size
from experiments.runner import Unavailable, run
from experiments.store import Store

pytest.importorskip("transformers")
pytest.importorskip("peft")
TINY = Size(20, 4, 24, 8, 4, 2, 12, 1, ("LoRA", "full"), 2)
SETTINGS = {
    "vocab_size": 150,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A pack of a tiny encoder; each class has its own tokens, so that topics can be learned."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = BertModel(BertConfig(**SETTINGS), add_pooling_layer=False)
        names = {"classes": texts.CLASSES, "near": texts.NEAR, "far": texts.FAR}
        tokens = {
            f"{kind}/{k:02d}/{name}": torch.randint(104 + 4 * k, 108 + 4 * k, (20, 8)).to(
                torch.int16
            )
            for kind, each in names.items()
            for k, name in enumerate(each)
        }
    state = {k: v.detach().half() for k, v in bert.state_dict().items() if v.is_floating_point()}
    rows = torch.arange(100, 150)
    state[encoder.TABLE] = state[encoder.TABLE][rows].contiguous()
    folder = tmp_path / "pack"
    folder.mkdir()
    save_file({**state, "rows": rows}, folder / encoder.WEIGHTS)
    save_file(tokens, folder / encoder.TEXTS)
    (folder / encoder.SETTINGS).write_text(json.dumps(SETTINGS))
    monkeypatch.setenv(encoder.FOLDER, str(folder))
    monkeypatch.setattr(problem, "NETWORKS", tmp_path / "networks")
    monkeypatch.setitem(problem.SIZES, "full", TINY)
    shape = causal.Shape(30, 16, 1, 4, 3, 8)
    monkeypatch.setattr(causal, "sized", lambda size: (size, shape))
    for cached in (encoder.pretrained, encoder.texts):
        cached.cache_clear()
    yield folder
    for cached in (encoder.pretrained, encoder.texts):
        cached.cache_clear()


def test_a_pack_has_the_word_vectors_of_its_texts_and_zeros(packed):
    _, state = encoder.pretrained()
    table = state[encoder.TABLE]
    assert table.shape == (150, 16)
    assert table[:100].abs().sum() == 0
    assert (table[100:].abs().sum(1) > 0).all()
    assert list(encoder.texts().classes) == list(texts.CLASSES)


def test_packing_a_pack_changes_no_weight_that_texts_use(packed, tmp_path, monkeypatch):
    before, tokens = encoder.pretrained()[1], encoder.texts()
    size = encoder.pack(tmp_path / "again")
    assert size < sum(path.stat().st_size for path in packed.iterdir()) + 4096
    monkeypatch.setenv(encoder.FOLDER, str(tmp_path / "again"))
    encoder.pretrained.cache_clear()
    encoder.texts.cache_clear()
    used = torch.cat([t.flatten() for t in tokens.classes.values()]).unique()
    after = encoder.pretrained()[1]
    torch.testing.assert_close(
        after[encoder.TABLE][used], before[encoder.TABLE][used], rtol=0, atol=0
    )
    assert all(torch.equal(after[k], before[k]) for k in before if k != encoder.TABLE)
    assert torch.equal(encoder.texts().far["Russian"], tokens.far["Russian"])


@pytest.mark.parametrize("way", encoder.WAYS)
def test_fine_tuning_moves_what_it_may_and_is_kept(packed, way, tmp_path):
    own = Problem(way, 0, TINY)
    network, fresh = own.member(0), encoder.build(6, way, 1000)
    before, moved = dict(fresh.named_parameters()), []
    for name, weight in network.named_parameters():
        if not torch.equal(weight, before[name]):
            moved.append(name)
            assert weight.requires_grad
    assert any("lora_B" in n for n in moved) == (way == "LoRA")
    assert ("bert.embeddings.word_embeddings.weight" in moved) == (way == "full")
    again = own.member(0)  # from its file
    x = own.test.inputs
    torch.testing.assert_close(encoder.outputs(again, x), encoder.outputs(network, x))


def catalogue(path, entries):
    """A gettext file: sorted pairs, their lengths and places, then the strings."""
    pairs = sorted((a.encode(), b.encode()) for a, b in entries.items())
    start, table, data = 28 + 16 * len(pairs), ([], []), b""
    for which in (0, 1):
        for pair in pairs:
            table[which].extend((len(pair[which]), start + len(data)))
            data += pair[which] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    numbers = struct.pack(f"<{4 * len(pairs)}I", *table[0], *table[1])
    path.parent.mkdir(parents=True)
    path.write_bytes(head + numbers + data)


def test_messages_are_long_translated_and_none_comes_twice(tmp_path, monkeypatch):
    long, foreign = "the file could not be opened " * 3, "die Datei ließ sich nicht öffnen " * 2
    entries = {
        "": "Content-Type: text/plain; charset=UTF-8\n",
        long: foreign,
        long + "!": foreign,
        "no": "nein",
    }
    catalogue(tmp_path / "de" / "LC_MESSAGES" / "a.mo", entries)
    catalogue(tmp_path / "xx" / "LC_MESSAGES" / "a.mo", {"": entries[""], long: long})
    monkeypatch.setattr(texts, "CATALOGUES", (tmp_path,))
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "none")})
    assert texts.messages("de") == [foreign.strip()]
    assert texts.messages("de", original=True) == [long.strip(), long + "!"]
    assert texts.messages("xx") == []  # not translated


def test_without_catalogues_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "CATALOGUES", (tmp_path,))
    monkeypatch.setattr(texts, "topic", lambda where: ["a text"] * 200)
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(Unavailable, match=r"0 texts of 'messages'.*apt install"):
        texts.raw()


def test_parts_share_no_text_and_depend_on_the_seed(packed):
    found = Problem("LoRA", 0, TINY)
    sizes = [len(split) for split in found.splits]
    assert sizes == [72, 18, 24]
    assert not torch.equal(found.train.inputs, Problem("LoRA", 1, TINY).train.inputs)
    assert set(found.sets()["far"]) == {
        n for n, (role, _) in texts.FAR.items() if role == "judging"
    }


def test_a_reader_keeps_frequent_tokens_and_asks_at_the_end(packed):
    own = Problem("LoRA", 0, TINY)
    reader = causal.Reader(own, causal.sized(TINY)[1])
    tokens = torch.tensor([[101, 105, 106, 102, 0, 0, 0, 0], [101, 105, 149, 106, 107, 102, 0, 0]])
    found = reader.prompts(tokens)["input_ids"]
    assert found[0, 2] == reader.ask and found[1, 4] == reader.ask
    assert found[1, 1] == causal.UNKNOWN  # no training text has it
    assert (found[0, 3:] == 0).all()
    whole = reader.whole(tokens, torch.tensor([2, 0]))
    assert whole["input_ids"][0, 3] == reader.answers[2]
    assert whole["labels"][0, 4] == causal.IGNORED


def test_answers_of_several_models_and_with_dropout(packed):
    asked = causal.Asked(Problem("LoRA", 0, TINY), causal.sized(TINY)[1])
    found, x = causal.several(asked), asked.problem.test.inputs
    inputs = asked.reader.prompts(x)
    with torch.no_grad():
        logits = asked.model(**inputs).logits
    asks = (inputs["input_ids"] == asked.reader.ask).nonzero()
    wanted = logits[asks[:, 0], asks[:, 1]][:, asked.reader.answers]
    ensemble = found["ensemble"].draws(x).outputs
    torch.testing.assert_close(ensemble[0], wanted)
    assert len(ensemble) == TINY.members and float((ensemble[1] - ensemble[0]).abs().min()) > 0
    dropped = found["dropout"].draws(x).outputs
    assert len(dropped) == TINY.samples and float(dropped.std(0).mean()) > 0
    assert not asked.model.training


def test_the_small_setting_has_a_few_groups_and_the_causal_model() -> None:
    names = [job.key.method for job in running.jobs("small")]
    assert names == [
        "LoRA: networks trained",
        *(f"LoRA: {group}" for group in methods.SMALL),
        "GPT-2: choices",
    ]


def test_jobs_on_a_processor_come_family_by_family():
    families = [j.key.method.partition(":")[0] for j in running.jobs("processor")]
    assert list(dict.fromkeys(families)) == ["GPT-2", "full", "LoRA"]
    assert families == sorted(families, key=["GPT-2", "full", "LoRA"].index)
    assert "full: Laplace" not in {j.key.method for j in running.jobs("processor")}
    assert "full: Laplace" in {j.key.method for j in running.jobs("full")}


def test_last_layer_laplace_is_ours(packed):
    """laplace-torch on features against the library's exact posterior of the head, at one prior precision."""
    import nullbayes as nb

    pytest.importorskip("laplace")
    own = Problem("full", 0, replace(TINY, samples=4000))
    row = methods.last_layer(own)["laplace_last"]
    ours = nb.LaplacePosterior(own.network, parameters="last-layer", prior_precision=row.value)
    ours.fit(own.batches(own.train), 4, progress=False)
    exact = ours.predict(own.test.inputs).covariance.diagonal(dim1=1, dim2=2)
    found = row.draws(own.test.inputs)
    variance = (found.outputs - found.centre).square().mean(0)
    torch.testing.assert_close(variance, exact, rtol=0.12, atol=1e-6)  # 4,000 samples: 2.2 %


@pytest.mark.slow
def test_every_piece_runs_and_is_reported(packed, tmp_path):
    pytest.importorskip("laplace")
    if importlib.util.find_spec("pytorch_ood") is None:
        pytest.skip("pytorch-ood is not installed")
    jobs = running.jobs("full")
    assert len({job.key for job in jobs}) == len(jobs) == 2 + 2 * len(methods.GROUPS) - 1 + 3
    # Each group of methods once, the null space of both.
    once = {
        "full: networks",
        "full: last layer",
        "full: Laplace",
        "full: last twentieth",
        "full: networks trained",
    }
    other = {name.replace("full", "LoRA") for name in once} - {
        "LoRA: null space",
        "LoRA: networks trained",
    }
    some = [j for j in jobs if j.key.method in once or not j.key.method.startswith("full")]
    some = [j for j in some if j.key.method not in other]
    outcome = run(some, Store(tmp_path / "store"), fresh=False)
    assert not outcome.failures and not outcome.skipped
    errors = [r["result"]["error"] for r in outcome.runs if "error" in r["result"]]
    assert not errors
    running.report("full", outcome.runs, tmp_path)
    text = (tmp_path / "language.md").read_text()
    for title in (
        "LoRA, r = 8: predictions",
        "All weights fine-tuned: scores",
        "The prior of the evidence",
        "free text",
    ):
        assert title in text
    null = next(r for r in outcome.runs if r["method"] == "LoRA: null space")["result"]["rows"][
        "null"
    ]
    assert null["details"]["held"]
    regime = null["details"]["regime"]
    assert regime["evidence"]["length"] > regime["bounded"]["length"] or (
        regime["evidence"]["prior_precision"] == regime["bounded"]["prior_precision"]
    )
    assert regime["bounded, sampled networks"]["sampled"]["divergence"] <= 0.005
