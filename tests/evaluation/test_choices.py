from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from posttrain.evaluation.choices import choose, multiple_choice, option_scores
from posttrain.evaluation.task import TaskItem
from posttrain.trajectory import PosttrainError, Trajectory

ROWS: list[dict[str, Any]] = [
    {"question": "Largest planet?", "options": ["Mars", "Jupiter", "Io"], "label": 1},
    {"question": "Smallest prime?", "options": ["2", "3"], "label": "A"},
]


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"question": "?", "options": ["a", "b"], "label": 1}, 1),
        ({"question": "?", "options": ["x", "y"], "answer": "B"}, 1),
        ({"prompt": "?", "choices": ["x", "y"], "answer": "x"}, 0),
        ({"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
        ({"question": "?", "options": ["2", "3", "1"], "label": "1"}, 2),  # the text goes before the index
        ({"question": "?", "options": ["x", "y"], "label": "1"}, 1),
    ],
)
def test_rows_and_the_spellings_of_a_label(row: dict[str, Any], label: int) -> None:
    (item,) = multiple_choice([row]).heldout
    assert item.label == label
    assert item.answer == item.solution == item.options[label]


def test_option_scores_are_log_likelihoods_of_the_options_alone(tiny_tokenizer: Any) -> None:
    task = multiple_choice(ROWS)
    seen: list[Trajectory] = []

    def likelihood(trajectories: list[Trajectory]) -> list[float]:
        seen.extend(trajectories)
        return [-float(t.actions) for t in trajectories]

    scores = option_scores(task, tiny_tokenizer, likelihood, "heldout")
    assert scores == [[-4, -7, -2], [-1, -1]]  # bytes of the options: no end token
    prompts = task.prompts(tiny_tokenizer, "heldout")
    assert [tiny_tokenizer.decode(t.tokens[t.action_mask]) for t in seen] == ["Mars", "Jupiter", "Io", "2", "3"]
    assert seen[1].tokens[: seen[1].prompt_length].tolist() == prompts[0].tokens.tolist()
    assert option_scores(task, tiny_tokenizer, likelihood, "heldout", limit=1) == [[-4, -7, -2]]


def test_a_plain_prompt_is_followed_by_a_space_or_its_line_end(tiny_tokenizer: Any) -> None:
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    texts: list[str] = []

    def likelihood(trajectories: list[Trajectory]) -> list[float]:
        texts.extend(plain.decode(t.tokens) for t in trajectories)
        return [0.0] * len(trajectories)

    option_scores(multiple_choice(ROWS[:1]), plain, likelihood, "heldout")
    assert texts[0] == "Largest planet?\nMars"


def test_likelihood_of_a_real_model_by_hand(tiny_tokenizer: Any, tiny_model: Any) -> None:
    def likelihood(trajectories: list[Trajectory]) -> list[float]:
        values = []
        for t in trajectories:
            with torch.no_grad():
                logp = tiny_model(t.tokens[None]).logits[0].log_softmax(-1)
            values.append(float(sum(logp[i - 1, t.tokens[i]] for i in t.action_mask.nonzero().flatten())))
        return values

    task = multiple_choice(ROWS)
    scores = option_scores(task, tiny_tokenizer, likelihood, "heldout")
    prompt = task.prompts(tiny_tokenizer, "heldout")[1]
    with torch.no_grad():
        following = tiny_model(prompt.tokens[None]).logits[0, -1].log_softmax(-1)
    expected = [float(following[tiny_tokenizer.encode(option)[0]]) for option in ("2", "3")]
    assert scores[1] == pytest.approx(expected, abs=1e-5)


def test_choose_by_total_and_by_character() -> None:
    item = TaskItem("?", options=("ab", "abcdefgh"), label=1)
    assert choose(item, [-4.0, -8.0]) == {"normalised": 1, "total": 0}
    assert choose(item, [-4.0, -16.0]) == {"normalised": 0, "total": 0}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?", "options": ["a"], "label": 0},
        {"question": "?", "options": ["a", "a"], "label": 0},
        {"question": "?", "options": ["a", ""], "label": 0},
        {"question": "?", "options": "ab", "label": 0},
        {"options": ["a", "b"], "label": 0},
        {"question": "?", "options": ["a", "b"]},
        {"question": "?", "options": ["a", "b"], "label": 2},
        {"question": "?", "options": ["a", "b"], "label": "C"},
        {"question": "?", "options": ["a", "b"], "label": None},
    ],
)
def test_bad_rows_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(PosttrainError, match=r"^list\[1\]: no multiple choice"):
        multiple_choice([ROWS[0], row])


def test_bad_likelihoods_and_metrics(tiny_tokenizer: Any) -> None:
    with pytest.raises(PosttrainError, match="1 values for 5 options"):
        option_scores(multiple_choice(ROWS), tiny_tokenizer, lambda _: [0.0], "heldout")
    with pytest.raises(PosttrainError, match="one that is not finite"):
        option_scores(multiple_choice(ROWS), tiny_tokenizer, lambda _: [0.0, float("nan"), 0.0, 0.0, 0.0], "heldout")
    with pytest.raises(PosttrainError, match="did you mean normalised"):
        multiple_choice(ROWS, metric="normalized")
