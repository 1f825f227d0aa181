"""Constrained beam search against Hugging Face `generate` and against a competent user of its model.

All sides run the same weights, trie, prompts and thread count in one process, one after the other within each repeat; with one thread times are the
process's processor time, which a busy machine hardly changes. Nothing is timed unless the sides that are compared give the same SIDs at the same places, scores within 1e-4.
Ratios are what counts: each is the median over repeats of the ratio within a repeat.

Sides, whose scores are normalised over the level's codes:
- ours: `beam_search` with packed weights; ours_unpacked without packing; ours_compiled with --compile.
- generate: `transformers` generate with what `prefix_allowed_tokens_fn` installs, over a dictionary of prefixes, behind a renormalisation over the level's columns.
- competent: `transformers`' model, prompt prefilled once, its cache repeated per beam and reordered, softmax and a vectorised mask over the level's columns.

Sides with other answers, for what they cost:
- ours_bfloat16 with bfloat16 products, where the CPU has them (its overlap with the exact answer is printed).
- ours_trie with scores over the children, as guided decoders have them: prefixes with a single child are not read.
- two_tower: what a dense retriever of the same backbone costs: the same prefill and an HNSW search (FAISS, M 32, efSearch 128) over as many vectors as there are SIDs.

`times_floor` is the time over the floor: the floating-point operations that the search needs (prompt once, beams, the level's head; no attention, norms or choices), at the rate of the
task's own largest matrix product. `expand_share` is SIDs -> items as they are served (`Retriever.expand`, at beam 50 some 1,700 scored and sorted items a query) over the search.

Prompts are random tokens, drawn anew where rounding could decide the answer: where two neighbouring scores of it lie within 2e-5 of one another.

Run: python benchmarks/decode.py [--quick] [--threads 2] [--repeats 7] [--compile] [--output benchmarks/results/decode.json]
A run of some beams, batches or tries replaces their records in that file and leaves the others.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import transformers
from measurement import ONE_NUMBER, clock, commit, interleaved, machine, quartiles, write_tables
from torch import Tensor

from genrecall.generator.beam_search import BeamResult, beam_search
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import has_bfloat16, pack
from genrecall.generator.prompts import Prompts
from genrecall.generator.retriever import Retriever
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.sid.index import SidIndex
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie

TOLERANCE = 1e-4
TIE = 2e-5
"""Scores of the same SID by different float32 arithmetic were at most 8e-6 apart."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One reference task; the defaults are the full one."""

    text_vocab_size: int = 8_192
    level_sizes: tuple[int, int, int] = (2_048, 1_024, 1_024)
    hidden_size: int = 256
    num_layers: int = 4
    prompt_tokens: int = 32
    num_sids: int = 100_000
    beams: tuple[int, ...] = (10, 20, 50, 100)
    batches: tuple[int, ...] = (1, 16)
    tries: tuple[str, ...] = ("uniform", "clustered")


QUICK = Task(text_vocab_size=64, level_sizes=(16, 8, 8), hidden_size=32, num_layers=2, prompt_tokens=6, num_sids=200, beams=(5,), batches=(1, 2))


@dataclass(frozen=True)
class Answer:
    """What a side returns: tokens [B, W, 3] of its beams and their scores [B, W], best first."""

    tokens: Tensor
    scores: Tensor

    @classmethod
    def of(cls, result: BeamResult) -> Answer:
        """Our own answer."""
        return cls(result.tokens, result.scores)


