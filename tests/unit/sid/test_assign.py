"""New items go to published SIDs by a rule that a plain loop can follow."""

import numpy as np
import pytest
import torch

from genrecall.quantization.level1_categories import Level1Categories
from genrecall.quantization.residual_quantizer import FrozenQuantizer
from genrecall.sid.assign import AssignError, SidAssigner, load_assigner, oversize_sids
from genrecall.sid.build import SidIndexConfig, publish_sids
from genrecall.sid.semantic_id import SidSpace
from genrecall.sid.trie import Trie

CONFIG = SidIndexConfig(max_items_per_sid=4)


def quantizer_of(dim=3, sizes=(5, 4, 4), categories=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    books = [torch.randn(size, dim, generator=generator) * scale for size, scale in zip(sizes, (4.0, 2.0, 1.0), strict=True)]
    return FrozenQuantizer(None, books, categories, input_dim=dim)


def published(quantizer, x, known=None):
    codes, residuals = quantizer.place(x, [()] * len(x))
    return publish_sids(CONFIG, quantizer, codes, residuals, np.ones(len(x), bool) if known is None else known)


def plain_assign(quantizer, sids, codes, latent):
    """The rule in words: longest shared prefix of codes, then nearest centre; a level-1 code without SIDs gives way to the nearest with some."""
    tokens = sids.table.tokens
    own = sids.table.space.codes_of(tokens)[0]
    if not (own[:, 0] == codes[0]).any():
        first = min(set(own[:, 0].tolist()), key=lambda code: ((quantizer.codebooks[0][code] - latent) ** 2).sum())
        candidates = np.flatnonzero(own[:, 0] == first)
    else:
        for length in (3, 2, 1):
            candidates = np.flatnonzero((own[:, :length] == codes[:length]).all(axis=1))
            if len(candidates):
                break
    distances = ((sids.centers[candidates].astype(np.float32) - latent) ** 2).sum(axis=1)
    return int(candidates[distances.argmin()])


def test_assignment_equals_the_rule_in_words():
    quantizer = quantizer_of()
    rng = np.random.default_rng(0)
    sids = published(quantizer, 3 * rng.normal(size=(60, 3)).astype(np.float32))
    assert len(sids.table.space.groups) > 0
    newcomers = 4 * rng.normal(size=(300, 3)).astype(np.float32)
    codes, _ = quantizer.place(newcomers, [()] * 300)
    found = SidAssigner(quantizer, sids.table.space, sids.trie, sids.centers).assign(newcomers, [()] * 300)
    assert found.tolist() == [plain_assign(quantizer, sids, codes[row], newcomers[row]) for row in range(300)]
    lengths = {int((codes[row][None] == sids.table.space.codes_of(sids.table.tokens)[0]).cumprod(axis=1).sum(axis=1).max()) for row in range(300)}
    assert {1, 2, 3} <= lengths  # the sample reaches every case of the rule but the unpublished level-1 code


def test_a_level1_code_without_sids_gives_way_to_the_nearest_with_some():
    quantizer = quantizer_of(categories=Level1Categories((("new",),)))
    rng = np.random.default_rng(1)
    x = 3 * rng.normal(size=(200, 3)).astype(np.float32)
    codes, residuals = quantizer.place(x, [()] * 200)
    kept = codes[:, 0] != 0
    sids = publish_sids(CONFIG, quantizer, codes[kept], residuals[kept], np.ones(int(kept.sum()), bool))
    newcomer = x[:5]
    found = SidAssigner(quantizer, sids.table.space, sids.trie, sids.centers).assign(newcomer, [("new",)] * 5)
    placed, _ = quantizer.place(newcomer, [("new",)] * 5)
    assert (placed[:, 0] == 0).all()
    assert found.tolist() == [plain_assign(quantizer, sids, placed[row], newcomer[row]) for row in range(5)]


def test_a_published_item_comes_back_to_its_cluster():
    quantizer = quantizer_of()
    x = 3 * np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    sids = published(quantizer, x)
    found = SidAssigner(quantizer, sids.table.space, sids.trie, sids.centers).assign(x, [()] * 80)
    own = sids.table.space.codes_of(sids.table.tokens)[0]
    np.testing.assert_array_equal(own[found], own[sids.table.item_sid])


def test_no_newcomers():
    quantizer = quantizer_of()
    sids = published(quantizer, np.ones((3, 3), np.float32))
    assert SidAssigner(quantizer, sids.table.space, sids.trie, sids.centers).assign(np.zeros((0, 3), np.float32), []).tolist() == []


def test_parts_of_different_versions_are_refused():
    quantizer = quantizer_of()
    trie = Trie.from_tokens(np.zeros((1, 3), np.int32), (5, 4, 4))
    with pytest.raises(AssignError, match="use the parts of one bundle"):
        SidAssigner(quantizer, SidSpace((5, 4, 3)), trie, np.zeros((1, 3), np.float16))
    with pytest.raises(AssignError, match=r"expected shape \[1, 3\], got \[2, 3\]"):
        SidAssigner(quantizer, SidSpace((5, 4, 4)), trie, np.zeros((2, 3), np.float16))


def test_the_alarm_names_sids_with_more_than_twice_the_cap():
    assert oversize_sids(np.array([100, 101, 5, 300]), 50).tolist() == [1, 3]


def test_assigner_opens_from_folders(tmp_path):
    quantizer = quantizer_of()
    sids = published(quantizer, 3 * np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32))
    quantizer.save(tmp_path)
    (tmp_path / "sid_space.json").write_text(sids.table.space.to_json())
    sids.trie.save(tmp_path / "trie")
    np.save(tmp_path / "centers.npy", sids.centers)
    x = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)
    mine = SidAssigner(quantizer, sids.table.space, sids.trie, sids.centers).assign(x, [()] * 10)
    assert load_assigner(quantizer=tmp_path, sid_index=tmp_path).assign(x, [()] * 10).tolist() == mine.tolist()
