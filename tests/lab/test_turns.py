"""The guessing game, played through the real rollout by scripted players."""

from __future__ import annotations

import pytest
import torch

from posttrain.lab.tokenizer import character_tokenizer
from posttrain.lab.worlds.turns import GuessNumber, remaining, turns
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Completion, Group, PosttrainError, Prompt


class Says:
    """An engine that says the given moves, one a turn, for every prompt."""

    def __init__(self, *moves: str) -> None:
        self.moves = list(moves)

    def generate(self, prompts, samples, sampling, seed, progress=None):
        text = self.moves.pop(0)
        ids = character_tokenizer().encode(text, add_special_tokens=False)
        tokens = torch.tensor([*ids, 2])
        return [[Completion(tokens, torch.zeros(len(tokens)), torch.zeros(len(tokens)), "stop", text)] for _ in prompts]


def game(*moves, target=30, low=20, high=34, turn_reward=0.0, max_turns=4):
    tokenizer = character_tokenizer()
    meta = {"target": target, "low": low, "high": high}
    prompt = Prompt(torch.tensor(tokenizer.encode(f"{low}-{high}\n")), answer=str(target), meta=meta)
    task = turns(max_turns=max_turns, train=0, heldout=0)
    world = GuessNumber(max_turns, turn_reward)
    (group,) = rollout(Says(*moves), [prompt], 1, task.sampling, 0, world)
    task.reward.score_groups([group])
    return group.trajectories[0]


def shown(trajectory):
    return character_tokenizer().decode(trajectory.tokens)


def test_a_game_by_hand():
    found = game("27", "31", "29", "30")
    assert shown(found) == "<bos>20-34\n27<eos>>\n31<eos><\n29<eos>>\n30<eos>"
    assert found.reward == 1.0
    assert found.rewards["quick"] == 0.25
    assert found.action_mask.sum() == 12  # three tokens a guess; the world's answers are none
    assert found.turn[found.action_mask].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_the_right_guess_ends_the_game():
    found = game("30")
    assert shown(found) == "<bos>20-34\n30<eos>"
    assert found.rewards["quick"] == 1.0


@pytest.mark.parametrize("moves", [("27", "31", "29", "28"), ("xx",), ("3",), ("27", "3")])
def test_what_does_not_find_the_number_earns_nothing(moves):
    assert game(*moves).reward == 0.0


def test_what_is_no_number_ends_the_game():
    assert shown(game("27", "x")) == "<bos>20-34\n27<eos>>\nx<eos>"


def test_turn_rewards_are_for_guesses_that_can_be_right():
    found = game("27", "25", "31", "30", turn_reward=0.1)  # 25 was ruled out by the answer to 27
    ends = [9, 14, 19, 24]
    assert found.token_reward[ends].tolist() == pytest.approx([0.1, 0.0, 0.1, 0.1])
    assert found.token_reward.sum() == pytest.approx(0.3)


def test_what_remains():
    prompt = Prompt(torch.ones(1), meta={"target": 30, "low": 20, "high": 34})
    assert remaining(prompt, []) == (20, 34)
    assert remaining(prompt, [27, 31, 22]) == (28, 30)


def test_demonstrations_are_whole_games_that_follow_the_answers():
    task = turns(train=40, heldout=0)
    tokenizer = character_tokenizer()
    groups = task.demonstrations(tokenizer, limit=30)
    assert len(groups) == 30
    task.reward.score_groups(groups)
    for item, group in zip(task.train, groups, strict=False):
        (demonstration,) = group.trajectories
        low, high, target = item.meta["low"], item.meta["high"], item.meta["target"]
        lines = shown(demonstration).removeprefix("<bos>").split("\n")
        assert lines[0] == f"{low}-{high}"
        text, last = "".join(lines[1:]), 0
        for turn in text.removesuffix("<eos>").split("<eos>"):
            guess = int(turn.lstrip("<>"))
            if turn[0] in "<>":
                low, high = (last + 1, high) if turn[0] == ">" else (low, last - 1)
            assert guess == (low + high) // 2  # it halves what is left
            last = guess
        assert (last == target) == (demonstration.reward == 1.0)
        assert demonstration.source == "expert"
        assert demonstration.behaviour_logp is None
        assert tokenizer.decode(demonstration.tokens[demonstration.action_mask]).count("<eos>") == len(
            str(item.solution).split("\n")
        )
    assert all(isinstance(g, Group) for g in groups)


def test_bisecting_wins_more_often_than_guessing_what_is_left():
    def won(player):
        items = turns(player=player, train=300, heldout=0).train
        return sum(str(i.solution).endswith(str(i.answer)) for i in items) / 300

    assert won("bisecting") > won("consistent") + 0.1


def test_corpora_are_played_by_the_consistent_player():
    task = turns(train=20, heldout=0)
    first = [int(str(i.solution).split("\n")[0]) == (i.meta["low"] + i.meta["high"]) // 2 for i in task.corpus(200)]
    assert sum(first) < 60
    assert all(int(str(i.solution).split("\n")[0]) == (i.meta["low"] + i.meta["high"]) // 2 for i in task.train)


def test_what_cannot_be_made():
    with pytest.raises(PosttrainError, match="from 2 to 90"):
        turns(size=(1, 4))
