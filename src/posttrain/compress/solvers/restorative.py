"""Making a model easier to compress: low-rank training of what a first compression gave, merged, to be compressed anew.

Source: PTQ1.61, 2025, arXiv 2502.13179 (card 032), "restorative LoRA".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch
from posttrain.compress.packed.linear import PackedLinear, TransformedLinear
from posttrain.compress.stacks import replace_module, stacks
from posttrain.compress.walk import Walk
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Restoration:
    """LoRA on every layer that is compressed, by plain cross-entropy on the calibration text.

    steps: of the optimizer, `rows` sequences each (the paper's: 10,000 of 2 x 2,048 tokens of other text). rank, alpha:
    the update is alpha/rank B A. rate: highest learning rate; a twentieth of the steps warms up, a cosine ends at 0.
    """

    steps: int = 100
    rows: int = 2
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or self.rank < 1:
            raise PosttrainError(f"restoration of {self.steps} steps, rank {self.rank}: expected at least 1 of each")


def restored(walk: Walk, settings: Restoration, compress: Callable[[Walk], None]) -> None:
    """Compress a copy of the model, train it, and put its merged weights in the place of the model's own.

    compress: solves the blocks of a walk. The model is then what a first compression of it became by training, in
    float.
    """
    rows = list(_rows(walk.batches, settings.rows))
    model = copy.deepcopy(walk.model)
    (stack,) = [found for found in stacks(model) if found.name == walk.stack.name]
    compress(Walk(model, stack, walk.batches, keeps_float=True, skip=walk.skip, bits=walk.bits, seed=walk.seed))
    names = [n for n, m in model.named_modules() if isinstance(m, PackedLinear) and n.startswith(f"{stack.name}.")]
    for name in names:
        replace_module(model, name, _float(model.get_submodule(name), walk.model.get_submodule(name)))
    merged = _trained(model, names, rows, settings)
    with torch.no_grad():
        for name in names:
            weight = walk.model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(merged[name])


def _float(packed: nn.Module, before: nn.Module) -> nn.Module:
    """A linear layer with the values of a packed one, in the precision and behind the steps of the float layer."""
    assert isinstance(packed, PackedLinear)
    assert isinstance(before, nn.Linear)
    made = nn.Linear(before.in_features, before.out_features, bias=before.bias is not None, dtype=before.weight.dtype)
    with torch.no_grad():
        made.weight.copy_(packed.weight.dequantize())
        if before.bias is not None:
            made.bias.copy_(before.bias)
    made = made.to(before.weight.device)
    return TransformedLinear.of(made, before.inputs) if isinstance(before, TransformedLinear) else made


def _trained(model: nn.Module, names: list[str], rows: list[Batch], settings: Restoration) -> dict[str, Tensor]:
    """The weights of these layers, `[out, in]` each, after training with what was learned merged in."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names, bias="none"
    )  # fmt: skip
    model.requires_grad_(False)
    adapted: Any = inject_adapter_in_model(config, model)
    learned = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.rate, weight_decay=0.0)
    warm = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, warm, settings.steps))
    draw = torch.Generator().manual_seed(0)
    adapted.train()
    with torch.enable_grad():
        for _ in range(settings.steps):
            row = rows[int(torch.randint(len(rows), (1,), generator=draw))]
            loss = adapted(**row).loss
            if not torch.isfinite(loss):
                raise PosttrainError(
                    f"restoring the model: its loss is {float(loss.detach())}; lower the learning rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    found = {}
    for name in names:
        layer: Any = adapted.get_submodule(name)
        found[name] = (layer.base_layer.weight + layer.get_delta_weight("default").to(layer.base_layer.weight)).detach()
    return found


def _factor(step: int, warm: int, steps: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, steps - warm)))))


def _rows(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    """The calibration text, `rows` sequences at a time, with labels."""
    for batch in batches:
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(tokens, Tensor):
            raise PosttrainError("restoring the model trains it on text; the calibration batches hold no input_ids")
        for start in range(0, len(tokens), rows):
            part = slice(start, start + rows)
            labels = tokens[part] if mask is None else tokens[part].masked_fill(mask[part] == 0, -100)
            masks = {} if mask is None else {"attention_mask": mask[part]}
            yield {"input_ids": tokens[part], "labels": labels, "use_cache": False, **masks}
