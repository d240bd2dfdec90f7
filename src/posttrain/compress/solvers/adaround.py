"""Learned rounding: whether a weight is rounded up or down is trained, layer by layer or block by block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.fisher import output_fisher
from posttrain.compress.solvers.gptq import prepared
from posttrain.compress.solvers.learned import (
    SoftWeight,
    fake_quantized,
    fitted,
    held_scale,
    straight_through,
)
from posttrain.compress.solvers.reconstruct import Known, Reconstruction, Seen, Target
from posttrain.compress.solvers.rtn import with_bits
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError

HIGH, LOW = 1.1, -0.1  # ζ and ν: a sigmoid stretched, so that 0 and 1 are reached


def stretched(logits: Tensor) -> Tensor:
    """h(V) = clip(1.2 σ(V) - 0.1, 0, 1)."""
    return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def logits_of(share: Tensor) -> Tensor:
    """V with h(V) = share, for shares in [0, 1]."""
    return torch.logit((share - LOW) / (HIGH - LOW))


class _Step(torch.autograd.Function):
    """[V >= 0] with the gradient of h(V), where nobody asks for h(V) itself."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return (logits >= 0).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        share = torch.sigmoid(logits)
        soft = share * (HIGH - LOW) + LOW
        slope = share.addcmul_(share, share, value=-1.0).mul_((soft >= 0) & (soft <= 1))
        return slope.mul_(grad).mul_(HIGH - LOW)


@dataclass(frozen=True)
class Commitment:
    """What pushes soft roundings to 0 and 1: weight * mean(1 - |2h - 1|^β), with β from first to last after a warm-up
    without it.
    """

    weight: float = 30.0
    first: float = 20.0
    last: float = 2.0
    warmup: float = 0.2

    def power(self, progress: float) -> float | None:
        """β; None during the warm-up."""
        if progress < self.warmup:
            return None
        return self.first + (self.last - self.first) * (progress - self.warmup) / (1 - self.warmup)

    def __call__(self, rounding: Tensor, progress: float) -> Tensor | None:
        """Summed over the weights; None where it is none."""
        power = self.power(progress)
        if power is None or not self.weight:
            return None
        return self.weight * (1 - (2 * rounding - 1).abs().pow(power)).sum()


