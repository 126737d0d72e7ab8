"""`POST /v1/rank`: what this library can do and other dialects have no form for, such as several queries at once."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field

from mixencoder.serving.dialects.common import NOT_EMPTY, Ids, OwnModel, Query, StrictRoute, Usage, described, split_ids
from mixencoder.serving.dialects.error_forms import OpenAIError, error_responses
from mixencoder.serving.service import Service
from mixencoder.serving.work import Ranking, Reading

_EXAMPLES = [
    {
        "queries": ["How do I undo a commit?", "How long does an egg take?"],
        "documents": ["Use git reset --soft HEAD~1.", "Boil it for six minutes."],
        "top_k": 1,
    },
    {"queries": ["How do I undo a commit?"], "ids": "all", "top_k": 3, "return_texts": True},
]


class RankRequest(OwnModel):
    """Rank the same candidates for each of some queries."""

    model_config = ConfigDict(json_schema_extra=described(*_EXAMPLES, one_of=[("documents", "ids")]))

    queries: list[Query] = Field(json_schema_extra=NOT_EMPTY)
    documents: list[str] | None = Field(None, json_schema_extra=NOT_EMPTY)
    ids: Ids = None
    model: str | None = Field(None, description="The name of the served model.")
    top_k: int | None = Field(None, ge=1, description="Results per query; null returns all (whole index: 10).")
    raw_scores: bool = Field(False, description="Return the model's scores instead of probabilities.")
    return_texts: bool = False
    return_metadata: bool = True
    truncate: bool = Field(True, description="false: texts that are too long are an error.")
    keep: Literal["start", "end"] | None = Field(
        None, description="Which part of a text that is too long is read; null: as the model is configured."
    )

    def ranking(self) -> Ranking:
        """Return what is asked of the model.

        Raises:
            RequestError: neither or both of documents and ids are given.
        """
        return Ranking(
            queries=tuple(self.queries),
            documents=None if self.documents is None else tuple(self.documents),
            ids=split_ids(self.ids, "documents", self.documents),
            top_k=self.top_k,
            raw_scores=self.raw_scores,
            with_metadata=self.return_metadata,
            with_texts=self.return_texts,
            reading=Reading(self.keep, refuse=not self.truncate),
        )


class RankedCandidate(BaseModel):
    """A candidate in a ranking."""

    index: int = Field(description="Its position among documents or ids, or in the index if all of it was ranked.")
    score: float
    id: str | None = None
    text: str | None = None
    metadata: dict[str, Any] | None = None


class RankResponse(BaseModel):
    """One ranking for each query, best first."""

    model: str
    rankings: list[list[RankedCandidate]]
    usage: Usage


def router(service: Service) -> APIRouter:
    """Return the endpoint."""
    routes = APIRouter(route_class=StrictRoute, tags=["MixEncoder"])

    @routes.post("/v1/rank", responses=error_responses(OpenAIError), response_model_exclude_none=True)
    async def rank(request: Request, body: Annotated[RankRequest, Body()]) -> RankResponse:
        """Rank documents, or candidates of the index, for each query; best first."""
        service.check_model(body.model)
        ranked = await service.rank(request, body.ranking())
        texts = body.documents if body.return_texts else None
        rankings = [
            [hit if texts is None else hit._replace(text=texts[hit.index]) for hit in ranking]
            for ranking in ranked.rankings
        ]
        return RankResponse(
            model=service.names[0],
            rankings=[[RankedCandidate(**hit._asdict()) for hit in ranking] for ranking in rankings],
            usage=Usage.of(ranked.tokens),
        )

    return routes
