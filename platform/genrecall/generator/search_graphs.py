"""Beam searches of few shapes, each recorded once as a CUDA graph and replayed: a search is then one launch, whatever the model's depth.

Requests come in any number and length; they are padded up to the next of a few batch sizes and prompt widths, which changes no answer (a
row's padding is masked, and rows do not see each other). Where there is no GPU the padded search runs as it is, so that what a GPU
would record is what tests compare. A search that cannot be recorded runs without a graph, and a warning says so once.

Shapes: B prompts, L prompt tokens, W beams.
"""

from __future__ import annotations

import bisect
import logging
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from genrecall.generator.beam_search import BeamResult, beam_search
from genrecall.generator.model import Decoder
from genrecall.generator.prefix_masks import PrefixMasks
from genrecall.generator.prompts import Prompts
from genrecall.generator.support import Support
from genrecall.sid.trie import Trie

logger = logging.getLogger(__name__)

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTH_STEP = 16
_WARM_UPS = 3


@dataclass
class _Recorded:
    """A recorded search: its inputs and outputs stay where they are, replaying rewrites the outputs."""

    graph: torch.cuda.CUDAGraph
    prompts: Prompts
    result: BeamResult


class SearchGraphs:
    """`beam_search` of one model, trie and beam.

    Args:
        model, trie: on one device; neither may change afterwards.
        beam_size, support: as for `beam_search`.
        max_width: prompts wider than this many tokens are searched without padding or graph.
    """

    def __init__(self, model: Decoder, trie: Trie, *, beam_size: int, support: Support, max_width: int = 512) -> None:
        self._model, self._trie, self._beam_size, self._support = model, trie, beam_size, support
        room = model.config.max_positions - 2 - (model.config.soft_prompt_tokens if model.config.soft_prompt_dim else 0)
        self._max_width = min(max_width, room)
        self._recorded: dict[tuple[int, int, bool], _Recorded | None] = {}
        self._lock = threading.Lock()

    def search(self, prompts: Prompts, allowed: PrefixMasks | None = None) -> BeamResult:
        """The best SIDs of each prompt, as `beam_search` gives them; a filtered search is not recorded."""
        batch, width = prompts.token_ids.shape
        if batch > BATCHES[-1] or width > self._max_width:
            return self._plain(prompts, allowed)
        padded = _pad(prompts, BATCHES[bisect.bisect_left(BATCHES, batch)], min(-(-width // WIDTH_STEP) * WIDTH_STEP, self._max_width))
        if allowed is not None:
            return _head(self._plain(padded, _pad_masks(allowed, len(padded))), batch)
        if prompts.token_ids.device.type != "cuda":
            return _head(self._plain(padded, None), batch)
        with self._lock:
            return self._replay(padded, batch)

    def _plain(self, prompts: Prompts, allowed: PrefixMasks | None) -> BeamResult:
        return beam_search(self._model, prompts, self._trie, beam_size=self._beam_size, support=self._support, allowed=allowed)

    def _replay(self, prompts: Prompts, batch: int) -> BeamResult:
        shape = (*prompts.token_ids.shape, prompts.soft is not None)
        if shape not in self._recorded:
            self._recorded[shape] = self._record(prompts)
        recorded = self._recorded[shape]
        if recorded is None:
            return _head(self._plain(prompts, None), batch)
        recorded.prompts.token_ids.copy_(prompts.token_ids)
        recorded.prompts.lengths.copy_(prompts.lengths)
        if prompts.soft is not None and recorded.prompts.soft is not None:
            recorded.prompts.soft.copy_(prompts.soft)
        recorded.graph.replay()
        head = _head(recorded.result, batch)
        vectors = head.query_vectors
        return BeamResult(head.sid_rows.clone(), head.tokens.clone(), head.scores.clone(), None if vectors is None else vectors.clone())

    def _record(self, prompts: Prompts) -> _Recorded | None:
        kept = Prompts(prompts.token_ids.clone(), prompts.lengths.clone(), None if prompts.soft is None else prompts.soft.clone())
        try:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # allocations and lazy set-up happen before the recording
                for _ in range(_WARM_UPS):
                    self._plain(kept, None)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self._plain(kept, None)
        except RuntimeError as error:
            logger.warning("search: shape %s cannot be recorded as a CUDA graph and runs without: %s", list(kept.token_ids.shape), error)
            return None
        return _Recorded(graph, kept, result)


def _pad(prompts: Prompts, batch: int, width: int) -> Prompts:
    """Prompts [batch, width]: more padding on the right, and the first prompt again for rows that are missing."""
    more = batch - len(prompts)
    token_ids = torch.nn.functional.pad(prompts.token_ids, (0, width - prompts.token_ids.shape[1]))
    parts = [token_ids, prompts.lengths, prompts.soft]
    repeated = [None if part is None else torch.cat((part, part[:1].expand(more, *part.shape[1:]))) for part in parts]
    assert repeated[0] is not None
    assert repeated[1] is not None
    return Prompts(repeated[0], repeated[1], repeated[2])


def _pad_masks(allowed: PrefixMasks, batch: int) -> PrefixMasks:
    def pad(mask: Tensor) -> Tensor:
        return mask if len(mask) == 1 else torch.cat((mask, mask[:1].expand(batch - len(mask), -1)))

    return PrefixMasks(*(pad(mask) for mask in allowed))


def _head(result: BeamResult, batch: int) -> BeamResult:
    vectors = result.query_vectors
    return BeamResult(result.sid_rows[:batch], result.tokens[:batch], result.scores[:batch], None if vectors is None else vectors[:batch])
