"""Adapters on frozen bases: only their rows, the base never copied, a file beside the adapter, remarks once merged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.model.frozen import product
from tests.cases.architectures import BERT, LLAMA, alone, built, classes, next_tokens, normal
from tests.cases.dense import QUIET, assert_rows
from tests.cases.test_architectures import standing

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **LORA),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "adalora": lambda: peft.AdaLoraConfig(  # adds a penalty to the network's own loss
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        init_r=2,
        target_r=1,
        total_step=9,
    ),
    "several tasks": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2
    ),
    "experts of tasks": lambda: peft.PolyConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        r=2,
        n_tasks=2,
        n_skills=2,
        n_splits=1,
        init_weights=False,
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8
    ),
    "lokr": lambda: peft.LoKrConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, init_weights=False
    ),
    "oft": lambda: peft.OFTConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4, init_weights=False
    ),
    "embeddings and head": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        rank_pattern={"q_proj": 3},
        use_rslora=True,
        init_lora_weights=False,
    ),
}
# Kinds that put tokens of their own before those of the inputs: the first label then has a position before it.
BEFORE = ("prompt", "several tasks", "p-tuning")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def llama(_: Any = None) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(LLAMA | {"max_position_embeddings": 32}))
    )


def with_adapter(kind: str, base: torch.dtype = torch.float64) -> nn.Module:
    """A base in ``base`` and an adapter with weights that are not its usual zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(built(llama).to(base), KINDS[kind]()).eval()
        if base == torch.float64:
            model = model.double()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
    return model


