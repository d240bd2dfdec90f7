from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.evaluation.choices import multiple_choice
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.evaluation import Evaluation, compare
from posttrain.evaluation.statistics import bootstrap, paired_test, pass_at_k, wilson
from posttrain.evaluation.task import Task, TaskItem
from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.verifiers import ExactMatch
from posttrain.rollout.engine import Progress
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling


class Scripted:
    """An engine for the bookkeeping: sample `j` of prompt `i` is right where `right(i, j)`, and then 2 tokens long."""

    def __init__(self, right: Any) -> None:
        self.right = right
        self.sampling: Sampling | None = None
        self.seed: int | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        self.sampling, self.seed = sampling, seed
        if progress is not None:
            progress(len(prompts) * samples, len(prompts) * samples)
        return [[self._one(p, bool(self.right(i, j))) for j in range(samples)] for i, p in enumerate(prompts)]

    @staticmethod
    def _one(prompt: Prompt, right: bool) -> Completion:
        length = 2 if right else 4
        logp = torch.zeros(length)
        text = f"Answer: {prompt.answer}" if right else "Answer: wrong"
        return Completion(torch.ones(length, dtype=torch.int64), logp, logp, "stop" if right else "length", text)


def task(n: int = 20, **changes: Any) -> Task:
    items = [TaskItem(f"question {i}", answer=f"a{i}") for i in range(n)]
    return Task(**{"name": "toy", "train": [], "heldout": items, "reward": reward_from("exact_match"), **changes})


def test_one_sample_is_greedy_and_gets_wilsons_interval(tiny_tokenizer: Any) -> None:
    engine = Scripted(lambda i, j: i < 7)
    calls: list[tuple[int, int]] = []
    result = evaluate(engine, tiny_tokenizer, task(), seed=9, progress=lambda a, b: calls.append((a, b)))
    assert (result.accuracy.value, result.accuracy.low, result.accuracy.high) == (0.35, *wilson(7, 20))
    assert result.summary() == "accuracy 35.0% [18.1, 56.7] (n=20)"
    assert (result.mean_tokens, result.share_stopped, result.mean_reward) == (pytest.approx(3.3), 0.35, 0.35)
    assert engine.sampling == Sampling(temperature=0.0)
    assert engine.seed == 9
    assert calls == [(20, 20)]
    assert result.pass_at_k[1] == result.accuracy
    assert result.completions[:1] == [["Answer: a0"]]
    assert result.questions[3] == "question 3"
    assert result.answers[3] == "a3"


def test_several_samples_get_pass_at_k_and_a_bootstrap_over_prompts(tiny_tokenizer: Any) -> None:
    engine = Scripted(lambda i, j: j < i % 5)
    result = evaluate(engine, tiny_tokenizer, task(), samples=4, ks=(1, 2, 4))
    counts = [i % 5 for i in range(20)]
    assert result.correct.sum(axis=1).tolist() == counts
    for k in (1, 2, 4):
        values = [pass_at_k(4, c, k) for c in counts]
        estimate = result.pass_at_k[k]
        assert estimate.value == pytest.approx(np.mean(values))
        assert (estimate.low, estimate.high) == bootstrap(values)
    assert result.accuracy.value == pytest.approx(np.mean(counts) / 4)
    assert engine.sampling == Sampling(temperature=1.0)
    assert result.summary().startswith("accuracy 50.0% [")
    assert "(n=20, 4 samples each), pass@2 " in result.summary()
    assert result.metrics()["pass@4"] == 0.8


def test_unanimous_prompts_still_have_an_interval_of_some_width(tiny_tokenizer: Any) -> None:
    never = evaluate(Scripted(lambda i, j: False), tiny_tokenizer, task(), samples=3)
    assert (never.accuracy.low, never.accuracy.high) == wilson(0, 20)
    always = evaluate(Scripted(lambda i, j: True), tiny_tokenizer, task(), samples=3, ks=(3,))
    assert (always.pass_at_k[3].low, always.pass_at_k[3].high) == wilson(20, 20)
    lone = evaluate(Scripted(lambda i, j: j), tiny_tokenizer, task(1), samples=2)
    assert math.isnan(lone.accuracy.low)


def test_the_sampling_of_the_caller_then_of_the_task(tiny_tokenizer: Any) -> None:
    engine = Scripted(lambda i, j: True)
    warm = task(sampling=Sampling(max_tokens=9, temperature=0.6))
    evaluate(engine, tiny_tokenizer, warm, samples=2)
    assert engine.sampling == Sampling(max_tokens=9, temperature=0.6)
    evaluate(engine, tiny_tokenizer, warm)
    assert engine.sampling == Sampling(max_tokens=9, temperature=0.0)
    evaluate(engine, tiny_tokenizer, warm, sampling=Sampling(temperature=0.3))
    assert engine.sampling == Sampling(temperature=0.3)


