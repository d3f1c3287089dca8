"""A posterior as one plain module with a head: what it returns, how its fidelity is measured, when it is refused."""

import io
import warnings

import onnxruntime
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from support import hooks, unchanged
from torch import nn

import nullbayes as nb
from nullbayes.posterior.corruptions import corrupted
from nullbayes.posterior.heads import rank_correlation

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16
Y = torch.tensor(DIGITS.target)


@pytest.fixture(scope="module")
def posterior():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(5):
        for i in range(0, 1000, 50):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(X[i : i + 50]), Y[i : i + 50]).backward()
            optimiser.step()
    return nb.NullSpacePosterior(model.eval()).fit((X[:80], Y[:80]), 10, progress=False)


@pytest.fixture(scope="module")
def module(posterior):
    with unchanged(posterior.model):
        return posterior.distil((X[:700], Y[:700]))


def test_one_pass_gives_outputs_novelty_and_variance_of_new_inputs(posterior, module):
    new = X[1200:1300]
    outputs, novelty, variance = module(new)
    torch.testing.assert_close(outputs, posterior.model(new).detach())
    for ours, score in ((novelty, "information"), (variance, "variance")):
        theirs = posterior.novelty(new, score=score)
        assert spearmanr(ours, theirs).statistic > 0.45  # 100 inputs of a small fit
        assert float((ours.log() - theirs.log()).abs().median()) < 0.4
    assert isinstance(module, nn.Module)
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(any(h.values()) for m in module.modules() for h in hooks(m))
    assert module.fidelity.faithful
    assert module.fidelity.examples == 175


def test_an_example_alone_scores_as_among_others(module):
    together = module(X[:5])[1]
    alone = torch.cat([module(X[i : i + 1])[1] for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=0)


def test_fidelity_on_a_given_shift_is_that_of_an_independent_count(posterior):
    ordinary, noise = X[:200], torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    module = posterior.distil(
        (ordinary, Y[:200]), shifted={"rand": noise}, least_correlation=-1, most_auroc_lost=1
    )
    before, after = module.fidelity.auroc["rand"]
    held = ordinary[150:]  # one batch, of which the last quarter judges
    labels = [0] * 50 + [1] * 80
    both = torch.cat([held, noise])
    assert after == pytest.approx(roc_auc_score(labels, module(both)[1]), abs=1e-6)
    assert before == pytest.approx(roc_auc_score(labels, posterior.novelty(both)), abs=1e-3)
    wanted = spearmanr(module(noise)[1], posterior.novelty(noise)).statistic
    assert module.fidelity.correlation["rand"] == pytest.approx(wanted, abs=1e-3)
    assert "rand" in str(module.fidelity)


def test_a_head_that_does_not_follow_is_refused(posterior):
    generator = torch.Generator().manual_seed(0)
    few = torch.rand(60, 1, 8, 8, generator=generator)
    with pytest.raises(nb.FidelityError, match="does not follow") as found:
        posterior.distil((few, Y[:60]), least_correlation=0.999)
    assert found.value.fidelity.correlation["all"] < 0.999
    assert not found.value.fidelity.faithful


def test_too_few_examples_and_names_that_are_taken(posterior):
    with pytest.raises(nb.InputError, match="holds 20 examples"):
        posterior.distil((X[:20], Y[:20]))
    with pytest.raises(nb.InputError, match="shuffled"):
        posterior.distil((X[:60], Y[:60]), shifted={"shuffled": X[:5]})


def test_a_network_without_a_layer_to_look_at_is_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    x, y = torch.randn(60, 3), torch.arange(60) % 3
    posterior = nb.NullSpacePosterior(Scaled().eval()).fit((x, y), 3, progress=False)
    with pytest.raises(nb.ModelError, match="no linear or convolution layer"):
        posterior.distil((x, y))


def test_torch_export_and_onnx_runtime_give_the_modules_numbers(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, **module.arguments(X[:3])).module()
        program = torch.onnx.export(
            module,
            dynamo=True,
            verbose=False,
            output_names=module.output_names,
            **module.arguments(X[:3]),
        )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for count in (1, 7):
        wanted = module(X[:count])
        for ours, theirs in zip(exported(X[:count]), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        found = session.run(None, {session.get_inputs()[0].name: X[:count].numpy()})
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-5)


def test_corruptions_change_numbers_and_tokens_but_no_mask():
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.arange(24).reshape(4, 6),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "values": torch.randn(4, 6),
    }
    for kind in ("noise", "mixed", "shuffled", "inverted"):
        found = corrupted(batch, kind, generator)
        assert torch.equal(found["attention_mask"], batch["attention_mask"])
        for name in ("input_ids", "values"):
            assert found[name].dtype == batch[name].dtype
            assert not torch.equal(found[name], batch[name]), (kind, name)
        assert set(found["input_ids"].flatten().tolist()) <= set(range(24))


def test_rank_correlation_with_ties():
    a, b = torch.tensor([1.0, 2, 2, 5, 3, 3]), torch.tensor([2.0, 1, 4, 4, 7, 1])
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(a, torch.ones(6)) == 0
