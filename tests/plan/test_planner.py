"""What the planner names: the first setting of its ladder that fits, and what would fit where none does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from posttrain import methods
from posttrain.plan.device import GIB, Device, parse_bytes, show_bytes, this_machine
from posttrain.plan.planner import USABLE, Planner
from posttrain.plan.rehearsal import Lengths
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

CONFIG = LlamaConfig(
    vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
TOY = Device("toy", "cuda", 80 * GIB, 1e14, 1e12, 1 << 20)
LENGTHS = Lengths(32, 96)
GRPO = methods.grpo().with_settings(batch=8, group=8, max_tokens=96, token_budget=2048)


REHEARSED: dict[tuple[str, int], dict[tuple[Any, ...], Any]] = {}  # what does not depend on the device's memory


def planner(memory: float = TOY.memory, method: Method = GRPO, gpus: int = 1) -> Planner:
    device = replace(TOY, memory=memory)
    made = REHEARSED.setdefault((repr(method), gpus), {})
    return Planner(CONFIG, method, LENGTHS, device, torch.bfloat16, gpus=gpus, name="toy-model", _made=made)


def test_what_fits_as_asked_stays_as_asked() -> None:
    plan = planner().plan()
    assert plan.fits is plan.asked
    assert plan.fits.changes == {}
    assert "fits as asked" in plan.sentence()
    assert plan.json()["fits"] is True


def test_each_rung_needs_less_and_the_first_that_fits_is_named() -> None:
    tried = planner(memory=1.0).plan().tried
    needs = [setting.needs for setting in tried]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == len(needs) >= 4
    for setting in tried:  # just enough memory for this one
        plan = planner(memory=setting.needs / USABLE + 1).plan()
        assert plan.fits is not None
        assert plan.fits.words() == setting.words()
        assert setting is tried[0] or setting.words() in plan.sentence()
    assert [s.words() for s in tried][1:3] == ["token_budget 128", "token_budget 128, checkpointing"]
    assert "lora 16" in tried[-1].words()


def test_where_nothing_fits_it_says_how_many_devices_would() -> None:
    smallest = min(s.needs for s in planner(memory=1.0).plan().tried)
    nothing = planner(memory=1.0).plan()
    assert nothing.fits is None
    assert nothing.gpus_needed is None
    assert "does not fit" in nothing.sentence()
    full = methods.sft().with_settings(batch=4, token_budget=128, lora=0)
    made = planner(memory=1.0, method=full)
    small = made.setting({"checkpointing": True}, 1)
    assert smallest > 0
    # a little less than full training in the thriftiest setting; a moving reference rules an adapter out
    following = full.replace(reference_decay=0.9)
    plan = planner(memory=0.8 * small.needs / USABLE, method=following).plan()
    assert plan.fits is None
    assert plan.gpus_needed is not None
    assert f"would fit {plan.gpus_needed} such devices" in plan.sentence()
    enough = planner(memory=0.8 * small.needs / USABLE, method=following, gpus=plan.gpus_needed).plan()
    assert enough.fits is not None


def test_more_devices_share_rows_and_state() -> None:
    one, four = planner(method=GRPO).setting({}, 1), planner(method=GRPO, gpus=4).setting({}, 4)
    assert four.rehearsal.sequences == one.rehearsal.sequences / 4
    assert four.needs < one.needs
    assert sum(four.seconds.values()) < sum(one.seconds.values())


def test_sequences_beyond_the_context_are_refused() -> None:
    with pytest.raises(PosttrainError, match="600 tokens exceed the context of 512"):
        Planner(CONFIG, methods.sft(), Lengths(300, 300), TOY, torch.bfloat16, name="toy").plan()


def test_a_method_with_a_teacher_wants_its_name() -> None:
    methods_of_one = (e.stages[0] for e in methods.registered().values() if e.kind in ("online", "offline"))
    wanting = next(m for m in methods_of_one if "teacher_logp" in m.objective.needs and m.teacher is None)
    with pytest.raises(PosttrainError, match="compares with a teacher"):
        Planner(CONFIG, wanting, Lengths(32, 32), TOY, torch.bfloat16).plan()


def test_amounts_of_memory() -> None:
    assert parse_bytes("80GiB") == 80 * GIB
    assert parse_bytes("24 gb") == 24e9
    assert parse_bytes("1.5T") == 1.5 * (1 << 40)
    for text in ("", "many", "0", "-3GB", "3 parsecs"):
        with pytest.raises(PosttrainError, match="no amount of memory"):
            parse_bytes(text)
    assert [show_bytes(n) for n in (2048, 3 << 20, 1.5 * GIB, 1 << 40)] == ["2 KiB", "3 MiB", "1.50 GiB", "1.00 TiB"]


def test_this_machine_is_measured() -> None:
    here = this_machine()
    assert here.throughput > 1e8
    assert here.bandwidth > 1e7
    assert here.memory > here.process > 0
