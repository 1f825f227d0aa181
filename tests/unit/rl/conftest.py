"""A toy world for reinforcement learning: 12 of 64 possible SIDs, six requests, a decoder of one layer; and the same world guided."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from genrecall.config import to_dict
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.lexicon import Lexicon
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.rl.feedback import CLICKED, EXPOSED, Feedback
from genrecall.rl.rollout import RolloutConfig, RolloutTask
from genrecall.sid.trie import Trie
from genrecall.storage import Artifact, Stage

NUM_REQUESTS = 6


@dataclass
class Toy:
    """Requests 0 to 5; request r was clicked at SID 2r and saw SID 2r + 1. In the guided world they have query vectors `soft` [6, d]."""

    model: Decoder
    trie: Trie
    sid_tokens: np.ndarray
    feedback: Feedback
    soft: np.ndarray | None = None

    @property
    def support(self) -> str:
        return "level" if self.soft is None else "trie"

    def task(self, rows, *, step: int = 0, weights=(2.0, 0.1), expert_sids=None) -> RolloutTask:
        rows = np.asarray(rows, dtype=np.int64)
        prompts = self.prompts(rows)
        sids = [self.feedback.of(int(row))[0] for row in rows] if expert_sids is None else [np.array(one, dtype=np.int32) for one in expert_sids]
        return RolloutTask(
            step=step,
            request_rows=rows,
            token_ids=prompts.token_ids.numpy(),
            lengths=prompts.lengths.numpy(),
            soft=None if prompts.soft is None else prompts.soft.numpy(),
            expert_offsets=np.concatenate([[0], np.cumsum([len(one) for one in sids])]).astype(np.int64),
            expert_sids=np.concatenate(sids).astype(np.int32),
            expert_weights=np.concatenate([np.array(weights)[: len(one)] for one in sids]) if len(sids) else np.zeros(0),
        )

    def prompts(self, rows) -> Prompts:
        soft = None if self.soft is None else torch.from_numpy(self.soft[np.asarray(rows)])
        return Prompts.from_rows([[int(row) + 1] * (1 + int(row) % 3) for row in rows], soft)


def toy_tokens() -> np.ndarray:
    codes = np.random.default_rng(0).choice(64, 12, replace=False)
    codes.sort()
    return np.stack([codes // 16, codes // 4 % 4, codes % 4], axis=1).astype(np.int32)


@pytest.fixture
def toy() -> Toy:
    torch.set_num_threads(1)
    tokens = toy_tokens()
    config = DecoderConfig(
        text_vocab_size=10, level_sizes=(4, 4, 4), hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=48, max_positions=16
    )
    feedback = Feedback(
        num_sids=12,
        offsets=np.arange(NUM_REQUESTS + 1, dtype=np.int64) * 2,
        sid_rows=np.arange(12, dtype=np.int32),
        tiers=np.array([CLICKED, EXPOSED] * NUM_REQUESTS, dtype=np.int8),
    )
    return Toy(Decoder(config, seed=1).eval(), Trie.from_tokens(tokens, (4, 4, 4)), tokens, feedback)


@pytest.fixture
def guided_toy(toy: Toy) -> Toy:
    """Two items a SID, of two words each; a query lies nearest to the SID before the clicked one, so that there is something to learn."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((24, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    trie = toy.trie.with_items(vectors, np.arange(13) * 2)
    lexicon = Lexicon.build(np.stack([np.arange(24) % 7, 7 + np.arange(24) % 3], axis=1).ravel(), np.arange(25) * 2, 10, np.ones(24, dtype=bool))
    config = dataclasses.replace(toy.model.config, soft_prompt_dim=8, guide_sharpness=4.0, guide_lexical=1.0, guide_items=24, guide_entries=48)
    model = Decoder(config, seed=1).eval()
    model.guidance.set_lexicon(lexicon)
    soft = vectors[(np.arange(NUM_REQUESTS) * 4 - 2) % 24]
    return dataclasses.replace(toy, model=model, trie=trie, soft=soft)


def artifacts_of(toy: Toy, folder: Path) -> dict[str, Artifact]:
    """A toy's decoder and trie as artifacts, for actors that open them."""

    def written(kind: str, fill) -> Artifact:
        stage = Stage(
            kind=kind,
            uri=str(folder / kind),
            config=RolloutConfig(seed=0, group_size=2, num_experts=0, support=toy.support),
            algorithm_version=1,
            parents={},
            seed=0,
            job="test",
        )
        with stage.write() as draft:
            fill(draft.path)
        return stage.open()

    return {
        "generator": written("generator", lambda folder: toy.model.save_pretrained(folder / "stage3")),
        "sid_index": written("sid_index", lambda folder: toy.trie.save(folder / "trie")),
    }


@pytest.fixture
def toy_artifacts(toy: Toy, tmp_path: Path) -> dict[str, Artifact]:
    return artifacts_of(toy, tmp_path)


def spec_of(toy: Toy, artifacts: dict[str, Artifact]) -> dict[str, object]:
    """What a rollout actor of a toy world is made from."""
    return {
        "generator": artifacts["generator"].uri,
        "sid_index": artifacts["sid_index"].uri,
        "rollout": to_dict(RolloutConfig(seed=5, group_size=4, num_experts=1, support=toy.support)),
        "use_gpu": False,
    }


@pytest.fixture
def rollout_spec(toy: Toy, toy_artifacts: dict[str, Artifact]) -> dict[str, object]:
    return spec_of(toy, toy_artifacts)


@pytest.fixture
def guided_spec(guided_toy: Toy, tmp_path: Path) -> dict[str, object]:
    return spec_of(guided_toy, artifacts_of(guided_toy, tmp_path / "guided"))
