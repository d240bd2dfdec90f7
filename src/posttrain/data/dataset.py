"""A data set ready for training: the rows of a source as tokens, and every unusable row named and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, overload

import torch
from torch import Tensor

from posttrain.data.formats import (
    Chat,
    Feedback,
    Kind,
    Preference,
    PromptAnswer,
    PromptCompletion,
    Row,
    Text,
    kind_of,
    parse,
)
from posttrain.data.rows import BadRow
from posttrain.data.sources import Source, read_rows
from posttrain.data.templates import render_chat, render_completion, render_prompt, with_system
from posttrain.trajectory import Group, Label, Message, PosttrainError, Prompt, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnBad = Literal["stop", "skip"]


class Dataset(Sequence[Group | Prompt]):
    """The usable rows of a source, in its order.

    kind: "demonstrations" and "feedback" hold groups of one trajectory, "preferences" groups of two (chosen, then
        rejected), "prompts" holds prompts.
    name: what was read.
    bad: the rows that were left out, each with its origin and the reason.
    """

    def __init__(self, items: Sequence[Group | Prompt], kind: Kind, name: str, bad: Sequence[BadRow] = ()) -> None:
        self._items = list(items)
        self.kind = kind
        self.name = name
        self.bad = list(bad)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Group | Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> Dataset: ...

    def __getitem__(self, index: int | slice) -> Group | Prompt | Dataset:
        if isinstance(index, slice):
            return Dataset(self._items[index], self.kind, self.name, self.bad)
        return self._items[index]

    def __iter__(self) -> Iterator[Group | Prompt]:
        return iter(self._items)

    @property
    def groups(self) -> list[Group]:
        """The rows as groups.

        Raises:
            PosttrainError: the data set holds prompts, which have no completions to train on.
        """
        groups = [item for item in self._items if isinstance(item, Group)]
        if len(groups) < len(self._items):
            raise PosttrainError(
                f"{self.name} holds prompts; expected demonstrations, preferences or feedback "
                "(kind: demonstrations takes the answers as completions)"
            )
        return groups

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of every row."""
        prompts = [item.prompt if isinstance(item, Group) else item for item in self._items]
        return [prompt for prompt in prompts if prompt is not None]

    def summary(self) -> str:
        """One line: `1,200 rows from train.jsonl, 3 skipped: 2 over-long, 1 broken JSON (first: train.jsonl:17)`."""
        rows = f"{len(self):,} row{'' if len(self) == 1 else 's'} from {self.name}"
        return f"{rows}, {len(self.bad):,} skipped: {_faults(self.bad)}" if self.bad else rows


def load_dataset(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    chat: bool = True,
    max_length: int | None = None,
    on_bad: OnBad = "stop",
    limit: int | None = None,
    split: str = "train",
) -> Dataset:
    """Read, check and tokenize the rows of a source.

    Args:
        source: what `read_rows` takes: a file, a folder, a hub id, rows in memory.
        kind: "demonstrations", "preferences", "feedback" or "prompts"; None takes it from the columns of the first row
            that can be used. See `parse` for the rows each kind is made of.
        columns: the source's column names to the standard ones, `{"query": "prompt"}`.
        system: a system message for rows that bring none.
        chat: whether a text prompt is a user turn of the chat template; plain text otherwise.
        max_length: most tokens of a trajectory or prompt; a longer row is a bad row, never cut. None for no limit.
        on_bad: "stop" raises at the first bad row; "skip" leaves bad rows out and lists them in `Dataset.bad`.
        limit: stop after this many usable rows. None for all.
        split: the split of a hub id or saved data set.

    Raises:
        BadRow: the first bad row, with its place, where `on_bad` is "stop".
        PosttrainError: a source that cannot be read or has no usable row, an unknown option.
    """
    _check(on_bad, max_length, limit)
    rendering = _Rendering(tokenizer, system, chat, max_length)
    items: list[Group | Prompt] = []
    bad: list[BadRow] = []
    for raw in read_rows(source, split=split):
        try:
            if raw.error is not None:
                raise raw.error
            row = parse(raw.values, kind, columns)
            kind = kind or kind_of(row)
            items.append(rendering.item(row, raw.origin.index))
        except BadRow as error:
            if on_bad == "stop":
                advice = "set on_bad: skip to leave such rows out"
                raise BadRow(error.category, f"{error.detail}; {advice}", raw.origin) from error
            bad.append(error.at(raw.origin))
        if len(items) == limit:
            break
    name = raw.origin.name  # a source without a row has raised
    if not items or kind is None:
        raise PosttrainError(f"no usable row in {name}: {len(bad):,} read: {_faults(bad)}: {bad[0].reason}")
    return Dataset(items, cast("Kind", kind), name, bad)


