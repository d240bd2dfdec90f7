"""The kinds of row: chat, prompt and completion, preference pair, prompt and answer, feedback; and how they are known.

Columns follow the conventions of the Hugging Face hub. `parse` finds the kind by the columns that are there, checks
every value and says in a `BadRow` what is wrong with the first that does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from posttrain.data.rows import BadRow, describe
from posttrain.trajectory import Message, PosttrainError

Kind = Literal["demonstrations", "preferences", "feedback", "prompts"]
Text = str | Sequence[Message]  # plain text, or turns of a conversation

KINDS: tuple[str, ...] = get_args(Kind)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
COLUMNS: dict[str, tuple[str, ...]] = {  # standard name: the names it goes by, in order of preference
    "messages": ("messages", "conversations"),
    "system": ("system",),
    "prompt": ("prompt", "instruction", "question", "problem"),
    "input": ("input",),
    "completion": ("completion", "response", "output"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label",),
    "answer": ("answer",),
    "solution": ("solution",),
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; its assistant turns are the demonstration."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and the completion to imitate. `answer` is the reference answer where the row held one as well."""

    prompt: Text
    completion: Text
    answer: Any = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse completion."""

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """A prompt for the policy to answer; `answer` is what a verifier compares with (None in prompt-only rows)."""

    prompt: Text
    answer: Any = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Feedback:
    """A prompt and one completion that was found good (`label` True) or bad."""

    prompt: Text
    completion: Text
    label: bool


Row = Chat | PromptCompletion | Preference | PromptAnswer | Feedback


def kind_of(row: Row) -> Kind:
    """What a row is used as: the `kind` of the data set it stands in."""
    if isinstance(row, Chat | PromptCompletion):
        return "demonstrations"
    if isinstance(row, Preference):
        return "preferences"
    return "feedback" if isinstance(row, Feedback) else "prompts"


def parse(raw: Mapping[str, Any], kind: str | None = None, columns: Mapping[str, str] | None = None) -> Row:
    """Turn a row's columns into one of the row kinds.

    Args:
        raw: the row as read.
        kind: one of `KINDS`; None finds it by the columns. "demonstrations" also takes prompt + answer rows (the
            worked solution, else the answer, becomes the completion) and preference pairs (the chosen side);
            "prompts" also takes demonstrations (the prompt alone).
        columns: the row's own column names to the standard ones (the keys of `COLUMNS`): `{"query": "prompt"}`.

    Raises:
        BadRow: a missing column, an empty or null text, a wrong type, an unknown role, no assistant turn.
        PosttrainError: an unknown `kind`, or a name in `columns` that is not a standard one.
    """
    if kind is not None and kind not in KINDS:
        raise PosttrainError(f"kind: {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    row = _standard(raw, columns or {})
    match kind or _detect(row, raw):
        case "preferences":
            return _preference(row, raw)
        case "feedback":
            return _feedback(row, raw)
        case "prompts":
            return _prompt_answer(row, raw)
        case _:
            return _demonstration(row, raw)


def _standard(raw: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under standard names; what has none of these keeps its own under `meta`."""
    for theirs, standard in columns.items():
        if standard not in COLUMNS:
            raise PosttrainError(
                f"columns: {theirs!r} is renamed to {standard!r}; expected your column: one of {', '.join(COLUMNS)}"
            )
        if theirs not in raw:
            raise BadRow("missing column", f"no {theirs!r} (named in columns); the row has {', '.join(raw) or 'none'}")
    row = {standard: raw[theirs] for theirs, standard in columns.items()}
    used = set(columns)
    for standard, names in COLUMNS.items():
        if standard == "input" and "instruction" not in used:
            continue  # only Alpaca's rows mean the rest of the prompt by it
        present = [name for name in names if name in raw and name not in columns]
        if standard not in row and present:
            name = next((name for name in present if raw[name] is not None), present[0])
            row[standard] = raw[name]
            used.add(name)
    row["meta"] = {name: value for name, value in raw.items() if name not in used}
    return row


