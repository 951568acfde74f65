# %% [markdown]
# # Positions
#
# > Turn token ids into vectors, and tell the model where each of them stands: learned, sinusoidal
# > and rotary embeddings, and how to stretch them to longer texts.
#
# To be written.
#
# | | |
# |---|---|
# | **You build** | {py:class}`~llmbook.positions.RotaryEmbedding` |
# | **You need** | |
# | **It takes** | |

# %% tags=["remove-cell"]
#| default_exp positions

# %%
#| export
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from llmbook.corpus import _check_at_least


# %%
#| export
class LearnedEmbedding(nn.Module):
    """A learned vector for each position from 0 to ``context_length - 1`` (as in GPT-2).

    Position -1, padding, gets the vector of position 0. On a CPU other positions outside the table
    raise a ``ValueError``; on a GPU, where looking at them would make the program wait, the kernel
    itself stops with an assertion. The table starts with a standard deviation of 0.02.
    """

    def __init__(self, context_length: int, d_model: int):
        super().__init__()
        _check_at_least(context_length=(1, context_length), d_model=(1, d_model))
        self.weight = nn.Parameter(torch.empty(context_length, d_model).normal_(std=0.02))

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> Float[Tensor, "*batch sequence d_model"]:
        """Return the vectors of ``position_ids``."""
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_positions(position_ids, len(self.weight))
        return nn.functional.embedding(position_ids.clamp(min=0), self.weight)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return "context_length={}, d_model={}".format(*self.weight.shape)


# %%
#| export
def _check_positions(position_ids: Int64[Tensor, "*batch sequence"], length: int) -> None:
    wrong = position_ids[(position_ids < -1) | (position_ids >= length)]
    if len(wrong):
        raise ValueError(f"position_ids: expected -1 (padding) to {length - 1}, got {wrong[0]}")


# %%
#| export
def rope_frequencies(d_head: int, base: int | float = 10_000.0) -> Float32[Tensor, " half"]:
    """Return base^(-2i / d_head) for each pair i of dimensions: radians per position, float32.

    Source: Su et al. (2021), section 3.2.2; the sinusoids of Vaswani et al. (2017) have the same.

    >>> rope_frequencies(4, base=100.0)
    tensor([1.0000, 0.1000])
    """
    _check_at_least(d_head=(2, d_head))
    if d_head % 2:
        raise ValueError(f"d_head: expected an even number, got {d_head}")
    _check_base(base)
    return 1.0 / base ** (torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)


def _check_base(base: int | float) -> None:
    if not 1 < base < math.inf:
        raise ValueError(f"base: expected a number above 1, got {base}")


# %%
#| export
class _Angles(nn.Module):
    """Position times frequency in float32, also in a model that is cast to another type.

    It has no state to save. Padding, position -1, counts as position 0.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Float32[Tensor, " half"]):
        super().__init__()
        self.exact = frequencies  # not a buffer: neither cast nor moved, and never on "meta"
        self.register_buffer("frequencies", frequencies.clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Angles":
        """Follow the model to its device, and undo any cast (all of ``nn.Module.to`` goes here)."""
        super()._apply(fn, recurse)
        self.frequencies = self.exact.to(self.frequencies.device)
        return self

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> Float32[Tensor, "*batch sequence half"]:
        """Return the angles in radians."""
        return position_ids.clamp(min=0).float()[..., None] * self.frequencies


# %%
#| export
class SinusoidalEmbedding(nn.Module):
    """Fixed waves: sin(t w_i) at dimension 2i, cos(t w_i) at 2i + 1, with w_i = base^(-2i / d_model).

    No parameters; the result is float32 whatever the model is cast to. Position -1, padding, counts
    as 0. Source: Vaswani et al. (2017), section 3.5.
    """

    def __init__(self, d_model: int, base: int | float = 10_000.0):
        super().__init__()
        with torch.device("cpu"):
            self.angles = _Angles(rope_frequencies(d_model, base))

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> Float32[Tensor, "*batch sequence d_model"]:
        """Return the vectors of ``position_ids``."""
        angles = self.angles(position_ids)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


# %%
#| export
@dataclass(frozen=True)
class RopeScaling:
    """How to stretch the frequencies of RoPE to texts ``factor`` times as long as in training.

    Kinds: "linear" (position interpolation), "ntk" (a larger base), "yarn" and "llama3", which keep
    pairs that turn often within ``original_context_length`` tokens and stretch those that do not.
    "yarn" mixes between ``beta_fast`` and ``beta_slow`` turns, evenly over the index of the pair,
    whose ends are rounded outward if ``truncate``; its ``attention_factor`` multiplies cosine and
    sine, and is 0.1 ln(factor) + 1 unless given. "llama3" mixes between ``high_freq_factor`` and
    ``low_freq_factor`` turns. What is impossible raises a ``ValueError``.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: int | float
    original_context_length: int | None = None
    low_freq_factor: int | float = 1.0
    high_freq_factor: int | float = 4.0
    beta_fast: int | float = 32.0
    beta_slow: int | float = 1.0
    attention_factor: int | float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_scaling(self)


