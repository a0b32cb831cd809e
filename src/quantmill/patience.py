"""How long a registry is waited for, and how often it is asked again."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from quantmill.errors import RegistryError


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of waiting, in seconds, and of tries.

    `stall` is how long nothing may arrive; `least_rate` how many bytes a second must arrive over
    such a time. A connection that moved `counts` bytes before it broke is not held against the
    registry.
    """

    tries: int = 6
    first_delay: float = 0.5
    longest_delay: float = 30.0
    connect: float = 10.0
    stall: float = 30.0
    least_rate: int = 1024
    counts: int = 1 << 20

    def delay(self, failures: int) -> float:
        """Seconds before the next try: doubled each time, with some chance in it."""
        most = min(self.longest_delay, self.first_delay * 2.0 ** min(failures - 1, 30))
        return most * random.uniform(0.5, 1.0)


class Temporary(Exception):
    """A failure that may be gone at the next try; `after` is when the registry asks for one."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Cancelled(Exception):
    """Something else failed, or the user stopped the command: this work is not needed."""


class Tries:
    """The failures of one piece of work."""

    def __init__(self, patience: Patience, stop: threading.Event) -> None:
        self._patience, self._stop = patience, stop
        self._failures = 0

    def forgive(self) -> None:
        """Count again from zero: there was progress."""
        self._failures = 0

    def failed(self, error: Temporary) -> None:
        """Wait before the next try; raises RegistryError after the last, Cancelled when stopped."""
        self._failures += 1
        if self._failures >= self._patience.tries:
            raise RegistryError(
                f"{error}, after {self._failures} tries",
                kind="registry_unavailable",
                hint="run the same command again later: what has been moved is not moved again",
            ) from None
        delay = self._patience.delay(self._failures)
        if error.after is not None:
            delay = max(delay, min(error.after, self._patience.longest_delay))
        if self._stop.wait(delay):
            raise Cancelled
