"""A training step of RQ-VAE against the same step on `vector-quantize-pytorch`.

Both sides have the same encoder and decoder (copies of one start), batches, optimizer and loss: reconstruction plus commitment, both sums over
dimensions. The other side is `ResidualVQ` set to the same arithmetic: EMA codebooks of decay 0.99, straight-through gradient once (not once a level),
commitment weight Z (its term is a mean over dimensions), and a smoothing small enough to change nothing. Before anything is timed, codes, quantised
vectors, loss, gradients and the codebooks after the update must agree.

A timing is a run of ten steps. Ours restarts dead codes in the first of them, as in training; the other side's default is never to. `speedup_quantizer`
leaves encoder, decoder and optimizer out of both sides: it is what the quantisers themselves differ by, and the rest is common to both.

Run: python benchmarks/quantize.py [--quick] [--threads 1 2] [--repeats 9] [--output benchmarks/results/quantize.json]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vector_quantize_pytorch
from measurement import interleaved, ratios, run_recorded
from torch import Tensor, nn

from genrecall.quantization.residual_quantizer import LevelSizes
from genrecall.quantization.rqvae import RqVae, rqvae_loss

TOLERANCE = 1e-5
STEPS = 10
BETA, DECAY = 1.0, 0.99


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes; the defaults are the full task."""

    input_dim: int = 256
    latent_dim: int = 64
    hidden_dim: int = 256
    level_sizes: tuple[LevelSizes, ...] = ((256, 256, 256), (2_048, 1_024, 1_024))
    batches: tuple[int, ...] = (512, 2_048)


QUICK = Task(input_dim=12, latent_dim=6, hidden_dim=8, level_sizes=((16, 8, 8),), batches=(32,))


@dataclass(frozen=True)
class Step:
    """What a step computed: codes [B, 3], quantised [B, Z], loss, gradients by parameter and codebooks after the update."""

    codes: Tensor
    quantized: Tensor
    loss: Tensor
    gradients: list[Tensor]
    codebooks: list[Tensor]


