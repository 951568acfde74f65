# %% [markdown]
# # The model
#
# > One class that is GPT-2, Llama, Qwen, Mistral or Mixtral, as its configuration says: built,
# > counted, saved, and opened from the files that the rest of the world uses.
#
# The parts lie on the table: embeddings and rotations, attention, the block. What is missing looks
# small. Put an embedding below a stack of blocks and a matrix above it, and you have a language
# model; we shall do it in twenty lines.
#
# Then somebody sends you the weights of a Llama, and you want to know what your model says with
# them. It says nonsense. Was it the order of the rotated pairs, the constant under a square root, a
# matrix that their file stores transposed? Nothing raised an error. A model is a function *and* a
# file format, and both are agreements with strangers. So this chapter sets a hard goal: the model
# that we build shall be *the same function* as those that the industry uses, to the last digits of
# a float, read their files, and write files that they read. And before we train anything, we shall
# know what it costs: parameters and operations to the digit, and bytes closely, all measured.
#
# | | |
# |---|---|
# | **Part** | II. Architecture |
# | **You build** | {py:class}`~llmbook.model.ModelConfig`, {py:class}`~llmbook.model.TransformerLM`, {py:func}`~llmbook.model.count_parameters`, {py:func}`~llmbook.model.flops_per_token`, {py:func}`~llmbook.model.activation_bytes`, {py:func}`~llmbook.model.training_memory`, {py:func}`~llmbook.model.cache_bytes` |
# | **You need** | positions ({doc}`08_positions`), attention ({doc}`09_attention`), blocks ({doc}`10_blocks`), tokens ({doc}`05_tokenizer`) |
# | **It takes** | 60 minutes for the main line, 2.5 hours for everything, 30 seconds to run |

# %% tags=["remove-cell"]
#| default_exp model

# %% tags=["engine"]
#| export
# The imports of the module that are not parts of the model
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
from typing import Any, NamedTuple, cast

from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# %% [markdown]
# These are the parts, from the last chapters. (A folded cell above imports the rest.)

# %%
#| export
import torch
from torch import Tensor, nn

from llmbook.attention import Backend, KVCache, MultiHeadAttention, attention_mask, causal_mask
from llmbook.batches import document_mask
from llmbook.blocks import GATES, ACTIVATIONS, FeedForward, LayerNorm, MixtureOfExperts
from llmbook.blocks import RMSNorm, TransformerBlock
from llmbook.blocks import default_d_ff, initialize_weights
from llmbook.environment import (
    check_at_least,
    check_choice,
    check_fraction,
    check_path,
    check_whole,
)
from llmbook.positions import LearnedEmbedding, RopeScaling, RotaryEmbedding, SinusoidalEmbedding

# %% [markdown]
# And this is what the model will read in this chapter, and what it will be held against:

# %%
import tempfile
import time
import warnings
from copy import deepcopy

import matplotlib.pyplot as plt
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llmbook.environment import seed_everything
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like a widget for its progress
    import transformers

plt.style.use("llmbook.book")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# %% [markdown]
# ## The smallest model
#
# A text becomes ids, by a tokenizer that we train on stories of the {term}`tiny world`:

# %%
stories = [story.text for story in TinyWorld().stories(2000, seed=0)]
tokenizer = train_bpe(stories, 512)
ids = torch.tensor([tokenizer.encode("Mia lives in the barn.")])
print([tokenizer.decode([token]) for token in ids[0].tolist()])
print(ids.tolist())

# %% [markdown]
# {numref}`fig-model-flow` shows what the model does with them. Each id picks its row of the
# embedding matrix. The ten vectors go through the blocks; each adds to them what attention has
# gathered from earlier places, and what a feed-forward network makes of it. A last normalization
# brings them to one scale. Then the **head**, a matrix with a row for each token of the vocabulary,
# turns each vector into $V$ scores, the {term}`logits`, and the softmax makes probabilities of
# them: at *each* place, for the token that comes next.
#
# ```{figure} ../figures/model-flow.svg
# :name: fig-model-flow
# :alt: From top to bottom: the text Mia lives in the barn, ten ids of shape 1 by 10, the embedding that makes vectors of shape 1 by 10 by 64, three blocks, a normalization, the head that makes logits of shape 1 by 10 by 512, and the softmax, below it the tokens shifted by one, which are to be predicted. Beside it one block is opened: normalization, attention with two heads of size 32 and ten by ten weights, plus; normalization, SwiGLU with an inner width of 176, plus.
#
# From text to probabilities of the next token, with the shapes of the preset `tiny`. The same
# shapes are printed below.
# ```


# %%
class SmallLM(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.rope = RotaryEmbedding(d_model // n_heads)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, MultiHeadAttention(d_model, n_heads), FeedForward(d_model))
            for _ in range(n_layers)
        )
        self.norm = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        rope = self.rope(torch.arange(ids.size(1))[None])
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, rope=rope)
        return self.lm_head(self.norm(x))


# %% [markdown]
# That is all of it: a Llama, in small. The cosines and sines are the same for all layers, so they
# are worked out once. To see what goes into each part and what comes out of it, we attach a hook to
# each, a function that PyTorch calls after the part has run.


# %%
def show_shapes(model: nn.Module, ids: Tensor) -> Tensor:
    def note(name: str):
        def hook(module, inputs, output) -> None:
            print(f"{name:31} {tuple(inputs[0].shape)!s:12} -> {tuple(output.shape)}")

        return hook

    shown = re.compile(r"embedding|blocks\.0(\.\w+)*|norm|lm_head")
    modules = [(name, part) for name, part in model.named_modules() if shown.fullmatch(name)]
    hooks = [module.register_forward_hook(note(name)) for name, module in modules]
    logits = model(ids)
    for hook in hooks:
        hook.remove()
    return logits


seed_everything(0)
small = SmallLM(tokenizer.vocab_size, d_model=64, n_layers=3, n_heads=2)
probabilities = show_shapes(small, ids).softmax(dim=-1)
sums = probabilities.sum(dim=-1)
assert (sums - 1).abs().max() < 1e-5
print(f"{sums.numel()} distributions over {probabilities.size(-1)} tokens, each with a sum of 1")

# %% [markdown]
# ## One class, many models
#
# What is published as GPT-2, Llama, Qwen, Mistral and Mixtral is this stack with other parts.
#
# | | positions | normalization | feed-forward | attention | head |
# |---|---|---|---|---|---|
# | GPT-2 {cite}`radford2019language` | learned | LayerNorm | GELU, biases | a key for each head | tied |
# | Llama 2, 3 {cite}`touvron2023llama2,grattafiori2024llama3` | RoPE, stretched from 3.1 on | RMSNorm | SwiGLU | grouped queries, in 2 only in the largest | own, small ones tied |
# | Qwen2.5 {cite}`qwen2024qwen25` | RoPE | RMSNorm | SwiGLU | grouped, biases on q, k, v | small ones tied |
# | Qwen3 {cite}`yang2025qwen3` | RoPE | RMSNorm | SwiGLU | grouped, q and k normalized | small ones tied |
# | Mistral {cite}`jiang2023mistral` | RoPE | RMSNorm | SwiGLU | grouped, sliding window | own |
# | Mixtral {cite}`jiang2024mixtral` | RoPE | RMSNorm | 8 SwiGLU experts, 2 active | grouped | own |
#
# So the model is one class, and a **configuration** says which parts, in which sizes. Six of its
# fields follow from others unless they are given. They have a mark in place of a default:

# %%
#| export
_DERIVED: Any = None  # the default of a field that follows from others


# %% [markdown]
# In the class itself, `context_length` and `sliding_window` count tokens. The checks that the
# docstring promises are in the room below.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a ``TransformerLM`` is: every size and every choice, checked.

    What is left out follows from the rest: ``n_kv_heads`` is ``n_heads``, ``d_head`` is
    ``d_model / n_heads``, ``d_rope`` is ``d_head``, ``d_ff`` is ``default_d_ff``, ``qkv_bias`` is
    ``bias``, and so is ``norm_bias`` where the norm is "layernorm". What no model can be raises a
    ``ValueError`` that names the field, its value and what was expected.
    """

    vocab_size: int
    context_length: int  # the longest sequence
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = _DERIVED  # n_heads
    d_head: int = _DERIVED  # d_model / n_heads
    d_ff: int = _DERIVED  # default_d_ff; with experts, the width of one
    n_experts: int = 0
    n_active_experts: int = 0  # of n_experts, for each token
    d_shared: int = 0  # the width of an expert that all tokens use
    normalize_experts: bool = True  # weights of a token's active experts sum to one
    positions: str = "rope"  # or learned, sinusoidal, none
    rope_base: int | float = 10_000.0
    rope_scaling: RopeScaling | None = None
    layout: str = "half"  # of the pairs that are rotated; or interleaved
    d_rope: int = _DERIVED  # d_head; how many numbers of each head are rotated
    norm: str = "rmsnorm"  # or layernorm
    norm_eps: int | float = 1e-5
    norm_position: str = "pre"  # or post
    activation: str = "swiglu"  # or another of llmbook.blocks.ACTIVATIONS
    bias: bool = False  # of linear layers, but for router and head
    qkv_bias: bool = _DERIVED  # bias
    norm_bias: bool = _DERIVED  # bias, for layernorm only
    qk_norm: bool = False
    sliding_window: int | None = None  # how far attention sees, the token itself included
    tie_embeddings: bool = False
    dropout: int | float = 0.0

    def __post_init__(self) -> None:
        self._derive()

    def _derive(self) -> None:
        derived = {
            "n_kv_heads": self.n_heads,
            "d_head": self.d_model // self.n_heads,
            "d_rope": self.d_head or self.d_model // self.n_heads,
            "d_ff": default_d_ff(self.d_model, self.activation),
            "qkv_bias": self.bias,
            "norm_bias": self.bias and self.norm == "layernorm",
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen, but not yet finished


# %% [markdown]
# Nobody wants to type twenty-eight fields, and known models need not be typed twice. So a class
# method makes a configuration from a name, with any fields changed, and two others turn it into a
# dictionary, which a file can hold, and back. (The class is long, so it is *continued* in another
# cell; {doc}`00_environment` explains how that works.)


# %%
#| export
class ModelConfig(ModelConfig):  # continued
    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """Return the configuration of a known model, one of ``PRESETS``, with fields changed."""
        check_choice("name", name, tuple(PRESETS))
        return cls.from_dict(PRESETS[name] | changes)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "ModelConfig":
        """Return the configuration with these fields."""
        return cls(**entries)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as numbers, texts and dictionaries, fit for JSON."""
        return asdict(self)


# %% [markdown]
# Here are three: one that trains in a minute on a laptop, the smallest GPT-2, and a Llama. The room
# below adds eleven more, such as `llama2-7b` and `mixtral-8x7b`, which we shall count later.

# %%
#| export
_SIZES = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
#: The fields of known models by name, for ``ModelConfig.preset``.
PRESETS: dict[str, dict[str, Any]] = {}


def _add_preset(name: str, *sizes: int, **choices: Any) -> None:
    PRESETS[name] = {**dict(zip(_SIZES, sizes, strict=False)), **choices}


_OLD = {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True}
_OLD |= {"tie_embeddings": True, "dropout": 0.1}
_LLAMA3 = {"rope_base": 500_000.0}
_add_preset("tiny", 512, 128, 64, 3, 2)
_add_preset("gpt2", 50_257, 1024, 768, 12, 12, **_OLD)
_add_preset("llama3-8b", 128_256, 8192, 4096, 32, 32, 8, 14_336, **_LLAMA3)

# %% [markdown]
# What was left out has been filled in:

# %%
for name in PRESETS:
    config = ModelConfig.preset(name)
    heads = f"{config.n_heads} heads of {config.d_head} on {config.n_kv_heads} of keys"
    print(f"{name:10} {config.n_layers} layers, {heads}, feed-forward width {config.d_ff:,}")

# %% [markdown] tags=["engine"]
# ### Engine room: what no model can be is refused, and more models are known by name

# %% [markdown] tags=["engine"]
# A configuration comes from a file, or from somebody in a hurry, and most combinations of 28 fields
# are no model at all. So it is checked once, where it is made: these versions of the methods
# replace the simple ones above. First, is each value of its type? JSON may hold anything, and in
# Python `True` is a whole number.


# %% tags=["engine"]
#| export
class ModelConfig(ModelConfig):  # continued
    def __post_init__(self) -> None:
        _check_types(vars(self))
        self._check_what_others_need()
        self._derive()
        self._check_together()
        self._check_positions()
        self._check_experts()

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "ModelConfig":
        """Return the configuration with these fields; the inverse of ``to_dict``."""
        return cls(**_checked_entries(entries))


def _check_types(entries: Mapping[str, Any]) -> None:
    for field in fields(ModelConfig):
        value, kind = entries.get(field.name, field.default), cast(type, field.type)
        if value is None and field.default is None:
            continue
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            name = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{field.name}: expected {name}, got {value!r}")


# %% [markdown] tags=["engine"]
# A dictionary may have fields that are unknown or missing, and a field of `null` counts as left
# out.

# %% tags=["engine"]
#| export
_REQUIRED = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads")


