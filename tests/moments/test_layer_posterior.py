"""The posterior of the layer null space: exactness on whole networks, dense references, data that come and go."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.errors import InputError, ModelError, NonFiniteError, NotFittedError, StorageError


class Encoder(nn.Module):
    """A small transformer over sequences of vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(96, 4, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Decoder(nn.Module):
    """A causal language model whose output layer is its table of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 80)
        self.mix = nn.MultiheadAttention(80, 4, batch_first=True)
        self.norm = nn.LayerNorm(80)
        self.up, self.down = nn.Linear(80, 100), nn.Linear(100, 80)
        self.out = nn.Linear(80, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, t: Tensor) -> Tensor:
        h = self.table(t)
        mask = torch.ones(t.shape[1], t.shape[1], dtype=torch.bool).triu(1)
        n = self.norm(h)
        h = h + self.mix(n, n, n, attn_mask=mask, need_weights=False)[0]
        return self.out(h + self.down(torch.relu(self.up(h))))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(60, 80, 2, batch_first=True)
        self.head = nn.Linear(80, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 40, 3, stride=2, padding=1), nn.BatchNorm2d(40), nn.ReLU(),
        nn.Conv2d(40, 30, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(120, 4),
    )  # fmt: skip


def mlp(inputs: int = 60, width: int = 80) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


NETWORKS: dict[str, Any] = {
    "mlp": (mlp, lambda: torch.randn(20, 60), "classification"),
    "convnet": (conv_net, lambda: torch.randn(4, 4, 8, 8), "classification"),
    "encoder": (Encoder, lambda: torch.randn(8, 5, 96), "classification"),
    "decoder": (Decoder, lambda: torch.randint(0, 30, (4, 6)), nb.Classification(class_axis=-1)),
    "lstm": (Reader, lambda: torch.randn(8, 5, 60), "classification"),
}


def network(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Any]:
    make, data, likelihood = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = make(), data()
    return model.to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x, likelihood


def quiet(model: nn.Module, x: Any, likelihood: Any = "classification", **options: Any) -> Any:
    seed = options.pop("seed", 0)
    posterior = nb.LayerNullSpacePosterior(model, likelihood, **options)
    return posterior.fit(x, num_samples=4, seed=seed, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_sampled_networks_keep_their_outputs(name: str, dtype: torch.dtype) -> None:
    model, x, likelihood = network(name, dtype)
    posterior = quiet(
        model, [x[: len(x) // 2], x[len(x) // 2 :]], likelihood, delta=0, prior_precision=1.0
    )
    size = sum(p.detach().double().square().sum() for p in model.parameters()).sqrt()
    count = sum(p.numel() for p in model.parameters())
    posterior.prior_precision = float(count / size**2)
    with torch.no_grad():
        point = model(x)
    trained = dict(model.named_parameters())
    copy = deepcopy(model)
    other = NETWORKS[name][1]() if x.is_floating_point() else (x + 10) % 40
    for sample in posterior.sample():
        moved = sum(
            (sample[n] - p.detach()).double().square().sum() for n, p in trained.items()
        ).sqrt()
        assert moved > 0.1 * size
        with torch.no_grad():
            copy.load_state_dict(sample)
            out, off = copy(x), copy(other.to(x))
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4
            assert (out - point).norm() <= tolerance * point.norm()
            assert (off - model(other.to(x))).norm() > 1e-2 * point.norm()
    certificate = posterior.certificate
    assert certificate.held, certificate.verdict
    assert certificate.free_share > 0.1
    assert certificate.weight_change > 0.1
    assert "held" in str(certificate)


def test_the_guarantee_does_not_depend_on_the_size_of_the_change() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0, prior_precision=0.5)  # many times the prior's size
    assert posterior.certificate.weight_change > 15
    assert posterior.certificate.change < 1e-9


def test_a_soft_edge_keeps_what_it_promises() -> None:
    model, _, _ = network("mlp", torch.float32)
    torch.manual_seed(0)
    many = torch.randn(300, 60)  # no exact null space is left
    assert not quiet(model, many, delta=0, prior_precision=10.0).certificate.held
    posterior = quiet(model, (many, torch.randint(0, 4, (300,))))
    certificate = posterior.certificate
    assert certificate.held
    assert certificate.divergence <= 0.005
    assert certificate.left_out_divergence <= 0.0201
    assert certificate.network_score is not None
    # An independent measurement, of all examples.
    with torch.no_grad():
        p = model(many).log_softmax(1)
        total = 0.0
        for sample in posterior.sample(8):
            q = torch.func.functional_call(model, sample, (many,)).log_softmax(1)
            total += float((p.exp() * (p - q)).sum(1).mean()) / 8
    assert total <= 2 * 0.005
    # A weak prior breaks it, and the certificate says so.
    posterior.prior_precision = 1e-3
    assert not posterior.certificate.held
    assert "weak" in posterior.certificate.verdict


def dense_covariance(
    posterior: Any, model: nn.Module, x: Tensor, delta: float, data: Tensor
) -> Tensor:
    """``J Σ Jᵀ`` of a perceptron written out: its weights' covariance from plain sums over the data."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    names = [n for n, m in model.named_children() if isinstance(m, nn.Linear)]
    h, inputs = data, []
    for module in model:
        if isinstance(module, nn.Linear):
            inputs.append(torch.cat([h, torch.ones_like(h[:, :1])], dim=1))
        h = module(h)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def f(w: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, w, (one[None],))[0]

    rows = torch.func.vmap(torch.func.jacrev(f), (None, 0))(weights, x)
    total = torch.zeros(len(x), 4, 4, dtype=x.dtype)
    for name, a, layer in zip(names, inputs, linears, strict=True):
        c = (a.T @ a).detach()
        edge = delta * c.trace() / len(c)
        p = edge * torch.linalg.inv(c + edge * torch.eye(len(c), dtype=c.dtype))
        j = torch.cat([rows[f"{name}.weight"], rows[f"{name}.bias"][..., None]], dim=-1)
        assert j.shape[2:] == (layer.out_features, layer.in_features + 1)
        total += torch.einsum("bpoi,ij,bqoj->bpq", j, p, j)
    return total / posterior.prior_precision


def test_covariance_predictions_and_scores_against_dense() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0.1)
    torch.manual_seed(3)
    new = torch.randn(6, 60, dtype=torch.float64)
    want = dense_covariance(posterior, model, new, 0.1, x)
    torch.testing.assert_close(posterior.covariance(new), want, rtol=1e-8, atol=1e-12)
    closed = posterior.predict(new, "closed")
    torch.testing.assert_close(closed.variance, want.diagonal(dim1=1, dim2=2))
    centre = torch.eye(4, dtype=torch.float64) - 0.25
    centred = centre @ want @ centre
    torch.testing.assert_close(
        posterior.novelty(new, "variance"), centred.diagonal(dim1=1, dim2=2).sum(1)
    )
    natural = sum(p.numel() for p in model.parameters()) / sum(
        p.square().sum() for p in model.parameters()
    )
    scaled = centred * posterior.prior_precision / natural
    information = 0.5 * torch.logdet(torch.eye(4, dtype=torch.float64) + scaled)
    torch.testing.assert_close(posterior.novelty(new), information, rtol=1e-6, atol=1e-9)
    # Samples have that covariance, within four standard errors.
    posterior.draw(796)
    changes = posterior.predict(new, "linearised").outputs - closed.point
    found = torch.einsum("sbp,sbq->bpq", changes, changes) / len(changes)
    var = want.diagonal(dim1=1, dim2=2)
    error = ((var[:, :, None] * var[:, None] + want.square()) / len(changes)).sqrt()
    assert ((found - want).abs() <= 4.5 * error).all()


