"""Studies of rewards for being different: DARLING and RepExp, on puzzles that have many right answers."""

from __future__ import annotations

import numpy as np
import torch

from posttrain import methods
from posttrain.evaluation.novelty import exploration_orders, verifier_efficiency
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.novelty import novelty_order
from posttrain.rollout.rollout import rollout
from posttrain.studies.arms import QUICK_PROMPTS, in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, AtMost, Better, Within
from posttrain.training.method import Method
from posttrain.training.stage import Trained
from posttrain.trajectory import Group

POOL = 64  # completions of a prompt that are looked through
RARE = (0.02, 0.10)  # the share of right ones in the pools that are looked through


def distinct_answers(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`distinct`: how many different right answers are among 32 samples, on average over 64 held-out puzzles."""
    prompts = task.prompts(policy.tokenizer, "heldout", QUICK_PROMPTS if result.steps < 10 else 64)
    groups = rollout(engine_for(policy, rows=256), prompts, 32, task.sampling, 0)
    task.reward.score_groups(groups)
    found = [len({t.text.strip() for t in g.trajectories if t.rewards["correct"] > 0.5}) for g in groups]
    return {"distinct": sum(found) / len(found)}


def _on_logic(method: Method) -> Arm:
    return trained(
        in_lab(method), preset="logic", samples=32, ks=(1, 32), prompts=96, extra=distinct_answers
    )  # fmt: skip


@study(method="darling", card="071")
def darling() -> Study:
    """Multiplying quality by diversity keeps many right answers alive where quality alone keeps one.

    The lab model `logic` (0.2 M parameters, right on a third of its samples) is trained on puzzles with many right
    answers: three digits under conditions, colourings of graphs. Two completions say the same when their texts are
    equal, which on these tasks is the exact judgement. All arms have 100 steps of 16 puzzles x 8 completions and the
    same loss (no division by the standard deviation, mean over tokens); `quality` multiplies with nothing (floor 1),
    `grpo` is GRPO as it stands. The additive ablation pays for what is different and wrong.

    Rule, fixed before the run: on 96 held-out puzzles, 32 samples each, `darling` finds more different right answers
    than `quality` and than `grpo`, its pass@32 is higher than `quality`'s, and its accuracy is within 4 points of
    `quality`'s; over four seeds. (The paper's own figure: better pass@1 and pass@k at once.)
    """
    return Study(
        claim="Reward times the share of the group that says something else keeps more distinct right answers than the "
        "reward alone, at the same accuracy.",
        setting="lab model logic (many right answers), 100 steps x 16 prompts x 8 rollouts, equal for all arms.",
        arms={
            "grpo": _on_logic(methods.grpo()),
            "quality": _on_logic(methods.darling(floor=1.0)),
            "darling": _on_logic(methods.darling()),
            "added": _on_logic(methods.darling(combine="add", weight=0.5)),
            "n-grams": _on_logic(methods.darling(ngrams=1)),
        },
        expectations=(
            Better("darling", than="quality", metric="distinct", why="what the multiplier pays for"),
            Better("darling", than="grpo", metric="distinct", why="against the usual loss"),
            Better("darling", than="quality", metric="pass@32", why="diversity that counts"),
            Within("darling", of="quality", metric="accuracy", tolerance=0.04, why="quality is not given up"),
            Better("darling", than="added", metric="accuracy", why="the additive form pays for wrong answers, too"),
        ),
        seeds=4,
        notes="n-grams: completions are one word, so its 1-grams are whole answers; it pays only for answers that no "
        "other completion has.",
    )


@study(method="rep-exp", card="135")
def rep_exp() -> Study:
    """A bonus for novel hidden states makes RL explore.

    The lab model `logic`, as in the study `darling`: 100 steps of 16 puzzles x 8 completions. The bonus is that of the
    paper (0.01); λ is relative to the states' own length, since an absolute 0.01 against the states of this model
    (squared length about 100) gives every distinct completion the same bonus. `large` has a hundred times the weight,
    as a control: there the bonus outweighs being right. `tokens` is the same loss with no bonus.

    Rule, fixed before the run: over four seeds `rep-exp` has a higher pass@32 and more different right answers than
    `tokens`, with an accuracy within 3 points of it; `large` has a lower accuracy.
    """

    def arm(weight: float) -> Arm:
        return _on_logic(methods.rep_exp(weight, ridge=0.1, relative=True))

    return Study(
        claim="An elliptical bonus on frozen hidden states raises pass@k and distinct right answers over GRPO, at the "
        "same accuracy.",
        setting="lab model logic (many right answers), 100 steps x 16 prompts x 8 rollouts, equal for all arms.",
        arms={
            "grpo": _on_logic(methods.grpo()),
            "tokens": arm(0.0),
            "rep-exp": arm(0.01),
            "large": arm(1.0),
        },
        expectations=(
            Better("rep-exp", than="tokens", metric="pass@32"),
            Better("rep-exp", than="tokens", metric="distinct"),
            Within("rep-exp", of="tokens", metric="accuracy", tolerance=0.03),
            Better("tokens", than="large", metric="accuracy", why="control: a bonus that outweighs being right"),
        ),
        seeds=4,
    )


def looked_through(seed: int, quick: bool, *, order: str, model: str) -> Measured:
    """Pools of completions by the untrained model, looked through in an order.

    `efficiency`: the share of looks saved against a random order until one is right, over the pools with a share of
    right ones in RARE (over all pools that have a right one, if `quick`). `pools`: how many these are.
    """
    from posttrain import lab

    policy, task = lab.model("logic"), lab.task("logic", heldout=16 if quick else 300)
    prompts = task.prompts(policy.tokenizer, "heldout")
    groups = rollout(engine_for(policy, rows=256), prompts, POOL, task.sampling, seed)
    task.reward.score_groups(groups)
    low, high = (0.0, 1.0) if quick else RARE
    shares = [sum(t.rewards["correct"] > 0.5 for t in g.trajectories) / POOL for g in groups]
    chosen = [g for g, share in zip(groups, shares, strict=True) if low < share <= high]
    correct = [[t.rewards["correct"] > 0.5 for t in g.trajectories] for g in chosen]
    figures = {"efficiency": verifier_efficiency(correct, orders(order, policy, chosen, seed)), "pools": len(chosen)}
    return Measured(figures, rollouts=POOL * len(prompts))


def orders(order: str, policy: CausalPolicy, groups: list[Group], seed: int) -> list[list[int]]:
    """The order of each pool: by states, by vectors that mean nothing, by new characters, or by chance."""
    if order == "states":
        return exploration_orders(policy, groups)
    if order == "random vectors":
        draw = torch.Generator().manual_seed(seed)
        return [novelty_order(torch.randn(len(g), 64, generator=draw), 0.64) for g in groups]
    if order == "bigrams":
        return [_by_new_bigrams([t.text for t in g.trajectories]) for g in groups]
    chance = np.random.default_rng(seed)
    return [chance.permutation(len(g)).tolist() for g in groups]


def _by_new_bigrams(texts: list[str]) -> list[int]:
    """Next comes the text with the most pairs of characters (and their places) that no text before it had."""
    grams = [{(i, text[i : i + 2]) for i in range(len(text))} for text in texts]
    seen: set[tuple[int, str]] = set()
    left, order = list(range(len(texts))), []
    while left:
        best = max(left, key=lambda i: len(grams[i] - seen))
        order.append(best)
        left.remove(best)
        seen |= grams[best]
    return order


def _looking(order: str) -> Arm:
    from posttrain import lab

    return Arm(looked_through, {"order": order, "model": lab.preset("logic").key}, (exploration_orders,))


@study(method="rep-exp", card="135", name="rep-exp-inference")
def rep_exp_inference() -> Study:
    """Looking at novel completions first finds a right one sooner; nothing is trained.

    The lab model `logic` draws 64 completions for each of 300 held-out puzzles; the pools in which 2 % to 10 % are
    right are looked through until a right one is found. The order goes by greedy elliptical novelty of mean hidden
    states (λ 1 % of their mean squared length), by the same on random vectors, by new pairs of characters, or by
    chance. `efficiency` is the share of looks saved against the expectation of a random order. Rule, fixed before the
    run: over five seeds of sampling, states save at least 20 %, random vectors at most 5 %.
    """
    return Study(
        claim="Choosing the most novel hidden states first reduces the verifier's work by more than a fifth on hard "
        "prompts.",
        setting="lab model logic, untrained: 64 completions for each of 300 held-out puzzles; pools with 2-10 % right.",
        arms={name: _looking(name) for name in ("states", "random vectors", "bigrams", "chance")},
        expectations=(
            AtLeast("states", metric="efficiency", value=0.2, why="the paper: over 50 % on most tasks"),
            AtMost(
                "random vectors", metric="efficiency", value=0.05, why="control: the order must come from the model"
            ),
            Better("states", than="chance", metric="efficiency"),
        ),
        seeds=5,
        notes="Tried with seed 100 at other sampling temperatures: states save -27 % at 1, -15 % at 0.7, -3 % at 0.5. "
        "The model's samples hardly repeat themselves (57 of 64 differ on these puzzles), so what is novel is mostly "
        "odd; the order by new characters saves 26 % to 38 %.",
    )
