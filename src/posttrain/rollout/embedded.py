"""The embedded engine: the `transformers` model itself, with shared prompts and continuous batching.

The prompt of a group is computed once and its keys and values copied to the group's rows. Finished rows leave at once
and waiting ones take their place, so the batch stays full until the work runs out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from posttrain.models.attention import packed_attention
from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.models.packed_linear import packed_linears
from posttrain.models.routing import Recorder, record_experts
from posttrain.rollout.engine import Progress
from posttrain.rollout.graphed import Decoder, GraphedRun, affordable, suits
from posttrain.rollout.prefill import read_prompts, row_bytes
from posttrain.rollout.rows import Ending, Row, append, start_rows, uniforms
from posttrain.rollout.sampling import draw_next
from posttrain.rollout.slots import Slots
from posttrain.rollout.static_slots import room_bucket, rows_bucket
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling

CACHE_BYTES = 2 << 30  # key-value memory at most; fewer rows run at a time when prompts are long
PREFILL_TOKENS = 4096  # prompt tokens computed in one packed row


class EmbeddedEngine:
    """Samples from a `CausalPolicy` in this process, always with its present weights.

    rows: completions decoded together at most. experts: say with each completion which experts its tokens were sent
    to (mixture-of-experts models). graphs: on a GPU, decode by CUDA graphs where the model allows it (see `graphed`);
    their memory is kept from call to call. `generate` raises PosttrainError for a model that does not pack
    (`policy.packs`); `engine_for` takes the plain engine for such a one.
    """

    def __init__(self, policy: CausalPolicy, *, rows: int = 64, experts: bool = False, graphs: bool = True) -> None:
        if rows < 1:
            raise PosttrainError(f"rows is {rows}; expected at least 1 completion decoded at a time")
        self.policy = policy
        self.rows = rows
        self.experts = experts
        self.graphs = graphs
        self._decoder: Decoder | None = None

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together at most."""
        return self.policy.max_length

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        if not self.policy.packs:
            raise PosttrainError(
                f"{self.policy.name}: the embedded engine needs a model whose attention can be replaced; "
                f"{type(self.policy.base).__name__} is not: take engine_for(policy), which decodes it by its own cache"
            )
        waiting = start_rows(self.policy, prompts, samples, sampling, seed)
        if not waiting:
            return []
        with torch.inference_mode(), evaluating(self.policy.model):
            if self._graphed():
                return self._by_graphs(prompts, waiting, sampling, progress)
            return _Run(self.policy, prompts, waiting, sampling, self.rows).finish(progress, self.experts)

    def _graphed(self) -> bool:
        return self.graphs and not self.experts and suits(self.policy)

    def _by_graphs(
        self, prompts: Sequence[Prompt], waiting: list[Row], sampling: Sampling, progress: Progress | None
    ) -> list[list[Completion]]:
        capacity = room_bucket(max(len(prompts[row.prompt].tokens) + row.limit for row in waiting))
        rows = min(self.rows, len(waiting), affordable(self.policy, capacity, CACHE_BYTES))
        decoder, self._decoder = self._decoder, None  # of a call that failed, nothing is kept
        if decoder is None or not decoder.serves(self.policy, rows, capacity):
            decoder = None  # its memory goes before there is new
            decoder = Decoder(self.policy, rows_bucket(rows), capacity)
        with packed_attention(self.policy.model):
            found = GraphedRun(decoder, prompts, waiting, sampling, rows).finish(progress, PREFILL_TOKENS)
        self._decoder = decoder
        return found


class _Run:
    """One call of `generate`: which rows run, which wait, what has been drawn."""

    def __init__(
        self, policy: CausalPolicy, prompts: Sequence[Prompt], waiting: list[Row], sampling: Sampling, rows: int
    ) -> None:
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        self.head = policy.head()
        self.ending = Ending(policy, sampling)
        self.waiting = deque(waiting)
        self.total = len(waiting)
        self.results: list[list[Completion | None]] = [[] for _ in prompts]
        for row in waiting:
            self.results[row.prompt].append(None)
        self.running: list[Row] = []
        self.recorder: Recorder | None = None
        self.hidden = torch.empty(0)  # `[running, width]` states that predict the next token of each running row
        capacity = max(len(prompts[row.prompt].tokens) + row.limit for row in waiting)
        self.slots = Slots(min(rows, self.total, self._affordable(capacity)), capacity)
        # completions are taken to end halfway on average
        self.steps = sum(row.limit for row in waiting) / (2 * self.slots.count)

    def _affordable(self, capacity: int) -> int:
        """How many rows of that many tokens fit in the memory for keys and values."""
        return max(1, CACHE_BYTES // row_bytes(self.policy, capacity))

    def finish(self, progress: Progress | None, experts: bool = False) -> list[list[Completion]]:
        """Run until nothing waits or runs."""
        recording = record_experts(self.policy.model) if experts else nullcontext()
        packing = packed_linears(self.policy.body, self.head, self.steps)
        with packing as self.head, packed_attention(self.policy.model), recording as self.recorder:
            while self.waiting or self.running:
                self._admit()
                uniform = uniforms(self.running).to(self.hidden.device)
                append(self.running, draw_next(self.head, self.hidden, uniform, self.sampling))
                self._retire(progress)
                if self.running:
                    self._decode()
        return [[c for c in row if c is not None] for row in self.results]

    def _admit(self) -> None:
        """Start waiting rows in the free slots, computing each of their prompts once."""
        free = self.slots.count - len(self.running)
        if not free or not self.waiting:
            return
        states = [self.hidden] if self.running else []
        by_prompt: dict[int, list[Row]] = {}
        for _ in range(min(free, len(self.waiting))):
            row = self.waiting.popleft()
            by_prompt.setdefault(row.prompt, []).append(row)
        batch: list[int] = []
        for i in by_prompt:
            if batch and sum(len(self.prompts[j].tokens) for j in (*batch, i)) > PREFILL_TOKENS:
                states += self._prefill(batch, by_prompt)
                batch = []
            batch.append(i)
        self.hidden = torch.cat(states + self._prefill(batch, by_prompt))

    def _prefill(self, batch: list[int], by_prompt: dict[int, list[Row]]) -> list[Tensor]:
        """Compute prompts in one packed row; returns the last hidden state for each row started."""
        segments, captured, out = read_prompts(self.policy, [self.prompts[i].tokens for i in batch])
        sent = None if self.recorder is None else self.recorder.take()
        states = []
        for segment, i in zip(segments, batch, strict=True):
            part = slice(segment.start, segment.start + segment.length)
            self.slots.admit(captured, part, len(by_prompt[i]))
            if sent is not None:
                for row in by_prompt[i]:
                    row.experts.append(sent[part])
            self.running += by_prompt[i]
            states.append(out[part.stop - 1].expand(len(by_prompt[i]), -1))
        return states

    def _retire(self, progress: Progress | None) -> None:
        """Hand finished rows over and close the gaps they leave."""
        keep = []
        for place, row in enumerate(self.running):
            finish = self.ending.finish(row)
            if finish == "none":
                keep.append(place)
            else:
                self.results[row.prompt][row.sample] = self.ending.completion(row, finish)
        if len(keep) < len(self.running):
            kept = torch.tensor(keep, dtype=torch.int64)
            order = Slots.order(kept)
            self.slots.compact(kept)
            self.running = [self.running[i] for i in order.tolist()]
            if progress is not None:
                progress(self.total - len(self.waiting) - len(self.running), self.total)

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
        if self.recorder is not None:
            for row, sent in zip(self.running, self.recorder.take().split(1), strict=True):
                row.experts.append(sent)
