"""Small vision transformers of the lab's images, trained once by seed and kept in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.lab import haste
from posttrain.lab import images as world
from posttrain.lab.cache import kept
from posttrain.models.saving import save_model

ACCURACY, MEASURED = "accuracy.json", 1000
STREAM = 1_000_003  # between the seeds of the images that two models are trained on


@dataclass(frozen=True)
class VisionSpec:
    """A vision transformer of `transformers` and its training: `steps` of `batch` fresh images each, AdamW at a rate
    that rises and falls.
    """

    name: str = "patterns"
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    patch: int = 4
    steps: int = 600
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0

    @property
    def key(self) -> str:
        """Twelve digits of a hash of all of this and of the code behind it."""
        code = [Path(str(world.__file__)).read_text(encoding="utf-8")]
        code += [inspect.getsource(function) for function in (initial, trained)]
        resolved = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b("\0".join([resolved, *code]).encode(), digest_size=6).hexdigest()


PATTERNS = VisionSpec()


def vision_model(spec: VisionSpec = PATTERNS, seed: int | None = None) -> Any:
    """A `ViTForImageClassification` in fp32 on the CPU: from the cache, or trained now (about a minute).

    seed: in the place of the specification's: of the initial weights and of the images. Where haste is asked for the
    model may have hardly been trained.
    """
    from transformers import ViTForImageClassification

    if seed is not None:
        spec = dataclasses.replace(spec, seed=seed)

    def make(scratch: Path) -> Path:
        steps = min(spec.steps, haste.STEPS) if haste.is_hasty() else spec.steps
        model, folder = trained(dataclasses.replace(spec, steps=steps)), scratch / "model"
        save_model(model, folder)
        (folder / ACCURACY).write_text(json.dumps({"accuracy": accuracy(model, MEASURED)}) + "\n")
        return folder

    folder = kept(f"{spec.name}-{spec.seed}-{spec.key}", ACCURACY, make)
    return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def initial(spec: VisionSpec) -> Any:
    """The untrained model of a specification."""
    from transformers import ViTConfig, ViTForImageClassification

    shape: dict[str, Any] = {
        "hidden_size": spec.hidden,
        "intermediate_size": 2 * spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "image_size": world.SIDE,
        "patch_size": spec.patch,
        "num_channels": 1,
        "num_labels": len(world.KINDS),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.05,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return ViTForImageClassification(ViTConfig(**shape))


def trained(spec: VisionSpec) -> Any:
    """The model trained to tell the brighter pattern."""
    model = initial(spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.learning_rate, total_steps=spec.steps)
    with torch.enable_grad():
        for step in range(spec.steps):
            given = world.images(spec.batch, STREAM * (spec.seed + 1) + step)
            loss = torch.nn.functional.cross_entropy(model(pixel_values=given.pixels).logits, given.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def logits(model: Any, pixels: Tensor, batch: int = 250) -> Tensor:
    """`[n, kinds]` fp32 of `[n, 1, side, side]`."""
    return torch.cat([model(pixel_values=part).logits.float() for part in pixels.split(batch)])


def accuracy(model: Any, count: int, seed: int = 0) -> float:
    """The share of `count` held-out images that a model tells right."""
    given = world.images(count, seed, "heldout")
    return float((logits(model, given.pixels).argmax(-1) == given.labels).float().mean())