def test_sampled_and_linearised_agree_for_small_changes() -> None:
    model, x, _ = network("encoder")
    posterior = quiet(model, x, delta=1e-2, prior_precision=1e12)
    new = torch.randn(3, 5, 96, dtype=torch.float64)
    sampled, linear = posterior.predict(new), posterior.predict(new, "linearised")
    torch.testing.assert_close(
        sampled.outputs - sampled.point, linear.outputs - linear.point, rtol=1e-3, atol=1e-9
    )


def test_leverage_against_dense() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0.1)
    torch.manual_seed(3)
    new = torch.randn(6, 60, dtype=torch.float64)
    total, h, g = 0.0, x, new
    for module in model:
        if isinstance(module, nn.Linear):
            a, b = (torch.cat([t, torch.ones_like(t[:, :1])], dim=1) for t in (h, g))
            c = a.T @ a
            edge = 0.1 * c.trace() / len(c)
            inverse = torch.linalg.inv(c + edge * torch.eye(len(c), dtype=c.dtype))
            total = total + (((b @ inverse) * b).sum(1) / b.square().sum(1)).log()
        h, g = module(h), module(g)
    torch.testing.assert_close(posterior.novelty(new, "leverage"), total.detach())


@pytest.mark.parametrize("name", ["convnet", "encoder", "decoder", "lstm"])
def test_leverage_of_a_batch_is_that_of_its_examples(name: str) -> None:
    model, x, likelihood = network(name)
    posterior = quiet(model, x, likelihood, delta=0.1)
    whole = posterior.novelty(x, "leverage")
    single = torch.cat([posterior.novelty(x[i : i + 1], "leverage") for i in range(len(x))])
    torch.testing.assert_close(whole, single)


