"""decoupleQ: integers and floats of a uniform grid are found in turns, each with the other fixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.alternating import Grouped, Problem, descended, fitted_floats, half_up, shrunk
from posttrain.compress.solvers.gptq import feed_back, inverse_factor, prepared
from posttrain.compress.solvers.learned import SoftWeight, held
from posttrain.compress.solvers.reconstruct import Known, Opened, Reconstruction, Target
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

Rounding = Literal["gptq", "train"]
ENOUGH = 1e-4  # rounds end when a smaller share of rows improves


@dataclass(frozen=True)
class DecoupleQ(LayerSolver):
    r"""Minimises `(ŵ - w) H (ŵ - w)^T` of each row over codes q and floats (s, z) of `ŵ = s q + z`, in turns.

    The floats have a closed form, codes are rounded one after the other; a row takes what is new only where its error
    falls. After a block's layers are done, its floats (not its codes) are trained on the block's outputs.

    bits: of a code. group: columns that share s and z; 0 for the whole row. damping: of H, and once more in the
        rounding, as the released code does. rounds: K; 1 is one pass of GPTQ from the whole range.
    rounding: of codes: `gptq`, or `train`, which descends by gradient between the columns it freezes (slow).
    symmetric: z is fixed, so that the middle code is 0. first, each: descents of `train` before and between columns.
    epochs: of the training of the floats (0: none). rate: its learning rate; rows: sequences a step. norms: trains the
        block's norms too, where they are held in fp32 (in half precision, steps of this size are lost).

    Reference: decoupleQ, 2024, arXiv 2404.12759 (card 022).
    """

    bits: int = 2
    group: int = 0
    damping: float = 0.01
    rounds: int = 4
    rounding: Rounding = "gptq"
    symmetric: bool = False
    first: int = 200
    each: int = 5
    epochs: int = 4
    rate: float = 1e-5
    rows: int = 4
    norms: bool = True

    def __post_init__(self) -> None:
        if self.rounding not in ("gptq", "train"):
            raise PosttrainError(f"rounding is {self.rounding!r}; expected gptq or train")
        if self.rounds < 1 or self.epochs < 0:
            raise PosttrainError(
                f"rounds {self.rounds}, epochs {self.epochs}; expected 1 or more rounds, 0 or more epochs"
            )
        Uniform(self.bits, self.group)

    @property
    def keeps_float(self) -> bool:
        return self.epochs > 0

    @property
    def float_inputs(self) -> bool:
        return False

    def check(self, shape: tuple[int, int], name: str) -> None:
        Uniform(self.bits, self.group).width(shape[1], name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        assert moments is not None
        wanted = self.bits if bits is None else round(bits)
        width = Uniform(wanted, self.group).width(weight.shape[1], name)
        weight, hessian = prepared(weight, moments, name)
        damped = hessian.double()
        damped += self.damping * damped.diag().mean() * torch.eye(len(damped), dtype=torch.float64)
        problem = Problem(weight.double(), damped, weight.shape[1] // width, 2**wanted - 1, self.symmetric)
        factor = Rounder(weight, damped.float(), self.damping, name) if self.rounding == "gptq" else None
        found = alternated(problem, self.rounds, factor, self.first, self.each)
        kind: Literal["none", "float"] = "none" if self.symmetric else "float"
        return UniformWeight.of(found.codes.long(), found.scale.float(), found.zero.float(), wanted, kind)

    def solve_block(self, block: Block) -> None:
        super().solve_block(block)
        if self.epochs:
            block.forget()
            packed = {name: block.module.get_submodule(name).weight for name in block.linears}
            step = BlockStep(
                epochs=self.epochs, rows=self.rows, targets=("prefix",), rate=self.rate, norms=self.norms, packed=packed
            )
            step.solve_block(block)


class Rounder:
    """GPTQ's rounding, columns by falling diagonal, onto grids that are given; its factor is computed once."""

    def __init__(self, weight: Tensor, hessian: Tensor, damping: float, name: str) -> None:
        self.order = torch.argsort(hessian.diag(), descending=True, stable=True)
        self.weight = weight[:, self.order]
        self.factor = inverse_factor(hessian[self.order][:, self.order], damping, name)

    def codes(self, start: Grouped, top: int) -> Tensor:
        """`[out, in]` fp64 codes on the grids of `start`."""
        width = self.weight.shape[1] // start.scale.shape[1]
        place = self.order // width
        scale, zero = start.scale.float()[:, place], start.zero.float()[:, place]
        found = torch.zeros_like(self.weight, dtype=torch.float64)

        def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
            s, z = scale[:, column : column + 1], zero[:, column : column + 1]
            code = half_up(now, s, z, top)
            found[:, self.order[column]] = code[:, 0].double()
            return code * s + z

        feed_back(self.weight, self.factor, round_column)
        return found


