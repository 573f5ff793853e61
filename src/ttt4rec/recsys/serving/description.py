"""openapi.json: every answer that the service may give."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ttt4rec.recsys.serving.forms import (
    Events,
    Found,
    Health,
    Mistakes,
    Observed,
    Recommended,
    Recommending,
    Refusal,
    Searching,
    Visiting,
    Visitor,
)
from ttt4rec.recsys.serving.limits import MAX_BODY_BYTES, MAX_ID

_COMPONENT = "#/components/schemas/{model}"
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


def describe(demo: bool = False) -> dict[str, Any]:
    """The document, of OpenAPI 3.1; with the routes of the demo's page if there is one."""
    forms: list[type[BaseModel]] = [Events, Recommending]
    answers: list[type[BaseModel]] = [Observed, Recommended, Health, Refusal, Mistakes]
    if demo:
        forms += [Searching, Visiting]
        answers += [Found, Visitor]
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
        }
        | (_demo() if demo else {}),
        "components": {"schemas": schemas["$defs"]},
    }


def _demo() -> dict[str, Any]:
    kinds = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
    page = {path: {"content": {kind: {"schema": {"type": "string"}}}} for path, kind in kinds.items()}
    return {
        **{path: {"get": _route("The demo's page", content)} for path, content in page.items()},
        "/demo/items": {"post": _route("Items by their names", _json(Found), 422) | _takes(Searching)},
        "/demo/visitor": {"post": _route("What the page shows", _json(Visitor), 422) | _takes(Visiting)},
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