def own_rows(model: nn.Module, batch: dict[str, Tensor], *, first: bool) -> Tensor:
    """Gradients of each text's own loss, alone, by the adapter's weights, times how many labels it is the mean of."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for n in range(5):
        one = alone(batch, n)
        labels = one["labels"] if first else one["labels"][:, 1:]
        penalised = isinstance(getattr(model, "base_model", None), peft.AdaLoraModel)
        loss = (model.get_base_model() if penalised else model)(**one).loss * (labels != -100).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        found.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return torch.stack(found).unsqueeze(1)


def assert_judged(posterior: nb.NullSpacePosterior, kind: str) -> None:
    """DoRA detaches the norm that its weights are divided by, which its certificate notes."""
    certificate = posterior.certificate
    assert certificate.audit.passed
    assert (kind == "dora") == any("detaches the norm" in note for note in certificate.notes)


@pytest.mark.filterwarnings("error::nullbayes.NullBayesWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_rows(kind: str) -> None:
    model, batch = with_adapter(kind), next_tokens()
    if kind in ("several tasks", "experts of tasks"):
        batch["task_ids"] = torch.arange(5) % 2
    posterior = nb.NullSpacePosterior(model, preserve="loss", delta=0.0, prior_precision=1.0)
    posterior.fit([batch], 3, audit=5, **QUIET)
    dense = standing(posterior, own_rows(model, batch, first=kind in BEFORE))
    assert_rows(posterior, dense, 1e-5)
    assert posterior.certificate.parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert_judged(posterior, kind)
    lengths = {k: v[:, :4] if v.ndim == 2 else v for k, v in batch.items() if k != "labels"}
    assert posterior.predict(lengths).outputs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_bases_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    model, batch = with_adapter(kind, dtype), next_tokens()
    posterior = nb.NullSpacePosterior(model, preserve="loss", prior_precision=1.0)
    posterior.fit([batch], 3, audit=5, **QUIET)
    assert_judged(posterior, kind)
    assert posterior.space.dtype == torch.float32
    wide = with_adapter(kind, dtype).double()  # the same numbers
    dense = own_rows(wide, batch, first=False)
    assert_rows(posterior, dense, 2e-4)


def test_a_frozen_base_is_never_copied() -> None:
    model, batch = with_adapter("lora", torch.bfloat16), next_tokens()
    posterior = nb.NullSpacePosterior(model, preserve="loss").fit([batch], 2, **QUIET)
    functional = posterior.functional
    assert functional.widened == torch.float32
    assert not functional.widened_whole
    mine, _ = functional.modules.private({}, widened=torch.float32)
    theirs = dict(model.named_parameters())
    frozen = [n for n, p in theirs.items() if not p.requires_grad and p.ndim == 2]
    assert len(frozen) > 8
    for name in frozen:
        path, leaf = name.rsplit(".", 1)
        assert mine.get_submodule(path)._parameters[leaf] is theirs[name]
    # What a backward pass needs of a frozen weight is the weight itself.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    inputs = functional.as_called(batch)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional(functional.weights(requires_grad=True), inputs).sum().backward()
    shapes = {tuple(theirs[n].shape) for n in frozen} | {tuple(theirs[n].T.shape) for n in frozen}
    wide = [t for t in held if t.dtype == torch.float32 and tuple(t.shape) in shapes]
    adapters = {p.data_ptr() for p in theirs.values() if p.requires_grad}
    assert not [t for t in wide if t.data_ptr() not in adapters]


def test_products_with_frozen_weights_have_every_derivative() -> None:
    x, weight, bias = normal(3, 4), normal(5, 4, seed=1).bfloat16(), normal(5, seed=2)
    dense = weight.double()

    def ours(x: Tensor) -> Tensor:
        return product(x, weight, bias, torch.float64)

    def theirs(x: Tensor) -> Tensor:
        return x @ dense.T + bias

    assert_close(ours(x), theirs(x))
    many = normal(6, 3, 4, seed=3)
    assert_close(torch.func.vmap(ours)(many), theirs(many))
    for derive in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(derive(ours)(x), derive(theirs)(x))
    square = [torch.func.hessian(lambda x, f=f: f(x).pow(3).sum())(x) for f in (ours, theirs)]
    assert_close(*square)
    both = []
    for f in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf).pow(3).sum(), leaf, create_graph=True)
        both.append(torch.autograd.grad(first.sum(), leaf)[0])
    assert_close(*both)


def classifier(_: Any = None) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **BERT))


def tuned() -> nn.Module:
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return peft.get_peft_model(built(classifier).float(), config).eval()


def test_saved_beside_the_adapter_and_loaded_onto_a_fresh_base(tmp_path: Path) -> None:
    model, batch = tuned(), classes()
    posterior = nb.NullSpacePosterior(model).fit([batch], 4, **QUIET)
    with contextlib.redirect_stdout(None):
        model.save_pretrained(tmp_path)
    posterior.save(tmp_path)
    assert (tmp_path / "adapter_posterior.safetensors").is_file()
    fresh = peft.PeftModel.from_pretrained(built(classifier).float(), tmp_path).eval()
    again = nb.load(tmp_path, fresh)
    assert again.space.names == posterior.space.names
    assert_close(again.predict(batch).outputs, posterior.predict(batch).outputs)
    with torch.no_grad():
        next(fresh.get_base_model().parameters()).add_(1.0)
    with pytest.raises(nb.StorageError, match="fitted around other weights"):
        nb.load(tmp_path, fresh)


def test_another_adapter_is_another_network(tmp_path: Path) -> None:
    """What is active is no weight: it is asked for at each use, and kept in files."""
    model, batch = tuned(), classes()
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=3, target_modules=["query"], init_lora_weights=False
    )
    model.add_adapter("other", lora)
    posterior = nb.NullSpacePosterior(model).fit([batch], 4, **QUIET)
    layers = nb.LayerNullSpacePosterior(model).fit([batch], 2, **QUIET)
    assert not any(".other." in name for name in posterior.space.names)
    wanted = posterior.predict(batch).outputs
    changes = (model.set_adapter, "other"), (model.base_model.disable_adapter_layers,)
    for change, *arguments in changes:
        change(*arguments)
        for asked in (posterior.predict, posterior.novelty, layers.novelty):
            with pytest.raises(
                nb.ModelError,
                match=r"active adapters; now they are 'default, dis|now they are 'other",
            ):
                asked(batch)
        model.base_model.enable_adapter_layers()
        model.set_adapter("default")
    assert_close(posterior.predict(batch).outputs, wanted)
    assert layers.novelty(batch).isfinite().all()
    # Beside the adapter, onto a base that never saw the other one.
    with contextlib.redirect_stdout(None):
        model.save_pretrained(tmp_path)
    posterior.save(tmp_path)
    fresh = peft.PeftModel.from_pretrained(built(classifier).float(), tmp_path).eval()
    assert_close(nb.load(tmp_path, fresh).predict(batch).outputs, wanted)
    fresh.base_model.disable_adapter_layers()
    with pytest.raises(nb.StorageError, match="'default' as the active adapters"):
        nb.load(tmp_path, fresh)


def test_adapters_without_a_model_of_peft_around_them(tmp_path: Path) -> None:
    model, batch = built(llama).float(), next_tokens()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="one")
    model.add_adapter(config, adapter_name="two")
    model.set_adapter("one")
    posterior = nb.NullSpacePosterior(model.eval(), preserve="loss").fit([batch], 3, **QUIET)
    assert all(".one." in name for name in posterior.space.names)
    assert not any("merged" in note for note in posterior.certificate.notes)
    model.set_adapter("two")
    with pytest.raises(nb.ModelError, match="'one' as the active adapters; now they are 'two'"):
        posterior.predict(batch)
    model.set_adapter("one")
    model.disable_adapters()
    with pytest.raises(nb.ModelError, match="now they are 'one, disabled'"):
        posterior.novelty(batch)
    model.enable_adapters()
    model.delete_adapter("two")  # takes no part
    before = posterior.predict(batch).outputs
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(nb.StorageError, match=r"holds no adapter .*one does\. Pass that folder"):
        posterior.save(tmp_path)
    posterior.save(tmp_path / "one")
    assert_close(nb.load(tmp_path / "one", model).predict(batch).outputs, before)


def test_an_adapter_under_another_name_is_told(tmp_path: Path) -> None:
    model, batch = tuned(), classes()
    nb.NullSpacePosterior(model).fit([batch], 2, **QUIET).save(tmp_path / "file.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    base = built(classifier).float()
    other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", adapter_name="other")
    with pytest.raises(nb.StorageError, match="called 'other' here: load it under the name"):
        nb.load(tmp_path / "file.safetensors", other.eval())


def test_remarks_once_merged(tmp_path: Path) -> None:
    model, batch = tuned(), classes()
    posterior = nb.NullSpacePosterior(model).fit([batch], 4, **QUIET)
    assert not any("merge_and_unload" in note for note in posterior.certificate.notes)
    posterior.save(tmp_path / "posterior.safetensors")
    model.merge_adapter()
    with pytest.raises(nb.ModelError, match="unmerge_adapter"):
        nb.NullSpacePosterior(model).fit([batch], 2, **QUIET)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    with pytest.raises(nb.ModelError, match=r"no longer part of the network.*unmerged"):
        posterior.predict(batch)
    with pytest.raises(nb.StorageError, match=r"does not have.*merge_and_unload"):
        nb.load(tmp_path / "posterior.safetensors", merged)
    head = nb.NullSpacePosterior(merged).fit([batch], 2, **QUIET)
    note = next(n for n in head.certificate.notes if "merge_and_unload" in n)
    assert note.startswith("27 of ")
    assert "(classifier.weight, classifier.bias)" in note
