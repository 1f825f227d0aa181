"""Answers kept for requests that come again. What an answer depends on is in the key, the served versions among it, so that nothing kept outlives
a swap or a change of the catalogue; only answers that are not degraded are kept.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from genrecall.serving.messages import RecallRequest, RecallResponse, Versions
from genrecall.serving.recall_service import ServedBundle, filter_of

_OVERHEAD_BYTES = 512
"""Of a kept answer beside its JSON."""


class Key(NamedTuple):
    """What an answer depends on: the versions, and a sha256 of what was asked."""

    versions: Versions
    asked: bytes


def key_of(served: ServedBundle, request: RecallRequest) -> Key:
    """The key of a request to what is served now.

    Case, compatibility forms and white space of the query make no difference where they make none to the tokenizer and the encoder: to our own, not to most
    of Hugging Face's. The deadline is left out: answers that it narrowed are not kept.
    """
    bundle, shopper = served.bundle, request.shopper
    query = request.query
    if bundle.retriever.folds_text:
        query = " ".join(unicodedata.normalize("NFKC", query).lower().split())
    profile = tuple((value or "").strip().lower() for value in (shopper.gender, shopper.age_band))
    history = tuple(bundle.rows_of(request.history).tolist())
    # A history without a known item gets the answer of none, but a degraded one.
    unknown_only = bool(request.history) and not history
    asked = (query, profile, history, unknown_only, filter_of(bundle, request.filters), request.beam_size, request.limit, request.explain)
    return Key(served.versions, hashlib.sha256(repr(asked).encode()).digest())


class AnswerCache:
    """The answers asked for last, as JSON; used by one thread.

    Args:
        entries: answers kept at most; 0 keeps none.
        max_bytes: bytes kept at most; a larger answer is not kept.
    """

    def __init__(self, entries: int, max_bytes: int) -> None:
        self.entries, self.max_bytes = entries, max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> RecallResponse | None:
        """The answer kept under a key, marked as such."""
        kept = self._kept.get(_hashable(key))
        if kept is None:
            return None
        self._kept.move_to_end(_hashable(key))
        return RecallResponse.model_validate_json(kept)

    def put(self, key: Key, answer: RecallResponse) -> None:
        """Keep an answer, unless it is degraded or of other versions than its key: a swap may come between the two."""
        if not self.entries or answer.degraded or answer.versions != key.versions:
            return
        marked = answer.model_copy(update={"timings": answer.timings.model_copy(update={"cached": True})})
        text = marked.model_dump_json().encode()
        if len(text) + _OVERHEAD_BYTES > self.max_bytes:
            return
        self.nbytes -= self._size(self._kept.pop(_hashable(key), None))
        self._kept[_hashable(key)] = text
        self.nbytes += self._size(text)
        while len(self._kept) > self.entries or self.nbytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= self._size(dropped)

    @staticmethod
    def _size(text: bytes | None) -> int:
        return 0 if text is None else len(text) + _OVERHEAD_BYTES


def _hashable(key: Key) -> Hashable:
    return tuple(key.versions.model_dump().items()), key.asked
