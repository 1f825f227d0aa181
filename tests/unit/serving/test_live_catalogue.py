"""Catalogue changes over a real bundle, against the plain rule: the newest record of each item counts, however it got there."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.encoders.embed import compose_item_text
from genrecall.encoders.text_encoder import load_encoder
from genrecall.generator.model import Decoder
from genrecall.generator.retriever import Retriever
from genrecall.generator.spelling import SpellingCorrector
from genrecall.quantization.residual_quantizer import load_quantizer
from genrecall.registry.bundle import load_bundle
from genrecall.registry.catalogue_log import CatalogueLog, CatalogueLogError
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.drift import Drift, DriftLimits
from genrecall.registry.versions import Version
from genrecall.serving import live_catalogue
from genrecall.serving.live_catalogue import LiveBundle
from genrecall.serving.messages import Filters, RecallRequest
from genrecall.serving.recall_service import ServedBundle, answer_batch
from genrecall.sid.assign import load_assigner
from genrecall.sid.item_ids import ItemIds
from genrecall.storage import sha256_of

EVERYTHING = {"beam_size": 200, "limit": 1000}
THINGS = ("angle bracket", "garden hose", "shower faucet", "deck screw", "<b>bold</b> lamp")


def record(item_id, title="chrome angle bracket", category=("Home", "angle bracket"), brand="Acme", **fields):
    return ItemRecord(item_id=item_id, title=title, category_path=tuple(category), brand=brand, **fields)


@pytest.fixture(scope="module")
def bundle(untrained_line):
    """Its spelling corrector knows no lamp, so that newcomers bring words, and two words that these are a slip away from."""
    made = load_bundle(untrained_line().path, verify=False)
    titles = [title for title in made.items.column("title").to_pylist() if "lamp" not in title]
    made.retriever.prompt_builder.spelling = SpellingCorrector.of_texts([*titles, *["bolt", "lump"] * 3], [True] * (len(titles) + 6))
    return made


@pytest.fixture
def log(tmp_path):
    return CatalogueLog(tmp_path / "log")


def followed(bundle, log, at_most=live_catalogue.CHANGES_AT_ONCE):
    live = LiveBundle.over(bundle)
    while (further := live.caught_up(log, at_most)) is not live:
        live = further
    return live


def answer(live, query="angle bracket", **fields):
    request = RecallRequest(query=query, **{**EVERYTHING, **fields})
    return answer_batch(ServedBundle(Version("shop", 1, "0" * 64), live), [request], (4, 3, 2))[0]


def items_of(live, **fields):
    return {item.item_id: item for item in answer(live, **fields).items}


def test_a_bundle_without_changes_answers_as_before(bundle, log):
    live = followed(bundle, log)
    plain, now = answer(bundle), answer(live)
    assert now.items == plain.items
    assert now.sids == plain.sids
    assert live.catalog_seq == 0
    assert live.drift == Drift(sids=len(bundle.retriever.table))


def test_a_newcomer_is_served_where_the_bundles_own_encoder_and_codebooks_place_it(bundle, log):
    before = answer(bundle)
    log.append([record("new", "chrome angle bracket", text="sturdy")])
    live = followed(bundle, log)
    vectors = load_encoder(bundle.artifact.path / "encoder").encode_items(
        [compose_item_text("chrome angle bracket", "Acme", ["Home", "angle bracket"], "sturdy")]
    )
    assigner = load_assigner(quantizer=bundle.artifact.path / "quantizer", sid_index=bundle.artifact.path / "sid_index")
    (sid_row,) = assigner.assign(vectors, [["Home", "angle bracket"]])
    found = answer(live)
    items = {item.item_id: item for item in found.items}
    assert items["new"].sid == bundle.retriever.table.text(int(sid_row))
    assert (items["new"].title, items["new"].brand, items["new"].category_path) == ("chrome angle bracket", "Acme", ["Home", "angle bracket"])
    assert len(found.items) == len(before.items) + 1
    assert {sid.sid: sid.size for sid in found.sids} == {sid.sid: sid.size + (sid.sid == items["new"].sid) for sid in before.sids}
    # No published SID moved, and the prefixes' probabilities are the bundle's.
    assert {item.item_id: item.sid for item in before.items} == {one: item.sid for one, item in items.items() if one != "new"}
    assert found.versions.catalog_seq == live.catalog_seq == 1
    # Its score is its share of its SID: those of a cluster's items add up to the SID's probability.
    sid_score = next(sid.score for sid in found.sids if sid.sid == items["new"].sid)
    assert np.logaddexp.reduce([item.score for item in found.items if item.sid == items["new"].sid]) == pytest.approx(sid_score, abs=1e-4)


def test_known_items_show_their_new_record_and_keep_their_sid(bundle, log):
    before = items_of(bundle)
    log.append([record("i05", "renamed", ("Garden", "hose"), "Zenith", price=2.5), record("i00", "steel angle bracket", price=0.0, text="another text")])
    live = followed(bundle, log)
    now = items_of(live)
    assert (now["i05"].title, now["i05"].brand, now["i05"].category_path) == ("renamed", "Zenith", ["Garden", "hose"])
    assert {one: item.sid for one, item in now.items()} == {one: item.sid for one, item in before.items()}
    assert [item.score for item in now.values()] == pytest.approx([item.score for item in before.values()])
    assert live.drift.changed_items == 1  # what answers show of i00 is the same
    assert live.shown([5])[0]["price"] == 2.5
    log.append([record("i05", "small angle bracket", price=5.0)])
    again = followed(bundle, log)
    # i05's title in the bundle is the sixth colour's.
    assert again.drift.changed_items == int(bundle.shown([5])[0]["title"] != "small angle bracket")


def test_delisted_items_vanish_and_come_back_with_a_record(bundle, log):
    log.append([record("new")], ["i00", "i39", "nobody"])
    log.append([], ["new"])
    gone = followed(bundle, log)
    assert set(items_of(gone)) == {f"i{row:02d}" for row in range(40)} - {"i00", "i39"}
    assert gone.num_listed == 38
    assert (gone.drift.later_items, gone.drift.delisted_items) == (0, 2)
    assert gone.rows_of(["i00", "new"]).tolist() == [0]  # a published item still counts in a history
    log.append([record("i00", "back again"), record("new", "new again")])
    for back in (followed(bundle, log), gone.caught_up(log)):
        now = items_of(back)
        assert set(now) == {f"i{row:02d}" for row in range(39)} | {"new"}
        assert (now["i00"].title, now["new"].title) == ("back again", "new again")
        assert now["i00"].sid == items_of(bundle)["i00"].sid
    # A batch under way goes on with its own.
    assert set(items_of(gone)) == {f"i{row:02d}" for row in range(1, 39)}


def test_a_whole_cluster_delisted_leaves_the_rest_and_can_be_filled_again(bundle, log):
    sid = answer(bundle).sids[0].sid
    members = [item.item_id for item in answer(bundle).items if item.sid == sid]
    log.append([], members)
    live = followed(bundle, log)
    assert not set(items_of(live)) & set(members)
    assert next(one.size for one in answer(live).sids if one.sid == sid) == 0
    log.append([record(members[0])])
    assert items_of(followed(bundle, log))[members[0]].sid == sid


def test_later_items_count_in_histories_filters_and_exclusions(bundle, log):
    log.append(
        [
            record("n1", "chrome angle bracket", ("Home", "angle bracket"), "Zenith"),
            record("n2", "soaker hose", ("Garden",), ""),
            record("i09", "red garden hose", ("Garden", "Hoses"), "Acme"),
            record("i10", "moved and renamed", ("Home", "garden hose"), "Zenith"),
        ],
        ["i08"],
    )
    live = followed(bundle, log)

    def ids(**filters):
        return set(items_of(live, filters=Filters(**filters)))

    hoses = {f"i{row:02d}" for row in range(11, 16)}
    assert ids(brands=["Zenith"]) == {"n1", "i10"}
    assert ids(categories=[["Garden"]]) == {"n2", "i09"}
    assert ids(categories=[["Garden", "Hoses"]]) == {"i09"}
    assert ids(categories=[["Home", "garden hose"]]) == hoses | {"i10"}
    assert ids(categories=[["Home", "garden hose"], ["Garden"]], brands=["Acme"]) == hoses | {"i09"}
    assert ids(categories=[["Home", "garden hose"]], excluded=["i10", "i11", "n1"]) == hoses - {"i11"}
    assert ids(categories=[["Attic"]]) == set()
    everything = set(items_of(live))
    assert ids(in_stock=True) == everything
    assert ids(excluded=["n1", "i09", "i30"]) == everything - {"n1", "i09", "i30"}
    plain = [item.item_id for item in answer(live).items]
    kept = [item.item_id for item in answer(live, filters=Filters(excluded=["n2"])).items]
    assert kept == [one for one in plain if one != "n2"]
    (row,) = live.rows_of(["n1"]).tolist()
    assert row >= 40
    assert live.ids_of([row, 3]) == ["n1", "i03"]
    table = live.retriever.table
    assert table.text(int(live.retriever.index.sids_of(np.array([row]))[0])) == items_of(live)["n1"].sid
    # A narrow beam is not spent on a SID whose passing items are all gone or moved.
    for item_id in ("n2", "i09"):
        found = answer(live, beam_size=1, filters=Filters(categories=[["Garden"]], excluded=[item_id]))
        assert len(found.items) == 1


def test_what_is_out_of_stock_is_passed_over_by_the_filter_alone(bundle, log):
    log.append([record("n1")], in_stock={"n1": False, "i00": False, "i01": False, "later": False, "nobody": False})
    live = followed(bundle, log)
    everything = {f"i{row:02d}" for row in range(40)} | {"n1"}
    available = Filters(in_stock=True)
    assert set(items_of(live)) == everything
    assert set(items_of(live, filters=available)) == everything - {"n1", "i00", "i01"}
    assert live.drift.out_of_stock_items == 3
    log.append([record("later"), record("i00", "renamed", brand="Zenith")], ["i01"], in_stock={"n1": True})
    live = live.caught_up(log)
    assert set(items_of(live, filters=available)) == everything - {"i00", "i01"}  # flags stay whatever the record
    assert set(items_of(live)) == (everything | {"later"}) - {"i01"}
    assert live.drift.out_of_stock_items == 2
    log.append([record("i01")], in_stock={"i00": True, "later": True})
    live = live.caught_up(log)
    assert set(items_of(live, filters=available)) == (everything | {"later"}) - {"i01"}
    assert set(items_of(live, filters=Filters(in_stock=True, brands=["Zenith"]))) == {"i00"}


def test_a_step_looks_up_the_ids_that_it_names_however_many_are_out_of_stock(bundle, log, monkeypatch):
    log.append([record(f"n{number}") for number in range(20)])
    log.append([], in_stock={f"{kind}{number:{width}}": False for kind, width in (("i", "02"), ("n", "")) for number in range(20)})
    live = followed(bundle, log)
    assert live.drift.out_of_stock_items == 40
    log.append([record("new")], in_stock={"i03": True})
    looked_up, rows_of = [], ItemIds.rows_of

    def counted(self, ids):
        ids = list(ids)
        looked_up.append(len(ids))
        return rows_of(self, ids)

    monkeypatch.setattr(ItemIds, "rows_of", counted)
    live = live.caught_up(log)
    assert live.drift.out_of_stock_items == 39
    assert max(looked_up) <= 2


def test_rows_of_flagged_items_follow_when_rows_are_freed(bundle, log, monkeypatch):
    monkeypatch.setattr(live_catalogue, "_UNUSED_ROWS", 2)
    log.append([record(f"n{number}") for number in range(6)], ["i07"], in_stock={"n1": False, "n4": False, "n5": False, "i07": False, "i08": False})
    live = followed(bundle, log)
    log.append([record("i07")], ["n0", "n4"])  # an item that is listed again has the rows behind the bundle's numbered anew
    live = live.caught_up(log)
    assert live.ids_of(live.flagged_rows) == ["i07", "i08", "n1", "n5"]
    assert live.flagged_rows.tolist() == [7, 8, 40, 43]  # n1, n2, n3, n5
    assert {"n1", "n5", "i07", "i08"} == set(items_of(live)) - set(items_of(live, filters=Filters(in_stock=True)))


CHANGE = st.tuples(
    st.sampled_from(["i00", "i01", "i17", "n0", "n1", "n2", "n3"]),
    st.sampled_from(["delist", *THINGS]),
    st.sampled_from(["Acme", "Zenith", ""]),
    st.sampled_from([None, True, False]),
)
REQUESTS = st.lists(st.lists(CHANGE, min_size=1, max_size=4, unique_by=lambda change: change[0]), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(
    requests=REQUESTS,
    at_most=st.sampled_from([1, 3, 1000]),
    compact=st.booleans(),
    wanted=st.sampled_from([{}, {"brands": ["Zenith"]}, {"categories": [["Home", "garden hose"]]}, {"in_stock": True}, {"brands": ["Acme"], "in_stock": True}]),
)
def test_any_history_ends_where_the_newest_records_say_however_it_is_followed(bundle, tmp_path_factory, requests, at_most, compact, wanted):
    log = CatalogueLog(tmp_path_factory.mktemp("log"))
    shop = {row["item_id"]: (row["title"], row["brand"], row["category_path"]) for row in bundle.items.to_pylist()}
    stock: dict[str, bool] = {}
    live = LiveBundle.over(bundle)
    for changes in requests:
        # Equal titles have equal scores: their order is that of the rows.
        upsert = [record(one, thing, ("Home", thing), brand) for one, thing, brand, _ in changes if thing != "delist"]
        delist = [one for one, thing, _, _ in changes if thing == "delist"]
        flags = {one: flag for one, _, _, flag in changes if flag is not None}
        log.append(upsert, delist, in_stock=flags)
        stock |= flags
        for one in upsert:
            shop[one.item_id] = (one.title, one.brand, list(one.category_path))
        for one in delist:
            shop.pop(one, None)
        live = live.caught_up(log, at_most)
    while (further := live.caught_up(log, at_most)) is not live:
        live = further
    if compact:
        log.compact()
    late = followed(bundle, CatalogueLog(log.folder))
    filters = Filters(**wanted) if wanted else None
    expected = {
        one: shown
        for one, shown in shop.items()
        if (not wanted.get("brands") or shown[1] in wanted["brands"])
        and (not wanted.get("categories") or shown[2][:2] in wanted["categories"])
        and (not wanted.get("in_stock") or stock.get(one, True))
    }
    for state in (live, late):
        assert state.flagged_rows.tolist() == sorted(state.rows_of(state.out_of_stock).tolist())
        assert {one: (item.title, item.brand, item.category_path) for one, item in items_of(state, filters=filters).items()} == expected
        assert state.num_listed == len(shop)
    one, other = (answer(state, filters=filters, history=["n1", "i00"]) for state in (live, late))
    assert one.items == other.items
    assert one.sids == other.sids
    assert one.versions == other.versions
    assert live.drift == late.drift
    in_use = any(one.startswith("n") and "lamp" in title for one, (title, _, _) in shop.items())  # published items keep their words
    for state in (live, late):
        assert answer(state, "bold lamp", explain=True).read_as == (None if in_use else "bolt lump")


def test_a_newcomers_words_are_right_as_long_as_it_is_there_and_a_batch_under_way_goes_on_with_its_own(bundle, log):
    before = LiveBundle.over(bundle)
    log.append([record("n0", "brass lamp")])
    during = before.caught_up(log)
    log.append([], ["n0"])
    after = during.caught_up(log)
    assert [answer(state, "lamp", explain=True).read_as for state in (before, during, after)] == ["lump", None, "lump"]


def test_rows_that_updates_left_behind_are_freed(bundle, log, monkeypatch):
    monkeypatch.setattr(live_catalogue, "_UNUSED_ROWS", 3)
    live = LiveBundle.over(bundle)
    for number in range(12):
        log.append([record("n0", f"version {number} of a hose"), record(f"m{number // 6}")])
        live = live.caught_up(log)
    assert live.drift.later_items == 3
    assert live.retriever.index.num_items - 40 <= 3 + 8  # of 24
    assert items_of(live)["n0"].title == "version 11 of a hose"
    assert answer(live).items == answer(followed(bundle, log)).items


@pytest.mark.parametrize("guided", [True, False])
def test_a_bundle_without_posting_lists_takes_newcomers_too_guided_or_not(bundle, log, guided):
    whole = bundle.retriever
    model = whole.model if guided else Decoder.from_pretrained(bundle.artifact.path / "generator" / "stage")
    if not guided:
        model.guidance = None
    parts = (model, whole.prompt_builder, whole.trie, whole.index, whole.table, whole.encoder)
    log.append([record("new", "soaker hose", ("Garden",), "Zenith", prior_score=1e9)], ["i00"])
    live = followed(dataclasses.replace(bundle, retriever=Retriever(*parts, support="trie")), log)
    found = items_of(live)
    assert set(found) == {f"i{row:02d}" for row in range(1, 40)} | {"new"}
    assert set(items_of(live, filters=Filters(brands=["Zenith"]))) == {"new"}
    log.append([], in_stock={"i01": False})
    assert set(items_of(live.caught_up(log), filters=Filters(in_stock=True))) == set(found) - {"i01"}
    if not guided:  # the site's own order inside a cluster
        assert next(item.item_id for item in answer(live).items if item.sid == found["new"].sid) == "new"


def test_what_a_bundle_covers_is_not_applied_again(untrained_line, tmp_path, log):
    folder = tmp_path / "bundle"
    shutil.copytree(untrained_line().path, folder)
    about = json.loads((folder / "bundle.json").read_text()) | {"catalog_seq": 2}
    (folder / "bundle.json").write_text(json.dumps(about))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["bundle.json"] = {"sha256": sha256_of(folder / "bundle.json"), "bytes": (folder / "bundle.json").stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    covering, older = load_bundle(folder, verify=False), load_bundle(untrained_line().path, verify=False)
    with pytest.raises(CatalogueLogError, match="the log ends at change 0, before 2, which is served already"):
        followed(covering, log)
    log.append([record("a")], ["i00"])
    log.append([record("b")])
    assert {"i00", "b"} <= set(items_of(followed(covering, log)))
    assert "a" not in items_of(followed(covering, log))
    assert set(items_of(followed(older, log))) == {f"i{row:02d}" for row in range(1, 40)} | {"a", "b"}
    log.compact(covered=2)
    assert "b" in items_of(followed(covering, log))
    log.append([], in_stock={"i02": False})
    log.compact(covered=4)
    # A bundle never holds stock flags itself, whatever its items cover.
    late = LiveBundle.over(dataclasses.replace(covering, about={**covering.about, "catalog_seq": 4}), log.in_stock(4))
    assert "i02" not in items_of(late, filters=Filters(in_stock=True))
    assert "i02" in items_of(late)
    # Without the dropped tombstone i00 would come back.
    with pytest.raises(CatalogueLogError, match="serve a bundle that covers 4 or more"):
        followed(older, log)


def test_drift_is_measured_against_the_bundles_own_items(bundle, log):
    quantizer = load_quantizer(bundle.artifact.path / "quantizer")
    encoder = load_encoder(bundle.artifact.path / "encoder")

    def error(texts):
        return float(np.square(quantizer.place(encoder.encode_items(texts), [()] * len(texts))[1]).sum(axis=1).mean())

    items = bundle.items.to_pylist()
    catalogue = error([compose_item_text(one["title"], one["brand"], one["category_path"], "sturdy") for one in items])
    titles = [f"{thing} {number}" for number in range(4) for thing in THINGS]
    log.append([record(f"n{place}", title, ("Home", THINGS[0]) if place % 4 else ("Attic",)) for place, title in enumerate(titles)])
    log.append([record("i00", "another title")], ["i01", "n0"])
    drift = followed(bundle, log).drift
    log.append([record("without", category=())])
    assert followed(bundle, log).drift.unknown_categories == pytest.approx(4 / 20)  # what has no category is normal in many shops
    newcomers = error([compose_item_text(title, "Acme", ("Home", THINGS[0]) if place % 4 else ("Attic",)) for place, title in enumerate(titles) if place])
    assert drift.error_ratio == pytest.approx(newcomers / catalogue, rel=0.01)
    assert (drift.later_items, drift.changed_items, drift.delisted_items) == (19, 1, 1)
    assert drift.unknown_categories == pytest.approx(4 / 19)
    assert drift.oversize_sids == 0


def test_sids_that_newcomers_bring_beyond_twice_the_cap_are_counted(bundle, log):
    log.append([record(f"n{number}") for number in range(20)])
    live = followed(bundle, log)
    sizes, before = live.retriever.index.sizes(), bundle.retriever.index.sizes()
    assert live.drift.oversize_sids == int(((sizes > 10) & (before <= 10)).sum()) > 0


def test_each_limit_raises_its_alarm_and_a_few_items_raise_none():
    limits = DriftLimits(error_ratio=1.5, oversize_share=0.1, unknown_categories=0.2, min_items=10)
    quiet = Drift(sids=10, later_items=10, error_ratio=1.5, oversize_sids=1, unknown_categories=0.2)
    loud = Drift(sids=10, later_items=10, error_ratio=1.6, oversize_sids=2, unknown_categories=0.3)
    assert quiet.alarms(limits) == []
    assert loud.alarms(limits) == [
        "the quantisation error of 10 later items is 1.60 times the catalogue's, above 1.5",
        "2 of 10 SIDs grew beyond twice the cap, above a share of 0.1",
        "30% of 10 later items have categories that the bundle does not know, above 20%",
    ]
    few = Drift(sids=10, later_items=9, error_ratio=9.0, oversize_sids=0, unknown_categories=1.0)
    assert few.alarms(limits) == []
    assert Drift(sids=10).alarms(limits) == []
