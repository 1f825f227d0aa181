"""Residual quantisation: codebooks learnt by moving averages, and the frozen quantiser that places items when serving.

Source: RQ-VAE (Lee et al., arXiv:2203.01941; Zeghidour et al., arXiv:2107.03312) with the EMA codebooks and restarts of
VQ-VAE-2 and Jukebox; forced level-1 codes from CQ-SID (arXiv:2605.14434).

Deviations: averages are kept as shares of the batch, so thresholds do not depend on the batch size; the commitment term is a
sum, not a mean, over feature dimensions (the mean lets it win over the reconstruction term's gradient and collapses the book);
codebooks start from k-means on data.

Shapes: B rows, D embedding dimension, Z latent dimension, K_l codes at level l (three levels).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genrecall.quantization.level1_categories import Level1Categories

LevelSizes = tuple[int, int, int]
_PLACE_CHUNK = 8192
_SCORES_IN_CACHE = 1 << 18  # float32: 1 MB, a CPU core's own cache


class QuantizerError(ValueError):
    """Input that the quantiser cannot place, or files that are not a quantiser."""


class ResidualMlp(nn.Module):
    """A linear map plus a two-layer MLP whose last layer starts at zero: float32 [B, input_dim] -> [B, output_dim].

    The linear part can start from a principal-component projection, so training begins at a good linear solution.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim)
        self.inner = nn.Linear(input_dim, hidden_dim)
        self.outer = nn.Linear(hidden_dim, output_dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x) + self.outer(nn.functional.silu(self.inner(x))))


@dataclass(frozen=True)
class Quantized:
    """What quantising a batch gives.

    Attributes:
        codes: int64 [B, 3].
        straight_through: [B, Z], the sum of the chosen codes; its gradient goes to the input unchanged.
        commitment: scalar, the mean over rows of sum_l |residual_l - sg(code_l)|^2.
        inputs: [3, B, Z], the residual that each level quantised, detached.
        forced: bool [B], rows whose level-1 code was given.
    """

    codes: Tensor
    straight_through: Tensor
    commitment: Tensor
    inputs: Tensor
    forced: Tensor


