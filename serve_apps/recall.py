"""The recall application for `serve run` and `serve deploy`: see recall.yaml.

No `from __future__ import annotations` here: Ray Serve reads the annotation of `args` to validate them.
"""

from ray.serve import Application

from genrecall.config import places
from genrecall.serving.deployments import RecallDeployment
from genrecall.serving.recall_settings import RecallSettings


def app(args: RecallSettings) -> Application:
    """Build the application from the `args` of the configuration file."""
    tracking_uri, catalogues = args.tracking_uri, args.catalogue_folder
    if tracking_uri is None or catalogues is None:
        where = places()
        tracking_uri = tracking_uri or where.tracking_uri
        catalogues = catalogues or (None if "://" in where.home else f"{where.home}/catalogue")
    return RecallDeployment.bind(args.model_dump(), tracking_uri, catalogues)
