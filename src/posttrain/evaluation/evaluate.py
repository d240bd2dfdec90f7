"""Evaluating a model on a task's held-out problems, by sampling completions or by the likelihood of options."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.choices import METRICS, Likelihood, choose, option_scores
from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.task import Task
from posttrain.processes import here
from posttrain.reward.scorers import Answer
from posttrain.rollout.engine import Engine, Progress
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(
    engine: Engine | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    samples: int = 1,
    sampling: Sampling | None = None,
    limit: int | None = None,
    ks: Sequence[int] = (1,),
    seed: int = 0,
    level: float = 0.95,
    progress: Progress | None = None,
    likelihood: Likelihood | None = None,
) -> Evaluation:
    """Evaluate a model on the held-out problems of a task.

    Args:
        engine: generates completions; None will do for multiple choice.
        samples: completions a prompt.
        sampling: how to draw them. None takes the task's settings, greedy with one sample; with several at the task's
            temperature, or 1 where that is 0.
        limit: take only the first problems.
        ks: which pass@k to estimate, each at most `samples`.
        seed: of sampling and of bootstrap intervals. Global random state is never used.
        likelihood: for multiple choice: from trajectories to the sums of their action tokens' log-probabilities.

    Raises:
        PosttrainError: nothing held out, a k beyond `samples`, several samples at temperature 0, no `likelihood` for
            multiple choice.
    """
    _check(task, samples, limit, ks)
    if task.multiple_choice:
        return _by_likelihood(tokenizer, task, samples, limit, seed, level, likelihood)
    if engine is None:
        raise PosttrainError(f"task {task.name} needs an engine that generates completions; got None")
    drawn = _sampling(task, samples, sampling)
    prompts = task.prompts(tokenizer, "heldout", limit)
    completions = _completions(engine, task, prompts, samples, drawn, seed, progress)
    answers = [
        Answer(prompt, c.text, len(c.tokens), c.finish)
        for prompt, row in zip(prompts, completions, strict=True)
        for c in row
    ]
    scored = iter(task.reward.score_all(answers))
    scores = [[next(scored) for _ in row] for row in completions]
    failures = [(name, message) for row in scores for score in row for name, message in score.errors.items()]
    return Evaluation(
        task=task.name,
        questions=[prompt.question for prompt in prompts],
        answers=[prompt.answer for prompt in prompts],
        keys=[prompt.key for prompt in prompts],
        completions=[[c.text for c in row] for row in completions],
        values=np.array([[score.total for score in row] for row in scores], dtype=np.float64),
        correct=np.array([[task.correct(score) for score in row] for row in scores], dtype=np.bool_),
        parts={name: np.array([[s.parts[name] for s in row] for row in scores]) for name in task.reward.components},
        tokens=_array(completions, lambda c: len(c.tokens)).astype(np.int64),
        stopped=_array(completions, lambda c: c.finish == "stop").astype(np.bool_),
        sampling=drawn,
        ks=tuple(ks),
        seed=seed,
        level=level,
        errors=dict(Counter(name for name, _ in failures)),
        first_error=failures[0][1] if failures else None,
    )


def _completions(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    seed: int,
    progress: Progress | None,
) -> list[list[Completion]]:
    """Completions, or the policy's part of whole episodes where the task has an environment."""
    if task.environment is None and not here().several:  # several processes share the problems out
        return engine.generate(prompts, samples, sampling, seed, progress)
    groups = rollout(engine, prompts, samples, sampling, seed, task.environment, progress)
    return [[_spoken(t) for t in group.trajectories] for group in groups]


def _spoken(episode: Trajectory) -> Completion:
    said = episode.action_mask
    assert episode.behaviour_logp is not None
    assert episode.behaviour_logp_full is not None
    logp, full = episode.behaviour_logp[said], episode.behaviour_logp_full[said]
    return Completion(episode.tokens[said], logp, full, episode.finish, episode.text)


def _check(task: Task, samples: int, limit: int | None, ks: Sequence[int]) -> None:
    if not task.heldout:
        raise PosttrainError(f"task {task.name} has no held-out problems to evaluate on; set heldout above 0")
    if samples < 1 or (limit is not None and limit < 1):
        raise PosttrainError(f"evaluate: got samples={samples}, limit={limit}; expected at least 1")
    if any(not 1 <= k <= samples for k in ks):
        raise PosttrainError(f"evaluate: ks={list(ks)} with samples={samples}; pass@k needs 1 <= k <= samples")


def _sampling(task: Task, samples: int, sampling: Sampling | None) -> Sampling:
    if sampling is None:
        default = task.sampling
        return dataclasses.replace(default, temperature=0.0 if samples == 1 else default.temperature or 1.0)
    if samples > 1 and sampling.temperature == 0:
        raise PosttrainError(f"evaluate: {samples} samples at temperature 0 are all the same; take 1 or raise it")
    return sampling


def _by_likelihood(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    samples: int,
    limit: int | None,
    seed: int,
    level: float,
    likelihood: Likelihood | None,
) -> Evaluation:
    """Every problem is answered by its most likely option; `parts` holds both ways of choosing."""
    if likelihood is None or samples != 1:
        raise PosttrainError(f"task {task.name} is multiple choice: give likelihood=... and samples=1 (got {samples})")
    items = task.heldout[:limit]
    chosen = [
        choose(item, scores)
        for item, scores in zip(items, option_scores(task, tokenizer, likelihood, "heldout", limit), strict=True)
    ]
    parts = {
        name: np.array([[float(choice[name] == item.label)] for item, choice in zip(items, chosen, strict=True)])
        for name in METRICS
    }
    metric = task.metric or METRICS[0]
    texts = [[item.options[choice[metric]]] for item, choice in zip(items, chosen, strict=True)]
    return Evaluation(
        task=task.name,
        questions=[item.question for item in items],
        answers=[item.answer for item in items],
        keys=[item.key for item in items],
        completions=texts,
        values=parts[metric],
        correct=parts[metric] == 1,
        parts=parts,
        tokens=np.array([[len(tokenizer.encode(t, add_special_tokens=False)) for t in row] for row in texts]),
        stopped=np.ones((len(items), 1), dtype=np.bool_),
        sampling=None,
        seed=seed,
        level=level,
    )


def _array(completions: Sequence[Sequence[Completion]], value: Any) -> NDArray[Any]:
    return np.array([[value(completion) for completion in row] for row in completions])