class _Commitment(torch.autograd.Function):
    """The mean over rows of sum_l |residual_l|^2 as a function of z, given the residuals: one node in place of twenty.

    Terms, and the order in which they are added, are those that autograd would use, so gradients are the same to the bit.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, *residuals: Tensor) -> Tensor:
        ctx.save_for_backward(*residuals)
        total = z.new_zeros(())
        for residual in residuals:
            total = total + residual.square().sum(dim=1).mean()
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        residuals = ctx.saved_tensors
        factor = 2.0 * gradients[0] / len(residuals[0])
        pull = residuals[-1] * factor
        for residual in reversed(residuals[:-1]):
            pull += residual * factor
        return pull, *(None for _ in residuals)


class _Codebook(nn.Module):
    """One level: its codes and their running share of the rows and sum of the rows."""

    vectors: Tensor
    share: Tensor
    total: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("share", torch.full((size,), 1.0 / size))
        self.register_buffer("total", torch.zeros(size, dim))

    def set_codes(self, vectors: Tensor, share: Tensor) -> None:
        self.vectors.copy_(vectors)
        self.share.copy_(share)
        self.total.copy_(vectors * share[:, None])


class ResidualQuantizer(nn.Module):
    """Three residual levels of EMA codebooks.

    Args:
        level_sizes: (K1, K2, K3).
        dim: Z.
        decay: of the moving averages, per `update`.
        restart_below: a code used less than this fraction of an even share is dead.
        owned_codes: the first so many level-1 codes belong to categories; they are never restarted.
    """

    def __init__(self, level_sizes: LevelSizes, dim: int, *, decay: float = 0.99, restart_below: float = 0.03, owned_codes: int = 0) -> None:
        super().__init__()
        self.level_sizes = level_sizes
        self.dim = dim
        self.decay = decay
        self.restart_below = restart_below
        self.owned_codes = owned_codes
        self.levels = nn.ModuleList(_Codebook(size, dim) for size in level_sizes)

    @property
    def codebooks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of each level, [K_l, Z]."""
        first, second, third = (cast(_Codebook, level).vectors for level in self.levels)
        return first, second, third

    def forward(self, z: Tensor, level1: Tensor | None = None) -> Quantized:
        """Quantise z [B, Z]; rows with `level1` >= 0 (int64 [B]) take that code at level 1, all others the nearest."""
        forced = torch.zeros(len(z), dtype=torch.bool, device=z.device) if level1 is None else level1 >= 0
        codes, residuals = [], torch.empty(4, *z.shape, dtype=z.dtype, device=z.device)
        with torch.no_grad():
            residuals[0] = z
            for number, vectors in enumerate(self.codebooks):
                chosen = nearest_codes(residuals[number], vectors)
                if number == 0 and level1 is not None:
                    chosen = torch.where(forced, level1, chosen)
                codes.append(chosen)
                torch.sub(residuals[number], vectors.index_select(0, chosen), out=residuals[number + 1])
        commitment = cast(Tensor, _Commitment.apply(z, *residuals[1:]))  # type: ignore[no-untyped-call]
        # z - residual is the sum of the chosen codes, with no gradient; z's own gradient makes it straight-through.
        return Quantized(torch.stack(codes, dim=1), z - residuals[3], commitment, residuals[:3], forced)

    @torch.no_grad()
    def update(self, batch: Quantized, *, restart: torch.Generator | None = None) -> None:
        """Move the codes towards the rows that chose them; with `restart`, dead codes become random rows of the batch.

        With several workers the batches are summed over all of them, so every worker keeps the same codes. Dead codes at
        level 1 become rows whose code was not given, because only those can choose them.
        """
        sizes, rows = list(self.level_sizes), len(batch.codes)
        # Sums and counts of all levels in one array: with several workers they travel together.
        statistics = torch.zeros(sum(sizes) * (self.dim + 1), device=batch.codes.device)
        totals, counts = statistics[: sum(sizes) * self.dim].view(-1, self.dim), statistics[sum(sizes) * self.dim :]
        chosen = (batch.codes.T + torch.tensor([0, sizes[0], sizes[0] + sizes[1]], device=batch.codes.device)[:, None]).flatten()
        totals.index_add_(0, chosen, batch.inputs.flatten(0, 1).to(totals.dtype))
        counts.copy_(torch.bincount(chosen, minlength=len(counts)))
        statistics /= rows
        _average_over_workers(statistics)
        parts = zip(self.levels, torch.split(counts, sizes), torch.split(totals, sizes), strict=True)
        for number, (level, share, total) in enumerate(parts):
            book = cast(_Codebook, level)
            book.share.lerp_(share, 1 - self.decay)
            book.total.lerp_(total, 1 - self.decay)
            # A code that no row has chosen for very long keeps its place: its total and share have decayed alike.
            alive = book.share > 1e-12
            book.vectors.copy_(torch.where(alive[:, None], book.total / book.share.clamp(min=1e-12)[:, None], book.vectors))
            if restart is not None:
                self._restart(number, book, batch, restart)

    def _restart(self, number: int, book: _Codebook, batch: Quantized, generator: torch.Generator) -> None:
        size = len(book.vectors)
        free = ~batch.forced if number == 0 else torch.ones_like(batch.forced)
        order = torch.argsort(torch.rand(len(free), generator=generator, device=free.device) + 2.0 * ~free)
        picked = order[torch.arange(size, device=free.device) % free.sum().clamp(min=1)]
        candidates = batch.inputs[number][picked].to(book.vectors.dtype)
        dead = (book.share * size < self.restart_below) & free.any()
        if number == 0:
            dead = dead & (torch.arange(size, device=free.device) >= self.owned_codes)
        packed = torch.cat([candidates, dead[:, None].to(candidates.dtype)], dim=1)
        _broadcast_from_first(packed)  # workers hold different rows; all take the first one's
        candidates, dead = packed[:, :-1], packed[:, -1] > 0.5
        book.share.copy_(torch.where(dead, 1.0 / size, book.share))
        book.vectors.copy_(torch.where(dead[:, None], candidates, book.vectors))
        book.total.copy_(torch.where(dead[:, None], candidates / size, book.total))

    @torch.no_grad()
    def start(self, z: Tensor, level1: Tensor | None, weights: Tensor | None = None, *, generator: torch.Generator, iterations: int = 10) -> None:
        """Set the codes from data z [n, Z]: k-means level by level; an owned code starts at the mean of its category's rows, and stays as it is without any.

        Args:
            level1: int64 [n], given level-1 codes, -1 for none; None without the category constraint.
            weights: float [n], of how many rows each row of a sample is one; None: all alike. The codes' shares follow them.
            generator: on z's device.
            iterations: of k-means.
        """
        weights = torch.ones(len(z), device=z.device) if weights is None else weights
        residual = z
        for number, level in enumerate(self.levels):
            book = cast(_Codebook, level)
            size = len(book.vectors)
            owned = self.owned_codes if number == 0 and level1 is not None else 0
            vectors = torch.zeros_like(book.vectors)
            if owned:
                assert level1 is not None
                known = level1 >= 0
                empty = torch.bincount(level1[known], minlength=owned) == 0
                vectors[:owned] = torch.where(empty[:, None], book.vectors[:owned], _means(residual[known], level1[known], owned))
                pool = residual[~known] if bool((~known).any()) else residual
            else:
                pool = residual
            vectors[owned:] = kmeans(pool, size - owned, generator=generator, iterations=iterations)
            chosen = nearest_codes(residual, vectors)
            if owned:
                assert level1 is not None
                chosen = torch.where(level1 >= 0, level1, chosen)
            share = (torch.bincount(chosen, weights, minlength=size) / weights.sum()).to(vectors.dtype)
            # An unused code starts with an even share so that it has time to find rows before it counts as dead.
            book.set_codes(vectors, torch.where(share > 0, share, 1.0 / size))
            residual = residual - vectors[chosen]

    def synchronize(self) -> None:
        """With several workers: all take the first one's codes."""
        for buffer in self.buffers():
            _broadcast_from_first(buffer)


