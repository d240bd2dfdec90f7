"""vLLM as a server that the engine starts, on this machine alone, with a token that nobody else knows."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from posttrain.rollout.vllm.backend import EXTRAS, Answer, Done, EngineLost, Request, Shape, exact
from posttrain.rollout.vllm.guard import TOKEN
from posttrain.rollout.vllm.served import Served
from posttrain.trajectory import PosttrainError

HOST = "127.0.0.1"
START_SECONDS = 900.0  # for loading a model and, with a GPU, compiling it
STOP_SECONDS = 15.0
REAP_SECONDS = 2.0  # between a connection that breaks off and the process that has ended
FINDER = (
    "import importlib.util as u, sys; found = [u.find_spec(n) for n in ('vllm', 'posttrain')]; "
    "sys.exit(any(s is None or s.origin is None for s in found))"
)


class Started(Served):
    """A server of the engine's own. It ends with the engine, however that ends.

    python: the interpreter that has vLLM and posttrain; this one where None. options: arguments of vLLM's engine.
    """

    def __init__(self, *, python: str | None = None, options: dict[str, Any] | None = None) -> None:
        super().__init__(f"http://{HOST}:1", None, shared=True)
        self.python, self.options = python or sys.executable, dict(options or {})
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], Any] | None = None

    @property
    def exact_precision(self) -> bool:
        return exact(self.options)

    @property
    def where(self) -> str:
        return "the vLLM server"

    @property
    def max_length(self) -> int | None:
        return self._limit if self.running else self.options.get("max_model_len")

    def check(self) -> None:
        check_python(self.python)

    def start(self, folder: Path, shape: Shape) -> None:
        token, port = secrets.token_urlsafe(32), free_port()
        self.server = type(self.server)(f"http://{HOST}:{port}", token)
        log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server lives
        process = subprocess.Popen(
            [*command(self.python, str(folder), HOST, port, shape, self.options), "--with-parent"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {TOKEN: token},
            start_new_session=True,  # a process group of its own, which ends as a whole
        )
        self.process, self._log = process, log
        self._end = weakref.finalize(self, stop_group, process)
        self._wait()
        self._running = True

    def _wait(self) -> None:
        """Until it answers."""
        begun, pause = time.monotonic(), 0.1
        while True:
            self._alive()
            try:
                self._greet()
                return
            except EngineLost as lost:
                if time.monotonic() - begun > START_SECONDS:
                    raise PosttrainError(
                        f"{lost}; it did not come up in {START_SECONDS:.0f} s: {self._said()}"
                    ) from lost
            time.sleep(pause)
            pause = min(1.0, 1.2 * pause)

    def _alive(self) -> None:
        """Raise where the process has ended by itself: it cannot have been up."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None:
            raise PosttrainError(f"{self.where} ended with {_code(code)} before it was up: {self._said()}")

    def _said(self) -> str:
        """The last line of its log that tells of an error, else the last one."""
        assert self._log is not None
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line and "EngineCore failed" not in line]
        told = (telling or lines or ["it said nothing"])[-1]
        return told[-400:]

    def generate(self, asked: Sequence[Request], sampling: dict[str, Any], done: Done) -> list[Answer]:
        try:
            return super().generate(asked, sampling, done)
        except EngineLost as lost:
            assert self.process is not None
            try:
                code = self.process.wait(REAP_SECONDS)
            except subprocess.TimeoutExpired:
                raise lost from None
            raise EngineLost(f"{self.where} ended with {_code(code)}") from lost

    def recover(self, folder: Path, shape: Shape) -> None:
        """End what is left of it, and start another."""
        self.close()
        self.start(folder, shape)

    def close(self) -> None:
        super().close()
        if self._end is not None:
            self._end()  # once, whoever calls it first
        if self._log is not None:
            self._log.close()
            self._log = None


def command(python: str, folder: str, host: str, port: int, shape: Shape, options: dict[str, Any]) -> list[str]:
    """What starts a server; the token is in its environment."""
    return [
        python, "-m", "posttrain.rollout.vllm.serve", folder, "--host", host, "--port", str(port),
        "--dtype", shape.dtype, "--rows", str(shape.rows), "--max-length", str(shape.max_length),
        "--options", json.dumps(options),
    ]  # fmt: skip


def check_python(python: str) -> None:
    """An interpreter that has both packages."""
    try:
        found = subprocess.run([python, "-c", FINDER], capture_output=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PosttrainError(
            f"cannot run {python} ({error}); expected the Python of an environment with vLLM"
        ) from error
    if found.returncode:
        raise PosttrainError(
            f"vLLM, or posttrain beside it, is not installed for {python}: {EXTRAS}, or name the Python of an "
            f"environment that has both: engine: {{name: vllm-server, python: PATH}}"
        )


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raise where a port cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise PosttrainError(f"cannot listen on {host}:{port} ({reason}); choose another --port") from error


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it has started."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers, where it was killed and they were not
    process.wait()


def _code(code: int) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
