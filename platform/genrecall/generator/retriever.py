"""Requests to items: prompts, constrained beam search, expansion of the SIDs through the index. The same code evaluates and serves.

An item's score is the log-probability of its SID; inside a SID the index's order holds. With guidance (`guidance.py`) it is the item's own
log-probability: that of the SID plus that of the item among the SID's, by the encoder, so that a large cluster's best item may
come before a small one's. Nothing here trains.
Shapes: R requests, S SIDs, m items of one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genrecall.device import default_device
from genrecall.encoders.text_encoder import TextEncoder, load_encoder
from genrecall.generator.decoding import Support, beam_search
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.model import Decoder, Prompts
from genrecall.generator.packed_decoder import pack
from genrecall.sid.index import SidIndex, load_index, load_sid_table, load_trie
from genrecall.sid.semantic_id import SidTable
from genrecall.sid.trie import Trie

MAX_BATCH = 256
"""Requests decoded together; more are cut into batches of this size."""


class RetrieverError(ValueError):
    """Parts that do not belong together, or a request that cannot be answered."""


@dataclass(frozen=True)
class RecallResult:
    """The answer to one request, best first.

    Attributes:
        item_rows: int32 [m].
        sid_rows: int32 [m], the SID that each item came from.
        scores: float32 [m], natural-log probabilities, never increasing: of the item, or without guidance of its SID.
    """

    item_rows: np.ndarray
    sid_rows: np.ndarray
    scores: np.ndarray


class GeneratedSids(NamedTuple):
    """The best SIDs of R requests.

    sid_rows: int32 [R, W], best first, -1 where there are fewer valid SIDs. scores: float32 [R, W], natural-log probabilities, -inf there.
    prompts: R pairs of query vector float32 [d] and the prompt's token ids int64 [L], for `Retriever.expand`; None without query vectors.
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
        trie, index, table: of one `sid_index` artifact.
        encoder: its query vectors become soft prompts and choose the related history; None is allowed where neither is used.
        support: over what the probabilities of a level are normalised, see `decoding.beam_search`.
        personalised: whether prompts hold the shopper, unless a call says otherwise.

    Raises:
        RetrieverError: model, trie and table of different SID spaces, no encoder where prompts need one, or a guided model without its trie and support.
    """

    def __init__(
        self,
        model: Decoder,
        prompt_builder: PromptBuilder,
        trie: Trie,
        index: SidIndex,
        table: SidTable,
        encoder: TextEncoder | None,
        *,
        support: Support = "level",
        personalised: bool = True,
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
        self.model = model.eval()
        self.prompt_builder = prompt_builder
        self.trie, self.index, self.table = trie, index, table
        self.encoder = encoder
        self.support = support
        self.personalised = personalised

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
        tokens = [self.table.tokens_of_items(self._known(history)) for history in histories]
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
    ) -> GeneratedSids:
        """The best SIDs of R requests.

        Args:
            queries: any text; an empty one is answered from the shopper alone, a long one is cut.
            genders, age_bands: R values or None; a value unseen at training counts as unknown.
            histories: R arrays int32 of item rows, oldest first; rows outside the catalogue (-1) are skipped.
            beam_size: SIDs a request, at least 1.
            personalised: False leaves the shopper out of the prompt; None: as the retriever was made.

        Raises:
            RetrieverError: `beam_size` below 1 or arguments of unequal length.
        """
        count = len(queries)
        if beam_size < 1:
            raise RetrieverError(f"beam_size: expected at least 1, got {beam_size}")
        if {len(genders), len(age_bands), len(histories)} != {count}:
            raise RetrieverError(f"expected {count} genders, age bands and histories, got {len(genders)}, {len(age_bands)} and {len(histories)}")
        sid_rows = np.full((count, beam_size), -1, dtype=np.int32)
        scores = np.full((count, beam_size), -np.inf, dtype=np.float32)
        device = self.trie.device
        read: list[tuple[Tensor, Tensor]] = []
        for start in range(0, count, MAX_BATCH):
            part = slice(start, min(start + MAX_BATCH, count))
            prompts = self.prompts(queries[part], genders[part], age_bands[part], histories[part], personalised=personalised)
            found = beam_search(self.model, prompts.to(device), self.trie, beam_size=beam_size, support=self.support)
            width = found.sid_rows.shape[1]
            sid_rows[part, :width] = found.sid_rows.cpu().numpy()
            scores[part, :width] = found.scores.float().cpu().numpy()
            if prompts.soft is not None:
                read += [(vector, ids[:length]) for vector, ids, length in zip(prompts.soft, prompts.token_ids, prompts.lengths.tolist(), strict=True)]
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
    ) -> list[RecallResult]:
        """At most `limit` items for each request, from its best `beam_size` SIDs; arguments and errors as for `generate`."""
        generated = self.generate(queries, genders, age_bands, histories, beam_size=beam_size, personalised=personalised)
        return [self.expand(*generated.of(row), limit) for row in range(len(queries))]

    def expand(self, sid_rows: np.ndarray, scores: np.ndarray, prompt: tuple[Tensor, Tensor] | None, limit: int) -> RecallResult:
        """At most `limit` items of SIDs int32 [n] (best first, -1 skipped) with scores float32 [n]; `prompt` as `GeneratedSids` has it."""
        if self.model.guidance is None or prompt is None:
            item_rows, rank = self.index.expand(sid_rows, limit)
            return RecallResult(item_rows, sid_rows[rank], scores[rank])
        item_rows, rank = self.index.expand(sid_rows, np.iinfo(np.int32).max)
        item_scores = scores[rank] + self._log_share(sid_rows, rank, prompt)
        best = np.argsort(-item_scores, kind="stable")[:limit]
        return RecallResult(item_rows[best], sid_rows[rank[best]], item_scores[best].astype(np.float32))

    def _log_share(self, sid_rows: np.ndarray, rank: np.ndarray, prompt: tuple[Tensor, Tensor]) -> np.ndarray:
        """log p(item | its SID, query) float32 [m], of all items of SIDs [n] in order; `rank` [m] is each item's SID among them."""
        assert self.model.guidance is not None
        first = np.searchsorted(rank, np.arange(len(sid_rows)))  # place of each SID's first item in `rank`
        positions = self.index.offsets[np.maximum(sid_rows, 0)][rank] + (np.arange(len(rank)) - first[rank])
        vector, token_ids = (part.to(self.trie.device) for part in prompt)
        logits = self.model.guidance.logits_of_items(vector, token_ids, torch.from_numpy(positions).to(self.trie.device), self.trie).cpu().numpy()
        best = np.full(len(sid_rows), -np.inf, dtype=np.float32)
        np.maximum.at(best, rank, logits)
        total = np.bincount(rank, weights=np.exp(logits - best[rank]), minlength=len(sid_rows))
        return np.asarray(logits - best[rank] - np.log(total[rank]), dtype=np.float32)

    def _known(self, history: np.ndarray) -> np.ndarray:
        rows = np.asarray(history, dtype=np.int64)
        return rows[(rows >= 0) & (rows < len(self.table.item_sid))]


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
    return Retriever(
        model,
        builder,
        load_trie(sid_index, place),
        load_index(sid_index),
        load_sid_table(sid_index),
        load_encoder(encoder),
        support=support,
        personalised=personalised,
    )
