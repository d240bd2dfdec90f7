"""Decoding on a GPU: the whole step of all rows, sampling included, is one CUDA graph, replayed several times before
anybody looks at what was drawn.

A decode step is hundreds of small kernels; launching them one by one takes several times longer than they run. So a
step works on memory that stays where it is, and the host hands over random numbers and reads tokens for a *block* of
steps at a time. A row that ends inside a block goes on to its end for nothing, and what it drew there is dropped; so a
completion is the same as where one looks after every token, and depends on its own random numbers alone.

Truncated sampling looks at its candidates on the host, so there the graph ends at the hidden states and a block is one
step. Where a model cannot be captured the same steps run without a graph, which is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine import Progress
from posttrain.rollout.prefill import read_prompts, row_bytes
from posttrain.rollout.rows import Ending, Row, append, uniforms
from posttrain.rollout.sampling import NOT_FINITE, draw_next, draw_plain
from posttrain.rollout.static_slots import StaticSlots, room_bucket, rows_bucket
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling

if TYPE_CHECKING:
    from posttrain.objective.logprob import Head

BLOCK = 16  # steps that are replayed before the host reads their tokens
SHARE = 16  # of a GPU's memory, one part in so many is for keys and values
Step = Callable[[], object]
# what a forward pass of such models decides on the host
ROUTED = ("num_experts", "num_local_experts", "n_routed_experts")


def suits(policy: CausalPolicy) -> bool:
    """Whether a policy's steps may be captured: on a GPU, its sizes known before it runs. Where torch is to be
    deterministic, writing to places asks the host about them.
    """
    config = policy.base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {rope.get("rope_type", "default")} | {
        part.get("rope_type", "default") for part in rope.values() if isinstance(part, dict)
    }
    return (
        policy.device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and not any(getattr(config, name, None) for name in ROUTED)
        and not kinds & {"dynamic", "longrope"}
        and not any(getattr(module, "token_choice", None) is not None for module in policy.model.modules())
    )


class Decoder:
    """The memory of decode steps and the graphs that work on it; kept from call to call, as long as the weights stay
    where they are.
    """

    def __init__(self, policy: CausalPolicy, count: int, capacity: int) -> None:
        device = policy.device
        self.policy = policy
        self.slots = StaticSlots(count, capacity, device)
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.noise = torch.zeros(BLOCK, count, dtype=torch.float64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # number of the step in its block
        # token, log-probability as sampled, and over the full vocabulary, of every step of a block
        self.drawn = torch.zeros(BLOCK, count, 3, dtype=torch.float64, device=device)
        self.hidden: Tensor | None = None
        self.graphs: dict[tuple[Any, ...], Step] = {}
        self.pool: Any = None
        self.addresses = _addresses(policy)
        self.capturing = device.type == "cuda"

    def serves(self, policy: CausalPolicy, count: int, capacity: int) -> bool:
        """Whether it can be used for such a call."""
        fits = self.slots.count >= count and self.slots.capacity >= capacity
        return self.policy is policy and fits and self.addresses == _addresses(policy)

    def replay(self, active: int, room: int, head: Head, sampling: Sampling) -> None:
        """One step of the first `active` rows, each of at most `room` tokens then."""
        fused = not sampling.truncated
        key = (active, room, fused and sampling.temperature, fused)
        if key not in self.graphs:
            self.graphs[key] = self._capture(lambda: self._step(active, room, head, sampling))
        self.graphs[key]()
        if not fused:
            assert self.hidden is not None
            noise = self.noise[0, :active]
            self._take(active, draw_next(head, self.hidden[:active], noise, sampling))

    def _step(self, active: int, room: int, head: Head, sampling: Sampling) -> None:
        """What a graph holds: reads and writes the memory of this object alone."""
        self.slots.begin_step(active, room)
        hidden = self.policy.body(
            input_ids=self.tokens[:active, None],
            position_ids=self.slots.positions[:active, None],
            use_cache=False,
            kv_slots=self.slots,
        ).last_hidden_state[:, 0]
        self.slots.end_step()
        if sampling.truncated:
            if self.hidden is None:
                self.hidden = hidden.new_zeros(self.slots.count, hidden.shape[1])
            self.hidden[:active].copy_(hidden)
            return
        noise = self.noise[:, :active].index_select(0, self.step)[0]
        self._take(active, draw_plain(head.logits(hidden), noise, sampling))

    def _take(self, active: int, drawn: Sequence[Tensor]) -> None:
        """Keep what was drawn, as the next tokens and for the host."""
        token, logp, full = drawn
        found = torch.stack([token.double(), logp.double(), full.double()], -1)
        self.drawn[:, :active].index_copy_(0, self.step, found[None])
        self.tokens[:active].copy_(token)
        # rows that are over, or free, stay inside their memory and the model's context
        self.slots.positions[:active].add_(1).clamp_(max=min(self.slots.capacity, self.policy.max_length) - 1)
        self.step.add_(1)

    def _capture(self, step: Step) -> Step:
        """The step as a graph; itself where there is no GPU or it cannot be captured."""
        if not self.capturing:
            return step
        state = [self.tokens, self.slots.positions, self.step]
        kept = [t.clone() for t in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at the first call is no part of the graph
            step()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            self.capturing = False
            warnings.warn(
                f"{self.policy.name}: decode steps cannot be captured as a CUDA graph, and their kernels are launched "
                f"one after the other, which is slower ({' '.join(str(error).split())[:200]})",
                stacklevel=2,
            )
            return step
        self.pool = graph.pool()
        return graph.replay


def _addresses(policy: CausalPolicy) -> tuple[int, ...]:
    """Where a model's tensors lie: graphs read them there."""
    return tuple(t.data_ptr() for t in (*policy.model.parameters(), *policy.model.buffers()))


