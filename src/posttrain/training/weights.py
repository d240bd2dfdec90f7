"""What is done to weights between updates, where a method says so: masks that change as training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from posttrain.models.causal import CausalPolicy
from posttrain.training.optim import MasterAdamW
from posttrain.trajectory import PosttrainError


class WeightRule(Protocol):
    """Changes weights, and the optimizer's state of them, after each update. It is part of the checkpoint."""

    @property
    def settled(self) -> bool:
        """Whether weights are from now on as the rule wants them in the end; before, none are kept as the best."""
        ...

    def begin(self, policy: CausalPolicy, optimizer: MasterAdamW, total: int, seed: int) -> None:
        """Look at what is trained, by `total` updates, before the first of them."""
        ...

    def updated(self, optimizer: MasterAdamW, gradients: Mapping[str, Tensor]) -> None:
        """After an update of these gradients, by the parameters' names."""
        ...

    def metrics(self) -> dict[str, float]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class CubicSparsity:
    r"""The sparsity of step t: :math:`s_t = s_f + (s_i - s_f)\,(1 - (t - t_0)/(n\,\Delta t))^3`.

    final, initial: s_f, s_i. every: Δt. start, end: t_0 and t_0 + n Δt as shares of all steps, to which n is fitted.
    """

    final: float = 0.8
    initial: float = 0.0
    every: int = 10
    start: float = 0.0
    end: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final < 1:
            raise PosttrainError(
                f"sparsity goes from {self.initial} to {self.final}; expected shares of the weights below 1, the "
                f"first no larger"
            )
        if self.every < 1 or not 0 <= self.start <= self.end <= 1:
            raise PosttrainError(
                f"every is {self.every}, start {self.start} and end {self.end}; expected at least 1 step, and shares "
                f"of the steps in order"
            )

    def period(self, total: int) -> int:
        """Δt; a stage that is shorter is pruned at its end."""
        return min(self.every, total)

    def first(self, total: int) -> int:
        """t_0: the first step at whose end something may be pruned, a multiple of Δt."""
        period = self.period(total)
        return min(max(1, math.ceil(self.start * total / period)), total // period) * period

    def last(self, total: int) -> int:
        """t_0 + n Δt."""
        period = self.period(total)
        return max(self.first(total), math.floor(self.end * total / period) * period)

    def at(self, step: int, total: int) -> float:
        """s_t of step t, counted from 1; s_f once pruning is over."""
        first, last = self.first(total), self.last(total)
        if step >= last:
            return self.final
        done = max(0.0, (step - first) / (last - first))
        return self.final + (self.initial - self.final) * (1 - done) ** 3


@dataclass
class Masks:
    """Which weights are there, by the parameters' names: what rules that mask have in common."""

    masks: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def metrics(self) -> dict[str, float]:
        return {"sparsity": sparsity_of(self.masks)}

    def tensors(self) -> dict[str, Tensor]:
        return {f"mask/{name}": mask for name, mask in self.masks.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.masks = {name: tensors[f"mask/{name}"].to(mask.device) for name, mask in self.masks.items()}


@dataclass
class PruneAndRegrow(Masks):
    r"""GraNet: every Δt steps the smallest weights of all layers go, to a sparsity that grows, and then as many of each
    layer's smallest again as come back where the gradient is largest.

    The linear layers in the blocks are pruned; embeddings, the vocabulary projection and norms are not. Of each layer's
    n weights that are left, ceil(r_t n) are dropped and grown, :math:`r_t` falling from r_0 to `least` as a cosine over
    all steps. A weight that comes back starts from 0, and one that was dropped in the same event from what it was.
    With an initial sparsity, layers start from random masks whose density goes with (in + out)/(in * out) (ERK).

    schedule: of the sparsity. regrow: r_0; 0 is gradual magnitude pruning.

    Reference: Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, 2021, arXiv 2106.10404 (card
    088).
    """

    schedule: CubicSparsity = field(default_factory=CubicSparsity)
    regrow: float = 0.5
    least: float = 0.005
    total: int = field(default=1, init=False, repr=False, compare=False)
    done: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.regrow < 1:
            raise PosttrainError(f"regrow is {self.regrow}; expected a share of the weights from 0 to below 1")

    @property
    def settled(self) -> bool:
        return self.done >= self.schedule.last(self.total)

    def share(self, step: int) -> float:
        """r_t."""
        least = min(self.least, self.regrow)
        return least + (self.regrow - least) * (1 + math.cos(math.pi * step / self.total)) / 2

    def begin(self, policy: CausalPolicy, optimizer: MasterAdamW, total: int, seed: int) -> None:
        no_adapter(policy)
        self.total = total
        named = dict(zip(optimizer.names, optimizer.masters, strict=True))
        wanted = [name for name in pruned(policy) if name in named]
        if not wanted:
            raise PosttrainError("no linear layer is trained; there is nothing to prune")
        shapes = [tuple(named[name].shape) for name in wanted]
        densities = erk(shapes, 1 - self.schedule.initial)
        draw = torch.Generator().manual_seed(seed % (1 << 63))
        self.masks = {
            name: random_mask(shape, density, draw).to(named[name].device)
            for name, shape, density in zip(wanted, shapes, densities, strict=True)
        }
        apply_masks(optimizer, self.masks)

    def updated(self, optimizer: MasterAdamW, gradients: Mapping[str, Tensor]) -> None:
        self.done += 1
        first, last = self.schedule.first(self.total), self.schedule.last(self.total)
        apply_masks(optimizer, self.masks)
        if self.done < first or self.done % self.schedule.period(self.total):
            return
        weights = self._masters(optimizer)
        sparsity = self.schedule.at(self.done, self.total)
        if self.done <= last and sparsity > self.schedule.initial:
            self._prune(weights, sparsity)
            apply_masks(optimizer, self.masks)
        share = self.share(self.done)
        if share > 0:
            for name, weight in weights.items():
                self.masks[name] = regrown(weight, self.masks[name], gradients[name], share)
        apply_masks(optimizer, self.masks)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])

    def _masters(self, optimizer: MasterAdamW) -> dict[str, Tensor]:
        return {n: m for n, m in zip(optimizer.names, optimizer.masters, strict=True) if n in self.masks}

    @torch.no_grad()
    def _prune(self, weights: dict[str, Tensor], sparsity: float) -> None:
        """Of all layers together, keep the largest weights; what is masked never comes back here, whatever its size."""
        sizes = [torch.where(self.masks[n], w.abs(), -1.0).flatten() for n, w in weights.items()]
        whole = torch.cat(sizes)
        count = min(round((1 - sparsity) * len(whole)), int((whole >= 0).sum()))
        kept = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
        kept[whole.topk(count).indices] = True
        for (name, weight), part in zip(weights.items(), kept.split([len(s) for s in sizes]), strict=True):
            self.masks[name] = part.view_as(weight)


