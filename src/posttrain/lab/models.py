"""Small pre-trained models of the lab's worlds, built once by seed and kept in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from posttrain.data.sampler import Shuffled
from posttrain.lab import haste, worlds
from posttrain.lab import tokenizer as tokens_of
from posttrain.lab.cache import kept
from posttrain.lab.measuring import Headroom, measure
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.lab.worlds import world as border
from posttrain.lab.worlds.world import WorldTask
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import cache_folder, load
from posttrain.objective.advantage import Demonstration
from posttrain.objective.estimator import Objective
from posttrain.training.collect import Offline
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.settings import Schedule, Settings
from posttrain.trajectory import Group, PosttrainError

HEADROOM = "headroom.json"
PROBLEMS, SAMPLES = 150, 8  # held-out problems that a model is measured on, and completions of each
WATCHED_SEED = 10_007  # of the problems watched while a model is built; the finished one is measured on others


@dataclass(frozen=True)
class World:
    """A world by name, with the arguments that its function is called with."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def task(self, **options: Any) -> WorldTask:
        """Its task; `options` (`train`, `heldout`, `seed` and the world's own) go before `arguments`."""
        return worlds.find(self.name)(**{**self.arguments, **options})


@dataclass(frozen=True)
class Share:
    """A part of a pre-training corpus: a world, and its share of the rows (shares are relative to their sum)."""

    world: World
    share: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """What a small model is, and what it was trained on.

    task: what it is measured on and post-trained for. corpus: what it is pre-trained on: `rows` demonstrations.
    hidden, layers, heads, experts: sizes; a Llama, or a Mixtral with two active experts a token where `experts` > 0.
    steps, batch, learning_rate, schedule: of the pre-training, behind a short warm-up.
    until: the accuracy on held-out problems (of domain `watch`, or on average), sampled at temperature 1 and looked at
        every `check_every` steps, at which the pre-training stops before its last step: it decides how much is left to
        learn.
    """

    name: str
    task: World
    corpus: tuple[Share, ...]
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    experts: int = 0
    rows: int = 12_000
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 2e-3
    schedule: Schedule = "constant"
    until: float | None = None
    watch: str | None = None
    check_every: int = 25
    seed: int = 0

    @property
    def key(self) -> str:
        """Twelve digits of a hash of all of this and of the code that makes tokens, worlds and models."""
        code = [Path(str(m.__file__)).read_bytes() for m in self._modules()]
        code += [inspect.getsource(function).encode() for function in (pretrain, corpus, initial)]
        resolved = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        return hashlib.blake2b(b"\0".join([resolved.encode(), *code]), digest_size=6).hexdigest()

    def made(self) -> tuple[CausalPolicy, Headroom]:
        """The model, trained and measured."""
        return pretrain(self)

    def _modules(self) -> list[ModuleType]:
        """The tokenizer, and the modules of the lab that the worlds' functions are made of."""
        waiting = [worlds.find(w.name).__module__ for w in (self.task, *(s.world for s in self.corpus))]
        found = {tokens_of.__name__: tokens_of, border.__name__: border}
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = sys.modules[name]
                used = {str(getattr(value, "__module__", "")) for value in vars(found[name]).values()}
                waiting += [u for u in used if u.startswith(f"{worlds.__name__}.")]
        return [found[name] for name in sorted(found)]


def build(spec: ModelSpec, seed: int | None = None) -> CausalPolicy:
    """The model of a specification, in fp32 on the CPU: from the cache, or pre-trained now (about a minute).

    seed: in the place of the specification's: of the initial weights, the corpus and its order.
    """
    if seed is not None:
        spec = dataclasses.replace(spec, seed=seed)
    policy = load(folder_of(spec), precision="fp32", device="cpu")
    policy.name = f"lab:{spec.name}" + (f"@{spec.seed}" if spec.seed else "")
    return policy


def _hardly_trained(folder_of: Callable[[ModelSpec], Path], spec: ModelSpec) -> Path:
    """In haste: the real folder if it is there, else that of a model of the same shape and corpus."""
    real = cache_folder() / "lab" / f"{spec.name}-{spec.seed}-{spec.key}"
    return real if (real / HEADROOM).is_file() else folder_of(hastened(spec))


