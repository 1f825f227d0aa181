"""RQ-VAE with CQ-SID's two constraints: the model and its loss. Without the constraints it is plain RQ-VAE.

Source: CQ-SID (arXiv:2605.14434) on RQ-VAE (arXiv:2203.01941, for recommendation TIGER, arXiv:2305.05065).
Loss = |x - x'|^2 + beta * sum_l |z_l - sg(e_l)|^2 + gamma * InfoNCE; squares are sums over feature dimensions, means over rows.

Deviations: encoder and decoder are a linear map plus an MLP that starts at zero; the linear part starts from the principal
components of the embeddings and the codes from k-means, which takes minutes of warm-up away.

Shapes: B rows, D embedding dimension, Z latent dimension, Dq query embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from genrecall.quantization.query_constraint import bidirectional_info_nce
from genrecall.quantization.residual_quantizer import LevelSizes, Quantized, ResidualMlp, ResidualQuantizer


class RqVae(nn.Module):
    """Encoder, residual quantiser, decoder, and the projection of query embeddings into the latent space.

    Args:
        input_dim: D. latent_dim: Z. hidden_dim: width of the MLPs.
        level_sizes: (K1, K2, K3).
        owned_codes: level-1 codes that belong to categories.
        query_dim: Dq, or None without the query constraint.
        decay, restart_below: of the codebooks, see `ResidualQuantizer`.
    """

    def __init__(
        self,
        input_dim: int,
        latent_dim: int,
        hidden_dim: int,
        level_sizes: LevelSizes,
        *,
        owned_codes: int = 0,
        query_dim: int | None = None,
        decay: float = 0.99,
        restart_below: float = 0.03,
    ) -> None:
        super().__init__()
        self.encoder = ResidualMlp(input_dim, hidden_dim, latent_dim)
        self.decoder = ResidualMlp(latent_dim, hidden_dim, input_dim)
        self.quantizer = ResidualQuantizer(level_sizes, latent_dim, decay=decay, restart_below=restart_below, owned_codes=owned_codes)
        self.query_projection = None if query_dim is None else nn.Linear(query_dim, latent_dim)

    @torch.no_grad()
    def start(self, x: Tensor, level1: Tensor | None, weights: Tensor | None = None, *, generator: torch.Generator) -> None:
        """Start from data: principal components in the linear maps, k-means in the codebooks.

        Args:
            x: [n, D], item embeddings; of a large catalogue a sample.
            level1, weights: see `ResidualQuantizer.start`.
            generator: on x's device.
        """
        mean = x.mean(dim=0)
        centred = x - mean
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : self.encoder.linear.out_features].T
        count = len(directions)  # fewer than Z when D < Z: the other rows keep their random start
        self.encoder.linear.weight[:count] = directions
        self.encoder.linear.bias.zero_()
        self.encoder.linear.bias[:count] = -(directions @ mean)
        self.decoder.linear.weight.zero_()
        self.decoder.linear.weight[:, :count] = directions.T
        self.decoder.linear.bias.copy_(mean)
        if self.query_projection is not None and self.query_projection.in_features == self.encoder.linear.in_features:
            # Query and item embeddings of one encoder share a space, so their projections start as one.
            self.query_projection.load_state_dict(self.encoder.linear.state_dict())
        self.quantizer.start(self.encoder(x), level1, weights, generator=generator)


@dataclass(frozen=True)
class LossParts:
    """The loss, what to log, and the quantised batch that the codebooks are updated with."""

    loss: Tensor
    metrics: dict[str, Tensor]
    quantized: Quantized


def rqvae_loss(
    model: RqVae,
    x: Tensor,
    level1: Tensor | None,
    queries: Tensor | None,
    has_query: Tensor | None,
    positive: Tensor | None,
    beta: float,
    gamma: float,
    temperature: float,
) -> LossParts:
    """The loss of a batch.

    Args:
        x: [B, D] item embeddings. level1: int64 [B], given level-1 codes (-1 for none), or None without the category constraint.
        queries: [B, Dq] query embeddings, or None without the query constraint; has_query, positive: see `bidirectional_info_nce`.
        beta: weight of the commitment term. gamma: weight of the query term. temperature: of the query term.
    """
    z = cast(Tensor, model.encoder(x))
    quantized = model.quantizer(z, level1)
    reconstruction = nn.functional.mse_loss(model.decoder(quantized.straight_through), x, reduction="sum") / len(x)
    loss = reconstruction + beta * quantized.commitment
    metrics = {"reconstruction": reconstruction.detach(), "commitment": quantized.commitment.detach()}
    if queries is not None:
        assert model.query_projection is not None
        assert has_query is not None
        assert positive is not None
        contrast = bidirectional_info_nce(z, model.query_projection(queries), has_query, positive, temperature=temperature)
        loss = loss + gamma * contrast
        metrics["query_contrast"] = contrast.detach()
    return LossParts(loss, metrics, quantized)
