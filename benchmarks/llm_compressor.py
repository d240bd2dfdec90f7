"""GPTQ by llm-compressor, in a process of its own and by a Python that has it; imports nothing of posttrain.

    python -m benchmarks.llm_compressor FOLDER WINDOWS.safetensors OUTPUT.safetensors BITS GROUP ZERO

Quantizes a float model's linear layers, all but the head, on rows of tokens, one a sample, and writes the weights that
the quantized model computes with. Prints the seconds of the quantization and the peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from benchmarks.child import high_water


def quantize(folder: str, windows: str, output: str, bits: int, group: int, zero: str) -> float:
    """Seconds of the quantization; zero: `integer` or `none` (symmetric)."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found, unused-ignore]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    rows = [row.tolist() for _, part in sorted(load_file(windows).items()) for row in part]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {
        "num_bits": bits, "type": "int", "symmetric": zero == "none", "strategy": "group", "group_size": group,
    }  # fmt: skip
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    begun = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=recipe, num_calibration_samples=len(rows), shuffle_calibration_samples=False,
        max_seq_length=max(map(len, rows)), pipeline="sequential",
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    found = {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme") and hasattr(module, "weight")
    }
    save_file(found, output)
    return seconds


def main() -> int:
    folder, windows, output, bits, group, zero = sys.argv[1:]
    seconds = quantize(folder, windows, output, int(bits), int(group), zero)
    print(json.dumps({"seconds": seconds, "peak_mib": high_water() / 2**20}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
