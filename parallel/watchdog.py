"""Names the rank that died or hangs, and ends this process instead of waiting for it.

Each rank's thread writes a counter and the position of its last collective into the store every `interval` seconds and
reads the others'. A counter that stands still for `timeout` seconds is a dead rank. A rank that fails leaves its reason
first. When the store itself cannot be reached, the process that hosts it (rank 0, or torchrun's agent) is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

EXIT_CODE = 13  # of a process that ends because another one died
BEHIND = 2.0  # seconds by which it ends later than that one: torchrun's summary blames the first to fail, in whole seconds


class Watchdog:
    """`store` must be a client of its own: a blocking call of another thread would hold up the heartbeat. `leave` is told why
    this process ends because of another."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, *, position: Callable[[], tuple[int, str]],
        leave: Callable[[str], None] = lambda reason: None, timeout: float = 20.0,
    ) -> None:  # fmt: skip
        self.store, self.rank, self.size, self.timeout, self.position = store, rank, size, timeout, position
        self.leave = leave
        self.interval = min(2.0, timeout / 5)
        self.lock, self.ending = threading.Lock(), threading.Lock()
        self.beat = 0
        self.last: dict[int, tuple[str, float]] = {}  # rank -> (value seen, when it was new)
        self.stopped = threading.Event()
        self._write()  # so that a key is missing only where a rank never came up
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        self.beat += 1
        count, where = self.position()
        self.store.set(f"beat/{self.rank}", f"{self.beat}|{count}|{where}")

    def _others(self) -> dict[int, str]:
        """rank -> "beat|collectives|where" of those that have written, or "failed|why", or "done"."""
        found = {}
        for r in range(self.size):
            if r != self.rank and self.store.check([f"beat/{r}"]):
                found[r] = self.store.get(f"beat/{r}").decode()
        return found

    def verdict(self) -> str | None:
        """Why this process cannot go on, or None."""
        with self.lock:
            try:
                self._write()
                others = self._others()
            except Exception as error:
                return f"rank 0 or its launcher is gone: the store does not answer ({type(error).__name__})"
            now = time.monotonic()
            for r, value in others.items():
                if value.startswith("failed|"):
                    return f"rank {r} failed: {value.split('|', 1)[1]}"
                if value == "done":
                    self.last.pop(r, None)
                elif self.last.get(r, ("", 0.0))[0] != value:
                    self.last[r] = (value, now)
                elif now - self.last[r][1] > self.timeout:
                    return f"rank {r} died: no sign of life for {self.timeout:.0f} s, last seen at {value.split('|', 2)[2]}"
        return None

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            reason = self.verdict()
            if reason and not self.stopped.is_set():
                self.end(reason)

    def end(self, reason: str) -> None:
        """Prints and exits: the main thread may hang in a collective that nobody will answer."""
        self.ending.acquire()  # never released: the thread and a failed collective may both come here, one of them speaks
        message = f"rank {self.rank} stops because {reason}"
        print(f"swiftk: {message}", file=sys.stderr, flush=True)
        time.sleep(BEHIND)
        self.leave(message)
        os._exit(EXIT_CODE)

    def after_failed_collective(self, error: BaseException) -> str:
        """A collective raised: wait until it is known which rank is to blame, at most timeout + 2 intervals."""
        deadline = time.monotonic() + self.timeout + 2 * self.interval
        while time.monotonic() < deadline:
            reason = self.verdict()
            if reason:
                return reason
            time.sleep(self.interval / 4)
        mine, where = self.position()
        with self.lock:
            counts = {r: value.split("|", 2) for r, value in self._others().items() if value.count("|") == 2}
        late = [f"rank {r} is at collective {int(c)} ({w})" for r, (_, c, w) in counts.items() if int(c) != mine or w != where]
        return f"{error}; this rank is at collective {mine} ({where}); " + ("; ".join(late) or "all ranks are at the same one")

    def reported(self, reason: str, seconds: float = 3.0) -> bool:
        """Whether rank 0 fails for the same reason, so that one message is enough; waits for it up to `seconds`.

        Call it before `failed`: rank 0 would otherwise stop because of this rank, in the middle of its own message.
        """
        self.stopped.set()
        deadline = time.monotonic() + seconds
        while self.rank and time.monotonic() < deadline:
            with self.lock:
                try:
                    if self._others().get(0) == f"failed|{reason}":
                        return True
                except Exception:  # the store is gone, and rank 0 with it: it has said its own
                    return False
            time.sleep(0.1)
        return False

    def failed(self, reason: str) -> None:
        """Leaves the reason for the others."""
        self.stopped.set()
        with self.lock:
            try:
                self.store.set(f"beat/{self.rank}", f"failed|{reason}")
            except Exception:  # the store is gone; so are those who would read it
                return

    def close(self) -> None:
        """A clean end: the others do not miss this rank."""
        self.stopped.set()
        with self.lock:
            try:
                self.store.set(f"beat/{self.rank}", "done")
            except Exception:  # rank 0 ended first and took the store along
                return