# %%
#| export
def _check_scaling(scaling: RopeScaling) -> None:
    kinds = ("linear", "ntk", "yarn", "llama3")
    if scaling.kind not in kinds:
        raise ValueError(f"kind: expected one of {kinds}, got {scaling.kind!r}")
    if not 1 <= scaling.factor < math.inf:
        raise ValueError(f"factor: expected a number from 1 on, got {scaling.factor}")
    length = scaling.original_context_length
    _check_at_least(original_context_length=(1, length))
    if length is None and scaling.kind in ("yarn", "llama3"):
        raise ValueError(f"original_context_length: {scaling.kind!r} needs it, got None")
    for slow, fast in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        low, high = getattr(scaling, slow), getattr(scaling, fast)
        if not 0 < low < high < math.inf:
            raise ValueError(f"{slow}: expected 0 < {slow} < {fast}, got {low} and {high}")
    attention = scaling.attention_factor
    if attention is not None and not 0 < attention < math.inf:
        raise ValueError(f"attention_factor: expected a number above 0, got {attention}")


# %%
#| export
def _yarn_kept(half: int, scaling: RopeScaling, base: int | float) -> Float[Tensor, " half"]:
    """The share of each pair's frequency that YaRN keeps: 1 for fast pairs, 0 for slow ones."""
    length = scaling.original_context_length or 1

    def index(turns: int | float) -> float:  # of the pair that makes so many turns in the context
        return half * math.log(length / (2 * math.pi * turns)) / math.log(base)

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    ramp = (torch.arange(half) - first) / max(last - first, 0.001)
    return 1 - ramp.clamp(0, 1)


def _llama3_kept(
    frequencies: Float[Tensor, " half"], scaling: RopeScaling
) -> Float[Tensor, " half"]:
    """The share of each pair's frequency that Llama 3 keeps, a ramp in the number of turns."""
    turns = frequencies * (scaling.original_context_length or 1) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


# %%
#| export
def scale_rope(
    frequencies: Float[Tensor, " half"], scaling: RopeScaling, base: int | float = 10_000.0
) -> tuple[Float[Tensor, " half"], float]:
    """Return the scaled frequencies, and the factor for cosine and sine (1 unless "yarn").

    ``frequencies`` are those of ``rope_frequencies`` with the same ``base``.
    """
    half, factor, attention_factor = len(frequencies), scaling.factor, 1.0
    if scaling.kind == "linear":
        return frequencies / factor, attention_factor
    if scaling.kind == "ntk":
        if half < 2:
            raise ValueError("frequencies: 'ntk' needs at least two pairs, got one")
        index = torch.arange(half, device=frequencies.device)
        return frequencies * factor ** (-index / (half - 1)), attention_factor
    if scaling.kind == "llama3":
        kept = _llama3_kept(frequencies, scaling)
    else:
        kept = _yarn_kept(half, scaling, base).to(frequencies.device)
        attention_factor = scaling.attention_factor or 0.1 * math.log(factor) + 1
    return frequencies * (kept + (1 - kept) / factor), attention_factor


