"""What the ways of decoding a packed model share: reading prompts, and the memory that a row takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from posttrain.models.attention import LayerState
from posttrain.models.causal import CausalPolicy
from posttrain.models.packing import Segment, pack_prompts


def read_prompts(
    policy: CausalPolicy, prompts: Sequence[Tensor]
) -> tuple[list[Segment], dict[int, LayerState], Tensor]:
    """Compute prompts in one packed row, inside `packed_attention`: where each lies in it, the keys and values of every
    layer, and the final hidden states `[N, width]`.
    """
    layout = pack_prompts(list(prompts)).to(policy.device)
    captured: dict[int, LayerState] = {}
    out = policy.body(
        input_ids=layout.tokens[None],
        position_ids=layout.positions[None],
        use_cache=False,
        packed_layout=layout,
        captured=captured,
    ).last_hidden_state[0]
    return layout.segments, captured, out


def row_bytes(policy: CausalPolicy, capacity: int) -> int:
    """Bytes of the keys and values of a row of so many tokens."""
    config = policy.base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * capacity * policy.dtype.itemsize)
