"""`POST /v1/explain`: the score of one document, its terms, and what attends to which words of the query."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field

from mixencoder.explanation.result import PairExplanation
from mixencoder.serving.dialects.common import OwnModel, Query, StrictRoute, Usage, described
from mixencoder.serving.dialects.error_forms import OpenAIError, error_responses
from mixencoder.serving.service import Service
from mixencoder.serving.work import Explaining

_EXAMPLES = [
    {"query": "How do I undo a commit?", "document": "Use git reset --soft HEAD~1."},
    {"query": "How do I undo a commit?", "id": "git-1", "return_attention": True},
]


class ExplainRequest(OwnModel):
    """Explain the score of one document for one query."""

    model_config = ConfigDict(json_schema_extra=described(*_EXAMPLES, one_of=[("document", "id")]))

    query: Query
    document: str | None = None
    id: str | None = Field(None, description="Instead of a document: the id of a candidate whose text the index holds.")
    model: str | None = Field(None, description="The name of the served model.")
    return_attention: bool = Field(False, description="Also return the attention of every layer and head.")


class Word(BaseModel):
    """A word of a text."""

    text: str
    start: int | None = Field(None, description="The word is characters start to end (exclusive) of the text.")
    end: int | None = None
    weight: float


class TokenOfText(BaseModel):
    """A token that the model reads."""

    text: str
    start: int | None = Field(None, description="null for special tokens.")
    end: int | None = None
    word: int | None = None


class Attention(BaseModel):
    """All weights; the numbers of the last dimension sum to 1."""

    layers: list[int] = Field(description="The backbone layer that each interaction layer reads.")
    state: list[list[list[float]]] | None = Field(
        None, description="Of the state to the query's tokens: layers, heads, tokens."
    )
    contexts: list[list[list[list[float]]]] | None = Field(
        None,
        description="Of each context embedding to the query's tokens, then to the context embeddings: layers, heads, "
        "context embeddings, tokens and context embeddings.",
    )
    pooling: list[list[float]] = Field(
        description="Of the document's tokens in each context embedding: context embeddings, tokens."
    )


class ExplainResponse(BaseModel):
    """The score, its terms, and the weights of words."""

    model: str
    score: float = Field(description="The probability, as in rankings.")
    raw_score: float = Field(description="The model's score: the sum of the terms.")
    interaction: float = Field(description="The term of the interaction.")
    dual: float | None = Field(None, description="The dual term, if the model has one.")
    query_words: list[Word] = Field(description="With the attention to each word, the mean over layers and heads.")
    document_words: list[Word] = Field(description="With the part that each word has in the document's vectors.")
    query_tokens: list[TokenOfText]
    document_tokens: list[TokenOfText]
    attention: Attention | None = Field(None, description="With return_attention.")
    usage: Usage


def _attention(found: PairExplanation) -> Attention:
    everything = found.as_dict()
    return Attention(
        layers=everything["layers"],
        state=everything["state_attention"],
        contexts=everything["context_attention"],
        pooling=everything["pooling"],
    )


def router(service: Service) -> APIRouter:
    """Return the endpoint."""
    routes = APIRouter(route_class=StrictRoute, tags=["MixEncoder"])
    options: dict[str, Any] = {"responses": error_responses(OpenAIError), "response_model_exclude_none": True}

    @routes.post("/v1/explain", **options)
    async def explain(request: Request, body: Annotated[ExplainRequest, Body()]) -> ExplainResponse:
        """Explain the score of a document, or of a candidate of the index, for a query."""
        service.check_model(body.model)
        explained = await service.explain(request, Explaining(body.query, body.document, body.id))
        found = explained.explanation
        return ExplainResponse(
            model=service.names[0],
            score=explained.probability,
            raw_score=found.score,
            interaction=found.interaction,
            dual=found.dual,
            query_words=[Word(**word._asdict()) for word in found.query_words()],
            document_words=[Word(**word._asdict()) for word in found.document_words()],
            query_tokens=[TokenOfText(**token._asdict()) for token in found.query_tokens],
            document_tokens=[TokenOfText(**token._asdict()) for token in found.document_tokens],
            attention=_attention(found) if body.return_attention else None,
            usage=Usage.of(len(found.query_tokens) + len(found.document_tokens)),
        )

    return routes
