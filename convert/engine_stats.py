"""What the engine says of its work now and then."""

import logging
import time
from collections.abc import Callable

EVERY = 10.0

_logger = logging.getLogger("purelm.engine")


class Stats:
    """Counts what steps did, and logs a line every EVERY seconds in which there were some."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._tokens = self._prompts = self._known = 0

    def note(
        self, *, tokens: int, running: int, waiting: int, held: float, known: int, prompts: int
    ) -> None:
        """After a step: new tokens, requests running and waiting, the share of the cache's blocks
        that are held, and of all prompts so far the tokens and those known before.
        """
        self._tokens += tokens
        now = self._clock()
        seconds = now - self._began
        if seconds < EVERY:
            return
        new, shared = prompts - self._prompts, known - self._known
        _logger.info(
            "%.1f new tokens/s, %.1f prompt tokens/s (%.0f%% known before), %d running, "
            "%d waiting, %.1f%% of the cache held",
            self._tokens / seconds,
            new / seconds,
            100 * shared / new if new else 0.0,
            running,
            waiting,
            100 * held,
        )
        self._began, self._tokens, self._prompts, self._known = now, 0, prompts, known
