r"""The gradient memory layer: a linear model per scalar, written to at test time.

Per scalar, with the input x ∈ R², query q = W_q x, key k = W_k x, value v = W_v x (each R^h) and rate η:

    memorise   z = kW + b,   δ = ∂/∂z ½‖γ ⊙ LN(z) + β − (v − k)‖²,   W ← W − η kᵀδ,   b ← b − ηδ
    generate   o = q + γ ⊙ LN(qW + b) + β        with the W and b just written

`plain_memory` computes exactly that. `factored_memory` uses that every write is k-shaped and k = W_k x, so the
written part of W is W_kᵀ-expanded from S ∈ R^{2×h}, with s ∈ R^h the written part of b (S = s = 0 at first):

    S ← S + η x δᵀ,   s ← s + ηδ
    kW + b = xᵀ(W_kᵀW₀) + b₀ − (xᵀ W_kᵀW_k) S − s
    qW + b = xᵀ(W_qᵀW₀) + b₀ − (xᵀ W_qᵀW_k) S − s

The two agree exactly in real arithmetic; S and s hold 24 numbers a scalar where W and b hold 72 (h = 8).

Everything is element-wise over the N scalars, which stand last and contiguous. Source: arXiv 2412.16901, section 3;
the layer is TTT-Linear of arXiv 2407.04620 with one head, no rotary embedding and no gate.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["MemoryWeights", "factored_memory", "initial_memory", "normalise", "plain_memory"]

NORM_EPSILON = 1e-6


class MemoryWeights(NamedTuple):
    """Learned numbers of the layer, shared by all scalars; h is the hidden width, 8 in the paper.

    Attributes:
        query, key, value: [h, 2] projections W_q, W_k, W_v of the input.
        weight: [h, h], W₀, maps a key (a row vector) to kW₀.
        bias: [h], b₀.
        norm_weight, norm_bias: [h], γ and β.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def initial_memory(weights: MemoryWeights, size: int, *, factored: bool) -> tuple[Tensor, Tensor]:
    """Memory of `size` scalars before anything was written.

    Returns:
        Factored: S = 0 [2, h, N] and s = 0 [h, N]. Plain: W = W₀ [h, h, N] and b = b₀ [h, N].
    """
    hidden = weights.bias.shape[0]
    if factored:
        return weights.bias.new_zeros(2, hidden, size), weights.bias.new_zeros(hidden, size)
    return weights.weight[..., None].expand(-1, -1, size).clone(), weights.bias[:, None].expand(-1, size).clone()


def plain_memory(
    weights: MemoryWeights, inputs: Tensor, rate: Tensor, memory: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Memorise, then generate, with W and b held in full.

    Args:
        weights: learned numbers of the layer.
        inputs: [2, N], x.
        rate: [N], η, at least 0.
        memory: [h, h, N], W.
        bias: [h, N], b.

    Returns:
        o [h, N] and the new W and b.
    """
    key = weights.key @ inputs  # [h, N]
    query = weights.query @ inputs  # [h, N]
    target = weights.value @ inputs - key  # [h, N]
    prediction = (key[:, None] * memory).sum(0) + bias  # [h, N]
    error = rate * _reconstruction_gradient(weights, prediction, target)  # [h, N], ηδ
    memory = memory - key[:, None] * error[None]  # [h, h, N]
    bias = bias - error
    recalled = (query[:, None] * memory).sum(0) + bias  # [h, N]
    return _generate(weights, query, recalled), memory, bias


def factored_memory(
    weights: MemoryWeights, inputs: Tensor, rate: Tensor, memory: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `plain_memory` with the written part only, S and s.

    Args:
        weights: learned numbers of the layer.
        inputs: [2, N], x.
        rate: [N], η, at least 0.
        memory: [2, h, N], S.
        bias: [h, N], s.

    Returns:
        o [h, N] and the new S and s.
    """
    query = weights.query @ inputs  # [h, N]
    target = (weights.value - weights.key) @ inputs  # [h, N]
    prediction = _recall(weights, weights.key, inputs, memory, bias)  # [h, N]
    error = rate * _reconstruction_gradient(weights, prediction, target)  # [h, N], ηδ
    memory = memory + inputs[:, None] * error[None]  # [2, h, N]
    bias = bias + error
    recalled = _recall(weights, weights.query, inputs, memory, bias)  # [h, N]
    return _generate(weights, query, recalled), memory, bias


def normalise(values: Tensor) -> Tensor:
    """LayerNorm without affine part over the first axis: [h, N] to [h, N]."""
    centred = values - values.mean(0)
    return centred / (centred.square().mean(0) + NORM_EPSILON).sqrt()


def _recall(weights: MemoryWeights, projection: Tensor, inputs: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    """pW + b for the projected input p = projection · x, from the factored memory: [h, N]."""
    initial = (projection.T @ weights.weight).T @ inputs + weights.bias[:, None]  # [h, N]
    address = (projection.T @ weights.key).T @ inputs  # [2, N]
    return initial - (address[:, None] * memory).sum(0) - bias


def _reconstruction_gradient(weights: MemoryWeights, prediction: Tensor, target: Tensor) -> Tensor:
    """δ = ∂/∂z ½‖γ ⊙ LN(z) + β − target‖² at z = prediction: [h, N]."""
    centred = prediction - prediction.mean(0)
    deviation = (centred.square().mean(0) + NORM_EPSILON).sqrt()  # [N]
    normalised = centred / deviation
    residual = weights.norm_weight[:, None] * normalised + weights.norm_bias[:, None] - target
    scaled = residual * weights.norm_weight[:, None]
    return (scaled - scaled.mean(0) - normalised * (scaled * normalised).mean(0)) / deviation


def _generate(weights: MemoryWeights, query: Tensor, recalled: Tensor) -> Tensor:
    return query + weights.norm_weight[:, None] * normalise(recalled) + weights.norm_bias[:, None]
