"""Whole data sets: groups and prompts of every kind, and every row that was left out named and counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import BadRow, load_dataset, render_prompt
from posttrain.trajectory import Group, PosttrainError, Prompt

PAIRS = [{"prompt": "1+1", "completion": "2"}, {"prompt": "2+2", "completion": "four"}]
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "ok"},
]


def test_demonstrations(tiny_tokenizer):
    data = load_dataset(PAIRS, tiny_tokenizer, system="add")
    assert (data.kind, len(data), data.bad) == ("demonstrations", 2, [])
    for i, (row, group) in enumerate(zip(PAIRS, data, strict=True)):
        assert isinstance(group, Group)
        (trajectory,) = group.trajectories
        assert (trajectory.source, trajectory.label, trajectory.text) == ("expert", "none", row["completion"])
        assert tiny_tokenizer.decode(trajectory.tokens[trajectory.action_mask]) == row["completion"] + "<|im_end|>"
        assert trajectory.turn is not None
        assert trajectory.turn.tolist() == [0] * trajectory.length
        assert group.prompt is not None
        assert group.prompt.key == i
        assert trajectory.tokens[: trajectory.prompt_length].tolist() == group.prompt.tokens.tolist()
        assert torch.equal(group.prompt.tokens, render_prompt(tiny_tokenizer, row["prompt"], "add").tokens)


def test_chat_has_its_turns_and_its_first_prompt(tiny_tokenizer):
    data = load_dataset([{"messages": TALK}], tiny_tokenizer, system="be")
    (group,) = data.groups
    (trajectory,) = group.trajectories
    assert data.kind == "demonstrations"
    assert tiny_tokenizer.decode(trajectory.tokens[trajectory.action_mask]) == "yo<|im_end|>ok<|im_end|>"
    assert trajectory.turn is not None
    assert trajectory.turn[trajectory.action_mask].tolist() == [0] * 3 + [1] * 3
    assert trajectory.turn.tolist() == sorted(trajectory.turn.tolist())
    assert trajectory.turn.max() == 1
    assert trajectory.text == "yo\nok"
    assert group.prompt is not None
    assert group.prompt.messages == [{"role": "system", "content": "be"}, TALK[0]]
    assert torch.equal(group.prompt.tokens, render_prompt(tiny_tokenizer, [TALK[0]], "be").tokens)


def test_preferences(tiny_tokenizer):
    rows = [{"prompt": "q", "chosen": "good", "rejected": "poor"}]
    data = load_dataset(rows, tiny_tokenizer)
    (group,) = data.groups
    assert data.kind == "preferences"
    assert [(t.label, t.source, t.text) for t in group.trajectories] == [
        ("chosen", "expert", "good"),
        ("rejected", "expert", "poor"),
    ]
    assert group.prompt is not None
    for trajectory in group.trajectories:
        assert trajectory.tokens[: trajectory.prompt_length].tolist() == group.prompt.tokens.tolist()


def test_feedback(tiny_tokenizer):
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    data = load_dataset(rows, tiny_tokenizer)
    assert data.kind == "feedback"
    assert [group.trajectories[0].label for group in data.groups] == ["chosen", "rejected"]
    assert [len(group) for group in data.groups] == [1, 1]


def test_prompts_and_the_same_rows_as_demonstrations(tiny_tokenizer):
    rows = [{"question": "6*7?", "answer": "6*7=42\n#### 42", "level": 1}]
    data = load_dataset(rows, tiny_tokenizer)
    (prompt,) = data
    assert data.kind == "prompts"
    assert isinstance(prompt, Prompt)
    assert (prompt.answer, prompt.key, prompt.question) == ("42", 0, "6*7?")
    assert prompt.meta == {"level": 1, "solution": "6*7=42\n#### 42"}
    with pytest.raises(PosttrainError, match=r"^list holds prompts; expected demonstrations, preferences or feedback"):
        _ = data.groups
    worked = load_dataset(rows, tiny_tokenizer, kind="demonstrations")
    (group,) = worked.groups
    assert group.trajectories[0].text == "6*7=42\n#### 42"
    assert group.prompt is not None
    assert group.prompt.answer == "42"
    assert torch.equal(group.prompt.tokens, prompt.tokens)
    assert [p.key for p in worked.prompts] == [p.key for p in data.prompts] == [0]


def test_plain_text(tiny_tokenizer):
    data = load_dataset(PAIRS, tiny_tokenizer, chat=False)
    assert tiny_tokenizer.decode(data.groups[0].trajectories[0].tokens) == "1+12<|im_end|>"


def test_a_slice_is_a_data_set(tiny_tokenizer):
    data = load_dataset(PAIRS, tiny_tokenizer)
    assert [item is data[1] for item in data[1:]] == [True]
    assert data[1:].kind == "demonstrations"


BAD_LINES = [
    ('{"prompt": "x", "completion": ', "broken JSON: Expecting value at column 31"),
    ('{"prompt": "x"}', "missing column: no completion; the row has prompt"),
    ('{"prompt": "", "completion": "y"}', "empty prompt: prompt has no text"),
    ('{"prompt": 3, "completion": "y"}', "wrong type: prompt is a number (3), expected text or a list of messages"),
    (
        '{"prompt": "x", "completion": "%s"}' % ("y" * 40),
        "over-long: the row has 62 tokens, max_length is 60; raise max_length",
    ),
    (
        '{"prompt": [{"role": "system", "content": "no"}], "completion": "y"}',
        "template error: no system turns here",
    ),
]


@pytest.fixture
def strict_tokenizer(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    refusal = "{% if m.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refusal + "{% endfor %}" + tiny_tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason.split(":")[0] for _, reason in BAD_LINES])
def test_a_bad_row_stops_the_run_or_is_skipped_by_name(tmp_path, strict_tokenizer, line, reason):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(PAIRS[0]), "", line, json.dumps(PAIRS[1])]), encoding="utf-8")
    with pytest.raises(BadRow) as caught:
        load_dataset(path, strict_tokenizer, max_length=60)
    assert str(caught.value) == f"train.jsonl:3: {reason}; set on_bad: skip to leave such rows out"
    data = load_dataset(path, strict_tokenizer, max_length=60, on_bad="skip")
    assert [group.trajectories[0].text for group in data.groups] == ["2", "four"]
    assert [prompt.key for prompt in data.prompts] == [0, 2]
    assert [str(bad) for bad in data.bad] == [f"train.jsonl:3: {reason}"]
    category = reason.split(":")[0]
    assert data.summary() == f"2 rows from train.jsonl, 1 skipped: 1 {category} (first: train.jsonl:3)"


def test_the_summary_counts_faults(tmp_path, tiny_tokenizer):
    path = tmp_path / "train.jsonl"
    long = json.dumps({"prompt": "x" * 50, "completion": "y"})
    rows = [json.dumps(PAIRS[0])] * 1200 + ["{", long, long]
    path.write_text("\n".join(rows), encoding="utf-8")
    data = load_dataset(path, tiny_tokenizer, max_length=60, on_bad="skip")
    assert data.summary() == (
        "1,200 rows from train.jsonl, 3 skipped: 2 over-long, 1 broken JSON (first: train.jsonl:1201)"
    )
    assert load_dataset(PAIRS[:1], tiny_tokenizer).summary() == "1 row from list"


def test_what_is_too_long_is_named(tiny_tokenizer):
    length = load_dataset([{"prompt": "q", "answer": "a"}], tiny_tokenizer).prompts[0].tokens.numel()
    load_dataset([{"prompt": "q", "answer": "a"}], tiny_tokenizer, max_length=length)
    message = (
        rf"list\[0\]: over-long: the prompt has {length} tokens, max_length is {length - 1}; raise max_length; set on"
    )
    with pytest.raises(BadRow, match=message):
        load_dataset([{"prompt": "q", "answer": "a"}], tiny_tokenizer, max_length=length - 1)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b" * 1000}
    with pytest.raises(
        BadRow, match=r"over-long: the rejected completion has, with its prompt, 1,\d+ tokens, max_length"
    ):
        load_dataset([pair], tiny_tokenizer, max_length=100)


def test_rows_must_all_be_of_the_first_rows_kind(tiny_tokenizer):
    rows: list[dict[str, Any]] = [
        {"id": 1},
        PAIRS[0],
        {"prompt": "q", "answer": "a"},
        {"prompt": "q"},
        {"messages": TALK},
    ]
    data = load_dataset(rows, tiny_tokenizer, on_bad="skip")
    assert data.kind == "demonstrations"
    assert [bad.category for bad in data.bad] == ["missing column", "missing column"]
    assert [str(bad.origin) for bad in data.bad] == ["list[0]", "list[3]"]


def test_no_usable_row(tiny_tokenizer):
    message = (
        r"^no usable row in list: 2 read: 1 empty prompt, 1 missing column \(first: list\[0\]\): empty prompt: prompt"
    )
    with pytest.raises(PosttrainError, match=message):
        load_dataset([{"prompt": "", "answer": "a"}, {"id": 1}], tiny_tokenizer, on_bad="skip", kind="prompts")


def test_a_row_without_a_trainable_token(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    message = r"^list\[0\]: no trainable token: the chat template marks no token as the assistant's; set on_bad"
    with pytest.raises(BadRow, match=message):
        load_dataset([{"messages": TALK}], tokenizer)


def test_a_pair_that_becomes_the_same_tokens(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tiny_tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    with pytest.raises(BadRow, match="identical pair: chosen and rejected become the same tokens"):
        load_dataset([{"prompt": "q", "chosen": "a", "rejected": "a "}], tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad": "warn"}, "^on_bad: 'warn' is unknown; expected stop or skip$"),
        ({"max_length": 0}, r"^max_length: 0 is not a positive whole number \(leave it out for no limit\)$"),
        ({"limit": 1.5}, r"^limit: 1\.5 is not a positive whole number"),
        ({"kind": "sft"}, "^kind: 'sft' is unknown"),
        ({"columns": {"a": "b"}, "on_bad": "skip"}, "^columns: 'a' is renamed to 'b'"),
    ],
)
def test_wrong_options(tiny_tokenizer, options, message):
    with pytest.raises(PosttrainError, match=message):
        load_dataset(PAIRS, tiny_tokenizer, **options)


def test_a_missing_chat_template_is_no_fault_of_the_row(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(PosttrainError, match="no chat template") as caught:
        load_dataset([{"messages": TALK}], tokenizer, on_bad="skip")
    assert not isinstance(caught.value, BadRow)


def test_the_limit_counts_usable_rows(tiny_tokenizer):
    rows: list[dict[str, Any]] = [{"id": 1}, PAIRS[0], {"id": 2}, PAIRS[1], {"id": 3}, PAIRS[0]]
    data = load_dataset(rows, tiny_tokenizer, on_bad="skip", limit=2)
    assert (len(data), len(data.bad)) == (2, 2)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_tokens(tmp_path, tiny_tokenizer, extension):
    import pandas

    path = tmp_path / f"train.{extension}"
    table = pandas.DataFrame(PAIRS)
    match extension:
        case "jsonl":
            table.to_json(path, orient="records", lines=True)
        case "json":
            table.to_json(path, orient="records")
        case "csv":
            table.to_csv(path, index=False)
        case _:
            table.to_parquet(path)
    read, expected = load_dataset(path, tiny_tokenizer), load_dataset(PAIRS, tiny_tokenizer)
    assert [g.trajectories[0].tokens.tolist() for g in read.groups] == [
        g.trajectories[0].tokens.tolist() for g in expected.groups
    ]


any_value: st.SearchStrategy[Any] = (
    st.none() | st.integers() | st.text(max_size=6) | st.just([]) | st.just(TALK) | st.just([TALK[0]])
)
any_row = st.dictionaries(
    st.sampled_from(["prompt", "completion", "messages", "answer", "chosen", "rejected", "label", "system", "x"]),
    any_value,
    max_size=5,
)


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(any_row | st.integers(), min_size=1, max_size=8), kind=st.sampled_from([None, "demonstrations"]))
def test_nothing_is_dropped_silently(tiny_tokenizer, rows, kind):
    seen = [{"prompt": "q", "completion": "c"}, *rows]  # one row that can be used, so that the set is not empty
    data = load_dataset(seen, tiny_tokenizer, kind=kind, on_bad="skip", max_length=60)
    assert len(data) + len(data.bad) == len(seen)
    places = {prompt.key for prompt in data.prompts} | {bad.origin.index for bad in data.bad if bad.origin}
    assert places == set(range(len(seen)))
    assert all(trajectory.actions for group in data.groups for trajectory in group.trajectories)


def test_importing_the_room_loads_no_heavy_library():
    import subprocess
    import sys

    code = "import sys, posttrain.data; print({'transformers', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
