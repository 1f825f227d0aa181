"""Which requests a share chooses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from genrecall.serving.messages import RecallRequest, Shopper
from genrecall.serving.traffic_split import TrafficShares, is_chosen

REQUESTS = [RecallRequest(query=f"hose {number}", shopper=Shopper(gender="f"), history=[f"i{number % 7}"]) for number in range(5000)]


def chosen(share, version=2, purpose="canary"):
    return {place for place, request in enumerate(REQUESTS) if is_chosen(request, share, version, purpose)}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_a_share_is_met(share):
    # Four standard deviations of a binomial count.
    assert abs(len(chosen(share)) - 5000 * share) <= 4 * (5000 * share * (1 - share)) ** 0.5


def test_none_and_all_are_exact():
    assert chosen(0.0) == set()
    assert chosen(1.0) == set(range(5000))


def test_the_choice_is_stable_and_a_larger_share_keeps_it():
    assert chosen(0.1) == chosen(0.1)
    assert chosen(0.1) < chosen(0.3)


@pytest.mark.parametrize("other", [{"version": 3}, {"purpose": "shadow"}])
def test_other_versions_and_purposes_choose_independently(other):
    assert abs(len(chosen(0.5) & chosen(0.5, **other)) - 1250) < 130


def test_what_does_not_say_who_asks_what_makes_no_difference():
    request = REQUESTS[0]
    asked_otherwise = request.model_copy(update={"limit": 3, "explain": True, "deadline_ms": 50})
    assert [is_chosen(request, share / 100, 2, "canary") for share in range(101)] == [
        is_chosen(asked_otherwise, share / 100, 2, "canary") for share in range(101)
    ]


@pytest.mark.parametrize("wrong", [{"canary_share": 1.1}, {"shadow_share": -0.1}, {"canary": 0.1}])
def test_shares_that_cannot_be_used_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrafficShares(**wrong)