def test_reward_errors_are_counted_here_and_never_count_as_right(tiny_tokenizer: Any) -> None:
    def fragile(completion: str, prompt: Prompt) -> float:
        if prompt.answer in ("a1", "a2"):
            raise RuntimeError("no judge")
        return 1.0

    reward = Reward({"fragile": (fragile, 1.0), "exact": (ExactMatch(), 0.0)}, on_error=1.0)
    toy = task(4, reward=reward, metric="fragile")
    first = evaluate(Scripted(lambda i, j: True), tiny_tokenizer, toy)
    second = evaluate(Scripted(lambda i, j: True), tiny_tokenizer, toy)
    for result in (first, second):
        assert result.errors == {"fragile": 2}
        assert result.accuracy.value == 0.5
        assert result.summary().endswith("; 2 reward errors, the first: fragile: RuntimeError: no judge")
        assert result.parts["exact"].mean() == 1
        assert result.metrics()["reward_errors"] == 2
    assert reward.errors["fragile"] == 4


def test_json_gives_an_equal_evaluation_back(tiny_tokenizer: Any) -> None:
    result = evaluate(Scripted(lambda i, j: (i + j) % 3 == 0), tiny_tokenizer, task(5), samples=3, ks=(1, 3), seed=2)
    again = Evaluation.from_json(result.to_json())
    assert again.summary() == result.summary()
    assert again.metrics() == result.metrics()
    assert again.sampling == result.sampling
    assert again.keys == result.keys
    assert again.completions == result.completions
    for name in ("values", "correct", "tokens", "stopped"):
        assert getattr(again, name).dtype == getattr(result, name).dtype
        assert np.array_equal(getattr(again, name), getattr(result, name))
    assert again.to_json() == result.to_json()
    lone = evaluate(Scripted(lambda i, j: j), tiny_tokenizer, task(1), samples=2)
    strict = json.loads(lone.to_json(), parse_constant=lambda constant: pytest.fail(f"JSON has no {constant}"))
    assert strict["metrics"]["accuracy_low"] is None
    for bad in ("{}", "[1]", "no"):
        with pytest.raises(PosttrainError, match="no evaluation written by to_json"):
            Evaluation.from_json(bad)


def test_compare_pairs_prompts_by_key(tiny_tokenizer: Any) -> None:
    toy = task()
    a = evaluate(Scripted(lambda i, j: i < 5), tiny_tokenizer, toy)
    shuffled = task(heldout=list(reversed(toy.heldout)))
    b = evaluate(Scripted(lambda i, j: 19 - i < 12), tiny_tokenizer, shuffled)  # right on questions 0 to 11
    result = compare(a, b)
    assert result == paired_test([i < 5 for i in range(20)], [i < 12 for i in range(20)])
    assert result.difference == pytest.approx(0.35)
    assert result.pvalue == pytest.approx(2 / 2**7)
    assert compare(a, a).pvalue == 1
    with pytest.raises(PosttrainError, match="toy on 20 prompts and toy on 5 have 5 in common"):
        compare(a, evaluate(Scripted(lambda i, j: True), tiny_tokenizer, toy, limit=5))


def test_multiple_choice_picks_the_most_likely_option(tiny_tokenizer: Any) -> None:
    rows = [{"question": f"? {i}", "options": ["ab", "abcdefgh"], "label": i % 2} for i in range(4)]
    likelihood = lambda trajectories: [-4.0, -8.0] * (len(trajectories) // 2)  # noqa: E731 - normalised: -2, -1
    normalised = evaluate(None, tiny_tokenizer, multiple_choice(rows), likelihood=likelihood)
    assert normalised.completions == [["abcdefgh"]] * 4
    assert normalised.correct[:, 0].tolist() == [False, True, False, True]
    assert normalised.parts["total"][:, 0].tolist() == [1, 0, 1, 0]
    total = evaluate(None, tiny_tokenizer, multiple_choice(rows, metric="total"), likelihood=likelihood, limit=3)
    assert total.completions == [["ab"]] * 3
    assert total.accuracy.value == pytest.approx(2 / 3)
    assert total.sampling is None
    assert Evaluation.from_json(total.to_json()).summary() == total.summary()


def test_global_random_state_is_left_alone(tiny_tokenizer: Any) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    evaluate(Scripted(lambda i, j: (i + j) % 2), tiny_tokenizer, task(), samples=2, ks=(2,)).metrics()
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(
    ("toy", "options", "message"),
    [
        (task(0), {}, "task toy has no held-out problems"),
        (task(), {"ks": (2,)}, r"ks=\[2\] with samples=1"),
        (task(), {"ks": (0,)}, "1 <= k"),
        (task(), {"samples": 0}, "samples=0"),
        (task(), {"limit": 0}, "limit=0"),
        (task(), {"samples": 2, "sampling": Sampling(temperature=0)}, "2 samples at temperature 0 are all the same"),
        (multiple_choice([{"question": "?", "options": ["a", "b"], "label": 0}]), {}, "give likelihood="),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    toy: Task, options: dict[str, Any], message: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(PosttrainError, match=message):
        evaluate(Scripted(lambda i, j: True), tiny_tokenizer, toy, **options)
    with pytest.raises(PosttrainError, match="needs an engine"):
        evaluate(None, tiny_tokenizer, task())
