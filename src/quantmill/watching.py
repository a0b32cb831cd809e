"""Exchanges that go on without moving anything are noticed, and their connections broken.

The client's reads end after some seconds without a byte. But bytes that are no content (interim
answers without end, header lines or lengths of chunks that come one character at a time) keep them
waiting for ever: so content is counted here, and looked at from outside.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

from quantmill.patience import Patience


class Pace:
    """What one exchange has moved, in either direction; `broken` when that was too little."""

    def __init__(self) -> None:
        self.count = self.before = 0
        self.since = time.monotonic()
        self.broken = False
        self.connection: socket.socket | None = None

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces, counted as they go."""
        for piece in pieces:
            self.count += len(piece)
            yield piece


class Watch:
    """Looks after the exchanges of one client, in a thread, and knows its connections."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._lock = patience, threading.Lock()
        self._paces: set[Pace] = set()
        self._connections: WeakSet[socket.socket] = WeakSet()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no longer."""
        self._closed.set()
        self._thread.join()

    def trace(self, _: str, info: Mapping[str, Any]) -> None:
        """Take note of a connection: what the client calls at each of its steps."""
        stream = info.get("return_value")
        if stream is not None and hasattr(stream, "get_extra_info"):
            found = stream.get_extra_info("socket")
            if isinstance(found, socket.socket):
                with self._lock:
                    self._connections.add(found)

    @contextmanager
    def over(self) -> Iterator[Pace]:
        """Look after one exchange."""
        pace = Pace()
        with self._lock:
            self._paces.add(pace)
        try:
            yield pace
        finally:
            with self._lock:
                self._paces.discard(pace)

    def break_all(self) -> None:
        """Break every connection, whatever it is waiting for."""
        with self._lock:
            for connection in self._connections:
                _shut(connection)

    def _look(self) -> None:
        window, least = 2 * self._patience.stall, self._patience.least_rate * self._patience.stall
        while not self._closed.wait(self._patience.stall / 4):
            now = time.monotonic()
            with self._lock:
                late = [pace for pace in self._paces if now - pace.since >= window]
            for pace in late:
                if pace.count - pace.before < least:
                    self._break(pace)
                pace.since, pace.before = now, pace.count

    def _break(self, pace: Pace) -> None:
        pace.broken = True
        if pace.connection is not None:
            _shut(pace.connection)
        else:  # which one it uses shows in its answer only; the other exchanges try again
            self.break_all()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
