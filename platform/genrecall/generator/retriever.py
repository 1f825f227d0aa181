"""Requests to items: prompts, constrained beam search, expansion of the SIDs through the index. The same code evaluates and serves.

An item's score is its own log-probability: that of its SID plus that of the item among the SID's, so that a large cluster's best item may come before a
small one's. The second is what the encoder and the query's words say where the decoder is guided (`guidance.py`), else what shoppers did with the items in
training (`sid/index.py`); among equals the index's order holds. Nothing here trains.

A filter masks the search and then the items, and changes no score: where the beam covers every prefix the answer is the unfiltered one less what fails.

Shapes: R requests, S SIDs, m items of one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genrecall.device import default_device
from genrecall.encoders.text_encoder import TextEncoder, load_encoder
from genrecall.generator.beam_search import BeamResult, beam_search
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.filter_cache import FilterCache
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import pack
from genrecall.generator.prefix_masks import PrefixMasks
from genrecall.generator.prompts import Prompts
from genrecall.generator.search_graphs import SearchGraphs
from genrecall.generator.support import Support
from genrecall.sid.filters import Filter, load_filters
from genrecall.sid.index import load_index, load_sid_table, load_trie
from genrecall.sid.segments import SegmentedIndex, ServedIndex
from genrecall.sid.semantic_id import SidTable
from genrecall.sid.trie import Trie

MAX_BATCH = 256
"""Requests decoded together; more are cut into batches of this size."""

MAX_MASK_BYTES = 256 * 2**20
"""Of the masks of a batch; requests with filters are cut into batches that keep to it."""

_ALL = int(np.iinfo(np.int32).max)


class RetrieverError(ValueError):
    """Parts that do not belong together, or a request that cannot be answered."""


@dataclass(frozen=True)
class RecallResult:
    """The answer to one request, best first.

    Attributes:
        item_rows: int32 [m].
        sid_rows: int32 [m], the SID that each item came from.
        scores: float32 [m], natural-log probabilities of the items, never increasing.
    """

    item_rows: np.ndarray
    sid_rows: np.ndarray
    scores: np.ndarray


class GeneratedSids(NamedTuple):
    """The best SIDs of R requests.

    sid_rows: int32 [R, W], best first, -1 where there are fewer valid SIDs. scores: float32 [R, W], natural-log probabilities, -inf there.
    prompts: R pairs of query vector float32 [d] (the guide's, where it has feedback) and the prompt's token ids int64 [L], for `Retriever.expand`; None without query vectors.
    """

    sid_rows: np.ndarray
    scores: np.ndarray
    prompts: list[tuple[Tensor, Tensor]] | None

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray, tuple[Tensor, Tensor] | None]:
        """What one request got: SID rows [W], scores [W], and its prompt."""
        return self.sid_rows[row], self.scores[row], None if self.prompts is None else self.prompts[row]


class Retriever:
    """One generator with its trie, index and encoder.

    Args:
        model: the decoder, on the device it shall run on.
        prompt_builder: as at training.
        trie, index, table: of one `sid_index` artifact; the index may hold changes since.
        encoder: its query vectors become soft prompts and choose the related history; None is allowed where neither is used.
        support: over what the probabilities of a level are normalised, see `support.py`.
        personalised: whether prompts hold the shopper, unless a call says otherwise.
        filters: of that artifact's index; None where no request comes with one. Later items pass those of a `LiveFilterCache` alone.

    Raises:
        RetrieverError: model, trie and table of different SID spaces, no encoder where prompts need one, a guided model without its trie and support, or one
            whose later items lack what guidance reads; filters of another index.
    """

    def __init__(
        self,
        model: Decoder,
        prompt_builder: PromptBuilder,
        trie: Trie,
        index: ServedIndex,
        table: SidTable,
        encoder: TextEncoder | None,
        *,
        support: Support = "level",
        personalised: bool = True,
        filters: FilterCache | None = None,
    ) -> None:
        sizes = tuple(table.space.alphabet_sizes)
        if tuple(model.config.alphabet_sizes) != sizes or tuple(trie.alphabet_sizes) != sizes or not len(trie) == len(index) == len(table):
            raise RetrieverError(
                f"generator {tuple(model.config.alphabet_sizes)}, trie {tuple(trie.alphabet_sizes)} with {len(trie)} SIDs, index with {len(index)} and table "
                f"{sizes} with {len(table)} do not belong together; rerun jobs/train_generator.py on this sid_index"
            )
        if encoder is None and prompt_builder.soft_prompt:
            raise RetrieverError("encoder: needed, because the generator was trained with soft prompts")
        if model.guidance is not None and (support != "trie" or trie.item_vectors is None):
            raise RetrieverError(
                f"the generator is guided: it needs support 'trie' (got {support!r}) and a trie with its items' vectors "
                f"({'missing: rerun jobs/build_sid_index.py' if trie.item_vectors is None else 'there'})"
            )
        if model.guidance is not None:
            _check_guided_index(index, trie, words=bool(model.guidance.lexical_weight))
        if filters is not None:
            _check_filters(filters, index)
        self.model = model.eval()
        self.prompt_builder = prompt_builder
        self.trie, self.index, self.table = trie, index, table
        self.encoder = encoder
        self.support = support
        self.personalised = personalised
        self.filters = filters
        self._graphs: dict[int, SearchGraphs] = {}  # by beam size, on a GPU

    @property
    def folds_text(self) -> bool:
        """Whether case, compatibility forms (NFKC) and white space of a query make no difference to the answer."""
        return self.prompt_builder.tokenizer.folds_text and (self.encoder is None or self.encoder.folds_text)

    def with_index(self, index: ServedIndex, filters: FilterCache | None = None, new_words: Iterable[str] = ()) -> Retriever:
        """The same retriever over a changed index, or with other filters, as where stock changed; this one goes on with its own.

        Args:
            filters: None: as before, which holds as long as the index has the same base.
            new_words: of later items, lower-case: where spelling is corrected these are right too.

        Raises:
            RetrieverError: as for a new retriever.
        """
        parts = (self.model, self.prompt_builder.with_words(new_words), self.trie, index, self.table, self.encoder)
        changed = Retriever(*parts, support=self.support, personalised=self.personalised, filters=self.filters if filters is None else filters)
        changed._graphs = self._graphs
        return changed

    def prompts(
        self,
        queries: Sequence[str],
        genders: Sequence[str | None],
        age_bands: Sequence[str | None],
        histories: Sequence[np.ndarray],
        *,
        personalised: bool | None = None,
    ) -> Prompts:
        """The prompts of R requests, on the CPU; arguments as for `generate`."""
        builder = self.prompt_builder
        personalised = self.personalised if personalised is None else personalised
        with_history = personalised and builder.level1_centroids is not None and any(len(history) for history in histories)
        vectors = None
        if self.encoder is not None and (builder.soft_prompt or with_history):
            vectors = self.encoder.encode_queries(queries)
        if not personalised:
            return builder.query_prompts(queries, vectors)
        tokens = [self.table.tokens[self.index.sids_of(self._known(history))] for history in histories]
        return builder.request_prompts(queries, genders, age_bands, tokens, vectors)

    def generate(
        self,
        queries: Sequence[str],
        genders: Sequence[str | None],
        age_bands: Sequence[str | None],
        histories: Sequence[np.ndarray],
        *,
        beam_size: int,
        personalised: bool | None = None,
        filters: Sequence[Filter | None] | None = None,
    ) -> GeneratedSids:
        """The best SIDs of R requests.

        Args:
            queries: any text; an empty one is answered from the shopper alone, a long one is cut.
            genders, age_bands: R values or None; a value unseen at training counts as unknown.
            histories: R arrays int32 of item rows, oldest first; rows outside the catalogue (-1) are skipped.
            beam_size: SIDs a request, at least 1.
            personalised: False leaves the shopper out of the prompt; None: as the retriever was made.
            filters: R filters or None; a request is searched among the SIDs that hold an item which passes its own.

        Raises:
            RetrieverError: `beam_size` below 1, arguments of unequal length, or a filter where the retriever has none.
        """
        count = len(queries)
        if beam_size < 1:
            raise RetrieverError(f"beam_size: expected at least 1, got {beam_size}")
        if {len(genders), len(age_bands), len(histories)} != {count}:
            raise RetrieverError(f"expected {count} genders, age bands and histories, got {len(genders)}, {len(age_bands)} and {len(histories)}")
        if filters is not None and len(filters) != count:
            raise RetrieverError(f"filters: expected one (or None) for each of {count} requests, got {len(filters)}")
        filtered = filters is not None and any(filters)
        at_once = min(MAX_BATCH, max(1, MAX_MASK_BYTES // sum(self._mask_widths))) if filtered else MAX_BATCH
        sid_rows = np.full((count, beam_size), -1, dtype=np.int32)
        scores = np.full((count, beam_size), -np.inf, dtype=np.float32)
        device = self.trie.device
        read: list[tuple[Tensor, Tensor]] = []
        for start in range(0, count, at_once):
            part = slice(start, min(start + at_once, count))
            prompts = self.prompts(queries[part], genders[part], age_bands[part], histories[part], personalised=personalised)
            allowed = self._masks(filters[part]) if filters is not None else None
            found = self._search(prompts.to(device), beam_size, allowed)
            width = found.sid_rows.shape[1]
            sid_rows[part, :width] = found.sid_rows.cpu().numpy()
            scores[part, :width] = found.scores.float().cpu().numpy()
            vectors = prompts.soft if found.query_vectors is None else found.query_vectors.cpu()
            if vectors is not None:
                read += [(vector, ids[:length]) for vector, ids, length in zip(vectors, prompts.token_ids, prompts.lengths.tolist(), strict=True)]
        return GeneratedSids(sid_rows, scores, read or None)

    def recall(
        self,
        queries: Sequence[str],
        genders: Sequence[str | None],
        age_bands: Sequence[str | None],
        histories: Sequence[np.ndarray],
        *,
        beam_size: int,
        limit: int,
        personalised: bool | None = None,
        filters: Sequence[Filter | None] | None = None,
    ) -> list[RecallResult]:
        """At most `limit` items for each request, all of which pass its filter, from its best `beam_size` SIDs; arguments and errors as for `generate`."""
        generated = self.generate(queries, genders, age_bands, histories, beam_size=beam_size, personalised=personalised, filters=filters)
        return [self.expand(*generated.of(row), limit, None if filters is None else filters[row]) for row in range(len(queries))]

    def expand(self, sid_rows: np.ndarray, scores: np.ndarray, prompt: tuple[Tensor, Tensor] | None, limit: int, only: Filter | None = None) -> RecallResult:
        """At most `limit` items of SIDs int32 [n] (best first, -1 skipped) with scores float32 [n]; `prompt` as `GeneratedSids` has it; `only` those that pass."""
        allowed = self._cache().get(only).items if only else None
        places, rank = self.index.places(sid_rows, _ALL)
        item_scores = scores[rank] + _log_share(len(sid_rows), rank, self._item_logits(places, prompt))
        best = np.argsort(-item_scores, kind="stable")
        if allowed is not None:
            best = best[allowed.passes(places[best])]
        best = best[: max(limit, 0)]
        return RecallResult(self.index.rows_at(places[best]), sid_rows[rank[best]], item_scores[best].astype(np.float32))

    def _item_logits(self, places: np.ndarray, prompt: tuple[Tensor, Tensor] | None) -> np.ndarray:
        """The logits float32 [m] of items inside their SIDs. The guide's are by the trie's vectors where items are published, by their own where they came later."""
        if self.model.guidance is None or prompt is None:
            return self.index.item_logits_at(places)
        device = self.trie.device
        vector, token_ids = (part.to(device) for part in prompt)
        later = places >= self.index.num_published
        if not later.any():
            return self.model.guidance.logits_of_items(vector, token_ids, torch.from_numpy(places).to(device), self.trie).cpu().numpy()
        assert isinstance(self.index, SegmentedIndex)
        vectors, words = self.index.later_on(device)
        positions = torch.from_numpy(places[later] - self.index.num_published).to(device)
        logits = np.empty(len(places), dtype=np.float32)
        logits[~later] = self.model.guidance.logits_of_items(vector, token_ids, torch.from_numpy(places[~later]).to(device), self.trie).cpu().numpy()
        logits[later] = self.model.guidance.logits_of_later_items(vector, token_ids, positions, vectors, words).cpu().numpy()
        return logits

    def _search(self, prompts: Prompts, beam_size: int, allowed: PrefixMasks | None) -> BeamResult:
        if self.trie.device.type != "cuda":
            return beam_search(self.model, prompts, self.trie, beam_size=beam_size, support=self.support, allowed=allowed)
        if beam_size not in self._graphs:
            self._graphs[beam_size] = SearchGraphs(self.model, self.trie, beam_size=beam_size, support=self.support)
        return self._graphs[beam_size].search(prompts, allowed)

    def _masks(self, filters: Sequence[Filter | None]) -> PrefixMasks | None:
        """The masks of requests, in one row where all have the same filter; None where none has one."""
        distinct = {one or None for one in filters}
        masks = {one: self._cache().get(one).masks for one in distinct if one is not None}
        if not masks:
            return None
        if len(distinct) == 1:
            return next(iter(masks.values()))
        everything = PrefixMasks(*(torch.ones(1, width, dtype=torch.bool, device=self.trie.device) for width in self._mask_widths))
        rows = [masks[one] if one else everything for one in filters]
        return PrefixMasks(*(torch.cat(level) for level in zip(*rows, strict=True)))

    @property
    def _mask_widths(self) -> tuple[int, int, int]:
        return self.trie.alphabet_sizes[0], len(self.trie.tokens2), len(self.trie)

    def _cache(self) -> FilterCache:
        if self.filters is None:
            raise RetrieverError("filters: this retriever has none; rerun jobs/build_sid_index.py, or give Retriever a FilterCache")
        return self.filters

    def _known(self, history: np.ndarray) -> np.ndarray:
        rows = np.asarray(history, dtype=np.int64)
        return rows[(rows >= 0) & (rows < self.index.num_items)]


def _log_share(count: int, rank: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """log p(item | its SID) float32 [m]: the log-softmax of `logits` [m] inside each of `count` SIDs; `rank` [m] is each item's SID among them."""
    best = np.full(count, -np.inf, dtype=np.float32)
    np.maximum.at(best, rank, logits)
    total = np.bincount(rank, weights=np.exp(logits - best[rank]), minlength=count)
    return np.asarray(logits - best[rank] - np.log(total[rank]), dtype=np.float32)


def _check_guided_index(index: ServedIndex, trie: Trie, *, words: bool) -> None:
    assert trie.item_vectors is not None
    if len(trie.item_vectors) != index.num_published:
        raise RetrieverError(
            f"the trie holds the vectors of {len(trie.item_vectors)} items, the index {index.num_published} postings; "
            "after compaction a guided generator needs SegmentedIndex.compacted_trie"
        )
    if isinstance(index, SegmentedIndex) and len(index.later.item_sid) and (index.later.vectors is None or (words and index.later.words is None)):
        missing = "vectors" if index.later.vectors is None else "tokens"
        raise RetrieverError(f"the generator is guided: the {len(index.later.item_sid)} later items need their {missing}; give them to SegmentedIndex.added")


def _check_filters(filters: FilterCache, index: ServedIndex) -> None:
    base, other = index.base if isinstance(index, SegmentedIndex) else index, filters.postings.index
    if other is not base and not (np.array_equal(other.offsets, base.offsets) and np.array_equal(other.item_rows, base.item_rows)):
        raise RetrieverError("filters: they hold the places of another index; after compaction build theirs anew with FilterPostings.build")


def load_retriever(
    *,
    generator_folder: Path,
    stage: str | Path,
    sid_index: Path,
    encoder: Path,
    support: Support = "level",
    personalised: bool = True,
    device: str | None = None,
) -> Retriever:
    """A retriever from artifact folders.

    Args:
        generator_folder: holds `tokenizer.json` and `prompts.json`.
        stage: the name of a stage folder in it, e.g. `"stage3"`, or the path of one elsewhere (an aligned generator's `stage4`).
        sid_index, encoder: folders of those artifacts.
        support: as recorded by the stage that trained the generator.
        personalised: whether prompts hold the shopper; False for a stage-2 generator, which never saw one.
        device: default: the first CUDA device, else the CPU.

    Raises:
        RetrieverError: no such stage, or parts that do not belong together.
    """
    folder = generator_folder / stage
    if not folder.is_dir():
        raise RetrieverError(f"{folder}: no such stage; {generator_folder} holds {', '.join(sorted(p.name for p in generator_folder.iterdir() if p.is_dir()))}")
    place = device or str(default_device())
    model = pack(Decoder.from_pretrained(folder).to(place))
    builder = PromptBuilder.load(generator_folder)
    trie, index = load_trie(sid_index, place), load_index(sid_index)
    return Retriever(
        model,
        builder,
        trie,
        index,
        load_sid_table(sid_index),
        load_encoder(encoder),
        support=support,
        personalised=personalised,
        filters=FilterCache(load_filters(sid_index, index), trie) if (sid_index / "filters").is_dir() else None,
    )
