"""The server as clients see it: OpenAI's own client, and raw requests where that is too polite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from swiftk import serve
from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.text import chat_tokens
from swiftk.serve import Server, Service, bound

KEY = "secret"


def make_engine(model: Path, adapter: Path) -> Engine:
    return Engine(model, torch_dtype="float32", max_num_seqs=8, adapters={"poet": adapter})


@pytest.fixture(scope="module")
def alone(model, adapter) -> Engine:
    """An engine that serves one request at a time: what the server's answers are to be."""
    return make_engine(model, adapter)


@pytest.fixture(scope="module")
def served(model, adapter):
    listening = bound("127.0.0.1", 0)
    service = Service(make_engine(model, adapter), "tiny", KEY, max_queued_tokens=400)
    ready = threading.Event()
    server = Server(service, ready.set, seconds=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert ready.wait(30)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
    yield SimpleNamespace(url=url, service=service, client=client)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive() and not service.worker.is_alive()


def post(served, path: str, body: Any, **options) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=60, json=body, **options)


def wait_until(condition) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 30
        time.sleep(0.01)


def messages(*texts: str) -> list[Any]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts, strict=False)]


# --- what is answered ------------------------------------------------------------------------------------------------


def test_a_completion_is_the_engines(served, alone):
    values: dict[str, Any] = dict(max_tokens=12, temperature=0.8, top_p=0.9, presence_penalty=0.5, seed=5)
    extra: dict[str, Any] = dict(top_k=40, min_p=0.01, repetition_penalty=1.1, min_tokens=3)
    done = served.client.completions.create(
        model="tiny", prompt="hello world", n=2, logprobs=2, logit_bias={"42": 3}, stop=["zz"], **values,
        extra_body={**extra, "return_token_ids": True, "stop_token_ids": [300]},
    )  # fmt: skip
    wanted = alone.generate(
        "hello world",
        SamplingParams(**values, **extra, n=2, logprobs=2, logit_bias={42: 3.0}, stop=("zz",), stop_token_ids=(300,)),
    )[0]
    assert [c.index for c in done.choices] == [0, 1]
    for choice, one in zip(done.choices, wanted.outputs, strict=True):
        assert (choice.text, choice.finish_reason, choice.token_ids) == (one.text, one.finish_reason, one.token_ids)
        assert choice.logprobs.token_logprobs == [x.logprob for x in one.logprobs]
        assert [max(top.values()) for top in choice.logprobs.top_logprobs] == [max(x.top.values()) for x in one.logprobs]
        assert choice.prompt_token_ids == wanted.prompt_token_ids
    assert done.choices[0].text != done.choices[1].text
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, sum(len(o.token_ids) for o in wanted.outputs))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_chat_is_the_engines(served, alone):
    talk = messages("hello", "yes", "and you?")
    values: dict[str, Any] = dict(model="tiny", messages=talk, seed=2, temperature=0.7)
    done = served.client.chat.completions.create(max_tokens=10, logprobs=True, top_logprobs=2, **values)
    prompt = chat_tokens(alone.tokenizer, talk)
    params = SamplingParams(max_tokens=10, seed=2, logprobs=2, temperature=0.7, stop_token_ids=(0, 2))
    one = alone.generate([prompt], params)[0].outputs[0]
    choice = done.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", one.text, one.finish_reason)
    assert [x.logprob for x in choice.logprobs.content] == [x.logprob for x in one.logprobs]
    assert b"".join(bytes(x.bytes) for x in choice.logprobs.content).decode(errors="replace") == one.text
    for x, wanted in zip(choice.logprobs.content, one.logprobs, strict=True):
        assert [t.logprob for t in x.top_logprobs] == sorted(wanted.top.values(), reverse=True)[:2]
    assert done.usage.prompt_tokens == len(prompt)
    newer = served.client.chat.completions.create(max_completion_tokens=3, **values)
    assert newer.usage.completion_tokens == 3 and one.text.startswith(newer.choices[0].message.content.rstrip("\ufffd"))


def test_a_chat_may_fill_the_context(served):
    endless = {"ignore_eos": True}
    done = served.client.chat.completions.create(model="tiny", messages=messages("hello"), extra_body=endless, seed=1)
    assert done.usage.total_tokens == 256 and done.choices[0].finish_reason == "length"


