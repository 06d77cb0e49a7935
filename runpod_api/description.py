"""The description of RunPod's REST API v2, and validation against it.

Source: the OpenAPI document that RunPod publishes (version 2.0.0, of August 2026), in `openapi.json`: the part about
serverless endpoints, templates, GPUs and billing.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

FILE = Path(__file__).with_name("openapi.json")
_URI = "urn:runpod-api-v2"


@functools.cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document, which must not be changed."""
    result: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return result


@functools.cache
def _registry() -> Registry[Any]:
    registry: Registry[Any] = Registry().with_resource(_URI, Resource.from_contents(document(), DRAFT202012))
    return registry


@functools.cache
def _validator(pointer: str) -> Draft202012Validator:
    reference = {"$ref": f"{_URI}#{pointer}"}
    return Draft202012Validator(reference, registry=_registry(), format_checker=Draft202012Validator.FORMAT_CHECKER)


def parameters(path: str) -> dict[str, dict[str, Any]]:
    """Return the parameters of a path's GET operation, by JSON pointer; those in the path itself are left out.

    Args:
        path: as in the document's `paths`, such as `/v2/catalog/gpus`.
    """
    result = {}
    for index, parameter in enumerate(document()["paths"][path]["get"].get("parameters", [])):
        reference = parameter.get("$ref", "").removeprefix("#")
        escaped = path.replace("/", "~1")
        pointer = reference or f"/paths/{escaped}/get/parameters/{index}"
        shared = document()["components"]["parameters"]
        result[pointer] = shared[reference.rpartition("/")[2]] if reference else parameter
    return result


def violations(schema: str, value: Any) -> list[str]:
    """Return what a JSON value violates of a schema: a line for each place, such as `$.workers.max: -1 is less than …`.

    Args:
        schema: its name in the document's `components.schemas`, such as `CreateEndpointRequest`.
        value: as decoded from JSON.

    Raises:
        KeyError: there is no such schema.
    """
    if schema not in document()["components"]["schemas"]:
        raise KeyError(schema)
    return violations_at(f"/components/schemas/{schema}", value)


def violations_at(pointer: str, value: Any) -> list[str]:
    """Return what a JSON value violates of the schema at a JSON pointer into the document; see `violations`."""
    errors = [_deepest(error) for error in _validator(pointer).iter_errors(value)]
    # A property whose value is wrong counts as unevaluated in addition.
    paths = [tuple(error.absolute_path) for error in errors]
    parents = {path[:length] for path in paths for length in range(len(path))}
    return list(
        dict.fromkeys(
            f"{error.json_path}: {error.message}"
            for error in errors
            if error.validator != "unevaluatedProperties" or tuple(error.absolute_path) not in parents
        )
    )


def _deepest(error: ValidationError) -> ValidationError:
    """Return the error itself; of alternatives, the one in that which fits best."""
    return best_match([error]) if error.validator in ("oneOf", "anyOf") else error
