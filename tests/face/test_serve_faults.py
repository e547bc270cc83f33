"""`purelm serve` and what goes wrong: bad bodies, hostile schemas, clients that leave, defects."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import torch
from served import KEY, NAME, TALK, Site

from purelm import Constraint, Engine, Request, serve, serve_requests
from purelm.errors import BusyError
from purelm.serve_options import Options
from purelm.serve_schemas import Schemas

BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "hello"}]}, "role"),
    ({"messages": [{"role": "user", "content": "x " * 5000}]}, "more than"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -1}, "top_p"),
    ({"n": 0}, "n is 0"),
    ({"n": 1000}, "n is 1000"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 201}, "to 200"),
    ({"stop": [""]}, "stop"),
    ({"stop": list("abcde")}, "at most 4"),
    ({"logit_bias": {"dog": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1000}}, "logit_bias"),
    ({"top_logprobs": 2}, "logprobs: true"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 3}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "each tool is"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "template has none"),
    ({"tool_choice": "required"}, "tool_choice is 'required'"),
    ({"response_format": {"type": "xml"}}, "response_format must be"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "with a schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}},
        "the constraint cannot be read",
    ),
    ({"temprature": 1}, "unknown parameter: temprature"),
]


# The time that this takes to compile has not been waited for.
HOSTILE: Any = {"type": "object", "minProperties": 500}
HOSTILE |= {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}


def test_a_schema_that_would_never_compile_harms_nobody(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "Schemas", partial(Schemas, seconds=2.0))

    def ask(schema: Any) -> httpx.Response:
        wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        body = {"model": NAME, "messages": TALK, "max_tokens": 20, "temperature": 0}
        return site.post("/chat/completions", json={**body, "response_format": wanted})

    with Site(loaded) as site, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, HOSTILE)
        plain = site.post("/completions", json={"model": NAME, "prompt": "The", "max_tokens": 2})
        assert plain.status_code == 200 and not waiting.done()
        assert waiting.result().status_code == 400
        assert "cannot be compiled in 2 s" in waiting.result().json()["error"]["message"]
        # The next has a process again.
        answer = ask({"type": "string", "pattern": "^ab{3}$"})
        assert json.loads(answer.json()["choices"][0]["message"]["content"]) == "abbb"


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds it")
def test_the_memory_of_a_process_is_bounded() -> None:
    lines = ("import purelm.serve_schemas as s", "s._bound_memory(2**26)", "bytearray({} * 2**26)")
    for times, fits in ((0, True), (4, False)):
        code = "; ".join(lines).format(times)
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (found.returncode == 0) is fits and ("MemoryError" in found.stderr) is not fits


def test_more_schemas_than_may_wait_are_told_to_come_again(loaded: Any) -> None:
    request = Request((1,), 1, constraint=Constraint(json_object=True))

    async def ask() -> list[Any]:
        schemas = Schemas(Engine(*loaded), 2)
        calls = [schemas.prepare([request]) for _ in range(3)]
        try:
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await schemas.close()

    found = asyncio.run(ask())
    assert found[:2] == [None, None] and isinstance(found[2], BusyError)


@pytest.mark.parametrize(("wrong", "says"), BAD, ids=[s for _, s in BAD])
def test_bad_requests(site: Site, wrong: dict[str, Any], says: str) -> None:
    body = {"model": NAME, "messages": TALK, "max_tokens": 4, **wrong}
    reply = site.post("/chat/completions", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and says in error["message"]


@pytest.mark.parametrize("prompt", [None, 3, [], [[]], "", ["a", 3], [10**9], [[1], "a"] * 20])
def test_bad_prompts(site: Site, prompt: Any) -> None:
    reply = site.post("/completions", json={"model": NAME, "prompt": prompt})
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_bad_bodies(site: Site) -> None:
    path, kind = "/chat/completions", {"Content-Type": "application/json"}
    for content in (b"{", b"[1]", b"\xff", b"[" * 15000):
        assert site.post(path, content=content, headers=kind).status_code == 400
    half = "\ud800"  # of a pair: JSON can say it, and no text has it
    said = {"role": "user", "content": half}
    for strange in ({"messages": [said]}, {"stop": half}, {half: 1}, {"model": half}):
        body: Any = {"model": NAME, "messages": TALK, "max_tokens": 4, **strange}
        reply = site.post(path, content=json.dumps(body).encode(), headers=kind)
        assert reply.status_code == 400 and "not JSON" in reply.json()["error"]["message"]
    assert site.post(path, content=b" " * 20_001, headers=kind).status_code == 413
    assert site.post(path, content=b"{}").status_code == 415
    spelled = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert site.post(path, content=b"{", headers=spelled).status_code == 400
    # What an earlier call's arguments say in JSON again.
    for arguments in ("[" * 5000 + "]" * 5000, '"\\ud800"', "{"):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        talk = [*TALK, {"role": "assistant", "content": "", "tool_calls": [call]}]
        body = {"model": NAME, "messages": talk, "max_tokens": 4}
        assert site.post(path, json=body).status_code == 200
    wrong = site.post(path, json={"model": "other", "messages": TALK})
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"
    assert site.post("/nothing", json={}).json()["error"]["type"] == "invalid_request_error"


def test_the_client_sees_typed_errors(site: Site, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=NAME, messages=TALK, temperature=9)
    with site.client("wrong") as stranger:
        for call in (stranger.models.list, lambda: stranger.models.retrieve(NAME)):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                call()
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model=NAME, messages=TALK)


def test_a_keyless_server_answers_to_its_own_names_alone(loaded: Any) -> None:
    """A page whose name points to this machine reads no answer."""
    keyless = serve.app(*loaded, Options(NAME, allowed_hosts=("Lab.",)))
    body = {"model": NAME, "prompt": "The", "max_tokens": 1}

    async def ask(*names: str) -> list[int]:
        transport = httpx.ASGITransport(keyless)
        async with (
            keyless.router.lifespan_context(keyless),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            found = []
            for name in names:
                head = {"host": name}
                reply = await client.post("/v1/completions", json=body, headers=head)
                listed = await client.get("/v1/models", headers=head)
                assert listed.status_code == reply.status_code
                found.append(reply.status_code)
            return found

    ours = "127.0.0.1:8000", "localhost", "LOCALHOST:99", "[::1]:8000", "127.0.0.1.", "lab:8000"
    theirs = "evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1"
    assert asyncio.run(ask(*ours, *theirs)) == [200] * len(ours) + [403] * len(theirs)


def test_a_long_text_keeps_nobody_waiting(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads a body holds up neither answers nor the list of models; and not too many do."""
    held, go_on = threading.Event(), threading.Event()
    completion = serve_requests.completion

    def reading(body: Any, tokenizer: Any, options: Options) -> Any:
        if body.get("user") == "slow":
            held.set()
            assert go_on.wait(20)
        return completion(body, tokenizer, options)

    monkeypatch.setattr(serve_requests, "completion", reading)
    with Site(loaded) as site, ThreadPoolExecutor(2) as pool:
        asked = {"model": NAME, "prompt": "The", "max_tokens": 1}
        waiting = [
            pool.submit(site.post, "/completions", json={**asked, "user": "slow"}) for _ in range(2)
        ]
        site.app.state.reading.most = 2
        assert held.wait(20)
        wait_for(lambda: site.app.state.reading._held == 2)
        full = site.post("/completions", json=asked)
        assert full.status_code == 429 and "being read" in full.json()["error"]["message"]
        assert httpx.get(site.url + "/models", timeout=5).status_code == 401
        go_on.set()
        assert [w.result().status_code for w in waiting] == [200, 200]