def _checked_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries as arguments of ``ModelConfig``; what is unknown or missing is named."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"entries: expected a mapping of fields, got {entries!r:.60}")
    given = {name: value for name, value in entries.items() if value is not None}
    if unknown := sorted(map(str, set(given) - {field.name for field in fields(ModelConfig)})):
        raise ValueError(f"{unknown[0]}: not a field of ModelConfig")
    if missing := [name for name in _REQUIRED if name not in given]:
        raise ValueError(f"{missing[0]}: expected a number, but it is missing")
    if isinstance(given.get("rope_scaling"), Mapping):
        try:
            given["rope_scaling"] = RopeScaling(**given["rope_scaling"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"rope_scaling: {error}") from None
    _check_types(given)  # a checker of annotations would look before __post_init__ does
    return given


# %% [markdown] tags=["engine"]
# Then come the sizes from which others are derived, and, once those are there, what cannot go
# together.


# %% tags=["engine"]
#| export
class ModelConfig(ModelConfig):  # continued
    def _check_what_others_need(self) -> None:
        check_at_least(**{name: (1, getattr(self, name)) for name in _REQUIRED})
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.d_head is None and self.d_model % self.n_heads:
            expected = f"a divisor of d_model = {self.d_model}, unless d_head is given"
            raise ValueError(f"n_heads: expected {expected}, got {self.n_heads}")

    def _check_together(self) -> None:
        sizes = {name: (1, getattr(self, name)) for name in ("n_kv_heads", "d_head", "d_ff")}
        check_at_least(**sizes, sliding_window=(1, self.sliding_window))
        if self.n_heads % self.n_kv_heads:
            expected = f"a divisor of n_heads = {self.n_heads}"
            raise ValueError(f"n_kv_heads: expected {expected}, got {self.n_kv_heads}")
        check_choice("positions", self.positions, ("rope", "learned", "sinusoidal", "none"))
        check_choice("norm", self.norm, ("rmsnorm", "layernorm"))
        if self.norm_bias and self.norm == "rmsnorm":
            raise ValueError("norm_bias: expected False for 'rmsnorm', which has none, got True")
        check_choice("norm_position", self.norm_position, ("pre", "post"))
        check_fraction("dropout", self.dropout)
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps: expected a small positive number, got {self.norm_eps}")


# %% [markdown] tags=["engine"]
# Positions and experts have conditions of their own.


# %% tags=["engine"]
#| export
class ModelConfig(ModelConfig):  # continued
    def _check_positions(self) -> None:
        kind = self.positions
        rotated = "d_head" if self.d_rope == self.d_head else "d_rope"
        for name, needed in ((rotated, kind == "rope"), ("d_model", kind == "sinusoidal")):
            if needed and getattr(self, name) % 2:
                value = getattr(self, name)
                raise ValueError(f"{name}: expected an even number for {kind!r}, got {value}")
        self._check_rotations()
        if not 1 < self.rope_base < 1e30:  # angles are of 32 bits
            raise ValueError(f"rope_base: expected a number above 1, got {self.rope_base}")
        if self.rope_scaling is not None and kind != "rope":
            expected = f"None where positions are {kind!r}"
            raise ValueError(f"rope_scaling: expected {expected}, got {self.rope_scaling}")

    def _check_rotations(self) -> None:
        check_choice("layout", self.layout, ("half", "interleaved"))
        least = 1 if self.positions == "rope" else self.d_head  # elsewhere nothing is rotated
        if not least <= self.d_rope <= self.d_head:
            expected = f"{least} to d_head = {self.d_head} where positions are {self.positions!r}"
            raise ValueError(f"d_rope: expected {expected}, got {self.d_rope}")
        if self.layout != "half" and self.positions != "rope":
            expected = f"half where positions are {self.positions!r}"
            raise ValueError(f"layout: expected {expected}, got {self.layout!r}")
        kind = None if self.rope_scaling is None else self.rope_scaling.kind
        if kind in ("ntk", "dynamic") and self.d_rope < 4:
            raise ValueError(f"d_rope: expected at least 4 for {kind!r}, got {self.d_rope}")

    def _check_experts(self) -> None:
        check_at_least(n_experts=(0, self.n_experts), d_shared=(0, self.d_shared))
        least = 1 if self.n_experts else 0
        if not least <= self.n_active_experts <= self.n_experts:
            expected = f"{least} to n_experts = {self.n_experts}"
            raise ValueError(f"n_active_experts: expected {expected}, got {self.n_active_experts}")
        if self.d_shared and not self.n_experts:
            raise ValueError(f"d_shared: expected 0 without experts, got {self.d_shared}")
        if self.n_experts and self.bias:
            raise ValueError("bias: expected False with experts, which have none, got True")
        if not self.n_experts and not self.normalize_experts:
            raise ValueError("normalize_experts: expected True without experts, got False")


# %% [markdown] tags=["engine"]
# Each of these refusals says in words what is impossible:

# %% tags=["engine"]
wrong = {
    "heads that do not share": {"n_heads": 4, "n_kv_heads": 3},
    "pairs of an odd head": {"n_heads": 2, "d_head": 15},
    "more active than there are": {"n_experts": 4, "n_active_experts": 5},
    "a text for a number": {"n_layers": "3"},
    "a norm that nobody knows": {"norm": "batchnorm"},
    "a typing error": {"n_head": 4},
}
for what, changes in wrong.items():
    try:
        ModelConfig.preset("tiny", **changes)
    except ValueError as error:
        print(f"{what:27} {error}")

# %% [markdown] tags=["engine"]
# More published configurations are kept under their names. They serve as examples, and as tests: we
# know how many parameters each must have.

# %% tags=["engine"]
#| export
_LLAMA31, _LLAMA32 = (
    _LLAMA3 | {"rope_scaling": RopeScaling("llama3", factor, original_context_length=8192)}
    for factor in (8.0, 32.0)
)
_QWEN = {"rope_base": 1_000_000.0, "norm_eps": 1e-6, "tie_embeddings": True}
_add_preset("gpt2-medium", 50_257, 1024, 1024, 24, 16, **_OLD)
_add_preset("gpt2-large", 50_257, 1024, 1280, 36, 20, **_OLD)
_add_preset("gpt2-xl", 50_257, 1024, 1600, 48, 25, **_OLD)
_add_preset("llama2-7b", 32_000, 4096, 4096, 32, 32, 32, 11_008)
_add_preset("llama3-70b", 128_256, 8192, 8192, 80, 64, 8, 28_672, **_LLAMA3)
_add_preset("llama3.1-8b", 128_256, 131_072, 4096, 32, 32, 8, 14_336, **_LLAMA31)
_add_preset("llama3.2-1b", 128_256, 131_072, 2048, 16, 32, 8, 8192, **_LLAMA32, tie_embeddings=True)
_add_preset("qwen2.5-0.5b", 151_936, 32_768, 896, 24, 14, 2, 4864, **_QWEN, qkv_bias=True)
_add_preset("qwen3-0.6b", 151_936, 40_960, 1024, 28, 16, 8, 3072, **_QWEN, d_head=128, qk_norm=True)
_add_preset("mistral-7b", 32_000, 32_768, 4096, 32, 32, 8, 14_336, sliding_window=4096)
_EXPERTS = {"n_experts": 8, "n_active_experts": 2, "rope_base": 1_000_000.0}
_add_preset("mixtral-8x7b", 32_000, 32_768, 4096, 32, 32, 8, 14_336, **_EXPERTS)

# %% [markdown]
# ### The model
#
# It comes in two steps, because not everybody wants a head: a reward model reads the last vectors
# (chapter 21), and a long batch may want its logits in pieces (an exercise below). This is the
# first step. It reads like the small model, but each part is made as the configuration says, and
# the input is checked, and may be packed, padded or continued. (The functions that make the parts
# and check the input are in the room below.)


# %%
#| export
class Transformer(nn.Module):
    """From token ids to one vector for each token: everything but the head."""

    def __init__(self, config: ModelConfig, backend: Backend = "torch"):
        super().__init__()
        _check_model(config, backend)
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
        """Return the vectors that the head reads.

        Positions count from 0, in each document if there are ``document_ids``, or go on from the
        ``cache``. A position of -1 is padding: nothing attends to it.
        """
        _check_input(self.config, ids, position_ids, document_ids, cache)
        x = _embedded(self.embedding, ids)
        positions, mask = _positions_and_mask(self.config, ids, position_ids, document_ids, cache)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        rope = None if self.rope is None else self.rope(positions)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope=rope, mask=mask, cache=None if cache is None else cache[layer])
        return self.norm(x)

    def balance_loss(self) -> Float[Tensor, ""]:
        """Return the balance losses of the last pass, summed over blocks with experts, else 0."""
        losses = [m.balance_loss for m in self.modules() if isinstance(m, MixtureOfExperts)]
        return torch.stack(losses).sum() if losses else self.embedding.weight.new_zeros(())


# %% [markdown]
# **Where does each token stand, and what may it see?** Most batches are rectangles full of text.
# Then positions count from 0, and there is no mask at all: attention that is told to be causal
# uses its fast kernel. Four things can be different. With a {term}`cache <KV cache>` the sequence
# goes on where it stopped, and the cache knows where. A sliding window hides what is too far back.
# **Document ids**, as {doc}`07_batches` packs them, hide other documents, and positions begin anew
# in each. And **position ids** may be given: where a row has padding, marked by -1, they say what
# comes before what. For packed rows they are not enough, since position 2 of one document would
# see position 1 of another.


# %%
#| export
def _positions_and_mask(
    config: ModelConfig,
    ids: Int64[Tensor, "batch sequence"],
    position_ids: Int64[Tensor, "#batch sequence"] | None,
    document_ids: Int64[Tensor, "batch sequence"] | None,
    cache: KVCache | None,
) -> tuple[Int64[Tensor, "#batch sequence"], Bool[Tensor, "..."] | None]:
    """Return where each token stands and what it may attend to; no mask means the causal one."""
    sequence, window = ids.size(1), config.sliding_window
    if cache is not None:
        positions = cache.next_positions(sequence) if position_ids is None else position_ids
        return positions, cache.extend(sequence if position_ids is None else position_ids)
    if document_ids is not None:
        positions = _places_in_documents(document_ids) if position_ids is None else position_ids
        mask = document_mask(document_ids)
        if window is not None:
            mask = mask & causal_mask(sequence, window, ids.device)
        return positions, mask
    if position_ids is not None:
        return position_ids, attention_mask(position_ids, position_ids, window)
    places = torch.arange(sequence, device=ids.device)[None]
    cut = window is not None and sequence > window
    return places, causal_mask(sequence, window, ids.device) if cut else None


# %% [markdown]
# To count anew in each document, note where documents begin; the latest beginning so far is a
# running maximum, and the place in the document is the distance from it.


# %%
#| export
def _places_in_documents(
    document_ids: Int64[Tensor, "batch sequence"],
) -> Int64[Tensor, "batch sequence"]:
    """Count from 0 in each run of equal ids."""
    places = torch.arange(document_ids.size(1), device=document_ids.device)
    begins = document_ids != document_ids.roll(1, dims=1)
    begins[:, 0] = True
    return places - torch.where(begins, places, 0).cummax(dim=1).values


# %% [markdown]
# The second step adds the head. If the embedding is **tied** to it, both are one matrix.


