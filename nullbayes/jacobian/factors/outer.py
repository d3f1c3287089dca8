"""Sums of outer products over token axes: the rows of linear and convolution layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from nullbayes.common.eight_bits import packed_in
from nullbayes.common.memory import times_on, working_bytes
from nullbayes.jacobian.factors import contraction
from nullbayes.jacobian.factors import products as sizes
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.outer_costs import OuterCosts
from nullbayes.jacobian.factors.products import product
from nullbayes.model.parameters import Slot

# Elements of a temporary that is read again at once: small enough to come from the cache (16 MB of
# float32), and from memory that the allocator keeps instead of asking the system for new pages.
NEAR_ELEMENTS = 4 * 2**20
# Multiplications of one sample with one layer up to which the weights of all samples are copied
# side by side, for one product of all of them. Above, each is multiplied where it lies: the copy
# would be as large as the samples.
COPIED_PRODUCT = 4 * 2**20
# Uses of each weight from which a copy of no more than so many numbers is worth it as well.
COPY_USES = 128
# What a multiplication by way of written-out rows costs in those of a large product: they are
# shaped less well, and every row is written and read once (measured 1.2 to 2).
ROWS_PENALTY = 1.4
# Rows of an example from which products take one example at a time; of 3 rows that takes 1.5 to 2 times as long as
# of 16 examples at once.
ALONE = 16


def near_elements(device: torch.device) -> int:
    """``NEAR_ELEMENTS``, more on an accelerator, or fewer where a budget asks for it."""
    return min(NEAR_ELEMENTS * times_on(device), max(1, working_bytes(device) // 32))


class OuterFactor(OuterCosts):
    """Rows ``R[n, c] = Σ_t g[n, c, t] ⊗ a[n, t]`` for a weight, with its bias where they share ``g``.

    Args:
        weight: columns of the weight, laid out ``(G, O, I)``, or ``(G, I, O)`` if ``transposed``.
        bias: columns of the bias ``(G, O)``, or None. Not with ``transposed``.
        a: inputs ``(B, T, G, I)`` (``T`` tokens or positions, ``G`` groups).
        g: output gradients ``(B, C, T, G, O)``.
        bias_scale: what the constant input 1 of the bias is multiplied by.
    """

    def __init__(
        self,
        weight: Slot,
        bias: Slot | None,
        a: Tensor,
        g: Tensor,
        *,
        transposed: bool = False,
        bias_scale: float = 1.0,
    ) -> None:
        if bias is not None:
            # A bias is the weight of an input that is always one: it shares every product with g.
            one = a.new_full((*a.shape[:-1], 1), bias_scale)
            if a.is_contiguous():
                a = torch.cat([a, one], dim=-1)
            else:  # positions last in memory, as convolutions have them
                order = (0, 2, 3, 1)
                a = torch.cat([a.permute(order), one.permute(order)], dim=2).permute(0, 3, 1, 2)
        self.transposed, self.bias_scale = transposed, bias_scale
        self._hold(weight, bias, a, g)

    def _hold(self, weight: Slot, bias: Slot | None, a: Tensor, g: Tensor) -> None:
        self.weight, self.bias, self.a, self.g = weight, bias, a, g
        self.slots = (weight,) if bias is None else (weight, bias)
        self.examples, self.cotangents = g.shape[:2]
        self.tokens, self.groups = a.shape[1:3]
        self.width_in, self.width_out = a.shape[3], g.shape[4]

    def like(self, a: Tensor, g: Tensor) -> OuterFactor:
        """Of the same weights: other inputs (with the constant one of a bias) and gradients."""
        new = OuterFactor.__new__(OuterFactor)
        new.transposed, new.bias_scale = self.transposed, self.bias_scale
        new._hold(self.weight, self.bias, a, g)
        return new

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.g.nbytes

    def tensors(self) -> list[Tensor]:
        return [self.a, self.g]

    def narrow(self, start: int, stop: int) -> OuterFactor:
        return self.like(self.a[start:stop], self.g[start:stop])

    def single(self, rows: Tensor) -> OuterFactor:
        n, c = rows // self.cotangents, rows % self.cotangents
        return self.like(self.a[n], self.g[n, c][:, None])

    def joined(self, parts: Sequence[OuterFactor]) -> OuterFactor:
        tokens = max(p.tokens for p in parts)
        a = [pad(p.a, (0, 0, 0, 0, 0, tokens - p.tokens)) for p in parts]
        g = [pad(p.g, (0, 0, 0, 0, 0, tokens - p.tokens)) for p in parts]
        return self.like(torch.cat(a), torch.cat(g))

    def only(self, names: Collection[str]) -> Factor | None:
        weight = self.weight.name in names
        if self.bias is None or self.bias.name in names:
            if weight:
                return self
            if self.bias is None:
                return None
            rows = self._bias_rows().reshape(self.examples, self.cotangents, -1)
            return DenseFactor([self.bias], rows)
        if not weight:
            return None
        return OuterFactor(self.weight, None, self._inputs, self.g, transposed=self.transposed)

    def scaled(self, scales: Mapping[str, float]) -> OuterFactor:
        by_input = self.a.new_full((self.width_in,), scales[self.weight.name])
        bias_scale = self.bias_scale
        if self.bias is not None:
            by_input[-1] = scales[self.bias.name]
            bias_scale *= scales[self.bias.name]
        new = self.like(sizes.flushed(self.a * by_input), self.g)
        new.bias_scale = bias_scale
        return new

    def chunks(self, per_example: int) -> list[OuterFactor]:
        step = max(1, sizes.chunk_elements(self.device) // max(1, per_example))
        if step >= self.examples:
            return [self]
        return [self.narrow(i, min(i + step, self.examples)) for i in range(0, self.examples, step)]

    def settle(self) -> None:
        """Bring ``a`` and ``g`` into the order of their axes.

        Rows are written from any order at the same speed, so it is not done before it is needed.
        """
        self.a, self.g = self.a.contiguous(), self.g.contiguous()

    # -- products with vectors: through the rows, or layer by layer as the network itself does -----

    @property
    def _inputs(self) -> Tensor:
        """``a`` without the constant input of the bias: ``(B, T, G, I)``."""
        return self.a if self.bias is None else self.a[..., :-1]

    def _bias_rows(self) -> Tensor:
        """``(B*C, G*O)``: rows of the bias."""
        g = self.g if self.tokens == 1 else self.g.sum(2)
        return g.reshape(self.num_rows, -1) * self.bias_scale

    def products_by_rows(self, vectors: int) -> bool:
        """Whether products with so many vectors are cheaper from written-out rows.

        Multiplications per weight and example: ``C T`` to write the rows and ``C S`` to use them,
        against ``T S`` for ``a W_s`` and ``T S C / I`` to contract it with ``g``. Rows win where
        there are more positions than outputs: in the early layers of a convolutional network.
        """
        c, t, s = self.cotangents, self.tokens, vectors
        inputs = self.width_in - (self.bias is not None)
        return t > 1 and ROWS_PENALTY * c * (t + s) < t * s * (1 + c / inputs)

    def matvec(self, vectors: Tensor) -> Tensor:
        by_rows = self.products_by_rows(len(vectors)) or self._read_packed(vectors)
        if self._copies(len(vectors)) and not by_rows:
            return self._matvec_copied(vectors)
        out = (self._matvec_rows if by_rows else self._matvec_in_place)(vectors)
        if self.bias is not None:
            shifts = vectors[:, self.bias.start : self.bias.stop].to(out.dtype)
            out.addmm_(shifts, self._bias_rows().T)
        return out

    def _read_packed(self, vectors: Tensor) -> bool:
        """Whether these are samples in 8 bits, which are widened for anything but a product with a few rows."""
        simple = self.groups == 1 and not self.transposed and self.num_rows <= sizes.FEW_ROWS
        return simple and packed_in(vectors) is not None

    def rmatvec(self, weights: Tensor, out: Tensor) -> None:
        by_rows = self.products_by_rows(len(weights))
        if self._copies(len(weights)) and not by_rows:
            self._rmatvec_copied(weights, out)
            return
        (self._rmatvec_rows if by_rows else self._rmatvec_in_place)(weights, out)
        if self.bias is not None:
            out[:, self.bias.start : self.bias.stop].addmm_(weights, self._bias_rows())

    def _row_blocks(self, *, single: bool, span: int = 0) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows of the weight a piece at a time: which of the ``B*C`` rows, which columns, values.

        A piece holds the weights of some outputs (of some inputs if ``transposed``), or of some
        groups: neighbours in memory, so that a product reads vectors and writes results in place.

        Args:
            single: pieces may be of one example each, where these are large enough.
            span: outputs of a piece, of one group; 0: as many as are near.
        """
        c, t, o, i = self.cotangents, self.tokens, self.width_out, self._inputs.shape[3]
        lead, trail = (i, o) if self.transposed else (o, i)
        wide = -(-64 // c)  # rows of the products that write them: fewer would be slow
        near = near_elements(self.device)
        at_once = near // max(1, self.num_rows * trail)
        if self.groups == 1:
            groups, span = 1, min(lead, span or max(wide, at_once))
        else:
            groups, span = min(self.groups, max(1, at_once // lead)), lead
        # On an accelerator a launch for each example costs more than its product.
        large = self.groups == 1 and c * span * t * i >= sizes.ONEDNN_PRODUCT and self._on_cpu
        single = single and large
        step = 1 if single else max(1, near // (c * groups * span * trail))
        if large and not self.transposed and t > 1 and self.a.is_contiguous():
            yield from self._panels(self._inputs[:, :, 0], span, min(step, self.examples))
            return
        inputs = self._inputs.transpose(1, 2)  # (B, G, T, I)
        if large and not (inputs.is_contiguous() or inputs.mT.is_contiguous()):
            inputs = inputs.contiguous()
        for k in range(0, self.groups, groups):
            for j in range(0, lead, span):
                start = self.weight.start + (k * lead + j) * trail
                some = min(groups, self.groups - k)
                columns = slice(start, start + some * min(span, lead - j) * trail)
                for n in range(0, self.examples, step):
                    a, g = inputs[n : n + step, k : k + groups], self.g[n : n + step]
                    b, g = len(g), g[:, :, :, k : k + groups]
                    if self.transposed:
                        left = a[..., j : j + span].mT  # (b, groups, span, T)
                        right = g.permute(0, 3, 2, 1, 4).reshape(b, -1, t, c * o)
                        rows = (left @ right).unflatten(3, (c, o)).permute(0, 3, 1, 2, 4)
                    else:
                        cut = g[..., j : j + span].permute(0, 3, 1, 4, 2)
                        left = cut.reshape(b, len(cut[0]), -1, t)  # (b, groups, C*span, T)
                        if large:
                            each = [product(left[m, 0], a[m, 0].mT) for m in range(b)]
                            rows = torch.stack(each)[:, None] if b > 1 else each[0][None, None]
                        else:
                            rows = left @ a
                        rows = rows.unflatten(2, (c, -1)).transpose(1, 2)
                    rows = rows.reshape(b * c, -1)
                    yield slice(n * c, (n + b) * c), columns, rows

    @property
    def _on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def _panels(
        self, inputs: Tensor, span: int, step: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """As :meth:`_row_blocks`, of one group, into one buffer: each piece is gone when the next one comes.

        Args:
            inputs: ``(B, T, I)``, in order.
            span: outputs of a piece; ``step``: its examples.
        """
        c, o, i = self.cotangents, self.width_out, inputs.shape[2]
        buffer = inputs.new_empty(step * c * min(span, o) * i)
        for j in range(0, o, span):
            wide = min(span, o - j)
            columns = slice(self.weight.start + j * i, self.weight.start + (j + wide) * i)
            for n in range(0, self.examples, step):
                part = self.narrow(n, n + step)
                some = inputs[n : n + step]
                rows = part.write_panel(some, j, wide, buffer[: len(some) * c * wide * i])
                yield slice(n * c, (n + len(some)) * c), columns, rows

    def write_panel(self, inputs: Tensor, start: int, wide: int, into: Tensor) -> Tensor:
        """Rows of the outputs ``start: start + wide`` of one group, ``(B*C, wide·I)``, written to the memory ``into``.

        Args:
            inputs: ``(B, T, I)``: those of the weight, or with the constant one of the bias.
        """
        g = self.g[:, :, :, 0, start : start + wide]  # (B, C, T, wide)
        if len(g) == 1:  # of one example, each row by itself is as fast, and needs no copy
            out = into.view(self.cotangents, wide, inputs.shape[2])
            each = inputs.expand(self.cotangents, -1, -1)
            return torch.bmm(g[0].transpose(1, 2), each, out=out).view(self.num_rows, -1)
        left = g.transpose(2, 3).reshape(len(g), -1, self.tokens)
        out = into.view(len(g), left.shape[1], inputs.shape[2])
        return torch.bmm(left, inputs, out=out).view(self.num_rows, -1)

    def _matvec_rows(self, vectors: Tensor) -> Tensor:
        out = self.g.new_zeros(len(vectors), self.num_rows)
        if self.num_rows <= sizes.FEW_ROWS:
            # Chunks of packed samples are read whole.
            packed = packed_in(vectors)
            span = 0 if packed is None else packed.each(self.weight.start)
            for at, columns, rows in self._row_blocks(single=True, span=span):
                out[:, at] += sizes.few_rows(vectors, columns, rows)
            return out
        part, of = vectors, slice(0, 0)
        # One example's rows alone would read the vectors once for very few products.
        for at, columns, rows in self._row_blocks(single=self.cotangents >= ALONE):
            if columns != of:
                part, of = vectors[:, columns].to(out.dtype).contiguous(), columns
            out[:, at] += product(part, rows)
        return out

    def _rmatvec_rows(self, weights: Tensor, out: Tensor) -> None:
        for at, columns, rows in self._row_blocks(single=False):
            out[:, columns] += product(weights[:, at].contiguous(), rows.mT)

    def _copies(self, samples: int) -> bool:
        """Whether the weights of all ``samples`` are worth a copy, or come in no layout without one."""
        each, uses = self.width_out * self.width_in, self.examples * self.tokens
        few = samples * each <= COPIED_PRODUCT and uses >= COPY_USES
        return self.groups > 1 or self.transposed or each * uses <= COPIED_PRODUCT or few

    def _joint(self, vectors: Tensor) -> Tensor:
        """The columns of this layer as matrices ``(G, S, O, I)``, the bias as the last input."""
        s, (g, o) = len(vectors), (self.groups, self.width_out)
        w = vectors[:, self.weight.start : self.weight.stop].to(self.g.dtype)
        if self.transposed:
            return w.reshape(s, g, self.width_in, o).permute(1, 0, 3, 2)
        w = w.reshape(s, g, o, -1)
        if self.bias is not None:
            b = vectors[:, self.bias.start : self.bias.stop].reshape(s, g, o, 1).to(w.dtype)
            w = torch.cat([w, b], dim=-1)
        return w.transpose(0, 1)

    def _matvec_copied(self, vectors: Tensor) -> Tensor:
        self.settle()
        s, o = len(vectors), self.width_out
        joint = self._joint(vectors)
        matrix = joint.reshape(self.groups, s * o, self.width_in)
        out = []
        for part in self.chunks(s * self.tokens * self.groups * o):
            b, t, g, i = part.a.shape
            a = part.a.permute(2, 0, 1, 3).reshape(g, b * t, i)
            u = product(a[0], matrix[0]) if g == 1 else a @ matrix.mT  # (G, B*T, S*O)
            if g == t == 1:
                u = u.view(b, s, o).mT
            else:
                u = u.reshape(g, b, t, s, o).permute(1, 2, 0, 4, 3).reshape(b, -1, s)
            y = part.g.reshape(b, self.cotangents, -1) @ u  # (B, C, S)
            out.append(y.permute(2, 0, 1).reshape(s, -1))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def _rmatvec_copied(self, weights: Tensor, out: Tensor) -> None:
        self.settle()
        s, o = len(weights), self.width_out
        total: Tensor | None = None
        start = 0
        for part in self.chunks(s * self.tokens * self.groups * o):
            b, t, g, i = part.a.shape
            w = weights[:, start : start + part.num_rows].reshape(s, b, self.cotangents)
            start += part.num_rows
            h = w.permute(1, 0, 2) @ part.g.reshape(b, self.cotangents, -1)  # (B, S, T*G*O)
            if g == t == 1:
                h = h.view(1, b, s * o).mT
            else:
                h = h.reshape(b, s, t, g, o).permute(3, 1, 4, 0, 2).reshape(g, s * o, b * t)
            a = part.a.permute(2, 0, 1, 3).reshape(g, b * t, i)
            y = product(h[0], a[0].mT)[None] if g == 1 else h @ a  # (G, S*O, I)
            total = y if total is None else total.add_(y)
        assert total is not None
        joint = total.reshape(self.groups, s, o, self.width_in).transpose(0, 1)  # (S, G, O, I)
        if self.transposed:
            joint = joint.transpose(2, 3)
        elif self.bias is not None:
            out[:, self.bias.start : self.bias.stop] += joint[..., -1].reshape(s, -1)
            joint = joint[..., :-1]
        out[:, self.weight.start : self.weight.stop] += joint.reshape(s, -1)

    def _matvec_in_place(self, vectors: Tensor) -> Tensor:
        self.settle()
        o, c = self.width_out, self.cotangents
        w = vectors[:, self.weight.start : self.weight.stop].unflatten(1, (o, -1))  # (S, O, I)
        out = self.g.new_empty(len(vectors), self.num_rows)
        start = 0
        for part in self.chunks(self.tokens * o):
            b = part.examples
            a, g = part._inputs.flatten(0, 2).contiguous(), part.g.reshape(b, c, -1)
            step = max(1, near_elements(self.device) // (len(a) * o))
            for k, some in zip(range(0, len(w), step), w.split(step), strict=True):
                some = some.to(a.dtype)
                each = [product(a, one) for one in some] if self._on_cpu else []
                u = torch.stack(each) if each else a @ some.mT  # (s, B*T, O)
                y = torch.bmm(g, u.view(len(some), b, -1).permute(1, 2, 0))  # (B, C, s)
                out[k : k + step, start : start + b * c] = y.permute(2, 0, 1).flatten(1)
            start += b * c
        return out

    def _rmatvec_in_place(self, weights: Tensor, out: Tensor) -> None:
        self.settle()
        o, c = self.width_out, self.cotangents
        to = out[:, self.weight.start : self.weight.stop].unflatten(1, (o, -1))  # (S, O, I)
        start = 0
        for part in self.chunks(self.tokens * o):
            b = part.examples
            a, g = part._inputs.flatten(0, 2).contiguous(), part.g.reshape(b, c, -1)
            w = weights[:, start : start + b * c].unflatten(1, (b, c)).transpose(0, 1)  # (B, S, C)
            step = max(1, near_elements(self.device) // (len(a) * o))
            for k in range(0, len(weights), step):
                h = torch.bmm(w[:, k : k + step], g).transpose(0, 1)  # (s, B, T*O)
                h = h.reshape(len(h), -1, o).contiguous()
                if not self._on_cpu:
                    to[k : k + step] += h.mT @ a
                    continue
                for into, one in zip(to[k : k + step], h, strict=True):
                    into += product(one.mT, a.mT)
            start += b * c

    @property
    def as_outer(self) -> OuterFactor | None:
        return self

    def own_products(self) -> Tensor:
        c, t, i, o = self.cotangents, self.tokens, self.width_in, self.width_out
        if t * (i + c * c * o) * t > c * o * i * (t + c):  # cheaper from written-out rows
            return super().own_products()
        out = torch.zeros(self.examples, c, c, dtype=torch.float64, device=self.g.device)
        for k in range(self.groups):
            a, g = self.a[:, :, k].double(), self.g[:, :, :, k].double()  # (B, T, I), (B, C, T, O)
            inputs = a @ a.mT
            grads = g.flatten(1, 2) @ g.flatten(1, 2).mT
            shaped = grads.view(-1, c, t, c, t).mul_(inputs[:, None, :, None])
            out += shaped.sum((2, 4))
        return out

    def squared_norms(self) -> Tensor:
        if self.tokens > 1:
            return super().squared_norms()
        a = self.a[:, 0].double().square().sum(2)  # (B, G)
        g = self.g[:, :, 0].double().square().sum(3)  # (B, C, G)
        return (a[:, None] * g).sum(2).reshape(-1)

    def rows(self) -> Tensor:
        out = self.a.new_empty(self.num_rows, self.columns)
        for at, columns, rows in self._row_blocks(single=True):
            out[at, columns.start - self.weight.start : columns.stop - self.weight.start] = rows
        if self.bias is not None:
            out[:, self.weight.numel :] = self._bias_rows()
        return out

    def dense(self) -> DenseFactor:
        values = self.rows().reshape(self.examples, self.cotangents, -1)
        return DenseFactor(self.slots, values)

    def gram(self, other: Factor) -> Tensor:
        assert isinstance(other, OuterFactor)
        if self.tokens == 1 and other.tokens == 1:
            return contraction.single(self, other)
        if self.gram_by_rows:
            return contraction.by_rows(self, other)
        folded = contraction.folded_cost(self) <= contraction.pairs_cost(self)
        return (contraction.folded if folded else contraction.by_pairs)(self, other)
