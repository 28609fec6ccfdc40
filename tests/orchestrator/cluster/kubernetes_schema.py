"""Validating a manifest as a Kubernetes server does that is asked to be strict: by schema, unknown fields refused."""

from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema


def complaints(value: Any, schema: Mapping[str, Any]) -> list[str]:
    """What a structural OpenAPI schema (of a CustomResourceDefinition) has against a value."""
    wrong = [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(value)]
    return wrong + list(_unknown(value, schema, "$"))


def _unknown(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, inner in value.items():
            if key in known:
                yield from _unknown(inner, known[key], f"{path}.{key}")
            elif isinstance(others, Mapping):
                yield from _unknown(inner, others, f"{path}.{key}")
            elif not others and (known or others is False):
                yield f"{path}.{key}: unknown field"
    elif isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for number, inner in enumerate(value):
            yield from _unknown(inner, schema["items"], f"{path}[{number}]")
