"""AdamW on fp32 master weights, gradients summed in fp32 (also over processes), clipping, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from posttrain.models.sharded import is_piece, piece
from posttrain.objective.sink import close_sink, open_sink
from posttrain.processes import add
from posttrain.training.checkpoint import Part, Stored
from posttrain.training.parallel import add_gradients, part_of, stored
from posttrain.training.settings import Settings
from posttrain.trajectory import PosttrainError


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up, then the schedule down to 0 (or constant)."""
    warm = math.ceil(settings.warmup * total) if settings.warmup else 0
    if step < warm:
        return settings.learning_rate * (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - warm) / max(1, total - warm)
    factor = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * max(0.0, factor)


class MasterAdamW:
    """AdamW whose state and arithmetic are fp32 whatever the model computes in.

    A low-precision parameter has an fp32 master copy: updates smaller than its spacing in bf16 (most of them, at usual
    learning rates) would otherwise be lost. Gradients of micro-batches are added in fp32 as soon as a parameter's is
    ready, so a low-precision gradient lives only for a moment; backward functions that know sinks add theirs themselves
    (`objective/sink.py`).

    Of a parameter that is spread over processes the master is this process's rows themselves, in its memory.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], settings: Settings) -> None:
        self.names, self.parameters = [list(x) for x in zip(*named, strict=True)]
        self.masters = [_master(p) for p in self.parameters]
        decay = [m for m in self.masters if m.ndim > 1]
        plain = [m for m in self.masters if m.ndim <= 1]
        groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        held = self.masters[0].device.type != "meta"  # a plan's rehearsal is of tensors that hold nothing
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas, fused=held
        )
        self.max_grad_norm, self.skip_grad_norm = settings.max_grad_norm, settings.skip_grad_norm
        self._hooks = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and not is_piece(parameter):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collector(master)))
                open_sink(parameter, master)

    @staticmethod
    def _collector(master: Tensor):
        def collect(parameter: Tensor) -> None:
            if parameter.grad is None:  # a sink took it
                return
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return collect

    def step(self, rate: float) -> float:
        """Clip and update; returns the gradient norm before clipping. Nothing changes if that is not
        `usable`."""
        with_grad = [m for m in self.masters if m.grad is not None]
        norm = self._norm()
        if self.usable(float(norm)):
            if self.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(with_grad, self.max_grad_norm, norm)
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
            self.publish()
        self.zero()
        return float(norm)

    def usable(self, norm: float) -> bool:
        """Whether a gradient of this norm may move the weights: finite, and not above `skip_grad_norm`."""
        return math.isfinite(norm) and (self.skip_grad_norm is None or norm <= self.skip_grad_norm)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model's parameters."""
        own = zip(self.parameters, self.masters, strict=True)
        pairs = [(p, m) for p, m in own if p is not m and not is_piece(p)]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def reduce(self) -> None:
        """Make the gradients those of all processes together; each has added up those of its own micro-batches."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if is_piece(parameter) and parameter.grad is not None:  # summed as it was spread
                master.grad, parameter.grad = piece(parameter.grad), None
        add_gradients([m for p, m in zip(self.parameters, self.masters, strict=True) if not is_piece(p)])

    def only(self, wanted: Callable[[str], bool]) -> None:
        """Drop the gradients of all parameters but those with a wanted name: the others stay as they are."""
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            if not wanted(name):
                parameter.grad = master.grad = None

    def divide(self, divisor: float, wanted: Callable[[str], bool]) -> None:
        """Divide the gradients of the parameters with a wanted name."""
        for name, master in zip(self.names, self.masters, strict=True):
            if master.grad is not None and wanted(name):
                master.grad /= divisor

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients summed so far, leaving none."""
        taken = [m.grad for m in self.masters]
        self.zero()
        return taken

    def put_gradients(self, gradients: list[Tensor | None]) -> None:
        """Put back what `take_gradients` took, in place of what there is."""
        self.zero()
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient

    def gradients(self) -> dict[str, Tensor]:
        """The gradients summed so far, by name; a step clips them in place and lets go of them."""
        return {n: m.grad for n, m in zip(self.names, self.masters, strict=True) if m.grad is not None}

    def gradient_norm(self) -> float:
        """Norm of the gradients summed so far."""
        return float(self._norm())

    def _norm(self) -> Tensor:
        """0-d; what is spread counts in all processes, and what each has a copy of once."""
        graded = [(p, m.grad) for p, m in zip(self.parameters, self.masters, strict=True) if m.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for p, g in graded if not is_piece(p)])
        if any(is_piece(p) for p in self.parameters):
            spread = torch.nn.utils.get_total_norm([g for p, g in graded if is_piece(p)])
            norm = (norm.to(spread.device) ** 2 + add(spread.double() ** 2)).sqrt().float()
        return norm

    def zero(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = master.grad = None

    def close(self) -> None:
        """Detach from the model's parameters."""
        self.zero()
        for hook in self._hooks:
            hook.remove()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            close_sink(parameter, master)

    def tensors(self) -> dict[str, Tensor | Part]:
        """Everything a checkpoint needs: master weights and moments by parameter name."""
        found: dict[str, Tensor | Part] = {}
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            part = part_of(parameter)
            for key, value in {"weight": master.detach(), **self.adam.state.get(master, {})}.items():
                spread = isinstance(part, Part) and value.ndim
                found[f"{key}/{name}"] = replace(part, rows=value) if isinstance(part, Part) and spread else value
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave, however many processes it was."""
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            key = f"weight/{name}"
            shape = None
            if key in tensors:
                shape = tensors.shape(key) if isinstance(tensors, Stored) else tuple(tensors[key].shape)
            if shape != tuple(parameter.shape):
                found = "nothing" if shape is None else f"shape {list(shape)}"
                raise PosttrainError(
                    f"the checkpoint holds {found} for {name}; expected {list(parameter.shape)}: it is of another model"
                )
            master.copy_(stored(tensors, key, parameter))
            moments = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
            state = {
                key: tensors[f"{key}/{name}"] if key == "step" else stored(tensors, f"{key}/{name}", parameter)
                for key in moments
            }
            if state:
                self.adam.state[master] = {key: t.to(master.device, copy=True) for key, t in state.items()}
        self.publish()


def _master(parameter: nn.Parameter) -> Tensor:
    """What the optimizer updates for a parameter, fp32."""
    if is_piece(parameter):
        return piece(parameter).requires_grad_()
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()
