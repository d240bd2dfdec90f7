from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.evaluation.tasks import from_rows, gsm8k, task_from
from posttrain.reward.verifiers import LastNumber, MathVerify, Regex
from posttrain.trajectory import PosttrainError, Sampling


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + 1?", "answer": i + 1, "topic": "sums"} for i in range(start, start + count)]


def test_rows_become_items() -> None:
    worked = {"prompt": "What is 5 + 5?", "answer": "10", "solution": "5 + 5 = 10\nAnswer: 10"}
    task = from_rows([*rows(3), worked], heldout=0, instruction="Be brief.", name="sums")
    assert task.name == "sums"
    assert task.train[0].prompt == "What is 0 + 1?\nBe brief."
    assert [item.answer for item in task.train] == [1, 2, 3, "10"]
    assert task.train[0].meta == {"topic": "sums"}
    assert [item.solution for item in task.train] == ["Answer: 1", "Answer: 2", "Answer: 3", worked["solution"]]


def test_the_split_is_by_seed_and_does_not_move_when_rows_are_added() -> None:
    task, again = from_rows(rows(40), heldout=0.25), from_rows(rows(40), heldout=0.25)
    assert len(task.heldout) == 10
    assert len(task.train) == 30
    assert [i.prompt for i in task.heldout] == [i.prompt for i in again.heldout]
    other = from_rows(rows(40), heldout=0.25, seed=1)
    assert {i.key for i in other.heldout} != {i.key for i in task.heldout}
    grown = from_rows(list(reversed(rows(44))), heldout=0.25)
    assert len({i.key for i in grown.heldout} & {i.key for i in task.heldout}) >= 7
    assert len(from_rows(rows(40), heldout=7).heldout) == 7
    assert len(from_rows(rows(3), heldout=0.01).heldout) == 1  # a share above 0 holds out something


def test_repeated_prompts_never_reach_both_splits(tmp_path: Path) -> None:
    task = from_rows([*rows(20), *rows(20)], heldout=0.5)
    assert (len(task.train), len(task.heldout)) == (10, 10)
    assert "20 repeated prompts dropped" in task.description
    train, held = write(tmp_path / "train.jsonl", rows(10)), write(tmp_path / "test.jsonl", rows(5, start=8))
    task = from_rows(train, heldout=held)
    assert [item.answer for item in task.heldout] == [9, 10, 11, 12, 13]
    assert [item.answer for item in task.train] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert task.name == "train"
    assert "2 repeated prompts dropped" in task.description


def test_gsm8k_layout(tmp_path: Path, tiny_tokenizer: Any) -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = <<48+24=72>>72 clips.\n#### 1,072"
    file = write(tmp_path / "train.jsonl", [{"question": f"How many, {i}?", "answer": answer} for i in range(4)])
    task = gsm8k(file, heldout=1)
    item = task.train[0]
    assert task.name == "gsm8k"
    assert item.answer == "1,072"
    assert item.solution == "She sold 48/2 = 24 clips in May.\nThat is 48+24 = 72 clips.\n#### 1,072"
    assert task.reward.components == {"last_number": (LastNumber(), 1.0)}
    (prompt,) = task.prompts(tiny_tokenizer, "heldout")
    for completion, right in ((item.solution, True), ("so it is $1072.00.", True), ("1,072 or 1,073", False)):
        assert task.correct(task.reward.score(prompt, completion, tokens=9, finish="stop")) is right


