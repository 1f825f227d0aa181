"""RQ-VAE with and without its constraints, trained for a moment on data whose structure is known."""

import pytest
import torch

from genrecall.quantization.rqvae import RqVae, rqvae_loss


def blobs(count=8, each=40, dim=16):
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
    labels = torch.arange(count).repeat_interleave(each)
    return centres[labels] + 0.05 * torch.randn(count * each, dim, generator=generator), labels


def train(model, x, steps, level1=None, queries=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    everything = torch.ones(len(x), dtype=torch.bool)
    positive = torch.eye(len(x), dtype=torch.bool)
    for step in range(steps):
        parts = rqvae_loss(model, x, level1, queries, everything, positive, 1.0, 1.0, 0.1)
        optimizer.zero_grad()
        parts.loss.backward()
        optimizer.step()
        model.quantizer.update(parts.quantized, restart=torch.Generator().manual_seed(step))
    return parts


def test_separate_blobs_get_their_own_codes_and_are_reconstructed():
    x, labels = blobs()
    torch.manual_seed(0)
    model = RqVae(16, 8, 32, (8, 4, 4))
    model.start(x, None, generator=torch.Generator().manual_seed(0))
    parts = train(model, x, 150)
    codes = parts.quantized.codes
    blob_of_sid = {}
    for sid, label in zip(map(tuple, codes.tolist()), labels.tolist(), strict=True):
        assert blob_of_sid.setdefault(sid, label) == label
    assert parts.metrics["reconstruction"] < 0.02 * x.square().sum(dim=1).mean()


def test_a_linear_start_reconstructs_what_the_codes_keep():
    # As many latents as dimensions: decoder(encoder(x)) is the identity at the start.
    x, _ = blobs()
    model = RqVae(16, 16, 32, (8, 4, 4))
    model.start(x, None, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.decoder(model.encoder(x)), x, atol=1e-4, rtol=1e-4)


def test_loss_adds_up_from_its_terms():
    x, labels = blobs()
    torch.manual_seed(0)
    model = RqVae(16, 8, 32, (8, 4, 4), query_dim=16)
    model.start(x, None, generator=torch.Generator().manual_seed(0))
    same = labels[:, None] == labels[None, :]
    parts = rqvae_loss(model, x, None, x, torch.ones(len(x), dtype=torch.bool), same, 2.0, 0.5, 0.1)
    terms = parts.metrics
    expected = terms["reconstruction"] + 2.0 * terms["commitment"] + 0.5 * terms["query_contrast"]
    assert parts.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_given_codes_are_kept_through_training():
    x, labels = blobs()
    model = RqVae(16, 8, 32, (10, 4, 4), owned_codes=8)
    model.start(x, labels, generator=torch.Generator().manual_seed(0))
    parts = train(model, x, 5, level1=labels)
    assert torch.equal(parts.quantized.codes[:, 0], labels)


def test_the_query_term_brings_the_intent_into_the_codes():
    # The intent is a faint part of the embeddings, lost among louder dimensions unless the queries point it out.
    generator = torch.Generator().manual_seed(3)
    intent = torch.arange(64) % 4
    x = torch.cat([torch.randn(64, 12, generator=generator), 0.5 * torch.nn.functional.one_hot(intent, 4)], dim=1)
    x = torch.nn.functional.normalize(x, dim=1)
    queries = torch.nn.functional.one_hot(intent, 16).float()
    positive = intent[:, None] == intent[None, :]
    everything = torch.ones(64, dtype=torch.bool)

    def purity(gamma):
        torch.manual_seed(0)
        model = RqVae(16, 8, 64, (4, 2, 2), query_dim=16)
        model.start(x, None, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(120):
            if step == 80:
                model.quantizer.start(model.encoder(x), None, generator=torch.Generator().manual_seed(0))
            parts = rqvae_loss(model, x, None, queries, everything, positive, 1.0, gamma, 0.1)
            optimizer.zero_grad()
            parts.loss.backward()
            optimizer.step()
            model.quantizer.update(parts.quantized)
        codes = parts.quantized.codes[:, 0]
        return sum(int(torch.bincount(intent[codes == code], minlength=4).max()) for code in codes.unique()) / 64

    assert purity(1.0) > 0.9
    assert purity(0.0) < 0.6
