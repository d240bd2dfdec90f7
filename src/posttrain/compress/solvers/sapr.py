"""Saliency-aware partial retraining: learned clipping and adapters, held to the weights where the loss minds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.low_rank import LowRankWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.fisher import weight_fisher
from posttrain.compress.solvers.learned import SoftWeight, held
from posttrain.compress.solvers.omniquant import START, ClippedRange
from posttrain.compress.solvers.reconstruct import Known, Reconstruction, Seen, Target
from posttrain.compress.stacks import linears, whole_names
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError

Stage = Literal["mixed", "weights", "outputs"]


class AdaptedRange(SoftWeight):
    r"""Q(W) + (α/r) B A, with learned clipping in Q, B from 0; and λ Σ F (W_eff - W)² to add to the loss.

    saliency: `[out, in]` F, or None for none. after: W_eff holds the adapter; else it is Q(W) alone. unit: what the
    penalty is divided by.
    """

    def __init__(
        self, clipped: ClippedRange, rank: int, alpha: float, *, rate: float, decay: float, penalty: float,
        saliency: Tensor | None, after: bool, normalize: bool, draw: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        rows, columns = clipped.weight.shape
        self.clipped, self.rank, self.rate, self.decay = clipped, rank, rate, decay
        self.strength, self.saliency, self.after = penalty, saliency, after
        self.scaling = alpha / max(rank, 1)
        bound = columns**-0.5  # Kaiming with a = sqrt(5), as adapters are usually made
        self.down = nn.Parameter(torch.empty(rank, columns).uniform_(-bound, bound, generator=draw))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.effective: Tensor | None = None
        self.unit = 1.0
        if normalize and penalty > 0:
            with torch.no_grad():
                self.unit = float(self.distance(self.clipped())) or 1.0

    def adapter(self) -> Tensor:
        """`[out, in]`, of factors as they are stored."""
        return held(self.up * self.scaling) @ held(self.down)

    def distance(self, effective: Tensor) -> Tensor:
        """Σ F (W_eff - W)²."""
        squared = (effective - self.clipped.weight) ** 2
        return (squared if self.saliency is None else squared * self.saliency).sum()

    def forward(self) -> Tensor:
        rounded, adapter = self.clipped(), self.adapter()
        self.effective = rounded + adapter if self.after else rounded
        return rounded + adapter

    def penalty(self, progress: float) -> Tensor | None:
        """Of the last forward pass; none where there was none since (an expert without tokens)."""
        effective, self.effective = self.effective, None
        if effective is None or not self.strength:
            return None
        return self.strength * self.distance(effective) / self.unit

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        base = self.clipped.pack()
        return LowRankWeight.of(base, self.up * self.scaling, self.down) if self.rank else base

    def groups(self) -> list[dict[str, Any]]:
        found = self.clipped.groups()
        adapters = {"params": [self.up, self.down], "lr": self.rate, "weight_decay": self.decay}
        return [*found, adapters] if self.rank else found


@dataclass(frozen=True)
class PartialRetraining(Reconstruction):
    r"""ApiQ's training of clipping and adapters, block after block, with a penalty that keeps weights where F is large.

        L = mse(f(W, X), f'(X')) + mse(f(W, X'), f'(X')) + λ Σ F (Q(W) - W)²

    rank, alpha: of the adapters, which stay, in half precision. rate: of the adapters. clip_rate: of the clipping.
    decay: weight decay of both. penalty: λ. saliency: `fisher`, squared gradients of the language model's loss, or
    `none` (F = 1). stage: `mixed` has both terms, `weights` the penalty alone, `outputs` none of it. after: penalise
    the weight with its adapter. normalize: divide the first two terms by their value at the start, and the penalty of
    each layer by its own and by the number of layers; else all are added as they are.

    Reference: Enhancing Ultra-Low-Bit Quantization ... Through Saliency-Aware Partial Retraining, 2025,
    arXiv 2504.13932 (card 150).
    """

    targets: tuple[Target, ...] = ("float", "prefix")
    rank: int = 16
    alpha: float = 16.0
    rate: float = 5e-4
    clip_rate: float = 5e-3
    decay: float = 0.1
    penalty: float = 0.01
    saliency: Literal["fisher", "none"] = "fisher"
    stage: Stage = "mixed"
    after: bool = False
    normalize: bool = True
    start: float = START

    @property
    def penalized(self) -> bool:
        return self.penalty > 0 and self.stage != "outputs"

    @property
    def relative(self) -> bool:
        return self.normalize

    def known(self, blocks: Iterable[Block]) -> Known:
        known = super().known(blocks)
        if self.penalized and self.saliency == "fisher":
            if not isinstance(blocks, Walk):
                raise PosttrainError("the Fisher saliency needs the whole model; give saliency none, or solve it whole")
            layers = {
                f"{name}.{n}": layer
                for name, block in whole_names(blocks.stack)
                for n, layer in linears(block, name, blocks.skip).items()
            }
            known.fisher = weight_fisher(blocks.model, layers, blocks.batches)
        return known

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        groups = weight.shape[1] // grid.width(weight.shape[1], f"{block.name}.{name}")
        clipped = ClippedRange(weight, int(grid.bits), groups, rate=self.clip_rate, start=self.start, decay=self.decay)
        saliency = known.fisher.pop(f"{block.name}.{name}", None)
        if saliency is not None:
            saliency = saliency / saliency.mean().clamp(min=1e-30) if self.normalize else saliency
        strength = self.penalty / (len(block.linears) if self.normalize else 1) if self.penalized else 0.0
        draw = torch.Generator().manual_seed(block.seed * 1009 + block.index * 31 + list(block.linears).index(name))
        return AdaptedRange(
            clipped, self.rank, self.alpha, rate=self.rate, decay=self.decay, penalty=strength, saliency=saliency,
            after=self.after, normalize=self.normalize, draw=draw,
        )  # fmt: skip

    def loss(self, seen: Seen, wanted: dict[Target, Seen]) -> Tensor:
        found = super().loss(seen, wanted)
        return found * 0.0 if self.stage == "weights" else found
