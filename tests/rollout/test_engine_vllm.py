"""The engine on vLLM, as far as it is without vLLM: choices, weights on their way, the token, errors in one line."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.models.adapters import add_lora
from posttrain.models.load import load
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.engine_choice import EngineChoice, Engines
from posttrain.rollout.vllm import transfer
from posttrain.rollout.vllm.arguments import as_flags
from posttrain.rollout.vllm.backend import EngineLost
from posttrain.rollout.vllm.guard import TOKEN, RequireToken
from posttrain.rollout.vllm.http import Server
from posttrain.rollout.vllm.in_process import InProcess
from posttrain.rollout.vllm.served import Served
from posttrain.rollout.vllm.started import Started, check_port, check_python, free_port, stop_group
from posttrain.rollout.vllm.weights import PREFIX, Exchange, fingerprint, sweep
from posttrain.training.optim import MasterAdamW
from posttrain.training.settings import Settings
from posttrain.trajectory import PosttrainError
from tiny_training import make_policy

# -- choices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind"),
    [({"name": "vllm"}, InProcess), ({"name": "vllm-server"}, Started), ({"name": "http://10.0.0.1:8000"}, Served)],
)
def test_a_name_is_a_backend(given: dict[str, Any], kind: type) -> None:
    assert type(EngineChoice(**given).backend()) is kind


def test_a_url_takes_its_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "abc")
    attached = EngineChoice("https://host:8443/vllm/").backend()
    assert isinstance(attached, Served)
    assert (attached.server.url, attached.server.token, attached.shared) == ("https://host:8443/vllm", "abc", False)
    shared = EngineChoice("http://host", exchange="/shared").backend()
    assert isinstance(shared, Served)
    assert shared.shared


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "vlm"}, "engine 'vlm' is unknown; expected embedded, vllm, vllm-server or a URL"),
        ({"name": "http://"}, "engine 'http://' is no URL of a server"),
        ({"name": "http://host:99999"}, "is no URL of a server"),
        ({"name": "http://user:secret@host"}, f"put the token into {TOKEN}"),
        ({"name": "embedded", "options": {"a": 1}}, "engine embedded has no options; leave it out"),
        ({"name": "vllm", "python": "python"}, "engine vllm has no python; leave it out"),
    ],
)
def test_a_choice_that_is_none_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        EngineChoice(**given)


def test_the_embedded_engine_is_the_usual_one() -> None:
    engines = Engines()
    engines.check()
    policy = make_policy()
    engine = engines.of(policy, 7)
    assert isinstance(engine, EmbeddedEngine)
    assert (engine.policy, engine.rows) == (policy, 7)
    engines.close()


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PosttrainError, match=r"vLLM is not installed: pip install 'posttrain\[vllm\]'"):
        Engines(EngineChoice("vllm")).check()


def test_a_python_without_vllm_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # without installed packages
    bare.chmod(0o755)
    with pytest.raises(PosttrainError, match=r"is not installed for .*/python: pip install 'posttrain\[vllm\]'"):
        check_python(str(bare))
    with pytest.raises(PosttrainError, match=r"cannot run /no/such/python"):
        Engines(EngineChoice("vllm-server", python="/no/such/python")).check()


def test_a_port_in_use_is_an_error() -> None:
    port = free_port()
    check_port("127.0.0.1", port)
    with (
        server({}) as url,
        pytest.raises(PosttrainError, match=r"cannot listen on 127.0.0.1:\d+ .*choose another --port"),
    ):
        check_port("127.0.0.1", int(url.rpartition(":")[2]))


def test_options_as_flags() -> None:
    given = {"max_model_len": 64, "enforce_eager": True, "enable_prefix_caching": False, "seed": None}
    assert as_flags({**given, "weight_transfer_config": {"backend": "posttrain"}, "dtype": "float32"}) == [
        "--max-model-len", "64", "--enforce-eager", "--no-enable-prefix-caching",
        "--weight-transfer-config", '{"backend": "posttrain"}', "--dtype", "float32",
    ]  # fmt: skip


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_step_changes_the_fingerprint(dtype: torch.dtype) -> None:
    policy = make_policy(dtype=dtype)
    optimizer = MasterAdamW(policy.trainable_parameters(), Settings())
    before = fingerprint(policy)
    assert fingerprint(policy) == before
    sum((p.float() ** 2).sum() for p in policy.model.parameters()).backward()  # type: ignore[union-attr]
    assert fingerprint(policy) == before
    optimizer.step(1e-3)
    after = fingerprint(policy)
    changed = [
        not torch.equal(p, kept)
        for p, kept in zip(policy.model.parameters(), make_policy(dtype=dtype).model.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2
    assert [one != other for one, other in zip(before, after, strict=True)] == changed
    assert fingerprint(make_policy(dtype=dtype)) == before


def test_a_fingerprint_sees_bits_that_change_places() -> None:
    """Two neighbours exchanged, one bit in each of two: what plain sums would not see."""
    policy = make_policy(dtype=torch.bfloat16)
    seen = {fingerprint(policy)}
    weight = policy.model.get_parameter("model.layers.1.mlp.up_proj.weight").detach().view(-1)
    weight[[0, 1]] = weight[[1, 0]].clone()
    seen.add(fingerprint(policy))
    bits = weight.view(torch.int16)
    bits[10] ^= 1
    seen.add(fingerprint(policy))
    bits[20] ^= 1
    seen.add(fingerprint(policy))
    assert len(seen) == 4


def test_weights_lie_in_a_folder_that_loads_as_the_policy(tmp_path: Path) -> None:
    policy = make_policy()
    exchange = Exchange(tmp_path)
    first = exchange.write(policy)
    again = exchange.write(policy)
    assert again.version == first.version
    assert not first.folder.exists(), "those before are removed"
    with torch.no_grad():
        next(iter(policy.model.parameters())).mul_(1.001)
    changed = exchange.write(policy)
    assert changed.version != first.version
    loaded = load(exchange.model(policy, changed), precision="fp32")
    pairs = zip(loaded.model.state_dict().values(), policy.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    exchange.close()
    assert not list(tmp_path.iterdir())


def test_an_adapter_goes_merged(tmp_path: Path) -> None:
    adapted = add_lora(make_policy(), rank=2, seed=0)
    with torch.no_grad():
        for _, parameter in adapted.trainable_parameters():
            parameter.fill_(0.1)
    sent = dict(transfer.read_files(*_files(Exchange(tmp_path).write(adapted))))
    expected = adapted.merged().state_dict()
    assert not any("lora" in name for name in sent)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sent.items())
    assert not torch.equal(sent["model.layers.0.self_attn.q_proj.weight"], make_policy().model.state_dict()[
        "model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


def _files(weights: Any) -> tuple[Path, dict[str, str]]:
    return weights.folder, weights.files


@pytest.mark.parametrize("limit", [1, 5_000, 1 << 30])
def test_pieces_hold_what_the_files_hold(tmp_path: Path, limit: int) -> None:
    weights = Exchange(tmp_path).write(make_policy())
    found: dict[str, torch.Tensor] = {}
    pieces = list(weights.pieces(limit))
    for piece in pieces:
        text, digest = base64.b64encode(piece).decode(), hashlib.sha256(piece).hexdigest()
        found |= dict(transfer.read_bytes(text, digest))
    expected = dict(transfer.read_files(weights.folder, weights.files))
    assert len(pieces) == {1: len(expected), 1 << 30: 1}.get(limit, len(pieces))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    weights = Exchange(tmp_path).write(make_policy())
    (name,) = weights.files
    raw = bytearray((weights.folder / name).read_bytes())
    raw[-1] ^= 1
    (weights.folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match="was damaged on its way"):
        dict(transfer.read_files(weights.folder, weights.files))
    with pytest.raises(ValueError, match="was damaged on its way"):
        dict(transfer.read_bytes(base64.b64encode(raw).decode(), weights.files[name]))


def test_weights_of_a_process_that_was_killed_are_swept_up(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    names = [f"{PREFIX}{gone.pid}-abc", f"{PREFIX}{os.getpid()}-abc", f"{PREFIX}what-abc", "other"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_no_room_for_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PosttrainError, match=r"cannot make a folder for weights in .*nowhere.*name another"):
        Exchange(tmp_path / "nowhere").write(make_policy())


# -- the token and the wire --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [([], 401), ([(b"authorization", b"Bearer wrong")], 401), ([(b"authorization", b"Bearer secret")], 200),
     ([(b"authorization", b"Bearer secret")] * 2, 401), ([(b"authorization", b"secret")], 401)],
)  # fmt: skip
def test_the_guard_asks_for_the_token(monkeypatch: pytest.MonkeyPatch, headers: list[Any], status: int) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(RequireToken(app)({"type": "http", "headers": headers, "path": "/update_weights"}, receive, send))
    assert sent[0]["status"] == status


def test_a_guard_without_a_token_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(RuntimeError, match=TOKEN):
        RequireToken(lambda scope, receive, send: asyncio.sleep(0))


@contextmanager
def server(answers: dict[str, tuple[int, Any]]) -> Iterator[str]:
    """Answers of a server that is none of vLLM's, by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


