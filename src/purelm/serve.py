"""An HTTP server in OpenAI's API: models, completions, chat completions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from . import serve_requests
from .convert.bridge import CausalLM
from .convert.engine import Engine
from .convert.tokenizer import Tokenizer
from .errors import ArgumentError, BusyError, PurelmError
from .nn.pages import shared_length
from .serve_answers import Answer
from .serve_options import Options
from .serve_reading import Reading, allow, check_model
from .serve_requests import Asked, Refusal
from .serve_schemas import Schemas
from .serve_worker import Worker

if TYPE_CHECKING:
    from socket import socket

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

# OpenAI's names for kinds of errors.
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def app(model: CausalLM, tokenizer: Tokenizer, options: Options) -> Starlette:
    """The ASGI application; its lifespan starts the engine's thread and stops it.

    Raises ArgumentError without the extra `serve`.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
    except ImportError:
        raise ArgumentError("serving needs an extra: pip install 'purelm[serve]'") from None

    engine = Engine(
        model,
        tokenizer,
        slots=options.slots,
        max_queue=options.max_queue,
        lookup_tokens=options.lookup_tokens,
    )
    worker = Worker(engine)
    schemas = Schemas(engine, options.max_queue + 1)
    reading = Reading(options)
    context = shared_length(model.spec)
    card: dict[str, Any] = {"id": options.name, "object": "model", "owned_by": "purelm"}
    card["created"] = int(time.time())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await reading.close()
        await schemas.close()
        await worker.stop()

    async def models(request: HttpRequest) -> Response:
        allow(request, options)
        return _json({"object": "list", "data": [card]})

    async def one_model(request: HttpRequest) -> Response:
        allow(request, options)
        check_model(request.path_params["name"], options)
        return _json(card)

    async def chat(request: HttpRequest) -> Response:
        how = partial(serve_requests.chat, tokenizer=tokenizer, options=options, context=context)
        return await answer(request, "chat", await reading.read(request, how))

    async def completion(request: HttpRequest) -> Response:
        how = partial(serve_requests.completion, tokenizer=tokenizer, options=options)
        return await answer(request, "completion", await reading.read(request, how))

    async def answer(request: HttpRequest, kind: str, asked: Asked) -> Response:
        await schemas.prepare(asked.requests)
        ids, events = worker.submit(asked.requests)
        made = Answer(kind, options.name, asked, tokenizer, engine.eos_ids)
        if asked.stream:
            return _stream(made.chunks(ids, events), worker, ids)
        gone = asyncio.create_task(_cancel_when_gone(request, worker, ids))
        try:
            return _json(await made.whole(ids, events))
        finally:
            gone.cancel()
            worker.cancel(ids)

    application = Starlette(
        routes=[
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", one_model, methods=["GET"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ],
        exception_handlers={
            Refusal: _refused,
            PurelmError: _refused,
            HTTPException: _refused,
            Exception: _refused,
        },
        lifespan=lifespan,
    )
    application.state.worker, application.state.reading = worker, reading
    return application


def run(model: CausalLM, tokenizer: Tokenizer, options: Options) -> None:
    """Serve until interrupted; answers under way get `options.grace` seconds to end."""
    server(app(model, tokenizer, options), options).run()


def server(application: Starlette, options: Options) -> uvicorn.Server:
    """A uvicorn server of the application."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            # No connection is taken any more; what is under way ends in time, in our own words.
            asyncio.get_running_loop().call_later(
                options.grace, application.state.worker.cancel_all
            )
            await super().shutdown(sockets)

    settings = uvicorn.Config(
        application,
        host=options.host,
        port=options.port,
        lifespan="on",
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=options.grace + 5,
    )
    return Server(settings)


async def _cancel_when_gone(request: HttpRequest, worker: Worker, ids: Sequence[int]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    worker.cancel(ids)


def _stream(chunks: AsyncIterator[dict[str, Any]], worker: Worker, ids: Sequence[int]) -> Response:
    from starlette.responses import StreamingResponse

    async def lines() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except Refusal as problem:
            # The status has been sent.
            yield f"data: {json.dumps(_error(problem))}\n\n"

    class Stream(StreamingResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                # Also when the client has gone, be it before the first line was asked for.
                worker.cancel(ids)

    return Stream(lines(), media_type="text/event-stream")


def _json(body: dict[str, Any], status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status)


def _error(problem: Refusal) -> dict[str, Any]:
    other = "server_error" if problem.status >= 500 else "invalid_request_error"
    kind = KINDS.get(problem.status, other)
    error = {"message": str(problem), "type": kind, "param": problem.param, "code": problem.code}
    return {"error": error}


async def _refused(_: HttpRequest, problem: Exception) -> Response:
    """Every error in OpenAI's form."""
    if isinstance(problem, BusyError):
        problem = Refusal(str(problem), status=429, code="rate_limit_exceeded")
    elif isinstance(problem, PurelmError):
        problem = Refusal(str(problem))
    elif not isinstance(problem, Refusal):
        status = getattr(problem, "status_code", 500)
        problem = Refusal(str(getattr(problem, "detail", "internal error")), status=status)
    return _json(_error(problem), problem.status)
