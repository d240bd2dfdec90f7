"""Hadamard matrices of many orders, products with them, and steps that do it while a model runs.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows. Of order 2^k they are Sylvester's, of others Paley's
(from the squares of a finite field), and of order 2^k m the Kronecker product of both; multiplying by one takes
n (k + m) additions instead of n^2.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from posttrain.compress.packed.inputs import InputStep
from posttrain.trajectory import PosttrainError


def exists(order: int) -> bool:
    """Whether `hadamard` can make one of that order."""
    return _split(order) is not None


def hadamard(order: int) -> Tensor:
    """`[order, order]` fp64 of 1 and -1 with H H^T = order I."""
    core, doublings = _parts(order)
    plain = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(doublings):
        plain = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), plain)
    return torch.kron(core, plain)


def multiplied(x: Tensor) -> Tensor:
    """`[..., n]` -> H x / sqrt(n) of each vector: an orthogonal map that spreads single large entries over all.

    To undo it in a linear layer that reads the result, its weight is replaced by W H^T / sqrt(n), which is the same
    function of the weight's rows.
    """
    order = x.shape[-1]
    core, doublings = _parts(order)
    y = x.reshape(-1, len(core), 2**doublings)
    for k in range(doublings):
        pairs = y.reshape(-1, 2, 2**k)
        y = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
    y = y.reshape(-1, len(core), 2**doublings)
    if len(core) > 1:
        y = core.to(y) @ y
    return (y / math.sqrt(order)).reshape(x.shape)


class HadamardStep(InputStep):
    """Inputs multiplied by a Hadamard matrix.

    heads: 0 for all channels together; else the channels are those of that many heads, and channel i of all heads is
    mixed (what is left to do when each head was multiplied before, with the weights).
    """

    kind = "hadamard"

    def __init__(self, width: int, heads: int = 0) -> None:
        super().__init__(width)
        self.heads = heads
        _parts(heads or width)

    def settings(self) -> dict[str, Any]:
        return {"heads": self.heads}

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs.float()
        return (across(x, self.heads) if self.heads else multiplied(x)).to(inputs.dtype)


def across(x: Tensor, heads: int) -> Tensor:
    """`[..., heads * d]` multiplied along the heads."""
    return multiplied(x.unflatten(-1, (heads, -1)).transpose(-1, -2)).transpose(-1, -2).reshape(x.shape)


# -- construction ----------------------------------------------------------------------------------------------------


def _parts(order: int) -> tuple[Tensor, int]:
    """The matrix of the smallest core m, and k, of order = 2^k m."""
    found = _split(order)
    if found is None:
        raise PosttrainError(
            f"no Hadamard matrix of order {order} is known here; they exist for 1, 2 and (most) multiples of 4, such "
            f"as {', '.join(str(n) for n in _near(order))}"
        )
    core, doublings = found
    return (torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)), doublings


def _near(order: int) -> list[int]:
    below = next((n for n in range(order, 0, -1) if exists(n)), 1)
    return [below, next(n for n in itertools.count(order + 1) if exists(n))]


@functools.cache
def _split(order: int) -> tuple[int, int] | None:
    """(m, k) of order = 2^k m with the smallest m whose matrix Paley's constructions give."""
    if order < 1:
        return None
    most = (order & -order).bit_length() - 1
    for doublings in range(most, -1, -1):
        core = order >> doublings
        if core == 1 or _field_of(core) is not None:
            return core, doublings
    return None


def _field_of(order: int) -> int | None:
    """The size of the field that Paley's constructions make a matrix of that order from."""
    if order % 4:
        return None
    if _prime_power(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _prime_power(half) else None


@functools.cache
def _paley(order: int) -> Tensor:
    """Paley's first construction where order - 1 is a prime power (3 modulo 4), else his second (order / 2 - 1)."""
    size = _field_of(order)
    assert size is not None
    squares = _characters(size)
    border = torch.ones(1, size, dtype=torch.float64)
    corner = torch.zeros(1, 1, dtype=torch.float64)
    if size == order - 1:
        skew = torch.cat([torch.cat([corner, border], 1), torch.cat([-border.T, squares], 1)])
        return skew + torch.eye(order, dtype=torch.float64)
    conference = torch.cat([torch.cat([corner, border], 1), torch.cat([border.T, squares], 1)])
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, one) + torch.kron(torch.eye(order // 2, dtype=torch.float64), zero)


def _characters(size: int) -> Tensor:
    """`[size, size]`: 1 where a - b is a square of the field, -1 where it is none, 0 where a = b."""
    field = _Field(size)
    squares = {field.product(a, a) for a in field.elements if any(a)}
    value = {a: (1.0 if a in squares else -1.0) if any(a) else 0.0 for a in field.elements}
    rows = [[value[field.difference(a, b)] for b in field.elements] for a in field.elements]
    return torch.tensor(rows, dtype=torch.float64)


class _Field:
    """A finite field: polynomials of a degree below n over the integers modulo a prime p, as tuples of coefficients."""

    def __init__(self, size: int) -> None:
        found = _prime_power(size)
        assert found is not None
        self.prime, self.degree = found
        self.elements = [tuple(reversed(e)) for e in itertools.product(range(self.prime), repeat=self.degree)]
        self.modulus = self._irreducible()

    def difference(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((x - y) % self.prime for x, y in zip(a, b, strict=True))

    def product(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        found = _times(a, b, self.prime)
        for top in range(len(found) - 1, self.degree - 1, -1):  # x^degree is minus the rest of the modulus
            for i, m in enumerate(self.modulus):
                found[top - self.degree + i] = (found[top - self.degree + i] - found[top] * m) % self.prime
            found[top] = 0
        return tuple(found[: self.degree])

    def _irreducible(self) -> tuple[int, ...]:
        """Lower coefficients of a monic polynomial of the degree that is no product of two others."""
        products = set()
        for low in range(1, self.degree // 2 + 1):
            for a in itertools.product(range(self.prime), repeat=low):
                for b in itertools.product(range(self.prime), repeat=self.degree - low):
                    products.add(tuple(_times((*a, 1), (*b, 1), self.prime)[: self.degree]))
        return next(e for e in self.elements if e not in products)


def _times(a: tuple[int, ...], b: tuple[int, ...], prime: int) -> list[int]:
    """Coefficients of the product of two polynomials."""
    found = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[i + j] = (found[i + j] + x * y) % prime
    return found


@functools.cache
def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, n) of number = p^n with p prime; None of what is no power of a prime."""
    if number < 2:
        return None
    prime = next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), number)
    power = 0
    while number % prime == 0:
        number, power = number // prime, power + 1
    return (prime, power) if number == 1 else None