def _check(on_bad: str, max_length: int | None, limit: int | None) -> None:
    if on_bad not in get_args(OnBad):
        raise PosttrainError(f"on_bad: {on_bad!r} is unknown; expected stop or skip")
    for name, value in (("max_length", max_length), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise PosttrainError(f"{name}: {value!r} is not a positive whole number (leave it out for no limit)")


def _faults(bad: Sequence[BadRow]) -> str:
    """`2 over-long, 1 broken JSON (first: train.jsonl:17)`"""
    counts = Counter(row.category for row in bad).most_common()
    return f"{', '.join(f'{count:,} {category}' for category, count in counts)} (first: {bad[0].origin})"


# Rows to groups and prompts


@dataclass(frozen=True, slots=True)
class _Rendering:
    """How rows become tokens: the options of `load_dataset` that every row shares."""

    tokenizer: PreTrainedTokenizerBase
    system: str | None
    chat: bool
    max_length: int | None

    def item(self, row: Row, key: int) -> Group | Prompt:
        match row:
            case Chat(messages):
                return self._chat(messages, key)
            case PromptCompletion(prompt, completion, answer, meta):
                return Group([self._trajectory(prompt, completion, "none")], self._prompt(prompt, key, answer, meta))
            case Preference(prompt, chosen, rejected):
                pair = [self._trajectory(prompt, chosen, "chosen"), self._trajectory(prompt, rejected, "rejected")]
                if torch.equal(pair[0].tokens, pair[1].tokens):
                    raise BadRow("identical pair", "chosen and rejected become the same tokens")
                return Group(pair, self._prompt(prompt, key))
            case Feedback(prompt, completion, label):
                trajectory = self._trajectory(prompt, completion, "chosen" if label else "rejected")
                return Group([trajectory], self._prompt(prompt, key))
            case PromptAnswer(prompt, answer, meta):
                rendered = self._prompt(prompt, key, answer, meta)
                self._fits(rendered.tokens, "the prompt has")
                return rendered

    def _prompt(self, prompt: Text, key: int, answer: Any = None, meta: dict[str, Any] | None = None) -> Prompt:
        rendered = render_prompt(self.tokenizer, prompt, self.system, chat=self.chat)
        return replace(rendered, answer=answer, key=key, meta=dict(meta or {}))

    def _chat(self, messages: list[Message], key: int) -> Group:
        tokens, mask = render_chat(self.tokenizer, messages, system=self.system)
        trajectory = self._expert(tokens, mask, messages, "none")
        conversation = with_system(messages, self.system)
        first = next(i for i, message in enumerate(conversation) if message["role"] == "assistant")
        return Group([trajectory], Prompt(tokens[: trajectory.prompt_length], conversation[:first], key=key))

    def _trajectory(self, prompt: Text, completion: Text, label: Label) -> Trajectory:
        tokens, mask = render_completion(self.tokenizer, prompt, completion, self.system, chat=self.chat)
        return self._expert(tokens, mask, completion, label)

    def _expert(self, tokens: Tensor, mask: Tensor, completion: Text, label: Label) -> Trajectory:
        self._fits(tokens, "the row has" if label == "none" else f"the {label} completion has, with its prompt,")
        trajectory = Trajectory(tokens, mask, turn=_turns(mask), source="expert", label=label, text=_said(completion))
        if not trajectory.actions:
            raise BadRow("no trainable token", "the chat template marks no token as the assistant's")
        return trajectory

    def _fits(self, tokens: Tensor, what: str) -> None:
        if self.max_length is not None and len(tokens) > self.max_length:
            raise BadRow(
                "over-long",
                f"{what} {len(tokens):,} tokens, max_length is {self.max_length:,}; raise max_length",
            )


def _turns(mask: Tensor) -> Tensor:
    """`[length]` int64: the turn each token belongs to, where a turn ends with the policy's last token in it."""
    ends = mask[:-1] & ~mask[1:]
    turns = torch.cat([torch.zeros(1, dtype=torch.long), ends.long().cumsum(0)])
    return turns.clamp(max=int(turns[mask].max()) if mask.any() else 0)


def _said(completion: Text) -> str:
    """The text of the assistant's turns, one below the other."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion if message["role"] == "assistant")
