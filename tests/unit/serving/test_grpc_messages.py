"""Protobuf twins of the API's messages: field for field the same, written by protoc, and what goes through them comes back."""

from __future__ import annotations

import inspect
import types
import typing
from pathlib import Path

import pytest
from grpc_tools import protoc
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from genrecall.serving import messages, recall_pb2
from genrecall.serving.grpc_messages import MAX_PROBLEMS, UnknownFieldError, from_protobuf, packed_error, to_protobuf, unpacked_error
from genrecall.serving.messages import (
    ErrorResponse,
    Filters,
    ItemExplanation,
    ItemsRequest,
    ItemUpsert,
    Message,
    ModelInfo,
    Prefix,
    Problem,
    RecallBatchRequest,
    RecalledItem,
    RecalledSid,
    RecallRequest,
    RecallResponse,
    Shopper,
    Timings,
    Versions,
)

PLATFORM = Path(__file__).parents[3] / "platform"
PROTO = "genrecall/serving/recall.proto"
HTTP_ONLY = {"Message", "Health", "Readiness"}
GRPC_ONLY = {"CategoryPath", "ModelRequest"}
KINDS = {str: {"TYPE_STRING"}, int: {"TYPE_INT32", "TYPE_INT64"}, float: {"TYPE_DOUBLE"}, bool: {"TYPE_BOOL"}}
MODELS = {name: one for name, one in vars(messages).items() if inspect.isclass(one) and issubclass(one, Message) and name not in HTTP_ONLY}


def kind_of(descriptor):
    return next(name for name, value in vars(type(descriptor)).items() if name.startswith("TYPE_") and value == descriptor.type)


