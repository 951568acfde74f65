# %% [markdown]
# # The model
#
# > One class that is GPT-2, Llama, Qwen, Mistral or Mixtral, as its configuration says: built,
# > counted, saved, and opened from the files that the rest of the world uses.
#
# To be written.
#
# | | |
# |---|---|
# | **You build** | {py:class}`~llmbook.model.TransformerLM` |
# | **You need** | |
# | **It takes** | |

# %% tags=["remove-cell"]
#| default_exp model

# %%
#| export
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from glob import escape
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmbook.attention import Backend, KVCache, MultiHeadAttention, attention_mask, causal_mask
from llmbook.batches import document_mask
from llmbook.blocks import (
    ACTIVATIONS,
    FeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
    TransformerBlock,
    _GATES,
    _check_choice,
    _check_probability,
    default_d_ff,
    initialize_weights,
)
from llmbook.corpus import _check_at_least
from llmbook.positions import LearnedEmbedding, RopeScaling, RotaryEmbedding, SinusoidalEmbedding

# %% [markdown]
# config

# %%
#| export
_DERIVED: Any = None  # the default of a field that `_derive` fills in


@dataclass(frozen=True, kw_only=True)
class _Fields:
    vocab_size: int
    context_length: int  # the longest sequence, in tokens
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = _DERIVED  # n_heads
    d_head: int = _DERIVED  # d_model / n_heads
    d_ff: int = _DERIVED  # default_d_ff; with experts, the width of one
    n_experts: int = 0
    n_active_experts: int = 0  # of n_experts, for each token
    d_shared: int = 0  # the width of an expert that all tokens use
    positions: str = "rope"  # or learned, sinusoidal, none
    rope_base: int | float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm: str = "rmsnorm"  # or layernorm
    norm_eps: float = 1e-5
    norm_position: str = "pre"  # or post
    activation: str = "swiglu"  # or another of llmbook.blocks.ACTIVATIONS
    bias: bool = False  # of linear layers, but for router and head, and of LayerNorm
    qkv_bias: bool = _DERIVED  # bias
    qk_norm: bool = False
    sliding_window: int | None = None  # tokens that attention sees, its own included
    tie_embeddings: bool = False
    dropout: int | float = 0.0


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Fields):
    """What a `TransformerLM` is: every size and every choice, checked.

    What is left out follows from the rest: ``n_kv_heads`` is ``n_heads``, ``d_head`` is
    ``d_model / n_heads``, ``d_ff`` is ``default_d_ff``, ``qkv_bias`` is ``bias``. What no model can
    be raises a ``ValueError`` that names the field, its value and what was expected.
    """

    def __post_init__(self) -> None:
        _check_types(self)
        _derive(self)
        _check_config(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """Return the configuration of a known model, one of ``PRESETS``, with fields changed."""
        _check_choice("name", name, tuple(PRESETS))
        return cls.from_dict(PRESETS[name] | changes)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "ModelConfig":
        """Return the configuration with these fields; the inverse of ``to_dict``."""
        return cls(**_checked_entries(entries))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as numbers, texts and dictionaries, fit for JSON."""
        return asdict(self)


# %%
#| export
def _checked_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries as arguments of ``ModelConfig``; what is unknown or missing is named."""
    given = dict(entries)
    if unknown := sorted(set(given) - {field.name for field in fields(_Fields)}):
        raise ValueError(f"{unknown[0]}: not a field of ModelConfig")
    if missing := [name for name in _REQUIRED if name not in given]:
        raise ValueError(f"{missing[0]}: expected a number, but it is missing")
    if isinstance(given.get("rope_scaling"), Mapping):
        given["rope_scaling"] = _scaling_from(given["rope_scaling"])
    return given


def _scaling_from(entries: Mapping[str, Any]) -> RopeScaling:
    try:
        return RopeScaling(**entries)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rope_scaling: {error}") from None


def _check_types(config: _Fields) -> None:
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if value is None and field.default is None:
            continue
        kind = int | float if kind is float else kind
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):  # type: ignore[arg-type]
            name = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{field.name}: expected {name}, got {value!r}")


# %%
#| export
_REQUIRED = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads")


def _derive(config: ModelConfig) -> None:
    """Fill in what was left out."""
    _check_at_least(**{name: (1, getattr(config, name)) for name in _REQUIRED})
    if config.d_head is None and config.d_model % config.n_heads:
        raise ValueError(
            f"n_heads: expected a divisor of d_model = {config.d_model}, unless d_head is given, "
            f"got {config.n_heads}"
        )
    _check_choice("activation", config.activation, ACTIVATIONS)
    derived = {
        "n_kv_heads": config.n_heads,
        "d_head": config.d_model // config.n_heads,
        "d_ff": default_d_ff(config.d_model, config.activation),
        "qkv_bias": config.bias,
    }
    for name, value in derived.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)  # the dataclass is frozen, but not yet done


# %%
#| export
def _check_config(config: ModelConfig) -> None:
    """Raise a ``ValueError`` for sizes and choices that cannot be, alone or together."""
    sizes = {name: (1, getattr(config, name)) for name in ("n_kv_heads", "d_head", "d_ff")}
    _check_at_least(**sizes, sliding_window=(1, config.sliding_window))
    if config.n_heads % config.n_kv_heads:
        expected = f"expected a divisor of n_heads = {config.n_heads}"
        raise ValueError(f"n_kv_heads: {expected}, got {config.n_kv_heads}")
    _check_choice("positions", config.positions, ("rope", "learned", "sinusoidal", "none"))
    _check_choice("norm", config.norm, ("rmsnorm", "layernorm"))
    _check_choice("norm_position", config.norm_position, ("pre", "post"))
    _check_probability("dropout", config.dropout)
    if not 0 < config.norm_eps < 1:
        raise ValueError(f"norm_eps: expected a small positive number, got {config.norm_eps}")
    _check_positions(config)
    _check_experts(config)


