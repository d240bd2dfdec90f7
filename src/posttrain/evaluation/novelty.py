"""Looking at a pool of completions in an order that finds a right one soon: representation-based exploration.

Of a large pool, the completions that are most novel beside those already looked at go first, so that a verifier (or a
person) has to look at fewer before one is right. Nothing is trained.
Reference: Representation-Based Exploration for Language Models, 2025, arXiv 2510.11686 (card 135).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.models.causal import CausalPolicy
from posttrain.models.representation import mean_hidden
from posttrain.rollout.novelty import novelty_order
from posttrain.trajectory import Group, PosttrainError


def exploration_orders(
    policy: CausalPolicy, groups: Sequence[Group], *, ridge: float = 0.01, budget: int = 4096
) -> list[list[int]]:
    """For each pool, the numbers of its completions in the order in which to look at them.

    ridge: λ in units of the pool's mean squared length (of centred states); the paper's own is not established.
    budget: model tokens computed at a time.
    """
    states = mean_hidden(policy, groups, budget)
    orders = []
    for own in states.split([len(g) for g in groups]):
        centred = own.double() - own.double().mean(0)
        scale = float(centred.square().sum(1).mean())
        orders.append(novelty_order(centred, ridge * (scale or 1.0), centre=False))
    return orders


def picks_to_right(correct: Sequence[bool], order: Sequence[int]) -> int | None:
    """How many completions are looked at until one is right, that one included; None where none is."""
    return next((picks for picks, i in enumerate(order, 1) if correct[i]), None)


def picks_at_random(correct: Sequence[bool]) -> float | None:
    """The same in a random order, on average: (n + 1)/(c + 1) for c right ones of n; None where none is right."""
    right = sum(map(bool, correct))
    return (len(correct) + 1) / (right + 1) if right else None


def verifier_efficiency(correct: Sequence[Sequence[bool]], orders: Sequence[Sequence[int]]) -> float:
    """The share of looks that the orders save against random ones, over all pools in which a completion is right.

    correct: for each pool, which completions are right. 0.5 is half as many looks; below 0 is worse than at random.
    Raises PosttrainError where no pool has a right completion.
    """
    pairs = [(picks_to_right(c, o), picks_at_random(c)) for c, o in zip(correct, orders, strict=True)]
    known = [(mine, random) for mine, random in pairs if mine is not None and random is not None]
    if not known:
        raise PosttrainError("no pool has a right completion; expected at least one, to compare how soon it is found")
    return float(1 - np.sum([mine for mine, _ in known]) / np.sum([random for _, random in known]))
