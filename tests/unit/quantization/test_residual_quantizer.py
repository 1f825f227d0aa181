"""Residual quantisation: EMA arithmetic by hand, forced codes, restarts, and the frozen quantiser."""

import json

import numpy as np
import pytest
import torch

from genrecall.quantization.level1_categories import Level1Categories
from genrecall.quantization.residual_quantizer import FrozenQuantizer, QuantizerError, ResidualMlp, ResidualQuantizer, kmeans, load_quantizer, nearest_codes


def quantizer_with(*books, decay=0.99, owned_codes=0, shares=None, restart_below=0.03):
    quantizer = ResidualQuantizer(tuple(len(book) for book in books), len(books[0][0]), decay=decay, owned_codes=owned_codes, restart_below=restart_below)
    for number, book in enumerate(books):
        share = torch.full((len(book),), 1 / len(book)) if shares is None else torch.tensor(shares[number])
        quantizer.levels[number].set_codes(torch.tensor(book), share)
    return quantizer


NOTHING = [[0.0], [100.0]]


def test_codes_are_the_nearest_of_each_residual():
    quantizer = quantizer_with([[0.0, 0.0], [10.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.5, 0.0]])
    # (10.4, 2.1): nearest (10, 0), leaves (.4, 2.1); nearest (0, 2), leaves (.4, .1); nearest (.5, 0), leaves (-.1, .1).
    found = quantizer(torch.tensor([[10.4, 2.1]]))
    assert found.codes.tolist() == [[1, 1, 1]]
    torch.testing.assert_close(found.straight_through, torch.tensor([[10.5, 2.0]]))
    # Sums over dimensions: (.16 + 4.41) + (.16 + .01) + (.01 + .01).
    torch.testing.assert_close(found.commitment, torch.tensor(4.76))


def test_commitment_is_a_sum_over_dimensions_and_a_mean_over_rows():
    quantizer = quantizer_with([[0.0] * 4] * 2, [[0.0] * 4] * 2, [[0.0] * 4] * 2)
    # Every level leaves the whole vector: 3 levels x 4 dimensions x 1 for the first row, 0 for the second.
    assert quantizer(torch.tensor([[1.0] * 4, [0.0] * 4])).commitment.item() == 6.0