def test_task_from_a_recipe(tmp_path: Path) -> None:
    file = write(tmp_path / "sums.jsonl", rows(10))
    task = task_from(
        {"file": str(file), "reward": {"math_verify": 1.0, "regex": {"pattern": "A", "weight": 0.1}}, "heldout": 0.2}
        | {"metric": "math_verify", "system": "Be brief.", "sampling": {"max_tokens": 16, "stop": ["\n"]}}
    )
    assert (task.name, len(task.train), len(task.heldout)) == ("sums", 8, 2)
    assert task.reward.components == {"math_verify": (MathVerify(), 1.0), "regex": (Regex("A"), 0.1)}
    assert task.sampling == Sampling(max_tokens=16, stop=("\n",))
    assert (task.metric, task.system) == ("math_verify", "Be brief.")
    assert task_from(task) is task

    generated = task_from(
        {"reasoning_gym": "chain_sum", "terms": [2, 3], "train": 4, "heldout": 2, "solution": "steps"}
    )
    assert (generated.name, len(generated.train), len(generated.heldout)) == ("chain_sum", 4, 2)
    assert len(task_from({"gsm8k": str(file), "heldout": 3, "instruction": "Think."}).heldout) == 3
    assert len(task_from(str(file)).train) == 9
    assert len(task_from("chain_sum").heldout) == 200
    choices = [{"question": "?", "options": ["a", "b"], "label": 1}]
    assert task_from({"multiple_choice": choices, "metric": "total"}).metric == "total"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (3, "got 3; expected a name, a file, or a mapping"),
        ({"train": 5}, "got only train; expected one of file, gsm8k, multiple_choice, reasoning_gym"),
        ({}, "got only nothing"),
        ({"reasoning_gym": "chain_sum", "gsm8k": "x"}, "got reasoning_gym and gsm8k"),
        ({"reasoning_gym": "chain_sum", "train": "many"}, "train is 'many'; expected a whole number"),
        ({"reasoning_gym": "chain_sum", "heldout": 0.1}, "heldout is 0.1; expected a whole number"),
        ({"reasoning_gym": "chain_sum", "system": 1}, "system is 1; expected text"),
        ({"gsm8k": [{"prompt": "a", "answer": "1"}], "threshold": True}, "threshold is True; expected a number"),
        ({"reasoning_gym": "chain_sum", "task": "gcd"}, "unknown setting of chain_sum 'task'"),
        ({"file": 3}, "file is 3; expected a name or a path"),
        ("chain_sums", "did you mean chain_sum"),
        ({"reasoning_gym": "chain_sum", "trian": 5}, "unknown setting of chain_sum 'trian'; did you mean train"),
        (
            {"gsm8k": [{"prompt": "a", "answer": "1"}], "heldou": 5},
            "unknown option of gsm8k 'heldou'; did you mean heldout",
        ),
        ({"file": [{"prompt": "a", "answer": "1"}], "rewrd": 5}, "did you mean reward"),
        ({"file": [{"prompt": "a", "answer": "1"}], "sampling": {"temp": 1}}, "unknown sampling setting 'temp'"),
        ({"file": [{"prompt": "a", "answer": "1"}], "sampling": {"top_p": 2}}, "top_p is 2"),
        ({"file": [{"prompt": "a", "answer": "1"}], "heldout": 2}, "heldout is 2; expected a share"),
        ({"file": [{"prompt": "a", "answer": "1"}], "heldout": 1.5}, "heldout is 1.5; expected a share"),
        ({"file": [{"prompt": "a", "answer": "1"}], "heldout": -1}, "heldout is -1"),
        ({"file": [{"prompt": "a", "answer": "1"}], "heldout": True}, "heldout is True"),
        ({"file": [{"prompt": "a", "answer": "1"}, {"query": "b"}]}, r"list\[1\].*prompt"),
        ({"file": "no_such_folder/rows.jsonl"}, "no_such_folder"),
        (
            {"file": [{"prompt": "a", "answer": "1"}], "heldout": 0, "metric": "best"},
            "unknown metric of task rows 'best'",
        ),
    ],
)
def test_bad_specs_say_what_was_expected(spec: Any, message: str) -> None:
    with pytest.raises(PosttrainError, match=message) as caught:
        task_from(spec)
    assert "\n" not in str(caught.value)


def test_a_row_that_cannot_be_read_is_named_by_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [*rows(2), "{broken"])
    with pytest.raises(PosttrainError, match=r"rows\.jsonl:3: broken JSON"):
        task_from(str(file))
