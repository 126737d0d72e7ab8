"""``mixencoder serve``: an HTTP server that clients of common rerankers can call."""

import dataclasses
import ipaddress
from pathlib import Path
from typing import Annotated, Any

import typer

from mixencoder.cli.messages import say
from mixencoder.cli.shared import BackendOption, DeviceOption, DtypeOption, ModelOption
from mixencoder.errors import InputError, MissingExtraError

_LEAST_MEMORY = 1.75 * 2**30
"""Bytes that a server with default limits may need, with a little to spare."""


def serve(
    index: Annotated[Path | None, typer.Option(help="Index whose candidates requests may rank.")] = None,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Name of the model in requests; may be repeated.", show_default="the model's"),
    ] = None,
    allow_writes: Annotated[bool, typer.Option("--allow-writes", help="Let requests change the index.")] = False,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one per line; also read: MIXENCODER_API_KEYS.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Name under which clients reach the server; may be repeated; * for any.",
            show_default="addresses, names without a dot, --host; any with API keys",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute.", show_default="the usable cores")
    ] = None,
    gather_ms: Annotated[float, typer.Option(min=0, help="Wait for requests that share a pass.")] = 2.0,
    max_body: Annotated[int | None, typer.Option(min=1, help="Bytes of a body.")] = None,
    max_candidates: Annotated[int | None, typer.Option(min=1, help="Candidates of a request.")] = None,
    max_queries: Annotated[int | None, typer.Option(min=1, help="Queries of a request.")] = None,
    max_characters: Annotated[int | None, typer.Option(min=1, help="Characters of a text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a request.")] = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Requests in work at once.")] = None,
    max_queue: Annotated[int | None, typer.Option(min=0, help="Requests that wait for the model.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Serve rankings over HTTP for clients of text-embeddings-inference, Cohere, Jina and vLLM (docs/serving.md)."""
    from mixencoder.serving.settings import Limits, ServeConfig, read_api_keys

    given = {"body_bytes": max_body, "candidates": max_candidates, "queries": max_queries}
    given |= {"characters": max_characters, "tokens": max_tokens, "requests": max_requests, "queue": max_queue}
    limits = dataclasses.replace(Limits(), **{key: value for key, value in given.items() if value is not None})
    config = ServeConfig(
        host=host,
        port=port,
        names=tuple(name or _names(model)),
        allow_writes=allow_writes,
        api_keys=read_api_keys(api_keys),
        allowed_hosts=tuple(allowed_host or ()),
        threads=threads,
        gather_seconds=gather_ms / 1000,
        limits=limits,
    )
    if allow_writes and index is None:
        raise InputError("--allow-writes needs an index; name one with --index DIR")
    try:
        from mixencoder.serving.quotas import memory_limit
        from mixencoder.serving.ranking import quiet_engine
        from mixencoder.serving.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "starlette", "pydantic", "prometheus_client", "uvicorn"):
            raise
        raise MissingExtraError(f"serving needs the extra: pip install 'mixencoder[serve]' ({error})") from error
    from mixencoder.fast import MixEncoder

    options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}
    engine = MixEncoder.from_pretrained(model, **options)
    if engine.config.calibration is None:
        say("warning: the model is not calibrated, so probabilities are the sigmoid of its scores")
    if not config.api_keys and not _is_loopback(host):
        say(f"warning: {host} is reachable from other machines and no API key is needed; see --api-keys")
    if (limit := memory_limit()) is not None and limit < _LEAST_MEMORY:
        say(
            f"warning: this process may use {limit / 2**20:,.0f} MiB of memory; the default limits are for 2 GiB: "
            "lower --max-requests, --max-queue and --max-body"
        )
    opened = None if index is None else quiet_engine(engine).open_index(index, read_only=not allow_writes)
    run(config, engine, opened)


def _names(model: str | None) -> list[str]:
    """Return the name of a checkpoint, or none for the bundled one, whose name is the default."""
    return [] if model is None else [Path(model).name if Path(model).is_dir() else model]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
