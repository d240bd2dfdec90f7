"""PASER by its parts: divergences, clusters, budgets, concepts, and the choice made of them in the loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from posttrain import methods
from posttrain.data.recovery import (
    ConceptGraph,
    Recovery,
    affinity,
    budgets_of,
    chosen,
    clustered,
    divergences,
    factored,
    jensen_shannon,
    key_phrases,
    similarities,
)
from posttrain.training.weights import KeepZeros
from posttrain.trajectory import PosttrainError
from tiny_training import demonstrations, make_policy, offline

pytestmark = pytest.mark.limit("paser")


def pruned_policy() -> Any:
    policy = make_policy()
    with torch.no_grad():
        for module in policy.model.modules():
            if isinstance(module, nn.Linear) and module is not policy.model.get_output_embeddings():
                module.weight.mul_(module.weight.abs() > module.weight.abs().median())
    return policy


# -- units of card 141 -------------------------------------------------------------------------------------------------


def test_divergence_is_symmetric_bounded_and_right() -> None:
    one, other = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = jensen_shannon(one, other)
    torch.testing.assert_close(found, jensen_shannon(other, one))
    assert (found > 0).all()
    assert (found <= math.log(2)).all()
    p, q = one.exp(), other.exp()
    m = (p + q) / 2
    expected = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(found, expected)
    apart = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    torch.testing.assert_close(jensen_shannon(apart[0], apart[1]), torch.tensor(math.log(2)))
    assert jensen_shannon(one, one).abs().max() < 1e-6


def test_a_model_that_was_not_pruned_departs_nowhere_and_shares_evenly() -> None:
    policy = make_policy()
    assert divergences(policy, make_policy(), demonstrations()).abs().max() < 1e-6
    assert budgets_of({0: 0.0, 1: 0.0, 2: 0.0}, 10) == {0: 4, 1: 3, 2: 3}


def test_divergence_of_a_row_is_the_mean_over_its_answer() -> None:
    policy, teacher, rows = pruned_policy(), make_policy(), demonstrations(3)
    found = divergences(policy, teacher, rows, budget=30)
    for row, value in zip(rows, found, strict=True):
        trajectory = row.trajectories[0]
        with torch.no_grad():
            one, other = (
                p.model(input_ids=trajectory.tokens[None]).logits[0].log_softmax(-1) for p in (policy, teacher)
            )
        places = trajectory.action_mask.nonzero()[:, 0] - 1
        assert float(value) == pytest.approx(float(jensen_shannon(one[places], other[places]).mean()), rel=1e-4)


def test_budgets_go_with_divergence_and_never_exceed_the_whole() -> None:
    assert budgets_of({0: 0.3, 1: 0.1, 2: 0.1}, 11) == {0: 7, 1: 2, 2: 2}
    for budget in range(1, 30):
        assert sum(budgets_of({0: 0.31, 1: 0.17, 2: 0.05}, budget).values()) == budget


def test_concepts() -> None:
    graph = ConceptGraph()
    assert graph.admits(["a", "b"])  # the first always
    assert graph.admits(["b", "c"])  # c is new
    assert not graph.admits(["a", "c"])  # both known, never together
    assert graph.admits(["a", "b", "d"])
    assert graph.admits(["d", "a"])
    assert not graph.admits(["d", "c"])


def test_key_phrases() -> None:
    # prime number, sum, three prime number, sum; by degree over frequency three is 3, prime and number 2.5, sum 1
    assert key_phrases("The Prime numbers. Sum of three prime numbers; the sum") == ["three prime number"]
    many = key_phrases("Red foxes, a quick dog and the deep forest path, of seven")
    assert many == ["deep forest path", "quick dog"]  # a third of four, rounded up; equal ones by the alphabet
    assert key_phrases("") == []
    assert key_phrases("Of the") == []


def test_blocks_of_alike_rows_are_the_clusters() -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = torch.block_diag(torch.ones(6, 6), torch.ones(9, 9)).double()
    found = factored(similarities(blocks, 2), 2, draw).argmax(1)
    assert len(found[:6].unique()) == len(found[6:].unique()) == 1
    assert found[0] != found[-1]
    states = torch.cat([torch.randn(n, 5, generator=draw) * 0.1 + at for n, at in ((20, 0.0), (30, 4.0), (10, -4.0))])
    for seed in range(3):
        names = clustered(states, 3, seed)
        assert [len(part.unique()) for part in names.split([20, 30, 10])] == [1, 1, 1]
        assert len(names.unique()) == 3


def test_affinity_of_rows_that_are_all_equal() -> None:
    assert torch.equal(affinity(torch.ones(4, 3).double()), torch.ones(4, 4).double())
    assert len(clustered(torch.ones(5, 3), 2)) == 5


def test_rows_are_taken_by_score_within_the_budgets_of_clusters() -> None:
    divergence = torch.tensor([0.6, 0.2, 0.4, 0.1, 0.1, 0.1])
    cluster = torch.tensor([0, 0, 0, 1, 1, 1])
    score = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.7, 0.6])
    assert chosen(divergence, cluster, score, 5) == ([0, 1, 2, 4], 0)  # 0.4 to 0.1 of 5: 4 (of 3) and 1
    assert chosen(divergence, cluster, score, 3) == ([0, 1, 2], 0)  # 2.4 and 0.6, and the remainder
    clash = [["x", "y"], ["x"], ["y"], ["z"], ["x", "z"], ["y", "z"]]
    assert chosen(divergence, cluster, score, 5, clash) == ([1, 2, 4], 1)  # 0 joins what stood apart; 4 brings z


# -- in the loop -------------------------------------------------------------------------------------------------------


def test_it_trains_on_the_chosen_rows_alone_and_keeps_zeros() -> None:
    policy = pruned_policy()
    projection = policy.model.get_output_embeddings()
    weights = [m.weight for m in policy.model.modules() if isinstance(m, nn.Linear) and m is not projection]
    gone = [w == 0 for w in weights]
    method = methods.paser(make_policy(), share=0.5, clusters=3, concepts=False)
    run = offline(method.with_settings(epochs=2, batch=3, learning_rate=1e-2), demonstrations(), policy)
    sampler = run.source.sampler
    assert isinstance(sampler, Recovery)
    assert len(sampler.kept) == run.source.rows <= 6
    assert run.total == 4  # two epochs over what is chosen
    metrics = run.advance()
    assert metrics["recovery/share"] == len(sampler.kept) / 12
    assert metrics["recovery/divergence"] >= 0.9 * metrics["recovery/divergence_all"] > 0
    taken = {i for _ in range(8) for i in sampler.take(3)}
    assert taken == set(sampler.kept)
    for weight, part in zip(weights, gone, strict=True):
        assert (weight[part] == 0).all()


def test_with_all_rows_and_weights_it_is_sft() -> None:
    method = methods.paser(make_policy(), share=1.0, concepts=False, clusters=1, keep_zeros=False)
    assert method.weight_rule is None
    one = offline(method.with_settings(steps=3, batch=4), demonstrations(), pruned_policy())
    other = offline(methods.sft().with_settings(steps=3, batch=4), demonstrations(), pruned_policy())
    for _ in range(3):
        assert one.advance()["loss"] == other.advance()["loss"]


def test_the_choice_is_the_same_each_time() -> None:
    kept = []
    for _ in range(2):
        sampler = Recovery(demonstrations(), 5, 0.5, 3)
        sampler.select(demonstrations(), pruned_policy(), make_policy())
        kept.append(sampler.kept)
    assert kept[0] == kept[1]


def test_mistakes_are_told() -> None:
    assert isinstance(methods.paser().weight_rule, KeepZeros)
    with pytest.raises(PosttrainError, match=r"^recovery: share is 0 and clusters 10; expected a share of the rows"):
        Recovery(demonstrations(), 0, 0)
    with pytest.raises(PosttrainError, match=r"^recovery: no teacher is given; expected the model as it was before"):
        offline(methods.paser(), demonstrations())
