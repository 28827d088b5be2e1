"""/docs: the OpenAPI document as a page that loads nothing from elsewhere; knows no route of its own but this.

FastAPI's page fetches its scripts from somebody else's server, which a machine without a network does not have.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse

from smelt.dashboard.pages import page

JSON = "application/json"
Schema = dict[str, Any]


def router(app: FastAPI) -> APIRouter:
    """The page about an application's routes."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        """What can be asked of this server, and how."""
        address = str(request.base_url).rstrip("/")
        document = app.openapi()
        version = document["info"]["version"]
        return page(request, "docs.html", version=version, address=address, groups=grouped(document, address))

    return routes


def grouped(document: Schema, address: str) -> dict[str, list[Schema]]:
    """The operations of an OpenAPI document by their first tag, as the template wants them."""
    groups: dict[str, list[Schema]] = defaultdict(list)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            group = operation.get("tags", ["other"])[0]
            groups[group].append(_described(document, address, method.upper(), path, operation))
    return groups


def _described(document: Schema, address: str, method: str, path: str, operation: Schema) -> Schema:
    body = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema", {})
    return {
        "id": operation["operationId"],
        "method": method,
        "path": path,
        "summary": operation.get("summary", ""),
        "description": operation.get("description", ""),
        "parameters": [*_parameters(operation), *_fields(document, body)],
        "answers": [
            {"status": status, "description": answer["description"]}
            for status, answer in operation["responses"].items()
        ],
        "example": _curl(address, method, path, _example(document, body) if body else None),
    }


def _parameters(operation: Schema) -> Iterator[Schema]:
    for parameter in operation.get("parameters", []):
        schema = parameter.get("schema", {})
        yield {
            "name": parameter["name"],
            "place": parameter["in"],
            "type": _type(schema),
            "required": parameter.get("required", False),
            "description": parameter.get("description", schema.get("description", "")),
        }


def _fields(document: Schema, body: Schema) -> Iterator[Schema]:
    schema = _resolved(document, body)
    for name, field in schema.get("properties", {}).items():
        yield {
            "name": name,
            "place": "body",
            "type": _type(field),
            "required": name in schema.get("required", []),
            "description": field.get("description", ""),
        }


def _resolved(document: Schema, schema: Schema) -> Schema:
    """What a reference of the document points to."""
    if "$ref" not in schema:
        return schema
    found: Any = document
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if choices := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


# What stands for a value of each type in an example.
SAMPLES: dict[str, Any] = {"string": "...", "integer": 1, "number": 1.0, "boolean": True, "object": {}}


def _example(document: Schema, body: Schema) -> Any:
    """A body with what is required, and nothing else."""
    schema = _resolved(document, body)
    if "example" in schema:
        return schema["example"]
    if choices := schema.get("anyOf", schema.get("oneOf")):
        return _example(document, choices[0])
    if schema.get("type") == "array":
        return [_example(document, schema.get("items", {}))]
    if "properties" in schema:
        return {name: _example(document, schema["properties"][name]) for name in schema.get("required", [])}
    return schema.get("enum", [SAMPLES.get(schema.get("type", "string"))])[0]


def _curl(address: str, method: str, path: str, body: Any) -> str:
    words = ["curl", *(["-X", method] if method not in ("GET", "POST") or body is None and method != "GET" else [])]
    words += [address + path, '-H "Authorization: Bearer $SMELT_KEY"']
    if body is not None:
        words += ['-H "Content-Type: application/json"', f"-d '{json.dumps(body)}'"]
    return " ".join(words)
