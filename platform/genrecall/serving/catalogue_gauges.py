"""What metrics, log and `GET /v1/model` say of the live catalogue: its size, its drift and the alarm, and whether the log is followed.

An alarm is logged once when it is raised and once when it ends, and so is a log that cannot be followed.
"""

from __future__ import annotations

import dataclasses
import logging

from ray.serve.metrics import Gauge

from genrecall.registry.bundle import Bundle
from genrecall.registry.drift import DriftLimits
from genrecall.serving.live_catalogue import LiveBundle
from genrecall.serving.messages import CatalogueInfo

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps


class CatalogueGauges:
    """The gauges of one replica.

    Args:
        limits: when the alarm is raised.
    """

    def __init__(self, limits: DriftLimits) -> None:
        self._limits = limits
        self._problem: str | None = None
        self._alarmed = False
        self._sequence = Gauge("genrecall_catalog_seq", "the last change of the catalogue in service")
        self._later = Gauge("genrecall_later_items", "items in service that the bundle does not have")
        self._delisted = Gauge("genrecall_delisted_items", "items of the bundle that are delisted")
        self._out_of_stock = Gauge("genrecall_out_of_stock_items", "items in service that are out of stock")
        self._error_ratio = Gauge(
            "genrecall_later_error_ratio", "mean quantisation error of later items over that of the bundle's items; 0 without later items"
        )
        self._oversize = Gauge("genrecall_oversize_sids", "SIDs that later items brought beyond twice the cap")
        self._unknown = Gauge("genrecall_unknown_category_share", "share of later items whose category the bundle does not know")
        self._alarm = Gauge("genrecall_drift_alarm", "1 while the catalogue has drifted beyond a limit, see GET /v1/model")
        self._stalled = Gauge("genrecall_catalogue_stalled", "1 while the catalogue log is not followed, see GET /v1/model")

    def show(self, bundle: Bundle) -> None:
        """Set the gauges to what is in service now."""
        if not isinstance(bundle, LiveBundle):
            return
        drift = bundle.drift
        self._sequence.set(float(bundle.catalog_seq))
        self._later.set(float(drift.later_items))
        self._delisted.set(float(drift.delisted_items))
        self._out_of_stock.set(float(drift.out_of_stock_items))
        self._error_ratio.set(drift.error_ratio or 0.0)
        self._oversize.set(float(drift.oversize_sids))
        self._unknown.set(drift.unknown_categories or 0.0)
        alarms = drift.alarms(self._limits)
        self._alarm.set(float(bool(alarms)))
        if alarms and not self._alarmed:
            logger.warning("the catalogue has drifted, train a new version: %s", "; ".join(alarms))
        elif self._alarmed and not alarms:
            logger.info("the catalogue is within the drift limits again")
        self._alarmed = bool(alarms)

    def failed(self, error: Exception) -> None:
        """The log could not be followed."""
        problem = f"{type(error).__name__}: {error}"
        if problem != self._problem:
            logger.error("the catalogue log is not followed, answers stay as they are: %s", problem)
        self._problem = problem
        self._stalled.set(1.0)

    def followed(self) -> None:
        """The log was read to its end."""
        if self._problem is not None:
            logger.info("the catalogue log is followed again")
        self._problem = None
        self._stalled.set(0.0)

    def info(self, bundle: Bundle) -> CatalogueInfo | None:
        """What `GET /v1/model` says; None where no log is followed."""
        if not isinstance(bundle, LiveBundle):
            return None
        values = dataclasses.asdict(bundle.drift)
        del values["sids"]
        return CatalogueInfo(**values, alarms=bundle.drift.alarms(self._limits), problem=self._problem)
