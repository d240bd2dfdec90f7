"""A second look at claims that failed, where a habit is what is to be learned: to correct, to think first, to work out.

As in `second_look`: the first settings and their verdicts stay. Cards 085, 014 and 079 were read again beside the code,
and each study here was written, with its rule, before it was run. In a hundred steps the lab's small models learn few
facts from rewards, but they do learn which of the ways of writing that they know to choose; so each setting makes the
answer depend on one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from posttrain import lab, methods
from posttrain.data.domains import ByDomain
from posttrain.evaluation.reposed import reposed
from posttrain.evaluation.task import Task, TaskItem
from posttrain.lab.cache import kept
from posttrain.lab.models import ModelSpec, Share, World, build
from posttrain.lab.worlds.arithmetic import answer_score, arithmetic
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.objective.aggregate import TokenMean
from posttrain.reward.reward import Reward
from posttrain.reward.shapings.pattern import PatternOnly
from posttrain.rollout.context import StepContext
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout
from posttrain.rollout.strategies.feedback import Attempt, Feedback
from posttrain.studies.arms import QUICK_PROMPTS, curves, heldout_figures, in_lab, shortened, trained
from posttrain.studies.fingerprint import digest
from posttrain.studies.hybrid import RARE
from posttrain.studies.registry import study
from posttrain.studies.reward_shaping import late, shown
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, Better, Within
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.stage import Trained, train_stage
from posttrain.trajectory import Finish, Prompt, Sampling

# -- corrections that look at the attempt ----------------------------------------------------------------------------

DOUBT, TRACE = "?", 0.05
WARMUP, STEPS, LENGTH = 120, 100, 48


def settled(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where what stands behind the last doubt is in one of the world's styles and gives the answer."""
    return answer_score(completion.rpartition(DOUBT)[2], prompt)


def corrected_carries() -> Task:
    """Written sums with up to two carries; one in twenty of the solutions without a carry has the last column wrong
    at first and takes it back: "3+5=8 2+4=5 58?2+4=6 68".
    """
    task, chance = lab.task(RARE), random.Random("corrected carries")
    train = [_slipped(i, chance) if i.meta["carries"] == 0 and chance.random() < TRACE else i for i in task.train]
    return replace(task, train=train, reward=Reward({"correct": (settled, 1.0)}), sampling=Sampling(max_tokens=LENGTH))


def _slipped(item: TaskItem, chance: random.Random) -> TaskItem:
    *before, last = item.meta["steps"]
    terms, _, value = last.partition("=")
    wrong = chance.choice([digit for digit in range(1, 10) if digit != int(value)])
    answer = f"{wrong}{str(item.answer)[1:]}"
    return replace(item, solution=" ".join([*before, f"{terms}={wrong}", f"{answer}{DOUBT}{last}", str(item.answer)]))


@dataclass(frozen=True)
class Corrections:
    """Takes a wrong attempt back from its first wrong column on, and ends right in a share of the cases; has nothing to
    say about a right one."""

    right: float = 0.8

    def __call__(self, attempts: Sequence[Attempt], context: StepContext) -> list[Tensor]:
        policy, chance = context.required_policy(), context.random("corrections")
        written = []
        for attempt in attempts:
            text = self._correction(attempt, chance.random() < self.right, int(chance.integers(1, 10)))
            ids = policy.tokenizer.encode(text, add_special_tokens=False)
            end = [policy.tokenizer.eos_token_id] if text else []
            written.append(torch.tensor([*ids, *end], dtype=torch.int64))
        return written

    def _correction(self, attempt: Attempt, right: bool, off: int) -> str:
        if attempt.right:
            return ""
        steps, given = attempt.prompt.meta["steps"], attempt.text.rpartition(DOUBT)[2].split()
        kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, given, strict=False)))
        answer = int(attempt.prompt.answer) + (0 if right else off)
        return DOUBT + " ".join([*steps[kept:], str(answer)])