def test_the_templates_end_of_a_turn_ends_a_reply(served):
    """<|im_end|> is no end token of this model's config."""
    certain = {"model": "tiny", "messages": messages("hello"), "max_tokens": 5, "logit_bias": {"2": 100}}
    first = post(served, "chat/completions", certain).json()["choices"][0]
    assert (first["message"]["content"], first["finish_reason"]) == ("", "stop")
    on = post(served, "chat/completions", {**certain, "ignore_eos": True}).json()
    assert on["usage"]["completion_tokens"] == 5 and on["choices"][0]["finish_reason"] == "length"


def test_streams_are_the_same_text(served):
    values: dict[str, Any] = dict(model="tiny", max_tokens=20, seed=4, n=2)
    whole = served.client.completions.create(prompt="hello", logprobs=0, **values)
    texts = ["", ""]
    reasons: list[Any] = [None, None]
    logprobs: list[list[float]] = [[], []]
    offsets: list[list[int]] = [[], []]
    for chunk in served.client.completions.create(prompt="hello", stream=True, logprobs=0, **values):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
        logprobs[choice.index] += choice.logprobs.token_logprobs
        offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [c.text for c in whole.choices] and reasons == [c.finish_reason for c in whole.choices]
    assert logprobs == [c.logprobs.token_logprobs for c in whole.choices]
    assert offsets == [c.logprobs.text_offset for c in whole.choices]

    whole = served.client.chat.completions.create(messages=messages("hello"), **values)
    texts, roles, usage = ["", ""], [], None
    stream = served.client.chat.completions.create(
        messages=messages("hello"), stream=True, stream_options={"include_usage": True}, **values
    )
    for chunk in stream:
        if chunk.usage is not None:
            assert not chunk.choices
            usage = chunk.usage
            continue
        delta = chunk.choices[0].delta
        texts[chunk.choices[0].index] += delta.content or ""
        roles += [delta.role] if delta.role else []
    assert texts == [c.message.content for c in whole.choices] and roles == ["assistant", "assistant"]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_stream_has_whole_characters(served):
    """A bias makes a model of three tokens: the two bytes of é, and x. Pieces never end inside é."""
    tokenizer = served.service.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "Ã©x"]
    body = dict(model="tiny", prompt="x", max_tokens=60, seed=1, stream=True, logit_bias={str(i): 100 for i in ids})
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, json=body, timeout=60
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(response.iter_bytes())
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events[:-2]]
    whole = post(served, "completions", {**body, "stream": False}).json()["choices"][0]["text"]
    assert "".join(pieces) == whole and "é" in whole
    assert any(piece == "é" for piece in pieces)
    alone = [piece for piece in pieces if piece.endswith("\ufffd")]
    assert len(alone) <= 1 + whole.count("\ufffd")


def test_several_prompts_of_every_kind(served, alone):
    texts, ids = ["hello", "the quick brown"], [[5, 6, 7], [8]]
    for prompt in (texts, ids, texts[0], ids[0]):
        done = served.client.completions.create(model="tiny", prompt=prompt, max_tokens=5, seed=1, n=2)
        several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        wanted = alone.generate(several, SamplingParams(max_tokens=5, seed=1, n=2))
        assert [c.text for c in done.choices] == [o.text for one in wanted for o in one.outputs]
        assert [c.index for c in done.choices] == list(range(2 * len(several)))


def test_adapters_are_models(served, alone):
    assert [m.id for m in served.client.models.list()] == ["tiny", "poet"]
    assert served.client.models.retrieve("poet").id == "poet"
    texts = {}
    for name in ("tiny", "poet"):
        texts[name] = served.client.completions.create(model=name, prompt="hello", max_tokens=8, temperature=0).choices[0].text
        adapter = None if name == "tiny" else name
        wanted = alone.generate("hello", SamplingParams(max_tokens=8, temperature=0.0), adapter=adapter)
        assert texts[name] == wanted[0].outputs[0].text
    assert texts["tiny"] != texts["poet"]
    assert post(served, "completions", {"prompt": "hello", "max_tokens": 8, "temperature": 0}).json()["model"] == "tiny"


