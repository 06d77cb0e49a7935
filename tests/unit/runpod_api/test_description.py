"""The description's own examples are valid by it and by the models; what breaks a rule is named by its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from runpod_api import description, models
from tools.runpod_api import without_texts


def examples() -> Iterator[tuple[str, Any]]:
    """The name of a schema and an example of it, for each request and response in the description."""
    for methods in description.document()["paths"].values():
        for operation in methods.values():
            if not isinstance(operation, dict):
                continue
            for body in (operation.get("requestBody", {}), *operation["responses"].values()):
                media = body.get("content", {}).get("application/json", {})
                if "$ref" in media.get("schema", {}):
                    for example in media.get("examples", {}).values():
                        yield media["schema"]["$ref"].rpartition("/")[2], example["value"]


EXAMPLES = list(examples())


def test_the_description_has_examples_of_requests_and_responses() -> None:
    assert {"CreateEndpointRequest", "UpdateEndpointRequest", "Endpoint"} <= {schema for schema, _ in EXAMPLES}


@pytest.mark.parametrize(("schema", "example"), EXAMPLES)
def test_examples_are_valid_and_kept_by_the_models(schema: str, example: Any) -> None:
    assert description.violations(schema, example) == []
    model = getattr(models, schema).model_validate(example)
    assert description.violations(schema, model.model_dump(mode="json", by_alias=True, exclude_unset=True)) == []


@pytest.mark.parametrize("schema", description.document()["components"]["schemas"])
def test_models_have_the_properties_of_their_schemas(schema: str) -> None:
    properties = set(without_texts(description.document())["components"]["schemas"][schema].get("properties", {}))
    model = getattr(models, schema, None)
    if properties and model is not None:
        assert properties <= {field.alias or name for name, field in model.model_fields.items()}


def _request(**changes: Any) -> dict[str, Any]:
    return {
        "name": "phi-4",
        "type": "QUEUE",
        "image": "docker.io/me/vllm:1",
        "gpu": {"pools": ["ADA_24"]},
        "scaling": {"type": "REQUEST_COUNT", "requestCount": 4},
    } | changes


def test_a_request_for_an_endpoint_is_valid() -> None:
    assert description.violations("CreateEndpointRequest", _request()) == []


@pytest.mark.parametrize(
    ("request_body", "line"),
    [
        (_request(name=""), "$.name: "),
        (_request(bogus=1), "$: Unevaluated properties are not allowed ('bogus' was unexpected)"),
        (_request(workers={"min": -1}), "$.workers.min: -1 is less than the minimum of 0"),
        (_request(workers={"idleTimeout": 4000}), "$.workers.idleTimeout: 4000 is greater than the maximum of 3600"),
        (_request(gpu={"pools": []}), "$.gpu.pools: "),
        (_request(gpu={"pools": ["ADA_24"], "minCudaVersion": "13"}), "$.gpu.minCudaVersion: '13' does not match"),
        (_request(scaling={"type": "QUEUE_DELAY", "queueDelay": 0.1}), "$.scaling.queueDelay: 0.1 is less than"),
        (
            _request(type="LOAD_BALANCER", scaling={"type": "QUEUE_DELAY", "queueDelay": 4}),
            "$.scaling.type: 'QUEUE_DELAY' is not one of ['REQUEST_COUNT']",
        ),
    ],
)
def test_what_breaks_a_rule_is_named_by_its_place(request_body: dict[str, Any], line: str) -> None:
    assert any(one.startswith(line) for one in description.violations("CreateEndpointRequest", request_body))


def test_an_update_with_exclusions_needs_the_pools() -> None:
    lines = description.violations("UpdateEndpointRequest", {"gpu": {"excludedTypes": ["NVIDIA L40"]}})
    assert lines == ["$.gpu: 'pools' is a dependency of 'excludedTypes'"]


def test_an_unknown_schema_is_an_error() -> None:
    with pytest.raises(KeyError):
        description.violations("NoSuchSchema", {})
