"""Weighted k-means: the nearest centroid, the weighted mean, no empty ones, the same for the same seed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from posttrain.compress.solvers import kmeans
from posttrain.compress.solvers.kmeans import drawn_by, nearest, weighted_kmeans


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_the_nearest_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, table = drawn(57, 3), drawn(11, 3, 1)
    wanted = torch.cdist(vectors, table).argmin(1)
    assert torch.equal(nearest(vectors, table), wanted)
    monkeypatch.setattr(kmeans, "CHUNK", 22)
    assert torch.equal(nearest(vectors, table), wanted)


def test_one_centroid_is_the_weighted_mean() -> None:
    vectors, weights = drawn(20, 2), torch.rand(20, generator=torch.Generator().manual_seed(1))
    found = weighted_kmeans(vectors, weights, 1, iterations=3)
    torch.testing.assert_close(found[0], (vectors * weights[:, None]).sum(0) / weights.sum())


def test_a_vector_of_weight_two_counts_as_two_vectors() -> None:
    vectors = drawn(40, 2)
    doubled = weighted_kmeans(torch.cat([vectors, vectors[:9]]), torch.ones(49), 1)
    weighted = weighted_kmeans(vectors, torch.cat([torch.full((9,), 2.0), torch.ones(31)]), 1)
    torch.testing.assert_close(doubled, weighted)


def test_every_iteration_lowers_the_weighted_error() -> None:
    vectors, weights = drawn(500, 3), torch.rand(500, generator=torch.Generator().manual_seed(1)) + 0.1

    def error(iterations: int) -> float:
        table = weighted_kmeans(vectors, weights, 8, iterations=iterations, tolerance=0.0, sample=0)
        return float(((vectors - table[nearest(vectors, table)]).square().sum(1) * weights).sum())

    errors = [error(n) for n in range(1, 12)]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("distinct", [3, 8])
def test_no_more_different_vectors_than_centroids_are_found_exactly(distinct: int) -> None:
    different = drawn(distinct, 4)
    vectors = different[torch.randint(0, distinct, (200,), generator=torch.Generator().manual_seed(1))]
    vectors[:distinct] = different
    table = weighted_kmeans(vectors, torch.ones(200), 8)
    assert float((vectors - table[nearest(vectors, table)]).abs().max()) == 0.0


def test_vectors_that_the_sample_missed_count_where_the_sample_is_poor() -> None:
    vectors = torch.zeros(1000, 2)
    vectors[17] = 1.0  # hardly ever in a sample of 2 x 2
    table = weighted_kmeans(vectors, torch.ones(1000), 2, sample=2)
    assert sorted(table.sum(1).tolist()) == [0.0, 2.0]


def test_vectors_without_weight_have_no_say() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 1.0], [100.0, 100.0]])
    table = weighted_kmeans(vectors, torch.tensor([1.0, 1.0, 0.0]), 1)
    torch.testing.assert_close(table, torch.tensor([[0.5, 0.5]]))
    assert float(weighted_kmeans(vectors, torch.zeros(3), 2).abs().sum()) == 0.0


def test_no_centroid_stays_empty() -> None:
    near = 0.01 * drawn(300, 2)
    far = 10 + drawn(3, 2, 1)  # a random start among the many near ones leaves none for these
    vectors = torch.cat([near, far])
    table = weighted_kmeans(vectors, torch.ones(303), 4, iterations=25)
    assert len(nearest(vectors, table).unique()) == 4
    assert float((far - table[nearest(far, table)]).norm()) < 5


def test_the_same_seed_gives_the_same_table() -> None:
    vectors = drawn(5000, 2)
    first, again, other = (weighted_kmeans(vectors, torch.ones(5000), 16, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_vectors_are_drawn_as_often_as_they_weigh() -> None:
    weights = torch.tensor([1.0, 0.0, 3.0, 6.0])
    drawn = drawn_by(weights, 1000, torch.Generator().manual_seed(0))
    assert torch.bincount(drawn, minlength=4).tolist() == pytest.approx([100, 0, 300, 600], abs=1)


def test_few_heavy_vectors_decide_the_table_although_most_are_not_looked_at() -> None:
    draw = torch.Generator().manual_seed(0)
    light, heavy = torch.randn(40_000, 2, generator=draw), torch.randn(400, 2, generator=draw) * 20
    vectors, weights = torch.cat([light, heavy]), torch.cat([torch.ones(40_000), torch.full((400,), 1e4)])

    def error(table: torch.Tensor) -> float:
        return float(((vectors - table[nearest(vectors, table)]).square().sum(1) * weights).sum())

    some, every = (weighted_kmeans(vectors, weights, 16, sample=number) for number in (200, 0))
    assert error(some) < 1.2 * error(every)
