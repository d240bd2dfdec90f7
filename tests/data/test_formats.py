"""Row kinds: every convention of columns, and the reason given for every row that does not fit."""

from __future__ import annotations

import pytest

from posttrain.data import BadRow, Chat, Feedback, Preference, PromptAnswer, PromptCompletion, kind_of, parse
from posttrain.trajectory import PosttrainError

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "1+1?"}
GOOD = {"role": "assistant", "content": "2"}
POOR = {"role": "assistant", "content": "3"}
MORE = {"role": "user", "content": "sure?"}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"messages": [USER, GOOD]}, Chat([USER, GOOD])),
        ({"messages": [GOOD, GOOD, USER]}, Chat([GOOD, GOOD, USER])),
        ({"conversations": [USER, GOOD], "prompt": "unused"}, Chat([USER, GOOD])),
        (
            {
                "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}],
                "system": "be brief",
            },
            Chat([SYSTEM, USER, GOOD]),
        ),
        ({"messages": [SYSTEM, USER, GOOD], "system": "another"}, Chat([SYSTEM, USER, GOOD])),
        ({"prompt": "1+1?", "completion": "2"}, PromptCompletion("1+1?", "2")),
        ({"prompt": "1+1?", "response": "2", "id": 7}, PromptCompletion("1+1?", "2", meta={"id": 7})),
        ({"prompt": [USER], "completion": [GOOD]}, PromptCompletion([USER], [GOOD])),
        ({"question": "1+1?", "response": "2", "system": "be brief"}, PromptCompletion([SYSTEM, USER], "2")),
        ({"question": "1+1?", "response": "2", "system": ""}, PromptCompletion("1+1?", "2")),
        ({"instruction": "add", "input": "1, 1", "output": "2"}, PromptCompletion("add\n\n1, 1", "2")),
        ({"instruction": "1+1?", "input": "", "output": "2"}, PromptCompletion("1+1?", "2")),
        ({"prompt": "1+1?", "input": "x", "output": "2"}, PromptCompletion("1+1?", "2", meta={"input": "x"})),
        ({"prompt": "q", "chosen": "2", "rejected": "3"}, Preference("q", "2", "3")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}, Preference([USER], [GOOD], [POOR])),
        ({"prompt": "1+1?", "chosen": [GOOD], "rejected": [POOR]}, Preference("1+1?", [GOOD], [POOR])),
        ({"chosen": [USER, GOOD], "rejected": [USER, POOR]}, Preference([USER], [GOOD], [POOR])),
        (
            {"prompt": "1+1?", "chosen": [USER, GOOD], "rejected": [USER, POOR], "system": "be brief"},
            Preference([SYSTEM, USER], [GOOD], [POOR]),
        ),
        (
            {"prompt": [USER], "chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, MORE, POOR]},
            Preference([USER, GOOD, MORE], [GOOD], [POOR]),
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD, MORE, POOR]},
            Preference([USER], [GOOD], [GOOD, MORE, POOR]),
        ),
        ({"prompt": "q", "completion": "c", "label": False}, Feedback("q", "c", False)),
        ({"prompt": "q", "completion": "c", "label": "True"}, Feedback("q", "c", True)),
        ({"prompt": "q", "completion": "c", "label": 1}, Feedback("q", "c", True)),
        ({"prompt": "q", "answer": 42}, PromptAnswer("q", 42)),
        ({"question": "q", "answer": "42", "level": 3}, PromptAnswer("q", "42", {"level": 3})),
        ({"problem": "q", "solution": "so 4"}, PromptAnswer("q", "so 4", {"solution": "so 4"})),
        ({"problem": "q", "solution": "so 4", "answer": "4"}, PromptAnswer("q", "4", {"solution": "so 4"})),
        ({"question": "q", "answer": "6*7\n#### 1,042 "}, PromptAnswer("q", "1,042", {"solution": "6*7\n#### 1,042 "})),
        ({"question": "q", "answer": "#### Title\nbody"}, PromptAnswer("q", "#### Title\nbody")),
        ({"prompt": [SYSTEM, USER]}, PromptAnswer([SYSTEM, USER])),
    ],
)
def test_the_kind_is_found_by_the_columns(raw, expected):
    assert parse(raw) == expected
    assert parse(raw, kind_of(expected)) == expected


