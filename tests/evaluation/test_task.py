from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from posttrain.evaluation.task import Task, TaskItem, without_repeats
from posttrain.reward.reward import Reward, Score, reward_from
from posttrain.reward.verifiers import ExactMatch, Format
from posttrain.trajectory import PosttrainError


def items(*names: str) -> list[TaskItem]:
    return [TaskItem(name, answer=name.upper(), solution=f"Answer: {name.upper()}", meta={"n": name}) for name in names]


def task(**changes: Any) -> Task:
    return replace(Task("letters", items("a", "b", "c"), items("d", "e"), reward_from("exact_match")), **changes)


def test_prompts_carry_what_a_verifier_reads(tiny_tokenizer: Any) -> None:
    prompts = task(system="Be brief.").prompts(tiny_tokenizer, "heldout")
    assert [p.answer for p in prompts] == ["D", "E"]
    assert [p.meta for p in prompts] == [{"n": "d"}, {"n": "e"}]
    assert [p.question for p in prompts] == ["d", "e"]
    assert prompts[0].messages[0] == {"role": "system", "content": "Be brief."}
    text = tiny_tokenizer.decode(prompts[0].tokens)
    assert text.endswith("<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n")
    assert len(task().prompts(tiny_tokenizer, "train", limit=2)) == 2


def test_keys_are_of_the_prompt_not_of_its_place() -> None:
    first, second = items("a", "b")
    assert TaskItem("a", answer="other").key == first.key != second.key
    assert TaskItem([{"role": "user", "content": "a"}]).key != first.key
    assert TaskItem("a", options=("x", "y")).key != TaskItem("a", options=("x", "z")).key
    assert 0 <= first.key < 2**48


def test_demonstrations_imitate_the_worked_solution(tiny_tokenizer: Any) -> None:
    train = [TaskItem("unsolved", answer="?"), *items("a", "b")]
    groups = task(train=train).demonstrations(tiny_tokenizer, limit=1)
    (group,) = groups
    (trajectory,) = group.trajectories
    assert trajectory.source == "expert"
    assert trajectory.text == "Answer: A"
    assert tiny_tokenizer.decode(trajectory.tokens[trajectory.action_mask]) == "Answer: A<|im_end|>"
    assert group.prompt is not None
    assert group.prompt.answer == "A"
    start = trajectory.tokens[: trajectory.prompt_length]
    assert start.tolist() == group.prompt.tokens.tolist()  # what a rollout of the same prompt starts from
    with pytest.raises(PosttrainError, match="no training problem has a worked solution"):
        task(train=train[:1]).demonstrations(tiny_tokenizer)


def test_without_a_chat_template_the_completion_starts_on_its_own_line(tiny_tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    (prompt,) = task().prompts(plain, "heldout", limit=1)
    assert plain.decode(prompt.tokens) == "d\n"
    (group,) = task().demonstrations(plain, limit=1)
    assert plain.decode(group.trajectories[0].tokens) == "a\nAnswer: A<|im_end|>"


def test_a_completion_is_right_by_the_metric_and_only_where_it_did_not_fail() -> None:
    reward = Reward({"right": (ExactMatch(), 1.0), "format": (Format(r"Answer: .*"), 0.5)})
    by_part, by_total = task(reward=reward, metric="right"), task(reward=reward)
    right, formatted = Score(1.0, {"right": 1.0, "format": 0.0}), Score(1.2, {"right": 0.7, "format": 1.0})
    assert by_part.correct(right)
    assert not by_part.correct(formatted)
    assert by_total.correct(formatted)
    assert not task(reward=reward, threshold=1.3).correct(formatted)
    assert not by_part.correct(Score(1.0, {"right": 1.0, "format": 0.0}, {"right": "failed"}))
    assert by_part.correct(Score(1.0, {"right": 1.0, "format": 0.0}, {"format": "failed"}))
    assert not by_total.correct(Score(1.0, {"right": 1.0, "format": 0.0}, {"format": "failed"}))


def test_without_repeats_keeps_the_first() -> None:
    seen: set[int] = set()
    assert [i.prompt for i in without_repeats(items("a", "b", "a"), seen)] == ["a", "b"]
    assert [i.prompt for i in without_repeats(items("b", "c"), seen)] == ["c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": items("c", "d")}, "1 held-out prompts are also in train, such as 'c'"),
        ({"train": items("a", "a")}, "train holds a prompt twice: 'a'"),
        ({"metric": "exact_mach"}, "did you mean exact_match"),
        ({"heldout": [TaskItem("d", options=("x", "y"), label=0), TaskItem("e")]}, "options and a label, or none"),
    ],
)
def test_bad_tasks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        task(**changes)


def test_unknown_split() -> None:
    with pytest.raises(PosttrainError, match="got split 'test'; expected train or heldout"):
        task().items("test")  # type: ignore[arg-type]