# %%
#| export
class TransformerLM(Transformer):
    """A language model: from token ids to the logits of the next token, at every position."""

    def __init__(self, config: ModelConfig, backend: Backend = "torch"):
        super().__init__(config, backend)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._tie()  # first: a table that also makes logits is drawn differently
        initialize_weights(self, config.n_layers)

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(
        self,
        ids: Int64[Tensor, "batch sequence"],
        *,
        position_ids: Int64[Tensor, "#batch sequence"] | None = None,
        document_ids: Int64[Tensor, "batch sequence"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch sequence vocab_size"]:
        """Return logits; the arguments are those of ``hidden_states``."""
        given = {"position_ids": position_ids, "document_ids": document_ids}
        return self.lm_head(self.hidden_states(ids, cache=cache, **given))


# %% [markdown] tags=["engine"]
# ### Engine room: parts are made, input is checked, a cache is sized; saving becomes a method

# %% [markdown] tags=["engine"]
# From the configuration follow the parts, each by a function that a reader of the last three
# chapters can write. Where blocks normalize *after* adding, the last one has done so already, and
# nothing is left to do before the head.


# %% tags=["engine"]
#| export
def _norm(config: ModelConfig, backend: Backend) -> Callable[[int], nn.Module]:
    """Return what makes a normalization of a given width."""
    if config.norm == "layernorm":
        return partial(LayerNorm, eps=config.norm_eps, bias=config.norm_bias, backend=backend)
    return partial(RMSNorm, eps=config.norm_eps, backend=backend)


def _last_norm(config: ModelConfig, backend: Backend) -> nn.Module:
    post = config.norm_position == "post"
    return nn.Identity() if post else _norm(config, backend)(config.d_model)


def _attention(config: ModelConfig, backend: Backend) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.d_model,
        config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_head=config.d_head,
        bias=config.qkv_bias,
        output_bias=config.bias,
        qk_norm=_norm(config, backend) if config.qk_norm else None,
        dropout=config.dropout,
        layout="interleaved" if config.layout == "interleaved" else "half",
        d_rope=config.d_rope if config.positions == "rope" else None,
        backend=backend,
    )


# %% [markdown] tags=["engine"]
# A block has attention and either one feed-forward network or several experts. Positions are added
# to the embedding, or rotate queries and keys, or neither.


# %% tags=["engine"]
#| export
def _feed_forward(config: ModelConfig) -> FeedForward | MixtureOfExperts:
    sizes, activation = (config.d_model, config.d_ff), config.activation
    if not config.n_experts:
        return FeedForward(*sizes, activation=activation, bias=config.bias)
    experts = config.n_experts, config.n_active_experts
    options: dict[str, Any] = {"activation": activation, "d_shared": config.d_shared}
    return MixtureOfExperts(*sizes, *experts, **options, normalize=config.normalize_experts)


def _block(config: ModelConfig, backend: Backend) -> TransformerBlock:
    return TransformerBlock(
        config.d_model,
        _attention(config, backend),
        _feed_forward(config),
        norm=_norm(config, backend),
        norm_position="post" if config.norm_position == "post" else "pre",
        dropout=config.dropout,
    )


def _absolute(config: ModelConfig) -> LearnedEmbedding | SinusoidalEmbedding | None:
    if config.positions == "learned":
        return LearnedEmbedding(config.context_length, config.d_model)
    return SinusoidalEmbedding(config.d_model) if config.positions == "sinusoidal" else None


def _rotary(config: ModelConfig) -> RotaryEmbedding | None:
    rope = config.positions == "rope"
    return RotaryEmbedding(config.d_rope, config.rope_base, config.rope_scaling) if rope else None


# %% [markdown] tags=["engine"]
# What can be wrong with the input? A GPU works behind our back: it takes an order and answers
# later. Whoever looks at a value, be it only to check it, waits until everything ordered before is
# done. So we check what is known without looking, types and shapes. Ids out of range raise an
# error in the embedding on a CPU, which we translate; on a GPU its kernel stops the program. A
# configuration, first of all, is one:


# %% tags=["engine"]
#| export
def _check_config(name: str, config: Any) -> None:
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{name}: expected a ModelConfig, got {config!r:.60}")


def _check_model(config: Any, backend: Any) -> None:
    _check_config("config", config)
    check_choice("backend", backend, ("reference", "torch"))


def _described_tensor(given: Any) -> str:
    is_tensor = isinstance(given, Tensor)
    return f"{tuple(given.shape)} of {given.dtype}" if is_tensor else f"{given!r:.60}"


# %% [markdown] tags=["engine"]
# Then the input, where a token's position may be the same for all rows:


# %% tags=["engine"]
#| export
def _check_input(
    config: ModelConfig,
    ids: Any,
    position_ids: Any,
    document_ids: Any,
    cache: KVCache | None,
) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2:
        got = _described_tensor(ids)
        raise ValueError(f"ids: expected (batch, sequence) of torch.int64, got {got}")
    if not 0 < ids.size(1) <= config.context_length:
        expected = f"1 to context_length = {config.context_length} tokens"
        raise ValueError(f"ids: expected {expected}, got {ids.size(1)}")
    if not len(ids):
        raise ValueError(f"ids: expected at least one row, got shape {tuple(ids.shape)}")
    for name, given in (("position_ids", position_ids), ("document_ids", document_ids)):
        if given is None:
            continue
        shapes = [ids.shape, (1, ids.size(1))] if name == "position_ids" else [ids.shape]
        integers = isinstance(given, Tensor) and given.dtype == torch.int64
        if not integers or given.shape not in shapes:
            got = _described_tensor(given)
            raise ValueError(f"{name}: expected {tuple(ids.shape)} of torch.int64, got {got}")
    if cache is not None and document_ids is not None:
        raise ValueError("document_ids: expected None with a cache, which has one text in a row")
    if cache is not None:
        _check_cache(config, len(ids), cache)
    if position_ids is not None and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        least = int(position_ids.min())
        if least < -1:
            raise ValueError(f"position_ids: expected at least -1, for padding, got {least}")


# %% [markdown] tags=["engine"]
# A cache that was made for another model, or for another number of rows, is one as well:


# %% tags=["engine"]
#| export
def _check_cache(config: ModelConfig, rows: int, cache: Any) -> None:
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache: expected a KVCache, as new_cache makes, got {cache!r:.60}")
    try:
        shape = cache[config.n_layers - 1].keys.shape
    except IndexError:
        raise ValueError(f"cache: expected {config.n_layers} layers, got fewer") from None
    sizes, got = (rows, config.n_kv_heads, config.d_head), (shape[0], shape[1], shape[3])
    if sizes != got:
        raise ValueError(f"cache: expected (rows, n_kv_heads, d_head) of {sizes}, got {got}")


# %% [markdown] tags=["engine"]
# Sizes of batches are whole numbers, and are given:


# %% tags=["engine"]
#| export
def _check_counts(least: int = 1, /, **counts: Any) -> None:
    """Demand whole numbers of at least so much."""
    for name, count in counts.items():
        check_whole(name, count, least)


def _check_batch(config: Any, dtype: Any, **counts: Any) -> None:
    """Check what the memory of a batch is computed from."""
    _check_config("config", config)
    _check_counts(**counts)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected a torch.dtype, got {dtype!r}")


# %% [markdown] tags=["engine"]
# An id beyond the vocabulary has no row in the table. PyTorch's message does not say which id:


# %% tags=["engine"]
#| export
def _embedded(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Return the row of each id; a ``ValueError`` tells of ids that have none."""
    try:
        return embedding(ids)
    except IndexError:
        expected = f"0 to {embedding.num_embeddings - 1}"
        got = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"ids: expected {expected}, got {got}") from None


# %% [markdown] tags=["engine"]
# A cache has the sizes of the model, on its device and in its type. Saving and loading are for
# later in this chapter; here they get their usual places as methods.


# %% tags=["engine"]
#| export
class TransformerLM(TransformerLM):  # continued
    def new_cache(self, batch_size: int, capacity: int | None = None, spare: int = 0) -> KVCache:
        """Return an empty cache for rows of ``capacity`` tokens, by default ``context_length``."""
        config, weight = self.config, self.embedding.weight
        _check_counts(batch_size=batch_size)
        _check_counts(0, spare=spare)
        check_at_least(capacity=(1, capacity))
        capacity = config.context_length if capacity is None else capacity
        if capacity > config.context_length:
            expected = f"at most context_length = {config.context_length}"
            raise ValueError(f"capacity: expected {expected}, got {capacity}")
        sizes = (batch_size, capacity, config.n_kv_heads, config.d_head)
        kept: dict[str, Any] = {"n_layers": config.n_layers, "window": config.sliding_window}
        return KVCache(*sizes, **kept, spare=spare, dtype=weight.dtype, device=weight.device)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the model to ``folder``; the options are those of ``save_model``."""
        save_model(self, folder, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "TransformerLM":
        """Return the model in ``folder``; the options are those of ``load_model``."""
        return load_model(folder, **options)


# %% [markdown]
# ### Is it still the small one?
#
# The parts of the general model have the same names as those of the small one, so one takes the
# weights of the other, and must give the same logits.

# %%
tiny = TransformerLM(ModelConfig.preset("tiny"))
tiny.load_state_dict(small.state_dict())
with torch.no_grad():
    logits, expected = tiny(ids), small(ids)
assert torch.equal(logits, expected)
print(f"the same {logits.numel():,} logits, from {logits.min():.1f} to {logits.max():.1f}")

# %% [markdown]
# ## Does it do what it should?
#
# ### Before training it knows nothing
#
# A model that knows nothing gives each token probability $1/V$, and loses $\ln V$ nats on every
# one. Ours should be close to that, but not at it. The head reads vectors $y$ that the last
# normalization has brought to a mean square of one, so $\lVert y \rVert^2 = d$, with $d$ for
# `d_model`. The rows $w_v$ of the head are drawn with variance $1/d$ ({doc}`10_blocks`), so the
# logits $z_v = \langle w_v, y \rangle$ are normal with variance
# $\sigma^2 = \lVert y \rVert^2 / d = 1$. The loss is $\ln \sum_v e^{z_v} - z_\text{target}$. The
# target's logit is zero on average. The sum has $V$ terms, whose mean is
# $\mathbb{E}[e^z] = e^{\sigma^2/2}$. So, for large $V$,
#
# $$
# L_0 \approx \ln\!\left(V e^{\sigma^2/2}\right) = \ln V + \frac{\sigma^2}{2} = \ln V + \frac12 .
# $$ (model-initial-loss)

# %%
seed_everything(0)
lm = TransformerLM(ModelConfig.preset("tiny", d_model=256, n_heads=4, vocab_size=4096))
random_ids = torch.randint(4096, (8, 129))
inputs, targets = random_ids[:, :-1], random_ids[:, 1:]
with torch.no_grad():
    loss = F.cross_entropy(lm(inputs).flatten(0, 1), targets.flatten()).item()
print(f"ln V = {math.log(4096):.2f}, expected {math.log(4096) + 0.5:.2f}, measured {loss:.2f}")

# %% [markdown]
# A first loss far above this says that logits are too large. It cannot be far below $\ln V$, since
# a new model knows nothing of the targets, unless these are the inputs themselves: a shift was
# forgotten, and the head is tied (see below). A model that *learns* to cheat is found by the next
# check.
#
# ### Who influences whom?
#
# The worst fault that a language model can have is to see the token that it shall predict. It
# lowers the loss wonderfully. To find it we need not read the code: we change one token and look
# which outputs move ({numref}`fig-model-influence`). A batch whose row $j$ has another token at
# place $j$ tells everything at once.


# %%
def influence(model: TransformerLM, ids: Tensor, **options) -> Tensor:
    n = ids.size(1)
    changed = ids.repeat(n, 1)
    changed.diagonal().copy_((changed.diagonal() + 1) % model.config.vocab_size)
    with torch.no_grad():
        before = model(ids, **options)
        after = model(changed, **{name: x.repeat(n, 1) for name, x in options.items()})
    return (after - before).abs().amax(dim=-1).T  # [place of the output, place of the change]


row = torch.randint(512, (1, 24))
documents = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5])
narrow = TransformerLM(ModelConfig.preset("tiny", sliding_window=4))
narrow.load_state_dict(tiny.state_dict())
maps = {
    "causal": influence(tiny, row),
    "window of 4": influence(narrow, row),
    "three documents": influence(tiny, row, document_ids=documents),
}
for name, moved in maps.items():
    reach = max(int((moved[i, : i + 1] > 0).sum()) for i in range(24))
    future = moved.triu(1).count_nonzero()
    print(f"{name:15} {future} of {24 * 23 // 2} outputs moved by a later token, reach {reach}")

# %% [markdown]
# A map shows how far, not only whether, each output moves:

# %% mystnb={"figure": {"caption": "How far each output moves (rows) when one token is changed (columns), in a model of three layers: logarithm of the largest change of a logit. Above the diagonal nothing moves.", "name": "fig-model-influence"}, "image": {"alt": "Three square maps over 24 places. Causal: the whole lower triangle is filled, with the strongest changes on the diagonal. A window of 4: a band below the diagonal, ten places wide. Three documents: three separate triangles of 7, 12 and 5 places along the diagonal."}}
figure, axes = plt.subplots(1, 3, figsize=(7, 2.7), sharey=True)
for ax, (name, moved) in zip(axes, maps.items(), strict=True):
    ax.imshow(moved.log10(), cmap="Blues", vmin=-4, vmax=1)
    ax.set(title=name, xlabel="changed token")
    ax.grid(False)
axes[0].set_ylabel("output")
plt.show()

# %% [markdown]
# The map of the window shows something that the word does not say. In each layer a token sees
# itself and three before; but what it sees has itself seen three more. Through $n$ layers with
# window $w$ a token reaches $1 + n (w - 1)$ places: ten here, as measured, and in Mistral 131,041,
# which is the point of its design {cite}`jiang2023mistral`. The colors also say that what comes by
# such detours is faint.
#
# ### Packed rows and caches
#
# Two ways to compute the same thing in pieces must not change it. Documents that share a row must
# get the logits that each would get alone. And a text that is read bit by bit, with a cache, must
# get those of the whole. The second is tried on rows of unequal lengths, the shorter padded on the
# left as one does to generate in batches; `new_cache` makes a cache with the sizes of the model. We
# compare in 64 bits, where rounding is far too small to be taken for a fault, or to hide one. First
# three documents in one row:

# %%
exact = deepcopy(tiny).double()
bounds = [(0, 7), (7, 19), (19, 24)]
with torch.no_grad():
    together = exact(row, document_ids=documents)
    alone = torch.cat([exact(row[:, a:b]) for a, b in bounds], dim=1)
assert torch.allclose(together, alone, rtol=0, atol=1e-9)
print(f"together and alone: {alone.numel():,} logits, apart by less than 1e-9")

# %% [markdown]
# Then two rows, of 20 and 15 tokens. A first part of 12 columns is read at once, the last eight
# one by one:

# %%
two = torch.randint(512, (2, 20))
cache = exact.new_cache(batch_size=2, capacity=32)
position_ids = torch.arange(12).expand(2, 12) - torch.tensor([[0], [5]])  # 5 of padding
with torch.no_grad():
    pieces = [exact(two[:, :12], position_ids=position_ids.clamp(min=-1), cache=cache)]
    pieces += [exact(two[:, i : i + 1], cache=cache) for i in range(12, 20)]
    stepwise, whole = torch.cat(pieces, dim=1), (exact(two), exact(two[1:, 5:]))
for what, one, other in (
    ("a long row, in pieces and whole:", stepwise[0], whole[0][0]),
    ("a short row, padded and not:    ", stepwise[1, 5:], whole[1][0]),
):
    assert torch.allclose(one, other, rtol=0, atol=1e-9)
    print(f"{what} {one.numel():,} logits, apart by less than 1e-9")

# %% [markdown]
# ### It learns
#
# Training is a matter for the chapters 12 and 13. But one thing can be asked of any model at once:
# to learn sixteen rows by heart ({numref}`fig-model-overfit`). What cannot do that has a fault, or
# a learning rate that is off.

# %%
rows = [tokenizer.encode(story) for story in stories[:16]]
length = min(map(len, rows))
batch = torch.tensor([row[:length] for row in rows])
seed_everything(0)
pupil = TransformerLM(ModelConfig.preset("tiny"))
optimizer = torch.optim.AdamW(pupil.parameters(), lr=3e-3)
losses = []
for _ in range(60):
    logits = pupil(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.1
print(f"first loss {losses[0]:.1f} nats a token; after {len(losses)} steps below 0.1")

# %% [markdown]
# From knowing nothing to knowing by heart:

# %% mystnb={"figure": {"caption": "Sixteen stories, learned by heart in sixty steps.", "name": "fig-model-overfit"}, "image": {"alt": "The loss over 60 steps on a logarithmic axis. It begins a little above a dashed line at ln V, 6.2 nats, and falls to below 0.1."}}
plt.semilogy(losses)
plt.axhline(math.log(512), color="gray", linestyle="--")
plt.text(60, math.log(512) * 0.94, "ln V", ha="right", va="top", color="gray")
plt.xlabel("step")
plt.ylabel("loss (nats per token)")
plt.show()

# %% [markdown]
# ## One matrix or two
#
# The embedding has a row for each token, and so has the head. The same size, $V \times d$: may it
# be the same matrix? In GPT-2 and in most small models it is. Press and Wolf
# {cite}`press2017output` and Inan and colleagues {cite}`inan2017tying` found such models better,
# not just smaller, and the idea is plausible. The head scores a token by
# $z_v = \langle w_v, y \rangle$; two tokens that fit in the same places need similar rows $w_v$.
# Two tokens that mean the same to what follows need similar embeddings. Mostly these are the same
# pairs of tokens, and where they are rare, one matrix learns from twice the evidence.
#
# What is the gradient of a matrix that is used twice? Write the loss as
# $\ell(E_\text{in}, E_\text{out})$, a function of the embedding and of the head, and let both be
# $E$. By the chain rule
#
# $$
# \frac{\partial\, \ell(E, E)}{\partial E}
#   = \frac{\partial \ell}{\partial E_\text{in}}\bigg|_{E, E}
#   + \frac{\partial \ell}{\partial E_\text{out}}\bigg|_{E, E} .
# $$ (model-tied)
#
# The two parts are of different kinds. The embedding gets a gradient only in rows of tokens that
# were in the input. The head gets one in all rows: every token that was not the answer is pushed
# away.

# %%
seed_everything(0)
tied = TransformerLM(ModelConfig.preset("tiny", tie_embeddings=True)).double()
apart = TransformerLM(ModelConfig.preset("tiny")).double()
apart.load_state_dict(tied.state_dict())  # the same function, but two matrices
for model in (tied, apart):
    logits = model(batch[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
parts = [apart.embedding.weight.grad, apart.lm_head.weight.grad]
error = (tied.embedding.weight.grad - sum(parts)).abs().max().item()
assert error < 1e-9
print("the gradient and the sum of the two are apart by less than 1e-9")
touched = [int(part.any(dim=1).sum()) for part in parts]
print(f"of 512 rows, the embedding gets a gradient in {touched[0]}, the head in {touched[1]}")
print("different tokens in the batch:", len(batch[:, :-1].unique()))

# %% [markdown]
# A tied model has a habit that training must break first. Before training the stream is mostly the
# embedding that went in, so the head reads a vector $y$ of length $\sqrt d$ that points nearly
# along the token's own row of $E$, whose length is about 1. The logit of the token itself is then
# almost $\sqrt d$, which is 8 here, where the others have a standard deviation of 1. The new model
# repeats its input, and its first loss is above {eq}`model-initial-loss`.

# %%
with torch.no_grad():
    repeated = [(m(inputs % 512).argmax(dim=-1) == inputs % 512).float().mean() for m in (tied, lm)]
    first = F.cross_entropy(tied(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
print("a new model repeats its input: tied {:.0%}, not tied {:.0%}".format(*repeated))
print(f"first loss, tied: {first:.1f} nats; not tied, {math.log(512) + 0.5:.1f} are expected")

# %% [markdown]
# ## What it costs
#
# ### Parameters
#
# Training GPT-2 small takes a GPU, counting it takes a pencil. We write $d$, $d_h$ and $d_f$ for
# `d_model`, `d_head` and `d_ff`, and $n$ layers with $h$ heads, of which $k$ have keys. In each
# layer, attention has the matrices $W_q$ and $W_o$ with $d \cdot h d_h$ entries each, and $W_k$ and
# $W_v$ with $d \cdot k d_h$. A gated feed-forward network has three of $d \cdot d_f$, one without a
# gate two. There are two normalizations, of $d$ each, or $2d$ where they have a bias; embedding and
# head have $V d$, once or twice. The code leaves the sums within a layer to two functions in the
# room below. Altogether, for a Llama,
#
# $$
# N = n \left( 2 d\, (h + k)\, d_h + 3 d\, d_f + 2 d \right) + d + 2 V d .
# $$ (model-parameters)


# %%
#| export
def parameter_counts(config: ModelConfig, *, active: bool = False) -> dict[str, int]:
    """Return the number of parameters of each part, summed over all layers; nothing is allocated.

    With ``active``, only those that one token meets: of experts ``n_active_experts``.
    """
    _check_config("config", config)
    d, layers, vocabulary = config.d_model, config.n_layers, config.vocab_size * config.d_model
    return {
        "embedding": vocabulary,
        "positions": config.context_length * d if config.positions == "learned" else 0,
        "attention": layers * _attention_parameters(config),
        "feed_forward": layers * _feed_forward_parameters(config, active),
        "norms": (2 * layers + (config.norm_position == "pre")) * d * _vectors_of_norm(config),
        "lm_head": 0 if config.tie_embeddings else vocabulary,
    }


# %% [markdown] tags=["engine"]
# ### Engine room: biases, gains and experts are counted, too, and `count_parameters` adds them up

# %% [markdown] tags=["engine"]
# The formula above is that of a Llama. In a GPT-2 all but the head have biases; in a Qwen3, queries
# and keys have gains; in a Mixtral a router stands before the experts.


# %% tags=["engine"]
#| export
def _vectors_of_norm(config: ModelConfig) -> int:
    return 2 if config.norm_bias else 1


def _attention_parameters(config: ModelConfig) -> int:
    d, queries = config.d_model, config.n_heads * config.d_head
    qkv = queries + 2 * config.n_kv_heads * config.d_head
    gains = 2 * config.d_head * _vectors_of_norm(config) if config.qk_norm else 0
    return d * qkv + queries * d + config.qkv_bias * qkv + config.bias * d + gains


def _feed_forward_parameters(config: ModelConfig, active: bool) -> int:
    d, matrices = config.d_model, 3 if config.activation in GATES else 2
    if not config.n_experts:
        return matrices * d * config.d_ff + config.bias * ((matrices - 1) * config.d_ff + d)
    experts = config.n_active_experts if active else config.n_experts
    return d * config.n_experts + matrices * d * (experts * config.d_ff + config.d_shared)


# %% [markdown] tags=["engine"]
# A model that exists is simply counted. So that both can be asked in the same way, there is one
# function for models and configurations.


# %% tags=["engine"]
#| export
def count_parameters(
    model: nn.Module | ModelConfig, *, active: bool = False, embeddings: bool = True
) -> int:
    """Return how many parameters a model has, or one of this configuration would have.

    A tied matrix counts once. ``active`` counts of experts only those that a token meets. Without
    ``embeddings``, the tables of tokens and positions are left out, and with them a tied head.

    >>> count_parameters(ModelConfig.preset("gpt2"))
    124439808
    """
    if isinstance(model, nn.Module) and not active and embeddings:
        return sum(parameter.numel() for parameter in model.parameters())
    config = model if isinstance(model, ModelConfig) else getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        got = type(model).__name__
        raise ValueError(f"model: expected a TransformerLM or a ModelConfig, got {got}")
    counts = parameter_counts(config, active=active)
    left_out = () if embeddings else ("embedding", "positions")
    return sum(count for part, count in counts.items() if part not in left_out)


# %% [markdown]
# ### Counted, and published
#
# `count_parameters` sums these numbers, or counts those of a model that exists. So the formula is
# checked in two ways. PyTorch's device `"meta"` builds a model of any size out of shapes alone,
# without memory, and there we can count. And the sizes of released models are known: those below
# are what the files that their makers published add up to.

# %%
published = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
}
print(f"{'':13} {'by formula':>14} {'of these active':>15} {'built':>6} {'published':>9}")
for name, count in published.items():
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        built = count_parameters(TransformerLM(config))
    by_formula, active = count_parameters(config), count_parameters(config, active=True)
    differences = f"{built - by_formula:>+6} {count - by_formula:>+9}"
    print(f"{name:13} {by_formula:14,} {active:15,} {differences}")

# %% [markdown]
# The last two columns are differences from the formula, and all are zero. Where do these parameters
# sit?

# %% mystnb={"figure": {"caption": "Where the parameters are. Normalizations are too few to be seen.", "name": "fig-model-parameters"}, "image": {"alt": "Horizontal bars of shares for eight models. In qwen3-0.6b and gpt2 the embedding takes 26 and 31 percent; in llama3-8b embedding and head take 7 percent each, attention 17 and the feed-forward networks 70; in mixtral-8x7b the feed-forward networks take 97 percent. Normalizations are too small to be seen."}}
shown = ["tiny", "gpt2", "gpt2-xl", "qwen3-0.6b", "llama3.2-1b", "llama3-8b", "llama3-70b"]
shown.append("mixtral-8x7b")
left = torch.zeros(len(shown))
counts = [parameter_counts(ModelConfig.preset(name)) for name in shown]
for part in ("embedding", "lm_head", "positions", "attention", "feed_forward"):
    share = torch.tensor([100 * count[part] / sum(count.values()) for count in counts])
    plt.barh(shown, share, left=left, label=part)
    left += share
plt.gca().invert_yaxis()
plt.xlabel("share of all parameters (%)")
plt.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=5, fontsize=8)
plt.grid(False)
plt.show()

# %% [markdown]
# In small models the vocabulary takes a fifth to a third of all parameters. The larger the model,
# the more of it is feed-forward networks: four fifths of the largest Llama here
# ({numref}`fig-model-parameters`). Mixtral has the parameters of a 47-billion model and the cost
# per token of one of 13 billion: of its eight experts each token meets two.
#
# ### Operations
#
# A product of a matrix with a vector takes one multiplication and one addition for each entry of
# the matrix: two {term}`FLOPs <FLOP>`, floating-point operations. So if a token goes through
# matrices of $M$ entries in all, the forward pass costs it $2M$. Backward, each matrix has to do
# two more such products. From the gradient $g$ of $y = Wx$ come $W^\top g$ for what is below and
# $g x^\top$ for the matrix itself. That makes $6M$ in training. $M$ counts the head, tied or not,
# because it is a product; it does not count the embedding, which is a look-up. Since $M$ is not
# far from the number of parameters $N$, one reads $6N$ for short {cite}`kaplan2020scaling`.
#
# Attention adds products that have no parameters: for each token, in each head and for each key
# that it looks at, $d_h$ multiplications for the score and $d_h$ for the mixing, again with as many
# additions. Backward there are two products for each of these two, as for any product. With $T$
# keys that is
#
# $$
# C = 6 M + 12\, n\, h\, d_h\, T \quad \text{FLOPs per token in training.}
# $$ (model-flops)
#
# This counts all $T$ keys although half of them lie in the future, as is usual
# {cite}`chowdhery2023palm`; a kernel that skips them does half. The second term grows with the
# length of the text and the first does not ({numref}`fig-model-attention-share`).


# %%
#| export
def _matrix_entries(config: ModelConfig) -> int:
    """Return the entries of all matrices that one token is multiplied by."""
    d, widths = config.d_model, (config.n_heads + config.n_kv_heads) * config.d_head
    inner = (config.n_active_experts or 1) * config.d_ff + config.d_shared
    matrices = 3 if config.activation in GATES else 2
    layer = 2 * d * widths + d * config.n_experts + matrices * d * inner
    return config.n_layers * layer + config.vocab_size * d


def flops_per_token(
    config: ModelConfig, sequence: int | None = None, *, training: bool = True, causal: bool = False
) -> float:
    """Return the floating-point operations in matrix products for one token of a ``sequence``.

    A multiplication and an addition are two. Forward alone is a third of ``training``. Attention
    counts all pairs of tokens, or if ``causal`` only those that the mask allows, window included.
    The default ``sequence`` is ``context_length``. Source: Chowdhery et al. (2023), appendix B.
    """
    _check_config("config", config)
    sequence = config.context_length if sequence is None else sequence
    check_at_least(sequence=(1, sequence))
    keys = float(sequence)
    if causal:
        window = min(config.sliding_window or sequence, sequence)
        keys = (window * (window + 1) / 2 + (sequence - window) * window) / sequence
    pairs = 2 * config.n_layers * config.n_heads * config.d_head * keys
    return (6 if training else 2) * (_matrix_entries(config) + pairs)


# %% [markdown]
# PyTorch can count for itself what it multiplies. The transparent backend makes no product that it
# would not see.

# %%
kinds = {
    "Llama-like": {"n_kv_heads": 1},
    "GPT-2-like": {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh"},
    "of experts": {"n_experts": 4, "n_active_experts": 2},
}
for name, changes in kinds.items():
    config = ModelConfig.preset("tiny", **changes)
    model = TransformerLM(config, backend="reference")
    with FlopCounterMode(display=False) as forward:
        logits = model(batch[:, :-1])
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    measured = forward.get_total_flops() + backward.get_total_flops()
    expected = flops_per_token(config, length - 1) * batch[:, :-1].numel()
    print(f"{name}: {measured:,} operations counted, {expected:,.0f} by the formula")

# %% [markdown]
# From which length on is attention most of the work?

# %% mystnb={"figure": {"caption": "The share of attention's quadratic part in all operations: small for some thousand tokens in large models, almost everything in the end.", "name": "fig-model-attention-share"}, "image": {"alt": "Three rising curves over the length of the sequence from 128 to 131,072 on a logarithmic axis. gpt2 reaches 50 percent at about 7,000 tokens, llama3-8b at about 29,000 and llama3-70b at about 53,000. At 1,024 tokens they are at about 13, 3 and 2 percent."}}
lengths = [2**k for k in range(7, 18)]
for name in ("gpt2", "llama3-8b", "llama3-70b"):
    config = ModelConfig.preset(name)
    total = [flops_per_token(config, n) for n in lengths]
    linear = 6 * _matrix_entries(config)
    plt.semilogx(lengths, [100 * (1 - linear / c) for c in total], "o-", base=2, label=name)
plt.xlabel("tokens in the sequence")
plt.ylabel("share of attention (%)")
plt.ylim(0, 100)
plt.legend()
plt.show()

# %% [markdown]
# ### Memory
#
# In training, a parameter is stored four times: itself, its gradient, and the two running means
# that AdamW keeps (chapter 12). In 32 bits these are 16 bytes, so an 8-billion Llama takes 128 GB
# before it has read a word. To that come {term}`activations`: what the forward pass must keep
# because the backward pass needs it. Which are they? We ask each part, for one token in one layer.
#
# A linear map needs its input, for $g x^\top$. The maps to q, k and v share one, and so do gate and
# up; with the inputs of the two output maps that makes $d + h d_h + d + d_f$. A normalization needs
# what came in, so both need $2d$. Attention needs q, k and v, which are $(h + 2k)\, d_h$; its
# weights are computed anew ({doc}`09_attention`), and its output is the input of $W_o$, counted
# already. SwiGLU, $\operatorname{silu}(a) \odot b$, needs $a$, its SiLU and $b$, so $3 d_f$; GELU
# needs $d_f$; ReLU can do with its output, which is counted. Altogether
#
# $$
# A = 4 d + 2 (h + k)\, d_h + c\, d_f \quad \text{numbers per token and layer,}
# $$ (model-activations)
#
# with $c = 4$ for SwiGLU and 2 for GELU. For GPT-2 this is $16 d$. At two bytes a number it is
# $32 d$ bytes, which are the $34 d$ of Korthikanti and colleagues {cite}`korthikanti2023reducing`
# without the masks of their two dropouts. Left out is a handful of single numbers per token, such
# as the scale of a normalization.

# %%
#| export
_KEPT = {"relu": 1, "gelu": 2, "gelu_tanh": 2, "silu": 2, "reglu": 3, "geglu": 4, "swiglu": 4}


def activation_bytes(
    config: ModelConfig, batch_size: int, sequence: int, dtype: torch.dtype = torch.float32
) -> int:
    """Return what the forward pass up to the head keeps for the backward pass, in bytes.

    For the backend "torch" without dropout; statistics of a few numbers per token are left out, and
    with them masks. Source: counted as by Korthikanti et al. (2023). A ``ValueError`` for experts.
    """
    _check_batch(config, dtype, batch_size=batch_size, sequence=sequence)
    if config.n_experts:  # what an expert keeps depends on how many tokens it gets
        raise ValueError(f"n_experts: expected 0, got {config.n_experts}")
    heads = (config.n_heads + config.n_kv_heads) * config.d_head
    attention = (3 if config.qk_norm else 2) * heads
    layer = 4 * config.d_model + attention + _KEPT[config.activation] * config.d_ff
    ends = 2 * config.d_model  # what the last normalization and the head read
    return batch_size * sequence * (config.n_layers * layer + ends) * dtype.itemsize


# %% [markdown]
# We measure: a hook sees every tensor that autograd stores. Views of one memory count once,
# parameters do not count.


# %%
def measured_bytes(model: TransformerLM, ids: Tensor) -> int:
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_states(ids).sum()
    sizes = {at: tensor.untyped_storage().nbytes() for at, tensor in kept.items()}
    return sum(size for at, size in sizes.items() if at not in parameters)


for name, changes in {"Llama-like": {}, **dict(list(kinds.items())[1:2])}.items():
    config = ModelConfig.preset("tiny", d_model=256, n_heads=4, **changes)
    expected = activation_bytes(config, 16, length)
    for backend in ("torch", "reference"):
        ratio = measured_bytes(TransformerLM(config, backend), batch) / expected
        print(f"{name}, {backend:9}: {ratio:.1f} times the formula")

# %% [markdown]
# The fused kernels keep what we said. The transparent backend keeps more, and the more the longer
# the text: all $h T$ attention weights of each token, more than once.
#
# Last come the logits. They are $V$ numbers for each token, and the softmax of the loss keeps them
# for its own gradient: for 8,192 tokens of Llama 3 in 32 bits 4.2 GB, more than one of its layers
# keeps.


# %%
#| export
def training_memory(
    config: ModelConfig, batch_size: int, sequence: int, dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """Return the bytes that a training step with AdamW keeps, by what they are for.

    All in one ``dtype``. Not counted: what lives only while one layer, or the loss, is computed.
    """
    _check_batch(config, dtype, batch_size=batch_size, sequence=sequence)
    weights = count_parameters(config) * dtype.itemsize
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": activation_bytes(config, batch_size, sequence, dtype),
        "logits": batch_size * sequence * config.vocab_size * dtype.itemsize,
    }


def cache_bytes(
    config: ModelConfig, batch_size: int, sequence: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Return what keys and values of ``sequence`` tokens in ``batch_size`` rows take, in bytes."""
    _check_batch(config, dtype, batch_size=batch_size, sequence=sequence)
    kept = min(sequence, config.sliding_window or sequence)
    per_token = 2 * config.n_layers * config.n_kv_heads * config.d_head
    return batch_size * kept * per_token * dtype.itemsize


# %% [markdown]
# To *use* a model takes its weights, without gradients and optimizer, and the {term}`KV cache` with
# $2 n k d_h$ numbers for each token, as {eq}`attention-cache-size` has it. Here the choices of the
# families show ({numref}`fig-model-memory`). Llama 2 has a key for each head and takes 512 KiB a
# token in 16 bits; Llama 3 shares four to one and takes 128; Mistral's window ends the growth at
# 4,096 tokens.

# %%
for name in ("llama2-7b", "llama3-8b"):
    config = ModelConfig.preset(name)
    print(f"{name}: {cache_bytes(config, 1, 1) // 1024} KiB of cache a token in bfloat16")
cache = TransformerLM(ModelConfig.preset("tiny")).new_cache(batch_size=4)
expected = cache_bytes(tiny.config, 4, 128, torch.float32)
print(f"tiny, 4 rows of 128 tokens: {cache.nbytes:,} bytes allocated, {expected:,} by the formula")

# %% [markdown]
# To the left is what a training step keeps; to the right, how the cache grows with the text:

# %% mystnb={"figure": {"caption": "Left: memory of a training step in float32. Right: memory of the cache of one sequence in bfloat16, up to the context length; the dotted line is what the weights of an 8-billion model take.", "name": "fig-model-memory"}, "image": {"alt": "Left, stacked bars in gigabytes. gpt2 with 8 rows of 1,024 tokens: about 2 for weights, gradients and optimizer, 5 for activations, 2 for logits. llama3.2-1b with one row of 4,096: 20, 12 and 2. Right, lines over the number of tokens on logarithmic axes: llama2-7b is highest and ends at 4,096 tokens with 2; llama3.1-8b lies four times lower and crosses the dotted line, 16, just before its end at 131,072; mistral-7b goes with it and becomes flat at 4,096 tokens and half a gigabyte; gpt2 lies lowest and ends at 1,024."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.2))
runs = {"gpt2\n8 x 1,024": ("gpt2", 8, 1024), "llama3.2-1b\n1 x 4,096": ("llama3.2-1b", 1, 4096)}
memory = [training_memory(ModelConfig.preset(name), b, t) for name, b, t in runs.values()]
below = torch.zeros(len(runs))
for part in memory[0]:
    height = torch.tensor([m[part] / 1e9 for m in memory])
    left.bar(list(runs), height, bottom=below, width=0.6, label=part)
    below += height
left.set(ylabel="GB in training")
left.legend(fontsize=8)
for name in ("llama2-7b", "llama3.1-8b", "mistral-7b", "gpt2"):
    config = ModelConfig.preset(name)
    lengths = [2**k for k in range(7, 18) if 2**k <= config.context_length]
    right.loglog(lengths, [cache_bytes(config, 1, n) / 1e9 for n in lengths], label=name)
right.axhline(2 * 8.03, color="gray", linestyle=":")
right.set(xlabel="tokens", ylabel="GB of cache")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## The same files as everyone
#
# A model on disk, in the layout that Hugging Face's library {cite}`wolf2020transformers` made
# common, is a folder. `config.json` says which family it is and with which sizes.
# `model.safetensors` has the tensors: a header with names, types, shapes and places, then the
# numbers. It replaced files that Python's `pickle` writes, which can run any program when they
# are opened. Large models are cut into several such files, and an index says which tensor is where.
#
# The tensors are ours under other names, with two twists ({numref}`fig-model-files`). GPT-2 stores
# the matrices of its blocks transposed, and those of q, k and v side by side as one. Mixtral
# stores each expert by itself, where we keep them stacked.
#
# ```{figure} ../figures/model-files.svg
# :name: fig-model-files
# :alt: In the middle the parameters of one of our blocks: attention norm, q, k, v, o, feed-forward norm, gate, up, down. To the left the tensors of a GPT-2 file: ln_1, c_attn made of q, k and v side by side and transposed, c_proj, ln_2, c_fc, mlp c_proj. To the right the tensors of a Llama file with one name for each of ours, and below of a Mixtral file: one w1, w2 and w3 for each expert, which are slices of our stacked matrices.
#
# A block of ours, and where its parameters are in the files of three families.
# ```
#
# One table can serve to save *and* to load, if it speaks of **views**: tensors that look at the
# memory of another. For each tensor of the file we list the views of our parameters that make it,
# side by side. A transposed matrix is a view, an expert is a view. To save, we join the views; to
# load, we split the tensor and copy each part into its view, and so into our parameter.

# %%
q, k, v = (nn.Linear(2, 2, bias=False).requires_grad_(False) for _ in range(3))
c_attn = torch.arange(12.0).view(2, 6)  # as in a GPT-2 file: q, k and v, each transposed
for view, part in zip([m.weight.T for m in (q, k, v)], c_attn.split(2, dim=1), strict=True):
    view.copy_(part)  # to load
print("a tensor of the file:", c_attn.tolist())
print("our matrix of keys:  ", k.weight.tolist())
saved = torch.cat([m.weight.T for m in (q, k, v)], dim=1)  # to save, the same views
print(f"saved again: {int((saved == c_attn).sum())} of {c_attn.numel()} numbers are as before")

# %% [markdown]
# For the descendants of Llama it is mostly a matter of names. A list of substitutions makes theirs
# of ours, and a stack of experts becomes as many matrices, each a view of the stack.

# %%
#| export
_LLAMA_NAMES = {
    r"^(embedding|blocks|norm)\b": r"model.\1",
    r"\bembedding\b": "embed_tokens",
    r"\bblocks\b": "layers",
    r"\battention\b": "self_attn",
    r"\battention_norm\b": "input_layernorm",
    r"\bfeed_forward_norm\b": "post_attention_layernorm",
    r"\brouter\b": "gate",
    r"\bfeed_forward\b": "mlp",
}
_MIXTRAL_NAMES = {r"\bfeed_forward\.(router|experts)\b": r"block_sparse_moe.\1"}
_MIXTRAL_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _llama_tensors(own: Mapping[str, Tensor], family: str) -> dict[str, list[Tensor]]:
    tensors: dict[str, list[Tensor]] = {}
    names, expert = (_MIXTRAL_NAMES, _MIXTRAL_EXPERT) if family == "mixtral" else ({}, {})
    for name, tensor in own.items():
        for pattern, theirs in {**names, **_LLAMA_NAMES}.items():
            name = re.sub(pattern, theirs, name)
        if tensor.ndim < 3:
            tensors[name] = [tensor]
            continue
        stem, _, kind = name.rpartition(".")
        for number, matrix in enumerate(tensor):
            tensors[f"{stem}.{number}.{expert.get(kind, kind)}.weight"] = [matrix]
    return tensors


# %% [markdown] tags=["engine"]
# ### Engine room: GPT-2's table, wrappers taken off, configurations translated both ways

# %% [markdown] tags=["engine"]
# In GPT-2 a matrix of ours is a transposed piece of one of theirs, as above.

# %% tags=["engine"]
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


def _gpt2_tensors(own: Mapping[str, Tensor], n_layers: int) -> dict[str, list[Tensor]]:
    tensors: dict[str, list[Tensor]] = {}
    for name, tensor in own.items():
        module, _, kind = name.rpartition(".")
        if module in _GPT2_OUTSIDE:
            tensors[f"{_GPT2_OUTSIDE[module]}.{kind}"] = [tensor]
    for number in range(n_layers):
        for (theirs, ours), kind in product(_GPT2_BLOCK.items(), ("weight", "bias")):
            views = [own[f"blocks.{number}.{name}.{kind}"] for name in ours]
            turned = [view.T if view.ndim == 2 else view for view in views]
            tensors[f"transformer.h.{number}.{theirs}.{kind}"] = turned
    return tensors


# %% [markdown] tags=["engine"]
# Whoever compiles a model, or some of its blocks, gets a wrapper, and the parameters get the
# wrapper's `_orig_mod.` in their names. A file has the names that the configuration gives them. And
# it has all of them: a layer that was exchanged, such as one of 8-bit weights (chapter 14), keeps
# its numbers elsewhere, and to write the rest without a word would lose them.


# %% tags=["engine"]
#| export
def _parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by the names that the model gives them, without those of wrappers."""
    # A tied head is not there twice.
    return {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}


# %% [markdown] tags=["engine"]
# What the configuration promises is held against what is there:


# %% tags=["engine"]
#| export
def _unwrapped(model: nn.Module) -> TransformerLM:
    """Return the model in a wrapper of ``torch.compile``; refuse what has no such parameters."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    if not isinstance(model, TransformerLM):
        raise ValueError(f"model: expected a TransformerLM, got {type(model).__name__}")
    with torch.device("meta"):
        expected = {n: p.shape for n, p in TransformerLM(model.config).named_parameters()}
    found = {name: tensor.shape for name, tensor in _parameters_of(model).items()}
    for name in [*expected, *found]:
        if name not in found:
            reason = "(quantized weights are none: save the model that was quantized)"
            raise ValueError(f"model: expected a parameter {name}, got none {reason}")
        if name not in expected:
            raise ValueError(f"model: expected no parameter {name}, as its configuration has none")
        if found[name] != expected[name]:
            wanted, got = tuple(expected[name]), tuple(found[name])
            raise ValueError(f"model: expected {name} of shape {wanted}, got {got}")
    return model


# %% [markdown] tags=["engine"]
# The table of a family, for a model:


# %% tags=["engine"]
#| export
def _disk_tensors(model: TransformerLM, family: str) -> dict[str, list[Tensor]]:
    """Return for each tensor in a file the views of ours that make it, side by side."""
    own = _parameters_of(model)
    if family == "llmbook":
        return {name: [tensor] for name, tensor in own.items()}
    if family == "gpt2":
        return _gpt2_tensors(own, model.config.n_layers)
    return _llama_tensors(own, family)


# %% [markdown] tags=["engine"]
# **Which family is it?** Given a configuration, is there a class in Hugging Face's library that
# computes this very function? Descendants of Llama differ in five features, and the set of those
# that a configuration has tells its name. Two more are told by their rotations: StableLM
# {cite}`bellagente2024stablelm` rotates a part of each head, and has LayerNorm; ERNIE 4.5
# {cite}`baidu2025ernie` rotates neighbors. What none of them is, say a Llama that normalizes after
# adding, is saved under the type `llmbook`, with our own names, for us alone.

# %% tags=["engine"]
#| export
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_GPT2_ACTIVATIONS |= {name: name for name in ("gelu", "relu", "silu")}
_LLAMA_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
_FEATURES = ("bias", "qkv_bias", "qk_norm", "sliding_window", "n_experts")
_FAMILIES = {
    (): "llama",
    ("bias", "qkv_bias"): "llama",
    ("qkv_bias",): "qwen2",
    ("qkv_bias", "sliding_window"): "qwen2",
    ("qk_norm",): "qwen3",
    ("qk_norm", "sliding_window"): "qwen3",
    ("sliding_window",): "mistral",
    ("n_experts",): "mixtral",
    ("sliding_window", "n_experts"): "mixtral",
    ("qk_norm", "n_experts"): "qwen3_moe",
    ("qk_norm", "sliding_window", "n_experts"): "qwen3_moe",
}
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
}

# %% [markdown] tags=["engine"]
# GPT-2 is told by its style, the others by their features; what cannot be told is ours.


# %% tags=["engine"]
#| export
def model_type(config: ModelConfig) -> str:
    """Return the family of Hugging Face's library that computes this function, or "llmbook".

    >>> model_type(ModelConfig.preset("gpt2")), model_type(ModelConfig.preset("tiny"))
    ('gpt2', 'llama')
    """
    _check_config("config", config)
    features = tuple(name for name in _FEATURES if getattr(config, name))
    if config.norm_position != "pre" or config.d_shared:
        return "llmbook"
    if config.positions == "rope":
        return _rotating_family(config, features)
    same_heads = _is_square(config) and config.n_kv_heads == config.n_heads
    style = config.positions == "learned" and config.norm_bias
    known = config.activation in _GPT2_ACTIVATIONS.values()
    whole = features == ("bias", "qkv_bias") and style and same_heads and known
    return "gpt2" if whole else "llmbook"


def _is_square(config: ModelConfig) -> bool:
    return config.n_heads * config.d_head == config.d_model


# %% [markdown] tags=["engine"]
# What rotates is told by its norm, its rotations and its features. A factor that follows the text
# ({doc}`08_positions`) has its place in their files if it has room to grow by just this factor.


# %% tags=["engine"]
#| export
def _rotating_family(config: ModelConfig, features: tuple[str, ...]) -> str:
    scaling = config.rope_scaling
    known = config.activation in _LLAMA_ACTIVATIONS.values()
    if scaling is not None and scaling.kind == "dynamic":
        grown = int(scaling.factor * (scaling.original_context_length or 1))
        known = known and config.context_length == grown
    if not known or (scaling is not None and scaling.kind == "ntk"):
        return "llmbook"
    if config.norm == "layernorm":
        exact = int(config.d_head * (config.d_rope / config.d_head)) == config.d_rope
        fits = config.norm_bias and config.layout == "half" and _is_square(config) and exact
        return "stablelm" if fits and features in ((), ("qkv_bias",)) else "llmbook"
    if config.d_rope != config.d_head:
        return "llmbook"
    if config.layout == "interleaved":
        return "ernie4_5" if features in ((), ("bias", "qkv_bias")) else "llmbook"
    family = _FAMILIES.get(features, "llmbook")
    refused = {
        "llama": config.d_model % config.n_heads > 0,  # its class refuses other widths
        "qwen2": not _is_square(config),
        "mixtral": not config.normalize_experts,
    }
    return "llmbook" if refused.get(family, False) else family


# %% [markdown] tags=["engine"]
# **Writing the configuration.** Sizes have other names there. What differs between families is
# added by two functions. The rotary embedding is written twice, in the words of version 5 of the
# library and in those of all before.

# %% tags=["engine"]
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
_ENTRIES = {
    "gpt2": _GPT2_ENTRIES,
    "qwen3_moe": _LLAMA_ENTRIES | {"d_ff": "moe_intermediate_size"},
    "stablelm": {ours: name for ours, name in _LLAMA_ENTRIES.items() if ours != "d_head"}
    | {"norm_eps": "layer_norm_eps"},
}


# %% [markdown] tags=["engine"]
# To write a `config.json` is to join these names with what a family says besides.


# %% tags=["engine"]
#| export
def _entries_of(config: ModelConfig) -> dict[str, Any]:
    """Return ``config`` in the words of a config.json."""
    family = model_type(config)
    if family == "llmbook":
        return {"model_type": family, **config.to_dict()}
    names = _ENTRIES.get(family, _LLAMA_ENTRIES)
    details = _gpt2_details(config) if family == "gpt2" else _llama_details(config, family)
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        **{theirs: getattr(config, ours) for ours, theirs in names.items()},
        "tie_word_embeddings": config.tie_embeddings,
        **details,
    }


# %% [markdown] tags=["engine"]
# What each family says besides:


# %% tags=["engine"]
#| export
def _gpt2_details(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(_GPT2_ACTIVATIONS.items())}
    places = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    dropout = dict.fromkeys(places, config.dropout)
    return {"activation_function": theirs[config.activation], **dropout}


def _llama_details(config: ModelConfig, family: str) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _LLAMA_ACTIVATIONS.items()}
    details = {"hidden_act": theirs[config.activation], **_rope_entries(config)}
    if config.dropout:
        details["dropout"] = config.dropout  # for us: their models have none where ours have it
    if family == "llama":
        return details | {"attention_bias": config.bias, "mlp_bias": config.bias}
    if family in ("ernie4_5", "stablelm"):
        name = "use_bias" if family == "ernie4_5" else "use_qkv_bias"
        return details | {name: config.qkv_bias}
    details["sliding_window"] = config.sliding_window
    if family.startswith("qwen"):  # where layers from max_window_layers on have the window
        details |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return details | _expert_entries(config, family)


# %% [markdown] tags=["engine"]
# A model with experts says how many, and a Qwen3 also that every layer has them:


# %% tags=["engine"]
#| export
def _expert_entries(config: ModelConfig, family: str) -> dict[str, Any]:
    if not config.n_experts:
        return {}
    active = {"num_experts_per_tok": config.n_active_experts}
    if family == "mixtral":
        return {"num_local_experts": config.n_experts, **active}
    everywhere = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # experts in every layer
    weights = {"norm_topk_prob": config.normalize_experts, "intermediate_size": config.d_ff}
    return {"num_experts": config.n_experts, **active, **everywhere, **weights}


# %% [markdown] tags=["engine"]
# Rotations are described in the words of both versions of the library (more below):

# %% tags=["engine"]
#| export
_FACTOR = {"factor": "factor"}
_TRAINED = {"original_context_length": "original_max_position_embeddings"}
_LLAMA3_NAMES = ("low_freq_factor", "high_freq_factor")
_YARN_NAMES = ("beta_fast", "beta_slow", "attention_factor", "truncate")
_ROPE_KINDS = {
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "llama3": _FACTOR | _TRAINED | {name: name for name in _LLAMA3_NAMES},
    "yarn": _FACTOR | _TRAINED | {name: name for name in _YARN_NAMES},
}


def _rope_entries(config: ModelConfig) -> dict[str, Any]:
    base: dict[str, Any] = {"rope_theta": config.rope_base}
    scaling = config.rope_scaling
    if config.norm == "layernorm":  # a StableLM
        base["partial_rotary_factor"] = config.d_rope / config.d_head
    if scaling is None:
        return {**base, "rope_parameters": {"rope_type": "default", **base}}
    names = _ROPE_KINDS[scaling.kind].items()
    given = {theirs: getattr(scaling, ours) for ours, theirs in names}
    old = {"rope_type": scaling.kind, **{k: v for k, v in given.items() if v is not None}}
    both = {**base, "rope_scaling": old, "rope_parameters": {**old, **base}}
    if scaling.kind == "dynamic":  # their factor begins to grow where their context ends
        both["max_position_embeddings"] = scaling.original_context_length
    return both


# %% [markdown] tags=["engine"]
# **Reading it.** Reading is harder than writing, because others have written. A file may ask for
# something that our model cannot do, and to go on without it would give another function. So
# entries that change the function are looked at, and refused by name if they say anything else than
# what we do.

# %% tags=["engine"]
#| export
_ONLY: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {"attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mixtral": {"router_jitter_noise": 0},
    "stablelm": {"use_parallel_residual": False, "qk_layernorm": False, "hidden_dropout": 0},
}


def _config_from(entries: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """Return the family and the configuration that a config.json describes."""
    family = entries.get("model_type")
    if family == "llmbook":
        ours = {field.name for field in fields(ModelConfig)}
        return family, ModelConfig.from_dict({k: v for k, v in entries.items() if k in ours})
    if family not in _CLASSES:
        expected = f"llmbook, {', '.join(_CLASSES)}"
        raise ValueError(f"model_type: expected one of {expected}, got {family!r}")
    only = _ONLY["gpt2"] if family == "gpt2" else _ONLY["llama"] | _ONLY.get(family, {})
    for name, value in only.items():
        partial_heads = family == "stablelm" and name == "partial_rotary_factor"
        if entries.get(name) not in (None, value) and not partial_heads:
            raise ValueError(f"{name}: expected {value!r}, got {entries[name]!r}")
    read = _read_gpt2 if family == "gpt2" else _read_llama
    return family, ModelConfig.from_dict(read(entries, family))


# %% [markdown] tags=["engine"]
# Three helpers translate names, and name what is missing.


# %% tags=["engine"]
#| export
def _renamed(entries: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries by our names; a null counts as left out."""
    given = {ours: entries.get(theirs) for ours, theirs in names.items()}
    return {ours: value for ours, value in given.items() if value is not None}


def _require(entries: Mapping[str, Any], names: Mapping[str, str], *optional: str) -> None:
    for ours, theirs in names.items():
        if ours not in optional and entries.get(theirs) is None:
            raise ValueError(f"{theirs}: expected a number, but it is missing")


def _activation(entries: Mapping[str, Any], name: str, known: Mapping[str, str]) -> str:
    check_choice(name, entries.get(name), tuple(known))
    return known[entries[name]]


# %% [markdown] tags=["engine"]
# A GPT-2 has one rate of dropout for three places.


# %% tags=["engine"]
#| export
def _read_gpt2(entries: Mapping[str, Any], family: str) -> dict[str, Any]:
    _require(entries, _GPT2_ENTRIES, "d_ff")
    rates = {entries.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(rates) > 1:
        raise ValueError(f"attn_pdrop: expected one rate for all places, got {sorted(rates)}")
    return {
        **_OLD,
        **_renamed(entries, _GPT2_ENTRIES),
        "activation": _activation(entries, "activation_function", _GPT2_ACTIVATIONS),
        "tie_embeddings": entries.get("tie_word_embeddings", True),
        "dropout": rates.pop(),
    }


# %% [markdown] tags=["engine"]
# The descendants of Llama differ in few entries, so one function reads them all.


# %% tags=["engine"]
#| export
def _read_llama(entries: Mapping[str, Any], family: str) -> dict[str, Any]:
    names = _ENTRIES.get(family, _LLAMA_ENTRIES)
    _require(entries, names, *(("n_kv_heads",) if family == "qwen3" else ("n_kv_heads", "d_head")))
    found = _renamed(entries, names) | {
        "activation": _activation(entries, "hidden_act", _LLAMA_ACTIVATIONS),
        "bias": _read_bias(entries) if family in ("llama", "ernie4_5") else False,
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "sliding_window": _read_window(entries, family),
        "tie_embeddings": entries.get("tie_word_embeddings", family == "ernie4_5"),
        "dropout": entries.get("dropout", 0.0),
        "layout": "interleaved" if family == "ernie4_5" else "half",
        **_read_experts(entries, family),
    }
    if family == "qwen2":
        found["qkv_bias"] = True
    if family == "stablelm":
        found |= {"norm": "layernorm", "norm_bias": True}
        found["qkv_bias"] = entries.get("use_qkv_bias", False)
    return found | _read_rope(entries, family)


# %% [markdown] tags=["engine"]
# Experts have two names for their number, and Qwen3 may leave their weights as the softmax gave
# them.


# %% tags=["engine"]
#| export
def _read_experts(entries: Mapping[str, Any], family: str) -> dict[str, Any]:
    defaults = {"mixtral": (8, 2), "qwen3_moe": (128, 8)}
    if family not in defaults:
        return {}
    number, active = defaults[family]
    number = entries.get("num_experts", entries.get("num_local_experts", number))
    return {
        "n_experts": number,
        "n_active_experts": entries.get("num_experts_per_tok", active),
        "normalize_experts": family == "mixtral" or entries.get("norm_topk_prob", False),
    }


def _read_bias(entries: Mapping[str, Any]) -> Any:
    if entries.get("model_type") == "ernie4_5":
        return entries.get("use_bias", False)
    attention, mlp = (entries.get(f"{name}_bias", False) for name in ("attention", "mlp"))
    if attention != mlp:
        raise ValueError(f"mlp_bias: expected {attention!r} as attention_bias has, got {mlp!r}")
    return attention


# %% [markdown] tags=["engine"]
# A Qwen may use its window in some layers only. Ours uses it in all or none, so that is refused.


# %% tags=["engine"]
#| export
def _read_window(entries: Mapping[str, Any], family: str) -> int | None:
    """Return the sliding window, the same in all layers."""
    window = entries.get("sliding_window", 4096 if family == "mistral" else None)
    if family in ("llama", "ernie4_5", "stablelm") or window is None:
        return None
    if family == "qwen3_moe":
        return window if entries.get("use_sliding_window") else None
    kinds = entries.get("layer_types")
    if family in ("qwen2", "qwen3") and kinds is None:
        layers, first = entries["num_hidden_layers"], entries.get("max_window_layers", 28)
        used = first if entries.get("use_sliding_window") else layers
        kinds = ["sliding_attention" if i >= used else "full_attention" for i in (0, layers - 1)]
    for kind in kinds or ():
        check_choice("layer_types", kind, ("full_attention", "sliding_attention"))
    different = sorted(set(kinds or ()))
    if len(different) > 1:
        raise ValueError(f"layer_types: expected the same in all, got {different}")
    return None if different == ["full_attention"] else window


# %% [markdown] tags=["engine"]
# The rotary embedding was described by two entries, `rope_theta` and `rope_scaling`, until version
# 5 of the library put both into `rope_parameters`. A dynamic factor begins to grow where their
# context ends, and their models go on; our context is as long as the factor says.


# %% tags=["engine"]
#| export
def _read_rope(entries: Mapping[str, Any], family: str) -> dict[str, Any]:
    found = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    base = found.get("rope_theta", entries.get("rope_theta", _BASES.get(family, 1e4)))
    rotations = {"rope_base": base, **_read_part(entries, found, family)}
    check_choice("rope_type", kind, ("default", *_ROPE_KINDS))
    for name in ("mscale", "mscale_all_dim"):
        if found.get(name) is not None:
            raise ValueError(f"{name}: expected None, got {found[name]!r}")
    if kind == "default":
        return rotations
    scaling = _renamed(found, _ROPE_KINDS[kind])
    context = entries["max_position_embeddings"]
    if "original_context_length" in _ROPE_KINDS[kind]:
        trained = entries.get("original_max_position_embeddings")
        scaling.setdefault("original_context_length", trained or context)
    if kind == "dynamic":
        scaling["original_context_length"] = context
        rotations["context_length"] = int(scaling.get("factor", 1) * context)
    return {**rotations, "rope_scaling": {"kind": kind, **scaling}}


_BASES = {"mixtral": 1e6, "ernie4_5": 5e5}  # of rotations where a file has none


# %% [markdown] tags=["engine"]
# The share of each head that is rotated is a number of dimensions with us.


# %% tags=["engine"]
#| export
def _read_part(entries: Mapping[str, Any], found: Mapping[str, Any], family: str) -> dict[str, int]:
    """Return how much of each head is rotated, where a family has a word for it."""
    part = found.get("partial_rotary_factor", entries.get("partial_rotary_factor"))
    if family != "stablelm":
        if part not in (None, 1):
            raise ValueError(f"partial_rotary_factor: expected 1, got {part!r}")
        return {}
    part = 0.25 if part is None else part
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
        raise ValueError(f"partial_rotary_factor: expected above 0 and at most 1, got {part!r}")
    return {"d_rope": int(entries["hidden_size"] // entries["num_attention_heads"] * part)}


# %% [markdown]
# ### Saving
#
# A save that is killed must never leave half a model, and least of all half of a new one in the
# place of a whole old one. So everything is written into a hidden folder, down to the disk. Then
# the old folder is renamed out of the way, and the new one into its place. Between these two
# renames no folder has the name. A save that is killed just then leaves the old version, complete,
# beside it: loading finds it there, and the next save first puts it back. In the code,
# `_unwrapped`, `_entries_of` and `_disk_tensors` come from the room above; `_new_version` and the
# two that write are in the room below.


# %%
#| export
def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    max_shard_size: int = 5_000_000_000,
    **entries: Any,
) -> None:
    """Write ``config.json`` and safetensors as Hugging Face's library lays them out.

    A file has at most ``max_shard_size`` bytes, unless a single tensor is larger. Further
    ``entries``, such as ``eos_token_id``, go to ``config.json``; loading does not keep them. A
    model that is in ``folder`` is replaced when the new one is complete, not before; other files
    there stay (as copies). A compiled ``TransformerLM`` is saved like the one in it; a model whose
    parameters are not those of its configuration, such as a quantized one, is a ``ValueError``.
    """
    _check_counts(max_shard_size=max_shard_size)
    folder = check_path(folder, "folder")
    plain = _unwrapped(model)
    dtype = str(plain.embedding.weight.dtype).removeprefix("torch.")
    described = _entries_of(plain.config) | {"dtype": dtype}
    if clash := sorted(described.keys() & entries.keys()):
        raise ValueError(f"{clash[0]}: follows from the model, got {entries[clash[0]]!r}")
    _check_json(entries)
    tokens = {"bos_token_id": None, "eos_token_id": None}  # theirs would be those of Llama
    tensors = _disk_tensors(plain, described["model_type"])
    with _new_version(folder.resolve()) as draft:
        _write_json(draft / "config.json", described | tokens | entries)
        _write_tensors(draft, tensors, max_shard_size)


# %% [markdown] tags=["engine"]
# ### Engine room: a killed save leaves a whole model, and large ones are cut into files

# %% [markdown] tags=["engine"]
# The two renames, and what to do when the second does not come:


# %% tags=["engine"]
#| export
@contextmanager
def _new_version(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write into; when it is complete, it takes the place of ``folder``."""
    _clean_up_beside(folder)
    if folder.exists() and not (folder.is_dir() and _may_be_replaced(folder)):
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
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


# %% tags=["engine"]
#| export
def _clean_up_beside(folder: Path) -> None:
    """Finish what killed saves left: an old version is whole if nothing has taken its place."""
    for old in _beside(folder, "old"):
        if not folder.exists():
            old.rename(folder)
    for leftover in (*_beside(folder, "old"), *_beside(folder, "part")):
        shutil.rmtree(leftover, ignore_errors=True)


def _beside(folder: Path, part: str) -> list[Path]:
    return sorted(folder.parent.glob(f".{escape(folder.name)}.{part}-*"))


# %% [markdown] tags=["engine"]
# What else is in the folder, such as a tokenizer, comes along. A folder that is not a model's is
# not touched, not even if it has a `config.json` of some other kind.

# %% tags=["engine"]
#| export
_OURS = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", re.ASCII)


def _may_be_replaced(folder: Path) -> bool:
    path = folder / "config.json"
    return "model_type" in _read_json(path) if path.exists() else not any(folder.iterdir())


def _carry_over(folder: Path, draft: Path) -> None:
    for path in folder.iterdir():
        if not _OURS.fullmatch(path.name):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, draft / path.name)


def _check_json(entries: Mapping[str, Any]) -> None:
    for name, value in entries.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: expected what JSON can hold, got {value!r:.60}") from None


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _to_disk(path)


# %% [markdown] tags=["engine"]
# Tensors are shared out in order, a new file when the next would not fit.


# %% tags=["engine"]
#| export
def _grouped(tensors: Mapping[str, list[Tensor]], most: int) -> list[dict[str, list[Tensor]]]:
    """Share tensors out to files of at most ``most`` bytes, or of a single tensor."""
    groups: list[dict[str, list[Tensor]]] = [{}]
    room = most
    for name, views in tensors.items():
        size = sum(view.nbytes for view in views)
        if groups[-1] and size > room:
            groups.append({})
            room = most
        groups[-1][name] = views
        room -= size
    return groups


def _joined(views: list[Tensor]) -> Tensor:
    whole = views[0] if len(views) == 1 else torch.cat(views, dim=-1)
    return whole.detach().cpu().contiguous()


def _write_tensors(folder: Path, tensors: Mapping[str, list[Tensor]], most: int) -> None:
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
        total = sum(view.nbytes for views in tensors.values() for view in views)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


# %% [markdown]
# ### Loading
#
# A folder from somebody else is not to be trusted. Nothing in it may run a program, so pickles are
# refused. An index may name files; a name such as `../../secret` leads out of the folder, and is
# refused. The headers of all files are read before any memory is taken, and every tensor that is
# missing, unexpected or of another shape is named.
#
# Then the model is built on the device `"meta"`, given memory of its final type on its final
# device, and filled, tensor by tensor. The files are {term}`memory-mapped`, so there is never a
# second copy. Read `load_model` as a list of steps; each is a function in the room below.


# %%
#| export
def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "torch",
) -> TransformerLM:
    """Return the model that is in ``folder``, ready to use (``eval``).

    Only safetensors are read, one tensor after the other, so memory holds the model and one tensor.
    The ``dtype``, such as torch.bfloat16 or "bfloat16", is that of the files unless given. A
    ``ValueError`` names what is wrong: an entry of the configuration that asks for another
    function, a file, or a tensor.
    """
    chosen, place = _chosen_dtype(dtype), _chosen_device(device)
    check_choice("backend", backend, ("reference", "torch"))
    folder = _whole_version(check_path(folder, "folder"))
    family, config = _described(folder)
    found = _stored_tensors(_weight_files(folder), family)
    _check_sizes(folder, family, config, found)
    model = _built_of_shapes(folder, config, backend)
    head = _spare_head(found, family) if config.tie_embeddings else None
    _check_tensors(folder, _disk_tensors(model, family), found)
    model.to(chosen or _common_dtype(folder, found)).to_empty(device=place)
    model._tie()
    _fill(_disk_tensors(model, family), found)
    if head is not None:
        _check_head(model, head)
    return model.eval()


# %% [markdown] tags=["engine"]
# ### Engine room: nothing in a folder is trusted before it is checked

# %% [markdown] tags=["engine"]
# What the caller chose comes first. The types are those that files have, by their names in torch;
# to ask for a device that is not there would else fail after the whole model was built.

# %% tags=["engine"]
#| export
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _chosen_dtype(dtype: Any) -> torch.dtype | None:
    names = {str(known).removeprefix("torch."): known for known in _DTYPES.values()}
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in names.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in names:
        expected = f"one of {', '.join(names)}, as a torch.dtype or its name, or None"
        raise ValueError(f"dtype: expected {expected}, got {dtype!r}")
    return names[dtype]


def _chosen_device(device: Any) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected one that torch has here, got {device!r}") from error
    return place


# %% [markdown] tags=["engine"]
# Then the files: what is there, what an index names, and what opens.

# %% tags=["engine"]
#| export
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_PLAIN_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing: is this the folder of a model?") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        reason = f"; {pickles[0]} could run any program when it is opened" if pickles else ""
        raise ValueError(f"{folder}: expected model.safetensors, or its index{reason}")
    return _files_of_index(index)


# %% tags=["engine"]
#| export
def _files_of_index(index: Path) -> list[Path]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: weight_map: expected a file for each tensor, got {where!r}")
    for name in where.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{index}: expected the name of a .safetensors file, got {name!r}")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name}: missing, but {index.name} names it")
    return [index.parent / name for name in sorted(set(where.values()))]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file: {error}") from None


# %% [markdown] tags=["engine"]
# Old files have oddities: the first GPT-2 had no `transformer.` before its names, and its masks
# were stored as if they were parameters, as were the frequencies of the first Llamas.


# %% tags=["engine"]
#| export
class _Stored(NamedTuple):
    """A tensor on disk: its file and name there, its shape and type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


_NO_PARAMETERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def _stored_tensors(paths: list[Path], family: str) -> dict[str, _Stored]:
    """Read the headers: what is there, by the names that are usual today."""
    found: dict[str, _Stored] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                old = family == "gpt2" and not name.startswith(("transformer.", "lm_head."))
                usual = f"transformer.{name}" if old else name
                if _NO_PARAMETERS.search(usual):
                    continue
                if usual in found:
                    raise ValueError(f"{path}: {name} is in {found[usual].file.name}, too")
                tensor = file.get_slice(name)
                found[usual] = _Stored(path, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return found


# %% tags=["engine"]
#| export
def _check_tensors(
    folder: Path, expected: dict[str, list[Tensor]], found: dict[str, _Stored]
) -> None:
    """Raise a ``ValueError`` that names what is missing, unexpected, or of other shape or type."""
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        *rows, _ = expected[name][0].shape
        shape = (*rows, sum(view.size(-1) for view in expected[name]))
        if found[name].shape != shape:
            faults.append(f"{name} has shape {found[name].shape}, expected {shape}")
        if found[name].dtype not in _DTYPES:
            faults.append(f"{name} is of {found[name].dtype}, expected {', '.join(_DTYPES)}")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{folder}: {'; '.join(sorted(faults)[:5])}{more}")


def _common_dtype(folder: Path, found: Mapping[str, _Stored]) -> torch.dtype:
    names = sorted({stored.dtype for stored in found.values()})
    if len(names) > 1:
        raise ValueError(f"dtype: expected a choice, as {folder} has {', '.join(names)}, got None")
    return _DTYPES[names[0]]


# %% [markdown] tags=["engine"]
# A tied matrix may be there twice, or once under either name: safetensors' own `save_model` keeps
# the name that is first in the alphabet, which is the head's.


# %% tags=["engine"]
#| export
_TIED = {"gpt2": "transformer.wte.weight", "llmbook": "embedding.weight"}


def _spare_head(found: dict[str, _Stored], family: str) -> _Stored | None:
    """Take the head out of ``found``; if the embedding is not there, the head stands for it."""
    head = found.pop("lm_head.weight", None)
    embedding = _TIED.get(family, "model.embed_tokens.weight")
    if head is None or embedding in found:
        return head
    found[embedding] = head
    return None


# %% [markdown] tags=["engine"]
# Then the model that `config.json` describes. It may be too large for the files that are there, or
# for any machine.


# %% tags=["engine"]
#| export
def _whole_version(folder: Path) -> Path:
    """Return ``folder``, or the old version beside it if a save was killed between two renames."""
    found = [folder] if folder.is_dir() else _beside(folder, "old")
    if not found:
        raise ValueError(f"{folder}: expected the folder of a model")
    return found[0]


def _described(folder: Path) -> tuple[str, ModelConfig]:
    path = folder / "config.json"
    entries = _read_json(path)
    try:
        return _config_from(entries)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _built_of_shapes(folder: Path, config: ModelConfig, backend: Backend) -> TransformerLM:
    try:
        with torch.device("meta"):
            return TransformerLM(config, backend)
    except (OverflowError, RuntimeError, TypeError) as error:  # a factor of 400 digits, say
        raise ValueError(f"{folder / 'config.json'}: no such model can be: {error}") from error


# %% tags=["engine"]
#| export
def _check_sizes(
    folder: Path, family: str, config: ModelConfig, found: Mapping[str, _Stored]
) -> None:
    """Refuse what the files cannot hold; to build it might take forever, or all memory."""
    alone = family in ("mixtral", "qwen3_moe")  # in our own files they are stacked
    experts = config.n_experts if alone else 1
    parts = config.n_layers * max(1, experts)
    if parts > len(found):
        expected = f"tensors for {parts} layers or experts"
        raise ValueError(f"{folder}: expected {expected}, got {len(found)} tensors")
    sizes = [config.vocab_size, config.d_model, config.d_ff, config.d_shared, config.n_experts]
    sizes += [config.n_heads * config.d_head, parameter_counts(config)["positions"]]
    numbers = sum(math.prod(stored.shape) for stored in found.values())
    if max(sizes) > numbers:
        expected = f"tensors of a size {max(sizes)}"
        raise ValueError(f"{folder}: expected {expected}, got {numbers} numbers in all")


# %% [markdown] tags=["engine"]
# Last, tensor by tensor, the numbers.


# %% tags=["engine"]
#| export
@torch.no_grad()
def _fill(tensors: Mapping[str, list[Tensor]], found: Mapping[str, _Stored]) -> None:
    for path in sorted({stored.file for stored in found.values()}):
        with _opened(path) as file:
            for name, stored in found.items():
                if stored.file == path:
                    views = tensors[name]
                    parts = file.get_tensor(stored.name).split([v.size(-1) for v in views], dim=-1)
                    for view, part in zip(views, parts, strict=True):
                        view.copy_(part)


def _check_head(model: TransformerLM, head: _Stored) -> None:
    """A file may have a tied matrix twice, if it is twice the same."""
    with _opened(head.file) as file:
        same = torch.equal(
            file.get_tensor(head.name).to(model.lm_head.weight), model.lm_head.weight
        )
    if not same:
        raise ValueError(f"{head.file}: {head.name} differs from the embedding that it is tied to")


# %% [markdown]
# ### There and back
#
# The two functions are also methods, `save_pretrained` and `from_pretrained`. The pupil that
# learned sixteen stories goes to disk, in several files, and comes back. What is in the first of
# these files?

# %%
from safetensors.torch import load_file

folder = Path(tempfile.mkdtemp())
pupil.save_pretrained(folder / "tiny", max_shard_size=300_000)
for path in sorted((folder / "tiny").iterdir()):
    print(path.name)
for name, tensor in list(load_file(folder / "tiny/model-00001-of-00003.safetensors").items())[:3]:
    print(f"  {name}: {tuple(tensor.shape)}")
back = TransformerLM.from_pretrained(folder / "tiny")
with torch.no_grad():
    assert torch.equal(back(ids), pupil(ids))
print(f"{count_parameters(back):,} parameters came back, and give the same logits")

# %% [markdown] tags=["engine"]
# ### Engine room: eight accidents, each found and named, and a save that is killed

# %% [markdown] tags=["engine"]
# We damage a copy of the folder in one way after the other.

# %% tags=["engine"]
pupil.save_pretrained(folder / "whole")


def accident(what: str, damage: Callable[[Path], Any]) -> None:
    broken = Path(shutil.copytree(folder / "whole", folder / "broken"))
    damage(broken)
    try:
        TransformerLM.from_pretrained(broken)
        print(f"{what:16} NOT FOUND")
    except ValueError as error:
        text = str(error).replace(str(broken), "").lstrip("/: ")
        print(f"{what:16} {text}")
    shutil.rmtree(broken)


def tensors_with(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(at: Path) -> None:
        tensors = load_file(at / "model.safetensors")
        change(tensors)
        save_file(tensors, at / "model.safetensors")

    return damage


def entries_with(**entries: Any) -> Callable[[Path], None]:
    def damage(at: Path) -> None:
        described = json.loads((at / "config.json").read_text()) | entries
        (at / "config.json").write_text(json.dumps(described))

    return damage


# %% [markdown] tags=["engine"]
# The messages name the thing:


# %% tags=["engine"]
def pickled(at: Path) -> None:
    (at / "model.safetensors").rename(at / "model.bin")


def led_out(at: Path) -> None:
    index = {"weight_map": {q: "../../secret.safetensors"}}
    (at / "model.safetensors.index.json").write_text(json.dumps(index))
    (at / "model.safetensors").unlink()


q = "model.layers.0.self_attn.q_proj.weight"
accident("a lost tensor", tensors_with(lambda tensors: tensors.pop(q)))
accident("one too many", tensors_with(lambda tensors: tensors.update(extra=torch.zeros(1))))
accident("another shape", tensors_with(lambda tensors: tensors.update({q: tensors[q][:32]})))
accident("8-bit weights", tensors_with(lambda tensors: tensors.update({q: tensors[q].char()})))
accident("half a rotation", entries_with(partial_rotary_factor=0.5))
accident("another model", entries_with(model_type="gpt_neox"))
accident("a pickle", pickled)
accident("a way out", led_out)

# %% [markdown] tags=["engine"]
# And a save that is killed: once while it writes, once between the two renames. Each time the
# old model is found.

# %% tags=["engine"]
whole = folder / "whole"
try:
    with _new_version(whole.resolve()) as draft:
        (draft / "config.json").write_text("{")
        raise KeyboardInterrupt
except KeyboardInterrupt:
    first = TransformerLM.from_pretrained(whole)
whole.rename(whole.with_name(".whole.old-0"))  # and nothing has come in its place
second = TransformerLM.from_pretrained(whole)
for back in (first, second):
    assert all(
        torch.equal(a, b) for a, b in zip(back.parameters(), pupil.parameters(), strict=True)
    )
print(f"twice, all {count_parameters(second):,} parameters are the old ones")

# %% [markdown]
# ## Is it the real thing?
#
# Each family in both directions. Their class with random weights is saved by their code and opened
# by ours; ours is saved by our code and opened by theirs. Then both continue a text greedily with
# their caches. The text is longer than Mistral's window, and Llama's frequencies are stretched.

# %%
sizes = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, or random logits are all alike
    "bos_token_id": None,
    "eos_token_id": None,
}
llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
gpt2_sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 512}
others = {
    "GPT-2": transformers.GPT2Config(
        **gpt2_sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=None
    ),
    "Llama": transformers.LlamaConfig(**sizes, rope_parameters=llama3),
    "Qwen3": transformers.Qwen3Config(**sizes, head_dim=32),
    "Mistral": transformers.MistralConfig(**sizes, sliding_window=16),
    "Mixtral": transformers.MixtralConfig(**sizes, num_local_experts=4),
}

# %% [markdown]
# Both rows of the prompt are continued by 40 tokens. Logits must agree up to rounding, and what
# went through our files and came back must not have changed at all.


# %%
@torch.no_grad()
def continue_greedily(model: TransformerLM, prompt: Tensor, n: int) -> Tensor:
    cache, ids = model.new_cache(len(prompt)), prompt
    for _ in range(n):
        logits = model(prompt, cache=cache)
        prompt = logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, prompt], dim=1)
    return ids


open_theirs = transformers.AutoModelForCausalLM.from_pretrained
prompt = torch.randint(512, (2, 40))
mask = torch.ones_like(prompt)
for name, config in others.items():
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(folder / name)
    ours = TransformerLM.from_pretrained(folder / name)
    ours.save_pretrained(folder / f"{name}-ours")
    again = open_theirs(folder / f"{name}-ours")
    with torch.no_grad():
        mine, other, back = ours(prompt), theirs(prompt).logits, again(prompt).logits
    assert (mine - other).abs().max() < 1e-4 and torch.equal(other, back)
    text = theirs.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=False)
    same = int((continue_greedily(ours, prompt, 40) == text)[:, 40:].sum())
    size = other.abs().max()
    print(f"{name:8} logits up to {size:.0f}, apart by less than 0.0001", end="; ")
    print(f"{same} of 80 tokens the same")

# %% [markdown] tags=["engine"]
# ### Engine room: four more, with other rotations and with experts

# %% [markdown] tags=["engine"]
# Qwen3 also comes with experts, whose weights need not sum to one. ERNIE 4.5 rotates neighbors
# ({doc}`08_positions` derived both layouts), StableLM a quarter of each head, and any Llama may
# have a factor that follows the text. Here the prompt is longer than the context of training, so
# the factor has begun to grow.

# %% tags=["engine"]
dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
qwen3 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}
more = {
    "Qwen3, experts": transformers.Qwen3MoeConfig(**sizes, **qwen3),
    "ERNIE 4.5": transformers.Ernie4_5Config(**sizes | {"pad_token_id": None}, head_dim=32),
    "StableLM": transformers.StableLmConfig(**sizes),
    "Llama, dynamic": transformers.LlamaConfig(
        **sizes | {"max_position_embeddings": 32}, rope_parameters=dynamic
    ),
}
for name, config in more.items():
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(folder / name)
    ours = TransformerLM.from_pretrained(folder / name)
    with torch.no_grad():
        mine, other = ours(prompt), theirs(prompt).logits
    assert (mine - other).abs().max() < 1e-4 * other.abs().max()
    c = ours.config
    rotated = f"{c.d_rope} of {c.d_head} numbers of a head rotated, layout {c.layout}"
    print(f"{name:15} {rotated:56} same logits")

# %% [markdown]
# ## How fast is it?
#
# Against the same library's Llama with the same weights, on the same batch: a training step, and
# the greedy continuation of a text with a cache. What can differ is little. Products and attention
# take most of a step, and both models have them done by the same kernels of PyTorch. To see how
# much lies between, we compare the operations per second of a step, by our own count, with those of
# a single large product; the ratio is called model FLOPs utilization {cite}`chowdhery2023palm`.

# %%
speedy = TransformerLM(
    ModelConfig.preset(
        "tiny", d_model=128, n_heads=4, n_layers=4, vocab_size=2048, context_length=256
    )
)
speedy.save_pretrained(folder / "speed")
theirs = open_theirs(folder / "speed")
text = torch.randint(2048, (8, 257))


def step(model: nn.Module) -> None:
    output = model(text[:, :-1])
    logits = output if isinstance(output, Tensor) else output.logits
    F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    model.zero_grad()


def timed(*runs: Callable[[], Any], n: int) -> list[float]:
    best = [math.inf] * len(runs)
    for number, run in [*enumerate(runs)] * n:  # in turn, so that a busy moment hits all
        start = time.perf_counter()
        run()
        best[number] = min(best[number], time.perf_counter() - start)
    return best


# %% [markdown]
# The best of several runs counts. Speeds in tokens depend on the machine, which was a small and
# busy one here; the ratios say more.

# %% tags=["nbval-ignore-output"]
start = text[:1, :8]
options = {"attention_mask": torch.ones_like(start), "max_new_tokens": 64, "do_sample": False}
ours, other = timed(lambda: step(speedy), lambda: step(theirs), n=6)
print(f"training step: {8 * 256 / ours:,.0f} tokens/s, {other / ours:.2f} times transformers")
large = torch.randn(1024, 1024)
best_rate = 2 * 1024**3 / timed(lambda: large @ large, n=10)[0]
rate = flops_per_token(speedy.config, 256) * 8 * 256 / ours
print(f"utilization:   {rate / best_rate:.0%} of the rate of a large product")
ours, other = timed(
    lambda: continue_greedily(speedy, start, 64), lambda: theirs.generate(start, **options), n=4
)
print(f"generation:    {64 / ours:,.0f} tokens/s, {other / ours:.1f} times transformers")

# %% [markdown]
# Where most of the time goes into the products, there is not much for either model to gain on the
# other. When tokens come one at a time, products are small and Python's share is larger.
#
# ## Exercises
#
# ````{exercise} Where attention takes over
# :label: ex-model-crossover
# *Ten minutes.* Write `crossover(config)`: the length of the sequence, rounded, at which
# attention's quadratic part is half of all FLOPs in {eq}`model-flops`. Use only
# `flops_per_token`. Why does it come later for wider models?
# ````


# %% tags=["solution"]
def crossover(config: ModelConfig) -> int:
    """Return the number of tokens at which pairs cost as much as parameters."""
    # C = a + b T, and the two are equal at T = a / b. With 12 d^2 entries in a layer it is 6 d:
    # matrices grow with the square of the width, attention only with the width.
    b = flops_per_token(config, 2) - flops_per_token(config, 1)
    return round(flops_per_token(config, 1) / b - 1)


# %% tags=["check"]
def share_of_pairs(config: ModelConfig, tokens: int) -> float:
    pairs = flops_per_token(config, 2 * tokens) - flops_per_token(config, tokens)
    return pairs / flops_per_token(config, tokens)


configs = {name: ModelConfig.preset(name) for name in ("gpt2", "llama3-8b", "qwen3-0.6b")}
odd_sizes = {"vocab_size": 700, "context_length": 64, "d_model": 48, "n_layers": 3}
configs["an odd one"] = ModelConfig(**odd_sizes, n_heads=4, d_head=10)
for name, config in configs.items():
    tokens = crossover(config)
    whole = isinstance(tokens, int) and tokens > 1
    assert whole, f"{name}: expected a whole number of tokens, got {tokens!r}"
    share = share_of_pairs(config, tokens)
    assert abs(share - 0.5) < 0.01, (
        f"{name}: at {tokens} tokens attention has a share of {share:.3f}, which is not one half"
    )
    near = [abs(share_of_pairs(config, n) - 0.5) for n in (tokens - 1, tokens, tokens + 1)]
    assert near[1] == min(near), f"{name}: one token fewer or more than {tokens} is nearer to half"

# %% [markdown]
# ````{exercise} What fits on the card
# :label: ex-model-fit
# *Fifteen minutes.* A card has `memory` bytes. Write `tokens_that_fit(config, memory, batch_size)`:
# for weights and cache in bfloat16, how many tokens of each row fit beside the weights, at most
# the context length? Where there is no room for the weights, the answer is 0. Mind the sliding
# window. How many
# rows of 8,192 tokens does Llama 3 with 8 billion parameters take on a card of 24 GB?
# ````


# %% tags=["solution"]
def tokens_that_fit(config: ModelConfig, memory: int, batch_size: int) -> int:
    """Return how many tokens of ``batch_size`` rows fit into ``memory`` bytes with the weights."""
    # Seven rows: 16.1 GB are weights, and a row of 8,192 tokens takes 1.07 GB of the other 7.9.
    room = memory - 2 * count_parameters(config)
    if room >= cache_bytes(config, batch_size, config.context_length):
        return config.context_length
    return max(0, room // cache_bytes(config, batch_size, 1))


# %% tags=["check"]
for name, memory, rows in (
    ("llama3-8b", 24 * 10**9, 7),
    ("llama3-8b", 24 * 10**9, 8),
    ("llama3-8b", 10**9, 1),
    ("mistral-7b", 16 * 10**9, 2),
    ("mistral-7b", 15 * 10**9, 1),
    ("llama2-7b", 14 * 10**9, 1),
    ("gpt2", 10**9, 3),
):
    config = ModelConfig.preset(name)
    tokens, weights = tokens_that_fit(config, memory, rows), 2 * count_parameters(config)
    case = f"{name} in {memory // 10**9} GB, {rows} rows"
    whole = isinstance(tokens, int) and 0 <= tokens <= config.context_length
    assert whole, f"{case}: a row has 0 to context_length whole tokens, and not {tokens!r}"
    needed = [weights + cache_bytes(config, rows, t) for t in (max(tokens, 1), tokens + 1)]
    assert tokens == 0 or needed[0] <= memory, f"{case}: {tokens} tokens do not fit with weights"
    full = tokens == config.context_length
    assert full or needed[1] > memory, f"{case}: one more than {tokens} tokens would fit"

# %% tags=["engine"]
# Counts the rows of logits that are made at once, for the check of the next exercise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def rows_of_logits(x: Any) -> int:
    """Logits are 1,000 wide there; what is 64 by 1,000 is the head, turned."""
    is_logits = isinstance(x, Tensor) and x.shape[-1:] == (1000,) and x.shape[-2:] != (64, 1000)
    return x.numel() // 1000 if is_logits else 0


class RowsOfLogits(TorchDispatchMode):
    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, *map(rows_of_logits, tree_leaves(result)), 0)
        return result


# %% [markdown]
# ````{exercise} A loss without all the logits
# :label: ex-model-chunks
# *Half an hour.* The logits of a long batch can take more memory than the model. Write
# `chunked_loss(model, ids, targets, chunk)`: the mean cross-entropy over all targets but those of
# -100, with the same gradients, but never with logits for more than `chunk` tokens at once, not
# even for the backward pass. `torch.utils.checkpoint.checkpoint` computes a function again in the
# backward pass instead of keeping what it needs. What is paid for the memory? (The check counts
# logits with `RowsOfLogits` and `rows_of_logits`, in the folded cell above.)
# ````


# %% tags=["solution"]
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Return the mean cross-entropy, with at most ``chunk`` rows of logits at a time."""
    # The products of the head are done once more: for each of its entries 8 operations, not 6.
    from torch.utils.checkpoint import checkpoint

    def piece(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden), wanted, reduction="sum")

    hidden, wanted = model.hidden_states(ids).flatten(0, 1), targets.flatten()
    pieces = zip(hidden.split(chunk), wanted.split(chunk), strict=True)
    total = sum(checkpoint(piece, *pair, use_reentrant=False) for pair in pieces)
    return total / (wanted != -100).sum()


# %% tags=["check"]
seed_everything(0)
model = TransformerLM(ModelConfig.preset("tiny", vocab_size=1000)).double()
context, wanted = torch.randint(1000, (2, 4, 32))
wanted[1, 5:] = -100
plain = F.cross_entropy(model(context).flatten(0, 1), wanted.flatten())
expected = torch.autograd.grad(plain, list(model.parameters()))
kept = []


def weigh(tensor: Tensor) -> Tensor:
    kept.append(rows_of_logits(tensor))
    return tensor


with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor), RowsOfLogits() as made:
    loss = chunked_loss(model, context, wanted, chunk=10)
assert made.most <= 10, f"logits of {made.most} tokens are made at once"
assert torch.allclose(loss, plain), f"the mean over what counts is {plain:.3f}, got {loss:.3f}"
assert sum(kept) <= 10, f"logits of {sum(kept)} tokens are kept for the backward pass"
assert loss.requires_grad, "the loss has no gradient"
with RowsOfLogits() as made:
    loss.backward()
assert made.most <= 10, f"logits of {made.most} tokens are made at once in the backward pass"
for (name, p), e in zip(model.named_parameters(), expected, strict=True):
    assert p.grad is not None, f"{name} gets no gradient"
    assert torch.allclose(p.grad, e), f"the gradient of {name} is another"

# %% [markdown]
# ````{exercise} Grow a model
# :label: ex-model-deepen
# *Half an hour.* A trained model shall get more layers without forgetting {cite}`chen2016net2net`.
# Write `deepen(model, n_layers)`: a model with `n_layers` blocks that computes the same function as
# `model`, of which it keeps all parameters; the new blocks come last, and can be trained. Which of
# their matrices get a gradient in the first step?
# ````


# %% tags=["solution"]
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    """Return a copy of ``model`` with more blocks that add nothing yet."""
    # A block that writes zeros is the identity. The writing matrices o_proj and down_proj get a
    # gradient at once; the others only after these have left zero.
    deeper = TransformerLM(ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers}))
    deeper.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for block in deeper.blocks[model.config.n_layers :]:
            block.attention.o_proj.weight.zero_()
            block.feed_forward.down_proj.weight.zero_()
    return deeper


# %% tags=["check"]
shallow = deepcopy(pupil).double()
deeper = deepen(shallow, 5)
assert len(shallow.blocks) == shallow.config.n_layers == 3, "the old model has been changed"
assert len(deeper.blocks) == deeper.config.n_layers == 5, "five blocks, in the configuration, too"
assert torch.allclose(deeper.double()(ids), shallow(ids)), "the function is another"
for name, parameter in shallow.named_parameters():
    kept = deeper.get_parameter(name)
    assert torch.equal(kept, parameter), f"{name} is another: new blocks come last"
    assert kept.data_ptr() != parameter.data_ptr(), (
        f"{name} is shared with the old model, and would be trained with it"
    )
deeper(ids).square().sum().backward()
for block in deeper.blocks[3:]:
    for part in (block.attention, block.feed_forward):
        learns = any(p.grad is not None and p.grad.any() for p in part.parameters())
        assert learns, "nothing in a new block gets a gradient: it never begins to learn"
places = [p.data_ptr() for p in deeper.parameters()]
assert len(places) == len(set(places)), "two new blocks share their parameters"

# %% [markdown]
# ````{exercise} Open another family
# :label: ex-model-phi3
# *Three quarters of an hour.* Phi-3 {cite}`abdin2024phi3` is a Llama whose file has the matrices of
# q, k and v as one, `qkv_proj`, one below the other, and those of gate and up as `gate_up_proj`.
# Write `read_phi3(folder)`, which opens such a folder as our model. You may write a folder of
# your own and open that; `load_file`, `save_file`, `json`, `tempfile` and `Path` are imported
# already. In its `config.json`, a Phi-3 says what a Llama says, but for its `model_type`.
# ````


# %% tags=["solution"]
def read_phi3(folder: Path) -> TransformerLM:
    """Return the Phi-3 in ``folder``."""
    entries = json.loads((folder / "config.json").read_text())
    width = entries["hidden_size"] // entries["num_attention_heads"]
    heads = [entries[f"num_{kind}_heads"] * width for kind in ("attention", "key_value")]
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = {name: tensor}
        if "qkv_proj" in name:
            pieces = zip("qkv", tensor.split([heads[0], heads[1], heads[1]]), strict=True)
            parts = {name.replace("qkv", kind): piece for kind, piece in pieces}
        if "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        tensors |= {key: part.contiguous() for key, part in parts.items()}
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, Path(place, "model.safetensors"))
        Path(place, "config.json").write_text(json.dumps(entries | {"model_type": "llama"}))
        return TransformerLM.from_pretrained(place)


# %% tags=["check"]
for n_kv_heads in (4, 2):
    config = transformers.Phi3Config(**sizes | {"num_key_value_heads": n_kv_heads}, pad_token_id=0)
    theirs = transformers.Phi3ForCausalLM(config).eval()
    theirs.save_pretrained(folder / "phi3")
    try:
        ours = read_phi3(folder / "phi3")
    except (RuntimeError, ValueError) as error:
        raise AssertionError(f"with {n_kv_heads} heads of keys: {error}") from None
    finally:
        shutil.rmtree(folder / "phi3")
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        attention, mlp = block.attention, block.feed_forward
        rows = {
            "qkv_proj": [attention.q_proj, attention.k_proj, attention.v_proj],
            "gate_up_proj": [mlp.gate_proj, mlp.up_proj],
        }
        for name, parts in rows.items():
            whole = (layer.self_attn if name == "qkv_proj" else layer.mlp).get_submodule(name)
            same = torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
            assert same, f"with {n_kv_heads} heads of keys: our parts of {name} have other rows"
    with torch.no_grad():
        mine, other = ours(prompt), theirs(prompt).logits
    close = (mine - other).abs().max() < 1e-4 * other.abs().max()
    assert close, f"with {n_kv_heads} heads of keys: other logits from the same matrices"

# %% tags=["remove-cell"]
shutil.rmtree(folder, ignore_errors=True)

# %% [markdown]
# ## Summary
#
# A language model is an embedding, a stack of blocks, a normalization and a head. One class with a
# checked configuration is GPT-2, Llama, Qwen, Mistral or Mixtral. It starts with a loss of
# $\ln V + \frac12$; nothing reaches an output from the future or from another document; caches and
# packing change nothing. A tied matrix gets the sum of two gradients. Parameters follow from sizes
# exactly; a token costs $6M$ operations and a part that grows with the length of the text; training
# keeps 16 bytes a parameter and some $16 d$ to $20 d$ numbers for each token and layer; use keeps
# a key and a value for each token, layer and head that has them. Views make one table serve for
# saving and loading, folders are replaced as a whole, and nothing that a foreign folder says is
# believed without a look.
#
# **Checklist: before a new model is trained.**
#
# - Count it: `count_parameters`, `flops_per_token`, `training_memory`; and `cache_bytes`, for use.
# - A vocabulary of more than a tenth of all parameters: tie it.
# - Many readers at once, or long texts: fewer heads of keys, or a window.
# - First loss near $\ln V + \sigma^2/2$; an influence map without a future; one batch by heart.
# - Logits that take more memory than the layers: a loss in pieces.
# - Keep to a family that others can open, unless a difference is what you study.
#
# **Further reading.** Kaplan and colleagues {cite}`kaplan2020scaling` count operations,
# Korthikanti and colleagues {cite}`korthikanti2023reducing` activations, Pope and colleagues
# {cite}`pope2023efficiently` what it takes to serve a large model. Next, chapter 12 turns to the
# loss, and to the optimizers that make it small.
