"""Constrained beam search against Hugging Face `generate` and against a competent user of its model.

All sides run the same weights, trie, prompts and thread count in one process, one after the other within each repeat; with one thread times are the
process's processor time, which a busy machine hardly changes. A side whose answers differ is not timed. Ratios are what counts: each is the median over repeats of the ratio within a repeat.

Sides:
- ours: `beam_search` with packed weights, scores over the level (the default) or over the whole vocabulary ("full", the arithmetic the others do);
  ours_unpacked without packing; ours_bfloat16 with bfloat16 products, where the CPU has them (its overlap with the exact answer is printed);
  ours_trie with scores over the children, as guided decoders have them: prefixes with a single child are not read; ours_compiled with --compile.
- generate: `transformers` generate with `prefix_allowed_tokens_fn` over a dictionary of prefixes.
- competent: `transformers`' model, prompt prefilled once, its cache repeated per beam and reordered, a vectorised mask over the level's
  columns; log-probabilities over the whole vocabulary, which is what its head gives.
- two_tower: what a dense retriever of the same backbone costs: the same prefill and an HNSW search (FAISS, M 32, efSearch 128) over as many vectors as there are SIDs.

`times_floor` is the time over the floor: the floating-point operations that the search needs (prompt once, beams, the level's head; no attention, norms or choices), at the rate of the
task's own largest matrix product. `expand_share` is SID -> items (some 1,700 items a query) over the whole request.

Run: python benchmarks/decode.py [--quick] [--threads 2] [--repeats 7] [--compile] [--output benchmarks/results/decode.json]
"""

from __future__ import annotations

import argparse
import json
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
from measurement import clock, commit, interleaved, machine, quartiles
from torch import Tensor

from genrecall.generator.beam_search import beam_search
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import has_bfloat16, pack
from genrecall.generator.prompts import Prompts
from genrecall.sid.index import SidIndex
from genrecall.sid.trie import Trie

TOLERANCE = 1e-4


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


class Generate:
    """`generate` with `prefix_allowed_tokens_fn`, as its documentation shows it."""

    def __init__(self, model: Any, tokens: np.ndarray, offsets: Sequence[int], prompt_tokens: int) -> None:
        self.model, self.offsets, self.prompt_tokens = model, torch.tensor(offsets), prompt_tokens
        self.children: dict[tuple[int, ...], list[int]] = {}
        for path in (tokens + np.asarray(offsets)).tolist():
            for level in range(3):
                following = self.children.setdefault(tuple(path[:level]), [])
                if not following or following[-1] != path[level]:
                    following.append(path[level])

    def __call__(self, ids: Tensor, beam_size: int) -> Answer:
        def allowed(_: int, sequence: Tensor) -> list[int]:
            # A beam that never had a valid prefix carries -inf; any token will do for it.
            return self.children.get(tuple(sequence[self.prompt_tokens :].tolist()), [0])

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
            prefix_allowed_tokens_fn=allowed,
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers = generated.sequences[:, self.prompt_tokens :].view(len(ids), beam_size, 3) - self.offsets
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
        return logits.float().log_softmax(-1)[:, self.offsets[level] : self.offsets[level] + self.sizes[level]]

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
    """Exit unless scores agree position by position to the tolerance, and so do tokens wherever no neighbour's score is as close as that."""
    if not torch.allclose(answer.scores, reference.scores, atol=tolerance, rtol=0):
        raise SystemExit(f"{name}: scores differ by {float((answer.scores - reference.scores).abs().max()):.2e}; not comparing the speed of unequal answers")
    gap = reference.scores[:, :-1] - reference.scores[:, 1:] < tolerance
    near_tie = torch.nn.functional.pad(gap, (1, 0)) | torch.nn.functional.pad(gap, (0, 1))
    near_tie[:, -1] = True  # its next neighbour is out of sight
    if bool(((answer.tokens != reference.tokens).any(-1) & ~near_tie).any()):
        raise SystemExit(f"{name}: answers differ; not comparing the speed of unequal answers")


