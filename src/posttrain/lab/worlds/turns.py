"""A game of several turns: find a number from the answers to guesses.

20-34        the prompt: a range
27           a guess; the world answers > (it is higher), < (it is lower), or ends the game where the guess is right
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from posttrain.evaluation.task import TaskItem
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.lab.worlds.arithmetic import Range
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.rollout.engine import Progress
from posttrain.rollout.environment import Reply
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Completion, Finish, Group, PosttrainError, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Player = Literal["bisecting", "consistent"]
_GUESS = re.compile(r"\d\d")


@dataclass(frozen=True, slots=True)
class GuessNumber:
    """Answers guesses; ends the game at the right one, and at what is no number of two digits.

    max_turns: guesses at most. turn_reward: for each guess that the answers so far leave possible, at its turn.
    """

    max_turns: int = 4
    turn_reward: float = 0.0

    def respond(self, prompt: Prompt, completions: list[Completion], turn: int) -> Reply:
        target = int(prompt.meta["target"])
        guesses = [c.text.strip() for c in completions]
        if not _GUESS.fullmatch(guesses[-1]):
            return Reply(torch.empty(0, dtype=torch.int64), done=True)
        guess = int(guesses[-1])
        low, high = remaining(prompt, [int(g) for g in guesses[:-1]])
        earned = self.turn_reward if low <= guess <= high else 0.0
        if guess == target:
            return Reply(torch.empty(0, dtype=torch.int64), earned, done=True)
        return Reply(_tokens(">\n" if target > guess else "<\n"), earned)


@dataclass(slots=True)
class TurnsTask(WorldTask):
    """A task of several turns. A problem's solution holds the guesses, one a line."""

    def demonstrations(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Group]:
        """Whole games, the guesses as actions and the world's answers between them."""
        solved = [item for item in self.train if item.solution is not None][:limit]
        prompts = [self._prompt(tokenizer, item) for item in solved]
        moves = {prompt.key: str(item.solution).split("\n") for prompt, item in zip(prompts, solved, strict=True)}
        groups = rollout(_Scripted(moves, tokenizer), prompts, 1, self.sampling, 0, self.environment)
        for group in groups:
            (game,) = group.trajectories
            group.trajectories = [replace(game, behaviour_logp=None, behaviour_logp_full=None, source="expert")]
        return groups


def turns(
    *,
    size: Range = (10, 24),
    max_turns: int = 4,
    player: Player = "bisecting",
    turn_reward: float = 0.0,
    train: int = 400,
    heldout: int = 100,
    seed: int = 0,
    name: str = "turns",
) -> WorldTask:
    """Find a number of a range within `max_turns` guesses.

    Args:
        size: how many numbers a range has, at least and at most.
        player: who demonstrates in `train`: `bisecting` halves what is left, `consistent` guesses any number that is
            left. Corpora are played by the consistent one, which has something to learn from the other.
        turn_reward: of the environment (`GuessNumber`).

    Components: `answer`, whether the number was found; `quick`, of weight 0, is 1 for the first guess and falls to
    1/max_turns for the last. `meta`: domain, target, low, high.
    """
    if not 2 <= size[0] <= size[1] <= 90 or max_turns < 1:
        raise PosttrainError(f"turns: size is {size}, max_turns {max_turns}; expected from 2 to 90 numbers, and a turn")

    def game(chance: random.Random, who: Player) -> TaskItem:
        low = chance.randint(10, 100 - size[1])
        high = low + chance.randint(*size) - 1
        meta = {"domain": name, "target": chance.randint(low, high), "low": low, "high": high}
        item = TaskItem(f"{low}-{high}", str(meta["target"]), meta)
        item.solution = "\n".join(map(str, played(chance, item, max_turns, who)))
        return item

    return world_task(
        name,
        lambda chance: game(chance, player),
        Reward({"answer": (found_score, 1.0), "quick": (Quick(max_turns), 0.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=3,  # two digits and the end token: no guess can pass for two
        pretraining=lambda chance: game(chance, "consistent"),
        environment=GuessNumber(max_turns, turn_reward),
        description=f"find one of {size[0]} to {size[1]} numbers in {max_turns} guesses",
        kind=TurnsTask,
    )


def played(chance: random.Random, item: TaskItem, max_turns: int, player: Player) -> list[int]:
    """The guesses of a player, up to the right one or the last turn."""
    low, high = item.meta["low"], item.meta["high"]
    guesses: list[int] = []
    while len(guesses) < max_turns and (not guesses or guesses[-1] != item.meta["target"]):
        guess = (low + high) // 2 if player == "bisecting" else chance.randint(low, high)
        guesses.append(guess)
        low, high = (guess + 1, high) if item.meta["target"] > guess else (low, guess - 1)
    return guesses


def remaining(prompt: Prompt, guesses: Sequence[int]) -> tuple[int, int]:
    """The lowest and highest number that the answers to the guesses leave possible."""
    low, high = prompt.meta["low"], prompt.meta["high"]
    for guess in guesses:
        if prompt.meta["target"] > guess:
            low = max(low, guess + 1)
        else:
            high = min(high, guess - 1)
    return low, high


def found_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where the last guess is the number; `completion` holds the guesses of a game one behind the other."""
    guesses = _guesses(completion)
    return float(bool(guesses) and guesses[-1] == prompt.answer)


@dataclass(frozen=True)
class Quick:
    """1 where the first guess is the number, 1/max_turns less for every further one, 0 where it is not found."""

    max_turns: int

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        found = found_score(completion, prompt)
        return found * (1 - (len(_guesses(completion)) - 1) / self.max_turns)


def _guesses(text: str) -> list[str]:
    """The guesses of a game; none where something else was said."""
    return _GUESS.findall(text) if re.fullmatch(r"(?:\d\d)+", text) else []


def _tokens(text: str) -> Tensor:
    return torch.tensor(character_tokenizer().encode(text, add_special_tokens=False))


class _Scripted:
    """An engine that says what is written down: the next move of each prompt, each time it is asked."""

    def __init__(self, moves: dict[int, list[str]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.moves, self.tokenizer = moves, tokenizer
        self.asked: Counter[int] = Counter()

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        return [[self._next(prompt.key)] for prompt in prompts]

    def _next(self, key: int) -> Completion:
        text = self.moves[key][self.asked[key]]
        self.asked[key] += 1
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = torch.tensor([*ids, int(self.tokenizer.eos_token_id)])
        return Completion(tokens, torch.zeros(len(tokens)), torch.zeros(len(tokens)), "stop", text)