def differences(annotation, field, listed=False):
    """How a field of recall.proto differs from a model's annotation."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (one for one in typing.get_args(annotation) if one is not type(None))
    if typing.get_origin(annotation) is list:
        (inner,) = typing.get_args(annotation)
        if listed:
            (only,) = field.message_type.fields
            return [] if inner is str and only.is_repeated and kind_of(only) == "TYPE_STRING" else [f"{field.full_name}: not a list of lists of text"]
        return differences(inner, field, True) if field.is_repeated else [f"{field.full_name}: not repeated"]
    if not listed and (field.is_repeated or not field.has_presence):
        return [f"{field.full_name}: repeated, or not optional"]
    if typing.get_origin(annotation) is typing.Literal:
        annotation = str
    if inspect.isclass(annotation) and issubclass(annotation, Message):
        same = kind_of(field) == "TYPE_MESSAGE" and field.message_type.name == annotation.__name__
    else:
        same = kind_of(field) in KINDS[annotation]
    return [] if same else [f"{field.full_name}: {kind_of(field)} for {annotation}"]


def test_every_message_and_field_has_its_twin():
    twins = recall_pb2.DESCRIPTOR.message_types_by_name
    assert set(twins) == set(MODELS) | GRPC_ONLY
    for name, model in MODELS.items():
        annotations = typing.get_type_hints(model)
        fields = {field.name: field for field in twins[name].fields}
        assert list(fields) == list(model.model_fields), name
        assert [one for field in fields for one in differences(annotations[field], fields[field])] == []


def test_a_difference_would_be_seen():
    fields = recall_pb2.RecallRequest.DESCRIPTOR.fields_by_name
    assert differences(float, fields["limit"])
    assert differences(list[int], fields["limit"])
    assert differences(str, fields["history"])
    assert differences(Filters, fields["shopper"])


@pytest.mark.parametrize("name", ["recall_pb2.py", "recall_pb2.pyi", "recall_pb2_grpc.py"])
def test_the_generated_code_is_that_of_the_proto_file(name, tmp_path):
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{PLATFORM}", *outputs, PROTO]) == 0
    committed = (PLATFORM / PROTO).parent / name
    assert (tmp_path / PROTO).parent.joinpath(name).read_text() == committed.read_text(), f"write it anew with the command in {PROTO}"


def optional(strategy):
    return st.none() | strategy


def build(kind, /, **fields):
    return st.fixed_dictionaries(fields).map(lambda values: kind(**values))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
name = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
number = st.floats(allow_nan=False)
count = st.integers(0, 2**31 - 1)
filters = build(
    Filters,
    categories=st.lists(st.lists(name, min_size=1, max_size=3), max_size=3),
    brands=st.lists(name, max_size=3),
    in_stock=st.booleans(),
    excluded=st.lists(text, max_size=3),
)
requests = build(
    RecallRequest,
    query=text,
    shopper=build(Shopper, gender=optional(text), age_band=optional(text)),
    history=st.lists(text, max_size=3),
    beam_size=optional(st.integers(1, 200)),
    filters=optional(filters),
    limit=st.integers(1, 1000),
    explain=st.booleans(),
    deadline_ms=optional(st.integers(1, 60_000)),
    version=st.sampled_from([None, "champion", "challenger"]),
)
versions = build(Versions, model=text, bundle=text, catalog_seq=st.integers(0, 2**63 - 1), role=st.sampled_from(["champion", "challenger"]))
prefixes = build(Prefix, prefix=text, label=text, size=count)
responses = build(
    RecallResponse,
    items=st.lists(
        build(
            RecalledItem,
            item_id=text,
            title=text,
            brand=text,
            category_path=st.lists(text, max_size=3),
            rank=count,
            sid=text,
            score=number,
            explanation=optional(build(ItemExplanation, sid_score=number, share=number, path=st.lists(text, max_size=3))),
        ),
        max_size=3,
    ),
    sids=st.lists(
        build(RecalledSid, sid=text, score=number, size=count, label=optional(text), path=optional(st.lists(prefixes, min_size=1, max_size=3))), max_size=3
    ),
    beam_size=count,
    versions=versions,
    timings=build(Timings, generate_ms=number, expand_ms=number, batch_size=count, cached=st.booleans()),
    degraded=st.booleans(),
    degraded_by=st.lists(st.sampled_from(["load", "deadline", "filters", "history"]), max_size=4),
    read_as=optional(text),
)
upserts = build(
    ItemUpsert, item_id=st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), title=name, price=optional(st.floats(allow_nan=False, allow_infinity=False))
)
changes = build(ItemsRequest, upsert=st.lists(upserts, max_size=3), delist=st.lists(st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.one_of(requests, responses, changes, st.lists(requests, min_size=1, max_size=3).map(lambda some: RecallBatchRequest(requests=some))))
def test_what_goes_over_the_wire_comes_back_as_it_was(message):
    twin = to_protobuf(message)
    read = type(twin).FromString(twin.SerializeToString())
    assert from_protobuf(read, type(message)) == message


def test_what_is_null_comes_back_as_null():
    catalogue = messages.CatalogueInfo(
        later_items=0,
        changed_items=0,
        delisted_items=0,
        out_of_stock_items=0,
        error_ratio=None,
        oversize_sids=0,
        unknown_categories=0.0,
        alarms=[],
        problem=None,
    )
    challenger = messages.ChallengerInfo(versions=None, canary_share=0.25, shadow_share=0.0, refused="shop/3: changed")
    info = ModelInfo(
        versions=Versions(model="shop/1", bundle="a"),
        address="models:/shop@champion",
        items=3_000_000_000,
        sids=2,
        levels=[1, 2],
        stage="stage3",
        refused=None,
        catalogue=catalogue,
        challenger=challenger,
    )
    assert from_protobuf(to_protobuf(info), ModelInfo) == info


def test_a_field_left_out_has_the_default_of_json():
    sent = recall_pb2.RecallRequest(query="hose", filters=recall_pb2.Filters())
    assert from_protobuf(sent, RecallRequest) == RecallRequest.model_validate_json('{"query": "hose", "filters": {}}')


@pytest.mark.parametrize(
    ("sent", "json"),
    [
        ({}, "{}"),
        ({"query": "x", "limit": 0}, '{"query": "x", "limit": 0}'),
        ({"query": "x" * 1001, "beam_size": -1}, '{"query": "%s", "beam_size": -1}' % ("x" * 1001)),
        ({"query": "x", "version": "third"}, '{"query": "x", "version": "third"}'),
        ({"query": "x", "filters": {"categories": [{}], "brands": [""]}}, '{"query": "x", "filters": {"categories": [[]], "brands": [""]}}'),
    ],
)
def test_what_json_is_refused_for_protobuf_is_refused_for_in_the_same_words(sent, json):
    with pytest.raises(ValidationError) as over_http:
        RecallRequest.model_validate_json(json)
    with pytest.raises(ValidationError) as over_grpc:
        from_protobuf(recall_pb2.RecallRequest(**sent), RecallRequest)
    assert [(one["loc"], one["msg"]) for one in over_grpc.value.errors()] == [(one["loc"], one["msg"]) for one in over_http.value.errors()]


def test_an_unknown_field_is_refused_where_it_stands_and_let_pass_where_asked():
    unknown = b"\xf8\x07\x01"  # field 127, varint 1
    batch = recall_pb2.RecallBatchRequest(requests=[recall_pb2.RecallRequest(query="a"), recall_pb2.RecallRequest(query="b")])
    batch.requests[1].filters.categories.add(names=["c"]).MergeFromString(unknown)
    with pytest.raises(UnknownFieldError) as caught:
        from_protobuf(batch, RecallBatchRequest)
    (problem,) = caught.value.problems
    assert problem.field == "requests.1.filters.categories.0"
    assert problem.message.endswith("got number 127")
    assert from_protobuf(batch, RecallBatchRequest, newer_fields=True).requests[1].query == "b"
    with pytest.raises(UnknownFieldError, match="body: "):
        from_protobuf(recall_pb2.RecallRequest.FromString(b"\x0a\x01a" + unknown), RecallRequest)


def test_a_refusal_of_many_problems_fits_into_metadata():
    error = ErrorResponse(error="invalid request", problems=[Problem(field="f" * 300, message="m" * 9000)] * 50)
    packed = packed_error(error)
    assert len(packed) < 6000
    found = unpacked_error(packed)
    assert found is not None
    assert len(found.problems) == MAX_PROBLEMS
    small = ErrorResponse(error="no valid API key", problems=[Problem(field="X-API-Key", message="send one")])
    assert unpacked_error(packed_error(small)) == small
    assert unpacked_error(b"\xff\xff") is None
