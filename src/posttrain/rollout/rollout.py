"""Rollouts: an engine and an environment play episodes; the result is groups of trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from posttrain.rollout.engine import Engine, Progress
from posttrain.rollout.environment import Environment, SingleTurn
from posttrain.trajectory import Completion, Group, Prompt, Sampling, Trajectory


@dataclass(slots=True)
class _Episode:
    prompt: Prompt
    tokens: Tensor
    completions: list[Completion] = field(default_factory=list)
    parts: list[tuple[Completion | None, Tensor, float]] = field(default_factory=list)
    done: bool = False


def rollout(
    engine: Engine,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    seed: int,
    environment: Environment | None = None,
    progress: Progress | None = None,
) -> list[Group]:
    """Play `samples` episodes for each prompt. Every group holds its prompt and unscored trajectories."""
    environment = environment or SingleTurn()
    first = engine.generate(prompts, samples, sampling, seed, progress)
    episodes = [[_Episode(p, p.tokens) for _ in range(samples)] for p in prompts]
    for row, completions in zip(episodes, first, strict=True):
        for episode, completion in zip(row, completions, strict=True):
            _advance(episode, completion, environment, 0)
    for turn in range(1, environment.max_turns):
        open_ = [e for row in episodes for e in row if not e.done]
        if not open_:
            break
        asked = [replace(e.prompt, tokens=e.tokens) for e in open_]
        for episode, (completion,) in zip(open_, engine.generate(asked, 1, sampling, seed + turn), strict=True):
            _advance(episode, completion, environment, turn)
    return [Group([_trajectory(e) for e in row], p) for p, row in zip(prompts, episodes, strict=True)]


def _advance(episode: _Episode, completion: Completion, environment: Environment, turn: int) -> None:
    """Append the policy's turn and the world's answer."""
    episode.completions.append(completion)
    reply = environment.respond(episode.prompt, episode.completions, turn)
    episode.parts += [(completion, completion.tokens, reply.reward), (None, reply.tokens, 0.0)]
    episode.tokens = torch.cat([episode.tokens, completion.tokens, reply.tokens])
    episode.done = reply.done or completion.finish == "length"


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
    last = episode.completions[-1]
    return Trajectory(
        episode.tokens,
        action,
        logp,
        full,
        turns,
        reward if bool(reward.any()) else None,
        finish=last.finish,
        text="".join(c.text for c in episode.completions),
    )