# %%
#| export
class RotaryEmbedding(nn.Module):
    """Cosine and sine of the angle of each pair at each position, for ``apply_rope``.

    No parameters, nothing in the state dict. The result is float32, whatever the model is cast to,
    times the attention factor of ``scaling``. Position -1, padding, counts as 0.
    """

    def __init__(
        self, d_head: int, base: int | float = 10_000.0, scaling: RopeScaling | None = None
    ):
        super().__init__()
        self.d_head, self.base, self.scaling = d_head, base, scaling
        self.attention_factor = 1.0
        with torch.device("cpu"):  # real numbers, also where a model is laid out on "meta"
            frequencies = rope_frequencies(d_head, base)
            if scaling is not None:
                frequencies, self.attention_factor = scale_rope(frequencies, scaling, base)
        self.angles = _Angles(frequencies)

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> tuple[Float32[Tensor, "*batch sequence half"], Float32[Tensor, "*batch sequence half"]]:
        """Return cosine and sine."""
        angles = self.angles(position_ids)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor == 1:
            return cos, sin
        return cos * self.attention_factor, sin * self.attention_factor

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"d_head={self.d_head}, base={self.base}, scaling={self.scaling}"


# %%
#| export
def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x_i, x_{i + half}) by the angle of pair i; ``cos`` is there for both halves.

    One pass writes x cos, and one over each half adds what comes from the other half.
    """
    half = sin.size(-1)
    rotated = x * cos  # in float32 at least, because cos is
    rotated[..., :half].addcmul_(x[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin)
    return rotated.to(x.dtype)


class _RotateHalf(torch.autograd.Function):
    """``_rotate_half`` with its gradient: the rotation back. Cosine and sine get none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate."""
        return _rotate_half(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the angles; the input is not needed."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradient by minus the angle."""
        cos, sin = ctx.saved_tensors
        return _RotateHalf.apply(gradients[0], cos, -sin), None, None


# %%
#| export
def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply the neighbors (x_2i, x_2i+1), read as a complex number, by cos + i sin."""
    real = x if x.dtype in (torch.float32, torch.float64) else x.float()
    steps = (real.storage_offset(), *real.stride()[:-1])
    if real.stride(-1) != 1 or any(step % 2 for step in steps):  # no view of pairs is possible
        real = real.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(real.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


# %%
#| export
def apply_rope(
    x: Float[Tensor, "*batch heads sequence d_head"],
    cos: Float[Tensor, "*#batch sequence half"],
    sin: Float[Tensor, "*#batch sequence half"],
    layout: Literal["half", "interleaved"] = "half",
) -> Float[Tensor, "*batch heads sequence d_head"]:
    """Rotate each pair of ``x`` by its angle; ``cos`` and ``sin`` are those of ``RotaryEmbedding``.

    Pairs are (x_i, x_{i + half}) in the layout "half" (Hugging Face), (x_2i, x_{2i+1}) in
    "interleaved" (the paper, Meta). Computed in float32 (float64 for float64), returned in the
    dtype of ``x``. No gradient flows to ``cos`` and ``sin`` in the layout "half".

    >>> x, quarter = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[torch.pi / 2, 0]])
    >>> apply_rope(x, quarter.cos(), quarter.sin()).round()
    tensor([[[-3.,  2.,  1.,  4.]]])
    >>> apply_rope(x, quarter.cos(), quarter.sin(), layout="interleaved").round()
    tensor([[[-2.,  1.,  3.,  4.]]])
    """
    if x.size(-1) != 2 * cos.size(-1):
        raise ValueError(f"cos: expected {x.size(-1)} / 2 angles a position, got {cos.size(-1)}")
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # the same for all heads
    if layout == "half":
        tracked = x.requires_grad and torch.is_grad_enabled()
        rotate = _RotateHalf.apply if tracked else _rotate_half  # it costs more than one token
        return rotate(x, torch.cat((cos, cos), dim=-1), sin)
    if layout == "interleaved":
        return _rotate_interleaved(x, cos, sin)
    raise ValueError(f"layout: expected 'half' or 'interleaved', got {layout!r}")


# %%
#| export
def interleaved_to_half(d_head: int) -> Int64[Tensor, " d_head"]:
    """Return the order in which interleaved dimensions stand in the layout "half".

    ``x[..., order]`` goes from interleaved to half, ``y[..., order.argsort()]`` back.

    >>> interleaved_to_half(6)
    tensor([0, 2, 4, 1, 3, 5])
    """
    _check_at_least(d_head=(2, d_head))
    if d_head % 2:
        raise ValueError(f"d_head: expected an even number, got {d_head}")
    return torch.arange(d_head).view(-1, 2).T.flatten()
