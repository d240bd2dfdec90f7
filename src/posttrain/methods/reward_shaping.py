"""Rewards that are doubted, disturbed or compared before they train: trust, noise, patterns, perturbed twins.

Notation as in `policy_gradient.py`; r_i is the task's reward, R_i what the policy is trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from posttrain.methods.policy_gradient import grpo, ppo
from posttrain.methods.registry import method
from posttrain.objective.advantage import GAE, GroupNormalised
from posttrain.objective.schedule import Coefficient, Exponential
from posttrain.reward.reasoning_pattern import ReasoningPattern
from posttrain.reward.shapings.contrast import RESPONSE_MODES, ContrastBonus, SignedOutcome
from posttrain.reward.shapings.noise import NoisyReward
from posttrain.reward.shapings.pattern import Calibrated, PatternOnly
from posttrain.reward.shapings.trust import TrustedReward
from posttrain.rollout.outcome import Right
from posttrain.rollout.strategies.twin import Perturbation, Shuffled, Twin
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError


@method(family="reward-modelling", card="111")
def trust_grpo(
    thinking: str | Callable[..., float] = "process",
    alpha: float = 0.3,
    time: float | None = None,
    trust: bool = True,
    anneal: bool = True,
    drop: bool = True,
    clip: float = 0.2,
    beta: float = 0.04,
) -> Method:
    r"""Trust-GRPO: a learned reward of the thinking beside the outcome, trusted by group and annealed away.

    .. math:: R_i = r_i + \gamma\,\alpha\,e^{-s/T} R^t_i,\qquad
              \gamma = 1 \text{ if } \mu_c \ge \mu_w \text{ else } e^{\mu_c - \mu_w}

    R^t scores the thinking in [0, 1]; μ_c and μ_w are its means over the right (r >= 0.5) and the wrong completions of
    a group, s is the optimizer step. The rest is GRPO.

    Args:
        thinking: a component of the task's reward by its name, of weight 0 there; or a callable as verifiers are
            (a reward model). It is cut to [0, 1], and 0 where it fails.
        alpha: α. time: T in steps; None: those of the stage (the paper's text; its code has 500).
        trust: False takes γ = 1. anneal: False leaves e^{-s/T} out.
        drop: groups whose outcomes are all >= 0.9 or all <= 0.1 get no thinking reward (as in the code; in such a
            group the division by σ would make small differences of R^t the whole signal).
        clip: ε. beta: weight of the KL to the stage's first policy.

    All completions are scored: the released code scores only right ones, and its γ is then always 1. Trust is never
    below 1/e, so it is the annealing that ends a reward which is being hacked. Reference: SophiaVL-R1: Reinforcing
    MLLMs Reasoning with Thinking Reward, 2025, arXiv 2505.17018 (card 111); on text.
    """
    weight: Coefficient = Exponential(alpha, time) if anneal else alpha
    return grpo(clip, beta).replace(shaping=(TrustedReward(thinking, weight, trust, drop=drop),))


@method(family="robustness", card="079")
def noisy_rewards(
    p: float = 0.4,
    per: Literal["prompt", "rollout"] = "prompt",
    critic: bool = True,
    critic_warmup: int = 20,
    whiten: bool = True,
    clip: float = 0.2,
    value: float = 0.1,
) -> Method:
    r"""PPO under flipped rewards: learning survives as long as fewer than half of the prompts lie.

    .. math:: R_i = (1 - u)\, r_i + u\,(1 - r_i),\quad u \sim \mathrm{Bernoulli}(p),\qquad
              \mathbb E[R_i] = p + (1 - 2p)\, r_i,\qquad A_t = R_i - V_t

    PPO with a critic, γ = λ = 1, a mean over tokens, without KL; the critic alone is trained in the first steps, or
    their noise wrecks the policy. Evaluate with the clean verifier: the metric `clean_reward` is the reward before the
    noise.

    Args:
        p: share of coins that flip. per: `prompt`, one coin for all completions of a prompt and step; `rollout`, a coin
            for each.
        critic: False takes GRPO's group baseline in the critic's place (not in the paper: its division by σ keeps the
            wrong-signed advantages of flipped prompts at full size).
        critic_warmup: steps in which only the critic learns.
        whiten: advantages to mean 0 and variance 1 over the step, as the paper's training library does; without it the
            first steps' signal is (1 - 2p) times the clean one.
        clip: ε. value: weight of the critic's loss.

    The paper makes one update a step. Reference: The Climb Carves Wisdom Deeper Than the Summit, 2025, arXiv 2505.22653
    (card 079).
    """
    noise = (NoisyReward(p, per),)
    return (
        _warmed_ppo(critic_warmup, whiten, clip, value).replace(shaping=noise)
        if critic
        else grpo(clip).replace(shaping=noise)
    )


@method(family="robustness", card="079")
def rpr(
    use: Literal["calibrate", "only", "switch"] = "calibrate",
    alpha: float = 0.1,
    below: float = 0.5,
    switch: float = 0.5,
    kind: Literal["maths", "open-ended"] | None = None,
    phrases: tuple[str, ...] | None = None,
    answer: Literal["marked", "number", "none"] | None = None,
    critic_warmup: int = 20,
    whiten: bool = True,
    clip: float = 0.2,
    value: float = 0.1,
) -> Method:
    r"""Reasoning pattern reward: phrases of reasoning repair a reward model's low scores, or are the reward.

    .. math:: R_i = \begin{cases}\min(1, r_i + \alpha\,\mathrm{RPR}_i) & r_i < 0.5\\ r_i & \text{else}\end{cases},\qquad
              \mathrm{RPR} = \Big[\min(1, c/20) - \mathrm{rep}_{20} - \#(\text{"user: "})\Big]_+

    c phrases of a list occur; rep is the share of repeated word 20-grams. PPO as in `noisy-rewards`.

    Args:
        use: `calibrate` lifts scores below `below` (a reward model's false negatives); `only` takes RPR for the reward,
            whatever the answer is; `switch` does so at first and then takes the task's reward. A model trained on RPR
            alone peaks, then stuffs phrases: choose by held-out accuracy.
        alpha: weight of RPR in the calibration. below: scores from here on stay as they are.
        switch: the share of the stage's steps after which the task's reward comes.
        kind: the paper's list of phrases, `maths` or `open-ended`; None: the latter to calibrate, else the former.
        phrases: lower-case, in the place of the list.
        answer: completions without one have RPR 0: a `marked` answer, any `number`, or `none` needed. None: as the
            paper, `none` to calibrate, else `marked`.
        critic_warmup: steps in which only the critic learns. whiten, clip, value: see `noisy-rewards`.

    What phrases can teach is what the model knew: without reasoning in its pre-training RPR teaches nothing. Reference:
    The Climb Carves Wisdom Deeper Than the Summit, 2025, arXiv 2505.22653 (card 079).
    """
    if use not in ("calibrate", "only", "switch"):
        raise PosttrainError(f"use is {use!r}; expected calibrate, only or switch")
    calibrate = use == "calibrate"
    pattern = ReasoningPattern(
        kind or ("open-ended" if calibrate else "maths"), phrases, answer=answer or ("none" if calibrate else "marked")
    )
    shaping = Calibrated(pattern, alpha, below) if calibrate else PatternOnly(pattern, 1.0 if use == "only" else switch)
    return _warmed_ppo(critic_warmup, whiten, clip, value).replace(shaping=(shaping,))


def _warmed_ppo(warmup: int, whiten: bool, clip: float, value: float) -> Method:
    """PPO on outcomes alone: A_t = R - V_t, no KL, one update a step, the critic first."""
    made = ppo(clip, value=value, updates=1)
    return made.replace(advantage=GAE(1.0, 1.0, 0.0, whiten), critic_warmup=warmup)


@method(family="policy-gradient", card="015", name="timehc-rl")
def timehc_rl(
    bonus: float = 0.4,
    ratio: float = 0.9,
    twin: int | None = None,
    perturb: Perturbation | None = None,
    format: str = RESPONSE_MODES,
    right: str | None = None,
    scale: Literal["group", "none"] = "group",
    clip: float = 0.2,
    beta: float = 0.001,
) -> Method:
    r"""TimeHC-RL: a bonus where the policy is better on the events in their order than on shuffled ones.

    .. math:: R_i = r^{form}_i + r^{acc}_i + \alpha\,1[o_i \text{ right}]\,1[p > \mu\,\tilde p],\qquad
              r^{form} \in \{1, -1\},\ r^{acc} \in \{2, -1.5\}

    p is the share of right completions of a prompt, p̃ that of as many completions on the same prompt with its events
    shuffled; those earn no gradient. The rest is GRPO with a KL.

    Args:
        bonus: α. ratio: μ. twin: completions of a shuffled prompt (they cost rollouts); None: as many as a group has.
        perturb: a function of (question, prompt, random generator) that returns another question, or None for a prompt
            with nothing to perturb, which then gets no bonus. None: `Shuffled()`, which permutes `meta["events"]` or
            the lines before the last.
        format: the form that earns +1, a regular expression for the whole completion; by default one of three modes:
            an answer in its tags, alone, behind a note of the social context, or behind thinking.
        right: the reward's component that says what is right (>= 0.5); None: the reward itself.
        scale: `group` divides by σ, `none` does not.
        clip: ε. beta: weight of the KL to the stage's first policy.

    The bonus is one number for all right completions of a prompt: where all completions have the same form, dividing by
    σ takes it away again, and it acts only with `scale` none (then as a weight of 1 + α/3.5 on prompts that need the
    order). Not established: p̃'s sample size (here G) and prompts without events (here no bonus). Reference: TimeHC-RL:
    Temporal-aware Hierarchical Cognitive Reinforcement Learning, 2025, arXiv 2505.24500 (card 015).
    """
    return grpo(clip, beta).replace(
        advantage=GroupNormalised(scale),
        rollouts=Twin(Shuffled() if perturb is None else perturb, twin, Right(right)),
        shaping=(SignedOutcome(format=format), ContrastBonus(bonus, ratio)),
    )