def test_a_body_that_does_not_come_is_let_go(loaded: Any) -> None:
    with Site(loaded, body_seconds=0.3) as site:
        port = int(site.url.split(":")[2].split("/")[0])
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        )
        head += "Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
            wire.sendall(head.encode())
            reply = wire.recv(4096).decode()
        assert " 408 " in reply.splitlines()[0]


def slow(site: Site, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The site's engine, slowed down, so that answers are under way for a while."""
    step = Engine.step

    def slowly(engine: Any) -> Any:
        time.sleep(0.02)
        engines.append(engine)
        return step(engine)

    engines: list[Any] = []
    monkeypatch.setattr(Engine, "step", slowly)
    return engines


LONG: Any = {"model": NAME, "prompt": "The", "max_tokens": 190, "temperature": 1.5, "seed": 1}
# Nothing ends these answers but their length.
LONG |= {"extra_body": {"min_tokens": 190}}


def wait_for(happens: Any) -> None:
    for _ in range(500):
        if happens():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_cancels(
    site: Site, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    engines = slow(site, monkeypatch)
    if streamed:
        with site.client() as client:
            stream = client.completions.create(**LONG, stream=True)
            next(iter(stream))
            stream.close()
    else:
        with (
            httpx.Client(timeout=0.3, headers={"Authorization": f"Bearer {KEY}"}) as impatient,
            pytest.raises(httpx.ReadTimeout),
        ):
            body = {k: v for k, v in LONG.items() if k != "extra_body"}
            impatient.post(site.url + "/completions", json={**body, "min_tokens": 190})
    steps = len(engines)
    assert 0 < steps < 100
    wait_for(lambda: not engines[0].busy)
    # Long before the answer would have been whole.
    assert len(engines) < 120


def test_a_client_that_has_gone_before_its_stream_begins_cancels(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[int] = []
    monkeypatch.setattr(Engine, "cancel", lambda engine, request_id: cancelled.append(request_id))
    app = serve.app(*loaded, Options(NAME))
    body = json.dumps({"model": NAME, "prompt": "The", "max_tokens": 190, "stream": True}).encode()
    sent = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return sent.pop() if sent else {"type": "http.disconnect"}

    async def send(_: Any) -> None: ...

    async def ask() -> None:
        scope: Any = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
        }
        scope["headers"] = [(b"content-type", b"application/json")]
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(ask())
    assert cancelled == [0]


def test_a_client_that_goes_away_amid_its_body_is_no_defect(loaded: Any) -> None:
    """Which would be a traceback in the log."""
    app = serve.app(*loaded, Options(NAME))
    sent: list[Any] = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Any:
        return sent.pop() if sent else {"type": "http.disconnect"}

    async def send(_: Any) -> None: ...

    async def ask() -> None:
        scope: Any = {"type": "http", "method": "POST", "path": "/v1/completions"}
        scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")]}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(ask())
    assert app.state.reading._held == 0


def test_a_key_of_any_letters(loaded: Any) -> None:
    app = serve.app(*loaded, Options(NAME, api_key="schlüssel"))

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            keys = "Bearer schlüssel".encode(), b"Bearer schl"
            given = [[(b"authorization", key)] for key in keys]
            return [(await client.get("/v1/models", headers=h)).status_code for h in given]

    assert asyncio.run(ask()) == [200, 401]


def test_too_many_are_told_to_come_again(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Site(loaded, slots=1, max_queue=0) as site, site.client() as client:
        engines = slow(site, monkeypatch)
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="come again"):
            client.completions.create(model=NAME, prompt="The", max_tokens=2)
        # Several choices are queued all or none.
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=NAME, prompt="The", max_tokens=2, n=2)
        stream.close()
        wait_for(lambda: not engines[0].busy)
        assert client.completions.create(model=NAME, prompt="The", max_tokens=2).choices[0].text


def test_stopping_ends_what_is_under_way(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Site(loaded) as site, site.client() as client:
        slow(site, monkeypatch)
        stream = client.completions.create(**{**LONG, "max_tokens": 190}, stream=True)
        next(iter(stream))
        site.server.should_exit = True
        # In OpenAI's form, after the second of grace.
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)


@pytest.mark.parametrize(
    ("problem", "status", "says", "logged"),
    [
        (torch.OutOfMemoryError("of 80 GB"), 503, "no memory for this request", 0),
        (KeyError("secret"), 500, "internal error", 1),
    ],
)
def test_a_request_that_fails_in_the_engine(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    problem: Exception,
    status: int,
    says: str,
    logged: int,
) -> None:
    def failing(engine: Engine) -> Any:
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", failing)
        reply = site.post("/completions", json={"model": NAME, "prompt": "The"})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"]) == (status, "server_error")
        assert says in error["message"] and "secret" not in error["message"]
    # Who runs the server is told what a client is not.
    told = [r for r in caplog.records if r.name == "purelm.serve"]
    assert len(told) == logged and all("secret" in str(r.exc_info) for r in told)
    assert site.post("/completions", json={"model": NAME, "prompt": "The"}).status_code == 200


def test_error_bodies_are_json(site: Site) -> None:
    reply = site.post("/chat/completions", json={"model": NAME})
    assert json.loads(reply.text)["error"]["param"] == "messages"
