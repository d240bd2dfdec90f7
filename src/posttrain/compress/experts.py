"""The experts of a mixture as linear layers of their own.

`transformers` holds the weights of all experts of a layer fused, `gate_up_proj [experts, 2 * inner, hidden]` and
`down_proj [experts, hidden, inner]`, in no `nn.Linear`. Here they are taken apart into `experts.0.gate_proj`,
`experts.0.up_proj`, `experts.0.down_proj`, ..., with the same outputs, so that every method sees them as linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.compress.stacks import replace_module
from posttrain.trajectory import PosttrainError

FUSED = ("gate_up_proj", "up_proj", "down_proj")


class Sent(NamedTuple):
    """What one expert is given. tokens: `[n]` their places among the layer's tokens. weights: `[n]` the router's."""

    expert: int
    tokens: Tensor
    weights: Tensor


class Expert(nn.Module):
    """One expert; gate_proj is None where the model's experts have no gate."""

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down


class Experts(nn.Module):
    """The experts of one layer, its children `0`, `1`, ... (`Expert`s), routed as the fused module routed them.

    rule: the fused module without its weights; it knows how gate and up are joined, and holds a norm if there is one.
    now: what the expert that is running was given, for those that watch its layers.
    also: experts that are shown every token as well; what they make of it is dropped (see `shown_all`).
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.count = len(fused.get_parameter("down_proj"))
        for number in range(self.count):
            self.add_module(str(number), _expert(fused, number))
        for name in [n for n, _ in fused.named_parameters(recurse=False) if n.removesuffix("_bias") in FUSED]:
            delattr(fused, name)
        self.rule = fused
        self.now: Sent | None = None
        self.also: frozenset[int] = frozenset()

    def forward(self, hidden: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """`[tokens, hidden]` -> the same. index, weights: `[tokens, k]` the router's choice; without them (Llama 4) the
        input is `[experts * tokens, hidden]`, weighted by the router already, and so is the output.
        """
        if index is None or weights is None:
            return self._weighted(hidden.view(self.count, -1, hidden.shape[-1])).view(hidden.shape)
        found = torch.zeros_like(hidden)
        for number in range(self.count):
            tokens, slot = torch.where(index == number)
            if len(tokens):
                sent = Sent(number, tokens, weights[tokens, slot])
                out = self._run(sent, hidden[tokens]) * sent.weights[:, None]
                found.index_add_(0, tokens, out.to(found.dtype))
        for number in self.also:
            self._run(_everything(number, hidden), hidden)
        return found

    def _weighted(self, parts: Tensor) -> Tensor:
        """`[experts, tokens, hidden]` inputs, zeros where a token was not sent to an expert, whose output is then 0."""
        found = torch.zeros_like(parts)
        for number, part in enumerate(parts):
            tokens = torch.nonzero(part.abs().amax(-1))[:, 0]
            if len(tokens):
                found[number, tokens] = self._run(Sent(number, tokens, torch.ones_like(part[tokens, 0])), part[tokens])
        for number in self.also:
            self._run(_everything(number, parts[0]), parts.sum(0))
        return found

    def _run(self, sent: Sent, hidden: Tensor) -> Tensor:
        expert = self.get_submodule(str(sent.expert))
        assert isinstance(expert, Expert)
        self.now = sent
        try:
            if expert.gate_proj is None:
                joined = self.rule.act_fn(expert.up_proj(hidden))  # type: ignore[operator]
            else:
                joined = self._gated(expert.gate_proj(hidden), expert.up_proj(hidden))
            out = expert.down_proj(joined)
        finally:
            self.now = None
        return self.rule.post_expert_norm(out) if getattr(self.rule, "has_post_expert_norm", False) else out  # type: ignore[operator]

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if not hasattr(self.rule, "_apply_gate"):
            return self.rule.act_fn(gate) * up  # type: ignore[operator]
        together = torch.stack([gate, up], -1).flatten(-2) if _interleaved(self.rule) else torch.cat([gate, up], -1)
        return self.rule._apply_gate(together)  # type: ignore[operator]


def _everything(number: int, hidden: Tensor) -> Sent:
    tokens = torch.arange(len(hidden), device=hidden.device)
    return Sent(number, tokens, torch.ones_like(tokens, dtype=hidden.dtype))


def unfuse(model: nn.Module) -> list[str]:
    """Take the fused experts of a model apart, in place; returns the names of their modules (none in a dense model).

    PosttrainError for experts that are held in a way that is not known here: they would silently stay uncompressed.
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    for name, module in fused.items():
        replace_module(model, name, Experts(module))
    return list(fused)


