"""Semantic cluster IDs: the alphabet of each level, the text form, and the table that gives every item its SID.

Source: CQ-SID (arXiv:2605.14434), capping: an oversize cluster is split into groups and the group number joined to the
level-3 code. Here level 3's alphabet is every bare code (group 0) followed by the (code, group) pairs that occur, so that an
answer stays three tokens long.

Shapes: N items, S SIDs, K1..K3 codebook sizes, P (code, group) pairs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]

_TEXT = re.compile(r"<(\d{1,9}),(\d{1,9}),(\d{1,9})(?:\.(\d{1,9}))?>")


class SidError(ValueError):
    """Codes, tokens or text that name no semantic ID of the space."""


@dataclass(frozen=True)
class SidSpace:
    """The alphabets of the three levels.

    Args:
        level_sizes: codebook sizes (K1, K2, K3).
        groups: the P (code3, group) pairs with group >= 1, sorted and unique. Pair j has token `K3 + j`; the bare code
            (group 0) is its own token.

    Raises:
        SidError: an empty level, or pairs that are unsorted, repeated or out of range.
    """

    level_sizes: tuple[int, int, int]
    groups: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.level_sizes) != 3 or min(self.level_sizes) < 1:
            raise SidError(f"level_sizes: expected three sizes of at least 1, got {self.level_sizes}")
        pairs = self.group_pairs
        if len(pairs):
            if pairs[:, 0].min() < 0 or pairs[:, 0].max() >= self.level_sizes[2] or pairs[:, 1].min() < 1:
                raise SidError(f"groups: expected (code, group) with 0 <= code < {self.level_sizes[2]} and group >= 1, got {self.groups[:5]}...")
            if (np.diff(self._pair_keys) <= 0).any():
                raise SidError("groups: expected pairs sorted and without repeats; use SidSpace.with_pairs to build them")

    @classmethod
    def with_pairs(cls, level_sizes: tuple[int, int, int], codes: Int32Array, groups: Int32Array) -> SidSpace:
        """The space whose pairs are those that occur among `codes` [n, 3] with their `groups` [n] (group 0 needs no pair)."""
        split = groups > 0
        pairs = np.unique(np.stack([codes[split, 2], groups[split]], axis=1).astype(np.int64), axis=0)
        return cls(level_sizes, tuple((int(code), int(group)) for code, group in pairs))

    @functools.cached_property
    def group_pairs(self) -> Int32Array:
        """int32 [P, 2]: the (code3, group) pair of each token `K3 + j`."""
        return np.asarray(self.groups, dtype=np.int32).reshape(-1, 2)

    @functools.cached_property
    def _pair_keys(self) -> NDArray[np.int64]:
        return (self.group_pairs[:, 0].astype(np.int64) << 32) | self.group_pairs[:, 1]

    @property
    def alphabet_sizes(self) -> tuple[int, int, int]:
        """Tokens per level: (K1, K2, K3 + P)."""
        return self.level_sizes[0], self.level_sizes[1], self.level_sizes[2] + len(self.groups)

    def tokens_of(self, codes: Int32Array, group: Int32Array) -> Int32Array:
        """Tokens int32 [n, 3] of codes [n, 3] and group numbers [n].

        Raises:
            SidError: a code out of its level, or a (code, group) pair that the space does not have.
        """
        codes = np.asarray(codes)
        group = np.asarray(group)
        _check_range(codes, self.level_sizes, "codes")
        tokens = codes.astype(np.int32)
        split = np.flatnonzero(group)
        if len(split):
            keys = (codes[split, 2].astype(np.int64) << 32) | group[split].astype(np.int64)
            at = np.searchsorted(self._pair_keys, keys)
            found = at < len(self.groups)
            found[found] = self._pair_keys[at[found]] == keys[found]
            if not found.all():
                row = int(split[np.flatnonzero(~found)[0]])
                raise SidError(f"row {row}: no pair (code {codes[row, 2]}, group {group[row]}) at level 3; groups only open when the SID index is built")
            tokens[split, 2] = self.level_sizes[2] + at
        return tokens

    def codes_of(self, tokens: Int32Array) -> tuple[Int32Array, Int32Array]:
        """Codes int32 [n, 3] and group numbers int32 [n] of tokens [n, 3].

        Raises:
            SidError: a token out of its level's alphabet.
        """
        tokens = np.asarray(tokens)
        _check_range(tokens, self.alphabet_sizes, "tokens")
        codes = tokens.astype(np.int32)
        group = np.zeros(len(tokens), dtype=np.int32)
        split = np.flatnonzero(tokens[:, 2] >= self.level_sizes[2])
        pairs = self.group_pairs[tokens[split, 2] - self.level_sizes[2]]
        codes[split, 2] = pairs[:, 0]
        group[split] = pairs[:, 1]
        return codes, group

    def text_of(self, token_row: Sequence[int] | Int32Array) -> str:
        """The text of one SID, given its three tokens: `<12,5,7>`, or `<12,5,7.2>` for group 2."""
        codes, group = self.codes_of(np.asarray(token_row, dtype=np.int32).reshape(1, 3))
        suffix = f".{group[0]}" if group[0] else ""
        return f"<{codes[0, 0]},{codes[0, 1]},{codes[0, 2]}{suffix}>"

    def texts_of(self, tokens: Int32Array) -> list[str]:
        """The texts of tokens [n, 3]."""
        codes, group = self.codes_of(tokens)
        return [f"<{a},{b},{c}.{g}>" if g else f"<{a},{b},{c}>" for (a, b, c), g in zip(codes.tolist(), group.tolist(), strict=True)]

    def parse(self, text: str) -> Int32Array:
        """The tokens int32 [3] of a SID's text.

        Raises:
            SidError: text of another form, or a SID that the space does not have.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise SidError(f"{text!r}: expected a semantic ID such as <12,5,7> or <12,5,7.2>")
        codes = np.array([[int(part) for part in match.groups()[:3]]], dtype=np.int32)
        group = np.array([int(match.group(4) or 0)], dtype=np.int32)
        row: Int32Array = self.tokens_of(codes, group)[0]
        return row

    def to_json(self) -> str:
        """The space as JSON text."""
        return json.dumps({"level_sizes": list(self.level_sizes), "groups": [list(pair) for pair in self.groups]})

    @classmethod
    def from_json(cls, text: str) -> SidSpace:
        """The space written by `to_json`."""
        values = json.loads(text)
        first, second, third = values["level_sizes"]
        return cls((int(first), int(second), int(third)), tuple((int(code), int(group)) for code, group in values["groups"]))


