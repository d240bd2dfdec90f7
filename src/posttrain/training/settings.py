"""Settings of a training stage: what a recipe may set beside a method's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from posttrain.trajectory import PosttrainError, Sampling

Schedule = Literal["constant", "linear", "cosine"]
LATER = {"later": True}  # a setting that came later: what has its default is what was there before it


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how fast and on what to train. Methods bring their own defaults; a recipe overrides any of them.

    Length: `steps` optimizer steps of `batch` rows (offline) or prompts (online), or `epochs` over the rows; a
    `budget` in seconds, a `token_limit` (tokens trained on) or a `rollout_limit` (completions drawn) ends a stage
    early. `rows` limits the training rows.
    Optimiser: AdamW, `learning_rate` after `warmup` (share of the steps) following `schedule`, `weight_decay`,
    `betas`, gradients clipped at the norm `max_grad_norm`; an update whose gradient
    norm exceeds `skip_grad_norm` is skipped.
    LoRA: `lora` is its rank, 0 for full fine-tuning.
    Online: `group` completions a prompt, `max_tokens`, `temperature`, `top_k`, `top_p`, `min_p`; `updates` passes
    over a step's rollouts in `minibatches` pieces; `rollout_rows` completions decoded together. `staleness` is how many
    updates old the weights are that draw a step's completions (sampling goes on during training; see `ahead`).
    `token_budget` model tokens are computed at a time, and with `checkpointing` layers keep their inputs alone and are
    computed again in the backward pass (memory and time; never the result).
    Evaluation: every `evaluate_every` steps on `evaluate_limit` held-out prompts; training stops after `patience`
    evaluations without a better one and keeps the best weights.
    Safety: a checkpoint every `checkpoint_every` steps, and after ten minutes without one (0: never); `max_skipped`
    steps in a row with a loss that is not finite, or with such a gradient, end the run.
    """

    steps: int | None = None
    epochs: float | None = None
    budget: float | None = None
    token_limit: int | None = None
    rollout_limit: int | None = None
    rows: int | None = None
    batch: int = 16
    learning_rate: float = 1e-5
    schedule: Schedule = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    skip_grad_norm: float | None = None
    lora: int = 0
    group: int = 8
    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    updates: int = 1
    minibatches: int = 1
    staleness: int = field(default=0, metadata=LATER)
    rollout_rows: int = 64
    token_budget: int = 2048
    checkpointing: bool = field(default=False, metadata=LATER)
    evaluate_every: int = 0
    evaluate_limit: int = 64
    patience: int = 0
    checkpoint_every: int = 50
    max_skipped: int = 5

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1), ("epochs", 0), ("budget", 0), ("token_limit", 1), ("rollout_limit", 1), ("rows", 1),
            ("batch", 1), ("group", 1), ("updates", 1),
            ("minibatches", 1), ("staleness", 0), ("rollout_rows", 1), ("token_budget", 1), ("evaluate_every", 0),
            ("patience", 0),
            ("checkpoint_every", 0), ("max_skipped", 1), ("lora", 0), ("learning_rate", 0), ("warmup", 0),
            ("max_grad_norm", 0), ("skip_grad_norm", 0), ("weight_decay", 0), ("evaluate_limit", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise PosttrainError(f"{name} is {value}; expected at least {low}")
        if self.warmup > 1:
            raise PosttrainError(f"warmup is {self.warmup}; expected a share of the steps between 0 and 1")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise PosttrainError(f"schedule is {self.schedule!r}; expected constant, linear or cosine")
        _ = self.sampling  # its own checks

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.min_p)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the stage, given how many rows there are."""
        if self.steps is not None:
            return self.steps
        per_epoch = max(1, -(-rows // self.batch))
        return max(1, round(per_epoch * (self.epochs if self.epochs is not None else 1)))

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


NAMES = tuple(f.name for f in fields(Settings))
