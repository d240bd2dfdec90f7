"""A rehearsal on tensors without memory beside the same training on real ones: byte for byte where both are counted."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from posttrain import methods
from posttrain.models import packed_linear
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.plan import rehearsal
from posttrain.plan.kernels import kernels
from posttrain.plan.ledger import Ledger
from posttrain.plan.outline import outline
from posttrain.plan.rehearsal import Lengths, rehearse
from posttrain.reward.reward import reward_from
from posttrain.rollout import embedded
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.slots import Slots
from posttrain.training.collect import Offline, Online
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.trajectory import Group, Prompt, Trajectory
from tiny_training import TOKENIZER, letters

FP32, BF16 = torch.float32, torch.bfloat16
LENGTHS = Lengths(prompt=20, completion=24)
SHAPE: dict[str, Any] = {
    "vocab_size": 700, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "normed": ("Qwen3", {"head_dim": 16}),
    "windowed": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    ),  # a soft cap
}
SMALL = {"batch": 4, "steps": 2, "token_budget": 100, "schedule": "constant", "warmup": 0.0}


def config(name: str) -> Any:
    import transformers

    family, differing = CONFIGS[name]
    return getattr(transformers, f"{family}Config")(**{**SHAPE, **differing})


def real(name: str, dtype: torch.dtype) -> CausalPolicy:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return CausalPolicy(AutoModelForCausalLM.from_config(config(name), dtype=dtype).eval(), TOKENIZER, name)


def group(members: int) -> Group:
    prompt = torch.randint(3, 700, (LENGTHS.prompt,))
    made = []
    for _ in range(members):
        tokens = torch.cat([prompt, torch.randint(3, 700, (LENGTHS.completion,))])
        made.append(Trajectory(tokens, torch.arange(len(tokens)) >= LENGTHS.prompt))
    if members == 2:
        made[0].label, made[1].label = "chosen", "rejected"
    return Group(made)


def trainer(policy: CausalPolicy, method: Method) -> Trainer:
    settings = method.settings
    if not settings.lora:
        policy.model.requires_grad_(True)
    trained = add_lora(policy, rank=settings.lora) if settings.lora else policy
    if method.online:
        prompts = [Prompt(torch.randint(3, 700, (LENGTHS.prompt,)), key=i) for i in range(settings.batch)]
        engine = EmbeddedEngine(trained, rows=settings.rollout_rows)
        sampler = method.sampler(prompts, 0)
        return Trainer(trained, method, Online(prompts, sampler, settings, engine, reward_from(letters), seed=0))
    groups = [group(2 if method.data == "preferences" else 1) for _ in range(settings.batch)]
    return Trainer(trained, method, Offline(groups, method.sampler(groups, 0), settings))


def saved(policy: CausalPolicy, batch: Batch) -> int:
    """Bytes of the storages that a forward pass keeps for its backward pass, parameters aside."""
    own = {id(p.untyped_storage()) for p in policy.model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.log_likelihood(batch)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


@pytest.mark.parametrize(("name", "dtype"), [("tied", FP32), ("normed", BF16), ("windowed", BF16)])
def test_activations_are_those_that_autograd_saves(name: str, dtype: torch.dtype) -> None:
    batch = Batch.of([group(3), group(1)])
    bare, ledger = outline(config(name), dtype), Ledger("meta")
    policy = real(name, dtype)
    assert policy.packs
    bare.model.requires_grad_(True).train()
    policy.model.requires_grad_(True).train()
    expected = saved(policy, batch)
    with kernels("cpu", ledger), ledger:
        assert saved(bare, batch) == pytest.approx(expected, rel=0.01)
    ledger = Ledger("meta")
    with kernels("cpu", ledger), ledger:
        ledger.hold(bare.model.parameters(), "weights")
        found = bare.log_likelihood(batch)
        # the ledger holds what autograd saves, and little else: the answer itself
        assert 0.99 * expected <= ledger.live["workspace"] <= 1.05 * expected
        del found
        assert ledger.live["workspace"] < 0.02 * expected


@pytest.mark.parametrize(("dtype", "lora"), [(FP32, 0), (BF16, 0), (BF16, 4)])
def test_state_is_the_optimizers_and_the_models(dtype: torch.dtype, lora: int) -> None:
    method = methods.sft().with_settings(**SMALL, lora=lora)
    made = trainer(real("tied", dtype), method)
    made.run()
    state = made.optimizer.tensors()
    parts = rehearse(config("tied"), method, LENGTHS, dtype).peak.parts
    moments = sum(t.nbytes for name, t in state.items() if name.startswith("exp_avg"))
    masters = sum(t.nbytes for name, t in state.items() if name.startswith("weight/"))
    weights = {p.data_ptr(): p.nbytes for p in made.policy.model.parameters()}
    assert parts["moments"] == moments
    assert parts.get("masters", 0) == (masters if dtype == torch.bfloat16 else 0)
    assert parts["gradients"] == masters  # an fp32 number for each trained one, when the second micro-batch begins
    # beside the parameters, the frequencies of rotary positions
    assert sum(weights.values()) <= parts["weights"] <= sum(weights.values()) + 1024


CASES: dict[str, Method] = {
    "sft": methods.sft(),
    "sft-lora": methods.sft().with_settings(lora=4),
    "sft-checkpointing": methods.sft().with_settings(checkpointing=True),
    "dpo": methods.dpo(),
    "ppo": methods.ppo().with_settings(group=2, max_tokens=LENGTHS.completion, updates=2),
}


@pytest.mark.parametrize(("case", "dtype"), [(name, FP32 if name == "sft" else BF16) for name in CASES])
def test_the_peak_is_that_of_real_training(case: str, dtype: torch.dtype) -> None:
    """Counted, not timed: every tensor of two real steps on the CPU, beside the rehearsal. What the rehearsal leaves
    out, the objective's few numbers a token, weighs more in a model this small than in any other.
    """
    method = CASES[case].with_settings(**SMALL)
    policy = real("normed", dtype)
    assert policy.packs
    policy.tokenizer = _Endless(policy.tokenizer)  # so that completions have the length that is planned for
    policy.model.generation_config.eos_token_id = None
    ledger = Ledger("cpu")
    with ledger:
        ledger.hold([*policy.model.parameters(), *policy.model.buffers()], "weights")
        trainer(policy, method).run()
    planned = rehearse(config("normed"), method, LENGTHS, dtype, device="cpu")
    live = planned.peak.bytes - planned.peak.parts.get("kept", 0)
    assert live == pytest.approx(ledger.peak.bytes, rel=0.1)


class _Endless:
    """A tokenizer whose text never ends."""

    eos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def endless(name: str, dtype: torch.dtype, rows: int) -> tuple[CausalPolicy, Method]:
    """A policy whose completions have all of their tokens, and a step of GRPO that decodes so many at once."""
    policy = real(name, dtype)
    policy.tokenizer = _Endless(policy.tokenizer)
    policy.model.generation_config.eos_token_id = None
    settings = SMALL | {"steps": 1, "group": 4, "max_tokens": LENGTHS.completion, "rollout_rows": rows}
    return policy, methods.grpo().with_settings(**settings)


def test_the_cache_is_that_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Slots] = []

    class Kept(Slots):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            kept.append(self)

    policy, method = endless("normed", torch.float32, rows=8)
    with ExitStack() as stack:
        stack.callback(monkeypatch.undo)
        monkeypatch.setattr(embedded, "Slots", Kept)
        trainer(policy, method).run()
    held = sum(t.nbytes for store in (kept[0].keys, kept[0].values) for t in store.values())
    planned = rehearse(config("normed"), method, LENGTHS, torch.float32)
    one = held / (2 * SHAPE["num_hidden_layers"])  # which is there twice while it grows
    assert held <= planned.phases["decode"].parts["cache"] <= held + one + 256
    assert planned.rows == 8
    assert planned.waves == 2


@pytest.mark.skipif(not packed_linear.available(), reason="this PyTorch has no products with packed weights")
@pytest.mark.parametrize("name", ["tied", "normed"])
def test_copies_for_decoding_are_those_that_the_engine_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    packed = packed_linear._packed

    def noted(weight: Tensor) -> Tensor:
        made.append(weight.nbytes)
        return packed(weight)

    policy, method = endless(name, BF16, rows=4)
    with ExitStack() as stack:
        stack.callback(monkeypatch.undo)
        monkeypatch.setattr(packed_linear, "_packed", noted)
        trainer(policy, method).run()
    planned = rehearse(config(name), method, LENGTHS, BF16).phases["decode"].parts["workspace"]
    monkeypatch.setattr(rehearsal, "weights_to_pack", lambda *_: [])
    without = rehearse(config(name), method, LENGTHS, BF16).phases["decode"].parts["workspace"]
    assert made
    assert planned - without == sum(made)


def test_work_is_that_of_the_products() -> None:
    """Two operations a parameter of the linear layers and a token forward, twice that backward; likewise the vocabulary
    for predicted tokens, whose logits are computed again in the backward pass; attention beside.
    """
    method = methods.sft().with_settings(**SMALL | {"batch": 2})
    planned = rehearse(config("tied"), method, LENGTHS, torch.float32)
    policy = real("tied", torch.float32)
    linear = sum(m.weight.numel() for m in policy.body.modules() if isinstance(m, torch.nn.Linear))
    inputs = 2 * (LENGTHS.prompt + LENGTHS.completion - 1)
    least = 6 * linear * inputs + 8 * 700 * 64 * 2 * LENGTHS.completion
    assert least <= planned.work["update"] <= 1.25 * least
    twice = rehearse(config("tied"), methods.sft().with_settings(**SMALL | {"batch": 4}), LENGTHS, torch.float32)
    assert twice.work["update"] == pytest.approx(2 * planned.work["update"], rel=0.01)


def test_pieces_are_shares_of_the_state() -> None:
    """A trained weight is its fp32 master's piece alone, as in `models/sharded.py`; gathered blocks come beside."""
    method = methods.dpo().with_settings(**SMALL)
    whole, parted = (rehearse(config("tied"), method, LENGTHS, torch.bfloat16, device="cuda", shards=n) for n in (1, 4))
    for part in ("masters", "moments", "gradients", "reference"):
        assert parted.peak.parts[part] == whole.peak.parts[part] / 4
    assert parted.peak.parts["weights"] < 1024  # rotary frequencies
    assert parted.peak.parts["workspace"] > 0


def test_rollouts_see_the_weights_whole() -> None:
    method = methods.grpo().with_settings(**SMALL, group=2, max_tokens=LENGTHS.completion)
    whole, parted = (rehearse(config("tied"), method, LENGTHS, torch.bfloat16, device="cuda", shards=n) for n in (1, 4))
    weights = whole.phases["decode"].parts["weights"]
    assert parted.phases["decode"].parts["weights"] == pytest.approx(weights, rel=1e-3)  # rotary frequencies aside
    assert parted.phases["decode"].parts["moments"] == whole.phases["decode"].parts["moments"] / 4
