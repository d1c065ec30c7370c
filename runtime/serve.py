"""`python -m runtime.serve OUT`: the checkpoint behind OpenAI's HTTP API, for a quick look.

Needs the extra `serve` (Starlette and uvicorn).  One process, one model, the requests of all clients answered together
(`runtime.batching`); what a request may be is in `runtime.openai_api`.  To serve many people, export the checkpoint and use an
engine that is made for it (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.batching import Batcher, BusyError, GaveUpError, Piece, Request, Ticket
from runtime.command import activations_option, device_option, import_torch, out_argument, run
from runtime.errors import InputError, LoadError
from runtime.generation_config import GenerationConfig, read_generation_config
from runtime.openai_api import ApiError, Reply, Wanted, read_request

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

    from runtime.models.base import CausalLM
    from runtime.tokenizer import ChatTokenizer

MISSING = "runtime.serve needs Starlette and uvicorn: pip install 'qconvert[serve]'"
Pieces = asyncio.Queue[tuple[int, "Piece | Exception"]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, and how many may come."""

    max_context: int  # tokens of prompt and answer
    max_batch: int = 8  # sequences at a time
    max_waiting: int = 64  # sequences that wait for room
    max_body_bytes: int = 8 << 20
    time_limit_s: float = 600.0  # from the arrival of a request to the end of its answer


@dataclass(frozen=True, slots=True)
class Service:
    """A model with everything that a request needs."""

    name: str
    model: CausalLM
    tokenizer: ChatTokenizer
    declared: GenerationConfig
    batcher: Batcher
    limits: Limits

    def requests(self, wanted: Wanted) -> list[Request]:
        """One for each choice.  Raises `ApiError`."""
        if wanted.model not in (None, self.name):
            raise ApiError(f"model: there is {self.name!r} here, not {wanted.model!r}", "model", 404, "model_not_found")
        count = len(wanted.prompts) * wanted.n
        if count > self.limits.max_batch:
            limit = self.limits.max_batch
            raise ApiError(f"{count} answers in one request, and this server takes {limit}: send several requests", "n")
        try:
            sampling = self.declared.sampling(
                wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p, wanted.repetition_penalty, wanted.seed
            )
        except ValueError as error:
            raise ApiError(str(error), str(error).partition(":")[0]) from None
        prompts = [ids for prompt in wanted.prompts for ids in [self._encode(prompt, wanted)] * wanted.n]
        seeds = sampling.seeds(count)
        found = []
        for ids, seed in zip(prompts, seeds, strict=True):
            room = self.limits.max_context - len(ids)
            most = wanted.max_tokens or self.declared.max_new_tokens or max(room, 1)
            if room < 1 or (wanted.max_tokens or 1) > room:
                raise ApiError(
                    f"a prompt of {len(ids)} and an answer of {most} tokens are more than this server's "
                    f"{self.limits.max_context}: shorten the prompt, or ask for fewer tokens",
                    "messages" if wanted.chat else "prompt",
                    code="context_length_exceeded",
                )
            drawn = type(sampling)(**{name: getattr(sampling, name) for name in SAMPLING}, seed=seed)
            found.append(Request(ids, drawn, min(most, room), wanted.stop, wanted.logprobs, self.limits.time_limit_s))
        return found

    def _encode(self, prompt: Any, wanted: Wanted) -> list[int]:
        field = "messages" if wanted.chat else "prompt"
        try:
            if wanted.chat:
                ids = self.tokenizer.encode_chat(prompt, wanted.variables)
            else:
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        except (LoadError, ValueError) as error:  # no template, or one that refuses; no Unicode
            raise ApiError(f"{field}: {error}", field) from None
        vocabulary = self.model.architecture.vocab_size
        if not ids or max(ids) >= vocabulary:
            raise ApiError(f"{field}: expected at least one token, of ids below {vocabulary}", field)
        return ids


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def build_app(service: Service, api_key: str | None = None) -> Starlette:
    """The ASGI application.  `api_key`: clients must send it; None lets everybody in."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    described = {"id": service.name, "object": "model", "created": 0, "owned_by": "qconvert"}

    def guarded(handler: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        """Checks the key, and turns refusals into responses."""

        async def handle(request: HttpRequest) -> Response:
            try:
                sent = request.headers.get("authorization", "").removeprefix("Bearer ")
                if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
                    raise ApiError("expected this server's API key", None, 401, "invalid_api_key")
                response: Response = await handler(request)
            except ApiError as error:
                return JSONResponse(error.to_json(), error.status)
            return response

        return handle

    async def models(request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [described]})

    async def one_model(request: HttpRequest) -> Response:
        if request.path_params["name"] != service.name:
            raise ApiError(f"there is {service.name!r} here", "model", 404, "model_not_found")
        return JSONResponse(described)

    async def health(request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def answer(request: HttpRequest) -> Response:
        chat = request.url.path.endswith("/chat/completions")
        wanted = read_request(await _read_json(request, service.limits.max_body_bytes), chat)
        requests = await asyncio.get_running_loop().run_in_executor(None, service.requests, wanted)
        reply = Reply(wanted, service.name, service.tokenizer, sum(len(r.token_ids) for r in requests[:: wanted.n]))
        pieces: Pieces = asyncio.Queue()
        tickets = _submit(service.batcher, requests, pieces)
        if wanted.stream:
            events = _events(reply, tickets, pieces)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        try:
            await _unless_gone(request, _collect(reply, tickets, pieces))
        finally:
            for ticket in tickets:
                ticket.cancel()
        return JSONResponse(reply.whole())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.batcher.close)

    return Starlette(
        routes=[
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(one_model)),
            Route("/v1/chat/completions", guarded(answer), methods=["POST"]),
            Route("/v1/completions", guarded(answer), methods=["POST"]),
            Route("/health", health),
        ],
        lifespan=lifespan,
    )


async def _read_json(request: HttpRequest, limit: int) -> Any:
    """The body, read up to a limit."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise ApiError(f"the body: expected up to {limit} bytes", None, 413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body: expected JSON, found {error}") from None


