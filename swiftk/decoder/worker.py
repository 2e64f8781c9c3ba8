"""An engine in a thread of its own, for callers in an event loop.

Requests and aborts go in through lists under a condition, what a step gives comes back in one call of the loop. So the loop
never waits for a step, and nobody but the thread touches the engine."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.results import Update


class QueueFullError(Exception):
    """More prompt tokens would wait than may. retry_after: seconds until those that wait are about read."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(Exception):
    """A step has failed with everything that was under way, or the thread has ended."""


@dataclass(eq=False)
class Ticket:
    """One prompt on its way through the engine; its n sequences report to `updates`, which several tickets may share."""

    number: int  # the caller's
    text: str | None  # the prompt, where it was given as text
    tokens: list[int]
    params: SamplingParams
    adapter: str | None
    priority: int
    salt: str
    updates: asyncio.Queue[tuple[Ticket, Update | Exception]]
    accepted: asyncio.Future[None]
    queued: bool = False  # its prompt counts in the queue; the event loop's
    id: int = -1  # the engine's; the other three belong to its thread
    left: int = 0  # sequences that have not ended
    gone: bool = False

    @property
    def waiting(self) -> int:
        """Tokens that it has to have computed: the prompt once, and of it at least the last one again for each further of n."""
        return len(self.tokens) + self.params.n - 1


class Worker(threading.Thread):
    """Owns the engine. `submit`, `abort` and `close` are called from the event loop."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, max_queued_tokens: int) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self.loop, self.max_queued_tokens = engine, loop, max_queued_tokens
        self.queued_tokens = 0  # of prompts that have no token yet
        self.seconds = 0.0  # spent in steps
        self._work = threading.Condition()
        self._incoming: list[Ticket] = []
        self._gone: list[Ticket] = []
        self._closing = False
        self._tickets: dict[int, Ticket] = {}  # by the engine's id

    async def submit(self, tickets: Sequence[Ticket]) -> None:
        """Returns when the engine has taken them.

        Raises: QueueFullError, EngineError, or the ValueError of a prompt that the engine refuses; then it has none of them.
        """
        if not self.is_alive():
            raise EngineError("the engine's thread has ended")
        count = sum(ticket.waiting for ticket in tickets)
        if self.queued_tokens and self.queued_tokens + count > self.max_queued_tokens:
            rate = self.engine.num_computed_tokens / self.seconds if self.seconds else 0.0
            retry = min(60, max(1, math.ceil(self.queued_tokens / rate))) if rate else 1
            raise QueueFullError(
                f"{self.queued_tokens} prompt tokens are waiting and this request has {count}, wants at most "
                f"{self.max_queued_tokens} together; try again later",
                retry,
            )
        self.queued_tokens += count
        for ticket in tickets:
            ticket.queued = True
        with self._work:
            self._incoming += tickets
            self._work.notify()
        try:
            results = await asyncio.gather(*(ticket.accepted for ticket in tickets), return_exceptions=True)
        except asyncio.CancelledError:
            self.abort(tickets)
            raise
        if errors := [result for result in results if isinstance(result, BaseException)]:
            self.abort(tickets)
            raise errors[0]

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """Ends what has not ended; may be called more than once."""
        for ticket in tickets:
            self._begun(ticket)
        with self._work:
            self._gone += tickets
            self._work.notify()

    def stop(self) -> None:
        """After the step under way; who still waits is told."""
        with self._work:
            self._closing = True
            self._work.notify()

    def close(self) -> None:
        self.stop()
        self.join()

    def _begun(self, ticket: Ticket) -> None:
        if ticket.queued:
            ticket.queued = False
            self.queued_tokens -= ticket.waiting

    def _deliver(self, items: list[tuple[Ticket, Update | Exception | None]]) -> None:
        """In the event loop: what a step gave, or None or an error for a ticket that is new."""
        for ticket, item in items:
            if not ticket.accepted.done() and not isinstance(item, Update):
                ticket.accepted.set_result(None) if item is None else ticket.accepted.set_exception(item)
            elif item is not None:
                self._begun(ticket)
                ticket.updates.put_nowait((ticket, item))

    def run(self) -> None:
        try:
            self._serve()
        finally:  # closed, or a defect: nobody is to wait for ever
            with self._work:
                left = [*self._tickets.values(), *self._incoming]
            ended = EngineError("the server has been stopped" if self._closing else "the engine's thread has ended")
            items: list[tuple[Ticket, Update | Exception | None]] = [(ticket, ended) for ticket in left]
            with suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._deliver, items)

    def _serve(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._incoming or self._gone or self._closing or self.engine.has_work)
                if self._closing:
                    return
                incoming, self._incoming = self._incoming, []
                gone, self._gone = self._gone, []
            items: list[tuple[Ticket, Update | Exception | None]] = [(ticket, self._add(ticket)) for ticket in incoming]
            for ticket in gone:
                ticket.gone = True
                if ticket.left:
                    self.engine.abort(ticket.id)
            start = time.perf_counter()
            try:
                updates = self.engine.step()
            except Exception as error:  # a defect, or no memory: those under way are told, later ones are served
                traceback.print_exc()
                updates = []
                for id, ticket in self._tickets.items():
                    self.engine.abort(id)
                    items.append((ticket, EngineError(f"the engine failed: {error!r}")))
                self._tickets.clear()
            self.seconds += time.perf_counter() - start
            for update in updates:
                if (owner := self._tickets.get(update.id)) is None:
                    continue
                owner.left -= update.finish_reason is not None
                if not owner.left:
                    del self._tickets[update.id]
                if not owner.gone:
                    items.append((owner, update))
            if items:
                self.loop.call_soon_threadsafe(self._deliver, items)

    def _add(self, ticket: Ticket) -> ValueError | None:
        try:
            ticket.id = self.engine.add(
                ticket.tokens, ticket.params, adapter=ticket.adapter, priority=ticket.priority, salt=ticket.salt
            )
        except ValueError as error:
            return error
        self._tickets[ticket.id] = ticket
        ticket.left = ticket.params.n
        return None
