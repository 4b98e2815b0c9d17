r"""The Meta Gradient Generator: 164 learned numbers that turn a noisy gradient into an update.

For every scalar of θ, with its gradient g at step t and e = t (textbook) or t + 1 (the released code):

    m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²,   β₁ = 0.9, β₂ = 0.99
    x = [ m/(1−β₁^e), g ] / (√(v/(1−β₂^e)) + 10⁻⁸)  ∈ R²
    η = max(0, 1 + τ) · sigmoid(w_η·x + b_η) / h
    o = gradient memory layer (x, η), see `memory.py`
    u = tanh( w_o · (γ_p ⊙ LN(o) + β_p) ),   θ ← θ − αu   so that |Δθ| ≤ α

Source: arXiv 2412.16901, equations 6 to 9.
"""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mgg_edge.errors import UsageError, WeightsError
from mgg_edge.files import write_whole
from mgg_edge.learn.rules.base import GradientRule
from mgg_edge.learn.rules.classic import moments
from mgg_edge.learn.rules.memory import MemoryWeights, factored_memory, initial_memory, normalise, plain_memory

__all__ = ["MGG", "MGGState"]

HIDDEN = 8
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8
BIAS_CORRECTIONS = ("textbook", "released")
MEMORIES = ("factored", "plain")
FORMAT = "mgg-edge.mgg"

SHAPES: dict[str, tuple[int, ...]] = {
    "query": (HIDDEN, 2),
    "key": (HIDDEN, 2),
    "value": (HIDDEN, 2),
    "memory_weight": (HIDDEN, HIDDEN),
    "memory_bias": (HIDDEN,),
    "memory_norm_weight": (HIDDEN,),
    "memory_norm_bias": (HIDDEN,),
    "rate_weight": (2,),
    "rate_bias": (),
    "token_offset": (),
    "output_norm_weight": (HIDDEN,),
    "output_norm_bias": (HIDDEN,),
    "output": (HIDDEN,),
}
RELEASED_PREFIX = "seq_modeling_block."
RELEASED_NAMES = {
    "q_proj.weight": "query",
    "k_proj.weight": "key",
    "v_proj.weight": "value",
    "W1": "memory_weight",
    "b1": "memory_bias",
    "ttt_norm_weight": "memory_norm_weight",
    "ttt_norm_bias": "memory_norm_bias",
    "learnable_ttt_lr_weight": "rate_weight",
    "learnable_ttt_lr_bias": "rate_bias",
    "learnable_token_idx": "token_offset",
    "post_norm.weight": "output_norm_weight",
    "post_norm.bias": "output_norm_bias",
    "o_proj.weight": "output",
}


class MGGState(NamedTuple):
    """What the MGG remembers of N scalars.

    Attributes:
        m, v: f[N], moments of the gradient.
        memory: f[2, 8, N], S, with the factored memory; f[8, 8, N], W, with the plain one.
        memory_bias: f[8, N], s or b.
        step: f[], updates made so far.
    """

    m: Tensor
    v: Tensor
    memory: Tensor
    memory_bias: Tensor
    step: Tensor