def _check_positions(config: ModelConfig) -> None:
    rope = config.positions == "rope"
    if rope and config.d_head % 2:
        raise ValueError(f"d_head: expected an even number for rope, got {config.d_head}")
    if config.positions == "sinusoidal" and config.d_model % 2:
        raise ValueError(f"d_model: expected an even number for sinusoids, got {config.d_model}")
    if not 1 < config.rope_base < math.inf:
        raise ValueError(f"rope_base: expected a number above 1, got {config.rope_base}")
    if config.rope_scaling is not None and not rope:
        expected = f"None where positions are {config.positions!r}"
        raise ValueError(f"rope_scaling: expected {expected}, got {config.rope_scaling}")


def _check_experts(config: ModelConfig) -> None:
    _check_at_least(n_experts=(0, config.n_experts), d_shared=(0, config.d_shared))
    least = 1 if config.n_experts else 0
    if not least <= config.n_active_experts <= config.n_experts:
        expected = f"expected {least} to n_experts = {config.n_experts}"
        raise ValueError(f"n_active_experts: {expected}, got {config.n_active_experts}")
    if config.d_shared and not config.n_experts:
        raise ValueError(f"d_shared: expected 0 without experts, got {config.d_shared}")
    if config.n_experts and config.bias:
        raise ValueError("bias: expected False with experts, which have none, got True")


# %%
#| export
_LLAMA3 = {"norm_eps": 1e-5, "rope_base": 500_000.0, "vocab_size": 128_256}


def _gpt2(d_model: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 50_257,
        "context_length": 1024,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
        "dropout": 0.1,
    }


def _modern(
    vocab_size: int, context_length: int, sizes: tuple[int, ...], **more: Any
) -> dict[str, Any]:
    """RoPE, RMSNorm and SwiGLU; ``sizes`` are width, layers, heads, heads of keys, inner width."""
    names = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
    return {
        "vocab_size": vocab_size,
        "context_length": context_length,
        **dict(zip(names, sizes, strict=True)),
        **more,
    }


# %%
#| export
def _llama3_scaling(factor: float) -> RopeScaling:
    return RopeScaling("llama3", factor, original_context_length=8192)


_LLAMA3 = {"rope_base": 500_000.0}
_QWEN = {"rope_base": 1_000_000.0, "norm_eps": 1e-6}
_LONG = 131_072
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _modern(512, 128, (64, 3, 2, 2, 176)),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama2-7b": _modern(32_000, 4096, (4096, 32, 32, 32, 11_008)),
    "llama3-8b": _modern(128_256, 8192, (4096, 32, 32, 8, 14_336), **_LLAMA3),
    "llama3-70b": _modern(128_256, 8192, (8192, 80, 64, 8, 28_672), **_LLAMA3),
    "llama3.1-8b": _modern(
        128_256, _LONG, (4096, 32, 32, 8, 14_336), **_LLAMA3, rope_scaling=_llama3_scaling(8.0)
    ),
    "llama3.2-1b": _modern(
        128_256,
        _LONG,
        (2048, 16, 32, 8, 8192),
        **_LLAMA3,
        rope_scaling=_llama3_scaling(32.0),
        tie_embeddings=True,
    ),
    "qwen2.5-0.5b": _modern(
        151_936, 32_768, (896, 24, 14, 2, 4864), **_QWEN, qkv_bias=True, tie_embeddings=True
    ),
    "qwen3-0.6b": _modern(
        151_936,
        40_960,
        (1024, 28, 16, 8, 3072),
        **_QWEN,
        d_head=128,
        qk_norm=True,
        tie_embeddings=True,
    ),
    "mistral-7b": _modern(32_000, 32_768, (4096, 32, 32, 8, 14_336), sliding_window=4096),
    "mixtral-8x7b": _modern(
        32_000,
        32_768,
        (4096, 32, 32, 8, 14_336),
        rope_base=1_000_000.0,
        n_experts=8,
        n_active_experts=2,
    ),
}


# %% [markdown]
# builders


# %%
#| export
def _norm(config: ModelConfig, backend: Backend) -> Callable[[int], nn.Module]:
    """Return what makes a normalization of a given width."""
    if config.norm == "layernorm":
        return partial(LayerNorm, eps=config.norm_eps, bias=config.bias, backend=backend)
    return partial(RMSNorm, eps=config.norm_eps, backend=backend)


def _block(config: ModelConfig, backend: Backend) -> TransformerBlock:
    norm = _norm(config, backend)
    attention = MultiHeadAttention(
        config.d_model,
        config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_head=config.d_head,
        bias=config.qkv_bias,
        output_bias=config.bias,
        qk_norm=norm if config.qk_norm else None,
        dropout=config.dropout,
        backend=backend,
    )
    return TransformerBlock(
        config.d_model,
        attention,
        _feed_forward(config),
        norm=norm,
        norm_position="post" if config.norm_position == "post" else "pre",
        dropout=config.dropout,
    )


