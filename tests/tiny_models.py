"""Tiny models of many architectures, made from their configurations by seed, and ragged batches for them."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, Trajectory

VOCABULARY = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
# name -> (class, what differs from SHAPE); those that pack, with what each one tries
PACKING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),  # biases on query, key and value
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),  # normed queries and keys
    "mistral": ("Mistral", {"sliding_window": 4}),  # the same window in every layer
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",  # in older transformers the other one forgets the cap
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 5}),  # fused query, key and value
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),  # learned positions
    "gpt-neox": ("GPTNeoX", {}),  # partial rotary positions, parallel residual
    "gpt2": ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0}),
    "cohere2": ("Cohere2", {"sliding_window": 4, "logit_scale": 0.3, "num_hidden_layers": 4}),
    "granite": ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "deepseek": ("DeepseekV3", LATENT),  # latent attention: values narrower than keys
}
# those that do not, with the reason
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": 4}),  # a state-space model: no attention at all
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),  # sinks
    "falcon-h1": (  # attention beside state space in each layer
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8},
    ),
    "llama4": ("Llama4", {"attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 32}),  # chunks
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0}),  # its own attention, with ALiBi
}
ARCHITECTURES = PACKING | PADDED


def make_policy(name: str, tokenizer: Any, seed: int = 0, **overrides: Any) -> CausalPolicy:
    """A policy of one of ARCHITECTURES, in fp32, in evaluation mode."""
    import transformers

    family, differing = ARCHITECTURES[name]
    text = "Text" if family in ("Gemma3", "Llama4") else ""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}{text}Config")(**{**SHAPE, **differing, **overrides})
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + kind)(config).eval()
    with torch.no_grad():  # biases, norms and sinks start at constants that would hide a mistake
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return CausalPolicy(model, tokenizer, name)


def random_tokens(length: int, generator: torch.Generator, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(0, vocabulary, (length,), generator=generator)


def continued(prompt: torch.Tensor, lengths: list[int], generator: torch.Generator) -> Group:
    """A prompt with completions of the given lengths."""
    members = []
    for length in lengths:
        tokens = torch.cat([prompt, random_tokens(length, generator)])
        members.append(Trajectory(tokens, torch.arange(len(tokens)) >= len(prompt)))
    return Group(members)


def ragged_groups(seed: int = 0) -> list[Group]:
    """Shared prompts, a pair, single-token completions, several turns, differing prompts, a prompt of one token."""
    draw = torch.Generator().manual_seed(seed)
    groups = [
        continued(random_tokens(7, draw), [5, 1, 9, 3], draw),
        continued(random_tokens(3, draw), [12, 2], draw),
        continued(random_tokens(1, draw), [1, 6], draw),
        continued(random_tokens(11, draw), [4], draw),
        continued(random_tokens(1, draw), [1], draw),
    ]
    turns = []
    for length in (14, 9):
        tokens = torch.cat([groups[0].trajectories[0].tokens[:4], random_tokens(length, draw)])
        mask = torch.zeros(len(tokens), dtype=torch.bool)
        mask[5:8] = mask[10:11] = True  # what a tool says lies between, and behind
        turns.append(Trajectory(tokens, mask))
    groups.append(Group(turns))
    common = random_tokens(4, draw)
    prompts = [torch.cat([common, random_tokens(n, draw)]) for n in (3, 5)] + [random_tokens(6, draw)]
    groups.append(Group([continued(p, [4], draw).trajectories[0] for p in prompts[:2]]))
    groups.append(Group([continued(p, [3], draw).trajectories[0] for p in prompts]))
    return groups


def ragged_batch(seed: int = 0) -> Batch:
    return Batch.of(ragged_groups(seed))


def plain_log_likelihood(policy: CausalPolicy, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """`[M]` log-probabilities from the model's own forward pass, a sequence at a time: the truth to compare with."""
    found = []
    for s, tokens in enumerate(batch.tokens):
        logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0].float() / temperature
        places = batch.place[batch.sequence == s]
        found.append(logits.log_softmax(-1)[places - 1, tokens[places]])
    return torch.cat(found)