class MGG(GradientRule):
    """The learned update rule.

    Args:
        seed: seed of the untrained numbers.
        memory: `factored` (deployment) or `plain` (the definition); the two agree.
        bias_correction: `textbook` (exponent t) or `released` (t + 1, for numbers trained with the released code).

    Untrained, it already descends: u ≈ tanh(2 · sign(m)) away from zero, disturbed by a memory of small weight.

    Raises:
        ValueError: an unknown `memory` or `bias_correction`.
    """

    name = "mgg"
    default_learning_rate = 1e-3

    def __init__(self, seed: int = 0, *, memory: str = "factored", bias_correction: str = "textbook") -> None:
        super().__init__()
        for label, value, choices in (
            ("memory", memory, MEMORIES),
            ("bias_correction", bias_correction, BIAS_CORRECTIONS),
        ):
            if value not in choices:
                raise ValueError(f"{label}: expected one of {', '.join(choices)}, found {value!r}")
        self.memory, self.bias_correction = memory, bias_correction
        for name, values in _descending_numbers(seed).items():
            self.register_parameter(name, nn.Parameter(values))

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> MGGState:
        """State of `size` scalars before the first update; with the plain memory it carries gradients to W₀ and b₀."""
        memory, memory_bias = initial_memory(self._memory_weights(dtype), size, factored=self.memory == "factored")
        zeros = memory.new_zeros(size)
        return MGGState(zeros, zeros.clone(), memory, memory_bias, memory.new_zeros(()))

    def update(self, gradient: Tensor, state: MGGState) -> tuple[Tensor, MGGState]:
        """One step of the MGG.

        Args:
            gradient: f[N], float32 or float64; the learned numbers are cast to its dtype.
            state: the state so far; not changed.

        Returns:
            u [N] in [−1, 1], before the learning rate and the sign, and the next state.
        """
        dtype = gradient.dtype
        step = state.step + 1
        exponent = step + 1 if self.bias_correction == "released" else step
        m, v = moments(gradient, state.m, state.v, BETA1, BETA2)
        scale = (v / (1 - BETA2**exponent)).sqrt() + EPSILON  # [N]
        inputs = torch.stack([m / (1 - BETA1**exponent), gradient]) / scale  # [2, N]
        gate = torch.sigmoid(self._number("rate_weight", dtype) @ inputs + self._number("rate_bias", dtype))
        rate = torch.relu(1 + self._number("token_offset", dtype)) * gate / HIDDEN  # [N]
        layer = factored_memory if self.memory == "factored" else plain_memory
        output, memory, memory_bias = layer(
            self._memory_weights(dtype), inputs, rate, state.memory, state.memory_bias
        )  # [8, N]
        weight, bias = self._number("output_norm_weight", dtype), self._number("output_norm_bias", dtype)
        direction = torch.tanh(self._number("output", dtype) @ (weight[:, None] * normalise(output) + bias[:, None]))
        return direction, MGGState(m, v, memory, memory_bias, step)

    def largest_update(self, rate: float) -> float:
        """α, by the tanh."""
        return rate

    def options(self) -> dict[str, float | str]:
        """Bias correction; the learned numbers are tensors, not options."""
        return {"bias_correction": self.bias_correction}

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the 164 numbers and how to use them as safetensors, atomically.

        Args:
            path: destination, replaced if it exists.
            metadata: further facts to keep in the file, as text.

        Raises:
            SinkError: the file cannot be written.
        """
        tensors = {name: value.detach().contiguous() for name, value in self.named_parameters()}
        header = {**(metadata or {}), "format": FORMAT, "bias_correction": self.bias_correction}
        write_whole(Path(path), save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, memory: str = "factored") -> MGG:
        """Read what `save` wrote.

        Raises:
            UsageError: there is no such file.
            WeightsError: not such a file, or its tensors are missing, unexpected, mis-shaped or not finite.
        """
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such MGG file") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: expected an MGG in safetensors format: {error}") from error
        if header.get("format") != FORMAT or header.get("bias_correction") not in BIAS_CORRECTIONS:
            raise WeightsError(f"{path}: expected metadata 'format={FORMAT}', found {json.dumps(header)}")
        mgg = cls(memory=memory, bias_correction=header["bias_correction"])
        mgg._assign(tensors, where=f"{path}: ")
        return mgg

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], *, memory: str = "factored") -> MGG:
        """Take the numbers of a checkpoint of the released code, with its bias correction.

        Args:
            state_dict: the thirteen tensors, with or without the prefix `seq_modeling_block.`; kept in their dtype.
            memory: as in the constructor.

        Raises:
            WeightsError: a tensor is missing, unexpected, mis-shaped or not finite.
        """
        found = {name.removeprefix(RELEASED_PREFIX): tensor for name, tensor in state_dict.items()}
        if unexpected := sorted(set(found) - set(RELEASED_NAMES)):
            raise WeightsError(f"released MGG: unexpected tensor '{unexpected[0]}'")
        if missing := sorted(set(RELEASED_NAMES) - set(found)):
            raise WeightsError(f"released MGG: tensor '{missing[0]}' is missing")
        tensors = {}
        for released, name in RELEASED_NAMES.items():
            # The released shapes carry extra axes of length one (heads, batch); the order of elements is the same.
            if tuple(extent for extent in found[released].shape if extent > 1) != SHAPES[name]:
                raise WeightsError(
                    f"released MGG: '{released}' expected {list(SHAPES[name])} up to axes of length one, "
                    f"found {list(found[released].shape)}"
                )
            tensors[name] = found[released].detach().reshape(SHAPES[name])
        mgg = cls(memory=memory, bias_correction="released")
        mgg._assign(tensors, where="released MGG: ")
        return mgg

    def _assign(self, tensors: Mapping[str, Tensor], where: str) -> None:
        if set(tensors) != set(SHAPES):
            raise WeightsError(f"{where}expected tensors {sorted(SHAPES)}, found {sorted(tensors)}")
        for name, shape in SHAPES.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise WeightsError(f"{where}'{name}' expected float {list(shape)}, found {list(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise WeightsError(f"{where}'{name}' holds NaN or Inf")
            self.register_parameter(name, nn.Parameter(tensor.clone()))

    def _number(self, name: str, dtype: torch.dtype) -> Tensor:
        return typing.cast(Tensor, getattr(self, name)).to(dtype)  # not get_parameter: functional_call swaps in tensors

    def _memory_weights(self, dtype: torch.dtype) -> MemoryWeights:
        names = ("query", "key", "value", "memory_weight", "memory_bias", "memory_norm_weight", "memory_norm_bias")
        return MemoryWeights(*(self._number(name, dtype) for name in names))

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"memory={self.memory!r}, bias_correction={self.bias_correction!r}"


def _descending_numbers(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.02) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    # LN(o) ≈ sign(m̂)·pattern while the memory adds little, so output = pattern/4 gives tanh(2·sign(m̂)).
    pattern = torch.tensor([1.0, -1.0] * (HIDDEN // 2))
    numbers: dict[str, Any] = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    numbers["query"] = torch.stack([pattern, torch.zeros(HIDDEN)], dim=1) + normal(HIDDEN, 2)
    numbers["key"], numbers["value"] = normal(HIDDEN, 2), normal(HIDDEN, 2)
    numbers["memory_weight"], numbers["rate_weight"] = normal(HIDDEN, HIDDEN), normal(2)
    numbers["memory_norm_weight"] = torch.full((HIDDEN,), 0.1)
    numbers["output_norm_weight"] = torch.ones(HIDDEN)
    numbers["output"] = pattern / 4
    return numbers