def test_errors_of_a_server_are_told_apart() -> None:
    answers: dict[str, tuple[int, Any]] = {
        "/good": (200, {"a": 1}),
        "/bad": (400, {"error": {"message": "top_p must be\nin (0, 1]"}}),
        "/broken": (500, {"error": {"message": "the worker raised"}}),
        "/locked": (401, {}),
        "/text": (200, b"<html>"),
    }
    with server(answers) as url:
        asked = Server(url, None)
        assert asked.get("/good") == {"a": 1}
        with pytest.raises(PosttrainError, match=r"refused the request: top_p must be in \(0, 1\]"):
            asked.get("/bad")
        with pytest.raises(EngineLost, match="failed with 500: the worker raised"):
            asked.get("/broken")
        with pytest.raises(PosttrainError, match=f"its token is needed; set the environment variable {TOKEN}"):
            asked.get("/locked")
        with pytest.raises(PosttrainError, match="answered no JSON; expected a vLLM server"):
            asked.get("/text")
    with pytest.raises(EngineLost, match="does not answer"):
        asked.get("/good")


def test_a_server_that_is_no_vllm_is_refused() -> None:
    models = {"data": [{"id": "m", "max_model_len": 64}]}
    answers = {"/health": (200, b""), "/v1/models": (200, models), "/weight_info": (404, {})}
    no_transfer = pytest.raises(PosttrainError, match=r"has no /weight_info: .*start one with posttrain serve")
    with server(answers) as url, no_transfer:
        Engines(EngineChoice(url)).check()
    with pytest.raises(PosttrainError, match=r"does not answer .*; expected a vLLM server there"):
        Engines(EngineChoice(url)).check()


def test_a_server_ends_with_all_that_it_started() -> None:
    """Also where it was killed before, and its children live on."""
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    program = f"import subprocess, sys; {child}; print(1, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.kill()
    process.wait()
    stop_group(process)
    process.stdout.read()  # ends when the child's end of the pipe does