# %%
#| export
def _feed_forward(config: ModelConfig) -> FeedForward | MixtureOfExperts:
    sizes = config.d_model, config.d_ff
    if config.n_experts:
        return MixtureOfExperts(
            *sizes,
            config.n_experts,
            config.n_active_experts,
            activation=config.activation,
            d_shared=config.d_shared,
        )
    return FeedForward(*sizes, activation=config.activation, bias=config.bias)


def _absolute(config: ModelConfig) -> LearnedEmbedding | SinusoidalEmbedding | None:
    if config.positions == "learned":
        return LearnedEmbedding(config.context_length, config.d_model)
    return SinusoidalEmbedding(config.d_model) if config.positions == "sinusoidal" else None


def _rotary(config: ModelConfig) -> RotaryEmbedding | None:
    rope = config.positions == "rope"
    return RotaryEmbedding(config.d_head, config.rope_base, config.rope_scaling) if rope else None


# %% [markdown]
# positions and masks


# %%
#| export
def _places(ids: Tensor) -> Int64[Tensor, "1 sequence"]:
    return torch.arange(ids.size(1), device=ids.device)[None]


def _places_in_documents(
    document_ids: Int64[Tensor, "batch sequence"],
) -> Int64[Tensor, "batch sequence"]:
    """Count from 0 in each run of equal ids."""
    places = _places(document_ids)
    begins = document_ids != document_ids.roll(1, dims=1)
    begins[:, 0] = True
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def _positions_and_mask(
    config: ModelConfig,
    ids: Int64[Tensor, "batch sequence"],
    position_ids: Int64[Tensor, "#batch sequence"] | None,
    document_ids: Int64[Tensor, "batch sequence"] | None,
) -> tuple[Int64[Tensor, "#batch sequence"], Bool[Tensor, "..."] | None]:
    """Return where each token stands and what it may attend to; no mask means the causal one."""
    window = config.sliding_window
    if document_ids is not None:
        positions = _places_in_documents(document_ids) if position_ids is None else position_ids
        mask = document_mask(document_ids)
        cut = None if window is None else causal_mask(ids.size(1), window, ids.device)
        return positions, mask if cut is None else mask & cut
    if position_ids is not None:
        return position_ids, attention_mask(position_ids, position_ids, window)
    if window is None or ids.size(1) <= window:
        return _places(ids), None
    return _places(ids), causal_mask(ids.size(1), window, ids.device)


# %%
#| export
def _continued(
    cache: KVCache, ids: Tensor, position_ids: Tensor | None
) -> tuple[Int64[Tensor, "#batch sequence"], Bool[Tensor, "..."] | None]:
    """The same with a cache, which knows the positions that come next."""
    if position_ids is None:
        positions = cache.next_positions(ids.size(1))
        return positions, cache.extend(ids.size(1))
    return position_ids, cache.extend(position_ids)


def _check_input(
    config: ModelConfig, ids: Tensor, document_ids: Tensor | None, cache: KVCache | None
) -> None:
    """Check what can be known without looking at the ids, which may be on their way on a GPU."""
    if ids.dtype != torch.int64 or ids.ndim != 2:
        got = f"{ids.ndim} dimensions of {ids.dtype}"
        raise ValueError(f"ids: expected (batch, sequence) of torch.int64, got {got}")
    if ids.size(1) > config.context_length:
        raise ValueError(
            f"ids: expected at most context_length = {config.context_length} tokens, "
            f"got {ids.size(1)}"
        )
    if cache is not None and document_ids is not None:
        raise ValueError("document_ids: expected None with a cache, which holds one text a row")