def alternated(problem: Problem, rounds: int, rounder: Rounder | None, first: int = 200, each: int = 5) -> Grouped:
    """The best codes and floats of each row that so many rounds find. rounder: None descends by gradient instead."""

    def integers(start: Grouped) -> Grouped:
        codes = descended(problem, start, first, each) if rounder is None else rounder.codes(start, problem.top)
        return problem.grouped(codes, start.scale, start.zero)

    best = problem.nearest(*problem.whole_range())
    best, _ = best.better(integers(best))
    for number in range(1, rounds):
        start = best
        if number == 1:
            start = shrunk(problem)
            start = problem.grouped(start.codes, *fitted_floats(problem, start.codes))
        best, codes_moved = best.better(integers(start))
        best, floats_moved = best.better(problem.grouped(best.codes, *fitted_floats(problem, best.codes)))
        if max(codes_moved, floats_moved) < ENOUGH:
            break
    return best


# -- the block's floats ----------------------------------------------------------------------------------------------


class FixedCodes(SoftWeight):
    """`s q + z` with the codes fixed and the floats learned; of a symmetric grid s alone.

    weight: `[out, in]`, the float one. Groups that are zeros in it and in what is packed stay zeros: their z, which
    alone says what they are, is not learned.
    """

    codes: Tensor
    empty: Tensor

    def __init__(self, packed: UniformWeight, rate: float, weight: Tensor) -> None:
        super().__init__()
        self.packed, self.rate = packed, rate
        self.register_buffer("codes", packed.unpacked().float().view(packed.shape[0], packed.groups, -1))
        values = torch.stack([packed.dequantize().float(), weight]).view(2, *self.codes.shape)
        self.register_buffer("empty", (values == 0).all(3).all(0))
        self.scale = nn.Parameter(packed.scale.float())
        self.zero = nn.Parameter(packed.zeros()) if packed.kind == "float" else None
        self.beside: list[nn.Parameter] = []

    def forward(self) -> Tensor:
        scale = held(self.scale)[..., None]
        if self.zero is None:
            found = (self.codes - self.packed.zeros()[..., None]) * scale
        else:
            found = self.codes * scale + held(self._learned(self.zero))[..., None]
        return found.reshape(self.packed.shape)

    def _learned(self, zero: Tensor) -> Tensor:
        return torch.where(self.empty, 0.0, zero)

    def pack(self) -> PackedWeight:
        zero = self.packed.zeros() if self.zero is None else self._learned(self.zero.detach())
        codes = self.packed.unpacked().long()
        return UniformWeight.of(codes, self.scale.detach(), zero, self.packed.bits, self.packed.kind)

    def groups(self) -> list[dict[str, Any]]:
        learned = [self.scale, *([] if self.zero is None else [self.zero]), *self.beside]
        return [{"params": learned, "lr": self.rate, "weight_decay": 1e-6, "betas": (0.9, 0.99), "eps": 2e-5}]


@dataclass(frozen=True)
class BlockStep(Reconstruction):
    """Trains the floats of a block whose layers are packed already. packed: its layers' weights, by name."""

    targets: tuple[Target, ...] = ("prefix",)
    rate: float = 1e-5
    norms: bool = True
    packed: dict[str, Any] = field(default_factory=dict)

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        return FixedCodes(self.packed[name], self.rate, weight)

    def open(self, block: Block, known: Known) -> Opened:
        opened = super().open(block, known)
        if self.norms:
            softs = [layer.soft for layer in opened.layers.values() if isinstance(layer.soft, FixedCodes)]
            softs[0].beside = norm_parameters(block.module)
            for parameter in softs[0].beside:
                parameter.requires_grad_(True)
        return opened

    def solve_block(self, block: Block) -> None:
        asked = {p: p.requires_grad for p in norm_parameters(block.module)}
        super().solve_block(block)
        for parameter, before in asked.items():
            parameter.requires_grad_(before)


def norm_parameters(block: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of a block's norms that are held in fp32."""
    norms = [m for m in block.modules() if "Norm" in type(m).__name__]
    return [p for norm in norms for p in norm.parameters(recurse=False) if p.dtype == torch.float32]
