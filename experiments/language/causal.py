"""A small GPT-2 trained here on the same texts: it names the topic as one of six tokens, and it knows free text.

A text, a question mark, and the answer; the loss is that of all tokens, the answer's once more. ``nb.Choices`` makes a
classifier of the answers; with ``preserve="loss"`` the loss of each training text stands, with ``"token-loss"`` that of
each of its tokens.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from experiments.devices import device
from experiments.language import encoder
from experiments.language.methods import at_temperature, tempered
from experiments.language.problem import Problem, Row, Size, nll, remembered
from experiments.methods.base import Draws, tune
from experiments.networks import identity
from experiments.runner import Unavailable
from nullbayes.errors import NullBayesWarning
from nullbayes.likelihood.helpers import mirrored

IGNORED = -100
UNKNOWN = 1  # 0: no token
RATE, BATCH = 3e-3, 32
PREDICTED = 8  # texts of a batch of free text: each has outputs (S, T, V)
KEPT = 16  # training texts of a batch
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Of the network and its training."""

    known: int
    width: int
    depth: int
    words: int
    epochs: int
    texts: int  # that free text is preserved of


def sized(size: Size) -> tuple[Size, Shape]:
    """What this model has: in smaller settings more texts than the encoder, since it costs less."""
    if size.limit is None:
        return size, Shape(2000, 96, 3, 32, 15, 200)
    if size.seeds > 1:
        own = replace(size, limit=120, sets=30, test=150, samples=12, validation=100)
        return own, Shape(600, 32, 2, 16, 30, 30)
    own = replace(size, limit=60, sets=20, test=60, samples=8, validation=60)
    return own, Shape(400, 32, 1, 16, 15, 20)


class Reader:
    """The texts of a problem as this model reads them: the tokens that are frequent in training, and no others."""

    def __init__(self, problem: Problem, shape: Shape) -> None:
        self.shape, self.classes = shape, int(problem.train.targets.max()) + 1
        settings, _ = encoder.pretrained()
        counts = torch.bincount(problem.train.inputs.flatten(), minlength=settings["vocab_size"])
        counts[:103] = 0  # padding, marks of the tokenizer
        often = counts.argsort(descending=True, stable=True)[: shape.known - 2]
        often = often[counts[often] > 0]
        self.index = torch.full((settings["vocab_size"],), UNKNOWN)
        self.index[:103] = 0
        self.index[often] = torch.arange(2, 2 + len(often))
        self.ask = shape.known
        self.answers = [shape.known + 1 + k for k in range(self.classes)]

    def words(self, tokens: Tensor) -> Tensor:
        """``(N, words)`` without the tokenizer's marks, 0 behind."""
        own = self.index[tokens]
        order = (own == 0).long().argsort(dim=1, stable=True)
        return own.gather(1, order)[:, : self.shape.words]

    def prompts(self, tokens: Tensor) -> Inputs:
        """Texts and the question mark, which stands at the end of each."""
        words = self.words(tokens)
        ids = torch.cat([words, torch.zeros(len(words), 1, dtype=torch.int64)], 1)
        ids[torch.arange(len(ids)), (words > 0).sum(1)] = self.ask
        return _placed({"input_ids": ids, "attention_mask": (ids > 0).long()})

    def free(self, tokens: Tensor) -> Inputs:
        """Texts alone; labels are their own tokens."""
        ids = self.words(tokens)
        labels = ids.masked_fill(ids == 0, IGNORED)
        return _placed({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})

    def whole(self, tokens: Tensor, targets: Tensor) -> Inputs:
        """Texts, the question mark and the answer, which are all to be said."""
        found = self.prompts(tokens)
        ids = torch.nn.functional.pad(found["input_ids"], (0, 1))
        rows = torch.arange(len(ids), device=ids.device)
        answer = torch.tensor(self.answers, device=ids.device)[targets.to(ids.device)]
        ids[rows, (ids > 0).sum(1)] = answer
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": ids.masked_fill(ids == 0, IGNORED),
        }


def _placed(inputs: Inputs) -> Inputs:
    return {k: v.to(device()) for k, v in inputs.items()}


