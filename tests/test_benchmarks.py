"""Our side of the benchmark beside TRL: it trains the steps that it is asked for, on the rows that both sides get."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import generation, ours
from benchmarks.workload import CASES

from conftest import make_model, make_tokenizer

Sampler = Callable[[generation.Load, str], tuple[float, list[list[int]]]]


@pytest.mark.parametrize("name", list(CASES))
def test_a_case_takes_its_steps(name: str, tmp_path: Path) -> None:
    make_model(max_position_embeddings=4096).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    case = CASES[name]
    steps, loss, about = ours.run(case, 2, str(tmp_path))
    assert len(steps) == 2
    assert math.isfinite(loss)
    assert about["size"]
    for step in steps:
        assert len(step.groups) == case.batch
        if case.online:
            assert all(len(parts) == case.group for _, parts in step.groups)
    assert steps[0].ended < steps[1].ended


@pytest.mark.parametrize("side", [generation.ours, generation.transformers])
def test_both_sides_of_the_generation_benchmark_sample_what_is_asked(side: Sampler, tmp_path: Path) -> None:
    make_model(max_position_embeddings=256).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    load = generation.Load("tiny", prompts=3, samples=2, length=5, tokens=4)

    seconds, lengths = side(load, str(tmp_path))

    assert seconds > 0
    assert [len(row) for row in lengths] == [2, 2, 2]
    assert all(1 <= length <= 4 for row in lengths for length in row)


def test_the_roofline_of_generation_is_the_larger_of_work_and_reading() -> None:
    size = {"body": 100, "vocabulary": 10, "width": 4, "layers": 1, "heads": 1, "head_width": 4}
    load = generation.Load("tiny", prompts=1, samples=1, length=2, tokens=3)
    fast = {"size": size, "throughput": 1e18, "bytes": 280, "bandwidth": 70.0}
    slow = {"size": size, "throughput": 1.0, "bytes": 280, "bandwidth": 1e18}

    assert generation.roofline_seconds(fast, load, [[3]]) == 280 * 4 / 70
    # inputs 2 + 2, predicted 3, pairs 3 + (2 * 2 + 3): see forward_work
    assert generation.roofline_seconds(slow, load, [[3]]) == 2 * 100 * 4 + 2 * 10 * 4 * 3 + 4 * 4 * 10
