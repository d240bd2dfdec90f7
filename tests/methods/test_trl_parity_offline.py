"""Loss and gradient of every offline method that TRL 1.16 has too, against TRL's own trainers on the same rows.

Theirs: rows padded on the right by their collators, labels or masks on the prompt, the loss of their trainers.
Ours: packed rows without padding, the fused operator, the surrogate. The pad token is the end token.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_sides import (
    COMPLETIONS,
    END,
    PROMPTS,
    ROWS,
    Ours,
    assert_equal,
    dataset,
    make_ours,
    theirs,
    trainer_options,
    trajectory,
)

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.methods import Method
from posttrain.objective.batch import Batch
from posttrain.training.signals import mismatched
from posttrain.trajectory import Group, Label, Trajectory


@pytest.fixture(scope="module")
def ours() -> Ours:
    return make_ours()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trainer_options(tmp_path_factory.mktemp("trl"))


# -- supervised ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_supervised(name: str, ours: Ours, options: dict[str, Any]) -> None:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    trainer: Any = SFTTrainer(
        model=make_model(0),
        args=SFTConfig(**options, loss_type={"sft": "nll", "dft": "dft"}[name], max_length=64),
        train_dataset=dataset(prompt=["a", "b"], completion=["c", "d"]),
        processing_class=make_tokenizer(),
    )
    trainer.model.eval()
    rows = [trajectory(PROMPTS[g], COMPLETIONS[g][i]) for g, i in ROWS[1:8]]
    # a conversation of two turns: the user's second message stands between two answers
    talk = torch.tensor(PROMPTS[0] + COMPLETIONS[0][2] + PROMPTS[1] + COMPLETIONS[1][2])
    spoken = torch.zeros(len(talk), dtype=torch.bool)
    spoken[8:15], spoken[17:23] = True, True
    rows.append(Trajectory(talk, spoken))
    batch = Batch.of([Group([row]) for row in rows])
    method = methods.find(name).function()
    method.objective.advantage.prepare(batch)
    labels = [torch.where(r.action_mask, r.tokens, -100).tolist() for r in rows]
    examples = [{"input_ids": r.tokens.tolist(), "labels": label} for r, label in zip(rows, labels, strict=True)]
    collate = DataCollatorForLanguageModeling(pad_token_id=END)
    loss = trainer.compute_loss(trainer.model, collate(examples))
    assert_equal(ours.loss(method, batch), theirs(trainer.model, loss))
    # two accumulated micro-batches of unequal length, divided by the tokens of both
    count = torch.tensor(batch.totals.tokens)
    halves = [collate(examples[:3]), collate(examples[3:])]
    loss = sum(trainer.compute_loss(trainer.model, half, num_items_in_batch=count) for half in halves)
    assert_equal(ours.loss(method, batch), theirs(trainer.model, loss))


# -- preferences -----------------------------------------------------------------------------------------------------

PAIRS = [(PROMPTS[g], COMPLETIONS[g][i], COMPLETIONS[g][j]) for g, i, j in ((0, 0, 1), (1, 2, 3), (2, 3, 1), (0, 3, 2))]
PREFERENCES: dict[str, tuple[dict[str, Any], Method]] = {
    "sigmoid": ({"loss_types": ["sigmoid"], "beta": 0.1}, methods.dpo(0.1)),
    "ipo": ({"loss_types": ["ipo"], "beta": 0.3}, methods.ipo(0.3)),
    "hinge": ({"loss_types": ["hinge"], "beta": 0.1}, methods.hinge_dpo(0.1)),
    "robust": ({"loss_types": ["robust"], "beta": 0.1, "label_smoothing": 0.2}, methods.robust_dpo(0.1, 0.2)),
    "sigmoid_norm": ({"loss_types": ["sigmoid_norm"], "beta": 5.0}, methods.dpo_norm(5.0)),
    "apo_zero": ({"loss_types": ["apo_zero"], "beta": 0.1}, methods.apo_zero(0.1)),
    "apo_down": ({"loss_types": ["apo_down"], "beta": 0.1}, methods.apo_down(0.1)),
}


def preferences() -> Batch:
    sides: tuple[Label, Label] = ("chosen", "rejected")
    return Batch.of([
        Group([trajectory(prompt, answer, label=label) for answer, label in zip(answers, sides, strict=True)])
        for prompt, *answers in PAIRS
    ])  # fmt: skip


def collated(*, swap: bool = False) -> dict[str, Tensor]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    order = (2, 1) if swap else (1, 2)
    return DataCollatorForPreference(pad_token_id=END)(
        [{"prompt_ids": p[0], "chosen_ids": p[order[0]], "rejected_ids": p[order[1]]} for p in PAIRS]
    )


@pytest.fixture(scope="module")
def dpo_trainer(ours: Ours, options: dict[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    trainer: Any = DPOTrainer(
        model=make_model(0),
        ref_model=copy.deepcopy(ours.reference.model),
        args=DPOConfig(**options),
        train_dataset=dataset(prompt=["a", "b"], chosen=["c", "d"], rejected=["e", "f"]),
        processing_class=make_tokenizer(),
    )
    trainer.model.eval()
    return trainer


def dpo_loss(trainer: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    for name, value in settings.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    return trainer.compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str, ours: Ours, dpo_trainer: Any) -> None:
    settings, method = PREFERENCES[name]
    batch = preferences()
    batch.reference_logp = ours.logp(batch, ours.reference)
    method.objective.advantage.prepare(batch)
    loss = dpo_loss(dpo_trainer, collated(), **settings)
    assert_equal(ours.loss(method, batch), theirs(dpo_trainer.model, loss))


def test_label_smoothing(ours: Ours, dpo_trainer: Any) -> None:
    # TRL's sigmoid loss has no smoothing (since 1.0): by definition it mixes in the loss of the swapped pairs
    method = methods.dpo(0.1, label_smoothing=0.2)
    batch = preferences()
    batch.reference_logp = ours.logp(batch, ours.reference)
    settings = {"loss_types": ["sigmoid"], "beta": 0.1}
    loss = 0.8 * dpo_loss(dpo_trainer, collated(), **settings)
    loss = loss + 0.2 * dpo_loss(dpo_trainer, collated(swap=True), **settings)
    assert_equal(ours.loss(method, batch), theirs(dpo_trainer.model, loss))


@pytest.mark.parametrize("swap", [False, True], ids=["anchor-zero", "anchor-positive"])
def test_kto(swap: bool, ours: Ours, options: dict[str, Any]) -> None:
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    # with policy and reference exchanged the mean log-ratio of mismatched answers changes its sign
    if swap:
        ours = Ours(ours.reference, ours.policy)
    method = methods.kto(0.1, 1.5, 0.5)
    trainer: Any = KTOTrainer(
        model=copy.deepcopy(ours.policy.model),
        ref_model=copy.deepcopy(ours.reference.model),
        args=KTOConfig(**options, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5),
        train_dataset=dataset(prompt=["a", "b"], completion=["c", "d"], label=[True, False]),
        processing_class=make_tokenizer(),
    )
    trainer.model.eval()
    rows = [(PROMPTS[g], COMPLETIONS[g][i], i != 2) for g, i in ROWS[:3] + ROWS[5:9]]
    groups = [Group([trajectory(p, c, label="chosen" if good else "rejected")]) for p, c, good in rows]
    batch = Batch.of(groups)
    batch.reference_logp = ours.logp(batch, ours.reference)
    # TRL pairs a prompt with the answer of the row before, we with that of the row after
    other = mismatched(groups, limit=64)
    kl = other.sum(ours.logp(other) - ours.logp(other, ours.reference)).mean()
    assert bool(kl > 0) == swap
    batch.extras["mismatched_kl"] = kl.expand(batch.target.numel())
    method.objective.advantage.prepare(batch)
    examples = [
        {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": rows[(i + 1) % len(rows)][1], "label": good}
        for i, (p, c, good) in enumerate(rows)
    ]
    loss = trainer.compute_loss(trainer.model, DataCollatorForUnpairedPreference(pad_token_id=END)(examples))
    assert_equal(ours.loss(method, batch), theirs(trainer.model, loss))


def labelled() -> dict[str, Tensor]:
    """The pairs as the trainers of ORPO and CPO take them: right-padded, labels -100 on the prompt."""
    found: dict[str, Tensor] = {}
    for at, side in ((1, "chosen"), (2, "rejected")):
        columns: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for pair in PAIRS:
            prompt, answer = pair[0], pair[at]
            columns["input_ids"].append(torch.tensor(prompt + answer))
            columns["attention_mask"].append(torch.ones(len(prompt + answer), dtype=torch.int64))
            columns["labels"].append(torch.tensor([-100] * len(prompt) + answer))
        for (name, values), pad in zip(columns.items(), (END, 0, -100), strict=True):
            found[f"{side}_{name}"] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=pad)
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float, ours: Ours, options: dict[str, Any]) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer: Any = CPOTrainer(
        model=make_model(0),
        args=CPOConfig(**options, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5,
                       label_smoothing=smoothing, max_length=64),
        train_dataset=dataset(prompt=["a", "b"], chosen=["c", "d"], rejected=["e", "f"]),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.model.eval()
    method = methods.simpo(2.0, 0.5, smoothing)
    loss = trainer.compute_loss(trainer.model, labelled())
    assert_equal(ours.loss(method, preferences()), theirs(trainer.model, loss))


def test_orpo(ours: Ours, options: dict[str, Any]) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer: Any = ORPOTrainer(
        model=make_model(0),
        args=ORPOConfig(**options, beta=0.4, max_length=64),
        train_dataset=dataset(prompt=["a", "b"], chosen=["c", "d"], rejected=["e", "f"]),
        processing_class=make_tokenizer(),
    )
    trainer.model.eval()

    def at(beta: float) -> tuple[tuple[float, dict[str, Tensor]], tuple[float, dict[str, Tensor]]]:
        trainer.beta = beta
        loss = trainer.compute_loss(trainer.model, labelled())
        return ours.loss(methods.orpo(beta), preferences()), theirs(trainer.model, loss)

    (found, expected), (found_sft, expected_sft) = at(0.4), at(0.0)
    # TRL's SFT term counts the prompt's tokens too and is a mean over all tokens of the batch, ours over the answer's
    # tokens, pair by pair, as the paper has it: what beta adds is the same in both
    assert_equal(difference(found, found_sft), difference(expected, expected_sft))
    # and TRL's SFT term is our SFT on whole chosen sequences
    whole = Batch.of([Group([trajectory(prompt[:1], prompt[1:] + chosen)]) for prompt, chosen, _ in PAIRS])
    sft = methods.sft()
    sft.objective.advantage.prepare(whole)
    assert_equal(ours.loss(sft, whole), expected_sft)


def difference(
    one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]
) -> tuple[float, dict[str, Tensor]]:
    return one[0] - other[0], {name: g - other[1][name] for name, g in one[1].items()}
