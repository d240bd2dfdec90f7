"""Mamba mixers taken apart: the same computation with every tensor of it within reach.

`transformers` hands some weights of a mixer to functions instead of calling the layers, so that what goes on between
them cannot be seen or changed from outside. A `Mixer` calls its layers, may be watched, and may round what it hands on.
Its scan takes a few tokens together, in bounded memory, and trains many times faster than theirs on a CPU.

Source of the computation: Mamba, 2023, arXiv 2312.00752.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.trajectory import PosttrainError

PLACES = ("projected", "scanned", "selected", "steps", "state")
TOLERANCE = 1e-3  # relative, of what a mixer taken apart gives on random inputs: the order of sums is another
TOGETHER = 32  # tokens whose states are held at once
LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


class Mixer(nn.Module):
    """A mixer with the parameters of the one that it is made of; the bias of its dt_proj is `dt_bias`.

    With h `[rows, tokens, hidden]`: x, z = in_proj(h); x = silu(conv1d(x)); dt, B, C = x_proj(x);
    Δ = softplus(dt_proj(dt) + dt_bias); S_t = exp(Δ_t A) S_{t-1} + Δ_t B_t x_t; y_t = C_t S_t + D x_t;
    out_proj(y silu(z)).

    rounding: by place, a module that rounds what is there: `projected`, x and z as in_proj gives them; `scanned`, x as
    the scan and x_proj are given it; `selected`, dt, B and C; `steps`, what dt_proj gives, before its bias; `state`,
    S after each token, `[rows, channels, states]`. watch: is called with place and tensor before it is rounded.
    """

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.in_proj, self.out_proj = mixer.in_proj, mixer.out_proj
        self.conv1d, self.x_proj = mixer.conv1d, mixer.x_proj
        self.dt_proj = nn.Linear(mixer.dt_proj.in_features, mixer.dt_proj.out_features, bias=False, device="meta")
        self.dt_proj.weight, self.dt_bias = mixer.dt_proj.weight, mixer.dt_proj.bias
        self.A_log, self.D = mixer.A_log, mixer.D
        self.act, self.layer_idx = mixer.act, mixer.layer_idx
        self.rounding = nn.ModuleDict()
        self.watch: Callable[[str, Tensor], None] | None = None

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`[rows, tokens, hidden]` to the same. cache_params: a cache of `transformers`. attention_mask: `[rows,
        tokens]`, 0 where there is no token.
        """
        before = None if cache_params is None else _state(cache_params.layers[self.layer_idx])
        states = self.A_log.shape[1]
        x, z = self._at("projected", self.in_proj(_masked(hidden_states, attention_mask))).chunk(2, -1)
        x = self._at("scanned", _masked(self.act(self._convolved(x, cache_params)), attention_mask))
        made = self._at("selected", self.x_proj(x))
        dt, b, c = made.split([made.shape[-1] - 2 * states, states, states], -1)
        steps = F.softplus(self._at("steps", self.dt_proj(dt)).float() + self.dt_bias.float())
        observed = "state" in self.rounding or self.watch is not None
        y, state = scan(
            x.float(), steps, -torch.exp(self.A_log.float()), b.float(), c.float(), before,
            (lambda state: self._at("state", state)) if observed else None,
        )  # fmt: skip
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        gated = (y + self.D.float() * x.float()) * F.silu(z.float())
        return self.out_proj(gated.to(hidden_states.dtype))

    def _at(self, place: str, tensor: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(place, tensor)
        return self.rounding[place](tensor) if place in self.rounding else tensor

    def _convolved(self, x: Tensor, cache: Any) -> Tensor:
        """`[rows, tokens, channels]`, each token with those before it, which a cache may hold."""
        tokens, channels = x.shape[1], x.transpose(1, 2)
        if cache is not None:
            width = self.conv1d.kernel_size[0]
            channels = cache.update_conv_state(channels, self.layer_idx, conv_kernel_size=width)
        return self.conv1d(channels)[..., : channels.shape[-1]][..., -tokens:].transpose(1, 2)


def scan(
    x: Tensor, steps: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None,
    rounded: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[rows, tokens, channels]` C_t S_t, and the last state `[rows, channels, states]`.

    x, steps: `[rows, tokens, channels]` x and Δ. a: `[channels, states]`. b, c: `[rows, tokens, states]`. state: S
    before the first token, 0 where None. rounded: what becomes of each S.
    """
    now = x.new_zeros(x.shape[0], *a.shape) if state is None else state.to(x.dtype)
    found = []
    for step, given, inward, outward in zip(*(each.split(TOGETHER, 1) for each in (steps, x, b, c)), strict=True):
        decay = torch.exp(step[..., None] * a)  # [rows, tokens, channels, states]
        added = (step * given)[..., None] * inward[:, :, None]
        states = []
        for keep, add in zip(decay.unbind(1), added.unbind(1), strict=True):
            now = torch.addcmul(add, keep, now)
            if rounded is not None:
                now = rounded(now)
            states.append(now)
        found.append((torch.stack(states, 1) @ outward[..., None])[..., 0])
    return torch.cat(found, 1), now


def _state(held: Any) -> Tensor | None:
    """What a cache holds of a layer's state; older transformers have the same without a word for it."""
    return held.recurrent_states[0] if held.has_previous_state[0] else None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[..., None].to(x.dtype)


# -- in a model ------------------------------------------------------------------------------------------------------


def take_apart(model: nn.Module, *, tried: bool = True) -> dict[str, nn.Module]:
    """Put a `Mixer` in the place of every mixer of a model; returns those that stood there, by name.

    tried: whether each must give what the one before gave, on random inputs. PosttrainError, with the model as it was,
    where it does not: some architectures have a norm more on their way (FalconMamba, Jamba).
    """
    before = {name: module for name, module in model.named_modules() if _is_mixer(module)}
    made = {name: Mixer(mixer) for name, mixer in before.items()}
    for name, mixer in made.items() if tried else ():
        if not _alike(mixer, before[name]):
            raise PosttrainError(
                f"{name} ({type(before[name]).__name__}) computes something else than a Mamba mixer (such as norms on "
                f"its step sizes), and cannot be taken apart; choose a method that leaves the scan as it is"
            )
    put(model, made)
    return before


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the places of those of their names."""
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """The model with its mixers taken apart inside the block, and as it was outside, with what was learned."""
    before = take_apart(model)
    try:
        yield
    finally:
        put(model, before)


def _is_mixer(module: Any) -> bool:
    held = all(isinstance(getattr(module, name, None), nn.Linear | nn.Conv1d) for name in LAYERS)
    a_log = getattr(module, "A_log", None)
    return held and isinstance(a_log, Tensor) and a_log.ndim == 2 and not isinstance(module, Mixer)


@torch.no_grad()
def _alike(one: nn.Module, other: Any) -> bool:
    weight = other.in_proj.weight
    draw = torch.Generator().manual_seed(0)
    probe = torch.randn(2, 5, weight.shape[1], generator=draw).to(weight)
    training = other.training
    other.eval()
    try:
        wanted = other(probe)
    finally:
        other.train(training)
    tolerance = TOLERANCE if weight.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((one(probe) - wanted).norm() <= tolerance * wanted.norm())