class Ours:
    """The step of `train_quantizer`."""

    def __init__(self, model: RqVae) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = adam(self.model)

    def step(self, x: Tensor, *, restart: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, quantised vectors and loss of one training step."""
        parts = rqvae_loss(self.model, x, None, None, None, None, BETA, 0.0, 1.0)
        self.optimizer.zero_grad()
        parts.loss.backward()
        self.optimizer.step()
        self.model.quantizer.update(parts.quantized, restart=torch.Generator().manual_seed(0) if restart else None)
        return parts.quantized.codes, parts.quantized.straight_through.detach(), parts.loss.detach()

    def quantize(self, z: Tensor) -> None:
        """The quantiser's part of a step: codes, gradient of latents, codebook update."""
        quantized = self.model.quantizer(z, None)
        (quantized.straight_through.sum() + BETA * quantized.commitment).backward()
        self.model.quantizer.update(quantized)

    def codebooks(self) -> list[Tensor]:
        return list(self.model.quantizer.codebooks)


class Lucidrains:
    """The same step round `ResidualVQ`, which updates its codebooks in its forward pass."""

    def __init__(self, model: RqVae, batch: int) -> None:
        quantizer = vector_quantize_pytorch.ResidualVQ(
            dim=model.quantizer.dim,
            codebook_size=model.quantizer.level_sizes,
            decay=DECAY,
            eps=1e-9,
            commitment_weight=BETA * model.quantizer.dim,
            rotation_trick=False,
        )
        for layer, level in zip(quantizer.layers, copy.deepcopy(model.quantizer.levels), strict=True):
            layer._codebook.embed.copy_(level.vectors[None])
            layer._codebook.cluster_size.copy_(level.share[None] * batch)  # it counts rows where ours has shares
            layer._codebook.embed_avg.copy_(level.total[None] * batch)
        self.model = nn.ModuleDict({"encoder": copy.deepcopy(model.encoder), "decoder": copy.deepcopy(model.decoder), "quantizer": quantizer}).train()
        self.optimizer = adam(self.model)

    def step(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, quantised vectors and loss of one training step."""
        z = self.model["encoder"](x)
        quantized, codes, commitment = self.model["quantizer"](z)
        straight_through = z + (quantized - z).detach()
        loss = nn.functional.mse_loss(self.model["decoder"](straight_through), x, reduction="sum") / len(x) + commitment.sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return codes, quantized.detach(), loss.detach()

    def quantize(self, z: Tensor) -> None:
        """The quantiser's part of a step: codes, gradient of latents, codebook update."""
        quantized, _, commitment = self.model["quantizer"](z)
        ((z + (quantized - z).detach()).sum() + commitment.sum()).backward()

    def codebooks(self) -> list[Tensor]:
        return [layer._codebook.embed[0] for layer in self.model["quantizer"].layers]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `TrainWorker`."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def first_step(side: Ours | Lucidrains, x: Tensor) -> Step:
    """Take a step and keep all that it computed."""
    codes, quantized, loss = side.step(x)
    parts = (side.model.encoder, side.model.decoder) if isinstance(side, Ours) else (side.model["encoder"], side.model["decoder"])
    gradients = [parameter.grad.clone() for part in parts for parameter in part.parameters() if parameter.grad is not None]
    return Step(codes, quantized, loss, gradients, [book.clone() for book in side.codebooks()])


def require_equal(ours: Step, theirs: Step) -> None:
    """Exit unless both steps computed the same."""
    if not torch.equal(ours.codes, theirs.codes):
        raise SystemExit(f"codes of {int((ours.codes != theirs.codes).any(1).sum())} rows differ; not comparing the speed of unequal steps")
    pairs = [("quantised vectors", ours.quantized, theirs.quantized), ("losses", ours.loss, theirs.loss)]
    pairs += [("gradients", mine, other) for mine, other in zip(ours.gradients, theirs.gradients, strict=True)]
    pairs += [("codebooks", mine, other) for mine, other in zip(ours.codebooks, theirs.codebooks, strict=True)]
    for name, mine, other in pairs:
        if not torch.allclose(mine, other, atol=TOLERANCE, rtol=TOLERANCE):
            raise SystemExit(f"{name} differ by {float((mine - other).abs().max()):.2e}; not comparing the speed of unequal steps")


def embeddings(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit vectors float32 [rows, dim] whose variance falls off over directions, as that of text embeddings does."""
    mixing = torch.randn(dim, dim, generator=generator) * torch.linspace(1.0, 0.05, dim)[:, None]
    return nn.functional.normalize(torch.randn(rows, dim, generator=generator) @ mixing, dim=1)


def measure(task: Task, repeats: int, record: Callable[..., None]) -> None:
    """Check and time both sides over the task's grid."""
    for sizes in task.level_sizes:
        generator = torch.Generator().manual_seed(0)
        x = embeddings(2 * max(max(sizes), *task.batches), task.input_dim, generator)
        torch.manual_seed(0)
        model = RqVae(task.input_dim, task.latent_dim, task.hidden_dim, sizes, decay=DECAY)
        model.start(x, None, generator=generator)
        for batch in task.batches:
            compare(model, [x[torch.randperm(len(x), generator=generator)[:batch]] for _ in range(STEPS)], "x".join(map(str, sizes)), repeats, record)


def compare(model: RqVae, batches: list[Tensor], row: str, repeats: int, record: Callable[..., None]) -> None:
    """One size and batch size."""
    size = len(batches[0])
    require_equal(first_step(Ours(model), batches[0]), first_step(Lucidrains(model, size), batches[0]))
    ours, theirs = Ours(model), Lucidrains(model, size)
    latents = [model.encoder(x).detach().requires_grad_() for x in batches]
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: [ours.step(x, restart=number == 0) for number, x in enumerate(batches)],
        "lucidrains": lambda: [theirs.step(x) for x in batches],
        "quantizer": lambda: [ours.quantize(z) for z in latents],
        "lucidrains_quantizer": lambda: [theirs.quantize(z) for z in latents],
    }
    for side in sides.values():
        side()
    times = interleaved(sides, repeats)
    for name, values in times.items():
        record(row, f"{name}_ms", [1e3 * value / len(batches) for value in values], batch=size)
    record(row, "speedup_vs_lucidrains", ratios(times["lucidrains"], times["ours"]), batch=size)
    record(row, "speedup_quantizer", ratios(times["lucidrains_quantizer"], times["quantizer"]), batch=size)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return run_recorded(
        parser,
        "quantize",
        arguments,
        lambda options, repeats: lambda record: measure(QUICK if options.quick else Task(), repeats, record),
        "vector-quantize-pytorch",
        repeats=9,
    )


if __name__ == "__main__":
    main()
