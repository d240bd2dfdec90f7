"""A compressed copy: the policy it was made from stays as it was; it is not trained, nor compressed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain import load, methods, quantize, train
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

BATCHES = [{"input_ids": torch.arange(24)[None] % 60, "use_cache": False}]
TEXTS = ["a text to calibrate on, of some length", "and another"]


def tiny(**config: Any) -> CausalPolicy:
    return CausalPolicy(make_model(**config), make_tokenizer(), "tiny")


def weights(policy: CausalPolicy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_the_given_policy_stays_as_it_was() -> None:
    policy = tiny()
    before = weights(policy)
    small = quantize(policy, methods.gptq(bits=3, group=16), TEXTS, show=False)
    assert isinstance(small, CompressedPolicy)
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())
    assert all(p.requires_grad for p in policy.model.parameters())
    assert small.compression.method == "gptq"
    assert small.compression.bits == pytest.approx(3 + 19 / 16)
    assert small.name == "tiny gptq"


def test_it_is_computed_in_the_order_of_the_seed() -> None:
    a, b = (quantize(tiny(), "gptq", TEXTS * 40, samples=4, length=16, seed=0, show=False, group=16) for _ in range(2))
    c = quantize(tiny(), "gptq", TEXTS * 40, samples=4, length=16, seed=1, show=False, group=16)

    def codes(policy: CausalPolicy) -> torch.Tensor:
        return policy.model.model.layers[0].mlp.up_proj.weight.codes

    assert torch.equal(codes(a), codes(b))
    assert not torch.equal(codes(a), codes(c))


def test_an_adapter_is_merged_first() -> None:
    policy = add_lora(tiny(), rank=2, seed=0)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    small = compressed_copy(policy, methods.rtn(bits=8, group=16), BATCHES)
    assert policy.adapted
    assert not small.adapted
    with torch.no_grad():
        expected, found = (p.model(BATCHES[0]["input_ids"]).logits for p in (policy, small))
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_it_is_not_trained(tmp_path: Path) -> None:
    small = compressed_copy(tiny(), methods.rtn(bits=4, group=16), BATCHES)
    folder = small.save(tmp_path / "small")
    message = r"is compressed \(rtn, 5\.25 bits a weight\) and cannot be trained: packed weights take no gradient"
    rows = [{"prompt": "p", "completion": "c"}] * 4
    for model in (small, folder):
        for settings in ({}, {"lora": 2}):
            with pytest.raises(PosttrainError, match=message):
                train(model, "sft", data=rows, steps=1, folder=tmp_path / "run", show=False, **settings)


def test_it_is_not_compressed_again(tmp_path: Path) -> None:
    small = compressed_copy(tiny(), methods.rtn(bits=4, group=16), BATCHES)
    for policy in (small, load(small.save(tmp_path / "small"))):
        with pytest.raises(PosttrainError, match=r"is compressed already \(rtn\); compress the float model instead"):
            quantize(policy, methods.gptq(bits=3, group=16), TEXTS, show=False)


def test_by_name_and_by_default_text(capsys: pytest.CaptureFixture[str]) -> None:
    small = quantize(tiny(), "rtn", samples=2, length=32, bits=5, group=16)
    assert small.compression.bits == pytest.approx(5 + 21 / 16)
    assert "rtn: blocks 2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "calibration", "options", "message"),
    [
        ("grpo", TEXTS, {}, "quantize: grpo does not compress; use train for it"),
        (methods.sft(), TEXTS, {}, "quantize: sft does not compress; use train for it"),
        ("gtpq", TEXTS, {}, "unknown method 'gtpq'; did you mean gptq"),
        (methods.rtn(group=16), TEXTS, {"bits": 3}, "quantize: rtn is made already; give bits where it is made"),
        ("rtn", [" ", ""], {"group": 16}, "there is no text in the texts given; expected a file of text, rows or a"),
        (
            "rtn",
            TEXTS,
            {"group": 16, "samples": 0},
            "quantize: samples is 0; input should be greater than or equal to 1",
        ),
        ("rtn", TEXTS, {"group": 16, "skip": ["*.mpl.*"]}, r"skip pattern '\*\.mpl\.\*' matches no linear layer"),
        ("rtn", TEXTS, {"group": 24}, "group 24 does not divide the 32 input columns"),
        ("rtn", "nosuch.txt", {"group": 16}, r"no file nosuch\.txt; expected a file"),
        ("rtn", "nosuch", {"group": 16}, "no file nosuch, and no task of that name"),
    ],
)
def test_mistakes(method: Any, calibration: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        quantize(tiny(), method, calibration, show=False, **options)
