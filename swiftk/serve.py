"""An OpenAI-compatible server of one model and its adapters: `python -m swiftk.serve --model DIR [--adapters NAME=DIR ...]`.

/v1/completions, /v1/chat/completions, /v1/models, /health. What a field means is docs/serving.md; a field that is not there is
answered with 400 and its name, never passed over. Exit codes: 0 ended by a signal; 2 wrong arguments; 1 any other error."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hmac
import ipaddress
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as missing:
    raise SystemExit(f"swiftk.serve: {missing}; wants fastapi and uvicorn: pip install -e '.[serve]'") from missing

from swiftk.decoder.engine import Engine
from swiftk.decoder.results import Update
from swiftk.decoder.text import TokenStrings, chat_tokens, tokens_of
from swiftk.decoder.worker import EngineError, QueueFullError, Ticket, Worker
from swiftk.decoder_arguments import Parser, add_engine_keys, make_engine, name_of, turn_ends
from swiftk.openai_api import Answers, Asked, Choice, Refused, of_kind, read_prompts, read_request

SHUTDOWN_SECONDS = 5  # that answers under way have after a signal


class Events(StreamingResponse):
    """Server-sent events; `close` is called however the connection ends."""

    def __init__(self, content: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


# --- the application -------------------------------------------------------------------------------------------------------


class Service:
    """Requests against one engine. Its tokenizer is a copy: the engine's is in use in another thread."""

    def __init__(self, engine: Engine, name: str, api_key: str | None, max_queued_tokens: int) -> None:
        assert engine.tokenizer is not None
        self.engine, self.api_key, self.max_queued_tokens = engine, api_key, max_queued_tokens
        self.names: dict[str, str | None] = ({name: None} if engine.serves_base else {}) | {a: a for a in engine.adapters}
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.strings = TokenStrings(copy.deepcopy(engine.tokenizer))
        self.turn_ends = turn_ends(self.tokenizer)
        self.threads = ThreadPoolExecutor(1, "tokenizer")
        self.started = int(time.time())
        self.worker: Worker | None = None

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker = Worker(self.engine, asyncio.get_running_loop(), self.max_queued_tokens)
        self.worker.start()
        yield
        self.worker.close()
        self.threads.shutdown(wait=False)

    def authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise Refused(401, "the API key is missing or wrong, wants Authorization: Bearer KEY", code="invalid_api_key")

    async def answer(self, request: Request, chat: bool) -> Response:
        try:
            body = await request.json()
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON ({error})") from None
        asked = read_request(body, chat, self.names, next(iter(self.names)))
        tickets = await self.tickets(asked)
        assert self.worker is not None
        worker, answers = self.worker, Answers(asked, tickets, self.strings)
        try:
            await worker.submit(tickets)
        except QueueFullError as error:
            raise Refused(429, str(error), code="queue_full", retry=error.retry_after) from None
        except EngineError as error:
            raise Refused(503, str(error)) from None
        except ValueError as error:
            raise Refused(400, str(error), str(error).split(":")[0]) from None
        if asked.stream:
            return Events(self.events(asked, answers), lambda: worker.abort(tickets))
        whole = asyncio.ensure_future(self.whole(asked, answers))
        gone = asyncio.ensure_future(self.disconnected(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(whole.result()) if whole.done() else Response(status_code=499)
        finally:
            whole.cancel()
            gone.cancel()
            worker.abort(tickets)

    async def tickets(self, asked: Asked) -> list[Ticket]:
        """The prompts as tokens, in a thread: long texts take a while."""
        loop, body, updates = asyncio.get_running_loop(), asked.body, asyncio.Queue[tuple[Ticket, Update | Exception]]()
        options = of_kind(body, "chat_template_kwargs", dict, {}, "an object")
        priority, salt = of_kind(body, "priority", int, 0, "an integer"), of_kind(body, "cache_salt", str, "", "a string")

        def encode() -> list[tuple[str | None, list[int]]]:
            if asked.chat:
                return [(None, chat_tokens(self.tokenizer, body.get("messages"), options))]  # type: ignore[arg-type]
            return [
                (prompt, tokens_of(self.tokenizer, prompt)) if isinstance(prompt, str) else (None, prompt)
                for prompt in read_prompts(body.get("prompt"))
            ]

        try:
            prompts = await loop.run_in_executor(self.threads, encode)
        except ValueError as error:
            raise Refused(400, str(error), str(error).split(":")[0]) from None
        if (count := len(prompts) * asked.params.n) > self.max_queued_tokens:
            has, wants = f"{len(prompts)} prompts with n {asked.params.n}, {count} outputs", f"at most {self.max_queued_tokens}"
            raise Refused(400, f"prompt: has {has}, wants {wants} (--max_queued_tokens)", "prompt")
        found = []
        for number, (text, tokens) in enumerate(prompts):
            params = asked.params
            if asked.chat and not asked.max_tokens_given:
                left = self.engine.scheduler.config.max_model_len - len(tokens)
                params = dataclasses.replace(params, max_tokens=max(1, left))
            if asked.chat and not params.ignore_eos:
                ends = dict.fromkeys([*params.stop_token_ids, *self.turn_ends])
                params = dataclasses.replace(params, stop_token_ids=tuple(ends))
            found.append(Ticket(number, text, tokens, params, asked.adapter, priority, salt, updates, loop.create_future()))
        return found

    async def updates(self, asked: Asked, answers: Answers) -> AsyncIterator[tuple[Choice, Update]]:
        left, queue = len(answers.choices), answers.tickets[0].updates
        while left:
            ticket, update = await queue.get()
            if isinstance(update, Exception):
                raise Refused(500, str(update)) from update
            if update.finish_reason == "error":
                raise Refused(500, f"the model failed: {update.stop_reason}")
            if asked.no_output:
                update = dataclasses.replace(update, token_ids=[], text="", logprobs=[], finish_reason="length")
            left -= update.finish_reason is not None
            choice = answers.take(ticket, update)
            choice.output.add(update)
            yield choice, update

    async def whole(self, asked: Asked, answers: Answers) -> dict[str, Any]:
        async for _ in self.updates(asked, answers):
            pass
        return answers.body()

    async def events(self, asked: Asked, answers: Answers) -> AsyncIterator[str]:
        try:
            async for choice, update in self.updates(asked, answers):
                if (chunk := answers.chunk(choice, update)) is not None:
                    yield _event(chunk)
            if asked.include_usage:
                yield _event(answers.usage_chunk())
        except Refused as refused:
            yield _event(refused.body())
        yield "data: [DONE]\n\n"

    @staticmethod
    async def disconnected(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    def models(self) -> list[dict[str, Any]]:
        longest = self.engine.scheduler.config.max_model_len
        return [
            {"id": name, "object": "model", "created": self.started, "owned_by": "swiftk", "max_model_len": longest}
            for name in self.names
        ]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def answer(refused: Refused) -> JSONResponse:
    return JSONResponse(refused.body(), refused.status, {"Retry-After": str(refused.retry)} if refused.retry else None)


def application(service: Service) -> FastAPI:
    app = FastAPI(lifespan=service.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    keyed = APIRouter(prefix="/v1", dependencies=[Depends(service.authorise)])

    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        alive = service.worker is not None and service.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 503)

    @keyed.get("/models", response_model=None)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @keyed.get("/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        for found in service.models():
            if found["id"] == name:
                return found
        raise Refused(404, f"model: has {name!r}, wants {' or '.join(service.names)}", "model", "model_not_found")

    @keyed.post("/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await service.answer(request, chat=False)

    @keyed.post("/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, chat=True)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        return answer(Refused(500, f"the server failed: {error!r}"))

    app.include_router(keyed)
    return app


# --- the command line ------------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """One that says when it listens, and after a signal tells those whose answers take too long that it has stopped."""

    def __init__(self, service: Service, ready: Callable[[], None], seconds: float = SHUTDOWN_SECONDS) -> None:
        super().__init__(
            uvicorn.Config(application(service), log_level="warning", timeout_graceful_shutdown=math.ceil(seconds) + 2)
        )
        self._service, self._ready, self._seconds = service, ready, seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._service.worker is not None:
            asyncio.get_running_loop().call_later(self._seconds, self._service.worker.stop)
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """Before anything is loaded: a port that is taken is said at once."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port: has {port}, wants 0 (any that is free) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"port: {host}:{port} cannot be listened on ({why}); give another --host or --port") from None
    return found


def main(argv: list[str]) -> int:
    parser = Parser("swiftk.serve", __doc__)
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every interface; default: 127.0.0.1")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free; default: 8000")
    group.add_argument("--api_key", metavar="KEY", help="that requests must have; default: SWIFTK_API_KEY of the environment")
    group.add_argument("--served_model_name", metavar="NAME", help="of the base; default: its folder's, or its run's")
    group.add_argument("--max_queued_tokens", type=int, default=65536, metavar="N",
                       help="prompt tokens that may wait; with more it answers 429; default: 65536")  # fmt: skip
    add_engine_keys(parser)
    args = parser.parse(argv)
    api_key = args.api_key or os.environ.get("SWIFTK_API_KEY") or None
    try:
        if api_key and not api_key.isascii():
            raise ValueError("api_key: has characters beyond ASCII, wants none: an HTTP header cannot carry them")
        listening = bound(args.host, args.port)
        engine = make_engine(args, lambda text: print(f"swiftk.serve: {text}", file=sys.stderr, flush=True))
        name = args.served_model_name or name_of(args.model)
        if name in engine.adapters:
            raise ValueError(f"adapters: one is called {name!r} as the base is, wants another name: --adapters NAME=DIR")
        service = Service(engine, name, api_key, args.max_queued_tokens)
    except ValueError as error:
        print(f"swiftk.serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError, ImportError) as error:
        print(f"swiftk.serve: {error}", file=sys.stderr)
        return 1
    host, port = listening.getsockname()[:2]
    if not api_key and not ipaddress.ip_address(host).is_loopback:
        print("swiftk.serve: careful: whoever reaches this machine can use the model; --api_key KEY", file=sys.stderr)

    def ready() -> None:
        config = engine.scheduler.config
        shown = f"[{host}]" if ":" in host else host
        cached = (config.num_blocks - 1) * config.block_size
        print(f"swiftk.serve: {', '.join(service.names)} on http://{shown}:{port}/v1, {config.max_model_len} tokens each, "
              f"{cached} tokens of cache; Ctrl-C ends it", flush=True)  # fmt: skip

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends on these, and raises them again for what was set before
        signal.signal(number, lambda *_: None)
    server = Server(service, ready)
    server.run(sockets=[listening])
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
