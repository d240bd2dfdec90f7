"""PTQ1.61: the input columns with the largest activations in 4 bits, the others binary with learned scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.compress.grids.binary import signed
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.learned import SoftWeight, held
from posttrain.compress.solvers.reconstruct import Known, Opened, Reconstruction, Seen, Target
from posttrain.compress.solvers.restorative import Restoration, restored
from posttrain.compress.solvers.solver import Prepare
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError


class SalientColumns(SoftWeight):
    r"""`ŵ = m ⊙ Q(w) + (1 - m) ⊙ (ρ κ^T) ⊙ (α B + μ)`, of which α, ρ and κ are learned.

    Q rounds to the grid of whole rows, though only the salient columns m take its values. Of the other columns of a
    row, μ is the mean (of what is not 0), B the signs of w - μ, and α starts at mean|w|, or at mean|w - μ| where it is
    `centred`. What training sees is what is stored: ρα, ρμ and κ in half precision, with κ scaled to mean 1.

    salient: `[in]` bool. rate: of α. vector_rate: of ρ and κ.
    """

    def __init__(
        self, weight: Tensor, salient: Tensor, grid: Uniform, *, rate: float, vector_rate: float, centred: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.salient = int(grid.bits), salient
        self.rate, self.vector_rate = rate, vector_rate
        self.levels = grid.fit(weight)
        self.codes = self.levels.nearest(weight[:, salient])
        self.fixed = self.levels.values(self.codes)
        rest = weight[:, ~salient]
        there = (rest != 0).to(rest.dtype)
        count = there.sum(1, keepdim=True).clamp(min=1.0)
        self.mean = (rest * there).sum(1, keepdim=True) / count
        size = ((rest - self.mean if centred else rest).abs() * there).sum(1, keepdim=True) / count
        self.signs = signed(rest >= self.mean)
        self.scale = nn.Parameter(size)
        self.row = nn.Parameter(torch.ones_like(size))
        self.column = nn.Parameter(torch.ones(1, rest.shape[1]))
        self.place = torch.argsort(torch.cat([torch.nonzero(salient)[:, 0], torch.nonzero(~salient)[:, 0]]))

    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """ρα and ρμ, `[out, 1]` each, and κ, `[1, others]`."""
        unit = self.column.detach().abs().mean() if self.column.numel() else torch.tensor(1.0)
        row = self.row * unit
        return held(row * self.scale), held(row * self.mean), held(self.column / unit)

    def forward(self) -> Tensor:
        scale, offset, column = self.stored()
        rest = column * (scale * self.signs + offset)
        return torch.cat([self.fixed, rest], 1)[:, self.place]

    def product(self, x: Tensor) -> Tensor:
        """The same as with the whole weight, in parts whose matrices do not change: none is made anew in a step."""
        scale, offset, column = (each.to(x.dtype) for each in self.stored())
        self.fixed, self.signs = self.fixed.to(x.dtype), self.signs.to(x.dtype)
        rest = x[..., ~self.salient] * column[0]
        binary = F.linear(rest, self.signs) * scale[:, 0] + rest.sum(-1, keepdim=True) * offset[:, 0]
        return F.linear(x[..., self.salient], self.fixed) + binary

    def pack(self) -> PackedWeight:
        scale, offset, column = self.stored()
        binary = BinaryWeight.of(
            (self.signs > 0)[None], scale[None], offset, torch.tensor([column.shape[1]]), column[0]
        )
        fixed = UniformWeight.of(self.codes, self.levels.scale, self.levels.zero, self.bits, "integer")
        return MixedColumns.of([binary, fixed], self.salient.long())

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.scale], "lr": self.rate},
            {"params": [self.row, self.column], "lr": self.vector_rate},
        ]


def salient_columns(peaks: Tensor, share: float) -> Tensor:
    """`[in]` bool: the columns whose largest activation is not below entry ⌊share · in⌋ of all in falling order.

    Entries count from 0, so that is one more than ⌊share · in⌋; none for a share of 0, all for 1.
    """
    chosen = torch.zeros(len(peaks), dtype=torch.bool)
    if share > 0:
        count = min(len(peaks), math.floor(share * len(peaks) + 1e-9) + 1)
        chosen[peaks.argsort(descending=True, stable=True)[:count]] = True
    return chosen


@dataclass
class Peaks(Known):
    """peaks: by a layer's whole name, `[in]` the largest size of each of its inputs in the float model."""

    peaks: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SalientAndBinary(Reconstruction):
    r"""PTQ1.61. Every block is held to the float block on the float model's inputs and on the compressed prefix's:

        L = sum over both targets y of  MSE(y, ŷ) - ln |mean over tokens of cos(y, ŷ)|

    grid: of the salient columns. share: of columns that are salient. rate: of α. vector_rate: of ρ and κ.
    centred: see `SalientColumns`. restoration: trains the model for being compressed so, first (None: not).

    Reference: PTQ1.61, 2025, arXiv 2502.13179 (card 032).
    """

    grid: Uniform = field(default_factory=lambda: Uniform(4, 0, "integer"))
    rows: int = 1
    targets: tuple[Target, ...] = ("float", "prefix")
    share: float = 0.2
    rate: float = 5e-4
    vector_rate: float = 1e-3
    centred: bool = False
    restoration: Restoration | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise PosttrainError(f"the share of salient columns is {self.share}; expected 0 to 1")
        if self.grid.zero != "integer" or self.grid.group:
            raise PosttrainError(
                "salient columns have one scale and integer zero a row; expected group 0, zero integer"
            )

    def known(self, blocks: Iterable[Block]) -> Peaks:
        return Peaks(super().known(blocks).blocks)

    def open(self, block: Block, known: Known) -> Opened:
        assert isinstance(known, Peaks)
        moments = block.moments(list(block.linears), gram=False, calls=block.float_inputs)
        known.peaks = {f"{block.name}.{name}": met.absmax for name, met in moments.items()}
        return super().open(block, known)

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        assert isinstance(known, Peaks)
        asked = block.bits.get(name)
        share = self.share if asked is None else share_of(asked, int(self.grid.bits))
        salient = salient_columns(known.peaks[f"{block.name}.{name}"], share)
        return SalientColumns(
            weight, salient, self.grid, rate=self.rate, vector_rate=self.vector_rate, centred=self.centred
        )

    def loss(self, seen: Seen, wanted: dict[Target, Seen]) -> Tensor:
        found = super().loss(seen, wanted)
        for each in wanted.values():
            angle = F.cosine_similarity(seen.hidden.float(), each.hidden.float(), dim=-1).mean()
            found = found - angle.abs().clamp(min=1e-6).log()
        return found

    def solve_model(self, blocks: Iterable[Block], prepare: Prepare, done: Callable[[Block], None]) -> None:
        if self.restoration is not None:
            if not isinstance(blocks, Walk):
                raise ValueError("restoring the model needs the walk over it")
            restored(blocks, self.restoration, lambda walk: super(SalientAndBinary, self).solve_model(
                walk, prepare, lambda block: None
            ))  # fmt: skip
        super().solve_model(blocks, prepare, done)


def share_of(bits: float, salient: int) -> float:
    """The share of columns in `salient` bits where the others have one, for so many bits on average."""
    if not 1 <= bits <= salient:
        raise PosttrainError(f"bits is {bits:g}; expected 1 to {salient}: binary columns beside some of {salient} bits")
    return (bits - 1) / (salient - 1)
