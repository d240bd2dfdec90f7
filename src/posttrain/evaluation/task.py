"""What a task is: problems to train on, problems held out, and the reward that says which completions are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from posttrain.reward.names import unknown
from posttrain.reward.reward import Reward, Score
from posttrain.rollout.environment import Environment
from posttrain.trajectory import Group, Message, PosttrainError, Prompt, Sampling, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout"]


@dataclass(slots=True)
class TaskItem:
    """One problem.

    prompt: text, or the conversation so far.
    answer: the reference answer. meta: what else scorers read. solution: a completion worth imitating.
    options, label: the choices of a multiple-choice problem and the index of the right one.
    """

    prompt: str | list[Message]
    answer: Any = None
    meta: dict[str, Any] = field(default_factory=dict)
    solution: str | None = None
    options: tuple[str, ...] = ()
    label: int | None = None

    @property
    def key(self) -> int:
        """48 bits of a hash of the prompt and its options: the same in every run and every order of the problems."""
        identity = json.dumps([self.prompt, self.options], ensure_ascii=False, sort_keys=True, default=str)
        return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=6).digest(), "big")

    @property
    def question(self) -> str:
        """The prompt in words, for messages and reports: the text, or the last turn of the conversation."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content", ""))


@dataclass(slots=True)
class Task:
    """Problems with a verifier.

    train, heldout: the problems. No prompt occurs twice in a split, and none of `heldout` in `train`.
    reward: scores completions. A completion is right where the component `metric` (the total, where None) reaches
        `threshold`, and did not fail.
    environment: who answers the policy, where a problem takes several turns.
    system: system prompt of every problem. sampling: how completions are drawn where the caller does not say.
    """

    name: str
    train: list[TaskItem]
    heldout: list[TaskItem]
    reward: Reward
    threshold: float = 1.0
    metric: str | None = None
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    description: str = ""
    environment: Environment | None = None

    def __post_init__(self) -> None:
        train, heldout = self._distinct("train"), self._distinct("heldout")
        shared = train & heldout
        if shared:
            example = next(item.question for item in self.heldout if item.key in shared)
            raise PosttrainError(
                f"task {self.name}: {len(shared)} held-out prompts are also in train, such as {example[:60]!r}"
            )
        if self.multiple_choice and not all(item.options and item.label is not None for item in self.heldout):
            raise PosttrainError(f"task {self.name}: all held-out problems have options and a label, or none has")
        if self.metric is not None and not self.multiple_choice and self.metric not in self.reward.components:
            raise unknown(f"metric of task {self.name}", self.metric, self.reward.components)

    @property
    def multiple_choice(self) -> bool:
        """Whether the held-out problems have options, to be judged by their likelihood."""
        return any(item.options for item in self.heldout)

    def items(self, split: Split) -> list[TaskItem]:
        if split not in ("train", "heldout"):
            raise PosttrainError(f"task {self.name}: got split {split!r}; expected train or heldout")
        return self.train if split == "train" else self.heldout

    def prompts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        limit: int | None = None,
        *,
        demonstrations: bool = False,
    ) -> list[Prompt]:
        """The first `limit` problems of a split as prompts, through the chat template where the tokenizer has one.

        demonstrations: only problems with a worked solution, which their prompts carry.
        """
        if demonstrations:
            return [_with_demonstration(group) for group in self._solved(tokenizer, split, limit)]
        return [self._prompt(tokenizer, item) for item in self.items(split)[:limit]]

    def demonstrations(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Group]:
        """The first `limit` training problems that have a worked solution, one demonstration a group."""
        return self._solved(tokenizer, "train", limit)

    def _solved(self, tokenizer: PreTrainedTokenizerBase, split: Split, limit: int | None) -> list[Group]:
        from posttrain.data.templates import render_completion

        solved = [item for item in self.items(split) if item.solution is not None][:limit]
        if not solved:
            kind = "training" if split == "train" else "held-out"
            raise PosttrainError(f"task {self.name}: no {kind} problem has a worked solution to imitate")
        groups = []
        for item in solved:
            solution = str(item.solution)
            tokens, mask = render_completion(tokenizer, _spoken(tokenizer, item), solution, system=self.system)
            demonstration = Trajectory(tokens, mask, source="expert", finish="stop", text=solution)
            groups.append(Group([demonstration], self._prompt(tokenizer, item)))
        return groups

    def correct(self, score: Score) -> bool:
        """Whether a completion with this score counts as right."""
        if self.metric is None:
            return not score.errors and score.total >= self.threshold - 1e-9
        return self.metric not in score.errors and score.parts[self.metric] >= self.threshold - 1e-9

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, item: TaskItem) -> Prompt:
        from posttrain.data.templates import render_prompt

        prompt = render_prompt(tokenizer, _spoken(tokenizer, item), system=self.system)
        prompt.answer, prompt.key, prompt.meta = item.answer, item.key, item.meta
        return prompt

    def _distinct(self, split: Split) -> set[int]:
        items = self.items(split)
        keys: set[int] = set()
        for item in items:
            if item.key in keys:
                raise PosttrainError(
                    f"task {self.name}: {split} holds a prompt twice: {item.question[:60]!r}; remove one"
                )
            keys.add(item.key)
        return keys


def _with_demonstration(group: Group) -> Prompt:
    assert group.prompt is not None
    return replace(group.prompt, demonstration=group.trajectories[0])


def without_repeats(items: Sequence[TaskItem], seen: set[int]) -> list[TaskItem]:
    """The items whose prompts are not in `seen` and stand here for the first time; their keys are added to `seen`."""
    fresh = []
    for item in items:
        if item.key not in seen:
            seen.add(item.key)
            fresh.append(item)
    return fresh


def _spoken(tokenizer: PreTrainedTokenizerBase, item: TaskItem) -> str | list[Message]:
    """The prompt as rendered: without a chat template the completion starts on a line of its own."""
    return f"{item.prompt}\n" if isinstance(item.prompt, str) and not tokenizer.chat_template else item.prompt
