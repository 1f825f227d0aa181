"""A finished decoder with its weights laid out for the CPU's matrix kernels: the same answers, sooner. For search and sampling only.

oneDNN's kernels read weights in blocks; packed once, they need not be reordered at every product, and SwiGLU's activation, its product and the
residual sums are done while a product's result is still in the cache. The packed weights are a copy: training goes on with the original.

In bfloat16 only the products are, with sums and everything between them in float32. Scores then differ in the third digit, so it has to be
asked for, and what it does to recall has to be measured.

Shapes: B prompts, L prompt tokens, G suffixes, T suffix tokens, d hidden.
"""

from __future__ import annotations

import copy
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from genrecall.generator.model import Decoder, Layer
from genrecall.generator.token_table import TokenTable

Fused = Literal["mul", "add"]


def can_pack(model: Decoder) -> bool:
    """Whether the decoder lies on a CPU whose torch has oneDNN."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return model.device.type == "cpu" and has_onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 numbers (AVX-512, or AVX2 with the conversions)."""
    supported: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
    return supported


@torch.inference_mode()
def pack(model: Decoder, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder for search that shares nothing trainable with `model`; `model` itself where it cannot be packed, see `can_pack`.

    Args:
        model: in float32.
        dtype: of the products, float32 or bfloat16.

    Raises:
        ValueError: another dtype, or bfloat16 on a CPU without it, see `has_bfloat16`.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"pack: expected dtype float32 or bfloat16, got {dtype}")
    if not can_pack(model):
        return model
    if dtype is torch.bfloat16 and not has_bfloat16():
        raise ValueError("pack: this CPU has no bfloat16 products; use float32, or a CPU with AVX-512")
    packed = copy.copy(model)
    packed._modules = dict(model._modules)  # what is not replaced below is only read
    packed.layers = torch.nn.ModuleList(_PackedLayer(cast(Layer, layer), dtype) for layer in model.layers)
    packed.tokens = _PackedTokenTable(model.tokens, dtype)
    return packed.eval()


class _Packed:
    """One matrix [N, K] and its bias [N], multiplied from the right: [..., K] -> [..., N]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._dtype = dtype

    def __call__(self, x: Tensor, activation: Literal["none", "swish"] = "none") -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._weight, self._bias, activation, [], "")
        return product.to(x.dtype)

    def fused(self, x: Tensor, other: Tensor, how: Fused) -> Tensor:
        """`other` [..., N] times, or plus, the product."""
        if self._dtype != x.dtype:
            product = self(x)
            return other * product if how == "mul" else other + product
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, other, self._weight, self._bias, how)
        return fused


class _PackedLayer(Layer):
    """A layer whose products are packed; its parameters stay the original's, for the norms."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in self.__dict__})
        self._parameters = dict(layer._parameters)
        query, inner = slice(layer.query_size), layer.down_weight.shape[1]
        self._qkv = {
            (rows.start, rows.stop): _Packed(layer.qkv_weight[rows], layer.qkv_bias[rows], dtype)
            for rows in (slice(None), query, slice(layer.query_size, None))
        }
        self._output = _Packed(layer.output_weight, None, dtype)
        self._gate, self._up = (_Packed(part, None, dtype) for part in (layer.gate_up_weight[:inner], layer.gate_up_weight[inner:]))
        self._down = _Packed(layer.down_weight, None, dtype)

    def _heads(self, x: Tensor, rows: slice) -> Tensor:
        product = self._qkv[rows.start, rows.stop](x)
        return product.view(*product.shape[:-1], -1, self.head_size)

    def _add_attended(self, x: Tensor, attended: Tensor) -> Tensor:
        return self._output.fused(attended.contiguous(), x.contiguous(), "add")

    def _add_mlp(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], self.mlp_norm, self.eps)
        return self._down.fused(self._up.fused(normed, self._gate(normed, "swish"), "mul"), x, "add")


class _PackedTokenTable(TokenTable):
    """A token table whose level heads are packed, the (code, group) pairs' rows worked out."""

    def __init__(self, table: TokenTable, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in table.__dict__.items() if name not in self.__dict__})
        self._parameters, self._buffers = dict(table._parameters), dict(table._buffers)
        head = table.rows(head=table.head_text is not None)[table.text_vocab_size :]
        ends = (*table.level_starts[1:], len(head))
        self._heads = [_Packed(head[start:end], None, dtype) for start, end in zip(table.level_starts, ends, strict=True)]

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        return self._heads[level](hidden)
