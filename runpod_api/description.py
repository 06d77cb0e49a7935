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
def _validator(schema: str) -> Draft202012Validator:
    registry: Registry[Any] = Registry().with_resource(_URI, Resource.from_contents(document(), DRAFT202012))
    reference = {"$ref": f"{_URI}#/components/schemas/{schema}"}
    return Draft202012Validator(reference, registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER)


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
    errors = [_deepest(error) for error in _validator(schema).iter_errors(value)]
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
