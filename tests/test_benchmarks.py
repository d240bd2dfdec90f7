"""Our side of the benchmark beside TRL: it trains the steps that it is asked for, on the rows that both sides get."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks import ours
from benchmarks.workload import CASES

from conftest import make_model, make_tokenizer


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
