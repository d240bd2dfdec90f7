"""KTO's anchor: the divergence of answers put behind another row's prompt, as the training loop supplies it."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.training.signals import Reference, mismatched, supply
from posttrain.trajectory import Group, PosttrainError, Trajectory


def row(prompt: list[int], answer: list[int]) -> Group:
    tokens = torch.tensor(prompt + answer)
    return Group([Trajectory(tokens, torch.arange(len(tokens)) >= len(prompt), label="chosen")])


ROWS = [row([11], [12, 13]), row([21, 22, 23], [24]), row([31, 32], [33, 34, 35])]


def test_every_prompt_gets_the_answer_of_the_next_row() -> None:
    other = mismatched(ROWS, limit=64)
    assert [t.tolist() for t in other.tokens] == [[11, 24], [21, 22, 23, 33, 34, 35], [31, 32, 12, 13]]
    assert other.target.tolist() == [24, 33, 34, 35, 12, 13]


def test_words_between_the_turns_of_an_answer_stay_out_of_it() -> None:
    talk = Trajectory(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([False, True, False, True, True]))
    other = mismatched([ROWS[1], Group([talk])], limit=64)
    assert other.tokens[0].tolist() == [21, 22, 23, 2, 3, 4, 5]
    assert other.target.tolist() == [2, 4, 5, 24]


def test_answers_are_cut_where_the_context_ends() -> None:
    # every row fits into six tokens, the longest prompt with the longest answer does not
    rows = [row([1, 2, 3, 4, 5], [6]), row([7], [8, 9, 10, 11, 12])]
    other = mismatched(rows, limit=6)
    assert [t.tolist() for t in other.tokens] == [[1, 2, 3, 4, 5, 8], [7, 6]]
    assert other.target.tolist() == [8, 6]


def test_a_single_row_has_no_other_answer() -> None:
    with pytest.raises(PosttrainError, match="at least 2 rows a step"):
        mismatched(ROWS[:1], limit=64)


def test_the_signal_is_the_mean_log_ratio_of_those_answers_over_the_step() -> None:
    policy = CausalPolicy(make_model(0, max_position_embeddings=6), make_tokenizer())
    reference = Reference(policy)
    with torch.no_grad():  # the policy moved on since the stage began
        for p in policy.model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    batch = Batch.of(ROWS)
    needs = frozenset({"reference_logp", "mismatched_kl"})
    supply(needs, batch, ROWS, policy, reference, None, temperature=1.0, budget=4)  # type: ignore[arg-type]
    other = mismatched(ROWS, limit=6)
    with torch.no_grad(), reference.active() as frozen:
        ratio = policy.log_likelihood(other).logp - frozen.log_likelihood(other).logp
    found = batch.extras["mismatched_kl"]
    assert found.shape == batch.target.shape
    torch.testing.assert_close(found, other.sum(ratio).mean().expand(len(found)), rtol=1e-5, atol=1e-5)
    assert abs(float(found[0])) > 1e-3
    assert batch.old_logp is None