@dataclass(frozen=True)
class Asked:
    """A trained model with its texts."""

    problem: Problem
    shape: Shape

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.problem, self.shape)

    @cached_property
    def model(self) -> nn.Module:
        """GPT-2 from its configuration, trained; in evaluation mode."""
        return self.member(0)

    def member(self, number: int) -> nn.Module:
        """The model (0), and others of the same recipe from other weights and orders of texts."""
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            raise Unavailable(
                "transformers is missing: `pip install 'nullbayes[experiments]'`"
            ) from error
        settings: dict[str, Any] = {
            "vocab_size": self.shape.known + 1 + self.reader.classes,
            "n_positions": self.shape.words + 2, "n_embd": self.shape.width,
            "n_layer": self.shape.depth, "n_head": 4,
            "pad_token_id": 0, "bos_token_id": UNKNOWN, "eos_token_id": UNKNOWN,
            "attn_implementation": "eager",
        }  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.problem.seed + 1000 * number)
            model: nn.Module = GPT2LMHeadModel(GPT2Config(**settings))
        model.to(device())
        self._train(model, self.problem.seed + 1000 * number)
        return model.eval()

    def _train(self, model: nn.Module, seed: int) -> None:
        train, where = self.problem.train, device()
        data = self.reader.whole(train.inputs, train.targets)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        steps = self.shape.epochs * -(-len(train) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout
            model.train()
            for _ in range(self.shape.epochs):
                order = torch.randperm(len(train), generator=generator).to(where)
                for rows in order.split(BATCH):
                    part = {k: v[rows] for k, v in data.items()}
                    out = model(**part)
                    last = part["attention_mask"].sum(1) - 1
                    each = torch.arange(len(last), device=where)
                    answer = nn.functional.cross_entropy(
                        out.logits[each, last - 1], part["input_ids"][each, last]
                    )
                    optimizer.zero_grad(set_to_none=True)
                    (out.loss + answer).backward()
                    optimizer.step()
                    schedule.step()


def measure_job(kind: str, seed: int, size: Size) -> dict[str, Any]:
    """One of ``running.CAUSAL``."""
    from experiments.language.running import measured, peak, where

    size, shape = sized(size)
    problem = Problem("LoRA", seed, size)  # its texts: networks play no part here
    asked = Asked(problem, shape)
    started = time.perf_counter()
    out: dict[str, Any] = {
        "way": "GPT-2",
        "group": kind,
        "network": identity(asked.model),
        "weights": sum(p.numel() for p in asked.model.parameters()),
        "train": len(problem.train),
        "device": where(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullBayesWarning)
        if kind != "free text":
            rows = choices(asked) if kind == "choices" else several(asked)
            out["rows"] = measured(problem, rows)
        else:
            rows, qualities = free_text(asked)
            out["rows"] = measured(problem, rows)
            for key, found in qualities.items():
                out["rows"][key]["quality"] = found
    return {**out, "seconds": time.perf_counter() - started, "peak device memory": peak()}


# -- one of some answers -------------------------------------------------------------------------


def choices(asked: Asked) -> dict[str, Row]:
    """The answer's own probabilities, and those of ``nb.Choices`` on all weights."""
    problem, reader = asked.problem, asked.reader
    size, train = problem.size, problem.train
    data = [
        {**reader.prompts(x), "labels": y.to(device())}
        for x, y in zip(train.inputs.split(KEPT), train.targets.split(KEPT), strict=True)
    ]
    posterior = nb.NullSpacePosterior(asked.model, nb.Choices(reader.answers))
    posterior.fit(data, size.samples, problem.seed, progress=False)

    last: list[Tensor] = []

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        if last and last[0] is x:
            return last[1], last[2]
        found = [posterior.predict(reader.prompts(part)) for part in x.split(64)]
        point = torch.cat([p.point.cpu() for p in found])
        change = torch.cat([(p.outputs - p.point).cpu() for p in found], 1)
        last[:] = [x, point, change * posterior.prior_precision**0.5]
        return last[1], last[2]

    def at(alpha: float) -> Callable[[Tensor], Draws]:
        def draws(x: Tensor) -> Draws:
            point, change = unit(x)
            return Draws(point + change * alpha**-0.5, point)

        return draws

    def network(x: Tensor) -> Draws:
        return Draws(unit(x)[0][None])

    def score(x: Tensor) -> Tensor:
        return torch.cat([posterior.novelty(reader.prompts(p)).cpu() for p in x.split(64)])

    alpha, validation = float(posterior.prior_precision), problem.validation
    point, change = unit(validation.inputs)
    best = tune(
        alpha,
        lambda values: [
            nll(Draws(point + change * a**-0.5, point), validation.targets) for a in values
        ],
    ).value
    heat = tempered(network, validation)
    details = _details(posterior)
    return {
        "point": Row("network alone", network),
        "point_temperature": Row(
            "temperature scaling", at_temperature(network, heat), {}, "temperature", heat
        ),
        "null": Row(
            "`nb.Choices`, by evidence", at(alpha), {"novelty": score}, "nothing", alpha, "novelty",
            details,
        ),
        "null_tuned": Row(
            "`nb.Choices`, tuned", at(best), {}, "prior precision", best, "variance"
        ),
    }  # fmt: skip


def several(asked: Asked) -> dict[str, Row]:
    """The same answers with dropout left on, and of several models."""
    problem, size = asked.problem, asked.problem.size
    members = [asked.model, *(asked.member(k) for k in range(1, size.members))]

    def ensemble(x: Tensor) -> Draws:
        return Draws(torch.stack([_answers(asked.reader, model, x) for model in members]))

    def dropout(x: Tensor) -> Draws:
        where = device()
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            torch.manual_seed(problem.seed)
            asked.model.train()  # nothing but dropout differs
            try:
                drawn = [_answers(asked.reader, asked.model, x) for _ in range(size.samples)]
            finally:
                asked.model.eval()
        return Draws(torch.stack(drawn))

    out: dict[str, Row] = {}
    for key, title, own in (
        ("dropout", "MC dropout", dropout),
        ("ensemble", f"{size.members} models †", ensemble),
    ):
        draws = remembered(own)
        heat = tempered(draws, problem.validation)
        out[key] = Row(title, draws)
        out[f"{key}_temperature"] = Row(
            f"{title}, temperature", at_temperature(draws, heat), {}, "temperature", heat
        )
    return out


@torch.no_grad()
def _answers(reader: Reader, model: nn.Module, x: Tensor) -> Tensor:
    """Logits ``(N, C)`` of the answers after the question mark."""
    found = []
    for part in x.split(64):
        inputs = reader.prompts(part)
        last = inputs["attention_mask"].sum(1) - 1
        logits = model(**inputs).logits[torch.arange(len(last), device=last.device), last]
        found.append(logits[:, reader.answers].cpu())
    return torch.cat(found)


def _details(posterior: Any) -> dict[str, Any]:
    certificate = posterior.certificate
    names = (
        "held", "constraints", "parameters", "rank", "row_drift", "sampled_drift", "left_out_divergence",
        "prior_precision", "evidence", "seconds", "verdict",
    )  # fmt: skip
    return {name: getattr(certificate, name) for name in names}


# -- free text -----------------------------------------------------------------------------------


def free_text(asked: Asked) -> tuple[dict[str, Row], dict[str, dict[str, float]]]:
    """Scores by row, and what the predictions of tokens are worth."""
    problem, reader = asked.problem, asked.reader
    some = problem.train.inputs[: asked.shape.texts]
    test = problem.test.inputs[: asked.shape.texts]
    rows = {"point": Row("network alone: loss by token", None, {"loss": _losses(asked)})}
    rows["point"].declared = "loss"
    qualities = {"point": {"nll": float(_losses(asked)(test).mean())}}
    for key, title, preserve in (
        ("null_loss", 'null space, `preserve="loss"`', "loss"),
        ("null_token", 'null space, `preserve="token-loss"`', "token-loss"),
    ):
        posterior = nb.NullSpacePosterior(asked.model, preserve=preserve)
        data = [reader.free(part) for part in some.split(PREDICTED)]
        posterior.fit(data, problem.size.samples, problem.seed, progress=False)
        score = _novelty(posterior, reader)
        rows[key] = Row(title, None, {"novelty": score}, declared="novelty")
        rows[key].value, rows[key].details = posterior.prior_precision, _details(posterior)
        qualities[key] = {
            "nll": _of_tokens(posterior, reader, test)["nll"],
            **{f"training {k}": v for k, v in _of_tokens(posterior, reader, some).items()},
        }
    return rows, qualities


def _losses(asked: Asked) -> Callable[[Tensor], Tensor]:
    """Mean loss of a text's tokens under the network, nats: what perplexity is the exponential of."""

    @torch.no_grad()
    def score(x: Tensor) -> Tensor:
        found = []
        for part in x.split(64):
            inputs = asked.reader.free(part)
            labels = inputs.pop("labels")[:, 1:]
            logits = asked.model(**inputs).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            found.append((loss.sum(1) / (labels != IGNORED).sum(1).clamp_min(1)).cpu())
        return torch.cat(found)

    return score


def _novelty(posterior: Any, reader: Reader) -> Callable[[Tensor], Tensor]:
    """The default score of a text; of one for each token, their mean over the text."""

    def score(x: Tensor) -> Tensor:
        found = []
        for part in x.split(PREDICTED):
            inputs = reader.free(part)
            del inputs["labels"]
            values = posterior.novelty(inputs).cpu()
            if values.ndim > 1:
                there = inputs["attention_mask"].cpu()[:, : values.shape[1]].to(values.dtype)
                values = (values * there).sum(1) / there.sum(1).clamp_min(1)
            found.append(values)
        return torch.cat(found)

    return score


def _of_tokens(posterior: Any, reader: Reader, x: Tensor) -> dict[str, float]:
    """NLL of a token, and how far samples move the losses of texts and of tokens: RMS, nats, to first order."""
    total: Sequence[Any] = [0.0, 0.0, 0.0, 0.0]
    for part in x.split(PREDICTED):
        inputs = reader.free(part)
        labels = inputs.pop("labels")[:, 1:]
        prediction = posterior.predict(inputs)
        kept, target = labels != IGNORED, labels.clamp_min(0)
        point, outputs = prediction.point[:, :-1], prediction.outputs[:, :, :-1]
        every = mirrored(outputs, point).softmax(-1).mean(0)
        own = every.gather(-1, target[..., None])[..., 0].clamp_min(1e-30).log()
        gradient = point.softmax(-1) - nn.functional.one_hot(target, point.shape[-1])
        change = ((outputs - point) * gradient).sum(-1) * kept
        total = [
            total[0] - float(own[kept].sum()),
            total[1] + int(kept.sum()),
            total[2] + float(change.square().mean(0).sum()),
            total[3] + float(change.sum(-1).square().mean(0).sum()),
        ]
    return {
        "nll": total[0] / total[1],
        "change of a token": (total[2] / total[1]) ** 0.5,
        "change of a text": (total[3] / len(x)) ** 0.5,
    }
