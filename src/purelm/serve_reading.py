"""Requests' bodies: taken from who may ask, within limits, and read beside the event loop."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from . import serve_json
from .errors import BusyError
from .serve_options import Options, loopback
from .serve_requests import Asked, Refusal

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

# How a body becomes requests to the engine.
Read = Callable[[dict[str, Any]], Asked]


class Reading:
    """Reads bodies in one thread, for rendering a template and tokenizing a long text take a while.

    At most `most` are held at once, each of at most max_body bytes, and each must have come in
    body_seconds. Its methods belong to the event loop's thread.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.most = 2 * (options.slots + options.max_queue) + 8
        self._held = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="purelm-reading")

    async def read(self, request: HttpRequest, how: Read) -> Asked:
        """What an allowed request asks for; raises Refusal, BusyError, and what `how` does."""
        from starlette.requests import ClientDisconnect

        allow(request, self.options)
        # Other kinds could be sent by any page that a browser on this machine shows.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal("the content type must be application/json", status=415)
        if self._held >= self.most:
            raise BusyError(f"{self._held} requests are being read; come again later")
        self._held += 1
        try:
            seconds = self.options.body_seconds
            try:
                raw = await asyncio.wait_for(_bytes(request, self.options.max_body), seconds)
            except TimeoutError:
                raise Refusal(f"the body has not come in {seconds} s", status=408) from None
            except ClientDisconnect:
                raise Refusal("the client has gone before its body came") from None
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._asked, raw, how)
        finally:
            self._held -= 1

    async def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._pool.shutdown)

    def _asked(self, raw: bytes, how: Read) -> Asked:
        try:
            body = serve_json.read(raw)
        except ValueError:
            raise Refusal("the body is not JSON") from None
        if not isinstance(body, dict):
            raise Refusal("the body is not a JSON object")
        check_model(body.get("model"), self.options)
        return how(body)


def allow(request: HttpRequest, options: Options) -> None:
    """Raise Refusal for who may not ask.

    Without a key, whoever reaches this machine's loopback address may. A page in a browser here can
    reach it too, by a name of its own that it lets point there; but its requests bear that name.
    """
    if options.api_key is None:
        name = _hostname(request.headers.get("host", options.host))
        ours = map(_hostname, (options.host, *options.allowed_hosts))
        if not loopback(name) and name not in ours:
            raise Refusal(
                f"the host {name!r} is not this server's; name it with --allow-host, or set an API "
                "key",
                status=403,
                code="host_not_allowed",
            )
        return
    given = request.headers.get("authorization", "")
    wanted = f"Bearer {options.api_key}"
    # Headers are bytes, which Starlette reads as Latin-1.
    if not hmac.compare_digest(given.encode("latin-1"), wanted.encode()):
        raise Refusal("the API key is missing or wrong", status=401, code="invalid_api_key")


def check_model(name: Any, options: Options) -> None:
    """Raise Refusal for another model than is served."""
    if name != options.name:
        raise Refusal(
            f"the model {name!r} does not exist here; there is {options.name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


async def _bytes(request: HttpRequest, most: int) -> bytes:
    """The body, read no further than the limit."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > most:
            raise Refusal(f"the body has more than {most} bytes", status=413)
    return bytes(raw)


def _hostname(header: str) -> str:
    """Of a Host header, without its port: a name, or an address."""
    name = header.strip().lower().rstrip(".")
    if name.startswith("["):
        return name[1:].partition("]")[0]
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.partition(":")[0].rstrip(".")
