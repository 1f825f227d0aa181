"""The examples of the three supervised stages, from catalogue, training requests and SIDs, and the requests that validate them.

Source: CQ-SID (arXiv:2605.14434): stage 1 title -> SID, stage 2 query -> SIDs of its clicked items, stage 3 with the shopper.
Deviations, all to make few logged queries go further: stage 1 also gets corrupted titles and short texts in query form, stage 2
goes on seeing stage 1's examples and gets misspelt queries, stage 3 goes on seeing stage 2's.

Every text is encoded and tokenised once; batches only index. Shapes: N items, S SIDs, R requests, U distinct texts, d encoder dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests, known_at_split, query_item_pairs
from genrecall.encoders.text_encoder import TextEncoder
from genrecall.generator.beam_search import beam_search
from genrecall.generator.corruption import corrupt, short_text
from genrecall.generator.examples import ExampleSet, PromptBank, PromptBuilder, aggregate_targets, level1_centroids
from genrecall.generator.generator_config import GeneratorConfig
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.spelling import SpellingCorrector
from genrecall.generator.support import Support
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.sid.semantic_id import SidTable
from genrecall.sid.trie import Trie

_MAX_VARIANTS = 16
"""Texts made for an item, at most, of each kind."""
_REQUEST_COPIES = 4
"""Versions of each request that stage 3 draws from, the original included."""
_CLICK_KEPT = 0.7
"""Probability that a past click stays in the history of a copied request."""
_QUERY_COPIES = 4
"""Misspelt copies of each query."""
_ENCODE_BATCH = 16_384
_VALIDATION_BATCH = 128
_BEAM = 100


class NothingToLearnError(ValueError):
    """A training split without a clicked item."""


def make_prompt_builder(
    config: GeneratorConfig,
    tokenizer: QueryTokenizer,
    level_offsets: Sequence[int],
    table: SidTable,
    item_vectors: np.ndarray,
    known: np.ndarray,
    spelling: SpellingCorrector | None = None,
) -> PromptBuilder:
    """The prompt builder of a config.

    Args:
        item_vectors: float [N, d], the encoder's, for the related part of histories.
        known: bool [N], items known at the split; the others have no part in it.
        spelling: corrects queries.
    """
    level1 = table.tokens[table.item_sid[known], 0]
    return PromptBuilder(
        tokenizer,
        level_offsets,
        max_query_tokens=config.max_query_tokens,
        max_title_tokens=config.max_title_tokens,
        max_history=config.max_history,
        soft_prompt=config.soft_prompt,
        related_codes=config.related_codes,
        level1_centroids=level1_centroids(item_vectors[known], level1, table.space.level_sizes[0]),
        spelling=spelling,
    )


@dataclass(frozen=True)
class TrainingData:
    """Everything that the loop draws from.

    Attributes:
        stages: the example sets of stages 1 to 3; stage 3 is None where no training request has a profile or a history.
        vectors: float16 [U, d] encoder vectors of the distinct texts.
        sid_tokens: int64 [S, 3].
    """

    stages: tuple[ExampleSet, ExampleSet, ExampleSet | None]
    vectors: np.ndarray
    sid_tokens: np.ndarray


class _Texts:
    """Distinct texts in order of arrival; each is encoded once."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._rows.setdefault(text, len(self._rows)) for text in texts], dtype=np.int32)

    def encoded(self, encoder: TextEncoder) -> np.ndarray:
        texts = list(self._rows)
        vectors = np.empty((len(texts), encoder.dim), dtype=np.float16)
        for start in range(0, len(texts), _ENCODE_BATCH):
            vectors[start : start + _ENCODE_BATCH] = encoder.encode_queries(texts[start : start + _ENCODE_BATCH])
        return vectors


def build_training_data(
    config: GeneratorConfig, catalog: Catalog, requests: Requests, table: SidTable, builder: PromptBuilder, encoder: TextEncoder
) -> TrainingData:
    """Pre-tokenise the examples of the three stages; the same inputs give the same examples.

    Raises:
        NothingToLearnError: no training request has a clicked item.
    """
    texts = _Texts()
    items = _item_examples(config, catalog, requests, table, builder, texts)
    pair_request, pair_item, pair_weight = query_item_pairs(requests)
    if not len(pair_request):
        raise NothingToLearnError("training requests: none has a clicked or purchased item, so there is no query to learn from; check prepare_data's report")
    pair_sid = table.item_sid[pair_item]
    queries = _query_examples(config, requests, pair_request, pair_sid, pair_weight, builder, texts)
    stage2 = ExampleSet.mixed([(queries, 1 - config.stage2_item_fraction), (items, config.stage2_item_fraction)])

    context = [
        bool(len(history)) or gender is not None or age is not None
        for history, gender, age in zip(requests.history, requests.genders, requests.age_bands, strict=True)
    ]
    if not any(context):
        return TrainingData((items, stage2, None), texts.encoded(encoder), table.tokens.astype(np.int64))
    clicked = np.unique(pair_request)
    copies = _request_copies(config, requests.take(clicked))
    random = np.random.default_rng((config.seed, 14))
    copy_rows = [texts.rows([_half_seen(config, query, random) for query in copy.queries]) for copy in copies]
    vectors = texts.encoded(encoder)
    offsets, sids, weights = aggregate_targets(np.searchsorted(clicked, pair_request), pair_sid, pair_weight, len(clicked))
    sets = [
        (ExampleSet(request_bank(builder, copy, table, vectors[rows]), rows, offsets, sids, weights, np.ones(len(clicked))), 1 / len(copies))
        for copy, rows in zip(copies, copy_rows, strict=True)
    ]
    stage3 = ExampleSet.mixed([(ExampleSet.mixed(sets), 1 - config.stage3_query_fraction), (stage2, config.stage3_query_fraction)])
    return TrainingData((items, stage2, stage3), vectors, table.tokens.astype(np.int64))


