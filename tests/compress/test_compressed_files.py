"""Folders of compressed models: read back to the bit, as large as their bits say, and every fault told in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_model, make_tokenizer
from posttrain import load, methods
from posttrain.compress import files
from posttrain.compress.packed.inputs import InputStep
from posttrain.compress.packed.linear import PackedLinear, TransformedLinear
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy

TOKENS = torch.arange(24)[None] % 60


class Halved(InputStep):
    """A step with a tensor of its own, for these tests."""

    kind = "test-halved"

    def __init__(self, width: int, power: int = 1) -> None:
        super().__init__(width)
        self.power = power
        self.register_buffer("factor", torch.full((width,), 0.5))

    def settings(self) -> dict[str, Any]:
        return {"power": self.power}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor.to(inputs.dtype) ** self.power


def small_of(policy: CausalPolicy, method: Any = None, **options: Any) -> CompressedPolicy:
    batches = [{"input_ids": TOKENS, "use_cache": False}]
    return compressed_copy(policy, method or methods.rtn(bits=4, group=8), batches, **options)


def logits(policy: CausalPolicy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=TOKENS).logits


def tiny(**config: Any) -> CausalPolicy:
    return CausalPolicy(make_model(**config), make_tokenizer(), "tiny")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return small_of(tiny()).save(tmp_path / "small")


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt-neox", "gemma2", "phi3", "mixtral", "mamba"])
def test_the_same_logits_to_the_bit(tmp_path: Path, name: str) -> None:
    """Tied embeddings (llama), biases (qwen2, opt, gpt-neox), fused layers (phi3), experts, state-space layers."""
    skip = ["*.dt_proj"] if name == "mamba" else []  # whose weight is read without the layer being called
    small = small_of(make_policy(name, make_tokenizer()), skip=skip)
    again = load(small.save(tmp_path / "small"), precision="fp32")
    assert isinstance(again, CompressedPolicy)
    assert torch.equal(logits(again), logits(small))
    assert not any(p.requires_grad for p in again.model.parameters())
    assert again.compression.method == "rtn"
    assert again.compression.bits == small.compression.bits
    assert again.compression.arguments == small.compression.arguments
    assert [(x.name, x.error) for x in again.compression.layers] == [
        (x.name, x.error) for x in small.compression.layers
    ]


def test_in_bf16(tmp_path: Path) -> None:
    policy = load(tiny().save(tmp_path / "float"), precision="bf16")
    small = small_of(policy, methods.gptq(bits=3, group=16))
    again = load(small.save(tmp_path / "small"), precision="bf16")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(small))
    scales = [b.dtype for n, b in again.model.named_buffers() if n.endswith("weight.scale")]
    assert set(scales) == {torch.float16}, "what is packed stays as it is"
    wide = load(tmp_path / "small", precision="fp32")
    assert wide.dtype == torch.float32
    assert (logits(wide) - logits(small).float()).abs().max() < 0.05 * logits(wide).abs().max()


def test_parameters_in_a_precision_of_their_own_stay_in_it(tmp_path: Path) -> None:
    policy = load(tiny().save(tmp_path / "float"), precision="bf16")
    policy.model.model.norm.weight.data = policy.model.model.norm.weight.data.float()
    again = load(small_of(policy).save(tmp_path / "small"), precision="bf16")
    assert again.model.model.norm.weight.dtype == torch.float32


def test_steps_before_packed_and_skipped_layers(tmp_path: Path) -> None:
    """A transform leaves steps before layers, also before one that is then skipped, and may add a bias or untie."""
    policy = tiny()
    block = policy.model.model.layers[0]
    for name in ("up_proj", "down_proj"):
        linear = getattr(block.mlp, name)
        made = TransformedLinear.of(linear, nn.Sequential(Halved(linear.in_features, power=2)))
        made.bias = nn.Parameter(torch.arange(linear.out_features) / 100)
        setattr(block.mlp, name, made)
    plain = policy.model.model.layers[1].mlp.gate_proj
    plain.bias = nn.Parameter(torch.arange(plain.out_features) / 50)
    policy.model.lm_head.weight = nn.Parameter(policy.model.lm_head.weight * 2)
    small = small_of(policy, skip=["*.0.mlp.down_proj", "*.1.mlp.gate_proj"])
    assert isinstance(small.model.model.layers[0].mlp.up_proj, PackedLinear)
    assert isinstance(small.model.model.layers[0].mlp.down_proj, TransformedLinear)
    again = load(small.save(tmp_path / "small"), precision="fp32")
    assert torch.equal(logits(again), logits(small))
    assert not torch.equal(again.model.lm_head.weight, again.model.model.embed_tokens.weight)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["tie_word_embeddings"] is False


def test_only_what_is_packed_is_in_the_file_and_in_memory(written: Path) -> None:
    stored = load_file(written / "model.safetensors")
    assert not any(name.endswith("proj.weight") for name in stored)
    assert "lm_head.weight" not in stored, "tied"
    again = load(written, precision="fp32")
    matrices = [n for n, p in again.model.named_parameters() if p.ndim > 1]
    assert matrices == ["model.embed_tokens.weight"]
    there = {**dict(again.model.named_parameters()), **dict(again.model.named_buffers())}
    assert _bytes(stored) == _bytes({n: t for n, t in there.items() if n in stored})


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_the_folder_is_as_large_as_the_bits_say(tmp_path: Path) -> None:
    policy = tiny(hidden_size=256, intermediate_size=512, vocab_size=2000)
    small = small_of(policy, methods.rtn(bits=3, group=64))
    folder = small.save(tmp_path / "small")
    weights = sum(m.weight.shape[0] * m.weight.shape[1] for m in small.model.modules() if isinstance(m, PackedLinear))
    rest = 4 * sum(p.numel() for p in small.model.parameters())
    said = small.compression.bits * weights / 8 + rest
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(said, rel=0.03)
    assert sum(f.stat().st_size for f in folder.iterdir() if "token" not in f.name) == pytest.approx(said, rel=0.03)


def test_what_is_written_says_what_was_done(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    about = config["quantization_config"]["about"]
    assert (about["method"], len(about["layers"])) == ("rtn", 14)
    assert config["quantization_config"]["quant_method"] == "posttrain"
    assert (written / "generation_config.json").is_file()
    assert files.is_compressed(written)
    assert not files.is_compressed(written.parent)


def test_it_predicts_and_samples_by_the_embedded_engine(written: Path) -> None:
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.rollout.engine_choice import engine_for

    again = load(written, precision="fp32")
    assert again.packs
    assert isinstance(engine_for(again), EmbeddedEngine)
    assert again.frozen_copy().compression is again.compression


# -- what can go wrong -------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without(folder: Path, *names: str) -> None:
    kept = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in kept.items() if n not in names}, folder / "model.safetensors")


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(folder / "model.safetensors"), name: tensor}, folder / "model.safetensors")


UP = "model.layers.0.mlp.up_proj"
UNKNOWN = {"weight": {"format": "unifrom", "shape": [2, 2]}, "bias": False, "inputs": []}
NOWHERE = {"model.layers.9.mlp.up_proj": {"weight": None, "bias": False, "inputs": []}}
CODES = "model.layers.0.self_attn.q_proj.weight.codes"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, r"cannot read .*model\.safetensors: .*; it is cut short or damaged: copy it again"),
        (lambda f: (f / "model.safetensors").unlink(), r"cannot read .*model\.safetensors: .*copy it again"),
        (lambda f: edit_config(f, version=2), r"is in version 2 of the format .*; this posttrain reads version 1"),
        (lambda f: without(f, CODES), rf"does not hold {CODES}, which its config\.json speaks of"),
        (lambda f: without(f, CODES, "model.norm.weight"), r"does not hold .* and 1 more tensors"),
        (lambda f: without(f, "model.embed_tokens.weight"), r"does not hold model\.embed_tokens\.weight"),
        (lambda f: with_tensor(f, "extra", torch.ones(2)), r"holds extra, which its config\.json does not know"),
        (
            lambda f: with_tensor(f, CODES, torch.zeros(3, 4, dtype=torch.uint8)),
            rf"holds {CODES} as uint8 \[3, 4\]; its config\.json says uint8 \[32, 16\]",
        ),
        (
            lambda f: with_tensor(f, CODES, torch.zeros(32, 16)),
            rf"holds {CODES} as float32 \[32, 16\]; its config\.json says uint8 \[32, 16\]",
        ),
        (lambda f: edit_config(f, layers={UP: UNKNOWN}), "unknown weight format 'unifrom'; did you mean uniform"),
        (lambda f: edit_config(f, layers=NOWHERE), "is damaged, or no compressed model of posttrain"),
        (lambda f: edit_config(f, layers=[3]), "is damaged, or no compressed model of posttrain"),
    ],
)
def test_a_damaged_folder(written: Path, spoil: Any, message: str) -> None:
    spoil(written)
    with pytest.raises(PosttrainError, match=message) as raised:
        load(written)
    assert "\n" not in str(raised.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("precious")
    with pytest.raises(PosttrainError, match="there exists already; choose another folder"):
        small_of(tiny()).save(tmp_path / "there")
    with pytest.raises(PosttrainError, match=r"thesis\.txt exists already"):
        small_of(tiny()).save(tmp_path / "there" / "thesis.txt")
    assert (tmp_path / "there" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert load(small_of(tiny()).save(tmp_path / "empty")).dtype


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: to a program the same as a disk that is full (EFBIG in place of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [1000, 20_000])  # the configuration does not fit, or the weights do not
def test_a_full_disk_is_told_in_a_line_and_nothing_is_left(tmp_path: Path, room: int) -> None:
    small = small_of(tiny())
    with files_of_at_most(room), pytest.raises(PosttrainError, match=r"cannot write the compressed model to .*small: "):
        small.save(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_killed_while_writing_it_leaves_no_folder_and_the_next_try_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_of(tiny())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for left in (tmp_path / f".small.writing-{dead.pid}", tmp_path / ".small.writing-x"):
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")

    def killed(*_: Any) -> None:
        assert not (tmp_path / "small").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            small.save(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    theirs = tmp_path / f".small.writing-{os.getppid()}"
    theirs.mkdir()
    (theirs / "model.safetensors").write_bytes(b"half")
    small_of(tiny()).save(tmp_path / "small")
    assert (theirs / "model.safetensors").read_bytes() == b"half"


def test_a_folder_is_reserved_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PosttrainError, match=r"to .*file/small: .*file is no folder; free some space or choose"):
        files.reserved(tmp_path / "file" / "small").__enter__()
    with pytest.raises(PosttrainError, match="cannot write the compressed model to /proc/small: "):
        files.reserved(Path("/proc/small")).__enter__()
    with pytest.raises(PosttrainError, match="exists already"):
        files.reserved(tmp_path).__enter__()
    small = tmp_path / "a" / "b" / "small"
    with files.reserved(small):
        with pytest.raises(PosttrainError, match="small is being written by another process; wait for it, or choose"):
            files.reserved(small).__enter__()
        with files.reserved(small.with_name("other")):
            pass
        assert small.parent.is_dir()
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "nothing was written, and nothing is left"
    with files.reserved(small):
        small_of(tiny()).save(small)
    assert [file.name for file in small.parent.iterdir()] == ["small"]


def test_what_cannot_be_written_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    small, asked = small_of(tiny()), tmp_path / "small"
    assert files.save_somewhere(small, asked) == (asked, None)
    for other in ("runs/small", "runs/small-2"):
        written, wrong = files.save_somewhere(small, asked)
        assert written == Path(other)
        assert "small exists already" in str(wrong)
        assert torch.equal(logits(load(written, precision="fp32")), logits(small))
    shutil.rmtree("runs")
    Path("runs").touch()
    assert files.save_somewhere(small, asked)[0] == tmp_path / "temporary" / "small"
    with files_of_at_most(10_000), pytest.raises(PosttrainError, match="cannot write the compressed model to full: "):
        files.save_somewhere(small, Path("full"))


@pytest.mark.skipif(os.geteuid() == 0 or sys.platform == "win32", reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PosttrainError, match="cannot write the compressed model"):
        small_of(tiny()).save(tmp_path / "small")
