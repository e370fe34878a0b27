"""Who may speak to the server, and what with: checked before any route.

A page of another site can make a browser send requests to 127.0.0.1. Its Host is then that site's (DNS rebinding), or
its Origin (a form, `fetch`), or the body is text/plain, which browsers send without asking. A browser cannot send a
bearer token with a page's address, so there the key may come in a cookie, which it gets for `/?key=KEY`.
"""

import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote_to_bytes, urlsplit

LARGEST = 20_000_000
"""bytes of a body"""
DRAINED = 3 * LARGEST
"""bytes that are taken before a body is refused: a client that is still sending does not see the answer"""
JSON, FORM = "application/json", "multipart/form-data"
FORMS = ("/v1/images/edits", "/gradio_api/upload")
"""the paths that take forms"""
COOKIE = "flux_core_key"
OWN = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
HEADERS = (
    (b"content-security-policy", OWN),
    (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"),
)  # fmt: skip
"""of every answer: a page loads nothing from elsewhere, is in no other page, and tells nobody its address"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """An ASGI application around another: 401, 403, 411, 413 and 415 are its answers."""

    def __init__(
        self, app: Any, hosts: tuple[str, ...] = LOOPBACK, key: str | None = None, paths: re.Pattern[str] | None = None
    ) -> None:
        """hosts: names by which the server may be called; none: any. key: what clients must send. paths: those that are
        there at all; None: the application knows."""
        self.app, self.hosts, self.key, self.paths = app, hosts, key, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self.refusal(scope["method"], scope["path"], headers, scope["query_string"]):
            await drain(receive)
            await answer(send, *refused)
            return
        if (
            self.key is not None
            and scope["path"] == "/"
            and (said := parse_qs(scope["query_string"].decode("latin-1")).get("key"))
        ):
            await self._let_in(send, said[0].encode())
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, guarded)

    async def _let_in(self, send: Send, said: bytes) -> None:
        """To the page with the key in a cookie, so that it is in no address."""
        if not self._is_key(said):
            await answer(send, 401, WRONG_KEY)
            return
        cookie = f"{COOKIE}={quote(said)}; Path=/; HttpOnly; SameSite=Strict".encode()
        headers = [(b"location", b"/"), (b"set-cookie", cookie), (b"content-length", b"0"), *HEADERS]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _is_key(self, said: bytes) -> bool:
        return hmac.compare_digest(said, (self.key or "").encode())

    def _knows_key(self, headers: MutableMapping[str, str]) -> bool:
        """Whether a request has the key, as a bearer token or in a cookie."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        cookies = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        found = [token.encode("latin-1")] if kind == "Bearer" else []
        found += [unquote_to_bytes(value) for name, _, value in cookies if name == COOKIE]
        return sum(self._is_key(one) for one in found) > 0

    def refusal(
        self, method: str, path: str, headers: MutableMapping[str, str], query: bytes = b""
    ) -> tuple[int, str] | None:
        """The status and the sentence for a request that is refused."""
        host = headers.get("host", "")
        if self.hosts and split(f"//{host}")[0] not in self.hosts:
            return 403, f"this server is not {host[:80]!a}"
        origin = headers.get("origin")
        if origin is not None and split(origin)[1] != host:
            return 403, f"pages of {origin[:80]!a} may not speak to this server"
        if self.key is not None and not (self._knows_key(headers) or (path == "/" and b"key=" in query)):
            return 401, WRONG_KEY
        if self.paths is not None and not self.paths.match(path):
            return 404, f"there is no {path[:80]!a} here"
        return None if method in ("GET", "HEAD") else refused_body(path, headers)


def refused_body(path: str, headers: MutableMapping[str, str]) -> tuple[int, str] | None:
    """`Guard.refusal` for what the headers say of a body. Forms, which other sites may send, have one route."""
    kind, length = headers.get("content-type", "").partition(";")[0].strip().lower(), headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST:
        return 413, f"a request has at most {LARGEST:,} bytes"
    if kind == FORM and path in FORMS:
        return None if "content-length" in headers else (411, "a form must say its length")
    empty = not kind and length == "0" and "transfer-encoding" not in headers
    return None if kind == JSON or empty else (415, f"a body must be {JSON}, and for {FORMS[0]} {FORM}")


def split(address: str) -> tuple[str, str]:
    """The host of an address, and host and port as they stand; empty for none."""
    try:
        found = urlsplit(address)
        return found.hostname or "", found.netloc
    except ValueError:
        return "", ""


WRONG_KEY = "the key is missing or wrong. Next: Authorization: Bearer KEY, or in a browser /?key=KEY"
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
