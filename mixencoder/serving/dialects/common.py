"""What the dialects share: strict JSON, the base of their models, and candidates out of the index."""

import json
import math
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from mixencoder.serving.errors import RequestError

ALL = "all"
"""The value of `ids` that ranks the whole index."""
NOT_BLANK: dict[str, Any] = {"pattern": r"\S"}
NOT_EMPTY: dict[str, Any] = {"minItems": 1}
"""Parts of the JSON schema for what the server checks itself, to answer in the dialect's own form."""
Query = Annotated[str, Field(json_schema_extra=NOT_BLANK)]
Ids = Annotated[
    list[str] | Literal["all"] | None,
    Field(
        description='Instead of texts: ids of candidates in the server\'s index, or "all" for the whole index.',
        json_schema_extra=NOT_EMPTY,
    ),
]
TopN = Annotated[int | None, Field(ge=0, description="Results to return; null and 0 return all (index: 10).")]


class Model(BaseModel):
    """A request: types are strict, and fields that the dialect has but this server does not need are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class OwnModel(BaseModel):
    """A request of this server's own endpoints: types are strict, and unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Usage(BaseModel):
    """Tokens that the model read of the texts of a request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0

    @classmethod
    def of(cls, tokens: int) -> "Usage":
        """Return the usage of a number of tokens."""
        return cls(prompt_tokens=tokens, total_tokens=tokens)


class StrictRequest(Request):
    """A request whose JSON follows the standard: no NaN, no Infinity, no number that becomes one."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            HTTPException: 400, it is not JSON.
        """
        try:
            return json.loads(await self.body(), parse_constant=_refuse, parse_float=_finite)
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
        except ValueError as error:
            # not UTF-8, a number that JSON does not know, or one with thousands of digits
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise HTTPException(400, f"the body is not valid JSON: {reason}") from None


class StrictRoute(APIRoute):
    """A route whose requests are `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.body_field is not None and not _says_json(request):
                raise HTTPException(415, "the Content-Type is not application/json")
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def described(*examples: Any, one_of: Sequence[tuple[str, str]] = ()) -> Any:
    """Return what OpenAPI says of a request beyond its fields.

    Args:
        examples: whole requests.
        one_of: pairs of fields of which exactly one is given and not null.
    """

    def given(name: str, other: str) -> dict[str, Any]:
        return {"required": [name], "properties": {name: {"not": {"type": "null"}}, other: {"type": "null"}}}

    choices = [{"oneOf": [given(first, second), given(second, first)]} for first, second in one_of]
    return {"examples": list(examples)} | ({"allOf": choices} if choices else {})


def split_ids(ids: list[str] | str | None, field: str, documents: Sequence[Any] | None) -> tuple[str, ...] | None:
    """Return the ids of candidates; None stands for the whole index, or for none if there are documents.

    Args:
        ids, documents: as given; None if not.
        field: the dialect's name of the documents.

    Raises:
        RequestError: neither or both of documents and ids are given.
    """
    if (documents is None) == (ids is None):
        found = "neither" if ids is None else "both"
        raise RequestError(422, "validation", f"{found} of {field} and ids are given; expected one of them")
    return tuple(ids) if isinstance(ids, list) else None


def new_id(prefix: str) -> str:
    """Return an id for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


def _says_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