def sid_tokens(kind: str, task: Task, rng: np.random.Generator) -> np.ndarray:
    """SIDs int32 [S, 3], sorted: uniform over all paths, or clustered (Zipf-distributed codes, as catalogues are)."""
    sizes = np.asarray(task.level_sizes)
    found = np.zeros(0, dtype=np.int64)
    while len(found) < task.num_sids:
        if kind == "uniform":
            codes = [rng.integers(0, size, 2 * task.num_sids) for size in sizes]
        else:
            codes = [np.minimum((size * rng.random(2 * task.num_sids) ** 2).astype(np.int64), size - 1) for size in sizes]
        found = np.union1d(found, (codes[0] * sizes[1] + codes[1]) * sizes[2] + codes[2])
    keys = np.sort(rng.choice(found, task.num_sids, replace=False))
    return np.stack([keys // (sizes[1] * sizes[2]), keys // sizes[2] % sizes[1], keys % sizes[2]], axis=1).astype(np.int32)


class OverLevel(transformers.LogitsProcessor):  # type: ignore[misc]
    """Renormalises log-probabilities [B * W, V] over the level's columns, then constrains them.

    One processor for both: `generate` runs those it is given after its own constraint, which leaves nothing to normalise over.
    """

    def __init__(self, constrain: Callable[[Tensor, Tensor], Tensor], config: DecoderConfig, prompt_tokens: int) -> None:
        self.constrain, self.config, self.prompt_tokens = constrain, config, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        level = input_ids.shape[1] - self.prompt_tokens
        first = self.config.level_offsets[level]
        columns = scores[:, first : first + self.config.alphabet_sizes[level]]
        columns -= columns.logsumexp(-1, keepdim=True)  # in place, which costs `generate` least
        return self.constrain(input_ids, scores)


class Generate:
    """`generate` with the processor that `prefix_allowed_tokens_fn` installs, called with the function of its documentation, and scores over the level."""

    def __init__(self, model: Any, tokens: np.ndarray, config: DecoderConfig, prompt_tokens: int) -> None:
        self.model, self.config, self.prompt_tokens = model, config, prompt_tokens
        self.children: dict[tuple[int, ...], list[int]] = {}
        for path in (tokens + np.asarray(config.level_offsets)).tolist():
            for level in range(3):
                following = self.children.setdefault(tuple(path[:level]), [])
                if not following or following[-1] != path[level]:
                    following.append(path[level])

    def __call__(self, ids: Tensor, beam_size: int) -> Answer:
        def allowed(_: int, sequence: Tensor) -> list[int]:
            # A beam that never had a valid prefix carries -inf; any token will do for it.
            return self.children.get(tuple(sequence[self.prompt_tokens :].tolist()), [0])

        constrain = transformers.PrefixConstrainedLogitsProcessor(allowed, beam_size)
        generated = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beam_size,
            num_return_sequences=beam_size,
            max_new_tokens=3,
            do_sample=False,
            length_penalty=0.0,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[OverLevel(constrain, self.config, self.prompt_tokens)],
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers = generated.sequences[:, self.prompt_tokens :].view(len(ids), beam_size, 3) - torch.tensor(self.config.level_offsets)
        return Answer(answers, generated.sequences_scores.view(len(ids), beam_size))


class CompetentUser:
    """Somebody who writes the loop: prefill once, repeat the cache, mask with tensors, look only at the level's columns."""

    def __init__(self, model: Any, trie: Trie, config: DecoderConfig) -> None:
        self.model, self.trie, self.offsets, self.sizes = model, trie, config.level_offsets, config.alphabet_sizes

    @torch.inference_mode()
    def __call__(self, ids: Tensor, beam_size: int) -> Answer:
        trie, batch = self.trie, len(ids)
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        log_probs = self._level(out.logits[:, -1], 0).masked_fill(~trie.level1_valid, -torch.inf)
        scores, token1 = log_probs.topk(beam_size)
        out.past_key_values.batch_repeat_interleave(beam_size)

        out = self.model((token1 + self.offsets[0]).view(-1, 1), past_key_values=out.past_key_values, use_cache=True)
        mask = self._mask(trie.offsets2, trie.tokens2, token1, trie.max_children2, 1)
        scores, parent, token2 = self._step(scores, self._level(out.logits[:, -1], 1), mask)
        rows = (parent + torch.arange(batch)[:, None] * beam_size).view(-1)
        out.past_key_values.reorder_cache(rows)
        token1 = token1.gather(1, parent)

        out = self.model((token2 + self.offsets[1]).view(-1, 1), past_key_values=out.past_key_values, use_cache=True)
        node = trie.find_node(token1, token2).clamp(min=0)
        mask = self._mask(trie.offsets3, trie.tokens3, node, trie.max_children3, 2)
        scores, parent, token3 = self._step(scores, self._level(out.logits[:, -1], 2), mask)
        return Answer(torch.stack((token1.gather(1, parent), token2.gather(1, parent), token3), dim=-1), scores)

    def _level(self, logits: Tensor, level: int) -> Tensor:
        return logits[:, self.offsets[level] : self.offsets[level] + self.sizes[level]].float().log_softmax(-1)

    def _mask(self, offsets: Tensor, tokens: Tensor, parents: Tensor, most: int, level: int) -> Tensor:
        first, end = offsets[parents].long(), offsets[parents + 1].long()
        children = first[..., None] + torch.arange(most)
        columns = torch.where(children < end[..., None], tokens[children.clamp(max=len(tokens) - 1)].long(), self.sizes[level])
        mask = torch.zeros((*parents.shape, self.sizes[level] + 1), dtype=torch.bool).scatter_(-1, columns, True)
        return mask[..., :-1]

    @staticmethod
    def _step(scores: Tensor, log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, beam_size = scores.shape
        totals = (scores[..., None] + log_probs.view(batch, beam_size, -1)).masked_fill(~mask, -torch.inf).flatten(1)
        best, position = totals.topk(beam_size)
        return best, position // mask.shape[-1], position % mask.shape[-1]


def require_equal(name: str, answer: Answer, reference: Answer, tolerance: float = TOLERANCE) -> None:
    """Exit unless the SIDs are the same place by place, and their scores to the tolerance."""
    if not torch.allclose(answer.scores, reference.scores, atol=tolerance, rtol=0):
        raise SystemExit(f"{name}: scores differ by {float((answer.scores - reference.scores).abs().max()):.2e}; not comparing the speed of unequal answers")
    if not torch.equal(answer.tokens, reference.tokens):
        places = int((answer.tokens != reference.tokens).any(-1).sum())
        raise SystemExit(f"{name}: answers differ at {places} places; not comparing the speed of unequal answers")


def has_tie(scores: Tensor, margin: float = TIE) -> Tensor:
    """bool [B]: whether two neighbours of scores [B, W], best first, are nearer than the margin."""
    return (scores[:, :-1] - scores[:, 1:] < margin).any(dim=1)


def settled_prompts(model: Decoder, trie: Trie, task: Task, batch: int, rng: np.random.Generator) -> Tensor:
    """Random prompt tokens int64 [B, L] whose answers do not hang on rounding: rows with a tie in an answer of the unpacked decoder are drawn anew, until there is none.

    A beam more is searched too, which shows what the last place is nearly tied with.
    """
    ids = torch.from_numpy(rng.integers(0, task.text_vocab_size, (batch, task.prompt_tokens)))
    lengths = torch.full((batch,), task.prompt_tokens)
    for _ in range(100):
        found = [beam_search(model, Prompts(ids, lengths), trie, beam_size=beam + more).scores for beam in task.beams for more in (0, 1)]
        tied = torch.stack([has_tie(scores) for scores in found]).any(dim=0)
        if not bool(tied.any()):
            return ids
        ids[tied] = torch.from_numpy(rng.integers(0, task.text_vocab_size, (int(tied.sum()), task.prompt_tokens)))
    raise SystemExit(f"prompts: after 100 draws {int(tied.sum())} of {batch} still have ties within {TIE}; not comparing answers that rounding decides")


def retriever_of(model: Decoder, trie: Trie, index: SidIndex, tokens: np.ndarray) -> Retriever:
    """What serves these SIDs int32 [S, 3]; for `expand`: its prompts are those of a tokenizer that knows one word."""
    config = model.config
    builder = PromptBuilder(QueryTokenizer.train(["word"] * 3, 300), config.level_offsets, soft_prompt=False)
    table = SidTable(SidSpace(config.level_sizes), tokens, index.item_sid)
    return Retriever(model, builder, trie, index, table, None, personalised=False)


class TwoTower:
    """A dense retriever with the same backbone: the prompt's last hidden state, then HNSW over one vector per SID."""

    def __init__(self, model: Decoder, count: int, rng: np.random.Generator) -> None:
        self.model = model
        self.index = faiss.IndexHNSWFlat(model.config.hidden_size, 32, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = 40
        self.index.hnsw.efSearch = 128
        vectors = rng.standard_normal((count, model.config.hidden_size)).astype(np.float32)
        self.index.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    @torch.inference_mode()
    def __call__(self, prompts: Prompts, count: int) -> np.ndarray:
        vectors = torch.nn.functional.normalize(self.model.prefill(prompts).last_hidden, dim=1)
        return self.index.search(vectors.numpy(), count)[1]


def needed_operations(config: DecoderConfig, prompt_tokens: int, batch: int, beam: int) -> float:
    """Floating-point operations of the products that a beam search needs."""
    heads = config.num_heads + 2 * config.num_kv_heads
    key_value = 2 * config.num_kv_heads * config.head_size * config.hidden_size
    layer = (
        heads * config.head_size * config.hidden_size
        + config.num_heads * config.head_size * config.hidden_size
        + 3 * config.hidden_size * config.intermediate_size
    )
    # Of the top layer the prompt needs keys and values, and the last token everything else.
    prompt = prompt_tokens * ((config.num_layers - 1) * layer + key_value) + layer - key_value
    beams = 2 * beam * config.num_layers * layer
    level1, level2, level3 = config.alphabet_sizes
    return 2.0 * batch * (prompt + beams + config.hidden_size * (level1 + beam * (level2 + level3)))


def product_rate(config: DecoderConfig, rows: int) -> float:
    """Floating-point operations a second of the task's largest matrix product, the best of some runs."""
    x, weight = torch.randn(rows, config.hidden_size), torch.randn(2 * config.intermediate_size, config.hidden_size)
    with torch.inference_mode():
        best = min(clock()(lambda: torch.nn.functional.linear(x, weight)) for _ in range(20))
    return 2.0 * rows * weight.numel() / best


def measure(task: Task, repeats: int, record: Callable[..., None], *, compiled: bool = False) -> None:
    """Time all sides over the task's grid and hand each figure to `record`."""
    rng = np.random.default_rng(0)
    config = DecoderConfig(
        text_vocab_size=task.text_vocab_size,
        level_sizes=task.level_sizes,
        hidden_size=task.hidden_size,
        num_layers=task.num_layers,
        intermediate_size=4 * task.hidden_size,
        max_positions=task.prompt_tokens + 8,
    )
    model = Decoder(config, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    two_tower = TwoTower(pack(model), task.num_sids, rng)
    for kind in task.tries:
        tokens = sid_tokens(kind, task, rng)
        trie = Trie.from_tokens(tokens, config.alphabet_sizes)
        generate = Generate(theirs, tokens, config, task.prompt_tokens)
        competent = CompetentUser(theirs, trie, config)
        owners = rng.integers(0, len(trie), 34 * len(trie)).astype(np.int32)  # 50 SIDs hold some 1,700 items
        index = SidIndex.build(owners, len(trie), rng.random(len(owners)), feedback=rng.integers(0, 20, len(owners)))
        retriever = retriever_of(pack(model), trie, index, tokens)
        for batch in task.batches:
            ids = settled_prompts(model, trie, task, batch, rng)
            prompts = Prompts(ids, torch.full((batch,), task.prompt_tokens))
            for beam in task.beams:
                others = {"competent": partial(competent, ids, beam), "generate": partial(generate, ids, beam)}
                tower = {"two_tower": partial(two_tower, prompts, beam)}
                compare(model, prompts, retriever, others, tower, kind=kind, beam=beam, repeats=repeats, record=record, compiled=compiled)


def compare(
    model: Decoder,
    prompts: Prompts,
    retriever: Retriever,
    others: dict[str, Callable[[], Answer]],
    tower: dict[str, Callable[[], Any]],
    *,
    kind: str,
    beam: int,
    repeats: int,
    record: Callable[..., None],
    compiled: bool = False,
) -> None:
    """Check that all sides answer alike, then time them in turn."""
    packed, trie = retriever.model, retriever.trie
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: beam_search(packed, prompts, trie, beam_size=beam),
        "ours_unpacked": lambda: beam_search(model, prompts, trie, beam_size=beam),
        "ours_trie": lambda: beam_search(packed, prompts, trie, beam_size=beam, support="trie"),
    }
    if has_bfloat16():
        rough = pack(model, torch.bfloat16)
        sides["ours_bfloat16"] = lambda: beam_search(rough, prompts, trie, beam_size=beam)
    exact = beam_search(model, prompts, trie, beam_size=beam)
    if compiled:
        sides["ours_compiled"] = compiled_search(model, prompts, trie, beam)
        require_equal("ours_compiled", Answer.of(sides["ours_compiled"]()), Answer.of(exact))
    found = sides["ours"]()
    require_equal("ours", Answer.of(found), Answer.of(exact))
    for name, side in others.items():
        require_equal(f"{name}, {kind} trie, batch {len(prompts)}, beam {beam}", side(), Answer.of(found))
    rows, scores = found.sid_rows.numpy(), found.scores.numpy()
    sides |= tower | {"expand": lambda: [retriever.expand(*one, None, 2_000) for one in zip(rows, scores, strict=True)]}
    for side in sides.values():
        side()
    times = interleaved(sides | others, repeats)
    rates = [product_rate(model.config, len(prompts) * beam) for _ in range(repeats)]
    where = {"batch": len(prompts), "beam": beam}
    for name, values in times.items():
        record(kind, f"{name}_ms", [1e3 * value for value in values], **where)
    operations = needed_operations(model.config, prompts.token_ids.shape[1], len(prompts), beam)
    record(kind, "times_floor", [taken * rate / operations for taken, rate in zip(times["ours"], rates, strict=True)], **where)
    if "ours_bfloat16" in sides:
        both = (rows[:, :, None] == sides["ours_bfloat16"]().sid_rows.numpy()[:, None, :]).any(-1)
        record(kind, "bfloat16_overlap", [float(both.mean())], **where)
    ratios = [
        ("speedup_vs_hf", "generate", "ours"),
        ("speedup_vs_competent_hf", "competent", "ours"),
        ("speedup_of_packing", "ours_unpacked", "ours"),
        ("speedup_of_trie_support", "ours", "ours_trie"),
        ("cost_vs_two_tower", "ours", "two_tower"),
        ("expand_share", "expand", "ours"),
    ]
    if "ours_bfloat16" in sides:
        ratios.append(("speedup_of_bfloat16", "ours", "ours_bfloat16"))
    if compiled:
        ratios += [("speedup_vs_hf_compiled", "generate", "ours_compiled"), ("speedup_vs_competent_hf_compiled", "competent", "ours_compiled")]
    for metric, above, below in ratios:
        record(kind, metric, [one / other for one, other in zip(times[above], times[below], strict=True)], **where)


def compiled_search(model: Decoder, prompts: Prompts, trie: Trie, beam: int) -> Callable[[], Any]:
    """The whole search as one compiled graph of fixed shapes (a minute and a half to compile)."""

    def search(token_ids: Tensor, lengths: Tensor) -> Any:
        return beam_search.__wrapped__(model, Prompts(token_ids, lengths), trie, beam_size=beam)

    graph = torch.compile(search, fullgraph=True, dynamic=False)

    def run() -> Any:
        with torch.no_grad():
            return graph(prompts.token_ids, prompts.lengths)

    return run


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny task, for correctness only; writes no file unless --output is given")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--beams", type=int, nargs="+", help="beams to measure instead of 10 20 50 100")
    parser.add_argument("--tries", nargs="+", choices=("uniform", "clustered"))
    parser.add_argument("--batches", type=int, nargs="+", help="batches to measure instead of 1 16")
    parser.add_argument("--compile", action="store_true", help="also time the search compiled as one graph; minutes of compilation for each cell")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    task = QUICK if options.quick else Task()
    changes = {name: tuple(getattr(options, name)) for name in ("beams", "batches", "tries") if getattr(options, name)}
    task = Task(**{**task.__dict__, **changes})
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    common = {
        "threads": options.threads,
        "machine": machine(transformers),
        "command": " ".join(["python", "benchmarks/decode.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": commit(),
    }
    print(f"{common['machine']}, {options.threads} threads, medians of {1 if options.quick else options.repeats} (quartiles)")
    records: list[dict[str, Any]] = []

    def record(row: str, metric: str, values: list[float], *, batch: int, beam: int) -> None:
        low, middle, high = quartiles(values)
        records.append({"table": "decode", "row": row, "metric": metric, "value": middle, "low": low, "high": high, "batch": batch, "beam": beam, **common})
        print(f"{row:10} batch {batch:3} beam {beam:4} {metric:38} {middle:10.2f} ({low:.2f} to {high:.2f})", flush=True)

    try:
        measure(task, 1 if options.quick else options.repeats, record, compiled=options.compile)
    finally:
        torch.set_num_threads(before)
    output = options.output or (None if options.quick else Path(__file__).parent / "results" / "decode.json")
    if output:
        write_tables(output, records, by=ONE_NUMBER)
    return records


if __name__ == "__main__":
    main()
