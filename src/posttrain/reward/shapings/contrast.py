r"""A bonus for right completions of prompts on which the policy is better than on their perturbed twins.

.. math:: r_i \leftarrow r_i + \alpha\, 1[o_i \text{ right}]\, 1[p > \mu\,\tilde p]

`p` is the share of right completions of the group, `p̃` that of its twin (`rollout/strategies/twin.py` draws it).
Reference: TimeHC-RL, 2025, arXiv 2505.24500 (card 015).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.reward.verifiers import Format
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group

_CONTENT = r"(?:(?!</?(?:answer|think|social context understanding)>).)*"
_ANSWER = rf"<answer>{_CONTENT}</answer>"
RESPONSE_MODES = (
    rf"(?:<(?P<mode>social context understanding|think)>{_CONTENT}</(?P=mode)>\s*)?{_ANSWER}"  # an answer alone, too
)


@dataclass(frozen=True)
class SignedOutcome:
    """Takes the place of the reward: one number for what is right or wrong, plus one for the form.

    The form is right where the whole completion matches the regular expression `format`: by default an answer in its
    tags, alone, behind a note of the social context, or behind thinking. What is right comes from the fact `right`.
    """

    right: float = 2.0
    wrong: float = -1.5
    formed: float = 1.0
    malformed: float = -1.0
    format: str = RESPONSE_MODES

    def __post_init__(self) -> None:
        Format(self.format)  # refuses what is no regular expression

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        form = Format(self.format)
        good = []
        for group in groups:
            assert group.prompt is not None
            for trajectory in group.trajectories:
                good.append(form(trajectory.text, group.prompt))
                trajectory.reward = (self.right if trajectory.facts["right"] else self.wrong) + (
                    self.formed if good[-1] else self.malformed
                )
        context.metrics["well_formed"] = sum(good) / len(good)


@dataclass(frozen=True)
class ContrastBonus:
    """Adds `bonus` to the right completions of each group with p > `ratio` * p̃ (strictly: none where both are 0).

    A group without a twin gets nothing. Leaves the metric `contrast`, the share of groups with p > ratio * p̃.
    """

    bonus: float = 0.4
    ratio: float = 0.9

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        earned = []
        for group in groups:
            members = [t for t in group.trajectories if "twin_accuracy" in t.facts]
            if not members:
                continue
            accuracy = sum(t.facts["right"] for t in members) / len(members)
            earned.append(accuracy > self.ratio * members[0].facts["twin_accuracy"])
            for trajectory in members:
                trajectory.reward += self.bonus * trajectory.facts["right"] * earned[-1]
        if earned:
            context.metrics["contrast"] = sum(earned) / len(earned)
