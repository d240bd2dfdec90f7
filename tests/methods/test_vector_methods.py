"""VPTQ and decoupleQ as the catalogue makes them: their parts, a whole tiny model, a folder and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import load, methods
from posttrain.compress import files
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.policy import compressed_copy
from posttrain.compress.solvers.decoupleq import DecoupleQ
from posttrain.compress.solvers.vptq import VPTQ
from posttrain.trajectory import PosttrainError
from tiny_models import VOCABULARY, make_policy

SMALL = {
    "vptq": methods.vptq(2, vector=2),
    "vptq, in groups": methods.vptq(3, vector=2, outliers=0.1, groups=2, normalise=True),
    "vptq, residual": methods.vptq(3, vector=2, residual=2),
    "decoupleq": methods.decoupleq(2, group=16, epochs=1),
    "decoupleq, symmetric": methods.decoupleq(3, symmetric=True, epochs=1),
}


def batches() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCABULARY, (4, 16), generator=draw) for _ in range(3)]
    return [{"input_ids": i, "use_cache": False} for i in ids]


def test_arguments_reach_the_parts() -> None:
    made = methods.vptq(3, vector=4, residual=4, groups=2, outliers=0.02, damping=0.1, permute=False, refit=3)
    assert made.solver == VPTQ(3, 4, 4, 0.15, 2, 0.02, 0.1, permute=False, refit=3)
    made = methods.decoupleq(3, group=64, rounds=2, rounding="train", damping=0.1, epochs=0, norms=False)
    assert made.solver == DecoupleQ(3, 64, 0.1, 2, "train", epochs=0, norms=False)
    with pytest.raises(PosttrainError, match="bits is 0"):
        methods.vptq(0)


@pytest.mark.parametrize("made", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_model_is_compressed_and_computes_about_the_same(name: str, made: Compression) -> None:
    model = make_policy(name, None, num_hidden_layers=1).base
    before = model(**batches()[0]).logits.detach()
    summary = compress_model(model, made, batches())
    error = float((model(**batches()[0]).logits.detach() - before).norm() / before.norm())
    assert 0 < error < 0.9
    assert len(summary.layers) == (7 if name == "llama" else 6)


@pytest.mark.parametrize("made", SMALL.values(), ids=SMALL)
def test_it_is_read_from_its_folder(made: Compression, tmp_path: Path, tiny_tokenizer: Any) -> None:
    policy = make_policy("llama", tiny_tokenizer, vocab_size=len(tiny_tokenizer), num_hidden_layers=1)
    small = compressed_copy(policy, made, batches())
    files.save(small, tmp_path / "small")
    again = load(tmp_path / "small", precision="fp32")
    wanted = small.base(**batches()[0]).logits
    torch.testing.assert_close(again.base(**batches()[0]).logits, wanted)


def test_the_same_seed_gives_the_same_model() -> None:
    found = []
    for _ in range(2):
        model = make_policy("llama", None, num_hidden_layers=1).base
        compress_model(model, methods.vptq(2, vector=2), batches(), seed=5)
        found.append(model(**batches()[0]).logits)
    assert torch.equal(*found)


def test_without_text_it_says_so() -> None:
    with pytest.raises(PosttrainError, match="calibration is empty"):
        compress_model(make_policy("llama", None, num_hidden_layers=1).base, methods.vptq(), [])
