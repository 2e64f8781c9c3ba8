"""SIGTERM and Ctrl-C: a flag, an agreement of all ranks at the next step boundary, then one save and exit code 0.

The signal only sets the flag. Each step starts with an all-reduce of the token counts, and the flag travels in it, so
all ranks leave the loop after the same step. A rank that hangs would make the others wait for ever; Python runs signal
handlers between bytecodes only, so a thread listens on the wake-up descriptor, which the C handler writes to even while
the main thread waits inside a collective. No agreement within `grace` seconds plus the longest step seen (evaluation
and saving do not count; a hang there ends by the collectives' own time-out): no save, exit code 14. A second signal
more than two seconds after the first ends the process at once, without a save (an earlier one is the copy that a
launcher forwards).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_NO_AGREEMENT = 14
FORWARDED = 2.0  # seconds


class StopFlag:
    """`agreed()` ends the waiting; `close` restores the handlers. `listen` False (not in the main thread): no signals."""

    def __init__(self, grace: float = 5.0, *, listen: bool = True) -> None:
        self.grace = grace
        self.first: float | None = None
        self.signal_name = ""
        self.longest_step = 0.0
        self._boundary: float | None = None  # of the last step; what comes before the first one is not a step
        self._hurry = True
        self._agreed = threading.Event()
        self._handlers: dict[signal.Signals, Any] = {}
        if listen:
            self._install()

    def _install(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    @property
    def requested(self) -> bool:
        return self.first is not None

    def _listen(self) -> None:
        while data := self._reader.recv(16):
            for number in data:
                if number in SIGNALS:
                    self._on_signal(signal.Signals(number).name)

    def _on_signal(self, name: str) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.signal_name = now, name
            threading.Thread(target=self._enforce, name="stop-enforce", daemon=True).start()
        elif now - self.first > FORWARDED:
            self._end(f"a second {name}: leaving at once, without a save")

    def _enforce(self) -> None:
        limit, waited, tick = self.grace + self.longest_step, 0.0, 0.1
        while not self._agreed.wait(tick):
            waited += tick if self._hurry else 0.0
            if waited > limit:
                self._end(f"{self.signal_name}: no agreement on a step to stop at within {limit:.1f} s; nothing is saved")

    def _end(self, reason: str) -> None:
        print(f"swiftk: {reason}", file=sys.stderr, flush=True)
        os._exit(EXIT_NO_AGREEMENT)

    def at_boundary(self) -> int:
        """1 if this rank wants to stop, for the step's all-reduce."""
        now = time.monotonic()
        if self._boundary is not None:
            self.longest_step = max(self.longest_step, now - self._boundary)
        self._boundary = now
        return int(self.requested)

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Around evaluation and saving, which take what they take."""
        begin, self._hurry = time.monotonic(), False
        try:
            yield
        finally:
            self._hurry = True
            if self._boundary is not None:
                self._boundary += time.monotonic() - begin

    def agreed(self) -> None:
        self._agreed.set()

    def close(self) -> None:
        self._agreed.set()
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._writer.close()
