"""Thinking before tokens of ordinary text: whether it is learned without a verifier, and what a budget adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from posttrain import methods
from posttrain.evaluation.task import Task
from posttrain.lab import worlds
from posttrain.lab.models import ModelSpec, Share, World, build
from posttrain.models.causal import CausalPolicy
from posttrain.models.scoring import action_statistics
from posttrain.rollout.context import StepContext
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout
from posttrain.rollout.strategies.thought import closed, encoded
from posttrain.rollout.strategy import demonstration_of
from posttrain.studies.arms import QUICK_PROMPTS, in_lab, shortened
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, AtMost, Better, Lower, Within
from posttrain.training.method import Method
from posttrain.training.stage import train_stage
from posttrain.trajectory import Group, Sampling, Trajectory

OPEN, CLOSE = "[", "]"
THOUGHT = 14  # tokens that a thought may take
SUMS = World("sums")
COPIED = World("sums", {"copied": True, "budget": True})
PLAIN_SUMS = ModelSpec(
    "sums", SUMS, (Share(SUMS),), hidden=64, layers=2, rows=40_000, steps=1000, learning_rate=3e-3, schedule="cosine"
)
COPIED_SUMS = replace(PLAIN_SUMS, name="copied-sums", task=COPIED, corpus=(Share(COPIED),), steps=1200)
BUDGET = 10  # of the last step: a whole scratch for six digits


@dataclass(frozen=True)
class ShuffledRewards:
    """Every completion has the reward of some completion of its group, drawn without repetition: a control."""

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        chance = context.random("shuffled rewards")
        for group in groups:
            order = chance.permutation(len(group)).tolist()
            rewards = [group.trajectories[i].reward for i in order]
            for trajectory, reward in zip(group.trajectories, rewards, strict=True):
                trajectory.reward = reward


def thoughtful(
    policy: CausalPolicy, task: Task, *, prompts: int, samples: int = 8, instruction: str = ""
) -> dict[str, float]:
    """What a policy makes of thinking before the last character of held-out documents, and of their other tokens.

    `thought_loss`, `empty_loss`, `plain_loss`: cross-entropy of that token in nats, behind a sampled thought, behind an
    empty one and behind none, given that no thought opens there (or a model that no longer opens any would seem to
    predict better). `gain`: what the thought's words are worth, empty_loss - thought_loss. `thought_accuracy`,
    `plain_accuracy`: the token's mean probability, which is the share of right predictions at temperature 1;
    `accuracy`: the larger of both. `thought_length`: tokens. `rest_loss`: cross-entropy of the solution's other tokens.
    """
    asked = task.prompts(policy.tokenizer, "heldout", prompts, demonstrations=True)
    documents = [demonstration_of(prompt) for prompt in asked]
    place = [d.length - 1 - int(int(d.tokens[-1]) in policy.end_tokens) for d in documents]
    marker = encoded(instruction + OPEN, policy)
    starts = [
        replace(p, tokens=torch.cat([d.tokens[:at], marker])) for p, d, at in zip(asked, documents, place, strict=True)
    ]
    sampling = Sampling(max_tokens=2 * BUDGET, stop=(CLOSE,))
    thoughts = rollout(engine_for(policy, rows=256), starts, samples, sampling, 0)
    behind = [
        _asking(torch.cat([closed(t, CLOSE, policy), d.tokens[at][None]]))
        for group, d, at in zip(thoughts, documents, place, strict=True)
        for t in group.trajectories
    ]
    alone = [_asking(d.tokens[: at + 1]) for d, at in zip(documents, place, strict=True)]
    nothing = encoded(CLOSE, policy)
    empty = [
        _asking(torch.cat([start.tokens, nothing, d.tokens[at][None]]))
        for start, d, at in zip(starts, documents, place, strict=True)
    ]
    with_thought = torch.cat(action_statistics(policy, behind, 8192))
    behind_nothing = torch.cat(action_statistics(policy, empty, 8192))
    opening = encoded(OPEN, policy)[:1]
    opened = [_asking(torch.cat([d.tokens[:at], opening])) for d, at in zip(documents, place, strict=True)]
    left = 1 - torch.cat(action_statistics(policy, opened, 8192)).exp().clamp(max=1 - 1e-6)
    without = torch.cat(action_statistics(policy, alone, 8192)) - left.log()
    whole = action_statistics(policy, documents, 8192)
    first = [d.prompt_length for d in documents]
    rest = torch.cat([
        torch.cat([logp[: at - begin], logp[at - begin + 1 :]])
        for logp, at, begin in zip(whole, place, first, strict=True)
    ])  # fmt: skip
    accuracies = {"thought": float(with_thought.exp().mean()), "plain": float(without.exp().mean())}
    lengths = [t.actions - int(t.text.endswith(CLOSE)) for group in thoughts for t in group.trajectories]
    return {
        "thought_loss": -float(with_thought.mean()),
        "empty_loss": -float(behind_nothing.mean()),
        "plain_loss": -float(without.mean()),
        "gain": float(with_thought.mean() - behind_nothing.mean()),
        "thought_accuracy": accuracies["thought"],
        "plain_accuracy": accuracies["plain"],
        "accuracy": max(accuracies.values()),
        "thought_length": sum(lengths) / len(lengths),
        "rest_loss": -float(rest.mean()),
    }


def _asking(tokens: torch.Tensor) -> Trajectory:
    """A sequence of which only the last token is asked for."""
    return Trajectory(tokens, torch.arange(len(tokens)) == len(tokens) - 1)


def pretrained(
    seed: int, quick: bool, *, method: Method | None, spec: ModelSpec, model: str, instruction: str, every: int
) -> Measured:
    """Go on training a model on documents by a method (None: not at all), and see what its thoughts are worth.

    model: the key of what `spec` builds. instruction: text before a thought's opening when it is measured. Figures:
    those of `thoughtful`, and `kept_loss`, the loss behind a thought over that before training. Curve: `gain`.
    """
    policy, task = build(spec), spec.task.task(train=3000, heldout=200)
    prompts = QUICK_PROMPTS if quick else 200

    def look(now: CausalPolicy) -> dict[str, float]:
        return thoughtful(now, task, prompts=min(prompts, 64), samples=4, instruction=instruction)

    start = thoughtful(policy, task, prompts=prompts, instruction=instruction)
    if method is None:
        return Measured(start | {"kept_loss": 1.0})
    made = shortened(method) if quick else method
    assert isinstance(made, Method)
    result = train_stage(policy, made, task, seed=seed, evaluate=look, every=0 if quick else every)
    figures = thoughtful(result.policy, task, prompts=prompts, instruction=instruction)
    figures["kept_loss"] = figures["thought_loss"] / start["thought_loss"]
    curve = [{"step": p.step, "value": p.figures["gain"], "rollouts": p.rollouts} for p in result.curve]
    return Measured(figures, {"gain": curve}, result.rollouts, result.seconds, result.tokens)


def _arm(method: Method | None, spec: ModelSpec, instruction: str = "") -> Arm:
    arguments = {
        "method": method, "spec": spec, "model": spec.key, "instruction": instruction, "every": 20,
    }  # fmt: skip
    return Arm(pretrained, arguments, (worlds.sums,))


def _thinking(method: Method) -> Method:
    made = in_lab(method, max_tokens=THOUGHT)
    assert isinstance(made, Method)
    return made


@study(method="rlp", card="050")
def rlp() -> Study:
    """Thoughts become useful when they are paid by how much likelier they make the text's next token.

    Documents are five or six digits below 5 and, on the next line, their sum modulo 5: one token that needs a hidden
    computation. A model of 0.1 million parameters is pre-trained on such documents; in 0.7 of them a scratch stands in
    brackets before the sum, cut off at a random place, so that only one thought in six is whole. Arms: RLP (100 steps
    of 16 documents x 8 thoughts, temperature 0.7), RLP whose rewards are shuffled within each group, next-token
    training on the same documents (400 steps of 64: about as many tokens), and the model as it was. On 200 held-out
    documents, 8 thoughts each. The modulus is 5, not the card's 10, so that so small a model learns the table of sums.

    Rule, fixed before the run, over four seeds: the loss of the sum behind a thought falls by at least a fifth, and
    becomes at least 0.2 nats less than behind an empty thought; the sum's accuracy behind a thought is higher than with
    shuffled rewards, and the better of its accuracies with and without a thought is higher than that of next-token
    training; shuffled rewards leave the loss behind a thought at least 0.9 of what it was; next-token training moves
    the accuracy without a thought by less than 10 points.
    """
    method = _thinking(methods.rlp(OPEN, CLOSE, within="solution"))
    following = in_lab(methods.sft(), steps=400, batch=64, epochs=None)
    assert isinstance(following, Method)
    return Study(
        claim="Rewarding a thought by the information it gains about the next token makes thoughts useful without a "
        "verifier; next-token training on as many tokens does not.",
        setting="lab model of sums, 100 steps x 16 documents x 8 thoughts, or 400 steps x 64 documents without any.",
        arms={
            "before": _arm(None, PLAIN_SUMS),
            "rlp": _arm(method, PLAIN_SUMS),
            "shuffled": _arm(method.replace(shaping=(ShuffledRewards(),)), PLAIN_SUMS),
            "next-token": _arm(following, PLAIN_SUMS),
        },
        expectations=(
            AtMost("rlp", "kept_loss", 0.8, why="the sum is likelier behind a thought"),
            AtLeast("rlp", "gain", 0.2, why="by the thought's words, not by thinking less"),
            Better("rlp", than="shuffled", metric="thought_accuracy", why="the reward does it, not the training"),
            Better("rlp", than="next-token", metric="accuracy", why="each as it predicts best, at as many tokens"),
            AtLeast("shuffled", "kept_loss", 0.9, why="control"),
            Within("next-token", of="before", metric="plain_accuracy", tolerance=0.1, why="too much for one token"),
        ),
        seeds=4,
    )


@study(method="rmt", card="064")
def rmt() -> Study:
    """A thinking budget, a curriculum over tokens, and imitation of all others, against thinking before any token.

    Documents repeat five or six digits and end in their sum modulo 5 ("34213=3"): six tokens in seven can be read off,
    one needs thought. The model (0.1 million parameters) has seen a scratch of random length in 0.7 of the documents,
    behind a number that means nothing. Arms: reinforcement pre-training (any token, no length reward, no imitation),
    RMT, RMT without imitation, RMT without the curriculum. All have 100 steps of 16 documents x 8 thoughts before one
    token each. The budget, told as a number of two digits, falls from 14 to 10 tokens, a whole scratch for six digits.
    200 held-out documents, 8 thoughts each before the sum, told to take 10 tokens.

    Rule, fixed before the run, over four seeds: RMT's accuracy on the sum is higher than that of reinforcement
    pre-training; its thoughts are within 3 tokens of 10 at the end; without imitation the loss of the documents' other
    tokens is higher than with it.
    """

    def full(**changed: object) -> Method:
        given = {
            "open": OPEN,
            "close": CLOSE,
            "instruction": "{budget:02d}",
            "start": 14,
            "decay": BUDGET / 14,
            **changed,
        }
        return _thinking(methods.rmt(**given)).with_settings(max_tokens=2 * THOUGHT)  # type: ignore[arg-type]

    arms = {
        "rpt": full(curriculum=False, weight=0.0, imitation=0.0),
        "rmt": full(),
        "without imitation": full(imitation=0.0),
        "without curriculum": full(curriculum=False),
    }
    return Study(
        claim="A shrinking budget, a curriculum towards uncertain tokens and next-token training on the rest beat "
        "thinking before random tokens.",
        setting="lab model of copied sums, 100 steps x 16 documents x 8 thoughts, equal for all arms.",
        arms={"before": _arm(None, COPIED_SUMS, f"{BUDGET:02d}")}
        | {n: _arm(m, COPIED_SUMS, f"{BUDGET:02d}") for n, m in arms.items()},
        expectations=(
            Better("rmt", than="rpt", metric="thought_accuracy", why="it thinks where thinking helps"),
            AtLeast("rmt", "thought_length", BUDGET - 3, why="thoughts as long as the budget, 30 % less at least"),
            AtMost("rmt", "thought_length", BUDGET + 3, why="and 30 % more at most"),
            Lower("rmt", than="without imitation", metric="rest_loss", why="what is not thought about is kept"),
        ),
        seeds=4,
    )