def request_bank(builder: PromptBuilder, requests: Requests, table: SidTable, vectors: np.ndarray) -> PromptBank:
    """Prompts of R requests; `vectors` float [R, d] are their query vectors."""
    flat = np.concatenate([*requests.history, np.zeros(0, np.int32)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in requests.history])]).astype(np.int64)
    related = builder.related_level1(vectors)
    return builder.request_bank(requests.queries, requests.genders, requests.age_bands, table.tokens_of_items(flat), offsets, related)


def _item_examples(config: GeneratorConfig, catalog: Catalog, requests: Requests, table: SidTable, builder: PromptBuilder, texts: _Texts) -> ExampleSet:
    """Titles, corrupted titles and short texts, each with its item's SID."""
    random = np.random.default_rng((config.seed, 11))
    draws = config.stage1.steps * config.stage1.batch_size + config.stage2.steps * config.stage2.batch_size * config.stage2_item_fraction
    rows = np.flatnonzero(known_at_split(catalog, requests))

    def made(share: float, make: Callable[[int], str], bank_of: Callable[[Sequence[str]], PromptBank]) -> ExampleSet:
        variants = int(np.clip(round(draws * share / len(rows)), 1, _MAX_VARIANTS)) if share > 0 else 0
        owners = np.tile(rows, variants)
        variants_of_items = [make(int(row)) for row in owners]
        return _single_target(bank_of(variants_of_items), texts.rows(variants_of_items), table.item_sid[owners])

    title_share = (1 - config.short_text_share) / 2
    known_titles = [catalog.titles[row] for row in rows]
    titles = _single_target(builder.item_bank(known_titles), texts.rows(known_titles), table.item_sid[rows])
    corrupted = made(title_share, lambda row: corrupt(catalog.titles[row], random), builder.item_bank)
    short = made(
        config.short_text_share, lambda row: short_text(catalog.titles[row], catalog.brands[row], catalog.category_paths[row], random), builder.query_bank
    )
    return ExampleSet.mixed([(titles, title_share), (corrupted, title_share), (short, config.short_text_share)])


def _query_examples(
    config: GeneratorConfig, requests: Requests, pair_request: np.ndarray, pair_sid: np.ndarray, pair_weight: np.ndarray, builder: PromptBuilder, texts: _Texts
) -> ExampleSet:
    """Each distinct training query with all SIDs clicked for it, and misspelt copies of it with the same targets."""
    random = np.random.default_rng((config.seed, 12))
    clicked = np.unique(pair_request)
    spelling: dict[str, int] = {}  # queries that differ in case or spacing only are one
    query_of_request = np.full(len(requests), -1, dtype=np.int64)
    query_of_request[clicked] = [spelling.setdefault(" ".join(requests.queries[row].lower().split()), len(spelling)) for row in clicked]
    queries = list(spelling)
    offsets, sids, weights = aggregate_targets(query_of_request[pair_request], pair_sid, pair_weight, len(queries))
    draw = np.bincount(query_of_request[clicked], minlength=len(queries)).astype(np.float64) ** config.query_frequency_power
    copies = np.tile(np.arange(len(queries)), _QUERY_COPIES)
    seen = [_half_seen(config, queries[row], random) for row in copies]
    no_vectors_yet = np.zeros(len(queries), dtype=np.int32)
    plain = replace(ExampleSet(builder.query_bank(queries), no_vectors_yet, offsets, sids, weights, draw).take(copies), vector_rows=texts.rows(seen))
    if not config.corrupted_query_fraction:
        return plain
    slips = [corrupt(queries[row], random, drop=0.1, misspelling_rate=0.3) for row in copies]
    vectors = texts.rows([_half_seen(config, slip, random) for slip in slips])
    slipped = replace(plain, bank=builder.query_bank(slips), vector_rows=vectors)
    return ExampleSet.mixed([(plain, 1 - config.corrupted_query_fraction), (slipped, config.corrupted_query_fraction)])