@pytest.mark.parametrize(
    ("raw", "kind", "expected"),
    [
        ({"question": "q", "answer": "6*7\n#### 42"}, "demonstrations", ("q", "6*7\n#### 42", "42")),
        ({"problem": "q", "answer": "4", "solution": "so 4"}, "demonstrations", ("q", "so 4", "4")),
        ({"prompt": "q", "answer": 42}, "demonstrations", ("q", "42", 42)),
        ({"prompt": "q", "answer": "4", "completion": "it is 4"}, "demonstrations", ("q", "it is 4", "4")),
        ({"prompt": "q", "chosen": "2", "rejected": "3"}, "demonstrations", ("q", "2", None)),
    ],
)
def test_answers_and_chosen_completions_as_demonstrations(raw, kind, expected):
    row = parse(raw, kind)
    assert isinstance(row, PromptCompletion)
    assert (row.prompt, row.completion, row.answer) == expected


def test_demonstrations_as_prompts():
    assert parse({"prompt": "q", "completion": "c"}, "prompts") == PromptAnswer("q", None, {"completion": "c"})
    assert parse({"messages": [USER, GOOD, MORE, GOOD]}, "prompts") == PromptAnswer([USER, GOOD, MORE])


def test_columns_rename_and_win_over_the_standard_names():
    assert parse({"query": "q", "target": "4"}, columns={"query": "prompt", "target": "answer"}) == PromptAnswer(
        "q", "4"
    )
    raw = {"prompt": "template", "text": "q", "answer": "4"}
    assert parse(raw, columns={"text": "prompt"}) == PromptAnswer("q", "4", {"prompt": "template"})


