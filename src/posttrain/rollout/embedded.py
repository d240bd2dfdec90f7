"""The embedded engine: the `transformers` model itself, with shared prompts and continuous batching.

The prompt of a group is computed once and its keys and values copied to the group's rows. Finished rows leave at once
and waiting ones take their place, so the batch stays full until the work runs out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.models.attention import packed_attention
from posttrain.models.causal import CausalPolicy
from posttrain.models.packing import pack_prompts
from posttrain.rollout.engine import Progress
from posttrain.rollout.sampling import Draw, draw
from posttrain.rollout.slots import Slots
from posttrain.trajectory import Completion, Finish, PosttrainError, Prompt, Sampling

CACHE_BYTES = 2 << 30  # key-value memory at most; fewer rows run at a time when prompts are long
PREFILL_TOKENS = 4096  # prompt tokens computed in one packed row


@dataclass(slots=True)
class _Row:
    prompt: int
    sample: int
    uniform: Tensor
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    logp_full: list[float] = field(default_factory=list)


class EmbeddedEngine:
    """Samples from a `CausalPolicy` in this process, always with its present weights.

    rows: completions decoded together at most.
    """

    def __init__(self, policy: CausalPolicy, *, rows: int = 64) -> None:
        self.policy = policy
        self.rows = rows

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        if samples < 1:
            raise PosttrainError(f"samples is {samples}; expected at least 1 completion a prompt")
        limit = self.policy.max_length
        for prompt in prompts:
            if not len(prompt.tokens):
                raise PosttrainError(f"prompt {prompt.key} is empty: a completion needs at least one token before it")
            if len(prompt.tokens) + 1 > limit:
                raise PosttrainError(
                    f"prompt {prompt.key} has {len(prompt.tokens)} tokens and the model's context is {limit}: "
                    f"shorten the prompt or take a model with a longer context"
                )
        if not prompts:
            return []
        run = _Run(self.policy, prompts, samples, sampling, seed, self.rows)
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            return run.finish(progress)
        finally:
            self.policy.model.train(training)


class _Run:
    """One call of `generate`: which rows run, which wait, what has been drawn."""

    def __init__(
        self, policy: CausalPolicy, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, rows: int
    ) -> None:
        if not policy.packs:
            raise PosttrainError(
                f"{policy.name}: the embedded engine needs a model whose attention can be replaced; "
                f"this architecture ({type(policy.base).__name__}) is not supported by it"
            )
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        self.head = policy.head()
        self.ends = policy.end_tokens
        self.limits = [min(sampling.max_tokens, policy.max_length - len(p.tokens)) for p in prompts]
        capacity = max(len(p.tokens) + n for p, n in zip(prompts, self.limits, strict=True))
        self.waiting: deque[_Row] = deque()
        occurrence: Counter[int] = Counter()
        for i, prompt in enumerate(prompts):
            for s in range(samples):
                number = occurrence[prompt.key] * samples + s
                noise = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, abs(prompt.key), number])))
                self.waiting.append(_Row(i, s, torch.from_numpy(noise.random(self.limits[i]))))
            occurrence[prompt.key] += 1
        self.total = len(self.waiting)
        self.results: list[list[Completion | None]] = [[None] * samples for _ in prompts]
        self.running: list[_Row] = []
        self.hidden: Tensor | None = None
        self.slots = Slots(min(rows, self.total, self._affordable(capacity)), capacity, policy.window)

    def _affordable(self, capacity: int) -> int:
        config = self.policy.base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row = 2 * config.num_hidden_layers * heads * width * capacity * self.policy.dtype.itemsize
        return max(1, CACHE_BYTES // row)

    def finish(self, progress: Progress | None) -> list[list[Completion]]:
        """Run until nothing waits or runs."""
        with packed_attention(self.policy.model):
            while self.waiting or self.running:
                self._admit()
                self._append(self._draw())
                self._retire(progress)
                if self.running:
                    self._decode()
        return [[c for c in row if c is not None] for row in self.results]

    def _admit(self) -> None:
        """Start waiting rows in the free slots, computing each of their prompts once."""
        free = self.slots.count - len(self.running)
        if not free or not self.waiting:
            return
        fresh = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        by_prompt: dict[int, list[_Row]] = {}
        for row in fresh:
            by_prompt.setdefault(row.prompt, []).append(row)
        states = [] if self.hidden is None else [self.hidden]
        batch: list[int] = []
        for i in [*by_prompt, None]:
            full = sum(len(self.prompts[j].tokens) for j in batch) >= PREFILL_TOKENS
            if batch and (i is None or full):
                states += self._prefill(batch, by_prompt)
                batch = []
            if i is not None:
                batch.append(i)
        self.hidden = torch.cat(states)

    def _prefill(self, batch: list[int], by_prompt: dict[int, list[_Row]]) -> list[Tensor]:
        """Compute prompts in one packed row; returns the last hidden state for each row started."""
        layout = pack_prompts([self.prompts[i].tokens for i in batch], self.policy.window).to(self.policy.device)
        captured: dict[int, tuple[Tensor, Tensor]] = {}
        out = self.policy.body(
            input_ids=layout.tokens[None],
            position_ids=layout.positions[None],
            use_cache=False,
            packed_layout=layout,
            captured=captured,
        ).last_hidden_state[0]
        states = []
        for segment, i in zip(layout.segments, batch, strict=True):
            part = slice(segment.start, segment.start + segment.length)
            rows = by_prompt[i]
            self.slots.admit({n: (k[:, part], v[:, part]) for n, (k, v) in captured.items()}, len(rows))
            self.running += rows
            states.append(out[part.stop - 1].expand(len(rows), -1))
        return states

    def _draw(self) -> Draw:
        assert self.hidden is not None
        uniform = torch.stack([row.uniform[len(row.tokens)] for row in self.running])
        return draw(self.head.logits(self.hidden), uniform.to(self.hidden.device), self.sampling)

    def _append(self, drawn: Draw) -> None:
        for row, token, logp, full in zip(
            self.running, drawn.token.tolist(), drawn.logp.tolist(), drawn.logp_full.tolist(), strict=True
        ):
            row.tokens.append(token)
            row.logp.append(logp)
            row.logp_full.append(full)

    def _retire(self, progress: Progress | None) -> None:
        """Hand finished rows over and close the gaps they leave."""
        keep = []
        for place, row in enumerate(self.running):
            finish = self._finished(row)
            if finish == "none":
                keep.append(place)
                continue
            self.results[row.prompt][row.sample] = Completion(
                torch.tensor(row.tokens), torch.tensor(row.logp), torch.tensor(row.logp_full), finish, self._text(row)
            )
        if len(keep) < len(self.running):
            kept = torch.tensor(keep, dtype=torch.int64)
            order = Slots.order(kept)
            self.slots.compact(kept)
            self.running = [self.running[i] for i in order.tolist()]
            if progress is not None:
                progress(self.total - len(self.waiting) - len(self.running), self.total)

    def _finished(self, row: _Row) -> Finish:
        if row.tokens[-1] in self.ends:
            return "stop"
        if self.sampling.stop and any(s in self._text(row) for s in self.sampling.stop):
            return "stop"
        return "length" if len(row.tokens) >= self.limits[row.prompt] else "none"

    def _text(self, row: _Row) -> str:
        return str(self.policy.tokenizer.decode(row.tokens, skip_special_tokens=True))

    def _decode(self) -> None:
        """One step of the model for all running rows."""
        positions = self.slots.begin_step()
        tokens = torch.tensor([[row.tokens[-1]] for row in self.running])
        self.hidden = self.policy.body(
            input_ids=tokens.to(self.policy.device),
            position_ids=positions[:, None].to(self.policy.device),
            use_cache=False,
            kv_slots=self.slots,
        ).last_hidden_state[:, 0]
