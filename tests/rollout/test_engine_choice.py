"""Which engine a model gets: the embedded one wherever it is exact."""

from __future__ import annotations

import pytest
import torch

from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.slots import Slots
from tiny_models import ARCHITECTURES, PACKING, make_policy


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_gets_its_engine(name, tiny_tokenizer):
    engine = engine_for(make_policy(name, tiny_tokenizer), rows=7)
    assert isinstance(engine, EmbeddedEngine if name in PACKING else PlainEngine)
    assert engine.rows == 7


def test_bf16_is_no_reason_for_the_plain_engine(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    policy.model.to(torch.bfloat16)
    assert isinstance(engine_for(policy), EmbeddedEngine)


def test_a_model_that_decodes_in_another_way_gets_the_plain_engine(tiny_tokenizer):
    """Packed rows agree, decoding one token at a time does not: as where a layer keeps a state of its own."""
    policy = make_policy("llama", tiny_tokenizer)

    def differ(module, args, kwargs, output):
        if kwargs["hidden_states"].shape[1] == 1:
            return (output[0] * 1.5, *output[1:])
        return output

    policy.model.model.layers[0].self_attn.register_forward_hook(differ, with_kwargs=True)
    assert policy.packs
    assert isinstance(engine_for(policy), PlainEngine)


def test_a_model_that_cannot_decode_in_slots_gets_the_plain_engine(tiny_tokenizer, monkeypatch):
    def fail(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(Slots, "attend", fail)
    assert isinstance(engine_for(make_policy("llama", tiny_tokenizer)), PlainEngine)


def test_a_model_is_tried_once(tiny_tokenizer):
    policy, calls = make_policy("llama", tiny_tokenizer), []
    first = engine_for(policy)
    policy.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert type(engine_for(policy)) is type(first)
    assert not calls
