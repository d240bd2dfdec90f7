"""L4Q: adapters merged into the weights before these are rounded, trained with the steps on the model's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.fisher import learning, next_token_losses, rows_of
from posttrain.compress.solvers.learned import SoftLinear, SoftWeight, held, held_scale, nearest
from posttrain.compress.solvers.reconstruct import Opened
from posttrain.compress.solvers.rtn import with_bits
from posttrain.compress.solvers.solver import Prepare, Solver, checked
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError

Start = Literal["cover", "lsq+", "range"]


class _MergedProduct(torch.autograd.Function):
    """`x Ŵᵀ` with Ŵ = s c + m, c = round(clip((W - m)/s, 0, top)), W = W0 + γ B A, of which x, W0, A, B, s, m are kept.

    With G = (∂L/∂y)ᵀ x and M where W is not clipped: ∂x = (∂L/∂y) Ŵ, ∂A = γ Bᵀ(G M), ∂B = γ (G M) Aᵀ,
    ∂s = Σ G (c - M (W - m)/s) and ∂m = Σ G (1 - M) over each group. Rounded weights and G live in one layer at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
        scale: Tensor,
        low: Tensor,
        gamma: float,
        top: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up, scale, low)
        ctx.gamma, ctx.top = gamma, top
        rounded = _rounded(merged(weight, down, up, gamma), scale, low, top)[0]
        return F.linear(x, rounded.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, scale, low = ctx.saved_tensors
        rounded, codes, place, inside = _rounded(merged(weight, down, up, ctx.gamma), scale, low, ctx.top)
        by_x = grad @ rounded.to(grad.dtype) if ctx.needs_input_grad[0] else None
        del rounded
        flat = grad.reshape(-1, grad.shape[-1])
        whole = (flat.T @ x.reshape(-1, x.shape[-1])).to(scale.dtype)
        by_group = whole.view(codes.shape)
        passed = by_group * inside
        by_scale = (by_group * codes).sub_(passed * place).sum(-1)
        by_low = (by_group - passed).sum(-1)
        through = passed.view(whole.shape)
        return by_x, None, ctx.gamma * (up.T @ through), ctx.gamma * (through @ down.T), by_scale, by_low, None, None


def merged(weight: Tensor, down: Tensor, up: Tensor, gamma: float) -> Tensor:
    """W0 + γ B A, in the factors' precision."""
    return torch.addmm(weight.to(up.dtype), up, down, alpha=gamma)


def _rounded(weight: Tensor, scale: Tensor, low: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ŵ `[out, in]`; and by group codes, places between the levels, and whether a weight is not clipped."""
    by_group = weight.view(weight.shape[0], scale.shape[1], -1)
    place = (by_group - low[..., None]).div_(scale[..., None])
    inside = (place >= 0) & (place <= top)
    codes = place.clamp(0, top).round_()
    return torch.addcmul(low[..., None], codes, scale[..., None]).view(weight.shape), codes, place, inside


class MergedAdapter(SoftWeight):
    r"""Ŵ = s q + b with q = round(clip((W0 + (α/r) B A - b)/s, Qn, Qp)), Qn = -2^(n-1), Qp = 2^(n-1) - 1.

    B starts at 0, s and b as `first_levels` says. s is trained as a factor of its first value and what is added to b as
    a share of that, so that one rate suits all. b is held as the value of the lowest level, in half precision; without
    an offset it is 0.
    """

    def __init__(
        self, weight: Tensor, bits: int, groups: int, *, rank: int, alpha: float, rate: float, step_rate: float,
        offset: bool, start: Start, draw: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        rows, columns = weight.shape
        self.weight, self.bits, self.offset, self.rate, self.step_rate = weight, bits, offset, rate, step_rate
        self.top, self.lowest, self.rank = 2**bits - 1, -(2 ** (bits - 1)), rank
        self.gamma = alpha / max(rank, 1)
        self.start, self.first_offset = first_levels(weight.float().reshape(rows, groups, -1), bits, start)
        self.factor = nn.Parameter(torch.ones_like(self.start))
        self.shift = nn.Parameter(torch.zeros_like(self.start), requires_grad=offset)
        bound = columns**-0.5
        self.down = nn.Parameter(torch.empty(rank, columns).uniform_(-bound, bound, generator=draw))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def levels(self) -> tuple[Tensor, Tensor]:
        """Scale and lowest value, `[out, groups]` each, as they are stored, with their gradients."""
        scale = held_scale(self.start * self.factor)
        low = self.lowest * scale
        return scale, held(low + self.first_offset + self.shift * self.start) if self.offset else low

    def merged(self) -> Tensor:
        """The float weights that are rounded, `[out, in]` fp32."""
        return merged(self.weight, self.down, self.up, self.gamma)

    def forward(self) -> Tensor:
        return _rounded(self.merged(), *self.levels(), self.top)[0]

    def product(self, x: Tensor) -> Tensor:
        scale, low = self.levels()
        return _MergedProduct.apply(x, self.weight, self.down, self.up, scale, low, self.gamma, self.top)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        scale, low = self.levels()
        zero = low if self.offset else torch.full_like(scale, float(-self.lowest))
        codes = nearest(self.merged(), scale, zero, self.top, self.offset)
        return UniformWeight.of(codes, scale, zero, self.bits, "float" if self.offset else "none")

    def groups(self) -> list[dict[str, Any]]:
        steps = {"params": [self.factor, self.shift] if self.offset else [self.factor], "lr": self.step_rate}
        return [steps, {"params": [self.down, self.up], "lr": self.rate}] if self.rank else [steps]


def first_levels(by_group: Tensor, bits: int, start: Start) -> tuple[Tensor, Tensor]:
    """s and b of `[out, groups, n]` weights: `[out, groups]` each; s is 1 for a group of zeros.

    cover: s = max(|w_min / Qn|, |w_max / Qp|), which holds both ends; lsq+: s = max(|μ - 3σ|, |μ + 3σ|) / 2^(n-1); b is
    0 in both. range: s = (w_max - w_min) / (Qp - Qn), b = w_min - s Qn.
    """
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = by_group.amin(-1), by_group.amax(-1)
    offset = torch.zeros_like(low)
    if start == "cover":
        scale = torch.maximum((low / lowest).abs(), (high / highest).abs())
    elif start == "lsq+":
        mean, spread = by_group.mean(-1), 3 * by_group.std(-1, unbiased=False)
        scale = torch.maximum((mean - spread).abs(), (mean + spread).abs()) / -lowest
    else:
        scale = (high - low) / (highest - lowest)
        offset = low - scale * lowest
    return torch.where(scale > 0, scale, torch.ones_like(scale)), offset


@dataclass(frozen=True)
class MergedFineTuning(Solver):
    """Fine-tunes the whole model on the calibration text: adapters and steps together, by the loss of the next token.

    grid: bits and group. rank, alpha: of the adapters. epochs: passes over the text. rate: of the adapters. step_rate:
    of the steps, as shares of their first values. offset: learn b too. start: of s and b, see `first_levels`. warmup:
    share of the training in which the rates rise; they fall to 0 as a cosine. rows: sequences a step, whose order
    follows from the seed.

    Reference: L4Q, 2024, arXiv 2402.04902 (card 126).
    """

    grid: Uniform = field(default_factory=Uniform)
    rank: int = 4
    alpha: float = 8.0
    epochs: int = 3
    rate: float = 1e-3
    step_rate: float = 5e-3
    offset: bool = True
    start: Start = "cover"
    warmup: float = 0.03
    rows: int = 4

    def __post_init__(self) -> None:
        if self.rank < 0 or self.epochs < 0:
            raise PosttrainError(f"rank {self.rank}, epochs {self.epochs}: expected numbers from 0 on")
        if self.start not in get_args(Start) or (self.start == "range" and not self.offset):
            raise PosttrainError(
                f"start is {self.start!r}; expected cover or lsq+, or range where the offset is learned"
            )
        if self.grid.bits < 2:
            raise PosttrainError(f"bits is {self.grid.bits}; learned steps have 2 to 8 (one bit has no level above 0)")

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve_block(self, block: Block) -> None:
        raise PosttrainError("l4q trains on the loss of the whole model; a block alone has none")

    def solve_model(self, blocks: Iterable[Block], prepare: Prepare, done: Callable[[Block], None]) -> None:
        if not isinstance(blocks, Walk):
            raise PosttrainError("l4q trains the whole model; expected the walk through one")
        opened: list[Opened] = []
        for block in blocks:
            if opened:
                opened[-1].block.inputs = []  # were kept for the walk alone
            prepare(block)
            opened.append(Opened(block, {}))
        for each in opened:
            each.put(self._layers(each.block))
        self.train(blocks.model, [layer.soft for each in opened for layer in each.layers.values()], blocks)
        for each in opened:
            each.close()
            done(each.block)

    def _layers(self, block: Block) -> dict[str, SoftLinear]:
        found = {}
        for place, (name, linear) in enumerate(block.linears.items()):
            whole = f"{block.name}.{name}"
            weight = checked(linear.weight.detach(), whole)
            grid = with_bits(self.grid, block.bits.get(name))
            groups = weight.shape[1] // grid.width(weight.shape[1], whole)
            draw = torch.Generator().manual_seed(block.seed * 1009 + block.index * 31 + place)
            soft = MergedAdapter(
                weight, int(grid.bits), groups, rank=self.rank, alpha=self.alpha, rate=self.rate,
                step_rate=self.step_rate, offset=self.offset, start=self.start, draw=draw,
            )  # fmt: skip
            found[name] = SoftLinear(soft, linear, block.quantizers.get(name))
        return found

    def train(self, model: nn.Module, softs: list[SoftWeight], walk: Walk) -> None:
        """AdamW on everything that the soft weights learn, and on nothing else."""
        batches = list(rows_of(walk.batches, self.rows))
        total = self.epochs * len(batches)
        learned = [group for soft in softs for group in soft.groups()]
        optimizer = torch.optim.AdamW(learned, weight_decay=0.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        rising = max(1, round(self.warmup * total))
        draw = torch.Generator().manual_seed(walk.seed)
        order: list[int] = []
        with learning(model, [p for group in learned for p in group["params"]]):
            for step in range(total):
                order = order or torch.randperm(len(batches), generator=draw).tolist()
                share = min(1.0, (step + 1) / rising) * 0.5 * (1 + math.cos(math.pi * step / total))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                loss = next_token_losses(model, batches[order.pop()]).mean()
                if not torch.isfinite(loss):
                    raise PosttrainError(f"l4q: the loss is {float(loss.detach())} at step {step}; lower the rates")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
