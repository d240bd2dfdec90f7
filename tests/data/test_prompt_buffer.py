"""The prompt buffer: measures of information, draws by them, and what a checkpoint keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from posttrain.data.prompt_buffer import INFORMATIVENESS, PromptBuffer
from posttrain.trajectory import PosttrainError, Prompt


def prompt(text: str, **fields: object) -> Prompt:
    return Prompt(torch.tensor([1, len(text)]), text=text, **fields)  # type: ignore[arg-type]


def buffer(**infos: float) -> PromptBuffer:
    made = PromptBuffer()
    for name, info in infos.items():
        made.visit(prompt(name), info)
    return made


def draws(made: PromptBuffer, count: int = 1, rounds: int = 2000) -> dict[str, float]:
    chance = np.random.default_rng(0)
    found = [held.prompt.text for _ in range(rounds) for held in made.draw(count, chance)]
    return {name: found.count(name) / rounds for name in made.held}


def test_measures_by_hand() -> None:
    rewards = [0.2, 1.0, 0.6, 0.0]
    found = {name: measure(rewards) for name, measure in INFORMATIVENESS.items()}
    assert found["gap"] == 1.0
    assert found["mean-gap"] == pytest.approx(1 - 0.45)
    assert found["duel"] == pytest.approx(0.4)
    assert found["variance"] == pytest.approx(np.var(rewards))
    assert found["uniform"] == 1.0
    assert found["inverse"] == pytest.approx(1 / 1.01)


@pytest.mark.parametrize("name", ["gap", "mean-gap", "duel"])
def test_information_ignores_a_shift_and_scales_with_the_reward(name: str) -> None:  # (c)
    rewards, measure = np.array([0.2, 1.0, 0.6, 0.0]), INFORMATIVENESS[name]
    assert measure(list(rewards + 7)) == pytest.approx(measure(list(rewards)))
    assert measure(list(3 * rewards)) == pytest.approx(3 * measure(list(rewards)))


def test_constant_information_draws_alike() -> None:  # (a)
    assert all(abs(share - 1 / 3) < 0.04 for share in draws(buffer(a=0.7, b=0.7, c=0.7)).values())


def test_draws_by_information_and_never_without() -> None:  # (b)
    shares = draws(buffer(a=0.6, b=0.2, c=0.0))
    assert shares["c"] == 0
    assert abs(shares["a"] - 0.75) < 0.04
    assert INFORMATIVENESS["gap"]([0.3, 0.3]) == 0
    assert sorted(h.prompt.text for h in buffer(a=0.6, b=0.2, c=0.0).draw(5, np.random.default_rng(1))) == ["a", "b"]
    assert buffer(a=0.0).draw(1, np.random.default_rng(1)) == []


def test_a_visit_takes_the_place_of_what_was_known() -> None:
    made = buffer(a=0.5, b=0.5)
    made.visit(prompt("a"), 0.0, generation=9)
    assert made.held["a"].info == 0.0
    assert made.held["a"].generation == 0, "where it comes from does not change"
    assert list(made.held) == ["b", "a"]


def test_the_longest_unvisited_are_forgotten() -> None:
    made = PromptBuffer(capacity=2)
    for name in ("a", "b", "a", "c"):
        made.visit(prompt(name), 1.0)
    assert list(made.held) == ["a", "c"]
    assert "b" not in made
    assert len(made) == 2


def test_a_restored_buffer_draws_the_same() -> None:
    made = PromptBuffer()
    chat = Prompt(torch.tensor([4, 5]), [{"role": "user", "content": "why?"}], answer=[1, "x"], key=7, meta={"d": 2})
    made.visit(prompt("a", answer="3", key=1, meta={"domain": "easy"}), 0.25, generation=2)
    made.visit(chat, 0.75)
    other = PromptBuffer()
    other.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert other.state_dict() == made.state_dict()
    assert [h.info for h in other.held.values()] == [0.25, 0.75]
    again = other.held["why?"].prompt
    assert (again.tokens.tolist(), again.messages, again.answer, again.key, again.meta) == (
        [4, 5], [{"role": "user", "content": "why?"}], [1, "x"], 7, {"d": 2}
    )  # fmt: skip
    assert draws(other, 2, 50) == draws(made, 2, 50)


def test_what_no_checkpoint_can_hold_is_said() -> None:
    made = PromptBuffer()
    made.visit(prompt("a", answer=object()), 1.0)
    with pytest.raises(PosttrainError, match="'a' cannot be kept in a checkpoint"):
        made.state_dict()
