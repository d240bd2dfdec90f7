"""Methods that place bits, as the catalogue makes them: their parts, a whole tiny model, a folder and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import load, methods
from posttrain.compress import files
from posttrain.compress.activations.ranges import ChannelRanges
from posttrain.compress.allocate.cptquant import BySensitivity
from posttrain.compress.allocate.sensitivity import Correlation, Pruning, Taylor
from posttrain.compress.balanced import SelfBalanced
from posttrain.compress.grids.table import Table
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.policy import compressed_copy
from posttrain.compress.solvers.affinity import AffinityGPTQ
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.q_vlm import JointClipping
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.solvers.slim import SliM
from posttrain.compress.solvers.slim_plus import MixedClipping
from tiny_models import VOCABULARY, make_policy

SMALL = {
    "slim-llm": methods.slim_llm(2, group=8, steps=4),
    "slim-llm-plus": methods.slim_llm_plus(3, group=8, epochs=1),
    "cptquant-cca": methods.cptquant_cca(4, group=16),
    "cptquant-pruning": methods.cptquant_pruning(4, group=16, by="linear", shares=(0.3,)),
    "cptquant-taylor": methods.cptquant_taylor(4, group=16, form="gradient"),
    "q-vlm": methods.q_vlm(6, group=16, ratios=(1.0, 0.8)),
    "moequant": methods.moequant(4),
}


def batches() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCABULARY, (4, 16), generator=draw) for _ in range(3)]
    return [{"input_ids": i, "use_cache": False} for i in ids]


def test_arguments_reach_the_parts() -> None:
    assert methods.slim_llm(3, group=64, salience=4.0, moved=2, one_bit="centred").solver == SliM(
        3, 64, moved=2, salience=4.0, one_bit="centred"
    )
    assert methods.slim_llm_plus(3, group=64, epochs=5).solver == MixedClipping(
        Uniform(3, 64), epochs=5, targets=("float", "prefix"), plan=SliM(3, 64)
    )
    made = methods.cptquant_pruning(3.5, group=64, by="linear", rule="tiers")
    assert made.solver == RoundToNearest(Uniform(4, 64))
    assert made.allocation == BySensitivity(Pruning(by="linear"), 3.5, "tiers", grid=Uniform(4, 64))
    assert methods.cptquant_cca(target="final").allocation == BySensitivity(Correlation(target="final"))
    assert methods.cptquant_taylor(epsilon=0.1).allocation == BySensitivity(Taylor(epsilon=0.1))
    made = methods.q_vlm(6, longest=2, mode="released")
    assert (made.solver, made.activations) == (JointClipping(Table(), longest=2, mode="released"), ChannelRanges(6))


def test_moequant_without_its_parts_is_gptq() -> None:
    grid = Uniform(4, 0, "none", "mse")
    assert methods.moequant().solver == AffinityGPTQ(grid)
    assert methods.moequant().calibration == SelfBalanced()
    plain = methods.moequant(affinity=False, balanced=False)
    assert plain.solver == GPTQ(grid)
    assert type(plain.calibration) is Calibrated


@pytest.mark.filterwarnings("ignore:no calibration token")
@pytest.mark.parametrize("made", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("name", ["llama", "opt", "qwen3-moe"])
def test_a_model_is_compressed_and_computes_about_the_same(name: str, made: Compression) -> None:
    model = make_policy(name, None, num_hidden_layers=1).base
    before = model(**batches()[0]).logits.detach()
    summary = compress_model(model, made, batches())
    error = float((model(**batches()[0]).logits.detach() - before).norm() / before.norm())
    assert 0 < error < 0.9
    assert len(summary.layers) == {"llama": 7, "opt": 6, "qwen3-moe": 4 + 4 * 3}[name]


@pytest.mark.filterwarnings("ignore:no calibration token")
@pytest.mark.parametrize("name", ["slim-llm", "slim-llm-plus", "cptquant-taylor", "q-vlm", "moequant"])
def test_it_is_read_from_its_folder(name: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    policy = make_policy("mixtral", tiny_tokenizer, vocab_size=len(tiny_tokenizer), num_hidden_layers=1)
    small = compressed_copy(policy, SMALL[name], batches())
    files.save(small, tmp_path / "small")
    again = load(tmp_path / "small", precision="fp32")
    torch.testing.assert_close(again.base(**batches()[0]).logits, small.base(**batches()[0]).logits)


def test_a_mean_of_bits_is_kept_by_every_score() -> None:
    for name in ("cptquant-cca", "cptquant-pruning", "cptquant-taylor"):
        model = make_policy("llama", None, num_hidden_layers=4).base
        summary = compress_model(model, SMALL[name], batches())
        beside = (16 + 4) / 16  # a scale and about four bits of zero point a group of 16
        assert 3.3 + beside < summary.bits <= 4 + beside + 0.1
