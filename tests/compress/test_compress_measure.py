"""What a compression costs and brings, in figures."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.compress.measure import decoding_rate, in_megabytes, measure, model_bytes
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.policy import compressed_copy
from posttrain.evaluation.perplexity import predict, windows
from posttrain.models.causal import CausalPolicy

BATCHES = [{"input_ids": torch.arange(24)[None] % 60, "use_cache": False}]


def tiny(**config) -> CausalPolicy:
    return CausalPolicy(make_model(**config), make_tokenizer(), "tiny")


def test_bytes_count_what_is_tied_once() -> None:
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    assert model_bytes(tied.model) == 4 * sum(p.numel() for p in tied.model.parameters())
    assert model_bytes(untied.model) - model_bytes(tied.model) == 4 * 259 * 32
    assert model_bytes(tied.model.to(torch.bfloat16)) == 2 * sum(p.numel() for p in tied.model.parameters())


def test_bytes_of_a_compressed_model_are_those_of_its_bits() -> None:
    small = compressed_copy(tiny(), methods.rtn(bits=4, group=16), BATCHES)
    weights = sum(m.weight.shape[0] * m.weight.shape[1] for m in small.model.modules() if isinstance(m, PackedLinear))
    rest = 4 * sum(p.numel() for p in small.model.parameters())
    assert model_bytes(small.model) == pytest.approx(small.compression.bits * weights / 8 + rest, rel=0.03)


def test_a_measurement_is_of_both_models() -> None:
    policy = tiny()
    small = compressed_copy(policy, methods.rtn(bits=3, group=16), BATCHES)
    parts = windows(torch.arange(60) % 50, 20)
    found = measure(small, policy, parts)
    assert found.perplexity_before == predict(policy, parts).perplexity
    assert found.perplexity == predict(small, parts).perplexity
    assert found.kl > 0
    assert (found.layers, found.tokens, found.method) == (14, 57, "rtn")
    assert (found.bytes_before, found.bytes_after) == (model_bytes(policy.model), model_bytes(small.model))
    assert 0 < found.error < 1


def test_the_rate_of_decoding() -> None:
    small = compressed_copy(tiny(), methods.rtn(bits=3, group=16), BATCHES)
    assert decoding_rate(small, tokens=4) > 0
    assert decoding_rate(tiny(max_position_embeddings=8), tokens=12) > 0, "several short completions"


def test_sizes_in_words() -> None:
    assert in_megabytes(128_400_000) == "128.4 MB"
    assert in_megabytes(41_234) == "0.041 MB"