def affordable(policy: CausalPolicy, capacity: int, least: int) -> int:
    """How many rows of so many tokens fit in the memory for keys and values, at least `least` bytes."""
    room = least
    if policy.device.type == "cuda":
        room = max(room, torch.cuda.get_device_properties(policy.device).total_memory // SHARE)
    return max(1, room // row_bytes(policy, capacity))


class GraphedRun:
    """One call of `generate`: which rows run in which slot, which wait. Rows beyond the last one that runs are not
    computed; a finished row leaves its slot to a waiting one, and the last ones move down when few are left.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], waiting: list[Row], sampling: Sampling, rows: int
    ) -> None:
        self.decoder, self.policy, self.prompts, self.sampling = decoder, decoder.policy, prompts, sampling
        self.head, self.ending = self.policy.head(), Ending(self.policy, sampling)
        self.waiting = waiting[::-1]  # taken from the end
        self.total, self.done = len(waiting), 0
        self.results: list[list[Completion | None]] = [[] for _ in prompts]
        for row in waiting:
            self.results[row.prompt].append(None)
        self.rows = min(rows, decoder.slots.count)
        self.running: dict[int, Row] = {}  # by slot

    def finish(self, progress: Progress | None, prefill: int) -> list[list[Completion]]:
        """Run until nothing waits or runs. prefill: prompt tokens computed in one packed row."""
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.rows:
                self._admit(prefill)
                self._report(progress)
            if self.running:
                self._block()
                self._report(progress)
        return [[c for c in row if c is not None] for row in self.results]

    def _report(self, progress: Progress | None) -> None:
        done = self.total - len(self.waiting) - len(self.running)
        if progress is not None and done > self.done:
            progress(done, self.total)
        self.done = done

    def _admit(self, prefill: int) -> None:
        """Start waiting rows in free slots, as many as their prompts' tokens allow at once; each prompt once."""
        free = [slot for slot in range(self.rows) if slot not in self.running]
        taken: dict[int, list[tuple[int, Row]]] = {}
        tokens = 0
        while free and self.waiting:
            number = self.waiting[-1].prompt
            if number not in taken:
                tokens += len(self.prompts[number].tokens)
                if taken and tokens > prefill:
                    break
            taken.setdefault(number, []).append((free.pop(0), self.waiting.pop()))
        segments, captured, out = read_prompts(self.policy, [self.prompts[i].tokens for i in taken])
        states = []
        for segment, members in zip(segments, taken.values(), strict=True):
            part = slice(segment.start, segment.start + segment.length)
            slots = torch.tensor([slot for slot, _ in members], device=self.policy.device)
            self.decoder.slots.admit(captured, part, slots)
            states.append(out[part.stop - 1].expand(len(members), -1))
        placed = [pair for members in taken.values() for pair in members]
        rows = [row for _, row in placed]
        drawn = draw_next(self.head, torch.cat(states), uniforms(rows).to(self.policy.device), self.sampling)
        append(rows, drawn)
        self.decoder.tokens[torch.tensor([slot for slot, _ in placed], device=self.policy.device)] = drawn.token
        for slot, row in placed:
            self._settle(slot, row)

    def _settle(self, slot: int, row: Row) -> None:
        """Let a row run on in its slot, or hand it over if it is done."""
        finish = self.ending.finish(row)
        if finish == "none":
            self.running[slot] = row
        else:
            self.running.pop(slot, None)
            self.results[row.prompt][row.sample] = self.ending.completion(row, finish)

    def _length(self, row: Row) -> int:
        """Tokens that the memory of a row holds: all but the newest."""
        return len(self.prompts[row.prompt].tokens) + len(row.tokens) - 1

    def _block(self) -> None:
        """Some steps of all running rows, and what comes of them."""
        self._move_down()
        active = rows_bucket(max(self.running) + 1)
        left = max(row.limit - len(row.tokens) for row in self.running.values())
        steps = 1 if self.sampling.truncated else min(BLOCK, left)
        longest = max(self._length(row) for row in self.running.values())
        room = min(room_bucket(longest + steps), self.decoder.slots.capacity)
        noise = torch.zeros(steps, active, dtype=torch.float64)
        by_slot = noise.numpy()
        for slot, row in self.running.items():
            by_slot[:, slot] = row.noise.random(steps)
        self.decoder.noise[:steps, :active].copy_(noise)
        self.decoder.step.zero_()
        for _ in range(steps):
            self.decoder.replay(active, room, self.head, self.sampling)
        drawn = self.decoder.drawn[:steps, :active].cpu().numpy()
        for slot, row in list(self.running.items()):
            self._extend(row, drawn[:, slot])
            self._settle(slot, row)

    def _extend(self, row: Row, drawn: Any) -> None:
        """Give a row what was drawn for it in a block, `[steps, 3]`, up to its end."""
        for token, logp, full in drawn[: row.limit - len(row.tokens)].tolist():
            if full - full != 0:  # not finite
                raise PosttrainError(NOT_FINITE)
            row.tokens.append(int(token))
            row.logp.append(logp)
            row.logp_full.append(full)
            if row.tokens[-1] in self.ending.ends or (self.ending.stop and self.ending.finish(row) != "none"):
                break

    def _move_down(self) -> None:
        """Where nothing waits and half of the rows that are computed are over, close the gaps."""
        count = len(self.running)
        if self.waiting or 2 * rows_bucket(count) > rows_bucket(max(self.running) + 1):
            return
        holes = [slot for slot in range(count) if slot not in self.running]
        places = [slot for slot in self.running if slot >= count]
        device = self.policy.device
        longest = max(self._length(self.running[slot]) for slot in places)
        source, target = torch.tensor(places, device=device), torch.tensor(holes, device=device)
        self.decoder.slots.move(source, target, longest)
        self.decoder.tokens[target] = self.decoder.tokens[source]
        for old, new in zip(places, holes, strict=True):
            self.running[new] = self.running.pop(old)
