"""Small Mamba language models of the lab's worlds."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from dataclasses import dataclass

import torch

from posttrain.data.sampler import Shuffled
from posttrain.lab.measuring import Headroom, measure
from posttrain.lab.models import ModelSpec, corpus
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.models.mixers import apart
from posttrain.objective.advantage import Demonstration
from posttrain.objective.estimator import Objective
from posttrain.training.collect import Offline
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.settings import Settings

PROBLEMS, SAMPLES = 40, 4  # that it is measured on: decoded one prompt at a time


@dataclass(frozen=True)
class MambaSpec(ModelSpec):
    """A specification whose model is a Mamba with channels of twice the hidden size. states: of each channel.

    It is trained for all of its steps; heads, experts and until say nothing here.
    """

    states: int = 8

    @property
    def key(self) -> str:
        code = "".join(inspect.getsource(function) for function in (initial, trained))
        return hashlib.blake2b(f"{super().key}{code}".encode(), digest_size=6).hexdigest()

    def made(self) -> tuple[CausalPolicy, Headroom]:
        policy = trained(self)
        task = self.task.task(train=0, heldout=PROBLEMS)
        return policy, dataclasses.replace(measure(policy, task, samples=SAMPLES), steps=self.steps)


def initial(spec: MambaSpec) -> CausalPolicy:
    """The untrained model of a specification."""
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = character_tokenizer()
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        state_size=spec.states,
        num_hidden_layers=spec.layers,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(spec.seed)
        return CausalPolicy(MambaForCausalLM(config).eval(), tokenizer, f"lab:{spec.name}")


def trained(spec: MambaSpec) -> CausalPolicy:
    """The model trained on its corpus, with its mixers taken apart so that it takes minutes and not hours."""
    policy, groups = initial(spec), corpus(spec)
    settings = Settings(
        steps=spec.steps,
        batch=spec.batch,
        learning_rate=spec.learning_rate,
        schedule=spec.schedule,
        warmup=min(1.0, 50 / spec.steps),
        weight_decay=0.01,
        betas=(0.9, 0.98),
        token_budget=8192,
        checkpoint_every=0,
    )
    method = Method(f"pretraining of {spec.name}", Objective(Demonstration()), "demonstrations", settings)
    with apart(policy.model):
        Trainer(policy, method, Offline(groups, Shuffled(groups, spec.seed), settings), seed=spec.seed).run()
    return policy