def _detect(row: Mapping[str, Any], raw: Mapping[str, Any]) -> Kind:
    if {"chosen", "rejected"} <= row.keys():
        return "preferences"
    if {"prompt", "completion", "label"} <= row.keys():
        return "feedback"
    if "messages" in row or {"prompt", "completion"} <= row.keys():
        return "demonstrations"
    if "prompt" in row:
        return "prompts"
    raise BadRow(
        "missing column",
        f"the row has {', '.join(raw) or 'none'}; expected messages, prompt + completion, prompt + chosen + rejected, "
        "prompt + completion + label or prompt + answer (columns renames yours)",
    )


def _required(row: Mapping[str, Any], raw: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise BadRow("missing column", f"no {' and no '.join(missing)}; the row has {', '.join(raw) or 'none'}")


# Row kinds


def _demonstration(row: Mapping[str, Any], raw: Mapping[str, Any]) -> Row:
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        _assistant_turn(messages, "messages")
        return Chat(_with_system(messages, row))
    if "chosen" in row and "completion" not in row:
        pair = _preference(row, raw)
        return PromptCompletion(pair.prompt, pair.chosen)
    if "completion" not in row and ("answer" in row or "solution" in row):
        return _worked(_prompt_answer(row, raw))
    _required(row, raw, "prompt", "completion")
    prompt, completion = _prompt(row), _completion(row["completion"], "completion")
    if "answer" in row or "solution" in row:
        known = _prompt_answer(row, raw)
        return PromptCompletion(prompt, completion, known.answer, known.meta)
    return PromptCompletion(prompt, completion, meta=row["meta"])


def _worked(row: PromptAnswer) -> PromptCompletion:
    """A prompt with its worked solution, or with the bare answer where there is none, as a demonstration."""
    completion = row.meta.get("solution", row.answer)
    text = completion if isinstance(completion, str) else json.dumps(completion, ensure_ascii=False, default=str)
    return PromptCompletion(row.prompt, _text(text, "answer"), row.answer, row.meta)


def _prompt_answer(row: Mapping[str, Any], raw: Mapping[str, Any]) -> PromptAnswer:
    if "prompt" not in row and "messages" in row:
        messages = _messages(row["messages"], "messages")
        _assistant_turn(messages, "messages")
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return PromptAnswer(_prompt({**row, "prompt": messages[:last]}), meta=row["meta"])
    _required(row, raw, "prompt")
    prompt, meta = _prompt(row), dict(row["meta"])
    if "completion" in row and row["completion"] is not None:
        meta["completion"] = row["completion"]
    if "solution" in row and row["solution"] is not None:
        meta["solution"] = row["solution"]
    if "answer" not in row and "solution" not in row:
        return PromptAnswer(prompt, None, meta)
    name = "answer" if row.get("answer") is not None or "solution" not in row else "solution"
    answer = row[name]
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise BadRow(
            f"empty {name}", f"{name} is {'null' if answer is None else 'empty'}, expected the reference answer"
        )
    if isinstance(answer, str) and "####" in answer.rstrip().rpartition("\n")[2]:  # GSM8K: the answer ends its solution
        meta["solution"] = answer
        answer = answer.rpartition("####")[2].strip()
        if not answer:
            raise BadRow(f"empty {name}", f"nothing follows #### in {name}")
    return PromptAnswer(prompt, answer, meta)


def _feedback(row: Mapping[str, Any], raw: Mapping[str, Any]) -> Feedback:
    _required(row, raw, "prompt", "completion", "label")
    label = row["label"]
    if isinstance(label, str):  # CSV knows only text
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise BadRow("wrong type", f"label is {describe(label)}, expected true or false")
    return Feedback(_prompt(row), _completion(row["completion"], "completion"), bool(label))


def _preference(row: Mapping[str, Any], raw: Mapping[str, Any]) -> Preference:
    _required(row, raw, "chosen", "rejected")
    chosen, rejected = _either(row["chosen"], "chosen"), _either(row["rejected"], "rejected")
    if chosen == rejected:
        raise BadRow("identical pair", "chosen and rejected are the same")
    if isinstance(chosen, str) or isinstance(rejected, str):
        if type(chosen) is not type(rejected):
            raise BadRow("wrong type", f"chosen is {describe(chosen)} but rejected is {describe(rejected)}")
        _required(row, raw, "prompt")
        return Preference(_prompt(row), chosen, rejected)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        _required(row, raw, "prompt")
        return Preference(_prompt(row), chosen, rejected)
    return _conversations(row, chosen, rejected)


def _conversations(row: Mapping[str, Any], chosen: Sequence[Message], rejected: Sequence[Message]) -> Preference:
    """A pair of whole conversations: the turns they share are the prompt."""
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if shared <= 0 or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise BadRow("no shared prompt", "chosen and rejected must be the same up to an assistant turn of each")
    prompt = chosen[:shared]
    if row.get("prompt") is not None:
        given = _prompt({**row, "system": None})
        turns = [message["content"] for message in prompt] if isinstance(given, str) else prompt
        if any(turn not in turns for turn in ([given] if isinstance(given, str) else given)):
            raise BadRow("no shared prompt", "the prompt is not in the turns that chosen and rejected share")
    return Preference(_with_system(prompt, row), chosen[shared:], rejected[shared:])


# Values


def _prompt(row: Mapping[str, Any]) -> Text:
    """The prompt with what belongs in front of it (`system`) and behind it (`input`, as in Alpaca's rows)."""
    prompt = _either(row["prompt"], "prompt")
    extra = row.get("input")
    if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    if isinstance(row.get("system"), str) and row["system"].strip():
        return _with_system([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, row)
    return prompt


def _with_system(messages: Sequence[Message], row: Mapping[str, Any]) -> list[Message]:
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] in ("system", "developer"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _completion(value: Any, column: str) -> Text:
    completion = _either(value, column)
    if not isinstance(completion, str):
        _assistant_turn(completion, column)
        if completion[0]["role"] != "assistant":
            raise BadRow(
                "no assistant turn", f"{column} starts with a {completion[0]['role']} turn, expected assistant"
            )
    return completion


def _either(value: Any, column: str) -> Text:
    if isinstance(value, list | tuple):
        return _messages(value, column)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{column} is {describe(value)}, expected text or a list of messages")
    return _text(value, column)


def _text(value: str, column: str) -> str:
    if not value.strip():
        raise BadRow(f"empty {column}", f"{column} has no text")
    return value


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise BadRow("wrong type", f"{column} is {describe(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"empty {column}", f"{column} has no messages")
    return [_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    """A message with `role` and `content`; ShareGPT's `from` and `value` are renamed, null fields left out."""
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"{place} is {describe(value)}, expected a message {{role, content}}")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow("unknown role", f"{place} has role {role!r}, expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    extra = {k: v for k, v in value.items() if k not in ("role", "content", "from", "value") and v is not None}
    calls = role == "assistant" and bool(extra.get("tool_calls"))
    if content is None and not calls:
        raise BadRow("null content", f"{place} ({role}) has no content")
    content = "" if content is None else content
    if not isinstance(content, str):
        raise BadRow("wrong type", f"the content of {place} ({role}) is {describe(content)}, expected text")
    if role in ("user", "assistant") and not calls and not content.strip():
        raise BadRow("empty message", f"{place} ({role}) has no text")
    return {"role": role, "content": content, **extra}


def _assistant_turn(messages: Sequence[Message], column: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(str(message["role"]) for message in messages)
        raise BadRow("no assistant turn", f"{column} has only {roles}")