def test_many_at_once_are_as_alone(served, alone):
    def ask(i: int) -> str:
        name, prompt = ("tiny", "poet")[i % 2], "hello " * (i + 1)
        return served.client.completions.create(model=name, prompt=prompt, max_tokens=20, seed=i).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(16)))
    for i in (0, 1, 6, 15):
        wanted = alone.generate("hello " * (i + 1), SamplingParams(max_tokens=20, seed=i), adapter=(None, "poet")[i % 2])
        assert answers[i] == wanted[0].outputs[0].text


def test_stop_strings(served):
    text = served.client.completions.create(model="tiny", prompt="hello", max_tokens=30, seed=3).choices[0].text
    stop = next(c for c in text[3:] if c != "\ufffd")
    for streamed in (False, True):
        done = served.client.completions.create(model="tiny", prompt="hello", max_tokens=30, seed=3, stop=stop, stream=streamed)
        choices = [c.choices[0] for c in done] if streamed else done.choices
        assert "".join(c.text for c in choices) == text[: text.index(stop)]
        assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", stop)


# --- what lm-eval needs ----------------------------------------------------------------------------------------------


def loglikelihood(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """As lm-eval reads an answer: the sum over the continuation, and whether each of its tokens is the most likely one."""
    logprobs = choice["logprobs"]
    values, tops = logprobs["token_logprobs"][context:-1], logprobs["top_logprobs"][context:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def test_loglikelihoods(served, alone):
    context = alone.encode("the quick brown fox")
    greedy = alone.generate([context], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))[0].outputs[0].token_ids
    other = [*greedy[:3], (greedy[3] + 1) % 300, *greedy[4:]]
    prompts = [context + greedy, context + other]
    body = dict(model="tiny", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234)
    for _ in range(2):  # the second time with everything in the prefix cache
        done = post(served, "completions", body).json()
        found = [loglikelihood(choice, len(context)) for choice in done["choices"]]
        assert [is_greedy for _, is_greedy in found] == [True, False]
        for (total, _), prompt, choice in zip(found, prompts, done["choices"], strict=True):
            scored = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0)
            wanted = alone.generate([prompt], scored)[0].prompt_logprobs
            assert wanted is not None
            assert total == sum(x.logprob for x in wanted[len(context) :] if x is not None)
            assert choice["logprobs"]["token_logprobs"][0] is None and choice["logprobs"]["top_logprobs"][0] is None
            assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1 == len(choice["logprobs"]["text_offset"])
    nothing = post(served, "completions", {**body, "max_tokens": 0}).json()
    for with_one, choice in zip(done["choices"], nothing["choices"], strict=True):
        assert choice["logprobs"]["token_logprobs"] == with_one["logprobs"]["token_logprobs"][:-1]
        assert with_one["text"].startswith(choice["text"]) and nothing["usage"]["completion_tokens"] == 0
    streamed = post(served, "completions", {**body, "prompt": prompts[0], "stream": True}).text.split("\n\n")
    chunks = [json.loads(event[6:])["choices"][0] for event in streamed[:-2]]
    assert "".join(c["text"] for c in chunks) == done["choices"][0]["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for c in chunks for x in c["logprobs"][key]] == done["choices"][0]["logprobs"][key]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_errors_are_openais(served):
    client = served.client
    with pytest.raises(openai.NotFoundError, match="wants tiny or poet") as missing:
        client.completions.create(model="gpt-4", prompt="hello")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    bad: list[tuple[str, str, dict[str, Any]]] = [
        ("tools", "tools: not supported", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("response_format", "not supported", {"response_format": {"type": "json_object"}}),
        ("temprature", "temprature: not supported", {"temprature": 1}),
        ("temperature", "temperature: has 'hot', wants a number", {"temperature": "hot"}),
        ("max_tokens", "max_tokens: has True, wants an integer", {"max_tokens": True}),
        ("chat_template_kwargs", "has 'chat_template'", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
        ("n", "n: has 129, wants at most 128", {"n": 129}),
        ("stream", "stream: has 1, wants true or false", {"stream": 1}),
        ("stream_options", "stream_options: has", {"stream_options": {"x": 1}}),
        ("top_logprobs", "wants logprobs true beside it", {"top_logprobs": 2}),
        ("messages", "messages: has []", {"messages": []}),
        ("messages", "number 0 has content 3, wants text", {"messages": [{"role": "user", "content": 3}]}),
        ("request", "max_model_len 256", {"max_tokens": 1000}),
    ]
    for param, text, change in bad:
        answer = post(served, "chat/completions", {"model": "tiny", "messages": messages("hi"), "max_tokens": 2, **change})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
        assert text in error["message"]
    assert served.service.worker.queued_tokens == 0  # the engine has refused the last one
    for text, body in {
        "prompt: wants": {"model": "tiny"}, "none empty": {"prompt": []}, "prompt: has no tokens": {"prompt": ""},
        "has token 328": {"prompt": [328]}, "best_of": {"prompt": "a", "best_of": 2}, "wants n 1": {"prompt": "a", "echo": True,
        "stream": True, "n": 2}, "the body is list": [],
        "4 prompts with n 128, 512 outputs, wants at most 400": {"prompt": ["a"] * 4, "n": 128},
    }.items():  # fmt: skip
        answer = post(served, "completions", body)
        assert answer.status_code == 400 and text in answer.json()["error"]["message"], answer.json()
    for text, content in {
        "not JSON": b"{", "the body is not JSON": b"[" * 100_000, "half a character": rb'{"prompt": "a\ud800"}',
        "temperature: has 1000": b'{"prompt": "a", "temperature": 1%s}' % (b"0" * 400),
        r"x\ud800: not supported": rb'{"prompt": "a", "x\ud800": 1}',
    }.items():  # fmt: skip
        broken = httpx.post(f"{served.url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, content=content)
        assert broken.status_code == 400 and text in broken.json()["error"]["message"], broken.text
    assert httpx.get(f"{served.url}/v2").json()["error"]["message"] == "GET /v2: Not Found"
    fine = {"stop": None, "tools": None, "best_of": 1, "suffix": None, "user": "me", "response_format": {"type": "text"}}
    assert post(served, "completions", {"prompt": "a", "max_tokens": 1, **fine}).status_code == 200


class Gate:
    """Holds the engine before its next step."""

    def __init__(self, engine: Engine, monkeypatch) -> None:
        self.open = threading.Event()
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (self.open.wait(30), step())[1])


def test_a_full_queue_is_429(served, monkeypatch):
    gate, worker = Gate(served.service.engine, monkeypatch), served.service.worker
    body = {"model": "tiny", "prompt": [5] * 200, "max_tokens": 1}
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, served, "completions", body)
        wait_until(lambda: worker.queued_tokens == 200)
        assert post(served, "completions", {**body, "prompt": [5] * 100, "n": 102}).status_code == 429  # of each of n a token
        second = pool.submit(post, served, "completions", body)
        wait_until(lambda: worker.queued_tokens == 400)
        refused = post(served, "completions", {**body, "prompt": [5]})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert httpx.get(f"{served.url}/health", timeout=5).status_code == 200  # a step holds nobody else up
        with pytest.raises(openai.RateLimitError):
            served.client.completions.create(model="tiny", prompt=[5], max_tokens=1)
        gate.open.set()
        assert first.result().status_code == second.result().status_code == 200
    wait_until(lambda: worker.queued_tokens == 0)
    alone = post(served, "completions", {**body, "prompt": [[5] * 150] * 3})  # more than may wait, but nothing is waiting
    assert alone.status_code == 200 and worker.queued_tokens == 0


def test_a_client_that_leaves_is_not_served(served, monkeypatch):
    engine, headers = served.service.engine, {"Authorization": f"Bearer {KEY}"}
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 240, "ignore_eos": True, "n": 2}
    with httpx.stream("POST", f"{served.url}/v1/completions", headers=headers, json={**body, "stream": True}) as response:
        next(response.iter_bytes())
        assert engine.has_work
    before = engine.num_computed_tokens
    wait_until(lambda: not engine.has_work)
    assert engine.num_computed_tokens - before < 100
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", headers=headers, json=body, timeout=0.3)
    before = engine.num_computed_tokens
    wait_until(lambda: not engine.has_work)
    assert engine.num_computed_tokens - before < 100
    assert served.service.worker.queued_tokens == 0 and not served.service.worker._tickets


def test_a_step_that_fails_ends_those_that_are_in_it(served, monkeypatch, capfd):
    engine = served.service.engine
    step, calls = engine.step, []

    def fail():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return step()

    monkeypatch.setattr(engine, "step", fail)
    with pytest.raises(openai.InternalServerError, match="no room"):
        served.client.completions.create(model="tiny", prompt="hello", max_tokens=20)
    calls.clear()
    with pytest.raises(openai.APIError, match="no room"):
        for _ in served.client.completions.create(model="tiny", prompt="hello", max_tokens=20, stream=True):
            pass
    assert served.client.completions.create(model="tiny", prompt="hello", max_tokens=20).choices[0].text
    assert "MemoryError: no room" in capfd.readouterr().err
    assert not engine.has_work and served.service.worker.queued_tokens == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_is_gone(model, adapter, monkeypatch):
    """Not a step that fails but a defect around it: those under way and those that come later are told."""
    listening, ready = bound("127.0.0.1", 0), threading.Event()
    service = Service(make_engine(model, adapter), "tiny", None, max_queued_tokens=400)
    server = Server(service, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert ready.wait(30)
    here = SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}")
    step, calls = service.engine.step, []
    monkeypatch.setattr(service.engine, "step", lambda: None if calls.append(1) or len(calls) == 3 else step())
    answer = post(here, "completions", {"prompt": "hello", "max_tokens": 20})
    assert answer.status_code == 500 and "thread has ended" in answer.json()["error"]["message"]
    wait_until(lambda: not service.worker.is_alive())  # type: ignore[union-attr]
    assert post(here, "completions", {"prompt": "hello"}).status_code == 503
    assert httpx.get(f"{here.url}/health").status_code == 503
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_answers_that_take_too_long_are_told_of_the_end(model, adapter, monkeypatch, caplog):
    listening, ready = bound("127.0.0.1", 0), threading.Event()
    service = Service(make_engine(model, adapter), "tiny", None, max_queued_tokens=400)
    server = Server(service, ready.set, seconds=0.3)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert ready.wait(30)
    here = SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}")
    step = service.engine.step
    monkeypatch.setattr(service.engine, "step", lambda: time.sleep(0.05) or step())  # 200 tokens take 10 seconds
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post, here, "completions", body)
        streamed = pool.submit(post, here, "completions", body | {"stream": True})
        wait_until(lambda: len(service.engine.scheduler.running) == 2)
        server.should_exit = True
        answer, text = whole.result(10), streamed.result(10).text
    assert answer.status_code == 500 and "has been stopped" in answer.json()["error"]["message"]
    assert "has been stopped" in text and text.endswith("data: [DONE]\n\n")
    thread.join(20)
    assert not thread.is_alive() and not [r for r in caplog.records if r.exc_info], "a traceback"


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_the_process_ends_on_signals(model, number):
    command = [sys.executable, "-m", "swiftk.serve", "--model", str(model), "--port", "0", "--torch_dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SWIFTK_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("swiftk.serve: tiny on http://127.0.0.1:"), process.stderr.read()
    url = line.split(" on ")[1].split("/v1")[0]
    assert httpx.get(f"{url}/v1/models").status_code == 401
    body = {"prompt": "hello", "max_tokens": 250, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, json=body) as response:
        chunks = response.iter_bytes()
        next(chunks)
        process.send_signal(number)  # in the middle of an answer, which has time to end
        rest = b"".join(chunks)
    assert rest.endswith(b"data: [DONE]\n\n")
    assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()


def test_wrong_arguments(model, adapter, tmp_path, capsys):
    taken = bound("127.0.0.1", 0)
    taken.listen()
    for text, argv in {
        "cannot be listened on": ["--model", model, "--port", taken.getsockname()[1]],
        "model: is not given": ["--port", 0],
        "is not a folder": ["--model", tmp_path / "nowhere", "--port", 0],
        "api_key: has characters beyond ASCII": ["--model", model, "--port", 0, "--api_key", "schlüssel"],
        "one is called 'tiny' as the base is": ["--model", model, "--port", 0, "--adapters", f"tiny={adapter}"],
    }.items():
        assert serve.main([str(a) for a in argv]) == 2
        assert text in capsys.readouterr().err
    taken.close()
