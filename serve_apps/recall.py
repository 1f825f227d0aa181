"""The recall application for `serve run` and `serve deploy`: see recall.yaml.

No `from __future__ import annotations` here: Ray Serve reads the annotation of `args` to validate them.
"""

from ray.serve import Application

from genrecall.config import places
from genrecall.serving.deployments import RecallDeployment, RecallSettings


def app(args: RecallSettings) -> Application:
    """Build the application from the `args` of the configuration file."""
    return RecallDeployment.bind(args.model_dump(), args.tracking_uri or places().tracking_uri)