def is_unfused(model: nn.Module) -> bool:
    """Whether a model's experts were taken apart by `unfuse`."""
    return any(isinstance(module, Experts) for module in model.modules())


def _is_fused(module: nn.Module) -> bool:
    deep = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if not deep:
        return False
    known = "down_proj" in deep and len(deep & {"gate_up_proj", "up_proj"}) == 1 and deep <= set(FUSED)
    if known and (hasattr(module, "has_gate") or type(module).__name__ == "Llama4TextExperts"):
        return True
    if "Expert" in type(module).__name__:
        raise PosttrainError(
            f"{type(module).__name__} holds its experts in a way that is not known here ({', '.join(sorted(deep))}); "
            f"expected gate_up_proj (or up_proj) and down_proj; such a model cannot be compressed"
        )
    return False


def _interleaved(fused: nn.Module) -> bool:
    return not getattr(fused, "is_concatenated", True)


def _expert(fused: nn.Module, number: int) -> Expert:
    """One expert's layers, with weights of their own (not views, so that each is freed when it is packed)."""
    transposed = getattr(fused, "is_transposed", type(fused).__name__ == "Llama4TextExperts")

    def matrix(name: str) -> tuple[Tensor, Tensor | None]:
        weight = getattr(fused, name)[number]
        bias = getattr(fused, f"{name}_bias", None)
        return weight.T if transposed else weight, None if bias is None else bias[number]

    down = _linear(*matrix("down_proj"))
    if not hasattr(fused, "gate_up_proj"):
        return Expert(None, _linear(*matrix("up_proj")), down)
    weight, bias = matrix("gate_up_proj")
    half = len(weight) // 2
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if _interleaved(fused) else (slice(0, half), slice(half, None))
    made = [_linear(weight[rows], None if bias is None else bias[rows]) for rows in (gate, up)]
    return Expert(made[0], made[1], down)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return made


# -- on the walk -----------------------------------------------------------------------------------------------------


def holder(block: nn.Module, name: str) -> tuple[Experts, int] | None:
    """The experts that a layer of a block belongs to, and the number of its own; None of any other layer."""
    for found in re.finditer(r"\.(\d+)\.", name):
        module = block.get_submodule(name[: found.start()])
        if isinstance(module, Experts):
            return module, int(found[1])
    return None


def together(block: nn.Module, stages: Sequence[Sequence[str]]) -> list[list[str]]:
    """Stages with those of all experts of a layer joined: first all gates and ups, then all downs. An expert's layers
    that no token has reached join those of its siblings.
    """
    joined: list[list[str]] = []
    place: dict[str, int] = {}
    for stage in stages:
        patterns = [re.sub(r"\.\d+\.", ".*.", n, count=1) if holder(block, n) else n for n in stage]
        index = next((place[p] for p in patterns if p in place), len(joined))
        if index == len(joined):
            joined.append([])
        joined[index] += stage
        for pattern in patterns:
            place.setdefault(pattern, index)
    return joined


@contextmanager
def shown_all(block: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """Inside, the experts that hold these layers are shown every token of their layer; yields those layers' names.

    This is the fallback for an expert that no calibration token was sent to: its layers are calibrated as though all
    tokens were, instead of on nothing.
    """
    shown: dict[Experts, set[int]] = {}
    reachable = []
    for name in names:
        if (found := holder(block, name)) is not None:
            shown.setdefault(found[0], set()).add(found[1])
            reachable.append(name)
    try:
        for experts, numbers in shown.items():
            experts.also = frozenset(numbers)
        yield reachable
    finally:
        for experts in shown:
            experts.also = frozenset()


def routed_inputs(block: nn.Module, name: str) -> Sent | None:
    """While a block runs: what the expert that holds a layer is given now; None of any other layer."""
    found = holder(block, name)
    return None if found is None else found[0].now
