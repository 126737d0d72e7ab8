"""`PUT` and `DELETE /v1/candidates`: change the server's index; answered once the changes are on disk."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field

from mixencoder.index import CandidateIndex
from mixencoder.serving.dialects.common import OwnModel, StrictRoute, described
from mixencoder.serving.dialects.error_forms import OpenAIError, error_responses
from mixencoder.serving.errors import RequestError, too_large
from mixencoder.serving.service import Service
from mixencoder.serving.settings import Limits
from mixencoder.serving.work import check_characters

_EXAMPLE = {"id": "git-1", "text": "Use git reset --soft HEAD~1.", "metadata": {"topic": "git"}}


class Candidate(OwnModel):
    """A candidate to store."""

    id: str = Field(min_length=1)
    text: str
    metadata: dict[str, Any] | None = None


class PutRequest(OwnModel):
    """Candidates to store; those whose id the index holds are replaced."""

    model_config = ConfigDict(json_schema_extra=described({"candidates": [_EXAMPLE]}))

    candidates: list[Candidate]


class DeleteRequest(OwnModel):
    """Candidates to remove."""

    model_config = ConfigDict(json_schema_extra=described({"ids": ["git-1"]}))

    ids: list[str]


class PutResponse(BaseModel):
    """What was stored."""

    added: int
    replaced: int
    candidates: int = Field(description="Candidates in the index now.")


class DeleteResponse(BaseModel):
    """What was removed."""

    removed: int
    candidates: int = Field(description="Candidates in the index now.")


def put(index: CandidateIndex, candidates: Sequence[Candidate]) -> PutResponse:
    """Replace the candidates whose ids the index holds, then add the others: two transactions.

    After an error or a crash in between, the request was not answered; sending it again completes it.
    """
    known = [candidate for candidate in candidates if candidate.id in index]
    fresh = [candidate for candidate in candidates if candidate.id not in index]
    for change, group in ((index.update, known), (index.add, fresh)):
        if group:
            ids, texts, metadata = zip(*((item.id, item.text, item.metadata) for item in group), strict=True)
            change(list(texts), list(ids), metadata=list(metadata), show_progress_bar=False)
    return PutResponse(added=len(fresh), replaced=len(known), candidates=len(index))


def delete(index: CandidateIndex, ids: Sequence[str]) -> DeleteResponse:
    """Remove candidates in one transaction; an unknown id is an error, and nothing is removed."""
    removed = index.remove(list(ids))
    return DeleteResponse(removed=removed, candidates=len(index))


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(route_class=StrictRoute, tags=["MixEncoder"])
    options: dict[str, Any] = {"responses": error_responses(OpenAIError, 403)}

    @routes.put("/v1/candidates", **options)
    async def put_candidates(request: Request, body: Annotated[PutRequest, Body()]) -> PutResponse:
        """Store candidates; the answer comes once they are on disk. Needs a server that allows writes."""
        index = service.check_index(writing=True)
        ids = [candidate.id for candidate in body.candidates]
        _check(ids, service.config.limits)
        check_characters("text", [candidate.text for candidate in body.candidates], service.config.limits)
        if len(set(ids)) < len(ids):
            raise RequestError(422, "validation", "an id is given twice; expected distinct ids")
        return await service.change(request, lambda: put(index, body.candidates), len(ids))

    @routes.delete("/v1/candidates", **options)
    async def delete_candidates(request: Request, body: Annotated[DeleteRequest, Body()]) -> DeleteResponse:
        """Remove candidates; the answer comes once that is on disk. Needs a server that allows writes."""
        index = service.check_index(writing=True)
        _check(body.ids, service.config.limits)
        return await service.change(request, lambda: delete(index, body.ids), len(body.ids))

    return routes


def _check(ids: Sequence[str], limits: Limits) -> None:
    if not ids:
        raise RequestError(422, "empty", "there is no candidate; expected at least one")
    if len(ids) > limits.candidates:
        raise too_large("the request", len(ids), limits.candidates, "candidates")
    check_characters("id", ids, limits)
