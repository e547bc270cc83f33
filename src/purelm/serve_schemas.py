"""Schemas that clients send, compiled where they can do no harm.

xgrammar's compilation has no bound: a schema of a hundred characters may take hours, and cannot be
interrupted. So each is compiled first in a process of its own, which can be ended; only what that
did in time is compiled in this one, in one thread, beside the event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from .convert import grammar
from .convert.constraint import Constraint
from .convert.engine import Engine
from .convert.engine_request import Request
from .errors import ArgumentError, BusyError, PurelmError

SECONDS = 10.0
# Bytes beyond what the process has when it begins; bounded where the system can, as Linux does.
MEMORY = 2 << 30
# Schemas that are known to compile in time.
KNOWN = 64


class Schemas:
    """Prepares an engine's requests. At most `most` wait for their schemas, which each may take
    `seconds` and `memory` to compile.

    Its methods belong to the event loop's thread.
    """

    def __init__(
        self, engine: Engine, most: int, *, seconds: float = SECONDS, memory: int = MEMORY
    ) -> None:
        self.engine, self.most, self.seconds, self.memory = engine, most, seconds, memory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="purelm-schemas")
        self._waiting = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._known: dict[Constraint, None] = {}

    async def prepare(self, requests: Sequence[Request]) -> None:
        """As `Engine.prepare`; raises ArgumentError too for what takes too long or too much, and
        BusyError where as many wait as may.
        """
        if all(request.constraint is None for request in requests):
            return
        if self._waiting >= self.most:
            raise BusyError(f"{self._waiting} schemas wait to be compiled; come again later")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._pool, self._prepare, requests)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """End the process and the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._end()
        await asyncio.to_thread(self._pool.shutdown)
        self._end()

    def _prepare(self, requests: Sequence[Request]) -> None:
        for constraint in {r.constraint for r in requests}:
            if constraint is not None and constraint.json is not None:
                self._try(constraint)
        self.engine.prepare(requests)

    def _try(self, constraint: Constraint) -> None:
        """Raise ArgumentError where the other process does not end with it in time."""
        if constraint in self._known:
            return
        child, late = self._started(), threading.Event()

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        ended = _asked(child, constraint.json)
        timer.cancel()
        timer.join()
        if late.is_set() or not ended:
            self._end()
            raise ArgumentError(
                f"the schema cannot be compiled in {self.seconds:g} s and {self.memory >> 20} MiB; "
                "make it simpler: fewer levels, optional properties and repeats in patterns"
            )
        self._known[constraint] = None
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]

    def _started(self) -> subprocess.Popen[bytes]:
        child = self._child
        if child is None:
            engine = self.engine
            tokens = grammar.tokens_of(engine.tokenizer, engine.model.spec.vocab, engine.eos_ids)
            child = self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
            if not _asked(child, tokens.serialize_json()):
                self._end()
                raise RuntimeError("the process that compiles schemas does not start")
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with suppress(BrokenPipeError), child:
                pass  # closes its pipes and waits for it


def _asked(child: subprocess.Popen[bytes], text: str | None) -> bool:
    """Give the process a text; whether it answered."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(text).encode() + b"\n")
        child.stdin.flush()
    except (BrokenPipeError, ValueError):  # it has ended, or its pipes were closed
        return False
    return bool(child.stdout.readline())


def _bound_memory(more: int) -> None:
    """This process may have so many bytes more than it has now."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """The other process: a tokenizer's tokens, then schemas, a line each; an answer when done."""
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline()))
    compiler = grammar.compiler_of(info)
    _bound_memory(int(sys.argv[1]))
    print(flush=True)
    for line in sys.stdin:
        # What cannot be read is no harm: it is found again, and said, where it was asked for.
        with suppress(PurelmError):
            grammar.compiled(compiler, Constraint(json=json.loads(line)))
        print(flush=True)


if __name__ == "__main__":
    main()