# %%
#| export
class Transformer(nn.Module):
    """From token ids to one vector for each token: everything but the head."""

    def __init__(self, config: ModelConfig, backend: Backend = "torch"):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions, self.rope = _absolute(config), _rotary(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_block(config, backend) for _ in range(config.n_layers))
        self.norm = _last_norm(config, backend)

    def hidden_states(
        self,
        ids: Int64[Tensor, "batch sequence"],
        *,
        position_ids: Int64[Tensor, "#batch sequence"] | None = None,
        document_ids: Int64[Tensor, "batch sequence"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch sequence d_model"]:
        """Return the vectors that the head reads, after the last normalization."""
        x, rope, mask = _entrance(self, ids, position_ids, document_ids, cache)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope=rope, mask=mask, cache=None if cache is None else cache[layer])
        return self.norm(x)

    def balance_loss(self) -> Float[Tensor, ""]:
        """Return the balance losses of the last pass, summed over blocks with experts, else 0."""
        return _balance_loss(self)


# %%
#| export
def _last_norm(config: ModelConfig, backend: Backend) -> nn.Module:
    if config.norm_position == "post":  # the last block has normalized already
        return nn.Identity()
    return _norm(config, backend)(config.d_model)


def _entrance(
    model: Transformer,
    ids: Tensor,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    cache: KVCache | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """What enters the blocks: vectors, rotations, mask; worked out once, not in each block."""
    _check_input(model.config, ids, document_ids, cache)
    if cache is None:
        positions, mask = _positions_and_mask(model.config, ids, position_ids, document_ids)
    else:
        positions, mask = _continued(cache, ids, position_ids)
    try:
        x = model.embedding(ids)
    except IndexError:  # on a GPU, where nobody waits for an answer, the kernel itself asserts
        expected = f"expected 0 to {model.config.vocab_size - 1}"
        raise ValueError(f"ids: {expected}, got {int(ids.min())} to {int(ids.max())}") from None
    if model.positions is not None:
        x = x + model.positions(positions).to(x.dtype)
    return model.dropout(x), None if model.rope is None else model.rope(positions), mask


def _balance_loss(model: Transformer) -> Float[Tensor, ""]:
    layers = [block.feed_forward for block in model.blocks]
    losses = [layer.balance_loss for layer in layers if isinstance(layer, MixtureOfExperts)]
    return torch.stack(losses).sum() if losses else model.embedding.weight.new_zeros(())


# %%
#| export
class TransformerLM(Transformer):
    """A language model: from token ids to the logits of the next token, at every position."""

    def __init__(self, config: ModelConfig, backend: Backend = "torch"):
        super().__init__(config, backend)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialize_weights(self, config.n_layers)
        _tie(self)

    def forward(
        self, ids: Int64[Tensor, "batch sequence"], **options: Any
    ) -> Float[Tensor, "batch sequence vocab_size"]:
        """Return logits; the options are those of ``hidden_states``."""
        return self.lm_head(self.hidden_states(ids, **options))

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """Return an empty cache for rows of ``capacity`` tokens, ``context_length`` by default."""
        return _new_cache(self, batch_size, capacity)

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int = 5_000_000_000, **entries: Any
    ) -> None:
        """Write the model to ``folder``, as ``save_model`` does."""
        save_model(self, folder, max_shard_size=max_shard_size, **entries)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "TransformerLM":
        """Return the model in ``folder``; the options are those of ``load_model``."""
        return load_model(folder, **options)


# %%
#| export
def _tie(model: TransformerLM) -> None:
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight


def _new_cache(model: TransformerLM, batch_size: int, capacity: int | None) -> KVCache:
    config, weight = model.config, model.embedding.weight
    if capacity is not None and capacity > config.context_length:
        expected = f"expected at most context_length = {config.context_length}"
        raise ValueError(f"capacity: {expected}, got {capacity}")
    return KVCache(
        batch_size,
        capacity or config.context_length,
        config.n_kv_heads,
        config.d_head,
        n_layers=config.n_layers,
        window=config.sliding_window,
        dtype=weight.dtype,
        device=weight.device,
    )


# %% [markdown]
# counting


# %%
#| export
def parameter_counts(config: ModelConfig, *, active: bool = False) -> dict[str, int]:
    """Return the number of parameters of each part, summed over all layers; nothing is allocated.

    With ``active``, only those that one token meets: of experts ``n_active_experts``.
    """
    d, layers, vocabulary = config.d_model, config.n_layers, config.vocab_size * config.d_model
    norm = d * _norm_vectors(config)
    pre = config.norm_position == "pre"
    return {
        "embedding": vocabulary,
        "positions": config.context_length * d if config.positions == "learned" else 0,
        "attention": layers * _attention_parameters(config),
        "feed_forward": layers * _feed_forward_parameters(config, active),
        "norms": (2 * layers + pre) * norm,
        "lm_head": 0 if config.tie_embeddings else vocabulary,
    }


def _norm_vectors(config: ModelConfig) -> int:
    return 2 if config.norm == "layernorm" and config.bias else 1


def _attention_parameters(config: ModelConfig) -> int:
    d, queries = config.d_model, config.n_heads * config.d_head
    all_three = queries + 2 * config.n_kv_heads * config.d_head
    matrices = d * all_three + queries * d
    biases = all_three * config.qkv_bias + d * config.bias
    gains = 2 * config.d_head * _norm_vectors(config) if config.qk_norm else 0
    return matrices + biases + gains


def _feed_forward_parameters(config: ModelConfig, active: bool) -> int:
    d, inner = config.d_model, config.d_ff
    matrices = 3 if config.activation in _GATES else 2
    if not config.n_experts:
        return matrices * d * inner + config.bias * ((matrices - 1) * inner + d)
    experts = config.n_active_experts if active else config.n_experts
    return d * config.n_experts + matrices * d * (experts * inner + config.d_shared)


# %%
#| export
def count_parameters(
    model: nn.Module | ModelConfig, *, active: bool = False, embeddings: bool = True
) -> int:
    """Return how many parameters a model has, or one of this configuration would have.

    A tied matrix counts once. ``active`` counts of experts only those that a token meets. Without
    ``embeddings``, the tables of tokens and positions are left out, and with them a tied head.
    """
    if isinstance(model, nn.Module) and not active and embeddings:
        return sum(parameter.numel() for parameter in model.parameters())
    config = model if isinstance(model, ModelConfig) else getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"model: expected a TransformerLM or ModelConfig, got {type(model)}")
    counts = parameter_counts(config, active=active)
    return sum(counts.values()) - (0 if embeddings else counts["embedding"] + counts["positions"])


# %%
#| export
def flops_per_token(
    config: ModelConfig, sequence: int | None = None, *, training: bool = True, causal: bool = False
) -> float:
    """Return the floating-point operations in matrix products for one token of a ``sequence``.

    A multiplication and an addition are two. Forward alone is a third of ``training``. Attention is
    counted for all pairs of tokens, as kernels without a mask compute it, or if ``causal`` only for
    pairs that the mask allows. The default ``sequence`` is ``context_length``.
    """
    sequence = config.context_length if sequence is None else sequence
    _check_at_least(sequence=(1, sequence))
    seen = float(sequence)
    if causal:
        window = min(config.sliding_window or sequence, sequence)
        seen = (window * (window + 1) / 2 + (sequence - window) * window) / sequence
    pairs = 2 * config.n_layers * config.n_heads * config.d_head * seen  # scores, and mixing
    return (6 if training else 2) * (_matrix_entries(config) + pairs)


