"""`POST /v1/rerank` and `/v2/rerank`, as clients of Cohere, Jina and vLLM call them.

Sources: the API references of Cohere's rerank, versions 1 and 2, and the types of its Python client; the API page of
Jina's reranker; the pages of vLLM on its rerank API. They agree on `query`, `documents`, `top_n` and `results`. Without
`return_documents`, `/v1/rerank` returns the documents, as Jina and vLLM do (Cohere's clients ignore them), and
`/v2/rerank` does not, as Cohere does not. Beyond the dialects: `ids` instead of `documents`, `raw_scores`, and `id` and
`metadata` of candidates in the index.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field

from mixencoder.serving.dialects.common import (
    NOT_EMPTY,
    Ids,
    Model,
    Query,
    StrictRoute,
    TopN,
    Usage,
    described,
    new_id,
    split_ids,
)
from mixencoder.serving.dialects.error_forms import CohereJinaError, error_responses
from mixencoder.serving.errors import RequestError
from mixencoder.serving.service import Service
from mixencoder.serving.work import Hit, Ranking, Reading

_EXAMPLE = {
    "model": "mixencoder",
    "query": "How do I undo a commit?",
    "documents": ["Use git reset --soft HEAD~1.", {"text": "Boil it for six minutes."}],
    "top_n": 1,
}


class Document(Model):
    """A document as an object."""

    text: str


class RerankRequest(Model):
    """Rank documents for a query."""

    model_config = ConfigDict(json_schema_extra=described(_EXAMPLE, one_of=[("documents", "ids")]))

    query: Query
    documents: list[str | Document] | None = Field(None, json_schema_extra=NOT_EMPTY)
    ids: Ids = None
    model: str | None = Field(None, description="The name of the served model.")
    top_n: TopN = None
    return_documents: bool | None = Field(None, description="null: true for /v1/rerank, false for /v2/rerank.")
    raw_scores: bool = Field(False, description="Return the model's scores instead of probabilities.")
    use_activation: bool | None = Field(None, description="As in vLLM: false returns the model's scores.")
    max_tokens_per_doc: int | None = Field(None, ge=0, description="Read at most this many tokens; 0 sets no limit.")
    rank_fields: list[str] | None = Field(
        None, description='Only ["text"] is possible.', json_schema_extra={"enum": [None, ["text"]]}
    )

    def texts(self) -> list[str] | None:
        """Return the documents' texts."""
        if self.documents is None:
            return None
        return [document if isinstance(document, str) else document.text for document in self.documents]

    def ranking(self, *, return_documents: bool) -> Ranking:
        """Return what is asked of the model.

        Raises:
            RequestError: documents and ids are not given as they should be, or rank_fields names other fields.
        """
        if self.rank_fields not in (None, ["text"]):
            raise RequestError(422, "validation", 'rank_fields names other fields than "text"; join them into the text')
        texts = self.texts()
        return Ranking(
            queries=(self.query,),
            documents=None if texts is None else tuple(texts),
            ids=split_ids(self.ids, "documents", texts),
            top_k=self.top_n or None,
            raw_scores=self.raw_scores or self.use_activation is False,
            with_texts=return_documents,
            reading=Reading(document_tokens=self.max_tokens_per_doc or None),
        )


class ReturnedDocument(BaseModel):
    """A document of a result."""

    text: str


class Result(BaseModel):
    """A document in a ranking."""

    index: int
    relevance_score: float
    document: ReturnedDocument | None = None
    id: str | None = Field(None, description="With candidates of the index.")
    metadata: dict[str, Any] | None = Field(None, description="With candidates of the index.")


class RerankResponse(BaseModel):
    """Results, best first."""

    id: str
    model: str
    results: list[Result]
    usage: Usage
    meta: dict[str, Any] = Field(description="As Cohere's clients expect it: API version, search units and tokens.")


async def rerank(service: Service, request: Request, body: RerankRequest, *, version: str) -> RerankResponse:
    """Answer a request in version "1" or "2" of the dialect.

    Raises:
        RequestError: it cannot be answered.
    """
    service.check_model(body.model)
    return_documents = version == "1" if body.return_documents is None else body.return_documents
    ranked = await service.rank(request, body.ranking(return_documents=return_documents))
    texts = body.texts() if return_documents else None
    return RerankResponse(
        id=new_id("rerank"),
        model=service.names[0],
        results=[_result(hit, hit.text if texts is None else texts[hit.index]) for hit in ranked.rankings[0]],
        usage=Usage.of(ranked.tokens),
        meta={
            "api_version": {"version": version},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": ranked.tokens, "output_tokens": 0},
        },
    )


def _result(hit: Hit, text: str | None) -> Result:
    document = None if text is None else ReturnedDocument(text=text)
    return Result(index=hit.index, relevance_score=hit.score, document=document, id=hit.id, metadata=hit.metadata)


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(route_class=StrictRoute, tags=["Cohere, Jina, vLLM"])
    options: dict[str, Any] = {"responses": error_responses(CohereJinaError), "response_model_exclude_none": True}

    @routes.post("/v1/rerank", **options)
    async def rerank_v1(request: Request, body: Annotated[RerankRequest, Body()]) -> RerankResponse:
        """Rank documents, or candidates of the index, for a query; best first. Documents are returned."""
        return await rerank(service, request, body, version="1")

    @routes.post("/v2/rerank", **options)
    async def rerank_v2(request: Request, body: Annotated[RerankRequest, Body()]) -> RerankResponse:
        """Rank documents, or candidates of the index, for a query; best first. Documents are not returned."""
        return await rerank(service, request, body, version="2")

    return routes
