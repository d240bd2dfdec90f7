"""A training step of a method, rehearsed on a model without weights: what it holds at its peak, and the work it does.

The parts of the trainer run as they are: packing, the model, the fused log-probabilities and their backward pass, the
optimizer's masters and gradient sums, the slots of the decode cache, the drawing of tokens. What is left out are the
objective's arrays (a few numbers a token) and Adam's update (in place). So nothing here is a formula of an
architecture, and a change of the trainer is a change of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from posttrain.models.adapters import add_lora
from posttrain.models.allocator import LARGEST_KEPT, PAD, keep_freed_memory
from posttrain.models.attention import LayerState, packed_attention
from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.models.packed_linear import STEPS, weights_to_pack
from posttrain.models.packing import pack_prompts
from posttrain.objective.batch import Batch
from posttrain.objective.sink import sink_of
from posttrain.plan.heap import Heap
from posttrain.plan.kernels import kernels
from posttrain.plan.ledger import SPREAD, Ledger, Part, Peak
from posttrain.plan.outline import outline, read_config
from posttrain.rollout.embedded import CACHE_BYTES, PREFILL_TOKENS
from posttrain.rollout.sampling import draw_next
from posttrain.rollout.slots import Slots
from posttrain.training.critic import ValueHead
from posttrain.training.method import Method
from posttrain.training.optim import MasterAdamW
from posttrain.training.signals import Reference, full_reference
from posttrain.trajectory import Group, PosttrainError, Trajectory

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of each prompt and of each completion: the longest that are expected, since they decide the peak."""

    prompt: int
    completion: int

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            if getattr(self, name) < 1:
                raise PosttrainError(f"a {name} of {getattr(self, name)} tokens; expected at least 1")


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a step of one device needs.

    peak: the most bytes at once, by part. phases: the peak of each phase. parameters, trained: of the policy. state:
        bytes of what stays between steps (weights, masters, moments, models beside).
    sequences: of a step; rows: completions that are decoded at once; waves: how often that; micros: micro-batches of a
        step, all its updates together, of `micro_tokens` model tokens each.
    work: floating-point operations of a step by phase: rollout, signals, update. decode_bytes: read by a decode step.
    """

    peak: Peak
    phases: dict[str, Peak]
    parameters: int
    trained: int
    state: float
    sequences: int
    rows: int
    waves: int
    micros: int
    micro_tokens: int
    updates: int
    work: dict[str, float]
    decode_bytes: float


def rehearse(
    config: Any, method: Method, lengths: Lengths, dtype: torch.dtype, *, device: str = "cpu", gpus: int = 1,
    shards: int = 1, name: str = "",
) -> Rehearsal:  # fmt: skip
    """Rehearse two steps: in the second, moments and all else are there.

    device: `cpu` or `cuda`, whose kernels and allocator count. gpus: data-parallel devices that share a step's rows;
    shards: how many of them share the state (FSDP). Raises PosttrainError for a model that cannot be rehearsed, and for
    sequences that exceed its context.
    """
    settings = method.settings
    heap = Heap(LARGEST_KEPT, PAD) if device == "cpu" and keep_freed_memory() else None
    ledger = Ledger("meta", heap, share=dict.fromkeys(SPREAD, 1 / shards))
    policy = outline(config, dtype, name)
    if lengths.prompt + lengths.completion > policy.max_length:
        raise PosttrainError(
            f"sequences of {lengths.prompt + lengths.completion} tokens exceed the context of {policy.max_length} of "
            f"{policy.name}; lower --length"
        )
    rows = -(-settings.batch // gpus)
    with ledger, kernels(device, ledger):
        if settings.lora:
            policy = add_lora(policy, rank=settings.lora)
            policy._packs = True
        ledger.hold([*policy.model.parameters(), *policy.model.buffers()], "weights")
        stage = _Stage(policy, method, lengths, ledger, rows, device)
        work = stage.rehearse(shards)
    return Rehearsal(
        peak=ledger.peak,
        phases=ledger.phases,
        parameters=sum(p.numel() for p in policy.model.parameters()),
        trained=sum(p.numel() for _, p in policy.trainable_parameters()),
        state=stage.state,
        sequences=stage.sequences,
        rows=stage.rows,
        waves=stage.waves,
        micros=stage.micros,
        micro_tokens=stage.micro_tokens,
        updates=settings.updates * settings.minibatches,
        work=work,
        decode_bytes=stage.decode_bytes,
    )


def _gathered(policy: CausalPolicy) -> float:
    """Bytes that FSDP holds whole beside the pieces while it computes: two blocks, of which one arrives, what is in no
    block, and the gradients of both before they are spread.
    """
    names = set(getattr(policy.base, "_no_split_modules", None) or ())
    blocks = [m for m in policy.base.modules() if type(m).__name__ in names]
    of_blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    rest = sum(p.nbytes for p in policy.base.parameters()) - sum(of_blocks)
    return 2 * rest + 3 * max(of_blocks, default=0)


class _Stage:
    """A stage's parts on `meta` tensors, as the training loop puts them together, and one step of it."""

    def __init__(
        self, policy: CausalPolicy, method: Method, lengths: Lengths, ledger: Ledger, rows: int, device: str
    ) -> None:
        self.policy, self.method, self.lengths, self.ledger, self.device = policy, method, lengths, ledger, device
        self.settings, self.objective = method.settings, method.objective
        self.members = {"prompts": self.settings.group, "preferences": 2}.get(method.data, 1)
        self.groups, self.sequences = rows, rows * self.members
        self.rows = self.waves = 0
        self.state = 0.0
        self.decode_bytes = 0.0
        if not self.settings.lora:
            policy.model.requires_grad_(True)
        with ledger.part("reference"):
            following = (method.reference_decay, method.reference_every)
            self.reference = Reference(policy, *following) if method.wants_reference else None
        with ledger.part("teacher"):
            self.teacher = self._make_teacher()
        named = policy.trainable_parameters()
        self.critic = ValueHead(policy.head().weight.shape[1]).to(META) if method.critic else None
        if self.critic is not None:
            ledger.hold(self.critic.parameters(), "critic")
            named += [(f"critic.{n}", p) for n, p in self.critic.named_parameters()]
        with ledger.part("masters"):
            self.optimizer = MasterAdamW(named, self.settings)
        self.moments: list[torch.Tensor] = []
        for parameter, master in zip(self.optimizer.parameters, self.optimizer.masters, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda _, m=master: ledger.hold([m.grad], "gradients"))
            if (sink := sink_of(parameter)) is not None:
                sink.begin = partial(self._begin, sink.begin)  # type: ignore[method-assign]
        self._label_body()

    def _make_teacher(self) -> CausalPolicy | None:
        teacher = self.method.teacher
        if teacher is None:
            if "teacher_logp" in self.objective.needs:
                raise PosttrainError(f"{self.method.name} compares with a teacher; name it: --set teacher=<model>")
            return None
        config = teacher.base.config if isinstance(teacher, CausalPolicy) else read_config(teacher)
        made = outline(config, self.policy.dtype)
        self.ledger.hold(made.model.parameters(), "teacher")
        return made

    def _begin(self, begin: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A gradient that a sink begins is counted as one."""
        with self.ledger.part("gradients"):
            return begin()

    def _label_body(self) -> None:
        """What the model's body makes with gradient are activations, whatever calls it."""
        before: list[Part] = []

        def enter(*_: Any) -> None:
            before.append(self.ledger.switch("activations" if torch.is_grad_enabled() else "workspace"))

        def leave(*_: Any) -> None:
            self.ledger.switch(before.pop())

        self.policy.body.register_forward_pre_hook(enter)
        self.policy.body.register_forward_hook(leave, always_call=True)

    # -- a step ------------------------------------------------------------------------------------------------------

    def rehearse(self, shards: int) -> dict[str, float]:
        """Two steps, the first of which makes the moments: they lie between what it freed. Returns the work of each
        phase.
        """
        for _ in range(2):
            work = self._step(shards)
        return work

    def _step(self, shards: int) -> dict[str, float]:
        """A step's phases in order; returns the work of each."""
        work, settings = dict[str, float](), self.settings
        if self.method.online:
            with self._whole(shards):
                work["rollout"] = self._rollout()
        self._pieces(shards)
        pieces = max(1, -(-self.groups // settings.minibatches))  # groups of one update
        batch = self._batch(pieces)
        micros = batch.split(settings.token_budget, keep_groups=self.objective.keep_groups)
        largest = max(micros, key=self._tokens)
        updates, sequences = settings.minibatches * settings.updates, pieces * self.members
        self.micros = updates * -(-len(micros) * pieces // batch.groups)
        self.micro_tokens = self._tokens(largest)
        whole = torch.empty(int(_gathered(self.policy)) if shards > 1 else 0, dtype=torch.uint8, device=META)
        work["signals"] = self._signals(batch) * sequences * settings.minibatches
        work["update"] = self._update(largest, twice=len(micros) > 1) * sequences * updates
        del whole
        return work

    @contextmanager
    def _whole(self, shards: int) -> Iterator[None]:
        """The policy whole, as rollouts need it, though its weights are spread over devices."""
        share, weights = self.ledger.share, list(self.policy.model.parameters())
        if shards > 1:
            share["weights"] = 1.0
            self.ledger.hold(weights, "weights")
        yield
        if shards > 1:
            share["weights"] = 1 / shards
            self.ledger.hold(weights, "weights")

    def _pieces(self, shards: int) -> None:
        """Spread, a trained weight is its fp32 master alone."""
        for parameter, master in zip(self.optimizer.parameters, self.optimizer.masters, strict=True):
            if shards > 1 and master is not parameter and not self.settings.lora:
                self.ledger.drop(parameter)

    def _batch(self, groups: int) -> Batch:
        """Rows of the given lengths, as many as two micro-batches take; all are alike, so more would tell no more."""
        prompt, completion = self.lengths.prompt, self.lengths.completion
        tokens = torch.zeros(prompt + completion, dtype=torch.int64)
        one = Trajectory(tokens, torch.arange(prompt + completion) >= prompt)
        cost = prompt + completion * self.members if self.members > 1 else prompt + completion
        enough = 2 * max(1, self.settings.token_budget // cost) + 1
        return Batch.of([Group([one] * self.members)] * min(groups, enough))

    def _tokens(self, micro: Batch) -> int:
        """Model tokens of a micro-batch: a prompt once a group, the last token of a sequence not at all."""
        groups = micro.groups
        if self.members == 1:
            return len(micro) * (self.lengths.prompt + self.lengths.completion - 1)
        return groups * self.lengths.prompt + len(micro) * (self.lengths.completion - 1)

    @property
    def _temperature(self) -> float:
        return self.settings.temperature if self.method.online and self.settings.temperature > 0 else 1.0

    def _signals(self, batch: Batch) -> float:
        """Passes without gradient over a micro-batch, for whatever the objective asks for; the work of a sequence."""
        needs = set(self.objective.needs)
        if self.settings.updates > 1 or self.settings.minibatches > 1:
            needs.add("old_logp")
        micro = batch.split(self.settings.token_budget, keep_groups=False)[0]
        own = needs & {"old_logp", "collision", "old_entropy", "value", "mismatched_kl", "experts"}
        theirs = needs & {"reference_logp", "mismatched_kl"}
        with self.ledger.phase("signals") as phase, torch.no_grad(), evaluating(self.policy.model):
            before = phase.work
            for need in own:
                with self.ledger.part("vocabulary"):
                    self.policy.log_likelihood(micro, temperature=self._temperature, entropy=need == "old_entropy")
            if "teacher_logp" in needs and self.teacher is not None:
                with self.ledger.part("vocabulary"):
                    self.teacher.log_likelihood(micro, temperature=self._temperature)
            for _ in theirs:
                assert self.reference is not None
                with self.reference.active() as frozen, self.ledger.part("vocabulary"):
                    frozen.log_likelihood(micro, temperature=self._temperature)
            return (phase.work - before) / len(micro)

    def _update(self, micro: Batch, twice: bool) -> float:
        """Forward and backward over a micro-batch, the second time beside the gradients of the first; the work of a
        sequence.
        """
        passes = 2 if twice else 1
        self.policy.model.train()
        with self.ledger.phase("update") as phase, self.policy.recomputing(self.settings.checkpointing):
            before = phase.work
            for _ in range(passes):
                self._backward(micro)
            if self.method.normaliser is not None:  # a second backward pass, beside the gradients of the first
                gradients = self.optimizer.take_gradients()
                for _ in range(passes):
                    self._backward(micro)
                self.optimizer.put_gradients(gradients)
            work = phase.work - before
        if not self.moments:
            with self.ledger.part("moments"):
                self.moments = [torch.empty_like(m) for m in self.optimizer.masters for _ in range(2)]
        self.optimizer.zero()
        self.state = sum(self.ledger.live.values())
        self.policy.model.eval()
        return work / (passes * len(micro))

    def _backward(self, micro: Batch) -> None:
        ledger, divergence = self.ledger, self.objective.full_divergence
        with ledger.part("vocabulary"):
            against = None
            if divergence is not None:
                assert self.reference is not None
                against = full_reference(self.reference, micro, self._temperature)
            found = self.policy.log_likelihood(
                micro,
                temperature=self._temperature,
                entropy=self.method.online or "entropy" in self.objective.needs,
                reference=against,
                divergence=divergence.direction if divergence is not None else "reverse",
            )
            loss = found.logp.sum() if found.divergence is None else found.logp.sum() + found.divergence.sum()
            assert found.hidden is not None
            if self.critic is not None:
                loss = loss + self.critic(found.hidden).sum()
            found.hidden.register_hook(lambda _: ledger.switch("workspace") and None)
            del found, against
            loss.backward()

    def _rollout(self) -> float:
        """Prompts computed once, then one decode step of all rows at their longest; returns the work of a step."""
        policy, settings, ledger, lengths = self.policy, self.settings, self.ledger, self.lengths
        capacity = lengths.prompt + lengths.completion
        rows = min(settings.rollout_rows, self.sequences)
        prompts = min(-(-rows // settings.group), max(1, PREFILL_TOKENS // lengths.prompt))
        captured: dict[int, LayerState] = {}
        on_cpu = self.device == "cpu"
        packable = weights_to_pack(policy.body, policy.head(), STEPS, META.type) if on_cpu else []
        with torch.inference_mode(), evaluating(policy.model), packed_attention(policy.model):
            with ledger.phase("prefill") as prefill:
                layout = pack_prompts([torch.zeros(lengths.prompt, dtype=torch.int64)] * prompts).to(META)
                hidden = policy.body(
                    input_ids=layout.tokens[None], position_ids=layout.positions[None], use_cache=False,
                    packed_layout=layout, captured=captured,
                ).last_hidden_state[0]  # fmt: skip
                states = [t for state in captured.values() for t in (state.key, state.value)]
                a_token = sum(t.nbytes for t in states) / len(layout.tokens)
                self.rows = rows = min(rows, max(1, int(CACHE_BYTES // (a_token * capacity))))
                slots = Slots(rows, capacity)
                while slots.active < rows:
                    copies = min(settings.group, rows - slots.active)
                    with ledger.part("cache"):
                        slots.admit(captured, slice(0, lengths.prompt), copies)
                hidden = hidden[:1].expand(rows, -1).clone()
                del captured, layout, states
            with ledger.phase("decode") as decode:
                steps = self.sequences * lengths.completion / (2 * rows)
                with ledger.part("workspace"):
                    packed = [torch.empty_like(weight) for weight in packable] if steps >= STEPS else []
                self._draw(hidden)
                before = decode.work
                if lengths.completion > 1:
                    slots.length[:] = capacity - 2
                    with ledger.part("cache"):
                        positions = slots.begin_step()
                    tokens = torch.zeros(rows, 1, dtype=torch.int64, device=META)
                    hidden = policy.body(
                        input_ids=tokens, position_ids=positions[:, None].to(META), use_cache=False, kv_slots=slots
                    ).last_hidden_state[:, 0]
                self._draw(hidden)
                del packed
        self.waves = -(-self.sequences // rows)
        weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
        self.decode_bytes = weights + a_token * rows * (lengths.prompt + lengths.completion / 2)
        prompt_work = prefill.work / prompts * self.groups
        return prompt_work + (decode.work - before) * self.waves * lengths.completion

    def _draw(self, hidden: torch.Tensor) -> None:
        with self.ledger.part("vocabulary"):
            uniform = torch.zeros(len(hidden), dtype=torch.float64, device=META)
            draw_next(self.policy.head(), hidden, uniform, self.settings.sampling)