def _matrix_entries(config: ModelConfig) -> int:
    """How many numbers one token is multiplied by: the entries of all matrices it goes through."""
    d, queries = config.d_model, config.n_heads * config.d_head
    attention = 2 * d * (queries + config.n_kv_heads * config.d_head)
    matrices = 3 if config.activation in _GATES else 2
    inner = (config.n_active_experts or 1) * config.d_ff + config.d_shared
    layer = attention + d * config.n_experts + matrices * d * inner
    return config.n_layers * layer + config.vocab_size * d


# %%
#| export
def cache_bytes(
    config: ModelConfig, batch_size: int, sequence: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Return the memory of keys and values for rows of ``sequence`` tokens, in bytes."""
    kept = min(sequence, config.sliding_window or sequence)
    per_token = 2 * config.n_layers * config.n_kv_heads * config.d_head
    return batch_size * kept * per_token * dtype.itemsize


# %% [markdown]
# files


# %%
#| export
_GPT2_OUTSIDE = {"embedding": "transformer.wte", "positions": "transformer.wpe"}
_GPT2_OUTSIDE |= {"norm": "transformer.ln_f", "lm_head": "lm_head"}
_GPT2_BLOCK = {
    "ln_1": ("attention_norm",),
    "attn.c_attn": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.c_proj": ("attention.o_proj",),
    "ln_2": ("feed_forward_norm",),
    "mlp.c_fc": ("feed_forward.up_proj",),
    "mlp.c_proj": ("feed_forward.down_proj",),
}


def _gpt2_tensors(model: TransformerLM) -> dict[str, list[Tensor]]:
    """GPT-2's names; the matrices of its blocks are stored transposed, those of q, k, v as one."""
    own: dict[str, Tensor] = dict(model.named_parameters())
    tensors: dict[str, list[Tensor]] = {}
    for name, tensor in own.items():
        module, _, kind = name.rpartition(".")
        if module in _GPT2_OUTSIDE:
            tensors[f"{_GPT2_OUTSIDE[module]}.{kind}"] = [tensor]
    for number in range(model.config.n_layers):
        for (theirs, ours), kind in product(_GPT2_BLOCK.items(), ("weight", "bias")):
            views = [own[f"blocks.{number}.{name}.{kind}"] for name in ours]
            turned = [view.T if view.ndim == 2 else view for view in views]
            tensors[f"transformer.h.{number}.{theirs}.{kind}"] = turned
    return tensors


# %%
#| export
_LLAMA_NAMES = {
    r"^(embedding|blocks|norm)\b": r"model.\1",
    r"\bembedding\b": "embed_tokens",
    r"\bblocks\b": "layers",
    r"\battention\b": "self_attn",
    r"\battention_norm\b": "input_layernorm",
    r"\bfeed_forward_norm\b": "post_attention_layernorm",
    r"\bfeed_forward\.(router|experts)\b": r"block_sparse_moe.\1",
    r"\brouter\b": "gate",
    r"\bfeed_forward\b": "mlp",
}
_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _llama_tensors(model: TransformerLM) -> dict[str, list[Tensor]]:
    """Llama's names, which its descendants keep; Mixtral has a matrix for each expert."""
    tensors: dict[str, list[Tensor]] = {}
    for name, tensor in model.named_parameters():
        for pattern, theirs in _LLAMA_NAMES.items():
            name = re.sub(pattern, theirs, name)
        if tensor.ndim < 3:
            tensors[name] = [tensor]
            continue
        stem, _, kind = name.rpartition(".")
        for number, matrix in enumerate(tensor):
            tensors[f"{stem}.{number}.{_EXPERT_NAMES[kind]}.weight"] = [matrix]
    return tensors


# %%
#| export
def _own_tensors(model: TransformerLM) -> dict[str, list[Tensor]]:
    return {name: [tensor] for name, tensor in model.named_parameters()}


def _disk_tensors(model: TransformerLM, model_type: str) -> dict[str, list[Tensor]]:
    """For each tensor in a file: the views of ours that make it, side by side."""
    tables = {"gpt2": _gpt2_tensors, "llmbook": _own_tensors}
    return tables.get(model_type, _llama_tensors)(model)


# %% [markdown]
# config.json

# %%
#| export
_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
_LLAMA_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
_FAMILIES = {  # what a descendant of Llama has, and its name in Hugging Face's library
    (): "llama",
    ("bias", "qkv_bias"): "llama",
    ("qkv_bias",): "qwen2",
    ("qkv_bias", "sliding_window"): "qwen2",
    ("qk_norm",): "qwen3",
    ("qk_norm", "sliding_window"): "qwen3",
    ("sliding_window",): "mistral",
    ("n_experts",): "mixtral",
    ("sliding_window", "n_experts"): "mixtral",
}
_FEATURES = ("bias", "qkv_bias", "qk_norm", "sliding_window", "n_experts")
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


# %%
#| export
def model_type(config: ModelConfig) -> str:
    """Return the family of Hugging Face's library that computes this function, or "llmbook".

    >>> model_type(ModelConfig.preset("gpt2")), model_type(ModelConfig.preset("tiny", bias=True))
    ('gpt2', 'llama')
    """
    features = tuple(name for name in _FEATURES if getattr(config, name))
    square = config.n_heads * config.d_head == config.d_model
    style = config.norm, config.positions, config.norm_position
    if style == ("layernorm", "learned", "pre") and features == ("bias", "qkv_bias"):
        known = config.activation in _GPT2_ACTIVATIONS.values()
        return "gpt2" if known and square and config.n_kv_heads == config.n_heads else "llmbook"
    scaling = None if config.rope_scaling is None else config.rope_scaling.kind
    same = style == ("rmsnorm", "rope", "pre") and scaling != "ntk" and not config.d_shared
    family = _FAMILIES.get(features, "llmbook")
    if not same or config.activation not in _LLAMA_ACTIVATIONS.values():
        return "llmbook"
    if (family == "llama" and config.d_model % config.n_heads) or (
        family == "qwen2" and not square
    ):
        return "llmbook"  # their classes refuse, or cannot say, such sizes of heads
    return family


# %%
#| export
_GPT2_ENTRIES = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "d_model": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "d_ff": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}
_LLAMA_ENTRIES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_SCALING_ENTRIES = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
_OF_KIND = {
    "linear": ("factor",),
    "llama3": ("factor", "original_context_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_context_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
}


# %%
#| export
def _entries_of(config: ModelConfig) -> dict[str, Any]:
    """Return ``config`` in the words of Hugging Face's config.json."""
    family = model_type(config)
    entries: dict[str, Any] = {"model_type": family}
    if family == "llmbook":
        return {**entries, **config.to_dict()}
    names = _GPT2_ENTRIES if family == "gpt2" else _LLAMA_ENTRIES
    entries |= {theirs: getattr(config, ours) for ours, theirs in names.items()}
    entries |= {
        "architectures": [_CLASSES[family]],
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return entries | (_gpt2_details(config) if family == "gpt2" else _llama_details(config, family))


def _gpt2_details(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(_GPT2_ACTIVATIONS.items())}
    places = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    dropout = dict.fromkeys(places, config.dropout)
    return {"activation_function": theirs[config.activation], **dropout}


# %%
#| export
def _llama_details(config: ModelConfig, family: str) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _LLAMA_ACTIVATIONS.items()}
    details = {"hidden_act": theirs[config.activation], **_rope_entries(config)}
    if config.dropout:
        details["dropout"] = config.dropout  # theirs have none where ours has it
    if family == "llama":
        details |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    else:
        details["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):  # layers from max_window_layers on have the window
        details |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    if family == "mixtral":
        details["num_local_experts"] = config.n_experts
        details["num_experts_per_tok"] = config.n_active_experts
    return details


def _rope_entries(config: ModelConfig) -> dict[str, Any]:
    """The same twice: as transformers from version 5 on writes it, and for older readers."""
    scaling = config.rope_scaling
    old: dict[str, Any] | None = None
    if scaling is not None:
        names = _OF_KIND[scaling.kind]
        given = {_SCALING_ENTRIES[name]: getattr(scaling, name) for name in names}
        old = {"rope_type": scaling.kind, **{k: v for k, v in given.items() if v is not None}}
    base = {"rope_theta": config.rope_base}
    new = {**(old or {"rope_type": "default"}), **base}
    return {**base, "rope_scaling": old, "rope_parameters": new}


# %% [markdown]
# reading config

# %%
#| export
_ONLY: dict[str, dict[str, Any]] = {  # entries that change the function, and what ours can be
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {"attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None},
    "qwen3": {"attention_bias": False},
    "mixtral": {"router_jitter_noise": 0},
}


def _config_from(entries: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """Return the family and the configuration that a config.json describes."""
    family = entries.get("model_type")
    if family == "llmbook":
        ours = {field.name for field in fields(ModelConfig)}
        return "llmbook", ModelConfig.from_dict({k: v for k, v in entries.items() if k in ours})
    if family not in _CLASSES:
        expected = f"expected llmbook or one of {', '.join(_CLASSES)}"
        raise ValueError(f"model_type: {expected}, got {family!r}")
    only = _ONLY["gpt2"] if family == "gpt2" else _ONLY["llama"] | _ONLY.get(family, {})
    for name, value in only.items():
        if entries.get(name, value) != value:
            raise ValueError(f"{name}: expected {value!r}, got {entries[name]!r}")
    read = _read_gpt2 if family == "gpt2" else _read_llama
    return family, ModelConfig.from_dict(read(entries, family))


def _named(entries: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries by our names; a null counts as left out."""
    given = {ours: entries.get(theirs) for ours, theirs in names.items()}
    return {ours: value for ours, value in given.items() if value is not None}


def _activation(entries: Mapping[str, Any], name: str, known: Mapping[str, str]) -> str:
    if entries.get(name) not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {entries.get(name)!r}")
    return known[entries[name]]


# %%
#| export
def _read_gpt2(entries: Mapping[str, Any], family: str) -> dict[str, Any]:
    dropout = {entries.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(dropout) > 1:
        raise ValueError(f"attn_pdrop: expected one rate of dropout, got {sorted(dropout)}")
    return {
        "d_ff": 4 * entries.get("n_embd", 0),
        **_named(entries, _GPT2_ENTRIES),
        "positions": "learned",
        "norm": "layernorm",
        "activation": _activation(entries, "activation_function", _GPT2_ACTIVATIONS),
        "bias": True,
        "tie_embeddings": entries.get("tie_word_embeddings", True),
        "dropout": dropout.pop(),
    }


# %%
#| export
def _read_llama(entries: Mapping[str, Any], family: str) -> dict[str, Any]:
    found = _named(entries, _LLAMA_ENTRIES)
    for name, theirs in _LLAMA_ENTRIES.items():
        needed = name not in ("n_kv_heads", "d_head") or (family, name) == ("qwen3", "d_head")
        if needed and name not in found:
            raise ValueError(f"{theirs}: expected a number, but it is missing")
    found |= {
        "activation": _activation(entries, "hidden_act", _LLAMA_ACTIVATIONS),
        "bias": _read_bias(entries, family),
        "qk_norm": family == "qwen3",
        "sliding_window": _read_window(entries, family),
        "tie_embeddings": entries.get("tie_word_embeddings", False),
        "dropout": entries.get("dropout", 0.0),
        **_read_rope(entries, 1e6 if family == "mixtral" else 1e4),
    }
    if family == "qwen2":
        found["qkv_bias"] = True
    if family == "mixtral":
        found["n_experts"] = entries.get("num_local_experts", 8)
        found["n_active_experts"] = entries.get("num_experts_per_tok", 2)
    return found


# %%
#| export
def _read_bias(entries: Mapping[str, Any], family: str) -> bool:
    if family != "llama":
        return False
    attention, feed_forward = (entries.get(f"{name}_bias", False) for name in ("attention", "mlp"))
    if attention != feed_forward:
        raise ValueError(
            f"mlp_bias: expected {attention!r}, as attention_bias, got {feed_forward!r}"
        )
    return attention


def _read_window(entries: Mapping[str, Any], family: str) -> int | None:
    """Return the sliding window of all layers; Qwen may have it in some only, which ours has not."""
    window = entries.get("sliding_window", 4096 if family == "mistral" else None)
    if family == "llama" or (family.startswith("qwen") and not entries.get("use_sliding_window")):
        window = None
    layers, first = entries["num_hidden_layers"], entries.get("max_window_layers", 28)
    kinds = set(entries.get("layer_types") or [])
    if not kinds and window is not None and family.startswith("qwen"):
        kinds = {f"{'sliding' if i >= first else 'full'}_attention" for i in (0, layers - 1)}
    if len(kinds) > 1:
        raise ValueError(f"layer_types: expected the same in all layers, got {sorted(kinds)}")
    return None if kinds == {"full_attention"} else window


# %%
#| export
def _read_rope(entries: Mapping[str, Any], default: float) -> dict[str, Any]:
    """Read the rotary embedding as transformers writes it from version 5 on, or did before."""
    found = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    base = found.get("rope_theta", entries.get("rope_theta", default))
    if kind == "default":
        return {"rope_base": base}
    if kind not in _OF_KIND:
        raise ValueError(f"rope_type: expected one of {', '.join(_OF_KIND)}, got {kind!r}")
    if found.get("partial_rotary_factor", 1) != 1 or found.get("mscale"):
        raise ValueError(
            f"rope_parameters: expected no partial rotation and no mscale, got {found}"
        )
    scaling = _named(found, {name: _SCALING_ENTRIES[name] for name in _OF_KIND[kind]})
    if "original_context_length" in _OF_KIND[kind]:
        trained = entries.get("original_max_position_embeddings")
        scaling.setdefault("original_context_length", trained or entries["max_position_embeddings"])
    return {"rope_base": base, "rope_scaling": {"kind": kind, **scaling}}


# %% [markdown]
# save


# %%
#| export
def save_model(
    model: TransformerLM,
    folder: str | Path,
    *,
    max_shard_size: int = 5_000_000_000,
    **entries: Any,
) -> None:
    """Write ``config.json`` and safetensors as Hugging Face's library lays them out.

    Files have at most ``max_shard_size`` bytes, but for a single tensor that is larger. Further
    ``entries``, such as ``eos_token_id``, go to ``config.json``. A model that is in ``folder`` is
    replaced when the new one is complete, not before; other files there stay.
    """
    _check_at_least(max_shard_size=(1, max_shard_size))
    described = _entries_of(model.config)
    if clash := sorted(described.keys() & entries.keys() - _FREE):
        raise ValueError(f"{clash[0]}: follows from the model, got {entries[clash[0]]!r}")
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    tensors = _disk_tensors(model, described["model_type"])
    with _new_version(Path(folder).resolve()) as draft:
        _write_json(draft / "config.json", described | {"dtype": dtype} | entries)
        _write_tensors(draft, tensors, max_shard_size)


_FREE = {"bos_token_id", "eos_token_id"}  # which have a default, and may be given


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _to_disk(path)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# %%
#| export
def _size(views: list[Tensor]) -> int:
    return sum(view.nbytes for view in views)


def _grouped(tensors: Mapping[str, list[Tensor]], most: int) -> list[dict[str, list[Tensor]]]:
    """Share tensors out, in order, to files of at most ``most`` bytes."""
    groups: list[dict[str, list[Tensor]]] = [{}]
    room = most
    for name, views in tensors.items():
        if groups[-1] and _size(views) > room:
            groups.append({})
            room = most
        groups[-1][name] = views
        room -= _size(views)
    return groups


def _write_tensors(folder: Path, tensors: Mapping[str, list[Tensor]], most: int) -> None:
    """Write one file, or several and an index that says which tensor is where."""
    groups = _grouped(tensors, most)
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        path = folder / f"model{part}.safetensors"
        whole = {name: _joined(views) for name, views in group.items()}
        save_file(whole, path, metadata={"format": "pt"})
        _to_disk(path)
        where |= dict.fromkeys(group, path.name)
    if len(groups) > 1:
        total = sum(map(_size, tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _joined(views: list[Tensor]) -> Tensor:
    whole = views[0] if len(views) == 1 else torch.cat(views, dim=-1)
    return whole.detach().cpu().contiguous()


# %%
#| export
@contextmanager
def _new_version(folder: Path) -> Iterator[Path]:
    """Give a hidden directory to write into; at the end it takes the place of ``folder``.

    At every moment the old version or the new one is complete on the disk.
    """
    if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise ValueError(f"folder: expected a new one, an empty one or a model's, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    draft, old = (folder.with_name(f".{folder.name}.{part}-{mark}") for part in ("part", "old"))
    draft.mkdir()
    try:
        yield draft
        if folder.exists():
            _carry_over(folder, draft)
            folder.rename(old)
        draft.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(draft, ignore_errors=True)
    for part in ("part", "old"):  # with what runs that were killed have left
        for leftover in folder.parent.glob(f".{escape(folder.name)}.{part}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return (folder / "config.json").exists() or not any(folder.iterdir())


def _carry_over(folder: Path, draft: Path) -> None:
    """Copy what a model's folder has beside the model, such as its tokenizer."""
    for path in folder.iterdir():
        if path.suffix == ".safetensors" or path.name in _MODEL_FILES:
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, draft / path.name)


_MODEL_FILES = {"config.json", "model.safetensors.index.json"}

# %% [markdown]
# load


# %%
#| export
class _Stored(NamedTuple):
    """Where a tensor is on disk, and what it is."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_PLAIN_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; is this the folder of a model?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


# %%
#| export
def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model; an index may name nothing outside its folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        reason = f", and {pickles[0]} may run code when it is opened" if pickles else ""
        raise ValueError(f"{folder}: expected model.safetensors or its index{reason}")
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: weight_map: expected names of tensors and files, got {where!r}")
    for name in set(where.values()):
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{index}: expected the name of a .safetensors file, got {name!r}")
        if not (folder / name).exists():
            raise ValueError(f"{folder / name}: missing, but {index.name} names it")
    return [folder / name for name in sorted(set(where.values()))]


# %%
#| export
@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file: {error}") from None


_IGNORED = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # masks, frequencies


def _stored_tensors(paths: list[Path], family: str) -> dict[str, _Stored]:
    """Read the headers of all files: what is there, by the names that transformers writes now."""
    found: dict[str, _Stored] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                known = name
                if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
                    known = f"transformer.{name}"  # the first files had no prefix
                if _IGNORED.search(known):
                    continue
                if known in found:
                    raise ValueError(f"{path}: {name} is in {found[known].file.name}, too")
                found[known] = _Stored(path, name, tuple(header.get_shape()), header.get_dtype())
    return found


# %%
#| export
def _check_tensors(
    folder: Path, expected: dict[str, list[Tensor]], found: dict[str, _Stored]
) -> None:
    """Raise a ``ValueError`` that names what is missing, unexpected, or of another shape or type."""
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        shape, stored = _shape(expected[name]), found[name]
        if stored.shape != shape:
            faults.append(f"{name} has shape {stored.shape}, expected {shape}")
        if stored.dtype not in _DTYPES:
            faults.append(f"{name} has dtype {stored.dtype}, expected one of {', '.join(_DTYPES)}")
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{folder}: {'; '.join(sorted(faults)[:5])}{more}")


def _shape(views: list[Tensor]) -> tuple[int, ...]:
    *rows, _ = views[0].shape
    return (*rows, sum(view.size(-1) for view in views))


# %%
#| export
def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "torch",
) -> TransformerLM:
    """Return the model that is in ``folder``, ready to use (``eval``), of a known family.

    Only safetensors are read, one tensor after the other, so memory holds the model and one tensor.
    The ``dtype`` is that of the files unless given. A ``ValueError`` names whatever is wrong: an
    entry of the configuration, or a tensor that is missing, unexpected, or misshapen.
    """
    folder = Path(folder)
    family, config = _described(folder)
    found = _stored_tensors(_weight_files(folder), family)
    with torch.device("meta"):  # shapes without memory
        model = TransformerLM(config, backend)
    head = found.pop("lm_head.weight", None) if config.tie_embeddings else None
    _check_tensors(folder, _disk_tensors(model, family), found)
    model.to(dtype or _common_dtype(folder, found)).to_empty(device=device or "cpu")
    _tie(model)
    _fill(_disk_tensors(model, family), found)
    if head is not None:
        _check_tied(model, head)
    return model.eval()


# %%
#| export
def _described(folder: Path) -> tuple[str, ModelConfig]:
    path = folder / "config.json"
    entries = _read_json(path)
    try:
        return _config_from(entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _common_dtype(folder: Path, found: Mapping[str, _Stored]) -> torch.dtype:
    dtypes = {stored.dtype for stored in found.values()}
    if len(dtypes) > 1:
        raise ValueError(f"{folder}: several dtypes ({', '.join(sorted(dtypes))}): choose one")
    return _DTYPES[dtypes.pop()]


@torch.no_grad()
def _fill(tensors: Mapping[str, list[Tensor]], found: Mapping[str, _Stored]) -> None:
    """Copy each tensor from its file into the views that it is made of."""
    for path in sorted({stored.file for stored in found.values()}):
        with _opened(path) as file:
            for name, stored in found.items():
                if stored.file == path:
                    views = tensors[name]
                    parts = file.get_tensor(stored.name).split([v.size(-1) for v in views], dim=-1)
                    for view, part in zip(views, parts, strict=True):
                        view.copy_(part)


def _check_tied(model: TransformerLM, head: _Stored) -> None:
    """A file may have the tied matrix twice, but only if it is twice the same."""
    with _opened(head.file) as file:
        stored = file.get_tensor(head.name).to(model.embedding.weight)
    if not torch.equal(stored, model.embedding.weight):
        raise ValueError(f"{head.file}: {head.name} differs from the embedding it is tied to")
