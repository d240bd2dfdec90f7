"""Inside vLLM's server: no answer without the token.

vLLM's own `--api-key` leaves the routes that pause it and change its weights open to everybody who reaches the port.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

TOKEN = "POSTTRAIN_ENGINE_TOKEN"  # the environment variable, on both sides; a command line is seen by other users

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireToken:
    """ASGI middleware: every request carries `Authorization: Bearer TOKEN`, or is answered 401."""

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN)
        if not token:
            raise RuntimeError(f"the server has no token: set {TOKEN}")
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        if len(given) == 1 and hmac.compare_digest(given[0], self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "the token is missing or wrong"}'})
