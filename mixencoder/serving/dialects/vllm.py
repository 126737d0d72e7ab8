"""`POST /score` and `/v1/score` as vLLM answers them, and `GET /v1/models` in the OpenAI form.

Source: the pages of vLLM on its score API, with the names `text_1` and `text_2` and the newer `queries` and
`documents`. One text on the first side is scored with every text of the second; otherwise both sides have as many
texts, scored pair by pair. Results are in the order of the request.
"""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field

from mixencoder.serving.dialects.common import Model, StrictRoute, Usage, described, new_id
from mixencoder.serving.dialects.error_forms import OpenAIError, error_responses, read_responses
from mixencoder.serving.errors import RequestError
from mixencoder.serving.service import Service
from mixencoder.serving.work import Hit, Ranking, Reading

_EXAMPLE = {
    "model": "mixencoder",
    "text_1": "How do I undo a commit?",
    "text_2": ["Use git reset --soft HEAD~1.", "Boil it for six minutes."],
}
Texts = str | list[str] | None


class ScoreRequest(Model):
    """Score pairs of texts."""

    model_config = ConfigDict(
        json_schema_extra=described(_EXAMPLE, one_of=[("text_1", "queries"), ("text_2", "documents")])
    )

    text_1: Texts = Field(None, description="A query, or one per text of text_2.")
    text_2: Texts = Field(None, description="Documents.")
    queries: Texts = Field(None, description="Another name of text_1.")
    documents: Texts = Field(None, description="Another name of text_2.")
    model: str | None = Field(None, description="The name of the served model.")
    use_activation: bool | None = Field(None, description="false returns the model's scores, not probabilities.")
    max_tokens_per_doc: int | None = Field(None, ge=0, description="Read at most this many tokens; 0 sets no limit.")

    def ranking(self) -> Ranking:
        """Return what is asked of the model.

        Raises:
            RequestError: a side is missing or given twice, or the numbers of texts do not fit.
        """
        queries = _side("text_1", self.text_1, "queries", self.queries)
        documents = _side("text_2", self.text_2, "documents", self.documents)
        if len(queries) not in (1, len(documents)):
            found = f"{len(queries)} queries and {len(documents)} documents"
            raise RequestError(422, "validation", f"found {found}; expected one query, or one per document")
        return Ranking(
            queries=queries,
            documents=documents,
            paired=len(queries) > 1,
            raw_scores=self.use_activation is False,
            reading=Reading(document_tokens=self.max_tokens_per_doc or None),
        )


def _side(name: str, value: Texts, other_name: str, other: Texts) -> tuple[str, ...]:
    if (value is None) == (other is None):
        raise RequestError(422, "validation", f"expected {name} or {other_name}, one of them")
    found = other if value is None else value
    return (found,) if isinstance(found, str) else tuple(found or ())


class Score(BaseModel):
    """The score of a pair."""

    index: int
    object: str = "score"
    score: float


class ScoreResponse(BaseModel):
    """Scores, in the order of the request."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class ModelCard(BaseModel):
    """A name of the served model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "mixencoder"


class ModelList(BaseModel):
    """The names of the served model."""

    object: str = "list"
    data: list[ModelCard]


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(route_class=StrictRoute, tags=["vLLM, OpenAI"])
    options: dict[str, Any] = {"responses": error_responses(OpenAIError)}
    started = int(time.time())

    @routes.post("/v1/score", **options)
    @routes.post("/score", **options)
    async def score(request: Request, body: Annotated[ScoreRequest, Body()]) -> ScoreResponse:
        """Score pairs of texts."""
        service.check_model(body.model)
        ranked = await service.rank(request, body.ranking())
        hits: list[Hit] = sorted(ranked.rankings[0], key=lambda hit: hit.index)
        return ScoreResponse(
            id=new_id("score"),
            created=int(time.time()),
            model=service.names[0],
            data=[Score(index=hit.index, score=hit.score) for hit in hits],
            usage=Usage.of(ranked.tokens),
        )

    @routes.get("/v1/models", responses=read_responses(OpenAIError))
    async def models() -> ModelList:
        """List the names of the served model."""
        return ModelList(data=[ModelCard(id=name, created=started) for name in service.names])

    return routes
