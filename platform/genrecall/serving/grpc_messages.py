"""Between the API's messages and their protobuf twins in `recall.proto`, and the refusals that gRPC carries.

What comes in is validated by the same models as JSON is, so that limits and the words of a refusal are the same.
"""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from genrecall.serving import recall_pb2
from genrecall.serving.messages import ErrorResponse, Message, Problem

ERROR_KEY = "genrecall-error-bin"
"""Trailing metadata of a refusal: an `ErrorResponse`."""

RETRY_AFTER_KEY = "retry-after"
"""Trailing metadata: seconds after which to ask again."""

MAX_PROBLEMS = 10
MAX_PROBLEM_CHARACTERS = 200
"""Of what a refusal says: gRPC carries it in metadata, for which clients have 8 KiB."""

_Read = TypeVar("_Read", bound=Message)


class UnknownFieldError(ValueError):
    """A message holds fields that `recall.proto` does not know.

    Attributes:
        problems: where they are.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{one.field}: {one.message}" for one in problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class _Field:
    """How a field is read: `model` of a nested message, or of each in a list; `null` where one that is not there counts as None."""

    name: str
    model: type[Message] | None
    many: bool
    null: bool


def to_protobuf(message: Message) -> Any:
    """The protobuf twin of a message; what is None is not set.

    Raises:
        ValueError: a number beyond the field's 32 or 64 bits.
    """
    values = message.model_dump(exclude_none=True)
    for request in (values, *values.get("requests", [])):
        if paths := request.get("filters", {}).get("categories"):
            request["filters"]["categories"] = [{"names": path} for path in paths]
    return getattr(recall_pb2, type(message).__name__)(**values)


def from_protobuf(message: ProtobufMessage, kind: type[_Read], *, newer_fields: bool = False) -> _Read:
    """The message of a protobuf twin, validated.

    Args:
        message: of the type in `recall.proto` that has `kind`'s name.
        kind: what to read it as.
        newer_fields: let fields pass that `recall.proto` does not know; else they are refused, as in JSON.

    Raises:
        pydantic.ValidationError: a field is missing or beyond its limits.
        UnknownFieldError: there are unknown fields.
    """
    problems: list[Problem] = []
    values = _values(message, kind, (), problems)
    if problems and not newer_fields:
        raise UnknownFieldError(problems)
    return kind.model_validate(values)


def _values(message: Any, kind: type[Message], where: tuple[str | int, ...], unknown: list[Problem]) -> dict[str, Any]:
    """The fields of a message as Python values; `unknown` receives those that are not declared."""
    _note_unknown(message, where, unknown)
    values: dict[str, Any] = {}
    for field in _fields(kind):
        value = getattr(message, field.name)
        if field.many:
            if field.null and not value:
                values[field.name] = None
            elif field.model is not None:
                values[field.name] = [_values(one, field.model, (*where, field.name, place), unknown) for place, one in enumerate(value)]
            elif value and isinstance(value[0], ProtobufMessage):  # a CategoryPath each
                for place, one in enumerate(value):
                    _note_unknown(one, (*where, field.name, place), unknown)
                values[field.name] = [list(one.names) for one in value]
            else:
                values[field.name] = list(value)
        elif message.HasField(field.name):
            values[field.name] = value if field.model is None else _values(value, field.model, (*where, field.name), unknown)
        elif field.null:
            values[field.name] = None
    return values


def _note_unknown(message: Any, where: tuple[str | int, ...], unknown: list[Problem]) -> None:
    found = UnknownFieldSet(message)
    if len(found) and len(unknown) < MAX_PROBLEMS:
        name = ".".join(map(str, where)) or "body"
        unknown.append(Problem(field=name, message=f"expected no fields beyond those of recall.proto, got number {found[0].field_number}"))


@functools.cache
def _fields(kind: type[Message]) -> tuple[_Field, ...]:
    """How the fields of a model are read."""
    found = []
    for name, annotation in typing.get_type_hints(kind).items():
        if name not in kind.model_fields:
            continue
        field = kind.model_fields[name]
        null = False
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            null = field.is_required() or field.default is None
            (annotation,) = (one for one in typing.get_args(annotation) if one is not type(None))
        many = typing.get_origin(annotation) is list
        if many:
            (annotation,) = typing.get_args(annotation)
        model = annotation if isinstance(annotation, type) and issubclass(annotation, Message) else None
        found.append(_Field(name=name, model=model, many=many, null=null))
    return tuple(found)


def packed_error(error: ErrorResponse) -> bytes:
    """A refusal as `ERROR_KEY` carries it: no more than `MAX_PROBLEMS`, each cut to `MAX_PROBLEM_CHARACTERS`."""
    problems = [Problem(field=one.field[:MAX_PROBLEM_CHARACTERS], message=one.message[:MAX_PROBLEM_CHARACTERS]) for one in error.problems[:MAX_PROBLEMS]]
    packed: bytes = to_protobuf(ErrorResponse(error=error.error[:MAX_PROBLEM_CHARACTERS], problems=problems)).SerializeToString()
    return packed


def unpacked_error(packed: bytes) -> ErrorResponse | None:
    """What `packed_error` gave; None where it is none."""
    try:
        return from_protobuf(recall_pb2.ErrorResponse.FromString(packed), ErrorResponse, newer_fields=True)
    except (DecodeError, ValueError):
        return None