def test_messages_keep_further_fields_and_lose_null_ones():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "thinking": None}
    row = parse({"messages": [USER, call, {"role": "tool", "content": "", "name": "add"}, GOOD]})
    assert isinstance(row, Chat)
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert row.messages[2] == {"role": "tool", "content": "", "name": "add"}


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (
            {"text": "x", "id": 1},
            None,
            "missing column: the row has text, id; expected messages, prompt + completion, prompt + chosen + rejected, "
            "prompt + completion + label or prompt + answer (columns renames yours)",
        ),
        ({"prompt": "q", "id": 1}, "demonstrations", "missing column: no completion; the row has prompt, id"),
        ({"id": 1}, "demonstrations", "missing column: no prompt and no completion; the row has id"),
        ({"prompt": "q"}, "preferences", "missing column: no chosen and no rejected; the row has prompt"),
        ({"chosen": "a", "rejected": "b"}, None, "missing column: no prompt; the row has chosen, rejected"),
        ({"chosen": [GOOD], "rejected": [POOR]}, None, "missing column: no prompt; the row has chosen, rejected"),
        ({"prompt": "q", "completion": "c"}, "feedback", "missing column: no label; the row has prompt, completion"),
        ({}, "prompts", "missing column: no prompt; the row has none"),
        ({"prompt": " \n", "answer": "4"}, None, "empty prompt: prompt has no text"),
        ({"prompt": [], "answer": "4"}, None, "empty prompt: prompt has no messages"),
        ({"prompt": "q", "completion": ""}, None, "empty completion: completion has no text"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, None, "empty rejected: rejected has no text"),
        ({"prompt": "q", "answer": " "}, None, "empty answer: answer is empty, expected the reference answer"),
        ({"prompt": "q", "answer": None}, None, "empty answer: answer is null, expected the reference answer"),
        ({"prompt": "q", "answer": "so\n#### "}, None, "empty answer: nothing follows #### in answer"),
        ({"prompt": 5, "answer": "4"}, None, "wrong type: prompt is a number (5), expected text or a list of messages"),
        ({"prompt": None, "answer": "4"}, None, "wrong type: prompt is null, expected text or a list of messages"),
        (
            {"prompt": "q", "completion": {}},
            None,
            "wrong type: completion is an object, expected text or a list of messages",
        ),
        ({"messages": "hi"}, None, "wrong type: messages is text, expected a list of messages"),
        ({"messages": ["hi"]}, None, "wrong type: messages[0] is text, expected a message {role, content}"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
            None,
            "wrong type: the content of messages[1] (assistant) is a list, expected text",
        ),
        (
            {"prompt": "q", "completion": "c", "label": "good"},
            None,
            "wrong type: label is text, expected true or false",
        ),
        (
            {"prompt": "q", "completion": "c", "label": 2},
            None,
            "wrong type: label is a number (2), expected true or false",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": [POOR]}, None, "wrong type: chosen is text but rejected is a list"),
        ({"messages": [USER, MORE]}, None, "no assistant turn: messages has only user, user"),
        ({"prompt": "q", "completion": [USER]}, None, "no assistant turn: completion has only user"),
        (
            {"prompt": "q", "completion": [USER, GOOD]},
            None,
            "no assistant turn: completion starts with a user turn, expected assistant",
        ),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            None,
            "unknown role: messages[0] has role 'bot', expected system, developer, user, assistant or tool",
        ),
        (
            {"messages": [{"content": "x"}]},
            None,
            "unknown role: messages[0] has role None, expected system, developer, user, assistant or tool",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, None, "null content: messages[1] (assistant) has no content"),
        ({"messages": [{"role": "user", "content": " "}, GOOD]}, None, "empty message: messages[0] (user) has no text"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, None, "identical pair: chosen and rejected are the same"),
        (
            {"chosen": [USER, GOOD], "rejected": [MORE, GOOD]},
            None,
            "no shared prompt: chosen and rejected must be the same up to an assistant turn of each",
        ),
        (
            {"chosen": [USER, GOOD, USER], "rejected": [USER, GOOD, MORE]},
            None,
            "no shared prompt: chosen and rejected must be the same up to an assistant turn of each",
        ),
        (
            {"prompt": [USER, MORE], "chosen": [USER, GOOD], "rejected": [USER, POOR]},
            None,
            "no shared prompt: the prompt is not in the turns that chosen and rejected share",
        ),
        (
            {"prompt": "another", "chosen": [USER, GOOD], "rejected": [USER, POOR]},
            None,
            "no shared prompt: the prompt is not in the turns that chosen and rejected share",
        ),
    ],
)
def test_the_reason_of_a_bad_row(raw, kind, reason):
    with pytest.raises(BadRow) as caught:
        parse(raw, kind)
    assert caught.value.reason == reason
    assert str(caught.value) == reason
    assert caught.value.category == reason.partition(":")[0]


def test_a_renamed_column_that_is_not_there():
    with pytest.raises(BadRow) as caught:
        parse({"text": "x"}, columns={"query": "prompt"})
    assert caught.value.reason == "missing column: no 'query' (named in columns); the row has text"


def test_wrong_options_are_no_fault_of_the_row():
    with pytest.raises(PosttrainError, match=r"^kind: 'sft' is unknown; expected one of demonstrations, ") as caught:
        parse({"prompt": "q"}, "sft")
    assert not isinstance(caught.value, BadRow)
    message = r"^columns: 'prompt' is renamed to 'question'; expected your column: one of messages, system, prompt, "
    with pytest.raises(PosttrainError, match=message) as caught:
        parse({"question": "q"}, columns={"prompt": "question"})
    assert not isinstance(caught.value, BadRow)