@haste.in_haste(_hardly_trained)
def folder_of(spec: ModelSpec) -> Path:
    """The `transformers` folder of a specification in the cache; made on first use, by one process at a time."""

    def make(scratch: Path) -> Path:
        policy, found = spec.made()
        made = policy.save(scratch / "model")
        (made / HEADROOM).write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        return made

    return kept(f"{spec.name}-{spec.seed}-{spec.key}", HEADROOM, make)


def hastened(spec: ModelSpec) -> ModelSpec:
    """The specification with a few steps of pre-training on as many rows as they take, measured on few problems."""
    steps = min(spec.steps, haste.MORE.get(spec.name, haste.STEPS))
    task = _FewHeldOut(spec.task.name, spec.task.arguments)
    return dataclasses.replace(spec, task=task, rows=min(spec.rows, steps * spec.batch), steps=steps, until=None)


class _FewHeldOut(World):
    """A world with few held-out problems, however many are asked for."""

    def task(self, **options: Any) -> WorldTask:
        return super().task(**{**options, "heldout": min(options.get("heldout", haste.PROBLEMS), haste.PROBLEMS)})


def headroom(spec: ModelSpec) -> Headroom:
    """What the built model can do before any post-training."""
    return Headroom(**json.loads((folder_of(spec) / HEADROOM).read_text()))


def pretrain(spec: ModelSpec) -> tuple[CausalPolicy, Headroom]:
    """Train a specification's model from its initial weights, and measure it."""
    policy = initial(spec)
    groups = corpus(spec)
    watched = spec.task.task(train=0, heldout=PROBLEMS, seed=WATCHED_SEED)
    reached = False

    def look(trainer: Trainer) -> dict[str, float]:
        nonlocal reached
        now = measure(policy, watched, samples=2, seed=trainer.progress.step)
        accuracy = now.domains[spec.watch] if spec.watch else now.accuracy
        reached = spec.until is not None and accuracy >= spec.until
        return {"heldout_accuracy": accuracy}

    settings = Settings(
        steps=spec.steps,
        batch=spec.batch,
        learning_rate=spec.learning_rate,
        schedule=spec.schedule,
        warmup=min(1.0, 50 / spec.steps),
        weight_decay=0.01,
        betas=(0.9, 0.98),
        token_budget=8192,
        evaluate_every=spec.check_every if spec.until is not None else 0,
        checkpoint_every=0,
    )
    method = Method(f"pretraining of {spec.name}", Objective(Demonstration()), "demonstrations", settings)
    source = Offline(groups, Shuffled(groups, spec.seed), settings)
    trainer = Trainer(policy, method, source, seed=spec.seed, evaluator=look, stop=lambda: reached)
    trainer.run()
    task = spec.task.task(train=0, heldout=PROBLEMS)
    return policy, dataclasses.replace(measure(policy, task, samples=SAMPLES), steps=trainer.progress.step)


def corpus(spec: ModelSpec) -> list[Group]:
    """The demonstrations that a model is pre-trained on, one a group."""
    total = sum(part.share for part in spec.corpus)
    if not spec.corpus or total <= 0 or any(part.share < 0 for part in spec.corpus):
        raise PosttrainError(
            f"{spec.name}: its corpus has shares {[p.share for p in spec.corpus]}; expected some above 0"
        )
    groups: list[Group] = []
    for place, part in enumerate(spec.corpus):
        task = part.world.task(train=0, heldout=0)
        items = task.corpus(round(spec.rows * part.share / total), seed=spec.seed * 1009 + place)
        groups += task.demonstrated(items, character_tokenizer())
    return groups


def initial(spec: ModelSpec) -> CausalPolicy:
    """The untrained model of a specification."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    tokenizer = character_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.heads,
        "max_position_embeddings": tokenizer.model_max_length,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.05,
    }
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(spec.seed)
        if spec.experts:
            sparse: dict[str, Any] = {
                "num_local_experts": spec.experts,
                "num_experts_per_tok": 2,
                "sliding_window": None,
            }
            model: Any = MixtralForCausalLM(MixtralConfig(**shape, intermediate_size=spec.hidden, **sparse))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=2 * spec.hidden))
    return CausalPolicy(model.eval(), tokenizer, f"lab:{spec.name}")