class TimeFirst(nn.Module):
    """Examples on the second axis of what the layer receives, and windows that fold them into the first."""

    def __init__(self, fold: bool) -> None:
        super().__init__()
        self.fold, self.a, self.head = fold, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.fold:  # mixed: neither axis is that of the examples
            h = self.a(x.transpose(0, 1).reshape(-1, 6)).reshape(x.shape[1], len(x), 8)
        else:
            h = self.a(x.transpose(0, 1))
        return self.head(torch.tanh(h).mean(0))


@pytest.mark.parametrize("fold", [False, True])
def test_leverage_finds_the_axis_of_the_examples(fold: bool) -> None:
    torch.manual_seed(0)
    model, x = TimeFirst(fold).double().eval(), torch.randn(5, 4, 6, dtype=torch.float64)
    posterior = quiet(model, x, delta=0.1)
    whole = posterior.novelty(x, "leverage")
    single = torch.cat([posterior.novelty(x[i : i + 1], "leverage") for i in range(5)])
    torch.testing.assert_close(whole, single)


@pytest.mark.parametrize("name", ["mlp", "convnet", "decoder"])
def test_left_out_divergence_against_refits(name: str) -> None:
    """Closed form against the posterior that is really fitted without the example, second order."""
    model, x, likelihood = network(name)
    delta = 0.05
    if name == "decoder":
        delta = 0.5
    posterior = quiet(model, x, likelihood, delta=delta, prior_precision=1.0)
    from nullbayes.moments.second import BlockMoments
    from nullbayes.posterior import layer_guarantee
    from nullbayes.posterior.layer_state import LayerState

    state = posterior._fit.state
    probes, layer_guarantee.PROBES = layer_guarantee.PROBES, 1
    try:
        generator = torch.Generator().manual_seed(0)
        one, rest = x[:1], x[1:]
        found = layer_guarantee._left_out(state, posterior.likelihood, one, None, generator)
    finally:
        layer_guarantee.PROBES = probes
    sums = [BlockMoments.zeros(b, x.device, None) for b in state.blocks.blocks]
    from nullbayes.moments.verify import seen_by

    sums, _ = seen_by(posterior.functional, state.blocks, rest)
    without = LayerState(state.functional, state.blocks, state.gathered, delta, 0, 2)
    gathered = type(state.gathered)(sums, state.gathered.members, len(rest))
    without.gathered = gathered
    without.edges = state.edges  # the edge stays; only the sums change
    # The same random direction of the output Hessian, and plain autograd for its row.
    weights = state.functional.weights(requires_grad=True)
    point = state.functional(weights, one)
    labels = point.detach().argmax(-1)
    columns = posterior.likelihood.hessian_factor(point.detach(), labels)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, len(columns), generator=generator, dtype=torch.float64)
    row = torch.autograd.grad(
        point, list(weights.values()), torch.einsum("c,c...->...", z[0], columns)
    )
    named = dict(zip(weights, row, strict=True))
    variance = 0.0
    for block, factor in zip(state.blocks.blocks, without.factors, strict=True):
        variance += float(factor.whiten(block.matrix(named)).square().sum())
    want = variance / (2 * labels[0].numel())
    if (
        name == "decoder"
    ):  # inputs of a tied layer are not taken out of its sums: a little less, never more
        assert 0.5 * want < found <= want * (1 + 1e-9)
    else:
        assert found == pytest.approx(want, rel=1e-6)