class LearnedRounding(SoftWeight):
    r"""ŵ = s (clip(⌊w/s⌋ + h(V) + z, 0, 2^b - 1) - z), and V >= 0 rounds up in the end.

    At first h(V) is the fraction that ⌊w/s⌋ leaves, so that ŵ = w wherever w is not clipped.

    scale, zero: `[out, groups]`. kind: of the zero. rate: of V. rank: 0 learns V itself, otherwise what is added to it,
    a product of two factors of that rank (CBQ). step_rate: of the scale, as a factor of the first; 0 keeps it. With a
    learned scale the fraction is always that of the present one. share: of all weights trained together, for the
    penalty. hard: train what is stored, its gradient being that of the soft rounding.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, zero: Tensor, bits: int, kind: Literal["none", "integer", "float"], *,
        rate: float, commitment: Commitment, share: float = 1.0, rank: int = 0, step_rate: float = 0.0,
        hard: bool = False, draw: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.start, self.zero, self.bits, self.kind = weight, scale, zero, bits, kind
        self.rate, self.step_rate, self.commitment, self.hard = rate, step_rate, commitment, hard
        self.top, self.share, self.rank = 2**bits - 1, share / weight.numel(), rank
        self.soft_now: Tensor | None = None
        self.factor = nn.Parameter(torch.ones_like(scale), requires_grad=step_rate > 0)
        if rank:
            up = torch.randn(weight.shape[0], rank, generator=draw)
            self.up, self.down = nn.Parameter(up), nn.Parameter(torch.zeros(rank, weight.shape[1]))
        else:
            self.logits = nn.Parameter(logits_of(self._fraction(scale)))

    def scale(self) -> Tensor:
        """As it is stored, with its gradient."""
        return held_scale(self.start * self.factor) if self.step_rate > 0 else self.start

    def _fraction(self, scale: Tensor) -> Tensor:
        """`[out, in]`: what ⌊w/s⌋ leaves of w/s."""
        by_group = self.weight.reshape(self.weight.shape[0], scale.shape[1], -1)
        offset = self.zero[..., None] if self.kind == "float" else 0.0
        place = (by_group - offset) / scale[..., None]
        return (place - place.floor()).reshape(self.weight.shape)

    def _logits(self, scale: Tensor) -> Tensor:
        if not self.rank:
            return self.logits
        return logits_of(self._fraction(scale.detach())) + self.up @ self.down

    def rounding(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """`[out, in]` soft roundings, and the ones that the forward pass takes."""
        logits = self._logits(scale)
        soft = stretched(logits)
        if self.committed:
            return soft, (logits >= 0).to(soft.dtype)
        return soft, straight_through((logits >= 0).to(soft.dtype), soft) if self.hard else soft

    def forward(self) -> Tensor:
        scale = self.scale()
        if self.hard and not self.committed and not self.commitment.weight:
            taken = _Step.apply(self._logits(scale))
        else:
            self.soft_now, taken = self.rounding(scale)
        return fake_quantized(self.weight, scale, self.zero, self.top, float_zero=self.kind == "float", delta=taken)

    def penalty(self, progress: float) -> Tensor | None:
        """Of the roundings of the last forward pass; none where there was none since (an expert without tokens)."""
        soft, self.soft_now = self.soft_now, None
        found = None if soft is None else self.commitment(soft, progress)
        return None if found is None else found * self.share

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        scale = self.scale()
        by_group = self.weight.reshape(self.weight.shape[0], scale.shape[1], -1)
        zero = self.zero[..., None]
        place = (by_group - zero) / scale[..., None] if self.kind == "float" else by_group / scale[..., None]
        up = (self._logits(scale) >= 0).reshape(by_group.shape)
        codes = place.floor() + up + (0.0 if self.kind == "float" else zero)
        codes = codes.clamp(0, self.top).to(torch.int64).reshape(self.weight.shape)
        return UniformWeight.of(codes, scale, self.zero, self.bits, self.kind)

    def groups(self) -> list[dict[str, Any]]:
        learned = [self.up, self.down] if self.rank else [self.logits]
        found: list[dict[str, Any]] = [{"params": learned, "lr": self.rate}]
        return [*found, {"params": [self.factor], "lr": self.step_rate}] if self.step_rate > 0 else found


@dataclass(frozen=True)
class AdaRound(LayerSolver):
    r"""Learned rounding of one layer at a time: the squared error of its outputs over all calibration tokens.

    That loss is tr(ΔW G ΔWᵀ) with G = XᵀX, so every step sees all tokens at the price of one product with G. It is
    divided by that of rounding to nearest.

    steps: of Adam. rate: of V.

    Reference: AdaRound, 2020, arXiv 2004.10568 (card 000, section 10).
    """

    grid: Uniform = field(default_factory=Uniform)
    steps: int = 200
    rate: float = 0.1
    commitment: Commitment = field(default_factory=Commitment)

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        assert moments is not None
        grid = with_bits(self.grid, bits)
        weight, hessian = prepared(weight, moments, name)
        scale, zero = fitted(weight, grid, name)
        soft = LearnedRounding(
            weight, scale, zero, int(grid.bits), grid.zero, rate=self.rate, commitment=self.commitment
        )
        with torch.enable_grad():
            self._train(soft, weight, hessian)
        return soft.pack()

    def _train(self, soft: LearnedRounding, weight: Tensor, hessian: Tensor) -> None:
        optimizer = torch.optim.Adam(soft.parameters(), lr=self.rate)
        soft.committed = True
        with torch.no_grad():
            nearest = quadratic(soft() - weight, hessian)
        soft.committed = False
        unit = float(nearest) or 1.0
        for step in range(self.steps):
            loss = quadratic(soft() - weight, hessian) / unit
            more = soft.penalty(step / self.steps)
            optimizer.zero_grad(set_to_none=True)
            (loss if more is None else loss + more).backward()
            optimizer.step()


class _Quadratic(torch.autograd.Function):
    """tr(D H Dᵀ) for a symmetric H, whose gradient 2 D H needs no second product."""

    @staticmethod
    def forward(ctx: Any, difference: Tensor, hessian: Tensor) -> Tensor:
        product = difference @ hessian
        ctx.save_for_backward(product)
        return (product * difference).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (product,) = ctx.saved_tensors
        return product * (2 * grad), None


def quadratic(difference: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H Dᵀ) of `[out, in]` and a symmetric `[in, in]`."""
    return _Quadratic.apply(difference, hessian)


@dataclass(frozen=True)
class BlockRounding(Reconstruction):
    """BRECQ: learned rounding of all layers of a block together.

    rate: of the logits V. commitment: see there. fisher: weigh the error of each output by its squared gradient of the
    language model's loss, where the outputs are wanted on the float model's inputs.

    Reference: BRECQ, 2021, arXiv 2102.05426 (card 000, section 10).
    """

    rate: float = 0.1
    commitment: Commitment = field(default_factory=Commitment)
    fisher: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher and (self.targets != ("float",) or self.window != 1):
            raise PosttrainError("fisher weighs the outputs of single float blocks; expected the target float alone")

    def known(self, blocks: Any) -> Known:
        known = super().known(blocks)
        if self.fisher:
            if not isinstance(blocks, Walk):
                raise PosttrainError("fisher needs the whole model; solve it as a whole")
            known.outputs = output_fisher(blocks.model, blocks.stack, blocks.batches)
        return known

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        scale, zero = fitted(weight, grid, f"{block.name}.{name}")
        return LearnedRounding(
            weight, scale, zero, int(grid.bits), grid.zero, rate=self.rate, commitment=self.commitment,
            share=weight.numel() / weights_in(block),
        )  # fmt: skip

    def loss(self, seen: Seen, wanted: dict[Target, Seen]) -> Tensor:
        if not self.fisher:
            return super().loss(seen, wanted)
        truth = wanted["float"]
        assert truth.weight is not None
        return ((seen.hidden.float() - truth.hidden.float()) ** 2 * truth.weight).mean()


def weights_in(block: Block) -> int:
    """How many weights are trained together in a block."""
    return sum(layer.weight.numel() for layer in block.linears.values())
