"""A batch of the padded world in which others wrote some of the tokens, and the papers' losses' common pieces."""

from __future__ import annotations

import torch
from padded_world import Padded, World
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.estimator import Loss
from posttrain.training.method import Method
from posttrain.trajectory import SOURCES, Source


def guided_world(writer: Source, *, seed: int = 0, behind: bool = False, length: int = 6) -> World:
    """Completions of `length` tokens, of which another wrote the first half (or, `behind`, the last) in the last
    completion of each group. The old policy is so far away that a dual clip at 3 bites.
    """
    world = World("prompts", seed, length)
    batch = world.batch
    assert batch.token_source is not None
    assert batch.old_logp is not None
    last = torch.cat([batch.group[1:] != batch.group[:-1], torch.tensor([True])])
    place = batch.place - batch.place[batch.lengths.cumsum(0) - batch.lengths][batch.sequence]
    half = place >= length // 2 if behind else place < length // 2
    batch.token_source[batch.spread(last) & half] = SOURCES.index(writer)
    batch.old_logp[::5] -= 1.5
    draw = torch.Generator().manual_seed(seed + 100)
    batch.extras["old_entropy"] = torch.rand(batch.target.numel(), generator=draw, dtype=torch.float64)
    return world


def prepared(world: World, method: Method) -> Batch:
    """The batch with the method's advantages."""
    batch = world.fresh()
    method.objective.prepare(batch)
    return batch


def loss_of(world: World, method: Method, batch: Batch) -> Loss:
    return method.objective(batch, world.policy.log_likelihood(batch), batch.totals)


def gradients(world: World, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in world.policy.parameters.items() if name != "critic"}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def assert_equal_gradients(world: World, found: Tensor, expected: Tensor) -> None:
    ours, wanted = gradients(world, found), gradients(world, expected)
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-9, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6  # or nothing was compared


def pad(world: World, flat: Tensor) -> Tensor:
    """A per-token array as `[S, T]`."""
    batch = world.batch
    out = torch.zeros(len(batch), max(len(t) for t in batch.tokens), dtype=flat.dtype)
    out[batch.sequence, batch.place] = flat
    return out


def written_by(world: World, writer: Source) -> Tensor:
    """`[S, T]` bool: the tokens that another wrote."""
    assert world.batch.token_source is not None
    return pad(world, world.batch.token_source == SOURCES.index(writer))


def token_mean(w: Padded, values: Tensor) -> Tensor:
    return (values * w.mask).sum() / w.mask.sum()


def centred(w: Padded, scale: bool = False, eps: float = 1e-4) -> Tensor:
    """`[S, 1]` reward relative to its group, divided by the group's deviation where `scale`."""
    found = torch.empty_like(w.reward)
    for rows in w.groups:
        reward = w.reward[rows]
        found[rows] = (reward - reward.mean()) / (reward.std() + eps if scale else 1)
    return found[:, None]


def entropy(world: World) -> Tensor:
    """`[S, T]` entropy of the distribution that each token was drawn from, differentiable."""
    batch, parameters = world.batch, world.policy.parameters
    before = torch.stack([batch.tokens[s][p - 1] for s, p in zip(batch.sequence, batch.place, strict=True)])
    logp = (world.policy.hidden(before, batch.place) @ parameters["head"].T + parameters["bias"]).log_softmax(-1)
    return pad(world, -(logp.exp() * logp).sum(-1))


def kept(loss: Loss) -> tuple[float, float]:
    return loss.metrics["clip_fraction"]