def same_posterior(a: Any, b: Any, tolerance: float = 1e-8) -> None:
    for mine, other in zip(a._fit.state.factors, b._fit.state.factors, strict=True):
        assert type(mine) is type(other)
    for index in range(2):
        mine, other = a._fit.state.change(index), b._fit.state.change(index)
        for name in mine:
            # A parameter without a free direction has rounding alone, which is compared with the weights.
            size = other[name].norm() + b.model.get_parameter(name).norm()
            assert (mine[name] - other[name]).norm() <= tolerance * size, name
    assert a.certificate.examples == b.certificate.examples


@pytest.mark.parametrize("delta", [0.0, 1e-2])
@pytest.mark.parametrize("name", ["mlp", "convnet", "decoder", "lstm"])
def test_update_remove_and_merge_equal_refits(name: str, delta: float) -> None:
    model, x, likelihood = network(name)
    a, b = x[: len(x) // 2], x[len(x) // 2 :]
    whole = quiet(model, x, likelihood, delta=delta, prior_precision=5.0)
    first = quiet(model, a, likelihood, delta=delta, prior_precision=5.0)
    second = quiet(model, b, likelihood, delta=delta, prior_precision=5.0)
    merged = first.merged(second)
    same_posterior(merged, whole)
    assert first.certificate.examples == len(a)
    same_posterior(first.update([b], progress=False), whole)
    same_posterior(first.remove([b], progress=False), quiet(model, a, likelihood, delta=delta))
    same_posterior(first.update(b, progress=False).remove(a, progress=False), second)


def test_removing_what_was_never_there() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=1e-2)
    before = posterior._fit
    stranger = torch.randn(3, 60, dtype=torch.float64)
    with pytest.raises(InputError, match="2 of 3 examples are not in this posterior"):
        posterior.remove(torch.cat([x[:1], stranger[:2]]), progress=False)
    with pytest.raises(InputError, match="2 of 2 examples"):  # once added, twice removed
        posterior.remove(torch.cat([x[:1], x[:1]]), progress=False)
    with pytest.raises(InputError, match="all examples"):
        posterior.remove(x, progress=False)
    # Where the filter of hashes says yes by chance, the sums say no.
    posterior._fit.gathered.members.add(10 * stranger)
    with pytest.raises(InputError, match="would not be positive"):
        posterior.remove(10 * stranger, progress=False)
    assert posterior._fit is before
    assert before.gathered.examples == 20


def test_bad_input_is_named_and_loses_nothing() -> None:
    model, x, _ = network("mlp", torch.float32)
    posterior = nb.LayerNullSpacePosterior(model)
    with pytest.raises(NotFittedError, match="fit"):
        posterior.predict(x)
    with pytest.raises(InputError, match="no batches"):
        posterior.fit([], progress=False)
    with pytest.raises(InputError, match="no examples"):
        posterior.fit([x[:0]], progress=False)
    with pytest.raises(NonFiniteError, match="batch 1"):
        posterior.fit([x, x / 0], progress=False)
    posterior.fit(x, 2, progress=False)
    before = posterior._fit
    overflow = nn.Sequential(
        nn.Linear(60, 80), nn.Threshold(-1e30, torch.inf), nn.Linear(80, 4)
    ).eval()
    overflow[0].weight.data.mul_(1e35)
    with pytest.raises(NonFiniteError, match=r"layer with '2\.weight' hold NaN or infinity"):
        nb.LayerNullSpacePosterior(overflow).fit(x, progress=False)
    with pytest.raises(NonFiniteError):
        posterior.update(x * torch.nan, progress=False)
    with pytest.raises(InputError, match="forward pass failed"):
        posterior.update(x[:, :5], progress=False)
    assert posterior._fit is before
    for wrong in (-1.0, "much", None, True, float("nan")):
        with pytest.raises(InputError, match="delta"):
            nb.LayerNullSpacePosterior(model, delta=wrong)
    with pytest.raises(InputError, match="prior_precision"):
        nb.LayerNullSpacePosterior(model, prior_precision="evidence")
    with pytest.raises(InputError, match="method"):
        posterior.predict(x, "exact")
    with pytest.raises(InputError, match="score"):
        posterior.novelty(x, "newness")
    noisy = nn.Sequential(nn.Linear(60, 4), nn.Dropout(0.5))
    with pytest.raises(ModelError, match="training mode"):
        nb.LayerNullSpacePosterior(noisy).fit(x, progress=False)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ModelError, match="changed since"):
        posterior.predict(x)


