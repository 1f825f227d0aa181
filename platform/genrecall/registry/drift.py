"""How far a catalogue has moved from the one that its bundle was trained on, and when that raises an alarm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DriftLimits:
    """What newcomers may differ by before the alarm says that it is time to retrain.

    Attributes:
        error_ratio: their mean quantisation error over the catalogue's.
        oversize_share: SIDs that they brought beyond twice the cap, of all SIDs.
        unknown_categories: the share of them that name a category which no published item has.
        min_items: fewer newcomers than these raise no alarm by their error or their categories.
    """

    error_ratio: float = 1.5
    oversize_share: float = 0.01
    unknown_categories: float = 0.2
    min_items: int = 100


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the catalogue differs from the bundle's.

    Attributes:
        later_items: items in service that the bundle does not have. changed_items: items of the bundle that answers show otherwise.
        delisted_items: items of the bundle that are gone. out_of_stock_items: items in service that are out of stock.
        error_ratio: mean squared distance of later items' latents from their codes, over that of a sample of the bundle's items; None without either.
        oversize_sids: SIDs beyond twice the cap that were not in the bundle. sids: all of them.
        unknown_categories: share of later items that name a category which no item of the bundle has or is below; None without later items.
    """

    sids: int
    later_items: int = 0
    changed_items: int = 0
    delisted_items: int = 0
    out_of_stock_items: int = 0
    error_ratio: float | None = None
    oversize_sids: int = 0
    unknown_categories: float | None = None

    def alarms(self, limits: DriftLimits) -> list[str]:
        """What is beyond its limit, in words."""
        found = []
        enough = self.later_items >= limits.min_items
        if enough and self.error_ratio is not None and self.error_ratio > limits.error_ratio:
            found.append(
                f"the quantisation error of {self.later_items} later items is {self.error_ratio:.2f} times the catalogue's, above {limits.error_ratio:g}"
            )
        if self.oversize_sids > limits.oversize_share * self.sids:
            found.append(f"{self.oversize_sids} of {self.sids} SIDs grew beyond twice the cap, above a share of {limits.oversize_share:g}")
        if enough and self.unknown_categories is not None and self.unknown_categories > limits.unknown_categories:
            found.append(
                f"{self.unknown_categories:.0%} of {self.later_items} later items have categories that the bundle does not know, above {limits.unknown_categories:.0%}"
            )
        return found
