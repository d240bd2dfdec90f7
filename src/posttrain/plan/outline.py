"""A model without its weights: from its configuration alone, on the `meta` device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from posttrain.models.attention import LayerState
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import BUNDLED, bundled_folder, model_folder
from posttrain.models.providers import provided
from posttrain.trajectory import PosttrainError


def read_config(model: str | Path) -> Any:
    """The `transformers` configuration of a model: a bundled name, the id of a provider, a folder, a run folder, a
    `config.json`, a `.gguf` file or a hub id (of which only the configuration is fetched).

    Raises PosttrainError where there is no such configuration.
    """
    from transformers import AutoConfig

    name, options = str(model), dict[str, Any]()
    if name in BUNDLED:
        where = str(bundled_folder(name))
    elif (made := provided(name)) is not None:
        where = str(made)
    elif name.endswith(".gguf"):
        where, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    elif Path(name).is_dir():
        where = str(model_folder(Path(name)))
    else:
        where = name
    try:
        return AutoConfig.from_pretrained(where, **options)
    except Exception as error:  # transformers raises many types; each becomes one line that keeps its first sentence
        raise PosttrainError(
            f"no configuration of a model at {name}: {' '.join(str(error).split())[:200]}; expected a bundled name "
            f"({', '.join(BUNDLED)}), a folder, a config.json, a .gguf file or a hub id"
        ) from error


def outline(config: Any, dtype: torch.dtype, name: str = "") -> CausalPolicy:
    """The policy of a configuration, without weights and without a tokenizer.

    Raises PosttrainError for a model that is no causal language model, or that does not compute packed rows: what one
    computed padded would need is not known here.
    """
    from transformers import AutoModelForCausalLM

    name = name or getattr(config, "_name_or_path", "") or type(config).__name__
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise PosttrainError(f"{name}: no causal language model can be made of its configuration: {reason}") from error
    policy = CausalPolicy(model.eval(), None, name)  # type: ignore[arg-type]
    captured: dict[int, LayerState] = {}
    try:
        with torch.no_grad():
            policy._packed_hidden(policy._probe(), captured=captured)
        packs = policy._every_layer_known(captured)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        packs = False
    if not packs:
        raise PosttrainError(
            f"{name}: {type(model).__name__} cannot be rehearsed without weights; a plan is made for models that "
            f"compute packed rows, such as Llama, Qwen, Mistral or Gemma"
        )
    policy._packs = True
    return policy
