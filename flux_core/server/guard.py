"""Who may speak to the server, and what with: checked before any route.

A page of another site can make a browser send requests to 127.0.0.1. Its Host is then that site's (DNS rebinding), or
its Origin (a form, `fetch`), or the body is text/plain, which browsers send without asking.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LARGEST = 20_000_000
"""bytes of a body"""
DRAINED = 3 * LARGEST
"""bytes that are taken before a body is refused: a client that is still sending does not see the answer"""
JSON, FORM = "application/json", "multipart/form-data"
FORMS = "/v1/images/edits"
"""the one path that takes forms"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """An ASGI application around another: 401, 403, 411, 413 and 415 are its answers."""

    def __init__(self, app: Any, hosts: tuple[str, ...] = LOOPBACK, key: str | None = None) -> None:
        """hosts: names by which the server may be called; none: any. key: what clients must send as a bearer token."""
        self.app, self.hosts, self.key = app, hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self.refusal(scope["method"], scope["path"], headers):
            await drain(receive)
            await answer(send, *refused)
            return
        await self.app(scope, receive, send)

    def refusal(self, method: str, path: str, headers: MutableMapping[str, str]) -> tuple[int, str] | None:
        """The status and the sentence for a request that is refused."""
        host = headers.get("host", "")
        if self.hosts and split(f"//{host}")[0] not in self.hosts:
            return 403, f"this server is not {host[:80]!a}"
        origin = headers.get("origin")
        if origin is not None and split(origin)[1] != host:
            return 403, f"pages of {origin[:80]!a} may not speak to this server"
        said, wanted = headers.get("authorization", "").encode("latin-1"), f"Bearer {self.key}".encode()
        if self.key is not None and not hmac.compare_digest(said, wanted):
            return 401, "the key is missing or wrong. Next: Authorization: Bearer KEY"
        return None if method in ("GET", "HEAD") else refused_body(path, headers)


def refused_body(path: str, headers: MutableMapping[str, str]) -> tuple[int, str] | None:
    """`Guard.refusal` for what the headers say of a body. Forms, which other sites may send, have one route."""
    kind, length = headers.get("content-type", "").partition(";")[0].strip().lower(), headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST:
        return 413, f"a request has at most {LARGEST:,} bytes"
    if kind == FORM and path == FORMS:
        return None if "content-length" in headers else (411, "a form must say its length")
    empty = not kind and length == "0" and "transfer-encoding" not in headers
    return None if kind == JSON or empty else (415, f"a body must be {JSON}, and for {FORMS} {FORM}")


def split(address: str) -> tuple[str, str]:
    """The host of an address, and host and port as they stand; empty for none."""
    try:
        found = urlsplit(address)
        return found.hostname or "", found.netloc
    except ValueError:
        return "", ""


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
         500: "server_error"}  # fmt: skip
"""OpenAI's types of errors, by status; of the others that of a wrong request"""


def error_body(status: int, message: str) -> dict[str, Any]:
    """As OpenAI's servers say it."""
    return {
        "error": {"message": message, "type": KINDS.get(status, "invalid_request_error"), "param": None, "code": None}
    }


async def drain(receive: Receive) -> None:
    """Take what comes of a body, up to DRAINED."""
    taken = 0
    while taken < DRAINED:
        message = await receive()
        taken += len(message.get("body", b""))
        if not message.get("more_body"):
            return


async def answer(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
