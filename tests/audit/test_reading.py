"""Loaders that give other data each time, and outputs that look like probabilities: said; their near misses: not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nullbayes as nb
from nullbayes.audit.reading import numbers_of

N = 12


def data(classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=generator), torch.arange(N) % classes


def network(*last: nn.Module, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs), *last).eval()


def told(
    model: nn.Module, loader: Any, likelihood: Any = "auto", **options: Any
) -> tuple[str, str]:
    """Warnings, and notes of the certificate, of one fit."""
    asked = {"preserve": "outputs", "prior_precision": 1.0, "delta": 1e-3}
    if likelihood != "auto":
        asked["likelihood"] = likelihood
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        posterior = nb.NullSpacePosterior(model, **asked).fit(loader, 2, progress=False, **options)
    loud = [str(w.message) for w in seen if issubclass(w.category, nb.NullBayesWarning)]
    return "\n".join(loud), "\n".join(posterior.certificate.notes)


# -- the loader --------------------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Noise from torch, NumPy-free; ``fixed``: the same noise for each example, every time."""

    def __init__(self, fixed: bool = False, labels_only: bool = False) -> None:
        self.x, self.y = data()
        self.fixed, self.labels_only = fixed, labels_only

    def __len__(self) -> int:
        return N

    def __getitem__(self, n: int) -> Any:
        if self.labels_only:
            return self.x[n], torch.rand(3).softmax(0)
        generator = torch.Generator().manual_seed(n) if self.fixed else None
        return self.x[n] + 0.1 * torch.randn(4, generator=generator), self.y[n]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("labels_only", [True, False])
def test_random_augmentation_is_said(shuffle: bool, labels_only: bool) -> None:
    loader = DataLoader(Augmented(labels_only=labels_only), batch_size=5, shuffle=shuffle)
    loud, notes = told(network(), loader)
    assert "gave 5 examples in 5 that were not there before" in loud
    assert "it changes them each time" in loud and "it changes them each time" in notes
    assert "without random transforms" in notes


def test_augmentation_is_found_without_another_reading_where_noise_is_estimated() -> None:
    """The observation noise takes a reading of its own: the two that there are, are compared whole."""
    x, _ = data()
    readings: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            readings.append(1)
            for part in (x + 0.1 * torch.randn(x.shape)).split(5):
                yield part, part[:, :2].clone()

    loud, _ = told(network(outputs=2), Loader(), "regression")
    assert f"gave {N} examples in {N}" in loud and len(readings) == 2