def test_regression_without_labels_or_noise_says_what_it_needs() -> None:
    model, x, _ = network("mlp")
    with pytest.raises(InputError, match="no targets"):
        quiet(model, x, "regression")
    posterior = quiet(model, x, nb.Regression(noise_variance=0.1), delta=0)
    assert posterior.certificate.held
    y = model(x).detach() + 0.1
    fitted = quiet(model, (x, y), "regression", delta=1e-2)
    assert fitted.certificate.held
    assert fitted.predict(x[:2]).aleatoric[0, 0] == pytest.approx(0.01, rel=1e-3)


def test_seeds_batches_and_forms_of_data() -> None:
    model, x, _ = network("mlp")
    whole = quiet(model, x, delta=1e-2, prior_precision=1.0)
    forms: list[Any] = [
        [x[:7], x[7:]],
        ((x[i : i + 3],) for i in range(0, 20, 3)),
        [{"input": x}],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(20).long()), 6),
    ]
    for form in forms:
        same_posterior(quiet(model, form, delta=1e-2, prior_precision=1.0), whole)
    other = quiet(model, x, delta=1e-2, prior_precision=1.0, seed=1)
    assert not torch.equal(
        other._fit.state.change(0)["0.weight"], whole._fit.state.change(0)["0.weight"]
    )
    few = next(iter(whole.sample(1)))
    many = next(iter(whole.sample(9)))
    assert all(torch.equal(few[n], many[n]) for n in few)


@pytest.mark.parametrize("name", ["mlp", "decoder", "lstm"])
def test_files(name: str, tmp_path: Path) -> None:
    model, x, likelihood = network(name)
    posterior = quiet(model, x, likelihood, delta=1e-2)
    path = tmp_path / "layers.safetensors"
    posterior.save(path)
    loaded = nb.load(path, model)
    assert isinstance(loaded, nb.LayerNullSpacePosterior)
    same_posterior(loaded, posterior, 0.0)
    assert loaded.certificate == posterior.certificate
    torch.testing.assert_close(loaded.predict(x).mean, posterior.predict(x).mean, rtol=0, atol=0)
    for score in ("leverage",) if name == "decoder" else ("leverage", "information"):
        mine, other = loaded.novelty(x, score), posterior.novelty(x, score)
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    loaded.prior_precision = 2 * posterior.prior_precision
    assert loaded.certificate.divergence == pytest.approx(posterior.certificate.divergence / 2)
    loaded.remove(x[:1], progress=False)
    assert loaded.certificate.examples == len(x) - 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError):
        nb.load(damaged, model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(StorageError, match="other weights"):
        nb.load(path, model)


def test_calibration_raises_or_lowers_the_prior_precision() -> None:
    model, x, _ = network("mlp", torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(30)  # wrong, and sure of it: wider functions score better
    posterior = quiet(model, x, delta=1e-2)
    start = posterior.prior_precision
    torch.manual_seed(5)
    new = torch.randn(200, 60)
    path = posterior.calibrate([(new, torch.randint(0, 4, (200,)))], progress=False)
    assert path.nll[path.chosen] == min(path.nll)
    assert posterior.certificate.divergence <= 0.005
    # The path asks for wider functions than the guarantee allows; it is the guarantee that decides.
    assert path.prior_precision[path.chosen] < posterior.prior_precision
    assert posterior.prior_precision == pytest.approx(start, rel=0.2)
    # Labels that the network always has right ask for narrower ones.
    right = model(new).argmax(1)
    with pytest.warns(nb.NullBayesWarning):
        path = posterior.calibrate([(new, right)], progress=False)
    assert posterior.prior_precision == path.prior_precision[path.chosen] > start


def test_fine_tuning_inside_the_null_space() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0)
    projector = posterior.projector()
    with torch.no_grad():
        point = model(x)
    torch.manual_seed(0)
    new, labels = torch.randn(10, 60, dtype=torch.float64), torch.arange(10) % 4
    optimiser = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    stop = projector.attach(optimiser)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(new), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    with torch.no_grad():
        assert (model(x) - point).abs().max() < 1e-9 * point.abs().max()
    assert losses[-1] < 0.1 * losses[0]
    stop()
    with pytest.raises(ModelError, match="changed since"):
        posterior.update(new, progress=False)
    posterior.follow().update(
        new, progress=False
    )  # the sums of the old data stand: none are needed
    same_posterior(posterior, quiet(model, torch.cat([x, new]), delta=0, prior_precision=1.0))
    optimiser.step()
    with pytest.raises(ModelError, match="moved by"):
        posterior.follow()
    with torch.no_grad():
        assert (model(x) - point).abs().max() > 1e-3 * point.abs().max()
    gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    once = projector.project(gradients)
    twice = projector.project(once)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value)
    with pytest.raises(InputError, match="no parameter"):
        projector.project({"nothing": torch.zeros(1)})


