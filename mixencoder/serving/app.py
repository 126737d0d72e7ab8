"""Assemble the application: routes, error forms, and the gate in front of them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mixencoder import __version__
from mixencoder.fast import MixEncoder
from mixencoder.index import CandidateIndex
from mixencoder.serving import candidates, page
from mixencoder.serving.dialects import cohere_jina, explanation, native, tei, vllm
from mixencoder.serving.dialects.error_forms import OpenAIError, error_body, read_responses
from mixencoder.serving.errors import RequestError
from mixencoder.serving.gate import Gate
from mixencoder.serving.hosts import HostCheck
from mixencoder.serving.metrics import CONTENT_TYPE
from mixencoder.serving.ranking import RankStored
from mixencoder.serving.service import Service
from mixencoder.serving.settings import ServeConfig

_OWN_PATHS = ("/health", "/metrics", "/openapi.json")
_SHOWN_FAULTS = 5
_KINDS = {401: "authentication", 403: "forbidden", 404: "not_found", 429: "overloaded", 503: "unhealthy"}


class Health(BaseModel):
    """Whether requests are answered."""

    status: Literal["ok", "unavailable"]


def create_app(
    config: ServeConfig,
    engine: MixEncoder,
    index: CandidateIndex | None = None,
    *,
    rank_stored: RankStored | None = None,
) -> FastAPI:
    """Return the application (ASGI) of a server.

    Args:
        config: the settings.
        engine: a model with a ranking head.
        index: an index that the quiet form of this engine opened (`mixencoder.serving.ranking.quiet_engine`), or None.
        rank_stored: ranks candidates of the index in place of the engine, for example on other machines
            (docs/examples/ray_serve.py); texts and metadata are still read from the index.

    Raises:
        InputError: the model has no ranking head.
    """
    engine.model.check_head("ranking")
    service = Service(config, engine, index, rank_stored)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="MixEncoder",
        version=__version__,
        description="Ranking by cross-attention, with candidates encoded ahead of time.",
        lifespan=lifespan,
        # only says in OpenAPI what `Gate` checks
        dependencies=[Depends(HTTPBearer(auto_error=False, description="An API key."))] if config.api_keys else [],
        # these pages would load scripts from another site
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    routers = [module.router(service) for module in (tei, cohere_jina, vllm, native, explanation, candidates, page)]
    for routes in routers:
        app.include_router(routes)
    app.add_middleware(
        Gate,
        keys=config.api_keys,
        hosts=HostCheck(config.answered_hosts),
        limits=config.limits,
        metrics=service.metrics,
        error_form=error_body,
        paths=[
            *_OWN_PATHS,
            *(route.path for routes in routers for route in routes.routes if isinstance(route, APIRoute)),
        ],
    )

    @app.get("/health", tags=["MixEncoder"], responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Answer 200 while requests are served, else 503."""
        response.status_code = 200 if service.ready else 503
        return Health(status="ok" if service.ready else "unavailable")

    @app.get("/metrics", tags=["MixEncoder"], response_class=PlainTextResponse, responses=read_responses(OpenAIError))
    async def metrics() -> Response:
        """Return counts and times in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _response(request, RequestError(422, "validation", _faults(error)))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        kind = _KINDS.get(error.status_code, "validation")
        headers = dict(error.headers or {})
        return _response(request, RequestError(error.status_code, kind, error.detail, headers))

    return app


def _response(request: Request, error: RequestError) -> Response:
    return JSONResponse(error_body(request.url.path, error), error.status, headers=error.headers)


def _faults(error: RequestValidationError) -> str:
    """Return what is wrong with a request, without quoting its values."""
    found = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(tei.FORM))
        found.append(f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    more = f" (and {len(found) - _SHOWN_FAULTS} more)" if len(found) > _SHOWN_FAULTS else ""
    return "; ".join(found[:_SHOWN_FAULTS]) + more