def _half_seen(config: GeneratorConfig, query: str, random: np.random.Generator) -> str:
    """The text whose vector stands beside a training query: the query with words missing and misspelt.

    The encoder was trained on these very queries, so that their own vectors would lie far nearer to the clicked items than those of any
    query to come; a decoder guided by them learns nothing but to trust them.
    """
    if not (config.query_vector_drop and config.soft_prompt):
        return query
    return corrupt(query, random, drop=config.query_vector_drop, misspelling_rate=config.query_vector_drop)


def _request_copies(config: GeneratorConfig, requests: Requests) -> list[Requests]:
    """The requests as they were, then copies with some past clicks forgotten and some queries misspelt.

    Without the copies a small log is learned by heart: histories tell shoppers apart.
    """
    random = np.random.default_rng((config.seed, 13))
    copies = [requests]
    for _ in range(_REQUEST_COPIES - 1):
        slips = random.random(len(requests)) < config.corrupted_query_fraction
        queries = [corrupt(query, random, drop=0.1, misspelling_rate=0.3) if slip else query for query, slip in zip(requests.queries, slips, strict=True)]
        copies.append(replace(requests, queries=queries, history=[history[random.random(len(history)) < _CLICK_KEPT] for history in requests.history]))
    return copies


def _single_target(bank: PromptBank, vector_rows: np.ndarray, sids: np.ndarray) -> ExampleSet:
    count = len(bank)
    return ExampleSet(bank, vector_rows, np.arange(count + 1, dtype=np.int64), np.asarray(sids, dtype=np.int32), np.ones(count), np.ones(count))


@dataclass(frozen=True)
class Validation:
    """Validation requests as prompts, with and without the shopper, and the SIDs clicked for each."""

    requests: Requests
    query_bank: PromptBank
    request_bank: PromptBank
    vectors: np.ndarray
    target_offsets: np.ndarray
    target_sids: np.ndarray

    @classmethod
    def build(cls, builder: PromptBuilder, requests: Requests, limit: int, table: SidTable, encoder: TextEncoder) -> Validation | None:
        """At most `limit` clicked requests, spread evenly over the split; None where there is none."""
        pair_request, pair_item, pair_weight = query_item_pairs(requests)
        clicked = np.unique(pair_request)
        if not len(clicked) or not limit:
            return None
        kept = clicked[np.unique(np.linspace(0, len(clicked) - 1, min(limit, len(clicked))).astype(np.int64))]
        chosen = np.isin(pair_request, kept)
        offsets, sids, _ = aggregate_targets(np.searchsorted(kept, pair_request[chosen]), table.item_sid[pair_item[chosen]], pair_weight[chosen], len(kept))
        queries = [requests.queries[row] for row in kept]
        vectors = encoder.encode_queries(queries)
        return cls(requests.take(kept), builder.query_bank(queries), request_bank(builder, requests.take(kept), table, vectors), vectors, offsets, sids)

    @torch.no_grad()
    def measure(self, model: Decoder, builder: PromptBuilder, trie: Trie, *, personalised: bool, support: Support) -> dict[str, float]:
        """Means over requests: -log p of a clicked SID (the mean over those of the request), and their share among the best 1, 10 and 100 (at SID level)."""
        bank = self.request_bank if personalised else self.query_bank
        device = trie.device
        totals = dict.fromkeys(("loss", "hit@1", "hit@10", "hit@100"), 0.0)
        for start in range(0, len(bank), _VALIDATION_BATCH):
            rows = np.arange(start, min(start + _VALIDATION_BATCH, len(bank)))
            prompts = builder.prompts(bank, rows, self.vectors[rows] if builder.soft_prompt else None).to(device)
            found = beam_search(model, prompts, trie, beam_size=_BEAM, support=support).sid_rows.cpu().numpy()
            counts = np.diff(self.target_offsets)[rows]
            places = np.minimum(np.arange(counts.max()), counts[:, None] - 1)  # behind a request's own SIDs its last one again
            clicked = trie.tokens_of(torch.from_numpy(self.target_sids[self.target_offsets[rows][:, None] + places]).long().to(device))
            log_probs = group_log_probs(model, prompts, clicked, support=support, trie=trie).sum(dim=-1).cpu().numpy()
            for row, sids, own, count in zip(rows, found, log_probs, counts, strict=True):
                totals["loss"] -= float(own[:count].mean())
                targets = self.target_sids[self.target_offsets[row] : self.target_offsets[row + 1]]
                for beam in (1, 10, 100):
                    totals[f"hit@{beam}"] += float(np.isin(targets, sids[:beam]).mean())
        return {name: value / len(bank) for name, value in totals.items()}
