"""Rollouts: an engine and an environment play episodes; the result is groups of trajectories.

An episode ends when the environment says so, at its last turn, when a completion is cut off, or when the model's
context has no room for another turn. What the world says after the last turn is not kept: nobody answers it.
Processes that train together share the prompts out, and each of them then has all groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from posttrain.processes import here
from posttrain.rollout.engine import Engine, Progress
from posttrain.rollout.environment import Environment, SingleTurn
from posttrain.rollout.exchange import exchanged, shares
from posttrain.trajectory import Completion, Finish, Group, Prompt, Sampling, Trajectory


@dataclass(slots=True)
class _Episode:
    prompt: Prompt
    tokens: Tensor
    completions: list[Completion] = field(default_factory=list)
    parts: list[tuple[Completion | None, Tensor, float]] = field(default_factory=list)
    finish: Finish = "none"  # none as long as it goes on


def rollout(
    engine: Engine,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    seed: int,
    environment: Environment | None = None,
    progress: Progress | None = None,
) -> list[Group]:
    """Play `samples` episodes for each prompt. Every group holds its prompt and unscored trajectories.

    Of several processes each plays those of its share of the prompts; all must ask for the same.
    """
    if not here().several:
        return play(engine, prompts, samples, sampling, seed, environment, progress)
    mine = shares(prompts, here().world)[here().rank]
    own = [prompts[i] for i in mine]
    groups = play(engine, own, samples, sampling, seed, environment, progress) if own else []
    return exchanged(groups, prompts)


def play(
    engine: Engine,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    seed: int,
    environment: Environment | None = None,
    progress: Progress | None = None,
) -> list[Group]:
    """`rollout` by this process alone, or by the workers of its engine."""
    if hasattr(engine, "play"):  # elsewhere, with the environment
        groups: list[Group] = engine.play(prompts, samples, sampling, seed, environment, progress)
        return groups
    world = SingleTurn() if environment is None else environment
    context: int | None = getattr(engine, "max_length", None)
    episodes = [[_Episode(p, p.tokens) for _ in range(samples)] for p in prompts]
    first = engine.generate(prompts, samples, sampling, seed, progress)
    for row, completions in zip(episodes, first, strict=True):
        for episode, completion in zip(row, completions, strict=True):
            _advance(episode, completion, world, 0, context)
    for turn in range(1, world.max_turns):
        going = [e for row in episodes for e in row if e.finish == "none"]
        if not going:
            break
        asked = [replace(e.prompt, tokens=e.tokens) for e in going]
        answers = engine.generate(asked, 1, sampling, _turn_seed(seed, turn))
        for episode, (completion,) in zip(going, answers, strict=True):
            _advance(episode, completion, world, turn, context)
    return [Group([_trajectory(e) for e in row], p) for p, row in zip(prompts, episodes, strict=True)]


def _turn_seed(seed: int, turn: int) -> int:
    """A seed of its own for a later turn, far from those of other rollouts (which may be neighbours)."""
    return int(np.random.SeedSequence([seed % 2**64, turn]).generate_state(1, np.uint64)[0])


def _advance(
    episode: _Episode, completion: Completion, environment: Environment, turn: int, context: int | None
) -> None:
    """Append the policy's turn, and the world's answer if the episode goes on."""
    episode.completions.append(completion)
    reply = environment.respond(episode.prompt, episode.completions, turn)
    episode.parts.append((completion, completion.tokens, reply.reward))
    episode.tokens = torch.cat([episode.tokens, completion.tokens])
    if reply.done or completion.finish == "length" or turn + 1 >= environment.max_turns:
        episode.finish = completion.finish
    elif context is not None and len(episode.tokens) + len(reply.tokens) >= context:
        episode.finish = "length"
    else:
        episode.parts.append((None, reply.tokens, 0.0))
        episode.tokens = torch.cat([episode.tokens, reply.tokens])


def _trajectory(episode: _Episode) -> Trajectory:
    size = len(episode.tokens)
    action, logp, full, turns, reward = (
        torch.zeros(size, dtype=kind) for kind in (torch.bool, torch.float32, torch.float32, torch.int64, torch.float32)
    )
    start, turn = len(episode.prompt.tokens), 0
    for completion, tokens, earned in episode.parts:
        part = slice(start, start + len(tokens))
        turns[part] = turn
        if completion is not None:
            action[part], logp[part], full[part] = True, completion.logp, completion.logp_full
            reward[part.stop - 1] = earned
        else:
            turn += 1
        start = part.stop
    return Trajectory(
        episode.tokens,
        action,
        logp,
        full,
        turns,
        reward if bool(reward.any()) else None,
        finish=episode.finish,
        text="".join(c.text for c in episode.completions),
        experts=_experts(episode.completions),
    )


def _experts(completions: Sequence[Completion]) -> Tensor | None:
    """The experts that each token was sent to when the policy first answered behind it."""
    parts: list[Tensor] = []
    for completion in completions:
        if completion.experts is None:
            return None
        parts.append(completion.experts[sum(len(p) for p in parts) :])
    return torch.cat(parts)