def _submit(batcher: Batcher, requests: list[Request], pieces: Pieces) -> list[Ticket]:
    """Queue every choice, or none of them."""
    loop = asyncio.get_running_loop()

    def deliver_to(choice: int) -> Callable[[Piece | Exception], object]:
        def deliver(piece: Piece | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (choice, piece))

        return deliver

    tickets: list[Ticket] = []
    try:
        for choice, request in enumerate(requests):
            tickets.append(batcher.submit(request, deliver_to(choice)))
    except BusyError as error:
        for ticket in tickets:
            ticket.cancel()
        raise ApiError(f"{error}: try again later", None, 503, "busy") from None
    except ValueError as error:
        raise ApiError(str(error)) from None
    return tickets


async def _next(pieces: Pieces) -> tuple[int, Piece]:
    """What comes next.  Raises `ApiError` for what failed."""
    choice, piece = await pieces.get()
    if isinstance(piece, GaveUpError):
        raise ApiError(str(piece), None, 503, "timeout")
    if isinstance(piece, Exception):
        raise ApiError(f"{type(piece).__name__}: {' '.join(str(piece).split())[:200]}", None, 500)
    return choice, piece


async def _collect(reply: Reply, tickets: list[Ticket], pieces: Pieces) -> None:
    left = len(tickets)
    while left:
        choice, piece = await _next(pieces)
        reply.add(choice, piece)
        left -= piece.finish_reason is not None


async def _unless_gone(request: HttpRequest, work: Any) -> None:
    """Wait for work to be done; give it up when the client has gone."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.5))[0]:
            if await request.is_disconnected():
                raise ApiError("the client has gone", None, 499)
        task.result()
    finally:
        task.cancel()


async def _events(reply: Reply, tickets: list[Ticket], pieces: Pieces) -> AsyncIterator[str]:
    """Server-sent events; a failure is the last of them."""

    def line(data: Any) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    left = len(tickets)
    try:
        for event in reply.opening():
            yield line(event)
        while left:
            choice, piece = await _next(pieces)
            reply.add(choice, piece)
            left -= piece.finish_reason is not None
            said = reply.event(choice, piece)
            if said is not None:
                yield line(said)
        for event in reply.closing():
            yield line(event)
    except ApiError as error:
        yield line(error.to_json())
    finally:
        for ticket in tickets:
            ticket.cancel()
    yield "data: [DONE]\n\n"


def open_service(
    directory: str,
    device: str,
    activations: str = "quantized",
    name: str | None = None,
    max_context: int | None = None,
    **limits: Any,
) -> Service:
    """Load a checkpoint and start its batcher.  Raises `LoadError`."""
    from runtime.loader import load_model, memory_note
    from runtime.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(directory)
    declared = read_generation_config(directory)
    declared.sampling()
    model = load_model(directory, device=device, activations=activations)
    if note := memory_note(model):
        click.echo(f"warning: {note}", err=True)
    positions = model.architecture.max_position_embeddings or max_context or MAX_CONTEXT
    bounds = Limits(min(positions, max_context or MAX_CONTEXT), **limits)
    eos_ids = tokenizer.eos_ids(model.architecture.eos_token_id)
    batcher = Batcher(model, tokenizer, eos_ids, bounds.max_batch, bounds.max_waiting)
    return Service(name or Path(directory).resolve().name, model, tokenizer, declared, batcher, bounds)


MAX_CONTEXT = 8192
GRACE_S = 10  # for answers that are being given when the server is to stop


@click.command(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "QCONVERT_SERVE"})
@out_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in: then use --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--name", help="What clients call the model.  Default: the directory's name.")
@click.option("--api-key", help="What clients must send.  Better in the environment: QCONVERT_SERVE_API_KEY.")
@click.option("--max-context", type=click.IntRange(min=2), default=MAX_CONTEXT, show_default=True, help="Tokens per answer.")
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Answers at a time.")
@click.option("--max-waiting", type=click.IntRange(min=0), default=64, show_default=True, help="Answers that wait for room.")
@click.option("--time-limit", type=click.FloatRange(min=1), default=600, show_default=True, help="Seconds per answer.")
@device_option
@activations_option
def main(
    out: str, host: str, port: int, name: str | None, api_key: str | None, max_context: int, max_batch: int, max_waiting: int,
    time_limit: float, device: str | None, activations: str,
) -> None:  # fmt: skip
    """Answer OpenAI's HTTP API with the canonical checkpoint in OUT, for a quick look.

    Example: python -m runtime.serve OUT, then a client with base_url http://127.0.0.1:8000/v1
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise InputError(MISSING) from None
    service = open_service(
        out, import_torch(device), activations, name, max_context,
        max_batch=max_batch, max_waiting=max_waiting, time_limit_s=time_limit,
    )  # fmt: skip
    config = uvicorn.Config(build_app(service, api_key), log_level="warning", timeout_graceful_shutdown=GRACE_S)
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        where = f"[{host}]" if ":" in host else host
        click.echo(f"{service.name}: http://{where}:{listening.getsockname()[1]}/v1 (until Ctrl-C)", err=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn's own handlers end the work, and then call these
            signal.signal(number, lambda *_: None)
        asyncio.run(uvicorn.Server(config).serve([listening]))


if __name__ == "__main__":
    sys.exit(run(main, "runtime.serve"))