@dataclass(frozen=True)
class SidTable:
    """Which SIDs there are and which one each item has.

    Args:
        space: the alphabets.
        tokens: int32 [S, 3], unique and sorted lexicographically; the position is the SID row.
        item_sid: int32 [N], the SID row of each item row.
    """

    space: SidSpace
    tokens: Int32Array
    item_sid: Int32Array

    def __len__(self) -> int:
        """S, the number of SIDs."""
        return len(self.tokens)

    @classmethod
    def from_item_tokens(cls, space: SidSpace, item_tokens: Int32Array) -> SidTable:
        """The table of items with the given tokens int32 [N, 3]."""
        tokens, item_sid = numbered_sids(packed(np.asarray(item_tokens), space.alphabet_sizes), space.alphabet_sizes)
        return cls(space, tokens, item_sid)

    def text(self, sid_row: int) -> str:
        """The text of one SID row."""
        return self.space.text_of(self.tokens[sid_row])

    def tokens_of_items(self, item_rows: Int32Array) -> Int32Array:
        """Tokens int32 [..., 3] of item rows [...]."""
        return np.asarray(self.tokens[self.item_sid[item_rows]], dtype=np.int32)


def packed(tokens: NDArray[np.integer], alphabet_sizes: tuple[int, int, int]) -> NDArray[np.int64]:
    """One number int64 [n] for each token triple [n, 3], in lexicographic order.

    Raises:
        SidError: a token out of its level's alphabet.
    """
    _check_range(tokens, alphabet_sizes, "item_tokens")
    keys: NDArray[np.int64] = (tokens[:, 0].astype(np.int64) * alphabet_sizes[1] + tokens[:, 1]) * alphabet_sizes[2] + tokens[:, 2]
    return keys


def numbered_sids(keys: NDArray[np.int64], alphabet_sizes: tuple[int, int, int]) -> tuple[Int32Array, Int32Array]:
    """The SIDs among items, given the items' `packed` tokens [N]: tokens int32 [S, 3], sorted and unique, and the SID row of each item int32 [N]."""
    _, second, third = alphabet_sizes
    unique, item_sid = np.unique(keys, return_inverse=True)
    tokens = np.stack([unique // (second * third), unique // third % second, unique % third], axis=1).astype(np.int32)
    return tokens, item_sid.astype(np.int32)


def _check_range(rows: NDArray[np.integer], sizes: tuple[int, int, int], what: str) -> None:
    if rows.ndim != 2 or rows.shape[1] != 3:
        raise SidError(f"{what}: expected shape [n, 3], got {list(rows.shape)}")
    bad = (rows < 0) | (rows >= np.asarray(sizes))
    if bad.any():
        row, level = (int(i) for i in np.argwhere(bad)[0])
        raise SidError(f"{what}: row {row}, level {level + 1}: expected 0 to {sizes[level] - 1}, got {rows[row, level]}")