def nearest_codes(rows: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code int64 [n] (squared distance) of rows [n, Z] in a codebook [K, Z]; the lowest number among equals."""
    # |r - e|^2 = |r|^2 - 2 (r.e - |e|^2 / 2), and |r|^2 does not change the order: one matrix product, no square root.
    half_norms = codebook.square().sum(dim=1).mul(-0.5)
    if rows.device.type != "cpu":
        return torch.addmm(half_norms, rows, codebook.T).argmax(dim=1)
    # numpy's argmax, like torch's the first among equals, uses vector instructions where torch's goes number by number.
    chunks = torch.split(rows, max(64, _SCORES_IN_CACHE // len(codebook)))
    return torch.from_numpy(np.concatenate([torch.addmm(half_norms, chunk, codebook.T).detach().numpy().argmax(axis=1) for chunk in chunks]))


def kmeans(rows: Tensor, size: int, *, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Plain k-means: `size` centres [size, Z] of rows [n, Z]; empty centres move to random rows. Fewer rows than centres repeat with a little noise."""
    n = len(rows)
    if size == 0:
        return rows.new_zeros(0, rows.shape[1])
    order = torch.randperm(n, generator=generator, device=rows.device)
    centres = rows[order[torch.arange(size, device=rows.device) % n]].clone()
    if n <= size:
        spread = rows.std(dim=0, correction=0).mean().clamp(min=1e-6)
        centres[n:] += 0.1 * spread * torch.randn(size - n, rows.shape[1], generator=generator, device=rows.device)
        return centres
    for _ in range(iterations):
        chosen = torch.cat([nearest_codes(part, centres) for part in torch.split(rows, _PLACE_CHUNK)])
        counts = torch.bincount(chosen, minlength=size)
        fresh = rows[torch.randint(n, (size,), generator=generator, device=rows.device)]
        centres = torch.where(counts[:, None] > 0, _means(rows, chosen, size), fresh)
    return centres


def _means(rows: Tensor, chosen: Tensor, size: int) -> Tensor:
    totals = rows.new_zeros(size, rows.shape[1]).index_add_(0, chosen, rows)
    return totals / torch.bincount(chosen, minlength=size).clamp(min=1)[:, None]


def _average_over_workers(values: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()


def _broadcast_from_first(values: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast(values, src=0)


class FrozenQuantizer:
    """Encoder, codebooks and level-1 categories, fixed: gives any item its codes.

    Args:
        encoder: maps embeddings to latents; None when codes lie in the embedding space itself (RQ-KMeans).
        codebooks: three of float32 [K_l, Z].
        categories: which level-1 codes are owned by categories; None when the category plays no part.
        input_dim: D.
    """

    def __init__(self, encoder: ResidualMlp | None, codebooks: Sequence[Tensor], categories: Level1Categories | None, *, input_dim: int) -> None:
        first, second, third = (book.detach().float().cpu() for book in codebooks)
        self._encoder = encoder.float().cpu().eval() if encoder is not None else None
        self._codebooks = (first, second, third)
        self.categories = categories
        self.input_dim = input_dim
        self.level_sizes: LevelSizes = (len(first), len(second), len(third))

    @property
    def latent_dim(self) -> int:
        """Z."""
        return int(self._codebooks[0].shape[1])

    @property
    def codebooks(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """The codes of each level, float32 [K_l, Z]."""
        first, second, third = (book.numpy() for book in self._codebooks)
        return first, second, third

    def place(self, embeddings: NDArray[np.float32], category_paths: Sequence[Sequence[str]]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Codes and what they leave over.

        Args:
            embeddings: float32 [n, D], as the encoder makes them.
            category_paths: one per row, root first; empty when unknown. A category unseen in training takes the nearest code.

        Returns:
            codes int32 [n, 3] and residuals float32 [n, Z] (latent minus the three codes).

        Raises:
            QuantizerError: another dimension, numbers that are not finite, or lengths that differ.
        """
        embeddings = np.asarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.input_dim:
            raise QuantizerError(
                f"embeddings: expected shape [n, {self.input_dim}], got {list(embeddings.shape)}; use the encoder that this quantiser was trained on"
            )
        if len(category_paths) != len(embeddings):
            raise QuantizerError(f"expected one category path per embedding ({len(embeddings)}), got {len(category_paths)}")
        level1 = np.full(len(embeddings), -1, np.int32) if self.categories is None else self.categories.codes_of(category_paths)
        codes = np.empty((len(embeddings), 3), dtype=np.int32)
        residuals = np.empty((len(embeddings), self.latent_dim), dtype=np.float32)
        for begin in range(0, len(embeddings), _PLACE_CHUNK):
            part = slice(begin, begin + _PLACE_CHUNK)
            rows = np.ascontiguousarray(embeddings[part])
            if not np.isfinite(rows).all():
                row = begin + int(np.argmax(~np.isfinite(rows).all(axis=1)))
                raise QuantizerError(f"embeddings: row {row} holds nan or infinite numbers; rerun jobs/train_encoder.py")
            codes[part], residuals[part] = self._place_chunk(torch.tensor(rows), torch.from_numpy(level1[part]).long())
        return codes, residuals

    @torch.inference_mode()
    def _place_chunk(self, rows: Tensor, level1: Tensor) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        residual = rows if self._encoder is None else self._encoder(rows)
        codes = []
        for number, vectors in enumerate(self._codebooks):
            chosen = nearest_codes(residual, vectors)
            if number == 0:
                chosen = torch.where(level1 >= 0, level1, chosen)
            residual = residual - vectors[chosen]
            codes.append(chosen)
        return torch.stack(codes, dim=1).int().numpy(), residual.numpy()

    def code_sums(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """The sum of the three codes, float32 [n, Z], for codes int32 [n, 3]; plus the residual it is the latent."""
        first, second, third = self.codebooks
        return np.asarray(first[codes[:, 0]] + second[codes[:, 1]] + third[codes[:, 2]], dtype=np.float32)

    def save(self, folder: Path) -> None:
        """Write `quantizer.json` and `quantizer.safetensors` into `folder`."""
        tensors = {f"codebook_{number + 1}": book.contiguous() for number, book in enumerate(self._codebooks)}
        hidden_dim = None
        if self._encoder is not None:
            hidden_dim = self._encoder.inner.out_features
            tensors |= {f"encoder.{name}": value.contiguous() for name, value in self._encoder.state_dict().items()}
        save_file(tensors, folder / "quantizer.safetensors")
        description = {
            "input_dim": self.input_dim,
            "hidden_dim": hidden_dim,
            "latent_dim": self.latent_dim,
            "level_sizes": list(self.level_sizes),
            "categories": None if self.categories is None else [list(path) for path in self.categories.paths],
        }
        (folder / "quantizer.json").write_text(json.dumps(description, ensure_ascii=False, indent=1))


def load_quantizer(folder: Path) -> FrozenQuantizer:
    """The quantiser in a `quantizer` artifact (or any folder written by `FrozenQuantizer.save`).

    Raises:
        QuantizerError: weights that do not fit the description.
    """
    description = json.loads((folder / "quantizer.json").read_text())
    tensors = load_file(folder / "quantizer.safetensors")
    input_dim, latent_dim, hidden_dim = int(description["input_dim"]), int(description["latent_dim"]), description["hidden_dim"]
    encoder = None
    if hidden_dim is not None:
        encoder = ResidualMlp(input_dim, int(hidden_dim), latent_dim)
        weights = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
        shapes = {name: value.shape for name, value in encoder.state_dict().items()}
        if {name: value.shape for name, value in weights.items()} != shapes:
            raise QuantizerError(f"{folder}: the encoder's weights do not fit quantizer.json; rerun jobs/train_quantizer.py with --force")
        encoder.load_state_dict(weights)
    codebooks = [tensors.get(f"codebook_{number + 1}", torch.zeros(0)) for number in range(3)]
    if [list(book.shape) for book in codebooks] != [[int(size), latent_dim] for size in description["level_sizes"]]:
        raise QuantizerError(f"{folder}: the codebooks do not fit quantizer.json; rerun jobs/train_quantizer.py with --force")
    paths = description["categories"]
    categories = None if paths is None else Level1Categories(tuple(tuple(path) for path in paths))
    return FrozenQuantizer(encoder, codebooks, categories, input_dim=input_dim)
