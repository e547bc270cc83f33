"""The engine in its own thread, its events in the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from .convert.engine import Engine
from .convert.engine_request import Event, Request


class Worker:
    """Steps the engine while there is something to do.

    Its methods belong to the event loop's thread, from `start` to `stop`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._queues: dict[int, asyncio.Queue[Event]] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="purelm-engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step under way; whoever still waits is told "cancelled"."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)
        self._deliver([Event(i, None, "cancelled") for i in self._queues])

    def submit(self, requests: Sequence[Request]) -> tuple[list[int], asyncio.Queue[Event]]:
        """Queue all of them or, raising what `Engine.add` does, none: their ids and events."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self.engine.add(request))
                self._queues[ids[-1]] = queue
        except BaseException:
            self.cancel(ids)
            raise
        self._wake.set()
        return ids, queue

    def cancel(self, ids: Sequence[int]) -> None:
        """End what still runs of them."""
        for request_id in ids:
            if request_id in self._queues:
                self.engine.cancel(request_id)
        self._wake.set()

    def cancel_all(self) -> None:
        """End all that runs or waits."""
        self.cancel([*self._queues])

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while self.engine.busy and not self._stopping:
                self._loop.call_soon_threadsafe(self._deliver, self._step())

    def _step(self) -> list[Event]:
        try:
            return self.engine.step()
        except Exception as problem:
            # A defect: nobody may wait for ever, and the thread lives on.
            failed = [*self._queues]
            for request_id in failed:
                self.engine.cancel(request_id)
            return [Event(request_id, None, "error", error=problem) for request_id in failed]

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            # In the loop's thread, so `submit` has entered the queue of every event.
            queue = self._queues.get(event.id)
            if queue is not None:
                queue.put_nowait(event)
                if event.finish is not None:
                    del self._queues[event.id]
