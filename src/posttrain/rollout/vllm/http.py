"""Requests to a vLLM server: JSON over one connection each, with the token, errors told apart."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

from posttrain.rollout.vllm.backend import EngineLost, one_line, refused
from posttrain.rollout.vllm.guard import TOKEN
from posttrain.trajectory import PosttrainError

QUICK = 30.0  # seconds that a server has for an answer that costs it nothing


class Server:
    """A server at a URL. Connections go straight to it, past any proxy of the environment.

    Raises EngineLost where it cannot be reached, breaks off or fails (5xx), PosttrainError where it refuses (4xx).
    """

    def __init__(self, url: str, token: str | None) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise PosttrainError(f"engine {url!r} is no URL of a server; expected such as http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise PosttrainError(f"the engine's URL holds a password; put the token into {TOKEN} instead")
        self.url, self.token = url.rstrip("/"), token
        self._parts, self._port = parts, port
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def get(self, path: str, timeout: float | None = QUICK) -> Any:
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float | None = QUICK) -> Any:
        return self._ask("POST", path, body, timeout)

    def hang_up(self) -> None:
        """Break off every request that waits for an answer; each raises EngineLost in its own thread."""
        with self._lock:
            waiting = [c.sock for c in self._open]
        for sock in waiting:
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._port, timeout=timeout)
        with self._lock:
            self._open.add(connection)
        try:
            headers = {"Content-Type": "application/json"}
            if self.token is not None:
                headers["Authorization"] = f"Bearer {self.token}"
            text = None if body is None else json.dumps(body)
            connection.request(method, self._parts.path.rstrip("/") + path, text, headers)
            response = connection.getresponse()
            status, raw = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineLost(f"{self.url} does not answer ({error or type(error).__name__})") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if status >= 400:
            raise self._failure(status, raw.decode(errors="replace"), path)
        try:
            return json.loads(raw) if raw else None
        except ValueError:
            raise PosttrainError(f"{self.url}{path} answered no JSON; expected a vLLM server") from None

    def _failure(self, status: int, text: str, path: str) -> Exception:
        if status in (401, 403):
            given = "was refused" if self.token else "is needed"
            return PosttrainError(
                f"{self.url} answered {status}: its token {given}; set the environment variable {TOKEN} to the token "
                f"that the server was started with"
            )
        if status == 404:
            return PosttrainError(
                f"{self.url} has no {path}: expected a vLLM server with weight transfer; start one with posttrain serve"
            )
        message = _message(text)
        if status >= 500:
            return EngineLost(f"{self.url} failed with {status}: {message}")
        return refused(self.url, message)


def _message(text: str) -> str:
    """What an error says, in one line."""
    try:
        found = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found)
    except ValueError:
        pass
    return one_line(text)