@dataclass
class KeepZeros(Masks):
    """Weights of linear layers that are 0 when the stage begins stay 0: a model that was pruned stays so."""

    @property
    def settled(self) -> bool:
        return True

    def begin(self, policy: CausalPolicy, optimizer: MasterAdamW, total: int, seed: int) -> None:
        no_adapter(policy)
        wanted = set(pruned(policy))
        named = zip(optimizer.names, optimizer.masters, strict=True)
        self.masks = {name: master.detach() != 0 for name, master in named if name in wanted}

    def updated(self, optimizer: MasterAdamW, gradients: Mapping[str, Tensor]) -> None:
        apply_masks(optimizer, self.masks)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Its masks are all it has."""


def no_adapter(policy: CausalPolicy) -> None:
    """PosttrainError where an adapter is trained, whose product with the weights has no zeros."""
    if policy.adapted:
        raise PosttrainError("weights are pruned as they are trained, which an adapter keeps apart; set lora: 0")


@torch.no_grad()
def apply_masks(optimizer: MasterAdamW, masks: Mapping[str, Tensor]) -> None:
    """Weights that are gone are 0, and so are their moments, or momentum would bring them back."""
    for name, master in zip(optimizer.names, optimizer.masters, strict=True):
        if name in masks:
            master.mul_(masks[name])
            for key in ("exp_avg", "exp_avg_sq"):
                if key in optimizer.adam.state.get(master, {}):
                    optimizer.adam.state[master][key].mul_(masks[name])
    optimizer.publish()


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """The share of the weights that are gone."""
    return 1 - sum(int(m.sum()) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))


def pruned(policy: CausalPolicy) -> list[str]:
    """Names of the weights of linear layers, but for the vocabulary projection's."""
    projection = policy.base.get_output_embeddings()
    modules = policy.model.named_modules()
    return [f"{n}.weight" for n, m in modules if isinstance(m, nn.Linear) and m is not projection]


@torch.no_grad()
def regrown(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> Tensor:
    """The mask of a layer whose smallest active weights made room for as many with the largest gradients."""
    active = int(mask.sum())
    count = math.ceil(share * active)
    kept = mask.flatten().clone()
    smallest = torch.where(mask, weight.abs(), torch.inf).flatten().topk(count, largest=False).indices
    kept[smallest] = False
    grown = torch.where(kept, -1.0, gradient.abs().flatten()).topk(count).indices
    kept[grown] = True
    return kept.view_as(mask)


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Densities of layers that go with sum(shape) / prod(shape), none above 1, and make up `density` of all weights.

    Reference: RigL, 2019, arXiv 1911.11134 (Erdős–Rényi-kernel).
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    whole: set[int] = set()
    while True:
        rest = density * sum(sizes) - sum(sizes[i] for i in whole)
        parts = sum(raw[i] * sizes[i] for i in range(len(sizes)) if i not in whole)
        scale = rest / parts if parts else 0.0
        over = {i for i in range(len(sizes)) if i not in whole and scale * raw[i] > 1}
        if not over:
            return [1.0 if i in whole else scale * raw[i] for i in range(len(sizes))]
        whole |= over


def random_mask(shape: tuple[int, ...], density: float, draw: torch.Generator) -> Tensor:
    """A mask of exactly that density, to a weight."""
    size = math.prod(shape)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=draw)[: round(density * size)]] = True
    return mask.view(shape)