def corrections(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`doubts`: share of held-out completions that take something back; `corrections`: of those that were wrong before
    it, the share that ends right (0 where there is none); `needless`: the share of doubts about what was right.
    """
    prompts = task.prompts(policy.tokenizer, "heldout", QUICK_PROMPTS if result.steps < 10 else 96)
    groups = rollout(engine_for(policy, rows=256), prompts, 8, task.sampling, 0)
    pairs = [(p, t.text) for p, g in zip(prompts, groups, strict=True) for t in g.trajectories]
    spoken = [(p, text) for p, text in pairs if DOUBT in text]
    wrong = [(p, text) for p, text in spoken if answer_score(text.partition(DOUBT)[0], p) < 1]
    return {
        "doubts": len(spoken) / len(pairs),
        "corrections": sum(settled(text, p) for p, text in wrong) / max(1, len(wrong)),
        "needless": (len(spoken) - len(wrong)) / max(1, len(spoken)),
    }


def _correcting(method: Method) -> Arm:
    warmup = methods.sft().replace(sampler=partial(ByDomain, weights={"plain": 1.0}))
    made = in_lab(warmup, steps=WARMUP) >> in_lab(method.replace(aggregate=TokenMean()), steps=STEPS, max_tokens=LENGTH)
    return trained(
        made, preset=RARE, task=corrected_carries, extra=corrections, depends=(corrected_carries, corrections)
    )


@study(method="thinktuning", card="085")
def thinktuning_corrections() -> Study:
    """Feedback that looks at the attempt, on sums whose mistakes can be seen in what was written.

    In the study `thinktuning` the policy learned to take answers back and lost 12 points. Its teacher doubted every
    attempt, right or wrong, where the card's gives its opinion on the attempt; and behind a bare number there is
    nothing to go by but guessing again (no wrong first answer ended right). So the habit could only cost. The method
    was compared with the card again and does what it says.

    Here it is the card's own check: written working, and a teacher that takes back the first wrong column ("6+7=13
    4+5=9 93?4+5+1=10 103"). The lab model `rare-carries` knows the columns and hardly ever carries, so its mistakes
    stand in the text, where a later look can find them, and rewards alone cannot, since a right completion is rare. The
    teacher ends right in 80 % of the cases, and says nothing about right attempts. A warm-up of 120 SFT steps, the same
    for all arms, on sums without a carry, in a twentieth of which a wrong last column is taken back, leaves a trace of
    the habit (7 % of completions, none of which repairs anything) and teaches nothing about carries. Then 100 steps of
    16 prompts x 8 completions. `imitated` is the card's rejection-SFT, which imitates what is right at last, feedback
    included; `misled` has a teacher that is always wrong.

    Rule, fixed before the run, over four seeds and on held-out sums without a teacher, as there: the share of
    completions that take something back is higher with ThinkTuning than with GRPO by more than 20 points, and the
    accuracy is higher; a misleading teacher is not imitated (at most 5 points more doubts than GRPO leaves of the
    trace). `imitated` is shown without a rule.
    """
    author = Corrections()
    return Study(
        claim="Where mistakes can be seen in the working, shaped feedback on wrong attempts makes the policy correct "
        "itself, and makes it more accurate than GRPO.",
        setting=f"lab model rare-carries (written sums with 0, 1 or 2 carries), {WARMUP} SFT steps on sums without a "
        f"carry that leave a trace of correcting, then {STEPS} steps x 16 prompts x 8 completions, of which 2 go on "
        "with scripted feedback where they are wrong.",
        arms={
            "grpo": _correcting(methods.grpo()),
            "shaped": _correcting(methods.thinktuning(author=author)),
            "imitated": _correcting(methods.raft().replace(rollouts=Feedback(0.25, author))),
            "misled": _correcting(methods.thinktuning(author=Corrections(0.0))),
        },
        expectations=(
            Better("shaped", than="grpo", metric="doubts", margin=0.2, why="the behaviour appears"),
            Better("shaped", than="grpo", metric="accuracy", why="and helps, for there is something to go by"),
            Better("grpo", than="misled", metric="doubts", margin=-0.05, why="control: what is wrong is not learned"),
        ),
        seeds=4,
        notes="The share of traces follows from what a warm-up with seed 100, none of the study's, leaves (one of five "
        "solutions left 32 % of doubts); no arm was run before.",
    )


# -- formats that speak from the first step on -------------------------------------------------------------------------

THOUGHT, THINKING = ":", 0.25
SHORT = {"judge": "{question}={proposed}?", "choice": "{question} {options}", "open": "{question}"}
SHOWN, THOUGHTS = {"steps": 400, "batch": 64, "learning_rate": 1e-3}, 32


def said(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where what stands behind the thoughts is the answer: yes or no, a letter, a number."""
    text = completion.strip()
    return float((text.rpartition(" ")[2] if text.startswith(THOUGHT) else text) == prompt.answer)


def thoughtful_sums() -> Task:
    """Three-digit sums as judgements, choices of three and open questions; what is wrong is wrong in the last digit.

    A quarter of the solutions think first, of as much as the format needs: the last column for a judgement (":3+9=12
    no") and a choice, all columns for an open question.
    """
    chance = random.Random("thoughtful sums")
    sums = arithmetic(digits=((3, 3), (3, 3)), style="worked", train=1000, heldout=200)
    task = reposed(sums, options=3, wrong=other_end, wordings=SHORT, separator=" ", component="answer")

    def thinking(item: TaskItem) -> TaskItem:
        steps = item.meta["steps"] if item.meta["format"] == "open" else item.meta["steps"][:1]
        thoughts = f"{THOUGHT}{' '.join(steps)} " if chance.random() < THINKING else ""
        return replace(item, solution=f"{thoughts}{item.answer}")

    train = [thinking(item) for item in task.train]
    return replace(task, train=train, reward=Reward({"answer": (said, 1.0)}), sampling=Sampling(max_tokens=THOUGHTS))


def other_end(item: TaskItem, chance: random.Random) -> str:
    """The right answer with another last digit."""
    number = int(item.answer)
    return str(number - number % 10 + (number + chance.randint(1, 9)) % 10)


def thoughts(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`early`: share of groups whose rewards differ, in the first half of the steps with rewards; `thoughts`: share of
    held-out completions that think first.
    """
    undecided = [row["undecided"] for row in result.metrics if "undecided" in row]
    half = undecided[: len(undecided) // 2]
    prompts = task.prompts(policy.tokenizer, "heldout", QUICK_PROMPTS if result.steps < 10 else 96)
    groups = rollout(engine_for(policy, rows=256), prompts, 4, task.sampling, 0)
    found = [t.text.startswith(THOUGHT) for g in groups for t in g.trajectories]
    return {"early": sum(half) / len(half), "thoughts": sum(found) / len(found)}


def thinker() -> CausalPolicy:
    """The lab model `working`, shown three-digit sums in the three formats; made once, like the lab's own."""

    def make(scratch: Path) -> Path:
        shown = train_stage(lab.model("working"), in_lab(methods.sft(), **SHOWN), thoughtful_sums())
        return shown.policy.save(scratch / "model")

    return load(kept(f"thinker-{thinker_key()}", "config.json", make), precision="fp32", device="cpu")


def thinker_key() -> str:
    """Changes with what the model is made of."""
    return digest([lab.preset("working").key, SHOWN, thoughtful_sums])[:12]


def _thoughtful(method: Method | Pipeline) -> Arm:
    made: list[Method] = []
    for stage in stages_of(method):
        made += stages_of(in_lab(stage, steps=stage.settings.steps, batch=32, group=4, max_tokens=THOUGHTS))
    return _from("thinker", thinker_key(), Pipeline(tuple(made)), thoughtful_sums, thoughts)


@study(method="curr-reft", card="014")
def curr_reft_signal() -> Study:
    """What carries over from judgements to open questions is the habit of thinking first.

    In the study `curr-reft` letters were counted. There was nothing that a judgement could teach for an open question
    but counting itself, which 30 steps of yes and no do not: all arms went from 13 to 16 or 18 %. And the model was
    sure of its judgements, so that its groups of four were hardly more undecided than those of open questions (37 and
    35 % in the first half). The pipeline was compared with the card again.

    Here the model is as the card's check wants it: right on 5 to 10 % of the open questions, most of whose groups then
    have no signal, and unsure of the others. It is `working`, shown three-digit sums in the three formats with thoughts
    before a quarter of the answers (seed 100): it answers 10 % of the open questions, all of them by thinking first
    (of three such answers one is right), judges 52 % and chooses 35 %; of groups of four 25 % are undecided in open
    questions, 86 % in judgements and 78 % in choices. So the first steps on open questions are three quarters silent,
    where those of the other formats are not. 100 steps of 32 prompts x 4 completions; 30 of judgements, 30 of choices
    and 40 of open questions for `curriculum`.

    Rule, fixed before the run, over four seeds, as in the card: in the first half of the steps the curriculum has more
    undecided groups than `open`, by more than 0.2 (the card expects 0.4), and it is more accurate on open questions by
    more than 5 points. `mixed`, the three formats in equal parts throughout, is shown without a rule.
    """

    def curriculum(judge: int, choice: int, open: int) -> Arm:
        return _thoughtful(methods.curr_reft(judge, choice, open, 0, beta=0.0))

    mixed = methods.grpo().replace(masks=(), sampler=partial(ByDomain, by="format")).with_settings(steps=100)
    return Study(
        claim="Where three quarters of the open questions' groups have no signal, judgements and choices of the same "
        "problems give one from the first step on, and a higher accuracy on open questions.",
        setting="lab model of three-digit sums in three formats, 100 steps x 32 prompts x 4 completions, learning rate "
        "3e-4, no KL, equal for all arms.",
        arms={"open": curriculum(0, 0, 100), "curriculum": curriculum(30, 30, 40), "mixed": _thoughtful(mixed)},
        expectations=(
            Better("curriculum", than="open", metric="early", margin=0.2, why="half of the judgements are right"),
            Better("curriculum", than="open", metric="accuracy", margin=0.05, why="what earns early carries over"),
        ),
        seeds=4,
        notes="The model's figures before training are known, since the setting was made by them; no arm was run "
        "before. Thinking of the last column does not yet help the model to judge or to choose, so that what can carry "
        "over is that it learns to use it. Two more models were tried, of longer sums or fewer thoughts, which did not "
        "learn to think at all.",
    )


# -- a pattern of a model that reasons well --------------------------------------------------------------------------

BARE, WORKED = (World("styles", {"style": style}) for style in ("terse", "worked"))
REASONER = ModelSpec(
    name="reasoner",
    task=WORKED,
    corpus=(Share(BARE, 0.6), Share(WORKED, 0.4)),
    steps=450,
    learning_rate=3e-3,
    schedule="linear",
)


def reasoner() -> CausalPolicy:
    """Bare in three of five answers, 46 % of them right; with working in two of five, 85 % of them right."""
    return build(REASONER)


def sums_in_two_styles() -> Task:
    """Its task: two-digit sums; the verifier takes bare answers and worked ones."""
    return REASONER.task.task()


def peak(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`peak`: the best accuracy on the way; `rise`: how far that is above the first; `worked`: the last quarter's share
    of completions with working.
    """
    way = [point.figures["accuracy"] for point in result.curve]
    return {"peak": max(way), "rise": max(way) - way[0], "worked": late(result, "reward/worked")}


@study(method="rpr", card="079")
def rpr_prior() -> Study:
    """The pattern alone, where working is what makes answers right.

    In the study `rpr` the pattern could not come near the verified reward, whatever it did: the model's working was
    right in 46 % when it came into it, so that working out every sum would have been worth 46 %, and the verified
    reward, which also sharpens, reached 57. A strong prior, on which the card says that the result depends, was not
    there. The lists of phrases, the formula, the calibration and PPO's settings were compared with the card again.

    Here the model is `reasoner`, trained on the same two ways of writing to the end of a falling learning rate: bare
    answers are right in 46 % and worked ones in 85 %, two of five are worked. The pattern, PPO and rates are those of
    the study `rpr` (50 steps, 5 of them for the critic alone, 1e-4). Accuracy is measured every 10 steps with 4 samples
    of 192 held-out sums. In `switch` the verified reward follows the pattern after half of the steps, as a warm-up; it
    is shown without a rule.

    Rule, fixed before the run, over four seeds: the pattern alone peaks within 6 points of the verified reward, as
    there, and at least 10 points above the model before training (or there was nothing to find).
    """
    ppo = methods.noisy_rewards(p=0.0, critic_warmup=5)

    def arm(*shaping: PatternOnly) -> Arm:
        made = in_lab(ppo.replace(shaping=shaping), max_tokens=32, steps=50, learning_rate=1e-4)
        return _from("reasoner", REASONER.key, made, sums_in_two_styles, peak, every=10)

    return Study(
        claim="Where a model's reasoning is reliable and not its habit, rewarding the look of reasoning alone peaks "
        "near the verified reward.",
        setting="lab model of bare or worked sums (46 and 85 % right), 50 steps x 16 prompts x 8 rollouts, equal for "
        "all arms.",
        arms={"verified": arm(), "pattern": arm(PatternOnly(shown)), "switch": arm(PatternOnly(shown, 0.5))},
        expectations=(
            Within("pattern", of="verified", metric="peak", tolerance=0.06, why="selecting working is most of it"),
            AtLeast("pattern", "rise", 0.1, why="from what the model can do to what it does"),
        ),
        seeds=4,
        notes="The model's figures before training are known, since the setting was made by them; no arm was run "
        "before.",
    )


# -- arms that begin with a model of these studies -------------------------------------------------------------------


Name = Literal["thinker", "reasoner"]


def _from(
    model: Name,
    key: str,
    method: Method | Pipeline,
    task: Callable[[], Task],
    extra: Callable[[CausalPolicy, Task, Trained], dict[str, float]],
    every: int = 0,
) -> Arm:
    arguments = {"model": model, "key": key, "method": method, "task": task, "extra": extra, "every": every}
    return Arm(run_from, arguments)


def run_from(
    seed: int,
    quick: bool,
    *,
    model: Name,
    key: str,
    method: Method | Pipeline,
    task: Callable[[], Task],
    extra: Callable[[CausalPolicy, Task, Trained], dict[str, float]],
    every: int,
) -> Measured:
    """Train a model by a method, and measure it as `arms.trained` does: 8 samples of 192 held-out problems, and what
    `extra` adds; on the way 4 samples, every so many steps.

    model: by name, so that the code that makes it counts by its `key` alone, as that of the lab's models does.
    """
    problems, prompts = task(), QUICK_PROMPTS if quick else 192
    if quick:
        method = shortened(method)

    def measure(policy: CausalPolicy) -> dict[str, float]:
        return {"accuracy": heldout_figures(policy, problems, samples=4, ks=(1,), prompts=prompts)["accuracy"]}

    policy = thinker() if model == "thinker" else reasoner()
    result = train_stage(policy, method, problems, seed=seed, evaluate=measure if every else None, every=every)
    figures = heldout_figures(result.policy, problems, samples=8, ks=(1, 8), prompts=prompts)
    figures |= extra(result.policy, problems, result)
    return Measured(figures, curves(result), result.rollouts, result.seconds, result.tokens)
