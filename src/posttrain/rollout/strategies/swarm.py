"""A pool of rollouts that several nodes share as text: each trains its own policy on its own groups and on others'.

Nothing but text passes between nodes (question, completions, who finished): every node reads it with its own tokenizer
and scores it with its own verifier. So policies of different architectures can share, and no node has to trust another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from posttrain.data.templates import render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategy import one_turn
from posttrain.trajectory import Group, Message, PosttrainError, Prompt, Trajectory

Pick = Literal["uniform", "best"]


@dataclass(frozen=True, slots=True)
class Record:
    """What a node shares of one group. finished: which completions ended by themselves."""

    text: str
    messages: tuple[Message, ...]
    answer: Any
    key: int
    meta: dict[str, Any]
    completions: tuple[str, ...]
    finished: tuple[bool, ...]

    @classmethod
    def of(cls, group: Group) -> Record:
        prompt = group.prompt
        assert prompt is not None
        return cls(
            prompt.text,
            tuple(prompt.messages),
            prompt.answer,
            prompt.key,
            prompt.meta,
            tuple(t.text for t in group.trajectories),
            tuple(t.finish == "stop" for t in group.trajectories),
        )

    def read(self, policy: CausalPolicy) -> Group | None:
        """The group under a policy's own tokenizer, unscored; None where too little fits into its context.

        The end token follows a completion where its sender finished it.
        """
        tokenizer, limit = policy.tokenizer, policy.max_length
        prompt = render_prompt(tokenizer, list(self.messages) or self.text, chat=bool(self.messages))
        prompt.answer, prompt.key, prompt.meta = self.answer, self.key, self.meta
        if tokenizer.eos_token_id is None:
            raise PosttrainError(f"{policy.name}: the tokenizer has no end token; set tokenizer.eos_token")
        members = []
        for text, finished in zip(self.completions, self.finished, strict=True):
            ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * finished
            tokens = torch.cat([prompt.tokens, torch.tensor(ids, dtype=torch.int64)])
            whole = finished and len(tokens) <= limit
            mask = torch.arange(len(tokens)) >= len(prompt.tokens)
            if bool(mask[:limit].any()):
                ending: Literal["stop", "length"] = "stop" if whole else "length"
                members.append(Trajectory(tokens[:limit], mask[:limit], source="replay", finish=ending, text=text))
        return Group(members, prompt) if len(members) > 1 else None


@dataclass
class Pool:
    """The newest records of each node, by round. Copies of a strategy share it: it stands for the network."""

    records: dict[int, dict[int, list[Record]]] = field(default_factory=dict)

    def publish(self, node: int, round_: int, records: Sequence[Record]) -> None:
        """Make a node's records of a round known; of the earlier ones the last round's stay."""
        rounds = self.records.setdefault(node, {})
        rounds[round_] = [*rounds.get(round_, ()), *records]
        for old in sorted(rounds)[:-2]:
            del rounds[old]

    def others(self, node: int, round_: int) -> list[Record]:
        """The newest records of every other node from before a round, so that the order of nodes does not matter."""
        found: list[Record] = []
        for other, rounds in sorted(self.records.items()):
            earlier = [r for r in rounds if r < round_]
            if other != node and earlier:
                found += rounds[max(earlier)]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        return self


@dataclass(frozen=True)
class Shared:
    """`own` groups of the node's rollouts and `foreign` groups of other nodes (SAPO, 2025, arXiv 2509.08721, card 053).

    Completions are drawn for all prompts of the step, and all are published; the first `own` groups are trained on. Of
    the others' groups, those whose rewards are all equal are discarded; `pick` takes the foreign ones from the rest
    uniformly, or those with the highest total reward (`best`). Own groups fill the places that stay empty, as in the
    first round. node: this node's number in the pool.
    """

    own: int = 4
    foreign: int = 4
    pick: Pick = "uniform"
    pool: Pool = field(default_factory=Pool, repr=False)
    node: int = 0

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        one_turn(context, "rollouts are shared")
        if len(prompts) < self.own:
            raise PosttrainError(
                f"a node trains on {self.own} groups of its own and the step has {len(prompts)} prompts; raise batch"
            )
        groups = context.draw(prompts)
        self.pool.publish(self.node, context.step, [Record.of(g) for g in groups])
        foreign = self._foreign(context)
        taken = groups[: self.own + self.foreign - len(foreign)]
        drawn = [t.reward for g in groups for t in g.trajectories]
        context.metrics |= {"reward": sum(drawn) / len(drawn), "foreign_groups": float(len(foreign))}
        return taken + foreign

    def _foreign(self, context: StepContext) -> list[Group]:
        """Groups of other nodes whose rewards, as this node finds them, differ."""
        if not self.foreign:
            return []
        policy = context.required_policy()
        read = [r.read(policy) for r in self.pool.others(self.node, context.step)]
        found = [g for g in read if g is not None]
        context.score(found)
        useful = [g for g in found if float(g.rewards.max() - g.rewards.min()) > 1e-9]
        if self.pick == "best":
            useful.sort(key=lambda g: -float(g.rewards.sum()))
            return useful[: self.foreign]
        order = context.random("foreign").permutation(len(useful))[: self.foreign]
        return [useful[i] for i in order]
