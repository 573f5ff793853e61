"""openapi.json: every answer that the service may give."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ttt4rec.recsys.serving.forms import (
    Events,
    Health,
    Mistakes,
    Observed,
    Recommended,
    Recommending,
    Refusal,
)
from ttt4rec.recsys.serving.limits import MAX_BODY_BYTES, MAX_ID

_COMPONENT = "#/components/schemas/{model}"
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


def describe() -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    forms, answers = (Events, Recommending), (Observed, Recommended, Health, Refusal, Mistakes)
    models = [(form, "validation") for form in forms] + [(answer, "serialization") for answer in answers]
    _, schemas = models_json_schema(models, ref_template=_COMPONENT)  # type: ignore[arg-type]
    user = {"name": "user_id", "in": "path", "required": True}
    user |= {"schema": {"type": "string", "minLength": 1, "maxLength": MAX_ID}}
    health = {"get": _route("Whether all is well", _json(Health), 503)}
    metrics = {"get": _route("For Prometheus", {"content": _TEXT})}
    forget = _route("Delete a user's history and state", {}, 422, status=204) | {"parameters": [user]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ttt4rec", "version": metadata.version("ttt4rec")},
        "paths": {
            "/events": {"post": _route("Log events", _json(Observed), 409, 422) | _takes(Events)},
            "/recommendations": {"post": _route("The best items", _json(Recommended), 422) | _takes(Recommending)},
            "/users/{user_id}": {"delete": forget},
            "/health": health,
            "/metrics": metrics,
        },
        "components": {"schemas": schemas["$defs"]},
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": _COMPONENT.format(model=model.__name__)}}}}


def _takes(form: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, **_json(form)}}


def _route(about: str, answer: dict[str, Any], *refusals: int, status: int = 200) -> dict[str, Any]:
    """An answer, and what else there may be."""
    why = _json(Refusal)
    every: dict[int, dict[str, Any]] = {
        400: {"content": why["content"] | _TEXT, "description": "No HTTP, no text, or another site's Host"},
        408: why | {"description": "The body did not come in time"},
        409: why | {"description": "An item or a time that this service does not take; nothing took effect"},
        413: why | {"description": f"A body of more than {MAX_BODY_BYTES} bytes"},
        422: _json(Mistakes) | {"description": "What is wrong with the form; nothing took effect"},
        500: why | {"description": "A mistake of the service's"},
        503: why | {"description": "Too much to do, or the event log is damaged or not available"},
    }
    told = {str(number): every[number] for number in sorted({400, 408, 413, 500, 503, *refusals})}
    return {"summary": about, "responses": {str(status): answer | {"description": "Done"}} | told}
