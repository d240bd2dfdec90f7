from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.data.templates import render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.outcome import Right
from posttrain.rollout.strategies.twin import Shuffled, Twin, reordered
from posttrain.trajectory import Completion, Group, PosttrainError, Prompt, Sampling, Trajectory
from scored_groups import context, facts_of

TOKENIZER = make_tokenizer()


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def prompt(text: str, **meta: Any) -> Prompt:
    return Prompt(torch.tensor([1]), text=text, meta=meta)


def test_lines_before_the_question_are_shuffled() -> None:
    text = "Ann takes it.\nBob takes it.\nWho has it?\n"
    assert Shuffled()(text, prompt(text), chance()) == "Bob takes it.\nAnn takes it.\nWho has it?\n"
    four = Shuffled(separator=";", head=1, tail=2)("start;a;b;c;where?;x/y", prompt(""), chance())
    assert four is not None
    parts = four.split(";")
    assert (parts[0], parts[-2:]) == ("start", ["where?", "x/y"])
    assert sorted(parts[1:4]) == ["a", "b", "c"]
    assert parts[1:4] != ["a", "b", "c"]


def test_listed_events_are_exchanged_where_they_stand() -> None:
    text = "First p, then q! Where?"
    assert Shuffled()(text, prompt(text, events=["p", "q"]), chance()) == "First q, then p! Where?"
    assert Shuffled()(text, prompt(text, events=["p", "missing"]), chance()) is None


def test_numbers_stay_in_their_places() -> None:
    assert reordered(["1. a", "2. b"], chance()) == ["1. b", "2. a"]
    assert reordered(["1. a", "b"], chance()) == ["b", "1. a"]


def test_nothing_to_shuffle() -> None:
    assert reordered(["a"], chance()) is None
    assert reordered(["a", "a"], chance()) is None
    assert Shuffled()("Where?", prompt("Where?"), chance()) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_true_order_never_comes_back(seed: int) -> None:
    assert reordered(["a", "a", "b"], chance(seed)) != ["a", "a", "b"]


class Engine:
    """Answers "y" on prompts whose events stand in their order for the first `wins` samples, else "n"."""

    max_length = 200

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, progress: Any = None
    ) -> list[list[Completion]]:
        found = []
        for p in prompts:
            text = TOKENIZER.decode(p.tokens.tolist())
            self.asked.append((text, samples))
            wins = 3 if "a\nb\n" in text else 1
            texts = ["y" if i < wins else "n" for i in range(samples)]
            found.append([Completion(torch.tensor([5, 2]), *torch.zeros(2, 2), "stop", t) for t in texts])
        return found


def score(groups: Sequence[Group]) -> None:
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.reward = float(trajectory.text == "y")


def drawn(twin: Twin, prompts: list[Prompt]) -> tuple[list[Group], Engine, Any]:
    engine = Engine()
    policy = CausalPolicy(make_model(), TOKENIZER, "tiny")
    step = context(engine=engine, policy=policy, score=score)
    return twin(prompts, step), engine, step


def test_a_group_and_its_twin() -> None:
    plain = render_prompt(TOKENIZER, "a\nb\nwhere?\n", chat=False)
    nothing = render_prompt(TOKENIZER, "where?\n", chat=False)
    groups, engine, step = drawn(Twin(samples=2), [plain, nothing])
    assert [len(g) for g in groups] == [4, 4]  # the twin's completions are not trained on
    assert facts_of(groups[0], "right") == [1, 1, 1, 0]
    assert facts_of(groups[0], "twin_accuracy") == [0.5] * 4  # of the twin's own completions
    assert "twin_accuracy" not in groups[1].trajectories[0].facts
    assert facts_of(groups[1], "right") == [1, 0, 0, 0]
    assert [n for _, n in engine.asked[:2]] == [4, 4]
    assert engine.asked[0][0].endswith("a\nb\nwhere?\n")
    assert [(t[-len("b\na\nwhere?\n") :], n) for t, n in engine.asked[2:]] == [("b\na\nwhere?\n", 2)]
    assert step.sampled == 2 * 4 + 2
    assert step.metrics == {"twin_accuracy": 0.5, "twin_gap": 0.25}


def test_without_a_number_the_twin_is_as_large_as_the_group() -> None:
    _, engine, step = drawn(Twin(), [render_prompt(TOKENIZER, "a\nb\nwhere?\n", chat=False)])
    assert [n for _, n in engine.asked] == [4, 4]
    assert step.metrics["twin_accuracy"] == 0.25


def test_a_conversation_is_perturbed_in_its_last_question() -> None:
    turns = [{"role": "system", "content": "x\ny\nz"}, {"role": "user", "content": "a\nb\nwhere?"}]
    given = render_prompt(TOKENIZER, turns)
    _, engine, _ = drawn(Twin(), [given])
    other = render_prompt(TOKENIZER, [turns[0], {"role": "user", "content": "b\na\nwhere?"}])
    assert engine.asked[1][0] == TOKENIZER.decode(other.tokens.tolist())


def test_what_is_right() -> None:
    trajectory = Trajectory(torch.tensor([1, 2]), torch.tensor([False, True]), reward=0.2, rewards={"answer": 1.0})
    assert not Right()(trajectory)
    assert Right(threshold=0.2)(trajectory)
    assert Right("answer")(trajectory)
    with pytest.raises(PosttrainError, match="no component 'correct' that says what is right; it has answer"):
        Right("correct")(trajectory)
