"""MoEQuant's affinity guidance: GPTQ in which a token counts for an expert as much as the router has it count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.compress.experts import holder, routed_inputs
from posttrain.compress.moments import InputMoments
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.walk import Block

SHARED, SHARED_GATE = "shared_expert", "shared_expert_gate"  # of Qwen's mixtures: an expert of all tokens, with a gate


@dataclass(frozen=True)
class AffinityGPTQ(GPTQ):
    r"""`H_e = 2/Σc Σ_t c_e(x_t) a_t a_t^T` for the three matrices of expert e, with c the router's weights and a_t what
    each matrix is given of token t. A shared expert with a gate of its own counts tokens by the gate's sigmoid; other
    layers count all alike.

    Reference: MoEQuant, 2025, arXiv 2505.03804 (card 149).
    """

    def statistics(self, block: Block, stage: list[str]) -> dict[str, InputMoments]:
        routed = [name for name in stage if holder(block.module, name)]
        gates = shared_gates(block.module)
        shared = {expert: [n for n in stage if n.startswith(f"{expert}.")] for expert in gates}
        plain = [n for n in stage if n not in routed and not any(n in names for names in shared.values())]
        found = block.moments(plain, keep=self.keep) if plain else {}
        if routed:
            found |= block.moments(routed, keep=self.keep, weights_at=lambda name: affinity(block.module, name))
        for expert, names in shared.items():
            if names:
                parts = [block.module.get_submodule(n) for n in (expert, gates[expert])]
                with openings(*parts) as open_now:
                    found |= block.moments(names, keep=self.keep, weights_at=open_now)
        return found


def affinity(block: nn.Module, name: str) -> Tensor:
    """`[n]`: what the router weighs the tokens by that the expert of this layer is given now."""
    sent = routed_inputs(block, name)
    assert sent is not None
    return sent.weights.detach().float()


def shared_gates(block: nn.Module) -> dict[str, str]:
    """The names of shared experts that have a gate, and of their gates."""
    found = {}
    for name, module in block.named_modules():
        if hasattr(module, SHARED) and hasattr(module, SHARED_GATE):
            prefix = f"{name}." if name else ""
            found[f"{prefix}{SHARED}"] = f"{prefix}{SHARED_GATE}"
    return found


@contextmanager
def openings(expert: nn.Module, gate: nn.Module) -> Iterator[Callable[[str], Tensor]]:
    """Inside, the function that is given tells how far the gate is open for the tokens that the shared expert is given
    now, `[n]`.
    """
    now = torch.zeros(0)

    def seen(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal now
        now = torch.sigmoid(gate(given[0]).detach().float()).flatten()

    handle = expert.register_forward_pre_hook(seen)
    try:
        yield lambda name: now
    finally:
        handle.remove()
