"""Exported folders in vLLM on a CPU: it loads them, and takes the tokens that the model takes here.

Of integer weights alone its CPU kernel takes 4 bits, in half precision and bfloat16 (not fp32), with rows and columns
that 32 divides; with activations of 8 bits by token it takes 8, in bfloat16. That is less precise than fp32, in which
they are compared, so that two tokens whose logits are nearly equal may change places.

Where a processor lacks what vLLM's kernels are written for (AVX-512, with VNNI for 8 bits) its wheel leaves the one for
4 bits out: it has the product of `product.py` there, and all else is vLLM's. Its product of 8 bits is there not of its
operands: there is then nothing to compare with, and the test is skipped. Elsewhere a kernel that is missing or wrong is
a failure.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from vllm_models import make_policy

from posttrain import export, load, methods, quantize
from posttrain.compress.method import Compression
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.trajectory import Prompt, Sampling

pytestmark = pytest.mark.vllm

GREEDY = Sampling(max_tokens=16, temperature=0)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SUBJECTS = ("river", "engine", "number 12", "king", "cell", "market", "verb", "star", "recipe", "law")
TEXTS = [f"The {subject} {verb}" for subject in SUBJECTS for verb in ("is", "was built because")]


def prompts_for(policy: CausalPolicy) -> list[Prompt]:
    encode = policy.tokenizer.encode
    return [Prompt(torch.tensor(encode(text)), text=text, key=i) for i, text in enumerate(TEXTS)]


def kernel_works(bits: int) -> bool:
    """Whether vLLM can multiply weights of so many bits on this processor; it must where its instructions are there."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if bits == 4:
        works, able = hasattr(torch.ops._C, "cpu_gemm_wna16"), torch.cpu._is_avx512_supported()
    else:
        able = torch.cpu._is_vnni_supported()
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(-127, 128, (5, 256), dtype=torch.int8, generator=draw)
        weights = torch.randint(-127, 128, (512, 256), dtype=torch.int8, generator=draw)
        handler = ops.create_onednn_scaled_mm(weights.T, torch.ones(1, 512), torch.float32, True, False)
        found = torch.empty(5, 512)
        ops.onednn_scaled_mm(handler, rows, found, torch.ones(5, 1), None, None, None)
        works = torch.equal(found, (rows.double() @ weights.double().T).float())
    assert works or not able
    return works


def by_vllm(folder: Path, dtype: str, prompts: Sequence[Prompt], own_product: bool) -> list[list[int]]:
    """The tokens that vLLM takes greedily, with its own product of weights or that of `product.py`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder), dtype=dtype, max_model_len=128, max_num_seqs=8, enforce_eager=True, generation_config="vllm",
        seed=0, kv_cache_memory_bytes=1 << 28, disable_log_stats=True,
        worker_extension_cls="" if own_product else "product.Worker",
    )  # fmt: skip
    wanted = SamplingParams(temperature=0, max_tokens=GREEDY.max_tokens)
    asked = [{"prompt_token_ids": prompt.tokens.tolist()} for prompt in prompts]
    found = [list(output.outputs[0].token_ids) for output in llm.generate(asked, wanted, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return found


@torch.no_grad()
def assert_same(
    policy: CausalPolicy, prompts: Sequence[Prompt], found: Sequence[list[int]], tie: float = 0.03, most: int = 3
) -> None:
    """The same tokens, but after `most` prompts, where the logits of two were nearer to each other than `tie`."""
    expected = [row[0].tokens.tolist() for row in EmbeddedEngine(policy).generate(prompts, 1, GREEDY, 0)]
    ties = 0
    for prompt, ours, theirs in zip(prompts, expected, found, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:
            assert len(ours) == len(theirs)
            continue
        ties += 1
        before = torch.cat([prompt.tokens, torch.tensor(ours[:at], dtype=torch.long)])
        logits = policy.model(before[None]).logits[0, -1].float()
        assert logits[ours[at]] - logits[theirs[at]] < tie, (prompt.text, ours, theirs)
    assert ties <= most


@pytest.mark.parametrize(
    ("method", "bits", "dtype", "tie", "most"),
    [
        (methods.rtn(bits=4, group=32), 4, "float16", 0.03, 3),
        (methods.rtn(bits=4, group=128, zero="none"), 4, "float16", 0.03, 3),
        # logits have a standard deviation of 1.3: tokens that change places stay within a fifth of it
        (methods.smoothquant(), 8, "bfloat16", 0.25, 15),
    ],
    ids=["w4-32-zeros", "w4-128", "w8a8"],
)
def test_tiny_models(tmp_path: Path, method: Compression, bits: int, dtype: str, tie: float, most: int) -> None:
    works = kernel_works(bits)
    if bits == 8 and not works:
        pytest.skip("vLLM has no kernel for 8 bits that works on this processor")
    small = quantize(make_policy(**WIDE), method, TEXTS, show=False)
    folder = export(small, tmp_path / "out", "compressed-tensors", show=False).path
    prompts = prompts_for(small)
    assert_same(small, prompts, by_vllm(folder, dtype, prompts, works), tie, most)


@pytest.mark.real
def test_smollm2(tmp_path: Path) -> None:
    small = quantize(load("smollm2-135m", precision="fp32"), "rtn", TEXTS, bits=4, group=32, show=False)
    small.save(tmp_path / "small")
    folder = export(tmp_path / "small", tmp_path / "out", "compressed-tensors", show=False).path
    prompts = prompts_for(small)
    assert_same(small, prompts, by_vllm(folder, "float16", prompts, kernel_works(4)))
