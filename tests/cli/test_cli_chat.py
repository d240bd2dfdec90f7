"""`posttrain chat`: line by line from a pipe, and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Result, call, make_folder

from conftest import make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts as the model got them."""
    prompts: list[str] = []

    def listening_load(model: str) -> CausalPolicy:
        policy = load(model)
        generate = policy.model.generate

        def listening(tokens, **options):
            prompts.append(str(policy.tokenizer.decode(tokens[0])))
            return generate(tokens, **options)

        policy.model.generate = listening
        return policy

    monkeypatch.setattr("posttrain.models.load.load", listening_load)
    return prompts


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, text: str, *options: object
) -> Result:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return call(capsys, "chat", model, "--max-tokens", 6, *options)


def turns(prompt: str) -> list[str]:
    return [turn.strip("\n") for turn in prompt.split("<|im_start|>")[1:]]


def test_every_line_is_answered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, asked: list[str]
) -> None:
    done = chat(capsys, monkeypatch, tiny, "first\n\nsecond\n", "--system", "be brief")
    assert (done.code, done.err) == (0, "")
    assert len(asked) == 2
    assert turns(asked[0]) == ["system\nbe brief<|im_end|>", "user\nfirst<|im_end|>", "assistant"]
    conversation = turns(asked[1])
    assert conversation[:2] == turns(asked[0])[:2]
    assert conversation[2].startswith("assistant\n")  # with the reply
    assert conversation[3:] == ["user\nsecond<|im_end|>", "assistant"]


def test_an_empty_reply_is_said_to_be_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    def ended(model: str) -> CausalPolicy:
        policy = load(model)
        end = policy.tokenizer.eos_token_id
        policy.model.generate = lambda tokens, **options: torch.cat([tokens, torch.tensor([[end]])], 1)
        return policy

    monkeypatch.setattr("posttrain.models.load.load", ended)
    done = chat(capsys, monkeypatch, tiny, "first\n")
    assert done.code == 0
    assert done.err == "(an empty reply: the model ended it at once)\n"


def test_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, asked: list[str]
) -> None:
    done = chat(capsys, monkeypatch, tiny, "a\n/reset\n/system new rules\nb\n/system\n/reset\nc\n/quit\nd\n")
    assert (done.code, done.err) == (0, "")
    assert [turns(prompt)[0] for prompt in asked] == [
        "user\na<|im_end|>",
        "system\nnew rules<|im_end|>",
        "user\nc<|im_end|>",
    ]
    assert [len(turns(prompt)) for prompt in asked] == [2, 3, 2]


def test_what_only_looks_like_a_command_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, asked: list[str]
) -> None:
    chat(capsys, monkeypatch, tiny, "/etc/passwd is what\n")
    assert turns(asked[0])[0] == "user\n/etc/passwd is what<|im_end|>"


def test_replies_follow_the_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    def reply(*options: object) -> str:
        return chat(capsys, monkeypatch, tiny, "hello\n", *options).out

    assert reply("--seed", 1) == reply("--seed", 1)
    assert len({reply("--seed", seed) for seed in range(4)}) > 1
    assert len({reply("--seed", seed, "--temperature", 0) for seed in range(3)}) == 1
    assert len({reply("--seed", seed, "--top-p", 1e-6) for seed in range(3)}) == 1


def test_the_models_own_generation_settings_do_not_matter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    """Else chat would not show the distribution that was trained."""
    other = shutil.copytree(tiny, tmp_path / "other")
    file = other / "generation_config.json"
    settings = json.loads(file.read_text())
    settings |= {"repetition_penalty": 9.0, "top_k": 1, "min_p": 0.9, "typical_p": 0.1, "no_repeat_ngram_size": 1}
    file.write_text(json.dumps(settings | {"bad_words_ids": [[5]], "min_new_tokens": 3, "suppress_tokens": [7]}))
    plain = chat(capsys, monkeypatch, tiny, "hello\n", "--max-tokens", 40)
    assert chat(capsys, monkeypatch, other, "hello\n", "--max-tokens", 40) == plain


def test_control_characters_of_a_model_are_shown_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    import torch

    evil = "\x1b[2J\x1b]0;owned\x07[bold]\r\x9b1m\n\tok"
    tokens = make_tokenizer().encode(evil, add_special_tokens=False)

    def generate(model, prompt, attention_mask, streamer):
        streamer.put(prompt)
        for token in tokens:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([prompt, torch.tensor([tokens])], 1)

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    done = chat(capsys, monkeypatch, tiny, "hi\n")
    assert done.code == 0
    assert done.out == "\\x1b[2J\\x1b]0;owned\\x07[bold]\\x0d\\x9b1m\n\tok\n"


def test_a_conversation_longer_than_the_context(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, asked: list[str]
) -> None:
    done = chat(capsys, monkeypatch, tiny, "short\n" + "word " * 80 + "\nnever asked\n")
    assert done.code == 1
    assert done.error.startswith("error: the conversation has ")
    assert done.error.endswith("tokens and the model's context is 256: /reset it, or write less")
    assert len(asked) == 1


def test_a_reply_ends_where_the_context_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    done = chat(capsys, monkeypatch, tiny, "a" * 210 + "\n", "--max-tokens", 1000, "--temperature", 0)
    assert (done.code, done.err) == (0, "")


def test_without_a_chat_template_lines_stand_for_themselves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[str]
) -> None:
    model = make_folder(tmp_path / "base", template=None)
    assert chat(capsys, monkeypatch, model, "once upon\nb\n").code == 0
    assert asked == ["once upon", "b"]
    for options, text in ((["--system", "x"], "a\n"), ([], "/system x\n")):
        refused = chat(capsys, monkeypatch, model, text, *options)
        assert refused.code == 1
        assert "no chat template and takes no system message" in refused.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "sampling: temperature is -1.0; expected a number from 0 to any"),
        (["--top-p", "0"], "sampling: top_p is 0.0; expected a number from 0 to 1"),
        (["--max-tokens", "0"], "sampling: max_tokens is 0; expected a number from 1 to any"),
        (["--seed", "-1"], "--seed is -1; expected a whole number from 0 to 4294967295"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, options: list[str], message: str
) -> None:
    done = chat(capsys, monkeypatch, tiny, "", *options)
    assert (done.code, done.error) == (1, f"error: {message}")


def test_no_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = chat(capsys, monkeypatch, tmp_path, "hello\n")
    assert done.code == 1
    assert done.error.startswith(f"error: {tmp_path} is no model: ")


def test_on_a_terminal(tiny: Path) -> None:
    """A prompt to write at, an error that does not end the conversation, and Ctrl-D that does."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "posttrain.cli.main", "chat", str(tiny), "--max-tokens", "3"]
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = []
        for typed in (b"hello\n", b"word " * 80 + b"\n", b"/reset\n", b"hello again\n", b"\x04"):
            said.append(_until_prompt(ours))
            os.write(ours, typed)
        assert process.wait(60) == 0, said
    os.close(ours)
    greeting, _reply, refusal, reset, _second = said
    assert "/reset forgets the conversation" in greeting
    assert "the model's context is 256: /reset it, or write less" in refusal
    assert "context" not in reset
    assert not any("Traceback" in text for text in said)


def _until_prompt(terminal: int) -> str:
    """What the terminal shows up to the next prompt."""
    said = b""
    while not said.endswith(b"> "):
        assert select.select([terminal], [], [], 60)[0], said
        said += os.read(terminal, 4096)
    return said.decode(errors="replace")
