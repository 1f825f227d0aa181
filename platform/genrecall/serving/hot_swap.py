"""Following an alias: the bundle it means is fetched, verified and only then handed over.

A version that cannot be verified is refused and named in `refused`; the one in service stays. The version served before stays loaded,
so that going back to it takes no time.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from genrecall.registry.bundle import load_bundle
from genrecall.registry.versions import CHAMPION, RegistryError, Version, fetch_bundle, open_registry, resolve
from genrecall.serving.recall_service import ServedBundle

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

RETRY_REFUSED_S = 60.0
"""A refused version is tried again after this time: a download may have been cut off."""


class BundleFollower:
    """Loads the bundle that an address means, and again when it means another one. One thread at a time may use it.

    Args:
        address: `models:/NAME@champion`, `models:/NAME/NUMBER` or `latest-champion`. The model that `latest-champion` means at
            the first load is followed from then on.
        tracking_uri: of the registry.
        cache: folder for downloaded bundles; None reads a local store in place.

    Raises:
        RegistryError: there is no registry at `tracking_uri`.
    """

    def __init__(self, address: str, tracking_uri: str, cache: Path | None = None) -> None:
        self.address = address
        self.refused: str | None = None
        self._client = open_registry(tracking_uri)
        self._cache = cache
        self._previous: ServedBundle | None = None
        self._refused_version: Version | None = None
        self._refused_at = 0.0

    def load(self) -> ServedBundle:
        """The bundle the address means now.

        Raises:
            RegistryError: there is none.
            ArtifactError, BundleError: it cannot be trusted.
        """
        version = resolve(self.address, self._client)
        if not self.address.startswith("models:/"):
            self.address = f"models:/{version.name}@{CHAMPION}"
        return self._load(version)

    def newer(self, served: ServedBundle) -> ServedBundle | None:
        """The bundle the address means now if it is another than `served`, verified; None if not, or if it was refused."""
        try:
            version = resolve(self.address, self._client)
        except RegistryError as error:
            self._refuse(None, served, error)
            return None
        except Exception as error:  # the edge: a registry that is down, however it shows, leaves what is loaded in service
            logger.warning("the registry does not answer, keeping %s: %s", served.version.text, error)
            return None
        if version == served.version:
            self.refused = self._refused_version = None
            return None
        if version == self._refused_version and time.monotonic() - self._refused_at < RETRY_REFUSED_S:
            return None
        try:
            found = self._previous if self._previous is not None and self._previous.version == version else self._load(version)
        except Exception as error:  # the edge again: whatever is wrong with another version, the one in service stays
            self._refuse(version, served, error)
            return None
        self.refused = self._refused_version = None
        self._previous = served
        return found

    def _load(self, version: Version) -> ServedBundle:
        return ServedBundle(version, load_bundle(fetch_bundle(version, self._client, self._cache)))

    def _refuse(self, version: Version | None, served: ServedBundle, error: Exception) -> None:
        reason = f"{version.text if version else self.address}: {error}"
        if reason != self.refused:
            logger.error("keeping %s, refused %s", served.version.text, reason)
        self.refused, self._refused_version, self._refused_at = reason, version, time.monotonic()