def test_gradient_passes_straight_through():
    quantizer = quantizer_with([[0.0, 0.0], [3.0, 3.0]], [[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    z = torch.tensor([[2.0, 4.0]], requires_grad=True)
    (quantizer(z).straight_through * torch.tensor([[5.0, 7.0]])).sum().backward()
    assert z.grad.tolist() == [[5.0, 7.0]]


def test_a_given_level1_code_overrides_the_nearest():
    quantizer = quantizer_with([[0.0], [10.0]], NOTHING, NOTHING)
    found = quantizer(torch.tensor([[1.0], [1.0], [9.0]]), torch.tensor([1, -1, 0]))
    assert found.codes[:, 0].tolist() == [1, 0, 0]
    assert found.forced.tolist() == [True, False, True]


def test_moving_averages_follow_the_hand_worked_steps():
    quantizer = quantizer_with([[0.0], [10.0]], NOTHING, NOTHING, decay=0.9)
    quantizer.update(quantizer(torch.tensor([[1.0], [2.0], [3.0], [12.0]])))
    # Code 0: share .9 * .5 + .1 * 3/4 = .525, sum .9 * .5 * 0 + .1 * (1 + 2 + 3)/4 = .15, so .15 / .525.
    # Code 1: share .9 * .5 + .1 * 1/4 = .475, sum .9 * .5 * 10 + .1 * 12/4 = 4.8, so 4.8 / .475.
    torch.testing.assert_close(quantizer.codebooks[0], torch.tensor([[0.15 / 0.525], [4.8 / 0.475]]))


def test_an_unused_code_stays_where_it_is():
    quantizer = quantizer_with([[0.0], [10.0]], NOTHING, NOTHING, decay=0.5)
    for _ in range(200):  # its share falls to 2^-201, far below float32's smallest steps of 1
        quantizer.update(quantizer(torch.tensor([[0.5], [0.5]])))
    torch.testing.assert_close(quantizer.codebooks[0], torch.tensor([[0.5], [10.0]]))


def test_a_dead_code_becomes_a_row_of_the_batch():
    quantizer = quantizer_with([[0.0], [50.0]], NOTHING, NOTHING, shares=[[0.99, 0.001], [0.5, 0.5], [0.5, 0.5]])
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    quantizer.update(quantizer(rows), restart=torch.Generator().manual_seed(0))
    assert quantizer.codebooks[0][1].item() in (1.0, 2.0, 3.0)
    assert quantizer.levels[0].share[1].item() == 0.5


def test_codes_of_categories_are_never_restarted():
    quantizer = quantizer_with([[0.0], [50.0], [70.0]], NOTHING, NOTHING, owned_codes=2, shares=[[0.9, 0.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    quantizer.update(quantizer(torch.tensor([[1.0], [2.0]]), torch.tensor([0, -1])), restart=torch.Generator().manual_seed(0))
    assert quantizer.codebooks[0][1].item() == 50.0
    assert quantizer.codebooks[0][2].item() == 2.0  # of the row without a category, the only one that could choose it


def test_nothing_restarts_at_level_1_when_every_code_is_given():
    quantizer = quantizer_with([[0.0], [50.0]], NOTHING, NOTHING, shares=[[0.9, 0.0], [0.5, 0.5], [0.5, 0.5]])
    quantizer.update(quantizer(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0])), restart=torch.Generator().manual_seed(0))
    assert quantizer.codebooks[0][1].item() == 50.0


def test_two_workers_with_half_a_batch_each_keep_the_codes_of_one_with_all_of_it(monkeypatch):
    books = [[0.0], [10.0]], [[-1.0], [1.0]], [[-0.5], [0.5]]
    rows = torch.tensor([[1.0], [2.0], [8.0], [12.0]])
    alone = quantizer_with(*books)
    alone.update(alone(rows))

    halves = rows[:2], rows[2:]
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: sent.append(values.clone()))
    for half in halves:  # first round: what each worker would send
        worker = quantizer_with(*books)
        worker.update(worker(half))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.copy_(sent[0] + sent[1]))
    for half in halves:
        worker = quantizer_with(*books)
        worker.update(worker(half))
        for mine, whole in zip(worker.codebooks, alone.codebooks, strict=True):
            torch.testing.assert_close(mine, whole)


def test_start_puts_an_owned_code_at_its_category_mean():
    quantizer = ResidualQuantizer((3, 2, 2), 1, owned_codes=1)
    z = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    quantizer.start(z, torch.tensor([0, 0, -1, -1]), generator=torch.Generator().manual_seed(0))
    assert quantizer.codebooks[0][0].item() == 2.0
    assert sorted(quantizer.codebooks[0][1:, 0].tolist()) == [10.0, 20.0]


def test_a_fresh_start_leaves_an_owned_code_without_rows_where_it_was():
    quantizer = ResidualQuantizer((3, 2, 2), 1, owned_codes=2)
    z = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    quantizer.start(z, torch.tensor([0, 0, 1, -1]), generator=torch.Generator().manual_seed(0))
    assert quantizer.codebooks[0][:2, 0].tolist() == [2.0, 10.0]
    quantizer.start(z + 1.0, torch.tensor([0, 0, -1, -1]), generator=torch.Generator().manual_seed(0))
    assert quantizer.codebooks[0][:2, 0].tolist() == [3.0, 10.0]


def test_shares_follow_the_rows_that_a_sample_stands_for():
    quantizer = ResidualQuantizer((3, 2, 2), 1, owned_codes=2)
    z = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    quantizer.start(z, torch.tensor([0, 0, 1, -1]), torch.tensor([3.0, 3.0, 1.0, 13.0]), generator=torch.Generator().manual_seed(0))
    assert quantizer.levels[0].share.tolist() == pytest.approx([6 / 20, 1 / 20, 13 / 20])
    assert quantizer.levels[0].total[:, 0].tolist() == pytest.approx([2.0 * 6 / 20, 10.0 / 20, 20.0 * 13 / 20])


def test_kmeans_finds_separate_blobs():
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=generator)
    found = kmeans(rows, 3, generator=generator)
    assert sorted(nearest_codes(found, centres).tolist()) == [0, 1, 2]


def test_kmeans_with_fewer_rows_than_centres_keeps_every_row():
    found = kmeans(torch.tensor([[1.0], [5.0]]), 4, generator=torch.Generator().manual_seed(0))
    assert {1.0, 5.0} <= set(found[:, 0].tolist())
    assert torch.isfinite(found).all()


def test_nearest_codes_equal_brute_force():
    generator = torch.Generator().manual_seed(2)
    rows, book = torch.randn(200, 8, generator=generator), torch.randn(17, 8, generator=generator)
    assert nearest_codes(rows, book).tolist() == torch.cdist(rows, book).argmin(dim=1).tolist()


@pytest.mark.parametrize("size", [7, 64, 192, 1000, 2048])
def test_of_equally_near_codes_the_lowest_number_is_taken(size):
    # Sizes that take the search in blocks and sizes that cannot; small whole numbers, so that products are exact and ties are many.
    rng = np.random.default_rng(3)
    book, rows = rng.integers(-3, 4, (size, 4)), rng.integers(-3, 4, (300, 4))
    wanted = ((rows[:, None] - book) ** 2).sum(axis=2).argmin(axis=1)
    assert nearest_codes(torch.tensor(rows).float(), torch.tensor(book).float()).tolist() == wanted.tolist()
    assert nearest_codes(torch.zeros(0, 4), torch.tensor(book).float()).shape == (0,)


def test_gradients_equal_those_of_the_loss_written_out():
    generator = torch.Generator().manual_seed(4)
    books = [torch.randn(size, 5, generator=generator).tolist() for size in (6, 4, 4)]
    quantizer = quantizer_with(*books)
    z = torch.randn(9, 5, generator=generator)
    weight = torch.randn(9, 5, generator=generator)
    mine, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    found = quantizer(mine)
    (3.0 * found.commitment + (weight * found.straight_through).sum()).backward()
    residual, commitment = plain, torch.zeros(())
    for level, book in enumerate(books):
        residual = residual - torch.tensor(book)[found.codes[:, level]]
        commitment = commitment + residual.square().sum(dim=1).mean()
    (3.0 * commitment + (weight * (plain - residual.detach())).sum()).backward()
    assert torch.equal(found.commitment, commitment)
    assert torch.equal(mine.grad, plain.grad)


def frozen(categories=None):
    torch.manual_seed(0)
    encoder = ResidualMlp(6, 5, 4)
    torch.nn.init.normal_(encoder.outer.weight)
    return FrozenQuantizer(encoder, [torch.randn(size, 4) for size in (5, 3, 2)], categories, input_dim=6)


def test_placing_equals_a_plain_loop_and_codes_plus_residual_give_the_latent():
    quantizer = frozen(Level1Categories((("a",), ("a", "b"))))
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    paths = [("a", "b", "c"), ("a",), ("z",), ()] * 5
    codes, residuals = quantizer.place(x, paths)
    latents = quantizer._encoder(torch.tensor(x)).detach().numpy()
    for row in range(20):
        rest = latents[row]
        for level, book in enumerate(quantizer.codebooks):
            wanted = int(((book - rest) ** 2).sum(axis=1).argmin())
            if level == 0 and row % 4 < 2:
                wanted = 1 - row % 4
            assert codes[row, level] == wanted
            rest = rest - book[wanted]
    np.testing.assert_allclose(quantizer.code_sums(codes) + residuals, latents, atol=1e-5)


def test_a_saved_quantizer_places_alike(tmp_path):
    quantizer = frozen(Level1Categories((("größe",),)))
    quantizer.save(tmp_path)
    x = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    again = load_quantizer(tmp_path)
    assert again.level_sizes == (5, 3, 2)
    for mine, theirs in zip(quantizer.place(x, [("größe",)] * 9), again.place(x, [("größe",)] * 9), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_quantizer_whose_files_do_not_fit_is_refused(tmp_path):
    frozen().save(tmp_path)
    description = json.loads((tmp_path / "quantizer.json").read_text())
    (tmp_path / "quantizer.json").write_text(json.dumps({**description, "level_sizes": [5, 3, 3]}))
    with pytest.raises(QuantizerError, match=r"codebooks do not fit quantizer\.json; rerun"):
        load_quantizer(tmp_path)
    (tmp_path / "quantizer.json").write_text(json.dumps({**description, "hidden_dim": 7}))
    with pytest.raises(QuantizerError, match="encoder's weights do not fit"):
        load_quantizer(tmp_path)


def test_embeddings_that_cannot_be_placed_are_refused():
    with pytest.raises(QuantizerError, match=r"expected shape \[n, 6\], got \[2, 5\]; use the encoder"):
        frozen().place(np.zeros((2, 5), np.float32), [(), ()])
    with pytest.raises(QuantizerError, match=r"one category path per embedding \(2\), got 1"):
        frozen().place(np.zeros((2, 6), np.float32), [()])
    x = np.zeros((3, 6), np.float32)
    x[2, 0] = np.nan
    with pytest.raises(QuantizerError, match="row 2 holds nan"):
        frozen().place(x, [()] * 3)


def test_no_items_give_no_codes():
    codes, residuals = frozen().place(np.zeros((0, 6), np.float32), [])
    assert codes.shape == (0, 3)
    assert residuals.shape == (0, 4)
