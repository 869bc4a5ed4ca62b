"""A Kubernetes resource definition's schema as strict JSON Schema.

Takes:  openAPIV3Schema, as a CustomResourceDefinition has it.
Gives:  the same as JSON Schema that also refuses fields which the definition doesn't have: a cluster drops those in
        silence, so a misspelt field would do nothing.
Knows:  nullable, int-or-string and preserved unknown fields, which JSON Schema writes otherwise; metadata is left open.
"""

from __future__ import annotations

from typing import Any


def strict(schema: Any, *, name: str = "") -> Any:
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key not in ("properties", "nullable")}
    preserved = made.pop("x-kubernetes-preserve-unknown-fields", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made["type"] = ["integer", "string"]
    if "properties" in schema:
        made["properties"] = {key: strict(value, name=key) for key, value in schema["properties"].items()}
        if not preserved and name != "metadata":
            made["additionalProperties"] = False
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


#: The part of KubeRay's RayJob that a manifest of ours can't do without: for where its whole definition isn't at hand.
CONTAINERS = {
    "type": "object", "required": ["spec"],
    "properties": {"spec": {"type": "object", "required": ["containers"], "properties": {
        "volumes": {"type": "array"},
        "containers": {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["name", "image", "resources"],
            "properties": {"name": {"type": "string"}, "image": {"type": "string"}, "resources": {"type": "object"},
                           "volumeMounts": {"type": "array"}},
        }},
    }}},
}
START_PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
SMALL_RAYJOB = {
    "type": "object", "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
        "spec": {"type": "object", "required": ["entrypoint", "rayClusterSpec"], "properties": {
            "entrypoint": {"type": "string"}, "submissionMode": {"type": "string"}, "backoffLimit": {"type": "integer"},
            "shutdownAfterJobFinishes": {"type": "boolean"}, "ttlSecondsAfterFinished": {"type": "integer"},
            "rayClusterSpec": {"type": "object", "required": ["headGroupSpec"], "properties": {
                "rayVersion": {"type": "string"},
                "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}},
                "headGroupSpec": {"type": "object", "required": ["template"], "properties": {
                    "rayStartParams": START_PARAMETERS, "template": CONTAINERS}},
                "workerGroupSpecs": {"type": "array", "items": {
                    "type": "object", "required": ["groupName", "template"], "properties": {
                        "groupName": {"type": "string"}, "replicas": {"type": "integer"},
                        "minReplicas": {"type": "integer"}, "maxReplicas": {"type": "integer"},
                        "rayStartParams": START_PARAMETERS, "template": CONTAINERS}}},
            }},
        }},
    },
}