def test_sketched_layers_are_narrower_never_wider() -> None:
    model, x, _ = network("mlp")
    torch.manual_seed(0)
    many = torch.randn(100, 60, dtype=torch.float64) * torch.logspace(
        0, -2, 60, dtype=torch.float64
    )
    exact = quiet(model, many, delta=1e-2, prior_precision=1.0)
    sketched = quiet(model, many, delta=1e-2, prior_precision=1.0, memory=60_000)
    reports = {r.name: r for r in sketched.certificate.layers}
    assert reports["0.weight"].sketch_error is not None
    assert "sketched" in sketched.certificate.verdict
    for mine, true in zip(sketched._fit.state.factors, exact._fit.state.factors, strict=True):
        eye = torch.eye(true.root.shape[1], dtype=torch.float64)[None]
        gap = true.project(eye)[0] - mine.project(eye)[0]
        assert torch.linalg.eigvalsh((gap + gap.T) / 2).min() > -1e-9
    with pytest.raises(InputError, match="sketched"):
        sketched.remove(many[:3], progress=False)
    # Few inputs: nothing is cut off, and the null space is exact.
    few = quiet(model, x[:6], delta=0, prior_precision=1.0, memory=60_000)
    assert few.certificate.held
    assert few.certificate.free_share > 0.5
    assert {r.sketch_error for r in few.certificate.layers} <= {None, 0.0}


def test_memory_does_not_grow_with_the_data() -> None:
    model, x, _ = network("mlp")
    small = quiet(model, x, prior_precision=1.0)._fit.gathered
    large = quiet(model, [x] * 20, prior_precision=1.0)._fit.gathered
    assert sum(s.nbytes for s in small.sums) == sum(s.nbytes for s in large.sums)
    assert sum(len(group[0]) for group in large.kept) <= 128


@pytest.mark.parametrize("names", [["0.bias", "2.bias"], ["2.weight"]], ids=str)
def test_some_parameters_alone(names: list[str]) -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0.1, parameters=names, prior_precision=1.0)
    assert {n for b in posterior._fit.state.blocks.blocks for n in b.names} == set(names)
    for sample in posterior.sample(1):
        for name, parameter in model.named_parameters():
            assert torch.equal(sample[name], parameter) == (name not in names)
    rows = torch.autograd.functional.jacobian(
        lambda *w: torch.func.functional_call(model, dict(zip(names, w, strict=True)), (x[:1],))[0],
        tuple(model.get_parameter(n).detach() for n in names),
    )
    # Of one example's own inputs: closed form from the factors that plain sums give.
    want = torch.zeros(4, 4, dtype=torch.float64)
    h = torch.tanh(x @ model[0].weight.T + model[0].bias).detach()
    for name, row in zip(names, rows, strict=True):
        c = torch.tensor([[20.0]], dtype=torch.float64) if "bias" in name else h.T @ h
        edge = 0.1 * c.trace() / len(c)
        p = edge * torch.linalg.inv(c + edge * torch.eye(len(c), dtype=c.dtype))
        j = row.reshape(4, -1, len(c))
        want += torch.einsum("poi,ij,qoj->pq", j, p, j)
    torch.testing.assert_close(posterior.covariance(x[:1])[0], want)
    assert posterior.novelty(x, "leverage").isfinite().all()


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(60, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + torch.randn(len(x), 4)

    with pytest.raises(ModelError, match="draw random numbers"):
        nb.LayerNullSpacePosterior(Noisy().eval()).fit(torch.randn(9, 60), progress=False)


def test_plan_says_what_a_fit_takes() -> None:
    model, x, _ = network("mlp")
    plan = nb.LayerNullSpacePosterior(model).plan([x])
    assert plan.layers == {"0.weight": (1, 80, 61), "2.weight": (1, 80, 81), "4.weight": (1, 4, 81)}
    assert plan.memory == 3 * 8 * (61**2 + 2 * 81**2)
    assert plan.seconds(1000) > 0
    assert "fixed" in str(plan)