def settled_prompts(model: Decoder, trie: Trie, task: Task, batch: int, rng: np.random.Generator) -> Tensor:
    """Prompt tokens int64 [B, L] whose answers do not hang on rounding: a beam whose last place is a tie to seven digits goes either way.

    Such rows show as different answers of the same decoder with other rounding (packed weights), and are drawn anew. They are rare: with more than one row
    in eight, and one, the difference is no rounding and the benchmark ends.
    """
    packed, redrawn = pack(model), 0
    ids = torch.from_numpy(rng.integers(0, task.text_vocab_size, (batch, task.prompt_tokens)))
    for beam in task.beams:
        while True:
            prompts = Prompts(ids, torch.full((batch,), task.prompt_tokens))
            ours, exact = (beam_search(one, prompts, trie, beam_size=beam).scores for one in (packed, model))
            loose = ~torch.isclose(ours, exact, atol=TOLERANCE, rtol=0).all(dim=1)
            if not bool(loose.any()):
                break
            redrawn += int(loose.sum())
            if redrawn > 1 + batch // 8:
                raise SystemExit(f"packed weights: {redrawn} answers differ; not comparing the speed of unequal answers")
            ids[loose] = torch.from_numpy(rng.integers(0, task.text_vocab_size, (int(loose.sum()), task.prompt_tokens)))
    return ids


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
        generate = Generate(theirs, tokens, config.level_offsets, task.prompt_tokens)
        competent = CompetentUser(theirs, trie, config)
        owners = rng.integers(0, len(trie), 34 * len(trie)).astype(np.int32)  # 50 SIDs hold some 1,700 items
        index = SidIndex.build(owners, len(trie), rng.random(len(owners)))
        for batch in task.batches:
            ids = settled_prompts(model, trie, task, batch, rng)
            prompts = Prompts(ids, torch.full((batch,), task.prompt_tokens))
            for beam in task.beams:
                others = {"competent": partial(competent, ids, beam), "generate": partial(generate, ids, beam)}
                tower = {"two_tower": partial(two_tower, prompts, beam)}
                compare(model, prompts, trie, index, others, tower, kind=kind, beam=beam, repeats=repeats, record=record, compiled=compiled)


def compare(
    model: Decoder,
    prompts: Prompts,
    trie: Trie,
    index: SidIndex,
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
    packed = pack(model)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: beam_search(packed, prompts, trie, beam_size=beam),
        "ours_full": lambda: beam_search(packed, prompts, trie, beam_size=beam, support="full"),
        "ours_unpacked": lambda: beam_search(model, prompts, trie, beam_size=beam),
        "ours_trie": lambda: beam_search(packed, prompts, trie, beam_size=beam, support="trie"),
    }
    if has_bfloat16():
        rough = pack(model, torch.bfloat16)
        sides["ours_bfloat16"] = lambda: beam_search(rough, prompts, trie, beam_size=beam)
    exact = beam_search(model, prompts, trie, beam_size=beam)
    if compiled:
        sides["ours_compiled"] = compiled_search(model, prompts, trie, beam)
        require_equal("ours_compiled", Answer(*sides["ours_compiled"]()[1:]), Answer(*exact[1:]))
    found = sides["ours"]()
    require_equal("ours", Answer(*found[1:]), Answer(*exact[1:]))
    reference = sides["ours_full"]()
    for name, side in others.items():
        require_equal(f"{name}, {kind} trie, batch {len(prompts)}, beam {beam}", side(), Answer(reference.tokens, reference.scores))
    rows = found.sid_rows.numpy()
    sides |= others | tower | {"expand": lambda: [index.expand(row, 2_000) for row in rows]}
    for side in sides.values():
        side()
    times = interleaved(sides, repeats)
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
        ("speedup_vs_hf_full_support", "generate", "ours_full"),
        ("speedup_vs_competent_hf_full_support", "competent", "ours_full"),
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
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(records, indent=1) + "\n")
    return records


if __name__ == "__main__":
    main()
