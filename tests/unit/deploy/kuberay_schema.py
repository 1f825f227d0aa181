"""The fields of KubeRay's resources that the manifests use, as JSON schemas that admit no other: a misspelt field fails.

Names and types follow KubeRay's Go types (github.com/ray-project/kuberay, ray-operator/apis/ray/v1: `raycluster_types.go`, `rayservice_types.go`,
`rayjob_types.go`), from which its CRDs are generated, and Kubernetes' for the pods. No registry that the tests may use has the CRDs themselves, which
are a megabyte each; `test_kuberay.py` takes them from a folder where there is one.
"""

from __future__ import annotations

from typing import Any

STRING, COUNT, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {"type": "object", "properties": required | optional, "required": list(required), "additionalProperties": False}


def array(of: dict[str, Any]) -> dict[str, Any]:
    """At least one of them."""
    return {"type": "array", "items": of, "minItems": 1}


AMOUNTS = closed({"cpu": {"type": "string", "pattern": "^[0-9]+m?$"}, "memory": {"type": "string", "pattern": "^[0-9]+[MG]i$"}})
RESOURCES = closed({"requests": AMOUNTS, "limits": AMOUNTS})
CONTAINER_SECURITY = closed(
    {"allowPrivilegeEscalation": {"const": False}, "runAsNonRoot": {"const": True}, "capabilities": closed({"drop": {"const": ["ALL"]}})}
)
POD_SECURITY = closed(
    {
        "runAsNonRoot": {"const": True},
        "runAsUser": {"type": "integer", "minimum": 1},
        "runAsGroup": COUNT,
        "fsGroup": COUNT,
        "seccompProfile": closed({"type": {"const": "RuntimeDefault"}}),
    }
)
ENVIRONMENT = {
    "oneOf": [
        closed({"name": STRING, "value": STRING}),
        closed({"name": STRING, "valueFrom": closed({"secretKeyRef": closed({"name": STRING, "key": STRING})})}),
    ]
}
PROBE = closed({"httpGet": closed({"path": STRING, "port": COUNT})}, periodSeconds=COUNT, timeoutSeconds=COUNT, failureThreshold=COUNT)
CONTAINER = closed(
    {
        "name": STRING,
        "image": STRING,
        "env": array(ENVIRONMENT),
        "ports": array(closed({"name": STRING, "containerPort": COUNT})),
        "resources": RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": array(closed({"name": STRING, "mountPath": STRING}, readOnly=FLAG)),
    },
    readinessProbe=PROBE,
)
VOLUME = {
    "oneOf": [
        closed({"name": STRING, "persistentVolumeClaim": closed({"claimName": STRING})}),
        closed({"name": STRING, "secret": closed({"secretName": STRING, "defaultMode": COUNT})}),
    ]
}
TEMPLATE = closed({"spec": closed({"securityContext": POD_SECURITY, "containers": array(CONTAINER), "volumes": array(VOLUME)})})
START = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER = closed(
    {
        "rayVersion": STRING,
        "authOptions": closed({"mode": {"const": "token"}}),
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": closed({"idleTimeoutSeconds": COUNT, "resources": RESOURCES, "securityContext": CONTAINER_SECURITY}),
        "headGroupSpec": closed({"serviceType": {"const": "ClusterIP"}, "enableIngress": {"const": False}, "rayStartParams": START, "template": TEMPLATE}),
        "workerGroupSpecs": array(
            closed({"groupName": STRING, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT, "rayStartParams": START, "template": TEMPLATE})
        ),
    }
)


def resource(kind: str, metadata: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """One of KubeRay's kinds."""
    return closed({"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


SCHEMAS = {
    "RayService": resource("RayService", closed({"name": STRING, "namespace": STRING}), closed({"serveConfigV2": STRING, "rayClusterConfig": CLUSTER})),
    "RayJob": resource(
        "RayJob",
        closed({"generateName": STRING, "namespace": STRING}),
        closed(
            {
                "entrypoint": STRING,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
                "shutdownAfterJobFinishes": FLAG,
                "ttlSecondsAfterFinished": COUNT,
                "activeDeadlineSeconds": COUNT,
                "backoffLimit": COUNT,
                "rayClusterSpec": CLUSTER,
            }
        ),
    ),
}
