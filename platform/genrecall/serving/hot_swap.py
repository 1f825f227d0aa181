"""Following an alias and the catalogue log: the bundle the alias means is fetched, verified, brought up to the log's end and only then handed over.

A version that cannot be verified or cannot take the log is refused and named in `refused`; the one in service stays. The version served before stays
loaded, so that going back to it takes no time but that of the changes since; it makes room before a third is loaded.

A registry over HTTP that does not answer is given up after `REGISTRY_TIMEOUT_S`, twice, and asked again at the next look: with MLflow's own defaults (7 retries of
120 s) a moved alias would go unseen for minutes after an outage. The environment's MLFLOW_HTTP_REQUEST_TIMEOUT and MLFLOW_HTTP_REQUEST_MAX_RETRIES go first.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import time
from pathlib import Path

from genrecall.registry.bundle import load_bundle
from genrecall.registry.catalogue_log import CatalogueLog, log_folder
from genrecall.registry.versions import (
    CHALLENGER,
    CHAMPION,
    NotRegisteredError,
    RegistryError,
    Version,
    fetch_bundle,
    open_registry,
    redacted,
    redacting,
    resolve,
)
from genrecall.serving.live_catalogue import LiveBundle
from genrecall.serving.recall_service import ServedBundle

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

REGISTRY_TIMEOUT_S = 10
"""Of one request to an HTTP registry or its store: for connecting, and for each wait for bytes."""

os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REGISTRY_TIMEOUT_S))
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

REGISTRY_AWAY = "the registry does not answer"
"""How the log line of each vain look begins."""

RETRY_REFUSED_S = 60.0
"""A refused version is tried again after this time: a download may have been cut off."""


class BundleFollower:
    """Loads the bundle that an address means, and again when it means another one. One thread at a time may use it, and another `caught_up`.

    Args:
        address: `models:/NAME@champion`, `models:/NAME/NUMBER` or `latest-champion`. The model that `latest-champion` means at
            the first load is followed from then on.
        tracking_uri: of the registry.
        cache: as for `fetch_bundle`.
        catalogues: folder of the catalogue logs, one of each model's name; None: bundles are served as they were built.

    Attributes:
        refused: why another version was not taken, where that happened.
        log: the model's catalogue log, from the first load on.

    Raises:
        RegistryError: there is no registry at `tracking_uri`.
    """

    def __init__(self, address: str, tracking_uri: str, cache: Path | None = None, catalogues: Path | None = None) -> None:
        self.address = address
        self.refused: str | None = None
        self.log: CatalogueLog | None = None
        self._client = open_registry(tracking_uri)
        self._cache = cache
        self._catalogues = catalogues
        self._previous: ServedBundle | None = None
        self._refused_version: Version | None = None
        self._refused_at = 0.0

    def load(self) -> ServedBundle:
        """The bundle the address means now.

        Raises:
            RegistryError: there is none, or the registry or its store failed.
            ArtifactError, BundleError: it cannot be trusted.
            CatalogueLogError: the catalogue log cannot be read, or lacks changes that the bundle needs.
        """
        with redacting():
            version = resolve(self.address, self._client)
            if not self.address.startswith("models:/"):
                self.address = f"models:/{version.name}@{CHAMPION}"
            if self._catalogues is not None:
                self.log = CatalogueLog(log_folder(self._catalogues, version.name))
            return self._load(version)

    def caught_up(self, served: ServedBundle) -> ServedBundle:
        """With the next changes of the catalogue log, or the same object where there are none.

        Raises:
            CatalogueLogError: as for `load`.
        """
        if self.log is None or not isinstance(served.bundle, LiveBundle):
            return served
        bundle = served.bundle.caught_up(self.log)
        return served if bundle is served.bundle else dataclasses.replace(served, bundle=bundle)

    def up_to_date(self, served: ServedBundle) -> ServedBundle:
        """With all changes of the catalogue log; errors as for `caught_up`."""
        while (further := self.caught_up(served)) is not served:
            served = further
        return served

    def newer(self, served: ServedBundle, challenger: ServedBundle | None = None) -> ServedBundle | None:
        """The bundle the address means now if it is another than `served`, verified; None if not, or if it was refused.

        Args:
            challenger: what is loaded in that role, verified as any version is: when the address comes to mean it, it is not loaded a second time.
        """
        try:
            version = resolve(self.address, self._client)
        except RegistryError as error:
            self._refuse(None, error, f"keeping {served.version.text}")
            return None
        except Exception as error:  # the edge: a registry that is down, however it shows, leaves what is loaded in service
            logger.warning("%s, keeping %s: %s", REGISTRY_AWAY, served.version.text, redacted(error))
            return None
        if version == served.version:
            self.refused = self._refused_version = None
            return None
        if version == self._refused_version and time.monotonic() - self._refused_at < RETRY_REFUSED_S:
            return None
        kept = self._previous if self._previous is not None and self._previous.version == version else None
        if kept is None:
            self._previous = None  # makes room: two bundles are in memory at most, beside the challenger's
            if challenger is not None and challenger.version == version:
                kept = dataclasses.replace(challenger, role="champion")
        try:
            found = self._load(version) if kept is None else self._replayed(kept)
        except Exception as error:  # the edge again: whatever is wrong with another version, the one in service stays
            self._refuse(version, error, f"keeping {served.version.text}")
            return None
        self.refused = self._refused_version = None
        self._previous = served
        return found

    def of_challenger(self, name: str) -> BundleFollower:
        """A follower of the alias `challenger` of model `name`, for `wanted_challenger` and `load_challenger`; it reads the same registry, cache and folder of the catalogue log."""
        other = copy.copy(self)
        other.address = f"models:/{name}@{CHALLENGER}"
        other.refused = other._previous = other._refused_version = None
        other.log = CatalogueLog(log_folder(self._catalogues, name)) if self._catalogues is not None else None  # its own: another thread reads it
        return other

    def wanted_challenger(self, loaded: Version | None, champion: Version) -> Version | None:
        """The version that an alias which need not be there means now: `loaded`, or one for `load_challenger`. None where the alias is absent, names the champion,
        or its version is refused. A registry that does not answer leaves `loaded`."""
        try:
            version = resolve(self.address, self._client)
        except NotRegisteredError:
            self.refused = self._refused_version = None
            return None
        except RegistryError as error:
            self._refuse(None, error, "no challenger")
            return None
        except Exception as error:  # the edge: as in `newer`
            logger.warning("%s, the challenger stays as it is: %s", REGISTRY_AWAY, redacted(error))
            return loaded
        if version in (champion, loaded):
            self.refused = self._refused_version = None
            return None if version == champion else loaded
        if version == self._refused_version and time.monotonic() - self._refused_at < RETRY_REFUSED_S:
            return None
        return version

    def load_challenger(self, version: Version) -> ServedBundle | None:
        """A version in the role of challenger, verified; None where it is refused."""
        try:
            found = dataclasses.replace(self._load(version), role="challenger")
        except Exception as error:  # the edge: as in `newer`
            self._refuse(version, error, "no challenger")
            return None
        self.refused = self._refused_version = None
        return found

    def _load(self, version: Version) -> ServedBundle:
        bundle = load_bundle(fetch_bundle(version, self._client, self._cache))
        if self.log is None:
            return ServedBundle(version, bundle)
        covered = bundle.catalog_seq
        return self._replayed(ServedBundle(version, LiveBundle.over(bundle, self.log.in_stock(covered) if covered else {})))

    def _replayed(self, served: ServedBundle) -> ServedBundle:
        """With all changes of the log, read apart from the thread that follows it for the version in service: it is elsewhere in the log, and a reader goes on
        from one place."""
        other = copy.copy(self)
        other.log = CatalogueLog(self.log.folder) if self.log is not None else None
        return other.up_to_date(served)

    def _refuse(self, version: Version | None, error: Exception, effect: str) -> None:
        reason = f"{version.text if version else self.address}: {redacted(error)}"
        if reason != self.refused:
            logger.error("%s, refused %s", effect, reason)
        self.refused, self._refused_version, self._refused_at = reason, version, time.monotonic()
