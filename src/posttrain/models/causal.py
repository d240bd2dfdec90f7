"""The causal language model as a policy: log-likelihoods of packed batches, saving, freezing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.models.attention import LayerState, packed_attention
from posttrain.models.packing import pack
from posttrain.models.routing import routed
from posttrain.models.saving import save_model
from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.logprob import Divergence, Head, token_statistics
from posttrain.trajectory import Group, PosttrainError, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalPolicy:
    """A `transformers` causal language model and its tokenizer.

    Rows are packed where the model's attention can be told who may look at whom (checked once against the model's own
    padded forward pass, see `packs`); other models (state-space layers, attention sinks) are computed padded, with the
    same result.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._packs: bool | None = None

    # -- what the model is -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the positions of the model allow."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 20)

    @property
    def end_tokens(self) -> set[int]:
        """Token ids that end a completion (the generation config's, else the tokenizer's)."""
        ends: set[int] = set()
        for value in (getattr(self.model.generation_config, "eos_token_id", None), self.tokenizer.eos_token_id):
            ends |= set(value) if isinstance(value, (list, tuple)) else {value} if value is not None else set()
        return ends

    @property
    def adapted(self) -> bool:
        """Whether a LoRA (or other peft) adapter is being trained."""
        return hasattr(self.model, "get_base_model")

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def base(self) -> PreTrainedModel:
        """The `transformers` model, inside the adapter wrapper if there is one."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def body(self) -> nn.Module:
        """The decoder without its vocabulary projection."""
        base = self.base
        for found in (base.get_decoder(), base.base_model, getattr(base, "model", None)):
            if isinstance(found, nn.Module) and found is not base:
                return found
        raise PosttrainError(f"{self.name}: {type(base).__name__} has no decoder; expected a causal language model")

    def head(self, temperature: float = 1.0) -> Head:
        """The vocabulary projection with the scales and caps that the model's own forward pass applies."""
        projection = self.base.get_output_embeddings()
        if projection is None:
            raise PosttrainError(
                f"{self.name}: the model has no vocabulary projection; expected a causal language model"
            )
        if hasattr(projection, "base_layer"):
            raise PosttrainError(
                f"{self.name}: the adapter is on the vocabulary projection, which is not supported; leave it out of "
                f"target_modules (all-linear does)"
            )
        config = self.base.config.get_text_config()
        scale = float(getattr(config, "logit_scale", 0) or 1.0)
        if getattr(config, "logits_scaling", None):
            scale /= float(config.logits_scaling)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(projection.weight, getattr(projection, "bias", None), scale, softcap, temperature)

    # -- likelihood --------------------------------------------------------------------------------------------------

    def log_likelihood(
        self,
        batch: Batch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        reference: Likelihood | None = None,
        divergence: Divergence = "reverse",
        experts: bool = False,
    ) -> Likelihood:
        """Log-probability of each action token given what precedes it in its sequence, at `temperature`.

        reference: another policy's answer for the same batch (its hidden states and head); adds the divergence to it.
        experts: also say which experts each token was sent to. Experts that the batch carries are replayed.
        """
        if max(len(t) for t in batch.tokens) > self.max_length:
            longest = max(len(t) for t in batch.tokens)
            raise PosttrainError(f"a sequence of {longest} tokens exceeds the model's context of {self.max_length}")
        chosen: list[Tensor] | None = [] if experts else None
        hidden = self._packed_hidden(batch, chosen) if self.packs else self._padded_hidden(batch, chosen)
        head = self.head(temperature)
        against = None
        if reference is not None:
            if reference.hidden is None or reference.head is None:
                raise ValueError("a full-vocabulary divergence needs the reference's hidden states and head")
            against = (reference.hidden, reference.head)
        found = token_statistics(
            hidden, batch.target.to(hidden.device), head, entropy=entropy, reference=against, divergence=divergence
        )
        return Likelihood(found.logp, found.entropy, found.divergence, hidden, head, experts=chosen)

    @contextmanager
    def recomputing(self, wanted: bool = True) -> Iterator[None]:
        """Inside, a layer in training keeps its input alone for the backward pass and computes the rest again there
        (activation checkpointing): less memory, a third more work, the same result.
        """
        if not wanted:
            yield
            return
        try:
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise PosttrainError(
                f"{self.name}: {type(self.base).__name__} cannot compute its layers again; set checkpointing: false"
            ) from error
        try:
            yield
        finally:
            self.base.gradient_checkpointing_disable()

    def hidden_states(self, batch: Batch) -> Tensor:
        """`[M, width]` final hidden states that predict the action tokens, without their log-probabilities."""
        return self._packed_hidden(batch) if self.packs else self._padded_hidden(batch)

    def _packed_hidden(self, batch: Batch, chosen: list[Tensor] | None = None, **options: Any) -> Tensor:
        """`[M, width]` hidden states that predict the targets, from one packed row."""
        layout = pack(batch).to(self.device)
        experts = routed(self.model, batch.experts, layout.inputs, len(layout.tokens), chosen)
        with packed_attention(self.model), experts:
            out = self.body(
                input_ids=layout.tokens[None],
                position_ids=layout.positions[None],
                use_cache=False,
                packed_layout=layout,
                **options,
            )
        return out.last_hidden_state[0].index_select(0, layout.source)

    def _padded_hidden(self, batch: Batch, chosen: list[Tensor] | None = None) -> Tensor:
        """The same from right-padded rows with the model's own attention."""
        rows = self._padded(batch)
        count, width = rows["input_ids"].numel(), rows["input_ids"].shape[1]

        def places() -> list[Tensor]:
            return [torch.arange(s * width, s * width + len(t)) for s, t in enumerate(batch.tokens)]

        with routed(self.model, batch.experts, places, count, chosen):
            out = self.body(**rows, use_cache=False).last_hidden_state
        return out[batch.sequence.to(self.device), (batch.place - 1).to(self.device)]

    def _padded(self, batch: Batch) -> dict[str, Tensor]:
        width = max(len(t) for t in batch.tokens)
        tokens, mask = (torch.zeros(len(batch), width, dtype=torch.int64) for _ in range(2))
        for row, sequence in enumerate(batch.tokens):
            tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        return {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}

    # -- what the model can do, tried once -----------------------------------------------------------------------------

    @property
    def packs(self) -> bool:
        """Whether packed rows give this model's own hidden states (tried once on a few random tokens)."""
        if self._packs is None:
            with torch.no_grad(), evaluating(self.model):
                self._packs = self._try_packing()
        return self._packs

    def _try_packing(self) -> bool:
        probe = self._probe()
        plain = self._padded_hidden(probe).float()
        self._check_head(probe, plain)
        captured: dict[int, LayerState] = {}
        try:
            packed = self._packed_hidden(probe, captured=captured).float()
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        return self._every_layer_known(captured) and self._close(plain, packed)

    def _probe(self) -> Batch:
        """A group that shares a prompt, and a sequence alone."""
        vocabulary = self.head().weight.shape[0]
        draw = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, vocabulary, (5,), generator=draw)
        group = []
        for length in (4, 2):
            tokens = torch.cat([prompt, torch.randint(0, vocabulary, (length,), generator=draw)])
            group.append(Trajectory(tokens, torch.arange(len(tokens)) >= 5))
        return Batch.of([Group(group), Group(group[:1])])

    def _every_layer_known(self, captured: dict[int, LayerState]) -> bool:
        """Whether each layer attended once, and looks back as its configuration says.

        The probe is too short to show a long window, or chunks that do not see each other (`chunked_attention`).
        """
        config = self.base.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        if sorted(captured) != list(range(config.num_hidden_layers)):
            return False
        known = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
        return all(
            kind in known and (kind == "full_attention" or captured[layer].window == known[kind])
            for layer, kind in enumerate(kinds)
        )

    def _check_head(self, probe: Batch, hidden: Tensor) -> None:
        """Refuse a model whose logits are not what `head` computes, rather than train on wrong probabilities."""
        logits = self.model(**self._padded(probe), use_cache=False).logits
        own = logits[probe.sequence.to(self.device), (probe.place - 1).to(self.device)].float()
        if not self._close(own, self.head().logits(hidden)):
            raise PosttrainError(
                f"{self.name}: {type(self.base).__name__} changes its logits in a way that is not known here; "
                f"expected a linear vocabulary projection with an optional scale and soft cap"
            )

    def _close(self, expected: Tensor, found: Tensor) -> bool:
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        return bool((expected - found).norm() <= tolerance * expected.norm())

    # -- copies and files --------------------------------------------------------------------------------------------

    def frozen_copy(self) -> CausalPolicy:
        """A constant copy of the present weights (adapters merged), as a reference or a teacher."""
        model = copy.deepcopy(self.model)
        if self.adapted:
            model = model.merge_and_unload()
        model.requires_grad_(False).eval()
        other = CausalPolicy(model, self.tokenizer, self.name)
        other._packs = self._packs
        return other

    @contextmanager
    def without_adapter(self) -> Iterator[CausalPolicy]:
        """The model as it was before its adapter: the reference of a LoRA run, at no memory."""
        with torch.no_grad(), self.model.disable_adapter():
            yield self

    def merged(self) -> PreTrainedModel:
        """The plain model with any adapter merged into its weights (a copy in that case)."""
        return copy.deepcopy(self.model).merge_and_unload() if self.adapted else self.model

    def save(self, folder: str | Path) -> Path:
        """Write a plain `transformers` folder (safetensors, adapters merged) that `from_pretrained` loads."""
        folder = Path(folder)
        if folder.is_file():
            raise PosttrainError(f"cannot save a model to {folder}: it is a file; expected a folder, new or existing")
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def save_weights(self, folder: Path) -> None:
        """Weights (adapters merged) and configurations alone."""
        save_model(self.merged(), folder)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout inside the block; every module's own mode is restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
