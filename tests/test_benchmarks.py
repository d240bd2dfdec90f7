"""Our sides of the benchmarks: they do the work that they are asked for, and what is compared is like."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks import generation, ours, quantization
from benchmarks.measurement import Arm, Measurement
from benchmarks.run import CLEARLY, drop_slow
from benchmarks.summary import CaseResult
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


@pytest.mark.parametrize("side", ["ours", "transformers"])
def test_sides_of_the_generation_benchmark_sample_what_is_asked(side: generation.Side, tmp_path: Path) -> None:
    make_model(max_position_embeddings=256).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loads = [
        generation.Load("tiny", prompts=3, samples=2, length=5, tokens=4),
        generation.Load("other", prompts=2, samples=1, length=7, tokens=2),
    ]

    found = generation.measured(side, loads, str(tmp_path))

    for load, generated in zip(loads, found, strict=True):
        assert generated.seconds > 0
        assert [len(row) for row in generated.lengths] == [load.samples] * load.prompts
        assert all(1 <= length <= load.tokens for row in generated.lengths for length in row)


def test_no_prompt_of_the_generation_benchmark_is_met_twice() -> None:
    loads = [generation.Load(name, prompts=8, samples=1, length=4, tokens=1) for name in ("one", "other")]
    drawn = [
        tuple(p) for load in loads for use in ("warm-up", "timed") for p in generation.prompt_tokens(load, 999, use)
    ]
    assert len(set(drawn)) == len(drawn) == 32


def test_the_roofline_of_generation_is_the_larger_of_work_and_reading() -> None:
    size = {"body": 100, "vocabulary": 10, "width": 4, "layers": 1, "heads": 1, "head_width": 4}
    load = generation.Load("tiny", prompts=1, samples=1, length=2, tokens=3)
    fast = {"size": size, "throughput": 1e18, "bytes": 280, "bandwidth": 70.0}
    slow = {"size": size, "throughput": 1.0, "bytes": 280, "bandwidth": 1e18}

    assert generation.roofline_seconds(fast, load, [[3]]) == 280 * 4 / 70
    # inputs 2 + 2, predicted 3, pairs 3 + (2 * 2 + 3): see forward_work
    assert generation.roofline_seconds(slow, load, [[3]]) == 2 * 100 * 4 + 2 * 10 * 4 * 3 + 4 * 4 * 10


def test_an_arm_is_dropped_by_all_its_turns_not_by_the_last() -> None:
    def turns(*seconds: float) -> list[Measurement]:
        fields = dict.fromkeys(Measurement.__dataclass_fields__)
        return [Measurement(**{**fields, "seconds": [s]}) for s in seconds]

    slow, uneven, fast = Arm("fp32"), Arm("bf16"), Arm("bf16", pieces=4)
    repeated = {slow: turns(11.0, 11.0), uneven: turns(9.0, 10 * CLEARLY + 0.1), fast: turns(10.0, 10.0)}
    result = CaseResult(CASES["grpo"], [], repeated, {})
    drop_slow(result)
    assert set(result.repeated) == {uneven, fast}
    assert result.screened[slow].seconds == [11.0]


def test_the_weights_that_the_quantization_benchmark_judges_are_those_of_the_compressed_model(tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    make_model(max_position_embeddings=256).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} plus {i + 1} is {2 * i + 1}." for i in range(400)))
    quantization.prepare(model, str(text), tmp_path)

    found = {
        bits: quantization.ours(tmp_path, bits, 16, "integer", tmp_path / f"{bits}.safetensors") for bits in (2, 8)
    }
    coarse, fine = (quantization.judge(model, str(text), tmp_path, tmp_path / f"{bits}.safetensors") for bits in (2, 8))

    assert found[8]["bits"] == found[2]["bits"] + 6 + 6 / 16  # the zero point has as many bits as a code
    assert coarse["float"] == fine["float"]
    assert 0 < fine["kl"] < coarse["kl"] / 100