SAME: dict[str, Callable[[], Any]] = {
    "list": lambda: list(zip(*(t.split(5) for t in data()), strict=True)),
    "shuffled": lambda: DataLoader(TensorDataset(*data()), batch_size=5, shuffle=True),
    "fixed noise": lambda: DataLoader(Augmented(fixed=True), batch_size=5, shuffle=True),
    "mapping": lambda: [{"input": data()[0], "labels": data()[1]}],
    "arrays": lambda: data(),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("limit", [None, 7])
def test_no_false_alarm_for_the_same_data_in_another_order(kind: str, limit: int | None) -> None:
    loud, notes = told(network(), SAME[kind](), max_examples=limit)
    assert not loud and "read again" not in notes.lower()


def test_what_is_left_out_each_time_is_a_note_and_no_warning() -> None:
    x, y = data()

    class Dropping:
        turn = 0

        def __iter__(self) -> Any:
            self.turn += 1
            kept = torch.arange(N).roll(2 * self.turn)[: N - 2]
            yield from zip(x[kept].split(5), y[kept].split(5), strict=True)

    loud, notes = told(network(), Dropping())
    assert not loud
    assert "gave 2 examples in 5" in notes and "What it left out is not preserved" in notes
    loud, notes = told(network(), Dropping(), max_examples=5)
    assert not loud and "`max_examples=5` preserves is a matter of chance" in notes


@pytest.mark.parametrize("ending", [RuntimeError, StopIteration])
def test_a_loader_that_can_be_read_once_only_fits(ending: type[Exception]) -> None:
    x, y = data()

    class Once:
        read = False

        def __iter__(self) -> Any:
            if self.read and ending is RuntimeError:
                raise ending("the stream is at its end")
            once = [] if self.read else list(zip(x.split(5), y.split(5), strict=True))
            self.read = True
            return iter(once)

    loud, notes = told(network(), Once())
    assert not loud and "read again" not in notes.lower()


def test_numbers_tell_examples_apart_and_not_batches() -> None:
    x, y = data()
    mask = torch.tril(torch.ones(N, N, dtype=torch.bool))
    whole = numbers_of((x, y))
    assert len(set(whole)) == N
    order = torch.arange(N).flip(0)
    assert numbers_of((x[order], y[order])) == whole[::-1]
    assert numbers_of((x[:3], y[:3])) + numbers_of((x[3:], y[3:])) == whole
    assert numbers_of((x[order], mask, y[order])) == numbers_of((x, mask, y))[::-1]
    changed = x.clone()
    changed[4, 2] = torch.nextafter(changed[4, 2], torch.tensor(9.0))
    differing = [a != b for a, b in zip(numbers_of((changed, y)), whole, strict=True)]
    assert differing == [n == 4 for n in range(N)]
    swapped = x.clone()
    swapped[4] = x[4].flip(0)
    assert numbers_of((swapped, y))[4] != whole[4]
    assert numbers_of({"a": x, "y": y}) != [] and numbers_of("text") == []


# -- probabilities -----------------------------------------------------------------------------------------


class Last(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, h: Tensor) -> Tensor:
        return self.run(h)


def _normalised(h: Tensor) -> Tensor:
    return h.exp() / h.exp().sum(1, keepdim=True)


LIKE_PROBABILITIES: dict[str, tuple[Any, str]] = {
    "softmax": (nn.Softmax(1), "ends with a softmax"),
    "softmax, arranged": (
        Last(lambda h: h.unsqueeze(1).softmax(-1).squeeze(1)),
        "ends with a softmax",
    ),
    "normalised by hand": (Last(_normalised), "sum to one"),
    "sigmoid": (nn.Sigmoid(), "ends with a sigmoid"),
}
LOGITS: dict[str, Any] = {
    "plain": nn.Identity(),
    "log softmax": nn.LogSoftmax(1),
    "between 0 and 1": Last(lambda h: h.sigmoid() * 0.9 + 0.05),
    "sum to one": Last(lambda h: h - h.mean(1, keepdim=True) + 1 / 3),
    "a gate": Last(lambda h: h * h.softmax(1)),
    "softmax inside": nn.Sequential(nn.Softmax(1), nn.Linear(3, 3)),
    "nearly one": Last(lambda h: 1.01 * h.softmax(1)),
}


@pytest.mark.parametrize("kind", LIKE_PROBABILITIES)
def test_outputs_like_probabilities_are_said(kind: str) -> None:
    x, y = data()
    last, words = LIKE_PROBABILITIES[kind]
    loud, notes = told(network(last), list(zip(x.split(5), y.split(5), strict=True)))
    assert words in loud and words in notes
    assert "takes logits and applies a softmax itself" in loud and "forward=lambda" in loud


@pytest.mark.parametrize("kind", LOGITS)
def test_no_false_alarm_for_logits(kind: str) -> None:
    x, y = data()
    loud, notes = told(network(LOGITS[kind]), list(zip(x.split(5), y.split(5), strict=True)))
    assert not loud and "probabilities" not in notes


def test_binary_targets_and_a_sigmoid() -> None:
    x, y = data(2)
    y = y.float()[:, None]
    loud, _ = told(network(nn.Sigmoid(), outputs=1), [(x, y)], "binary")
    assert "ends with a sigmoid" in loud and "torch.logit" in loud
    loud, _ = told(network(outputs=1), [(x, y)], "binary")
    assert not loud


def test_regression_on_probabilities_and_losses_of_ones_own_are_no_case() -> None:
    x, _ = data()
    loud, _ = told(network(nn.Softmax(1)), [(x, torch.rand(N, 3).softmax(1))], "regression")
    assert not loud
    own = nb.NullSpacePosterior(
        network(nn.Softmax(1)), loss=lambda out, y: -out.log().gather(1, y[:, None])[:, 0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.fit([data()], 2, progress=False)


def test_the_mend_that_is_named_mends() -> None:
    x, y = data()
    plain = network()
    wrapped = nn.Sequential(*plain, nn.Softmax(1))
    logits = nb.NullSpacePosterior(plain, prior_precision=1.0).fit([(x, y)], 2, progress=False)
    mended = nb.NullSpacePosterior(
        wrapped,
        prior_precision=1.0,
        forward=lambda model, x: torch.log(model(x).clamp(1e-6, 1 - 1e-6)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended.fit([(x, y)], 2, progress=False)
    torch.testing.assert_close(mended.predict(x).mean, logits.predict(x).mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_to_the_longest_text_of_a_batch_makes_no_other_texts(side: str) -> None:
    """As the collators of transformers do, labels and a decoder's inputs included."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 9, (n,), generator=generator) for n in (3, 5, 2, 4)]

    def batch(order: list[int]) -> dict[str, Tensor]:
        def padded(rows: list[Tensor], value: int, side: str = side) -> Tensor:
            most = max(map(len, rows))
            filled = [torch.full((most - len(r),), value) for r in rows]
            pairs = zip(filled, rows, strict=True)
            return torch.stack([torch.cat(p if side == "left" else p[::-1]) for p in pairs])

        some = [texts[i] for i in order]
        labels = padded([t.flip(0)[:2] for t in some], -100, "right")
        return {
            "input_ids": padded(some, 0),
            "attention_mask": padded([torch.ones_like(t) for t in some], 0),
            "labels": labels,
            "decoder_input_ids": labels.clamp(min=0),
        }

    whole = numbers_of(batch([0, 1, 2, 3]))
    assert len(set(whole)) == 4
    assert numbers_of(batch([2, 0])) + numbers_of(batch([3, 1])) == [whole[i] for i in (2, 0, 3, 1)]
    other = batch([0, 1])
    other["input_ids"][1, -1 if side == "left" else 0] += 1  # a token, and no padding
    changed = numbers_of(other)
    assert changed[0] == whole[0]
    assert changed[1] != whole[1]
    turned = batch([0, 1])
    turned["labels"] = turned["labels"].flip(1)
    assert numbers_of(turned)[0] != whole[0]
