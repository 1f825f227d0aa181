"""Prompts of the generator and the examples it trains on, tokenised once and assembled into batches by index.

Source: CQ-SID (arXiv:2605.14434), stages 1 to 3: title -> SID, query -> SID, shopper + query -> SID. Layouts, with an
optional soft prompt (the frozen encoder's vector of the text) in front:

    item      [ITEM] title [ANSWER]
    query     [QUERY] query [ANSWER]
    request   [USER] gender age_band [HISTORY] s1 s2 s3 ... [QUERY] query [ANSWER]

A part without content is left out with its marker, so the request prompt of an unknown shopper is the query prompt. The
shopper's part stands first, which keeps the neighbourhood of the query as stage 2 learned it. `history` is what the paper
calls recent clicks in related categories: the newest clicks whose level-1 code is among the codes nearest to the query
(cosine of the encoder's query vector and the mean item vector of the code) come first, other recent clicks fill up to
`max_history`; kept ones stand oldest first.

Batches follow from (seed, step, rank) alone, so a resumed run sees the batches it would have seen.
Shapes: n texts or prompts, L tokens, d encoder dimensions, K1 level-1 codes, R requests, B batch rows, T targets.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genrecall.encoders.ngram_hash import ragged_positions
from genrecall.generator.prompts import Prompts
from genrecall.generator.spelling import SpellingCorrector
from genrecall.generator.tokenizer import QueryTokenizer

PROMPT_FILE = "prompts.json"
CENTROID_FILE = "level1_centroids.npy"
SPELLING_FILE = "spelling.json"
_CHUNK = 8192
_POOL_STEPS = 8
"""Examples of this many steps are drawn together and sorted by length before they are cut into batches, to save padding."""


class PromptBuilderError(ValueError):
    """Prompt settings that cannot be used, or inputs of unequal length."""


@dataclass(frozen=True)
class PromptBank:
    """Token sequences of n prompts: int32 `ids` one after the other, int64 `offsets` [n + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]."""
        return np.diff(self.offsets)

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [B, L] of some prompts, right-padded with `pad_id` to the longest of them, and lengths int64 [B]."""
        lengths = self.lengths[rows]
        width = int(lengths.max()) if len(rows) else 0
        positions = self.offsets[rows][:, None] + np.arange(width)
        inside = np.arange(width) < lengths[:, None]
        return np.where(inside, self.ids[np.where(inside, positions, 0)] if len(self.ids) else 0, pad_id).astype(np.int64), lengths

    @classmethod
    def joined(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> PromptBank:
        """Prompt i = part 0 of i, then part 1 of i, ...; each part is (ids, offsets) over the same n prompts."""
        part_lengths = np.stack([np.diff(offsets) for _, offsets in parts])
        offsets = _offsets_of(part_lengths.sum(axis=0))
        ids = np.empty(int(offsets[-1]), dtype=np.int32)
        starts = offsets[:-1].copy()
        for (part_ids, part_offsets), lengths in zip(parts, part_lengths, strict=True):
            ids[ragged_positions(starts, lengths)] = part_ids[ragged_positions(part_offsets[:-1], lengths)]
            starts += lengths
        return cls(ids, offsets)

    @classmethod
    def stacked(cls, banks: Sequence[PromptBank]) -> PromptBank:
        """The prompts of several banks, bank after bank."""
        return cls(np.concatenate([bank.ids for bank in banks]), _offsets_of(np.concatenate([bank.lengths for bank in banks])))


class PromptBuilder:
    """Texts, profiles and histories to prompts, the same at training, in reinforcement learning and when serving.

    Args:
        tokenizer: the text vocabulary.
        level_offsets: token id of entry 0 of each SID level.
        max_query_tokens, max_title_tokens: longer texts are cut.
        max_history: at most this many clicked items; 0 leaves histories out.
        soft_prompt: whether prompts carry the encoder's vector.
        level1_centroids: float32 [K1, d], L2-normalised mean item vector of each level-1 code (zeros where a code has no
            item); None: histories are cut by recency alone.
        related_codes: so many level-1 codes nearest to the query count as related.
        spelling: corrects queries before they become tokens; None: they are read as typed.

    Raises:
        PromptBuilderError: a limit below its least value.
    """

    def __init__(
        self,
        tokenizer: QueryTokenizer,
        level_offsets: Sequence[int],
        *,
        max_query_tokens: int = 32,
        max_title_tokens: int = 48,
        max_history: int = 10,
        soft_prompt: bool = True,
        level1_centroids: np.ndarray | None = None,
        related_codes: int = 8,
        spelling: SpellingCorrector | None = None,
    ) -> None:
        if min(max_query_tokens, max_title_tokens, related_codes) < 1 or max_history < 0:
            raise PromptBuilderError(
                "expected max_query_tokens, max_title_tokens and related_codes of at least 1 and max_history of at least 0, "
                f"got {max_query_tokens}, {max_title_tokens}, {related_codes}, {max_history}"
            )
        self.tokenizer = tokenizer
        self.level_offsets = np.asarray(level_offsets, dtype=np.int32)
        self.max_query_tokens, self.max_title_tokens, self.max_history = max_query_tokens, max_title_tokens, max_history
        self.soft_prompt = soft_prompt
        self.level1_centroids = level1_centroids
        self.related_codes = related_codes
        self.spelling = spelling

    def with_words(self, words: Iterable[str]) -> PromptBuilder:
        """The builder to which these lower-case words are right too; itself where it corrects none."""
        if self.spelling is None:
            return self
        changed = copy.copy(self)
        changed.spelling = self.spelling.with_words(words)
        return changed

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, `prompts.json` and, where there are centroids and a spelling corrector, `level1_centroids.npy` and `spelling.json`."""
        self.tokenizer.save(folder / "tokenizer.json")
        settings = {
            "level_offsets": self.level_offsets.tolist(),
            "max_query_tokens": self.max_query_tokens,
            "max_title_tokens": self.max_title_tokens,
            "max_history": self.max_history,
            "soft_prompt": self.soft_prompt,
            "related_codes": self.related_codes,
        }
        (folder / PROMPT_FILE).write_text(json.dumps(settings, indent=2))
        if self.level1_centroids is not None:
            np.save(folder / CENTROID_FILE, self.level1_centroids.astype(np.float32), allow_pickle=False)
        if self.spelling is not None:
            self.spelling.save(folder / SPELLING_FILE)

    @classmethod
    def load(cls, folder: Path) -> PromptBuilder:
        """Read what `save` wrote.

        Raises:
            PromptBuilderError: no `prompts.json` in the folder.
            TokenizerError: no usable `tokenizer.json`.
            SpellingError: a `spelling.json` that is none.
        """
        path = folder / PROMPT_FILE
        if not path.is_file():
            raise PromptBuilderError(f"{path}: missing; expected the folder of a generator, which holds it beside tokenizer.json")
        centroids = np.load(folder / CENTROID_FILE, allow_pickle=False) if (folder / CENTROID_FILE).is_file() else None
        spelling = SpellingCorrector.load(folder / SPELLING_FILE) if (folder / SPELLING_FILE).is_file() else None
        return cls(QueryTokenizer.load(folder / "tokenizer.json"), level1_centroids=centroids, spelling=spelling, **json.loads(path.read_text()))

    def query_prompts(self, queries: Sequence[str], soft: np.ndarray | None = None) -> Prompts:
        """Prompts of n queries without a shopper, with `soft` float [n, d] where the builder has soft prompts; an empty query gives the bare markers."""
        return self.prompts(self.query_bank(queries), None, soft)

    def request_prompts(
        self,
        queries: Sequence[str],
        genders: Sequence[str | None],
        age_bands: Sequence[str | None],
        histories: Sequence[np.ndarray],
        soft: np.ndarray | None = None,
    ) -> Prompts:
        """Prompts of n requests.

        Args:
            queries, genders, age_bands: n each; a value without a token counts as unknown.
            histories: n arrays int [h, 3], SID tokens of clicked items, oldest first.
            soft: float [n, d], the encoder's query vectors; they also choose the related part of the histories.

        Raises:
            PromptBuilderError: unequal lengths, or `soft` missing where the builder has soft prompts.
        """
        tokens = np.concatenate([np.asarray(history, dtype=np.int32).reshape(-1, 3) for history in histories]) if len(histories) else np.zeros((0, 3), np.int32)
        offsets = _offsets_of(np.array([len(history) for history in histories], dtype=np.int64))
        related = None if soft is None or self.level1_centroids is None else self.related_level1(soft)
        return self.prompts(self.request_bank(queries, genders, age_bands, tokens, offsets, related), None, soft)

    def prompts(self, bank: PromptBank, rows: np.ndarray | None, soft: np.ndarray | None) -> Prompts:
        """Prompts [B, L] of some rows of a bank (None: all), with their vectors `soft` [B, d].

        Raises:
            PromptBuilderError: the builder has soft prompts and `soft` is None or of another length.
        """
        rows = np.arange(len(bank)) if rows is None else rows
        token_ids, lengths = bank.padded(rows, self.tokenizer.pad_id)
        vectors = None
        if self.soft_prompt:
            if soft is None or len(soft) != len(rows):
                got = "none" if soft is None else f"{len(soft)}"
                raise PromptBuilderError(f"soft: expected {len(rows)} encoder vectors, because the generator was trained with soft prompts, got {got}")
            vectors = torch.from_numpy(np.ascontiguousarray(soft, dtype=np.float32))
        return Prompts(torch.from_numpy(token_ids), torch.from_numpy(lengths), vectors)

    def item_bank(self, titles: Sequence[str]) -> PromptBank:
        """Token sequences of item prompts."""
        return self._marked(self.tokenizer.item_id, titles, self.max_title_tokens)

    def query_bank(self, queries: Sequence[str]) -> PromptBank:
        """Token sequences of query prompts."""
        return self._marked(self.tokenizer.query_id, [self.read_as(query) for query in queries], self.max_query_tokens)

    def read_as(self, query: str) -> str:
        """The query as it becomes tokens: its spelling corrected, where the builder does that."""
        return query if self.spelling is None else self.spelling.corrected(query)

    def request_bank(
        self,
        queries: Sequence[str],
        genders: Sequence[str | None],
        age_bands: Sequence[str | None],
        history_tokens: np.ndarray,
        history_offsets: np.ndarray,
        related: np.ndarray | None = None,
    ) -> PromptBank:
        """Token sequences of request prompts.

        Args:
            history_tokens: int32 [H, 3], all requests' clicks, oldest first within a request.
            history_offsets: int64 [R + 1].
            related: int [R, k], level-1 codes near each query (`related_level1`), or None for recency alone.

        Raises:
            PromptBuilderError: unequal lengths.
        """
        count = len(queries)
        if {len(genders), len(age_bands), len(history_offsets) - 1} != {count}:
            raise PromptBuilderError(f"expected {count} genders, age bands and histories, got {len(genders)}, {len(age_bands)} and {len(history_offsets) - 1}")
        tokenizer = self.tokenizer
        profile = np.full((count, 3), -1, dtype=np.int32)
        profile[:, 1] = [tokenizer.gender_id(gender) for gender in genders]
        profile[:, 2] = [tokenizer.age_band_id(age_band) for age_band in age_bands]
        profile[(profile[:, 1:] >= 0).any(axis=1), 0] = tokenizer.user_id
        kept = profile >= 0
        profile_part = (profile[kept], _offsets_of(kept.sum(axis=1)))

        chosen = self._choose_history(history_tokens, history_offsets, related)
        owner = np.repeat(np.arange(count), np.diff(history_offsets))[chosen]
        per_request = np.bincount(owner, minlength=count)
        marker = (np.full(int((per_request > 0).sum()), tokenizer.history_id, dtype=np.int32), _offsets_of(per_request > 0))
        clicks = ((history_tokens[chosen] + self.level_offsets).astype(np.int32).ravel(), _offsets_of(3 * per_request))
        query = self.query_bank(queries)
        return PromptBank.joined([profile_part, marker, clicks, (query.ids, query.offsets)])

    def related_level1(self, vectors: np.ndarray) -> np.ndarray:
        """The level-1 codes nearest to query vectors float [n, d]: int32 [n, min(related_codes, K1)]."""
        assert self.level1_centroids is not None
        count = min(self.related_codes, len(self.level1_centroids))
        nearest = np.empty((len(vectors), count), dtype=np.int32)
        for start in range(0, len(vectors), _CHUNK):
            scores = vectors[start : start + _CHUNK].astype(np.float32) @ self.level1_centroids.T
            nearest[start : start + _CHUNK] = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        return nearest

    def _choose_history(self, tokens: np.ndarray, offsets: np.ndarray, related: np.ndarray | None) -> np.ndarray:
        """Positions of the clicks to keep, ascending: per request at most `max_history`, related ones first, then newest."""
        counts = np.diff(offsets)
        owner = np.repeat(np.arange(len(counts)), counts)
        position = np.arange(len(tokens))
        is_related = np.zeros(len(tokens), dtype=bool) if related is None else (related[owner] == tokens[:, :1]).any(axis=1)
        order = np.lexsort((-position, ~is_related, owner))
        place = position - np.repeat(offsets[:-1], counts)  # in `order`, requests keep their slots
        return np.sort(order[place < self.max_history])

    def _marked(self, marker: int, texts: Sequence[str], max_tokens: int) -> PromptBank:
        count = len(texts)
        one_each = np.arange(count + 1, dtype=np.int64)
        body = self.tokenizer.encode_batch(texts, max_tokens)
        answer = self.tokenizer.answer_id
        return PromptBank.joined([(np.full(count, marker, np.int32), one_each), body, (np.full(count, answer, np.int32), one_each)])


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one training stage.

    Attributes:
        bank: the prompts, n of them.
        vector_rows: int32 [n], the row of each prompt's text in the matrix of encoder vectors.
        target_offsets: int64 [n + 1]; target_sids int32 [M]: SID rows of each example's targets, at least one each.
        target_weights: float64 [M], graded feedback, positive.
        weights: float64 [n], how often an example is drawn, relative to the others.
    """

    bank: PromptBank
    vector_rows: np.ndarray
    target_offsets: np.ndarray
    target_sids: np.ndarray
    target_weights: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.bank)

    def take(self, rows: np.ndarray) -> ExampleSet:
        """Some of the examples."""
        counts = np.diff(self.target_offsets)[rows]
        positions = ragged_positions(self.target_offsets[:-1][rows], counts)
        lengths = self.bank.lengths[rows]
        bank = PromptBank(self.bank.ids[ragged_positions(self.bank.offsets[:-1][rows], lengths)], _offsets_of(lengths))
        return ExampleSet(bank, self.vector_rows[rows], _offsets_of(counts), self.target_sids[positions], self.target_weights[positions], self.weights[rows])

    @classmethod
    def mixed(cls, sets: Sequence[tuple[ExampleSet, float]]) -> ExampleSet:
        """Several sets as one, each drawn with its share of the total; a set without examples or share is left out."""
        kept = [(examples, share) for examples, share in sets if len(examples) and share > 0]
        return cls(
            PromptBank.stacked([examples.bank for examples, _ in kept]),
            np.concatenate([examples.vector_rows for examples, _ in kept]),
            _offsets_of(np.concatenate([np.diff(examples.target_offsets) for examples, _ in kept])),
            np.concatenate([examples.target_sids for examples, _ in kept]),
            np.concatenate([examples.target_weights for examples, _ in kept]),
            np.concatenate([examples.weights / examples.weights.sum() * share for examples, share in kept]),
        )


