"""Reward shaping: what becomes of a step's rewards before advantages are taken.

A shaping changes `reward` of the trajectories in place, looking at whole groups, at the step, at the policy. The task's
own components stay in `rewards`. Each stands in a file of its own in `reward/shapings/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group


class Shaping(Protocol):
    """May say by class attributes what it needs: reference: True has the stage keep its reference policy.

    One with state has `state_dict` and `load_state_dict` (JSON): each run then works on its own copy.
    """

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None: ...
