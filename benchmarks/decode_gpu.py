"""Queries a second and latency of beam search on a GPU, recorded as CUDA graphs, for a decoder of Qwen2.5-0.5B's shape with random weights.

Run: python benchmarks/decode_gpu.py [--quick] [--seconds 10] [--batches 1 4 16 32 64] [--output benchmarks/results/decode_gpu.json]
The full task needs a CUDA device; --quick runs a tiny decoder wherever it is, for correctness only.

For every batch size: searches one after the other for some seconds, each waited for, its time being the latency of all its queries. Before
timing, the recorded search's answers must equal the plain one's in the same number format, and their scores agree to 1e-3 (1e-4 in float32). A
profile of one replayed search is written beside the results; `host_syncs` counts the synchronising calls inside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import decode
import numpy as np
import torch
from measurement import commit, machine

from genrecall.device import default_device, default_dtype
from genrecall.generator.beam_search import beam_search
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.generator.search_graphs import SearchGraphs
from genrecall.sid.trie import Trie

QWEN2_5_0_5B = DecoderConfig(
    text_vocab_size=151_936,
    level_sizes=(2_048, 1_024, 1_024),
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    intermediate_size=4_864,
    rope_theta=1_000_000.0,
    max_positions=256,
)
QUICK = replace(QWEN2_5_0_5B, text_vocab_size=64, level_sizes=(16, 8, 8), hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, max_positions=32)
SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "aten::_local_scalar_dense")


def host_syncs(graphs: SearchGraphs, prompts: Prompts, trace: Path | None) -> int:
    """Synchronising calls while one search runs; its profile goes to `trace`."""
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if prompts.token_ids.is_cuda else [])
    with torch.profiler.profile(activities=activities) as profile:
        graphs.search(prompts)
        found = sum(event.count for event in profile.key_averages() if event.key in SYNCHRONISING)
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny task on any device, for correctness only")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    device = default_device()
    if device.type != "cuda" and not options.quick:
        parser.error("no CUDA device; --quick checks correctness anywhere")
    config, prompt_tokens, sids = (QUICK, 12, 200) if options.quick else (QWEN2_5_0_5B, 128, 100_000)
    beam, batches, duration = (5, [1, 3], 0.0) if options.quick else (options.beam, options.batches, options.seconds)
    dtype = default_dtype(device)
    rng = np.random.default_rng(0)
    model = Decoder(config, seed=0).to(device, dtype).eval()
    task = replace(decode.QUICK, level_sizes=config.level_sizes, num_sids=sids)
    trie = Trie.from_tokens(decode.sid_tokens("clustered", task, rng), config.alphabet_sizes).to(device)
    graphs = SearchGraphs(model, trie, beam_size=beam, support="level")
    where = f"{machine()}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'no GPU'}, {dtype}"
    common = {"threads": torch.get_num_threads(), "machine": where, "commit": commit()}
    common["command"] = " ".join(["python", "benchmarks/decode_gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    print(where)
    records: list[dict[str, Any]] = []
    output = options.output or (None if options.quick else Path(__file__).parent / "results" / "decode_gpu.json")
    for batch in batches:
        ids = torch.from_numpy(rng.integers(0, config.text_vocab_size, (batch, prompt_tokens)))
        prompts = Prompts(ids, torch.full((batch,), prompt_tokens)).to(device)
        found, plain = graphs.search(prompts), beam_search(model, prompts, trie, beam_size=beam)
        decode.require_equal(f"batch {batch}", decode.Answer.of(found), decode.Answer.of(plain), 1e-4 if dtype == torch.float32 else 1e-3)
        latencies = []
        end = time.perf_counter() + duration
        while not latencies or time.perf_counter() < end:
            started = time.perf_counter()
            graphs.search(prompts).scores.cpu()  # waits for the answer
            latencies.append(1e3 * (time.perf_counter() - started))
        figures = {
            "queries_per_s": 1e3 * batch / float(np.mean(latencies)),
            "p50_ms": float(np.percentile(latencies, 50)),
            "p99_ms": float(np.percentile(latencies, 99)),
            "host_syncs": float(host_syncs(graphs, prompts, output.with_suffix(f".batch{batch}.trace.json") if output and batch == batches[-1] else None)),
        }
        for metric, value in figures.items():
            records.append(
                {"table": "decode_gpu", "row": "ours", "metric": metric, "value": value, "low": value, "high": value, "batch": batch, "beam": beam, **common}
            )
            print(f"batch {batch:3} beam {beam:4} {metric:16} {value:10.2f}", flush=True)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(records, indent=1) + "\n")
    return records


if __name__ == "__main__":
    main()