class Batches:
    """Batches of an example set, determined by (seed, step, rank).

    Args:
        examples: at least one.
        batch_size: rows of a step over all ranks; a multiple of `world_size`.
        targets: SIDs sampled for an example, T.
        seed: with step and rank it names the batch; several numbers where several stages share a seed.
    """

    def __init__(self, examples: ExampleSet, *, batch_size: int, targets: int, seed: int | Sequence[int], rank: int = 0, world_size: int = 1) -> None:
        if not len(examples):
            raise PromptBuilderError("examples: expected at least one, got none")
        if batch_size < world_size or batch_size % world_size:
            raise PromptBuilderError(f"batch_size: expected a multiple of the {world_size} workers, got {batch_size}")
        self._examples, self._batch_size, self._targets = examples, batch_size, targets
        self._seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self._rank, self._world_size = rank, world_size
        self._lengths = examples.bank.lengths
        self._cumulative = np.cumsum(examples.weights / examples.weights.sum())
        owner = np.repeat(np.arange(len(examples)), np.diff(examples.target_offsets))
        totals = np.add.reduceat(examples.target_weights, examples.target_offsets[:-1])
        running = np.cumsum(examples.target_weights / totals[owner])
        before = running[examples.target_offsets[:-1]] - (examples.target_weights / totals[owner])[examples.target_offsets[:-1]]
        self._target_ends = owner + np.minimum(running - before[owner], 1.0)  # example i's targets fill (i, i + 1]
        self._pool_at, self._pool = -1, np.zeros((0, 0), dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """Example rows int64 [batch_size / world_size] of this rank at a step."""
        pool_at, within = divmod(step, _POOL_STEPS)
        if pool_at != self._pool_at:
            random = np.random.default_rng((*self._seed, 1, pool_at))
            drawn = np.searchsorted(self._cumulative, random.random(_POOL_STEPS * self._batch_size), side="right")
            drawn = np.minimum(drawn, len(self._examples) - 1)
            by_length = drawn[np.argsort(self._lengths[drawn], kind="stable")]
            self._pool = by_length.reshape(_POOL_STEPS, self._batch_size)[random.permutation(_POOL_STEPS)]
            self._pool_at = pool_at
        return self._pool[within, self._rank :: self._world_size]

    def targets(self, rows: np.ndarray, step: int) -> np.ndarray:
        """SID rows int32 [B, T] drawn for examples in proportion to their weights, one from each T-th of the distribution."""
        random = np.random.default_rng((*self._seed, 2, step, self._rank))
        places = (np.arange(self._targets) + random.random((len(rows), 1))) / self._targets
        at = np.searchsorted(self._target_ends, rows[:, None] + places, side="left")
        offsets = self._examples.target_offsets
        at = np.clip(at, offsets[rows][:, None], offsets[rows + 1][:, None] - 1)
        return np.asarray(self._examples.target_sids[at], dtype=np.int32)

    def batch(self, step: int, builder: PromptBuilder, vectors: np.ndarray | None) -> tuple[Prompts, np.ndarray]:
        """The prompts of a step and their target SID rows int32 [B, T]; `vectors` float [U, d] are the encoder's."""
        rows = self.rows(step)
        soft = None if vectors is None else vectors[self._examples.vector_rows[rows]]
        return builder.prompts(self._examples.bank, rows, soft), self.targets(rows, step)


def longest_prompt(*, max_query_tokens: int, max_title_tokens: int, max_history: int) -> int:
    """Tokens of the longest prompt under a builder's limits, soft tokens not counted: a request's with profile and history, or an item's."""
    return max((3 + 1 + 3 * max_history) + 2 + max_query_tokens, 2 + max_title_tokens)


def aggregate_targets(owners: np.ndarray, sids: np.ndarray, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum the weights of (owner, SID) pairs.

    Args:
        owners: int [P] in [0, count), sids: int [P], weights: float [P].

    Returns:
        offsets int64 [count + 1], SID rows int32 [M] and weights float64 [M] of each owner (none where it has no pair).
    """
    width = int(sids.max()) + 1 if len(sids) else 1
    keys, inverse = np.unique(owners.astype(np.int64) * width + sids, return_inverse=True)
    summed = np.bincount(inverse, weights=weights, minlength=len(keys))
    return _offsets_of(np.bincount(keys // width, minlength=count)), (keys % width).astype(np.int32), summed


def level1_centroids(item_vectors: np.ndarray, level1: np.ndarray, num_codes: int) -> np.ndarray:
    """L2-normalised mean vector float32 [K1, d] of the items of each level-1 code (zeros where there is none)."""
    sums = np.zeros((num_codes, item_vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, level1, item_vectors)
    norms = np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return np.asarray(sums / norms, dtype=np.float32)


def _offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
