"""Layer posteriors as plain modules: the posterior's own numbers, in PyTorch, `torch.export` and ONNX Runtime."""

import copy
import io
import warnings

import onnxruntime
import pytest
import torch
from support import hooks, says, unchanged
from torch import nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes.moments.blocks import Block
from nullbayes.moments.factor import Edge
from nullbayes.moments.leverage import Leverage
from nullbayes.moments.rule import Layout, Summed
from nullbayes.moments.second import BlockMoments
from nullbayes.moments.traced import Form, Probe
from tests.moments.layer_networks import NETWORKS, network, quiet


def extended(x, count):
    return torch.cat([x, x.flip(0), x, x])[:count]


def called(model, weights, x):
    return torch.func.functional_call(model, weights, (x,), tie_weights=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_module_gives_the_posteriors_numbers(name):
    model, x, likelihood = network(name)
    posterior = quiet(model, x, likelihood)
    with unchanged(model):
        module = posterior.export_module(x, samples=2, tolerance=0)
    for count in (1, len(x), len(x) + 2):
        some = extended(x, count)
        outputs, mean, total, epistemic, novelty = module(some)
        torch.testing.assert_close(outputs, model(some).detach())
        wanted = posterior.novelty(some, "leverage")
        torch.testing.assert_close(novelty, wanted, rtol=1e-7, atol=1e-7)
        draws = [called(model, s, some) for s in posterior.sample(2)]
        p = torch.stack(draws).detach().softmax(-1)
        torch.testing.assert_close(mean, p.mean(0))
        entropy = torch.special.entr(p.mean(0)).sum(-1)
        torch.testing.assert_close(total, entropy)
        inner = torch.special.entr(p).sum(-1).mean(0)
        torch.testing.assert_close(epistemic, entropy - inner, rtol=1e-5, atol=1e-9)
    assert not any(any(h.values()) for m in module.modules() for h in hooks(m))
    assert not any(p.requires_grad for p in module.parameters())


class Kinds(nn.Module):
    """Layers whose inputs take some finding."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, groups=2, padding=2, padding_mode="circular")
        self.far = nn.Conv2d(8, 6, (3, 2), dilation=2, padding="same", bias=False)
        self.back = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.pair = nn.Bilinear(4, 5, 6)
        self.gate = nn.GRU(6, 7, 2, bidirectional=True)
        self.self_attention = nn.MultiheadAttention(14, 2)
        self.cross = nn.MultiheadAttention(14, 2, kdim=6, vdim=6)
        self.norm, self.head = nn.LayerNorm(14), nn.Linear(14, 3)

    def forward(self, x, other):
        h = self.back(torch.tanh(self.far(torch.tanh(self.grouped(x)))))
        tokens = h.flatten(2).permute(2, 0, 1)  # tokens first
        pair = self.pair(tokens, other.expand(len(tokens), -1, -1))
        g = self.gate(pair[:9])[0]
        g = self.self_attention(g, g, g, need_weights=False)[0]
        g = self.norm(g + self.cross(g, pair[:4], pair[:4])[0])
        return self.head(g).mean(0) + self.head(g[0])


def kinds(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Kinds().to(dtype).eval()
        return model, (torch.randn(7, 4, 9, 9).to(dtype), torch.randn(7, 5).to(dtype))


def test_layers_of_every_kind():
    model, x = kinds()
    posterior = nb.LayerNullSpacePosterior(model).fit([(*x, None)], progress=False)
    module = posterior.export_module(x, tolerance=0)
    for some in (x, tuple(extended(t, 3) for t in x)):
        torch.testing.assert_close(module(*some)[0], model(*some).detach())
        wanted = posterior.novelty(some, "leverage")
        torch.testing.assert_close(module(*some)[1], wanted, rtol=1e-7, atol=1e-7)
    names = {type(m).__name__ for m in module.modules()}
    assert {
        "WatchedConvolution",
        "WatchedAttention",
        "WatchedRecurrent",
        "Watched",
    } <= names


def session(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        names = module.output_names
        arguments = module.arguments(x)
        program = torch.onnx.export(
            module, dynamo=True, verbose=False, output_names=names, **arguments
        )
    file = io.BytesIO()
    program.save(file)
    return onnxruntime.InferenceSession(file.getvalue())


def exported_program(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, **module.arguments(x))


def inferred(made, *inputs):
    feed = {i.name: t.numpy() for i, t in zip(made.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(t) for t in made.run(None, feed)]


@pytest.mark.parametrize(("name", "samples"), [("mlp", 2), ("convnet", 0), ("decoder", 0)])
def test_onnx_runtime_gives_the_posteriors_numbers(name, samples):
    model, x, likelihood = network(name, torch.float32)
    posterior = quiet(model, x, likelihood)
    module = posterior.export_module(x, samples=samples, tolerance=0)
    made = session(module, x)
    assert [o.name for o in made.get_outputs()] == list(module.output_names)
    for count in (1, len(x) + 2):
        some = extended(x, count)
        found = inferred(made, some)
        torch.testing.assert_close(found[0], model(some).detach(), rtol=1e-4, atol=1e-5)
        wanted = posterior.novelty(some, "leverage")
        torch.testing.assert_close(found[-1], wanted, rtol=1e-3, atol=1e-3)
        assert wanted.shape == (count,)
        if samples:
            draws = [called(model, s, some) for s in posterior.sample(2)]
            want = torch.stack(draws).detach().softmax(-1).mean(0)
            torch.testing.assert_close(found[1], want, rtol=1e-4, atol=1e-5)


def test_torch_export_takes_any_batch():
    model, x = kinds(torch.float32)
    posterior = nb.LayerNullSpacePosterior(model).fit([(*x, None)], progress=False)
    module = posterior.export_module(x, tolerance=0)
    program = exported_program(module, x)
    for count in (1, 2, 12):
        some = tuple(extended(t, count) for t in x)
        outputs, novelty = program.module()(*some)
        torch.testing.assert_close(outputs, model(*some).detach(), rtol=1e-4, atol=1e-4)
        wanted = posterior.novelty(some, "leverage")
        torch.testing.assert_close(novelty, wanted, rtol=1e-3, atol=5e-3)


def test_mappings_and_forward():
    model, x, _ = network("mlp")

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, *, pixels):
            return {"logits": self.body(pixels)}

    named = Named().eval()
    posterior = nb.LayerNullSpacePosterior(named).fit([{"pixels": x}], progress=False)
    module = posterior.export_module({"pixels": x}, tolerance=0)
    wanted = posterior.novelty({"pixels": x}, "leverage")
    torch.testing.assert_close(module(pixels=x)[1], wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, **module.arguments({"pixels": x}))
    torch.testing.assert_close(program.module()({"pixels": x[:3]})[1], wanted[:3])

    def halves(network, given):
        return network(given[0] + given[1])

    posterior = nb.LayerNullSpacePosterior(model, forward=halves)
    posterior.fit([(x / 2, x / 2, None)], progress=False)
    module = posterior.export_module((x / 2, x / 2), tolerance=0)
    torch.testing.assert_close(
        module(x / 4, 3 * x / 4)[1], posterior.novelty((x / 2, x / 2), "leverage")
    )


@pytest.mark.parametrize("rank", [None, 20])
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 1.0])
def test_forms_against_dense(rank, tolerance):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    falling = torch.logspace(0, -3, 30, dtype=torch.float64)
    a = normal(60, 2, 30) * falling
    block = Block("w", Layout(2, 3, 30), (6, 30), 30, ("b",), ((6,),), table=False, multiplied=True)
    moments = BlockMoments.zeros(block, a.device, rank)
    if rank is None:
        parts = a.transpose(0, 1)
        moments.add_sums(Summed("w", parts.mT @ parts, parts.sum(1), 60), 30, 0)
    else:
        moments.add(a, 30, 0)
    edge = Edge.of(moments, 0.01)
    scorer = Leverage(moments, edge, 31, torch.float64)
    form = Form.of(moments, edge, 31, tolerance, scorer)
    ones = torch.ones(60, 2, 1, dtype=torch.float64)
    whole = torch.cat([a, ones], -1).transpose(0, 1)
    c = whole.mT @ whole
    if rank is not None:  # what the sketch takes for it
        vectors, values, rest = moments.inputs.spectrum()
        eye = torch.eye(31, dtype=torch.float64)
        c = vectors @ ((values - rest[:, None])[..., None] * vectors.mT)
        c = c + rest[:, None, None] * eye
    inverse = torch.linalg.inv(c + edge.inputs[:, None, None] * torch.eye(31, dtype=torch.float64))
    new = normal(9, 2, 30)
    extra = torch.cat([new, ones[:9]], -1)
    wanted = torch.einsum("ngi,gij,ngj->n", extra, inverse, extra)
    found = Probe(form, block, 0, torch.float64)(new).values() * (new.square().sum((1, 2)) + 1)
    off = (found / wanted - 1).abs().max()
    assert off <= tolerance + 1e-9
    fewer = form.root.shape[1] < 25
    assert fewer == (rank is not None or tolerance > 0)


def test_a_form_costs_less_where_inputs_vary_in_few_directions():
    model, _, _ = network("mlp")
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    x = few @ torch.randn(5, 60, generator=generator, dtype=torch.float64)
    posterior = quiet(model, x)
    module = posterior.export_module(x[:9])
    roots = [m.root.shape[1] for m in module.modules() if isinstance(m, Probe)]
    assert roots[0] <= 6
    wanted = posterior.novelty(x[:9], "leverage")
    assert (module(x[:9])[1] - wanted).abs().max() < 0.2


def test_what_cannot_be_exported_is_named():
    model, x, _ = network("mlp")
    posterior = quiet(model, x)
    with says(nb.InputError, "one example"):
        posterior.export_module(x[:1])
    with says(nb.InputError, "one example"):
        posterior.export_module(x).arguments(x[:1])
    with says(nb.InputError, "tolerance"):
        posterior.export_module(x, tolerance=-1.0)
    with says(nb.InputError, "`samples` is 1"):
        posterior.export_module(x, samples=1)
    with says(nb.NotFittedError):
        nb.LayerNullSpacePosterior(model).export_module(x)

    def elsewhere(network, given):
        return model(given)

    other = nb.LayerNullSpacePosterior(model, forward=elsewhere).fit(x, progress=False)
    with says(nb.ModelError, "forward="):
        other.export_module(x)

    def each(out, targets):
        return F.cross_entropy(out, targets, reduction="none")

    loss = nb.LayerNullSpacePosterior(model, loss=each)
    loss.fit((x, torch.zeros(len(x), dtype=torch.long)), progress=False)
    with says(nb.InputError, "samples=0"):
        loss.export_module(x, samples=2)
    assert loss.export_module(x)(x)[1].shape == (len(x),)
    fixed = nb.LayerNullSpacePosterior(network("encoder")[0], parameters=lambda n, _: "norm" in n)
    fixed.fit(network("encoder")[1], progress=False)
    with says(nb.ModelError, "no layer"):
        fixed.export_module(network("encoder")[1])


def test_the_module_can_be_copied_and_saved(tmp_path):
    model, x, _ = network("convnet")
    posterior = quiet(model, x)
    module = posterior.export_module(x, samples=2)
    wanted = module(x)
    torch.save(module, tmp_path / "module.pt")
    for other in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False)):
        for a, b in zip(other(x), wanted, strict=True):
            torch.testing.assert_close(a, b)
