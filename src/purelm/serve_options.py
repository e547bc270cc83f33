"""What `purelm serve` can be told."""

from __future__ import annotations

import argparse
import ipaddress
import os
from dataclasses import dataclass

from .errors import ArgumentError


@dataclass(frozen=True)
class Options:
    """name: what clients call the model. host: only loopback goes without an api_key.

    slots: answers made at once; max_queue: more that may wait; lookup_tokens: as of the engine.
    max_tokens: of one answer; max_choices: of one request; max_body: bytes of one request, which
    must come in body_seconds.
    allowed_hosts: names of this server's, beside those of loopback, that clients without a key may
    ask it by. grace: seconds that answers under way get to end in when the server stops.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    slots: int = 8
    max_queue: int = 64
    lookup_tokens: int = 0
    max_tokens: int = 4096
    max_choices: int = 16
    max_body: int = 4 * 1024 * 1024
    body_seconds: float = 60
    allowed_hosts: tuple[str, ...] = ()
    grace: int = 5

    def __post_init__(self) -> None:
        for field in ("slots", "max_tokens", "max_choices", "max_body"):
            if getattr(self, field) < 1:
                raise ArgumentError(f"{field} is {getattr(self, field)}, expected at least 1")
        if self.max_queue < 0:
            raise ArgumentError(f"max_queue is {self.max_queue}, expected at least 0")
        if not 0 <= self.port < 65536:
            raise ArgumentError(f"port is {self.port}, expected 0 to 65535")
        if self.api_key == "":
            raise ArgumentError("the API key is empty; leave it out or give one")
        if self.api_key is None and not loopback(self.host):
            raise ArgumentError(
                f"{self.host} can be reached from other machines: set PURELM_API_KEY (or "
                "--api-key), or listen on 127.0.0.1"
            )


def loopback(host: str) -> bool:
    """Is it a name or address of this machine for itself?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return ("." + host.lower()).endswith(".localhost")


LOOKUP = "guess so many tokens ahead by what followed their like (default: none)"
ALLOW = "another name of this server's that clients may ask it by without a key; repeatable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line's arguments: those of loading a model, and the fields of `Options`."""
    one = parser.add_argument
    one("model", metavar="MODEL", help="model or adapter folder, or hub id")
    one("--4bit", dest="in_4bit", action="store_true", help="load in 4 bits")
    one("--dtype", help="float32 or bfloat16 (default: float32 on a CPU)")
    one("--device", help="cpu, cuda, cuda:1 (default: the first GPU if any)")
    one("--name", help="what clients call the model (default: MODEL as given)")
    one("--host", default=Options.host, help="(default: 127.0.0.1, this machine alone)")
    one("--port", type=int, default=Options.port, help="(default: 8000)")
    one("--api-key", help="what clients must send (default: PURELM_API_KEY, else none)")
    one("--allow-host", action="append", default=[], metavar="NAME", help=ALLOW)
    one("--slots", type=int, default=Options.slots, help="answers made at once (default: 8)")
    one("--max-queue", type=int, default=Options.max_queue, help="that wait (default: 64)")
    one("--lookup-tokens", type=int, default=0, help=LOOKUP)
    one("--max-tokens", type=int, default=Options.max_tokens, help="of an answer (default: 4096)")


def from_arguments(args: argparse.Namespace) -> Options:
    """Raises ArgumentError for what cannot be."""
    key = args.api_key if args.api_key is not None else os.environ.get("PURELM_API_KEY")
    return Options(
        name=args.name or args.model,
        host=args.host,
        port=args.port,
        api_key=key,
        allowed_hosts=tuple(args.allow_host),
        slots=args.slots,
        max_queue=args.max_queue,
        lookup_tokens=args.lookup_tokens,
        max_tokens=args.max_tokens,
    )
