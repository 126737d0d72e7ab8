"""`POST /rerank` and `GET /info` as text-embeddings-inference answers them.

Source: the OpenAPI page of text-embeddings-inference (RerankRequest, Rank, Info). Beyond it: `ids` instead of `texts`.
A body with `documents` instead of `texts` is answered as `/v1/rerank`, since vLLM serves that dialect under this path.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, GetJsonSchemaHandler, Tag

from mixencoder import __version__
from mixencoder.serving.batching import PASS_WEIGHT
from mixencoder.serving.dialects.cohere_jina import RerankRequest, RerankResponse, rerank
from mixencoder.serving.dialects.common import NOT_EMPTY, Ids, Model, Query, StrictRoute, described, split_ids
from mixencoder.serving.dialects.error_forms import OpenAIError, TeiError, error_responses, read_responses
from mixencoder.serving.service import Service
from mixencoder.serving.work import Ranking, Reading

_EXAMPLE = {
    "query": "How do I undo a commit?",
    "texts": ["Use git reset --soft HEAD~1.", "Boil it for six minutes."],
    "return_text": True,
}


class TeiRerankRequest(Model):
    """Rank texts for a query."""

    model_config = ConfigDict(json_schema_extra=described(_EXAMPLE, one_of=[("texts", "ids")]))

    query: Query
    texts: list[str] | None = Field(None, json_schema_extra=NOT_EMPTY)
    ids: Ids = None
    raw_scores: bool = Field(False, description="Return the model's scores instead of probabilities.")
    return_text: bool = False
    truncate: bool | None = Field(None, description="false: texts that are too long are an error. null: they are cut.")
    truncation_direction: Literal["right", "left", "Right", "Left"] = Field(
        "right", description='"right" cuts the end of a text that is too long, "left" its start.'
    )

    def ranking(self) -> Ranking:
        """Return what is asked of the model."""
        keep = None
        if "truncation_direction" in self.model_fields_set:
            keep = "start" if self.truncation_direction.lower() == "right" else "end"
        return Ranking(
            queries=(self.query,),
            documents=None if self.texts is None else tuple(self.texts),
            ids=split_ids(self.ids, "texts", self.texts),
            raw_scores=self.raw_scores,
            with_texts=self.return_text,
            reading=Reading(keep, refuse=self.truncate is False),
        )


class TeiRank(BaseModel):
    """A text in a ranking."""

    index: int
    score: float
    text: str | None = None
    id: str | None = Field(None, description="With candidates of the index.")
    metadata: dict[str, Any] | None = Field(None, description="With candidates of the index.")


class Info(BaseModel):
    """The model, its limits, and the index."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int = Field(description="Tokens of a document.")
    max_query_length: int = Field(description="Tokens of a query.")
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int = Field(description="Candidates of a request.")
    auto_truncate: bool = True
    tokenization_workers: int = 1
    version: str
    calibrated: bool = Field(description="Whether probabilities are calibrated; else they are the score's sigmoid.")
    index: dict[str, Any] | None = Field(None, description="Number of candidates, and whether they may be changed.")


FORM = "form "
"""Prefix of the names of the two forms of a body of `/rerank`."""


def _dialect(body: Any) -> str:
    has_documents = body.get("documents") is not None if isinstance(body, dict) else isinstance(body, RerankRequest)
    return f"{FORM}documents" if has_documents else f"{FORM}texts"


class _AnyOf:
    """Describes a union as anyOf in OpenAPI: forms ignore fields that they do not know, so that both may fit."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        schema["anyOf"] = schema.pop("oneOf")
        return schema


AnyRerankRequest = Annotated[
    Annotated[TeiRerankRequest, Tag(f"{FORM}texts")] | Annotated[RerankRequest, Tag(f"{FORM}documents")],
    Discriminator(_dialect),
    _AnyOf(),
]


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(route_class=StrictRoute, tags=["text-embeddings-inference"])

    @routes.post("/rerank", responses=error_responses(TeiError), response_model_exclude_none=True)
    async def rerank_texts(
        request: Request, body: Annotated[AnyRerankRequest, Body()]
    ) -> list[TeiRank] | RerankResponse:
        """Rank texts, or candidates of the index, for a query; best first."""
        if isinstance(body, RerankRequest):
            return await rerank(service, request, body, version="1")
        ranked = await service.rank(request, body.ranking())
        hits = ranked.rankings[0]
        if body.return_text and body.texts is not None:
            hits = [hit._replace(text=body.texts[hit.index]) for hit in hits]
        return [TeiRank(**hit._asdict()) for hit in hits]

    @routes.get("/info", responses=read_responses(OpenAIError))
    async def info() -> Info:
        """Describe the model, its limits and the index."""
        engine, limits, index = service.engine, service.config.limits, service.index
        document_tokens = engine.read_document.max_length
        return Info(
            model_id=service.names[0],
            model_dtype=str(engine.dtype).removeprefix("torch."),
            model_type={"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            max_concurrent_requests=limits.requests,
            max_input_length=document_tokens,
            max_query_length=engine.read_query.max_length,
            max_batch_tokens=PASS_WEIGHT * document_tokens,
            max_client_batch_size=limits.candidates,
            version=__version__,
            calibrated=service.calibrated,
            index=None
            if index is None
            else {"candidates": service.candidates(), "read_only": not service.config.allow_writes},
        )

    return routes
