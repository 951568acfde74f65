# %% [markdown]
# # LoRA
#
# > Tune a model by a few thousand numbers beside its frozen weights: what a low rank can hold,
# > what it saves, and what it costs.
#
# Ten hospitals want ten assistants, each tuned on its own forms and in its own tone. The model has
# seven billion weights, so each assistant is a file of more than 13 GB, needs a GPU to itself, and
# takes more than a hundred gigabytes of memory to tune. And the ten files hardly differ: in the
# experiment below, tuning changes the matrices by about a tenth of their size.
#
# Why not store only the difference? As a matrix it takes as much space as the weights; as the
# product of two thin matrices, one with 16 columns and one with 16 rows, it would take less than a
# hundredth of that. {term}`LoRA` does not compress the difference afterward: it trains the two thin
# matrices from the beginning, beside weights that stay as they are {cite}`hu2022lora`. The thin
# matrices of a model are its **{term}`adapter`**.
#
# The first half of the chapter asks what the difference looks like, builds the layer, and measures
# what an adapter can do and store. The second half puts adapters to work: many over one base, over
# a base in four bits, and in files that others can open.
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:class}`~llmbook.lora.LoRAConfig`, {py:class}`~llmbook.lora.LoRALinear`, {py:func}`~llmbook.lora.apply_lora`, {py:func}`~llmbook.lora.merge_lora`, {py:func}`~llmbook.lora.unmerge_lora`, {py:func}`~llmbook.lora.without_lora`, {py:func}`~llmbook.lora.adapter_state`, {py:func}`~llmbook.lora.load_adapter_state`, {py:class}`~llmbook.lora.AdapterBank`, {py:func}`~llmbook.lora.nf4_levels`, {py:func}`~llmbook.lora.quantize_nf4`, {py:class}`~llmbook.lora.NF4Linear`, {py:func}`~llmbook.lora.quantize_base`, {py:func}`~llmbook.lora.merge_quantized`, {py:func}`~llmbook.lora.save_adapter`, {py:func}`~llmbook.lora.load_adapter` |
# | **You need** | instruction tuning ({doc}`19_instruction`), training ({doc}`13_training`), matrices and their singular values |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp lora

# %% tags=["engine"]
#| export
# The imports of the module
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64, Int8, UInt8
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file
from torch import nn, Tensor
from torch.nn import functional as F

# %% [markdown]
# ## The bill for ten copies
#
# We first count for the model with seven billion weights, then try the idea on the small one that
# {doc}`13_training` trained on stories of the {term}`tiny world`.

# %% [markdown] tags=["engine"]
# ### Engine room: the imports

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.attention import KVCache
from llmbook.environment import check_choice, check_fraction, check_path, check_text
from llmbook.environment import check_whole, whole_directory
from llmbook.generation import Completion, generate, QuantizedLinear, Sampling, stored_bytes
from llmbook.instruction import WORLD_CHAT, Example, InstructionDataset, Message, story_examples
from llmbook.instruction import world_conversations
from llmbook.model import model_type, TransformerLM
from llmbook.tinyworld import VALUES, judge_reply, make_questions, Question, TinyWorld
from llmbook.tokenizer import BPETokenizer
from llmbook.training import documents_score, pretrained, Trainer, TrainingConfig

# %% tags=["engine"]
# What the chapter needs, but not the module
import csv

import matplotlib.pyplot as plt
import numpy as np

import llmbook
from llmbook.environment import seed_everything
from llmbook.evaluation import mean_interval
from llmbook.model import count_parameters, ModelConfig

# %% [markdown]
# ### Sixteen bytes for each weight
#
# A common recipe trains in 16 bits, with {term}`master weights` in 32. It takes 16 bytes for each
# weight: 2 for itself, 2 for its gradient, 4 for the master weight, and 8 for Adam's two running
# means. ({term}`Autocast <autocast>`, counted in {doc}`15_precision`, takes 18.) A frozen weight
# takes 2. Suppose that each linear layer had two thin matrices beside it, of shapes (16, inputs)
# and (outputs, 16):

# %%
with torch.device("meta"):  # shapes without numbers
    big = TransformerLM(ModelConfig.preset("llama2-7b"))
linear = [m for name, m in big.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
weights = count_parameters(big)
thin = sum(16 * (m.in_features + m.out_features) for m in linear)
print(f"{'':13} numbers trained   memory to train one   ten on disk")
for name, n, frozen in (("full tuning", weights, 0), ("thin matrices", thin, weights)):
    memory, disk = (16 * n + 2 * frozen) / 1e9, (10 * n + frozen) * 2 / 1e9
    print(f"{name:13} {n / 1e6:11,.0f} million {memory:15,.0f} GB {disk:13,.0f} GB")

# %% [markdown]
# LoRA takes an eighth of the memory and a tenth of the disk, almost all of it for the base, which
# is stored once. {term}`Activations <activations>` come on top, about as many in both cases. An
# eleventh assistant costs 80 MB.
#
# That helps only if the thin matrices can do the work. Here is the whole idea (the constant 4 and
# the zeros in `b` are explained below):


# %%
class Thin(nn.Module):
    """A frozen linear layer, and beside it two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base, self.in_features = base.requires_grad_(False), base.in_features
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 4 * (x @ self.a.T) @ self.b.T


# %% [markdown]
# In the room below, `thin_copy` puts one beside each matrix of {term}`attention` and
# {term}`feed-forward networks <feed-forward network>` and freezes everything else, `tune_on_facts`
# trains on chapter 19's questions about half of the characters, and `replies_right` asks about the
# other half.

# %% [markdown] tags=["engine"]
# ### Engine room: tuning on the questions of chapter 19, and how values are shown

# %% [markdown] tags=["engine"]
# The data are those of {doc}`19_instruction`: conversations about 24 of the 48 characters. A
# quarter of each batch is stories, so that the model does not forget how to tell them. The data are
# made once.


# %% tags=["engine"]
#| export
@cache
def _tuning_examples() -> tuple[list[Example], list[Example]]:
    """Return conversations and stories of the tiny world."""
    world, tokenizer = TinyWorld(), pretrained("tinyworld").tokenizer
    talks = [WORLD_CHAT.encode(tokenizer, talk) for talk in world_conversations(world)]
    return talks, story_examples(world, tokenizer, 2000)


def _train(
    model: nn.Module, data: InstructionDataset, n_steps: int, rate: float
) -> torch.optim.Optimizer:
    """Train by the settings of chapter 19."""
    settings: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0, "warmup": 10}
    settings |= {"schedule": "linear", "final": 0.0, "batch_size": data.batch_size}
    config = TrainingConfig(n_steps=n_steps, learning_rate=rate, seed=data.seed, **settings)
    trainer = Trainer(model, data, config)
    trainer.train()
    return trainer.optimizer


# %% tags=["engine"]
#| export
def tune_on_facts(
    model: nn.Module, n_steps: int, learning_rate: float, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Train what is not frozen of a model of the tiny world, and return the optimizer.

    The data are questions about facts of half of the characters, and stories. ``learning_rate`` is
    the peak of AdamW's, which rises for 10 steps and then falls to zero.
    """
    check_whole("n_steps", n_steps, 1)
    _check_positive("learning_rate", learning_rate)
    check_whole("seed", seed, 0, 2**32 - 1)
    talks, stories = _tuning_examples()
    end = pretrained("tinyworld").tokenizer.special_tokens["<|endoftext|>"]
    data = InstructionDataset(talks, 32, 128, end, others=stories, share=0.25, seed=seed)
    return _train(model, data, n_steps, learning_rate)


# %% tags=["engine"]
#| export
def replies_right(model: TransformerLM) -> float:
    """Return the share of held-out questions about facts that a tuned model answers right.

    They are about the half of the tiny world's characters that is not in the tuning data.
    """
    world, tokenizer = TinyWorld(), pretrained("tinyworld").tokenizer
    asked = make_questions(world, "fact", "held_out")
    prompts = [
        WORLD_CHAT.encode(tokenizer, [Message("user", question.text)], prompt=True).ids
        for question in asked
    ]
    options: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "tokenizer": tokenizer}
    options["stop_tokens"] = (tokenizer.special_tokens["<|im_end|>"],)
    replies = generate(model, [list(ids) for ids in prompts], max_new_tokens=24, **options)
    pairs = zip(asked, replies, strict=True)
    return sum(judge_reply(world, q, str(reply.text)).right for q, reply in pairs) / len(asked)


# %% tags=["engine"]
#| export
# What several functions check
def _check_positive(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r:.60}")


def _named(given: object) -> str:
    """Return what an error says of an argument: of a module its class, not all its layers."""
    if isinstance(given, nn.Module):
        return f"a module of class {type(given).__name__}"
    return f"{given!r:.60}"


# %% [markdown] tags=["engine"]
# Trained models differ a little from processor to processor. `about` prints the range that a value
# must lie in, and fails if it lies outside. `first_right` shows the first reply that is right, up
# to its period.

# %% tags=["engine"]
plt.style.use("llmbook.book")
torch.set_num_threads(1)
base = pretrained("tinyworld").model


def about(what: str, value: float, low: float, high: float, unit: str = "%") -> None:
    """Print between what a value lies, shares in percent, after checking that it does."""
    assert low <= value <= high, f"{what}: {value}"
    scale = 100 if unit == "%" else 1
    print(f"{what}: {scale * low:.0f} to {scale * high:.0f} {unit}")


def thin_copy(rank: int) -> TransformerLM:
    """A frozen copy of the base with thin matrices beside those of its blocks."""
    model = deepcopy(base).requires_grad_(False)
    for block in model.blocks:
        for part in (block.attention, block.feed_forward):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Thin(layer, rank))
    return model


# %% tags=["engine"]
# A first question, and a table
def first_right(model: TransformerLM) -> tuple[str, str]:
    """Return the first held-out question that a model answers right, and the reply."""
    world, tokenizer = TinyWorld(), pretrained("tinyworld").tokenizer
    options: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "tokenizer": tokenizer}
    options |= {"stop_strings": (".",), "max_new_tokens": 24}
    for question in make_questions(world, "fact", "held_out"):
        talk = [Message("user", question.text)]
        prompt = list(WORLD_CHAT.encode(tokenizer, talk, prompt=True).ids)
        reply = str(generate(model, [prompt], **options)[0].text).strip() + "."
        if judge_reply(world, question, reply).right:
            return question.text, reply
    raise AssertionError("no reply is right")


def table_of(name: str) -> list[dict[str, str]]:
    """Return the rows of a table of benchmarks/results."""
    path = Path(llmbook.__file__).parents[1] / "benchmarks/results" / name
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# %% tags=["engine"]
def keep_directions(updates: dict[str, Tensor], rank: int) -> TransformerLM:
    """The base with the top directions of each update, and nothing else of it."""
    model = deepcopy(base)
    for name, update in updates.items():
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        model.state_dict()[name] += (u[:, :rank] * s[:rank]) @ v[:rank]
    return model


def shares(update: Tensor) -> Tensor:
    """The share of the squared norm that the first directions hold: the first, two, three..."""
    squares = torch.linalg.svdvals(update) ** 2
    return squares.cumsum(0) / squares.sum()


def directions(matrices: Sequence[Tensor]) -> float:
    """How many directions hold 90 % of the squared norm of a matrix, the mean of several."""
    return float(np.mean([int((shares(matrix) < 0.9).sum()) + 1 for matrix in matrices]))


def stirred(rank: int) -> TransformerLM:
    """A copy of the base with adapters that do something, as if they had been trained."""
    model = deepcopy(base)
    apply_lora(model, LoRAConfig(rank=rank), seed=0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    return model


# %% tags=["engine"]
def error_of_bound(adapters: dict[str, Any]) -> float:
    """By how much weights differ from the base's, relative to 2u(|W| + |D|), at most."""
    shares = []
    for name, layer in adapters.items():
        before = base.get_submodule(name).weight
        bound = 2**-23 * (before.abs() + layer.update.abs())
        shares.append(((layer.base.weight - before).abs() / bound).max().item())
    return max(shares)


# %% tags=["engine"]
def first_step(rank: int, rslora: bool, rule: type[torch.optim.Optimizer], rate: float) -> float:
    """By how much the loss of a layer falls in the first step, the mean of ten beginnings."""
    falls = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(64, 128, generator=generator).double() for _ in range(2))
        config = LoRAConfig(rank=rank, rslora=rslora)
        linear = nn.Linear(128, 128).requires_grad_(False)
        nn.init.normal_(linear.weight, std=128**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        layer = LoRALinear(linear, config, generator=generator).double()
        optimizer = rule([layer.lora_a, layer.lora_b], lr=rate)
        before = ((layer(x) - y) ** 2).sum()
        before.backward()
        optimizer.step()
        falls.append((before - ((layer(x) - y) ** 2).sum()).item())
    return float(np.mean(falls))


# %% tags=["engine"]
def draw_directions(shares: dict[str, Tensor], kept: dict[int, float], whole: float) -> None:
    _, axes = plt.subplots(1, 2)
    for (name, share), style in zip(shares.items(), ("-", "--", ":"), strict=True):
        axes[0].plot(range(len(share) + 1), [0.0, *share.tolist()], style, label=name)
    axes[0].set(title="Share of the squared norm", xlabel="directions kept", ylim=(0, 1.02))
    axes[0].legend(loc="lower right")
    axes[1].plot(range(len(kept)), list(kept.values()), "o-", label="linear layers")
    axes[1].axhline(whole, color="gray", linestyle=":", label="everything")
    axes[1].set(title="Questions answered right", xlabel="directions kept", ylim=(0, 1.02))
    axes[1].set_xticks(range(len(kept)), [str(rank) for rank in kept])
    axes[1].legend(loc="lower right")
    plt.show()


def draw_rates(curves: dict[str, dict[float, float]]) -> None:
    for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=True):
        plt.plot(list(curve), list(curve.values()), f"o{style}", label=name)
    plt.xscale("log")
    plt.xlabel("peak learning rate")
    plt.ylabel("questions answered right")
    plt.ylim(0, 1.02)
    plt.legend(loc="lower center")
    plt.show()


# %% tags=["engine"]
def draw_stored(curve: dict[int, tuple[int, float, float]], most: float) -> None:
    full, lora = curve[0], [point for rank, point in curve.items() if rank]
    numbers, bits, half = zip(*lora, strict=True)
    plt.errorbar(numbers, bits, half, fmt="o-", capsize=3, label="LoRA")
    plt.errorbar(full[0], full[1], full[2], fmt="s", capsize=3, label="full tuning")
    for rank, n in zip((rank for rank in curve if rank), numbers, strict=True):
        plt.annotate(f"rank {rank}", (n, curve[rank][1]), (6, -12), textcoords="offset points")
    plt.axhline(most, color="gray", linestyle=":", label="all that there is")
    plt.xscale("log")
    plt.xlabel("numbers trained")
    plt.ylabel("bits stored")
    plt.legend()
    plt.show()


# %% [markdown]
# ### A hundred steps
#
# We put two numbers beside each row and each column, and train for a hundred steps. (A value that
# depends on training is printed as the range that the cell accepts, not as a confidence interval.)

# %%
seed_everything(0)
model = thin_copy(rank=2)
tune_on_facts(model, 100, 0.02)
print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} numbers were trained")
about("the base, asked about the other half, is right", replies_right(base), 0.10, 0.20)
about("with thin matrices it is right", replies_right(model), 0.80, 0.99)
print(*first_right(model))

# %% [markdown]
# A model that could only tell stories now answers questions, even about characters that no training
# question mentions. That took 4,352 numbers beside its 203,968: what it knows is in the frozen
# weights, and what it had to learn is to look there. (The few replies of the base that are right
# are stories that happen to name the value.)

# %% [markdown]
# ## How low is the rank of an update?
#
# Why should so few numbers suffice? The usual answer is that the difference between a model before
# and after tuning has a low **{term}`rank <rank of a matrix>`**: it is a sum of a few products of a
# column and a row. This answer goes back to the observation that models can be tuned in a random
# subspace of a few hundred dimensions {cite}`aghajanyan2021intrinsic`, and is a hypothesis in the
# paper that introduced LoRA {cite}`hu2022lora`. We can look. We tune all weights for 300 steps, as
# in {doc}`19_instruction`, and take the difference of each matrix apart into directions:
#
# $$
# \Delta W = W_\text{after} - W_\text{before} = \sum_{i} \sigma_i u_i v_i^\top,
# \qquad \lVert \Delta W \rVert^2 = \sum_i \sigma_i^2 .
# $$ (lora-svd)
#
# Each term reads one direction $v_i$ of the input and writes one direction $u_i$ of the output. The
# {term}`singular values` $\sigma_1 \ge \sigma_2 \ge \dots$ say how much each contributes to the
# change, and the sum of the first $r$ terms is the best approximation of rank $r$ (Eckart and
# Young). So the question is how many directions make up most of the squared norm; `shares` returns
# the share of the first 1, 2, 3, … of them. Random matrices of the same shapes are the control:
# they have no preferred directions, and still their singular values differ.

# %%
full = deepcopy(base)
tune_on_facts(full, 300, 0.003)
after = full.state_dict()
names = [n for n in after if n.endswith("_proj.weight")]
updates = {name: after[name] - base.state_dict()[name] for name in names}
sizes = [update.norm() / base.state_dict()[name].norm() for name, update in updates.items()]
about("size of a change, relative to its matrix, mean", float(np.mean(sizes)), 0.07, 0.17)
draw = torch.Generator().manual_seed(0)
controls = [torch.randn(update.shape, generator=draw) for update in updates.values()]
about("directions for 90 % of a change, mean", directions([*updates.values()]), 16, 24, "")
print(f"for 90 % of a random matrix of its shape, mean: {directions(controls):.0f}")

# %% [markdown]
# Twenty directions are fewer than the 37 or so that random matrices need, but 20 of 64 is not low.
# Taken literally, the hypothesis is wrong here.
#
# What counts, however, is not the norm of a change but its effect. Adam makes steps of about the
# same size for every weight, whether the gradient is large or a hundredth of that and mostly noise
# ({doc}`12_optimization`), so most of the norm may have no effect. So we keep the top $r$
# directions of each matrix, set everything else back to the base, and ask the questions:

# %%
right = {r: replies_right(keep_directions(updates, r)) for r in (0, 1, 2, 4, 8, 16, 32, 64)}
for rank, low, high in ((0, 0.10, 0.20), (2, 0.20, 0.55), (8, 0.75, 0.95), (64, 0.90, 1.0)):
    about(f"{rank:2} directions of each matrix: right", right[rank], low, high)
about("everything that was tuned: right", whole := replies_right(full), 0.97, 1.0)

# %% [markdown]
# {numref}`fig-lora-directions` shows both shares for all numbers of directions:

# %% mystnb={"figure": {"caption": "Left: how much of the change the top directions hold. Right: how many questions are answered right when only these are kept.", "name": "fig-lora-directions"}, "image": {"alt": "Left, three concave curves from 0 to 1 over the number of directions kept, 0 to 64: at 8 directions a query matrix is at 0.85, an up matrix at 0.64, a random matrix of its shape at 0.29; at 50 all are at 0.95 or more. Right, the share of right replies over 0, 1, 2, 4, up to 64 directions, equally spaced: it rises from about 15 percent with none to nearly 90 with 8, then slowly to about 95 with 64, below a dotted line at 99 percent."}}
drawn = {"a query matrix": updates[names[0]], "an up matrix": updates[names[5]]}
drawn["random, of that shape"] = controls[5]
draw_directions({name: shares(matrix) for name, matrix in drawn.items()}, right, whole)

# %% [markdown]
# Eight directions of 64 do most of what the whole change does, although in the up matrix they hold
# less than two thirds of the squared norm. From 16 on, little is gained. (The last few percent are
# in other weights, such as the {term}`embedding` and the head.) So there are two different
# statements. *The update that full tuning finds has a low rank*: no. *There is an update of low
# rank that does the job*: yes. LoRA needs only the second. Two directions of *this* update answer
# about a third of the questions; the rank-2 update that was trained above answers nine in ten. It
# is better to look for a small update than to cut a large one down to size.

# %% [markdown]
# ## Two thin matrices
#
# A linear layer computes $y = Wx$ with a matrix of $m$ rows and $n$ columns. LoRA keeps $W$ and
# adds a product of rank $r$, with a constant $\alpha$ that the user sets:
#
# $$
# y = W x + s\, B A x, \qquad A \in \mathbb{R}^{r \times n},\; B \in \mathbb{R}^{m \times r},
# \qquad s = \frac{\alpha}{r} .
# $$ (lora-layer)
#
# The layer has $r(m + n)$ numbers to train instead of $mn$: for a square matrix of width 4096 and
# $r = 16$, one in 128. From $r = mn/(m+n)$ on, which is half the width of a square matrix, nothing
# is saved. $BAx$ is computed from the right, so the product $BA$ never exists during training.
#
# What are the gradients? Let $G = \partial L/\partial W'$ be the gradient for the matrix
# $W' = W + sBA$ as a whole, as full tuning would see it. A change of $A$ and $B$ changes the loss
# by
#
# $$
# \mathrm{d}L = \langle G, \mathrm{d}W' \rangle
# = s \langle G,\, \mathrm{d}B\, A + B\, \mathrm{d}A \rangle
# = \langle s\, G A^\top, \mathrm{d}B \rangle + \langle s\, B^\top G, \mathrm{d}A \rangle ,
# $$
#
# because $\langle G, XY \rangle = \operatorname{tr}(G^\top X Y) = \langle G Y^\top, X \rangle =
# \langle X^\top G, Y \rangle$. Hence
#
# $$
# \frac{\partial L}{\partial B} = s\, G A^\top, \qquad \frac{\partial L}{\partial A} = s\, B^\top G
# .
# $$ (lora-gradients)
#
# These equations say how to begin. The tuned model should start as the base, so $BA$ must be zero.
# If both matrices are zero, both gradients are zero forever. If only $B$ is zero, then $A$ has no
# gradient in the first step, but $B$ has one: $B$ moves, and from the second step on both do. So
# $A$ starts random and $B$ starts at zero. (The other way around would do as well.)
#
# {py:class}`~llmbook.lora.LoRALinear` is the class `Thin` with what practical use requires: a
# factor $\alpha/r$ in place of the 4, {term}`dropout` on the input of $A$, a switch, and a base
# that may also be one of chapter 14's quantized layers.

# %% [markdown] tags=["engine"]
# ### Engine room: the layer, layers by name and what is refused, merging

# %% [markdown] tags=["engine"]
# The names in `LoRAConfig` are those of PEFT, without the prefixes. `weight` gives the matrix of an
# adapted layer to code that reads it instead of calling the layer, as chapter 13's loss does with
# the head. (Dropout acts on what the layer reads, so it cannot act there; `apply_lora` refuses it
# for a head.) Chapter 14's fused step for small models multiplies by matrices that were put
# together beforehand; it is used for plain layers only, so that no adapter is silently left out. A
# test compares the tokens of `generate` with those of whole forward passes.


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What is adapted, and how: the names and meanings are those of PEFT's ``LoraConfig``.

    ``targets`` are names of linear layers, each the whole name or its end (``q_proj`` for all
    layers of that name); or a regular expression that matches whole names; or "all-linear", all
    but the head. The product of the thin matrices is multiplied by ``alpha / rank``, or with
    ``rslora`` by ``alpha / sqrt(rank)``. In training, ``dropout`` drops inputs of the thin ones.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1)
        _check_positive("alpha", self.alpha)
        check_fraction("dropout", self.dropout)
        if isinstance(self.targets, list):  # as files have it
            object.__setattr__(self, "targets", tuple(self.targets))
        _check_targets(self.targets)
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora: expected True or False, got {self.rslora!r}")

    @property
    def scale(self) -> float:
        """What the product of the thin matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# %% tags=["engine"]
#| export
class LoRALinear(nn.Module):
    """A frozen linear layer, and beside it two thin matrices that are trained (Hu et al., 2022).

    ``base`` is a ``Linear``, or a quantized layer with ``in_features`` and ``out_features``.
    ``lora_a``, (rank, in), is drawn as PEFT does, from a uniform distribution of variance
    1/(3 in); ``lora_b``, (out, rank), is zero, so that the layer begins as its base.
    """

    def __init__(
        self, base: nn.Module, config: "LoRAConfig", *, generator: torch.Generator | None = None
    ):
        super().__init__()
        _check_base(base, config)
        self.base: Any = base
        self.config, self.enabled = config, True
        sized: Any = base  # a Linear, or a quantized one
        self.in_features, self.out_features = int(sized.in_features), int(sized.out_features)
        a = torch.empty(config.rank, self.in_features)
        nn.init.uniform_(a, -(self.in_features**-0.5), self.in_features**-0.5, generator=generator)
        like = dense_weight(base)
        self.lora_a = nn.Parameter(a.to(like))
        self.lora_b = nn.Parameter(like.new_zeros(self.out_features, config.rank))

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the base's output, and the adapter's on top unless it is not ``enabled``."""
        out = self.base(x)
        if not self.enabled:
            return out
        dropped = F.dropout(x, self.config.dropout, self.training)
        thin = F.linear(dropped.to(self.lora_a.dtype), self.lora_a)
        return out + (self.config.scale * F.linear(thin, self.lora_b)).to(out.dtype)


# %% tags=["engine"]
#| export
class LoRALinear(LoRALinear):  # continued
    @property
    def update(self) -> Float[Tensor, "out_features in_features"]:
        """What the adapter adds to the matrix of its base."""
        return self.config.scale * (self.lora_b @ self.lora_a)

    @property
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The matrix that the layer multiplies by, for code that reads it: adapter included."""
        dense = dense_weight(self.base)
        return dense + self.update.to(dense.dtype) if self.enabled else dense

    @property
    def bias(self) -> Float[Tensor, " out_features"] | None:
        """The bias of the base."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        """Return what PyTorch prints of the layer."""
        return f"rank={self.config.rank}, scale={self.config.scale:g}"


# %% tags=["engine"]
#| export
def dense_weight(layer: nn.Module) -> Float[Tensor, "out_features in_features"]:
    """Return the matrix that a linear layer multiplies by, as floats.

    A quantized layer is asked for it: by its method ``dequantize``, if it is not chapter 14's.
    """
    if not isinstance(layer, nn.Module):
        raise ValueError(f"layer: expected a linear layer, got {_named(layer)}")
    if isinstance(layer, QuantizedLinear):
        return layer.weight.to(layer.scale.dtype) * layer.scale[:, None]
    dequantize = getattr(layer, "dequantize", None)
    weight = getattr(layer, "weight", None) if dequantize is None else dequantize()
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"layer: expected a linear layer, got {_named(layer)}")
    return weight


# %% tags=["engine"]
#| export
def apply_lora(model: nn.Module, config: LoRAConfig, *, seed: int) -> list[str]:
    """Put a ``LoRALinear`` in place of each targeted layer of ``model``, and freeze all else.

    Returns the names of the adapted layers. The thin matrices depend on ``seed`` alone. Refused
    by name are: targets that are no linear layer of the model, a rank that a matrix cannot have,
    layers that share their matrix with another one (a tied head), and a model that has adapters.
    """
    check_whole("seed", seed, 0, 2**64 - 1)
    names = _targeted(model, config)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        made[name] = LoRALinear(model.get_submodule(name), config, generator=generator)
    model.requires_grad_(False)
    for name, layer in made.items():
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
        _replace(model, name, layer)
    return names


# %% tags=["engine"]
#| export
# Layers by name
def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return what can be adapted, by name: all that has features in and out."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and hasattr(module, "in_features") and hasattr(module, "out_features")
    }


# %% tags=["engine"]
#| export
# Which layers a configuration targets
def _targeted(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the names of the layers that ``config`` targets, or say why they cannot be."""
    _check_plain(model)
    linear, targets = _linear_layers(model), config.targets
    if not linear:
        raise ValueError(f"model: expected one with linear layers, got {_named(model)}")
    if targets == "all-linear":
        names = [name for name in linear if name.rpartition(".")[2] != "lm_head"]
    elif isinstance(targets, str):
        names = [name for name in linear if re.fullmatch(targets, name)]
    else:
        names = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in targets)]
    _check_found(targets, names, linear, model)
    if "lm_head" in names and config.dropout:
        expected = "0.0 where lm_head is adapted, as a loss may read its matrix"
        raise ValueError(f"dropout: expected {expected}, got {config.dropout}")
    for name in names:
        _check_alone(model, name)
        _check_rank(config.rank, linear[name], name)
    return names


# %% tags=["engine"]
#| export
# What a model must have
def _check_plain(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a module of PyTorch, got {model!r:.60}")
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            raise ValueError(f"model: expected one without adapters, but {name} has one")


def _check_found(
    targets: str | tuple[str, ...], names: list[str], linear: Mapping[str, Any], model: nn.Module
) -> None:
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    wanted = targets if isinstance(targets, tuple) else (targets,)
    for target in wanted:
        if isinstance(targets, tuple):
            hit = any(name == target or name.endswith(f".{target}") for name in names)
        else:
            hit = bool(names)
        if not hit:
            got, found = repr(target), _submodule(model, target)
            if found is not None:
                got += f", {_named(found)}"
            elif any(name.endswith(f".{target}") for name in linear):
                got += f", a regular expression that matches no whole name: write ({target!r},)"
            raise ValueError(f"targets: expected linear layers, such as {known}, got {got}")


# %% tags=["engine"]
#| export
def _check_alone(model: nn.Module, name: str) -> None:
    """Refuse a matrix that another module has, too: a change of one would change the other."""
    weight = model.get_submodule(name)._parameters.get("weight")
    for other, module in model.named_modules():
        if other != name and weight is not None and module._parameters.get("weight") is weight:
            expected = "layers with a matrix of their own"
            raise ValueError(f"targets: expected {expected}, but {name} shares its with {other}")


# %% tags=["engine"]
#| export
def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of a model by name; a ``ValueError`` if there are none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not found:
        raise ValueError(
            f"model: expected one with adapters, as apply_lora makes, got {_named(model)}"
        )
    return found


# %% tags=["engine"]
#| export
def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the thin matrices of a model, which are what is trained."""
    layers = lora_layers(model).values()
    return [matrix for layer in layers for matrix in (layer.lora_a, layer.lora_b)]


# %% tags=["engine"]
#| export
def merge_lora(model: nn.Module) -> dict[str, LoRALinear]:
    """Add each adapter to the matrix of its base, which takes its place again.

    Returns the adapted layers by name, for ``unmerge_lora``. A quantized base is refused: to add
    to it means to round again.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        if type(layer.base) is not nn.Linear:
            got = type(layer.base).__name__
            raise ValueError(f"model: expected a Linear under {name}, to merge into, got {got}")
    for name, layer in layers.items():
        with torch.no_grad():
            layer.base.weight.add_(layer.update)
        _replace(model, name, layer.base)
    return layers


# %% tags=["engine"]
#| export
def unmerge_lora(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Take the adapters that ``merge_lora`` returned out of the matrices, and put them beside."""
    if not layers:
        raise ValueError("layers: expected those that were merged into model, got none")
    for name, layer in layers.items():
        if _submodule(model, name) is not layer.base:
            raise ValueError(f"layers: expected those that were merged into model, got {name}")
    for name, layer in layers.items():
        with torch.no_grad():
            layer.base.weight.sub_(layer.update)
        _replace(model, name, layer)


# %% tags=["engine"]
#| export
@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Switch the adapters off in a ``with`` block: the model is its base, to the bit."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


# %% tags=["engine"]
#| export
# What a configuration and a layer must be
def _check_targets(targets: object) -> None:
    texts = isinstance(targets, str) or (
        isinstance(targets, tuple) and all(isinstance(t, str) and t for t in targets)
    )
    if not texts or not targets:
        expected = "names of layers, a regular expression, or 'all-linear'"
        raise ValueError(f"targets: expected {expected}, got {targets!r:.60}")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"targets: {targets!r:.60} is no regular expression: {error}"
            ) from None


def _check_base(base: Any, config: Any) -> None:
    if not isinstance(config, LoRAConfig):
        raise ValueError(f"config: expected a LoRAConfig, got {config!r:.60}")
    if isinstance(base, LoRALinear) or not hasattr(base, "in_features"):
        raise ValueError(f"base: expected a linear layer without an adapter, got {_named(base)}")
    _check_rank(config.rank, base)


def _check_rank(rank: int, layer: Any, name: str = "base") -> None:
    most = min(layer.in_features, layer.out_features)
    if rank > most:
        shape = f"{layer.out_features} by {layer.in_features}"
        raise ValueError(f"rank: expected at most {most}, as {name} is {shape}, got {rank}")


# %% [markdown]
# ### The gradients, checked against the derivation
#
# A plain layer with the matrix $W'$ gives $G$, and the gradients of $A$ and $B$ must follow from it
# by {eq}`lora-gradients`, both at first and after a step:

# %%
seed_everything(0)
layer = LoRALinear(nn.Linear(24, 16).requires_grad_(False), LoRAConfig(rank=4)).double()
x, y, s = torch.randn(50, 24).double(), torch.randn(50, 16).double(), layer.config.scale
changed = int((layer(x) != layer.base(x)).sum())
print(f"at first {changed} of {50 * 16} outputs differ from those of the base, in any bit")
for moment in ("at first", "a step later"):
    whole = layer.weight.detach().requires_grad_(True)
    G, *_ = torch.autograd.grad(((F.linear(x, whole, layer.bias) - y) ** 2).sum(), whole)
    a, b = torch.autograd.grad(((layer(x) - y) ** 2).sum(), [layer.lora_a, layer.lora_b])
    torch.testing.assert_close((a, b), (s * layer.lora_b.T @ G, s * G @ layer.lora_a.T))
    print(f"{moment:12}  gradient of A: {a.norm():6.1f}   of B: {b.norm():6.1f}")
    layer.lora_b.data -= 0.001 * b
layer.config = replace(layer.config, dropout=0.5)
for mode in ("train", "eval"):
    layer.train(mode == "train")
    changed = int((layer(x) != layer(x)).sum())
    print(f"dropout, {mode}: two passes differ in {changed} of {50 * 16} outputs")

# %% [markdown]
# The gradients agree. At first only $B$ has one; a step later both do. Dropout makes two passes
# over the same input differ, but only in training. (It acts only on the input of $A$.)
#
# ### What the factor is for
#
# The factor $s$ is meant to make one {term}`learning rate` fit all ranks. Does $\alpha/r$ do so?
# Look at the first step, in which only $B$ moves. Gradient descent takes
# $\Delta B = -\eta s\, G A^\top$, which changes the loss, to first order, by
#
# $$
# \langle G, s\, \Delta B\, A \rangle = -\eta s^2 \lVert G A^\top \rVert^2 .
# $$
#
# The entries of $A$ are independent, with mean zero and variance $\tau^2$, so the expectation of
# $\lVert G A^\top \rVert^2$ is $r\tau^2 \lVert G \rVert^2$: each of the $r$ rows of $A$ adds the
# same. The loss falls in proportion to $s^2 r$. With $s = \alpha/r$ this is $\alpha^2/r$, less and
# less as the rank grows; with $s = \alpha/\sqrt r$ it is the same for all ranks. That is the
# rank-stabilized factor of rsLoRA {cite}`kalajdzievski2023rank`.
#
# But adapters are usually trained with Adam, whose first step is
# $\Delta B = -\eta \operatorname{sign}(s\,GA^\top)$, whatever the size of the gradient. The loss
# then changes by $-\eta s \sum_{ik} \lvert (GA^\top)_{ik} \rvert$, a sum over $m r$ entries of
# about the same size, so the fall is proportional to $s r$. Now $\alpha/r$ makes it the same for
# all ranks, and with $\alpha/\sqrt r$ it grows by $\sqrt r$. Both can be measured. `first_step`
# makes one step on a layer of width 128 with a squared error, and returns the fall of the loss, the
# mean of ten beginnings:

# %%
print("fall of the loss in the first step, relative to rank 1; ranks 1, 4, 16, 64")
for rule, rate in ((torch.optim.SGD, 1e-9), (torch.optim.Adam, 1e-6)):
    for rslora, name in ((False, "alpha / r      "), (True, "alpha / sqrt(r)")):
        falls = [first_step(rank, rslora, rule, rate) for rank in (1, 4, 16, 64)]
        units = "  ".join(f"{value / falls[0]:5.2f}" for value in falls)
        print(f"{rule.__name__:4} {name} {units}")

# %% [markdown]
# Both predictions hold: the right factor depends on the optimizer. With Adam, at least at the
# beginning, $\alpha/r$ keeps the best rate where it is when the rank changes, as is also reported
# for large models {cite}`schulman2025lora`. Later both matrices move, and rsLoRA's analysis of that
# regime prefers $\alpha/\sqrt r$ for high ranks. `LoRAConfig` has both; $\alpha/r$ is the default,
# as in PEFT, Hugging Face's library of adapters {cite}`mangrulkar2022peft`. Since $\alpha$ itself
# acts much like a second learning rate, we leave it at 16 and tune the rate.
#
# ### Merging
#
# A trained adapter need not stay beside its matrix. $W + D$ with $D = sBA$ has the same shape, and
# with it the tuned model is as fast as the base. {py:func}`~llmbook.lora.merge_lora` puts plain
# layers back; {py:func}`~llmbook.lora.unmerge_lora` undoes it, though not to the bit. With
# {term}`unit roundoff` $u$ ($2^{-24}$ in float32), rounding changes the sum by at most
# $u\lvert W + D\rvert$ and the difference by about $u\lvert W\rvert$, so each weight comes back
# within $2u(\lvert W \rvert + \lvert D \rvert)$. {py:func}`~llmbook.lora.without_lora` switches an
# unmerged adapter off, which is exact. (`stirred` makes a copy of the base with adapters that do
# something; `error_of_bound` returns the largest error relative to this bound.)

# %%
model, ids = stirred(rank=4), torch.arange(40).view(2, 20)
expected, plain = model(ids), base(ids)
with without_lora(model):
    changed = int((model(ids) != plain).sum())
    print(f"switched off: {changed} of {plain.numel():,} logits differ from the base's, in any bit")
adapters = merge_lora(model)
assert (model(ids) - expected).abs().max() < 1e-3 * (expected - plain).abs().max()
print("merged: logits differ by less than a thousandth of what the adapter changes")
unmerge_lora(model, adapters)
assert error_of_bound(adapters) <= 1
print("unmerged: weights are off by at most 2^-23 of the two sizes")

# %% [markdown]
# Switching off is exact, and merging is right up to rounding.
#
# ## Which matrices, by name
#
# A user chooses layers by name: by the end of a name (`q_proj` means the query matrices of all
# blocks), by a regular expression for whole names, or by "all-linear", which is everything but the
# head. {py:func}`~llmbook.lora.apply_lora` puts the adapted layers in, freezes everything else, and
# returns the names.

# %% [markdown] tags=["engine"]
# ### Engine room: adapters as data, and the fingerprint of a base

# %% [markdown] tags=["engine"]
# The fingerprint reads some four to eight thousand numbers of each larger tensor. That is quick
# even for large models, and tuning changes nearly all numbers of a tensor that it changes. The
# fingerprint depends on the type of numbers: the same base in bfloat16, or quantized, counts as
# another one, and a caller who knows that it fits says `any_base=True`.


# %% tags=["engine"]
#| export
class AdapterState(NamedTuple):
    """An adapter by itself: what ``load_adapter_state`` puts beside the base it was made for."""

    config: LoRAConfig
    tensors: dict[str, Tensor]  # "<layer>.lora_a" and "<layer>.lora_b"
    base: str  # fingerprint of the base


# %% tags=["engine"]
#| export
# What a state must have
def _check_state(model: nn.Module, state: AdapterState, names: list[str]) -> None:
    rank = state.config.rank
    for name in names:
        layer: Any = model.get_submodule(name)
        shapes = {"lora_a": (rank, layer.in_features), "lora_b": (layer.out_features, rank)}
        for kind, shape in shapes.items():
            tensor = state.tensors.get(f"{name}.{kind}")
            got = "none" if tensor is None else str(tuple(tensor.shape))
            if tensor is None or tuple(tensor.shape) != shape:
                raise ValueError(f"state: expected {name}.{kind} of shape {shape}, got {got}")
        if isinstance(layer, LoRALinear) and layer.config != state.config:
            raise ValueError(f"state: expected {layer.config}, as model has, got {state.config}")
    if extra := state.tensors.keys() - {f"{n}.{k}" for n in names for k in ("lora_a", "lora_b")}:
        raise ValueError(f"state: expected adapters of {len(names)} layers, got also {min(extra)}")


# %% tags=["engine"]
#| export
def adapter_state(model: nn.Module) -> AdapterState:
    """Return copies of the thin matrices of a model, with what they belong to."""
    layers = lora_layers(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_a"] = layer.lora_a.detach().clone()
        tensors[f"{name}.lora_b"] = layer.lora_b.detach().clone()
    return AdapterState(next(iter(layers.values())).config, tensors, base_fingerprint(model))


# %% tags=["engine"]
#| export
def load_adapter_state(model: nn.Module, state: AdapterState, *, any_base: bool = False) -> None:
    """Give ``model`` the adapter ``state``: a model without adapters gets layers for it.

    The base must be the one that the adapter was trained on, unless ``any_base`` is true (say, the
    same one in another type of numbers). A ``ValueError`` says what does not fit, and changes
    nothing.
    """
    if not any_base and (found := base_fingerprint(model)) != state.base:
        expected = f"an adapter for this base, {found}"
        raise ValueError(f"state: expected {expected}, got one for {state.base}")
    has = any(isinstance(m, LoRALinear) for m in model.modules())
    names = list(lora_layers(model)) if has else _targeted(model, state.config)
    _check_state(model, state, names)
    if not has:
        apply_lora(model, state.config, seed=0)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_a.copy_(state.tensors[f"{name}.lora_a"])
            layer.lora_b.copy_(state.tensors[f"{name}.lora_b"])


# %% tags=["engine"]
#| export
_SAMPLE = 4096  # at least as many numbers of each larger tensor


def base_fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits for the weights of a model, adapters left out.

    They depend on names, shapes, and types, and on each tensor's numbers: on all of them if there
    are fewer than 8192, otherwise on 4096 to 6144, evenly spread.
    """
    digest = blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        if re.search(r"(^|\.)lora_[ab]$", name):
            continue
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
        plain = re.sub(r"(^|\.)base\.(?=[^.]+$)", r"\1", name)
        digest.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# %% tags=["engine"]
# What adapting comes to, in a line
tied = deepcopy(base)
tied.lm_head.weight = tied.embedding.weight


def attempt(model: TransformerLM = base, **changes: Any) -> str:
    """How many layers and numbers a copy of a model gets, or why it gets none."""
    adapted = deepcopy(model)
    try:
        names = apply_lora(adapted, LoRAConfig(**{"rank": 4} | changes), seed=0)
    except ValueError as error:
        return str(error)
    numbers = sum(matrix.numel() for matrix in lora_parameters(adapted))
    return f"{len(names):2} layers, {numbers:5,} numbers, first {names[0]}"


# %% [markdown]
# ### Three ways to name layers
#
# Here are the three ways, a regular expression that matches no whole name, a rank above that of the
# matrices, and a head that shares its matrix with the embedding ({term}`weight tying`; `tied` is
# such a model). The function `attempt` adapts a copy of the base at rank 4, or says why that is
# refused:

# %%
for targets in (("q_proj", "v_proj"), r".*\.1\..*_proj", "all-linear", "q_proj"):
    print(f"{targets!s:22} {attempt(targets=targets)}")
print(f"{'rank 65':22} {attempt(rank=65)}")
print(f"{'a tied head':22} {attempt(tied, targets=('lm_head',))}")

# %% [markdown]
# A second adapter on top of a first is refused, too. Why a tied head? The adapter would act on the
# {term}`logits` alone, as it should, but merged it would also change what each {term}`token` means
# at the input. A model that is meant to have an adapter at its head needs a head of its own.
#
# An adapter is of use only with the base that it was trained on. Beside another one of the same
# shape it runs without an error, but computes something that nobody trained. So
# {py:func}`~llmbook.lora.adapter_state` notes a {term}`fingerprint` of the base, and
# {py:func}`~llmbook.lora.load_adapter_state` compares it:

# %%
state, other = adapter_state(stirred(rank=4)), deepcopy(base)
nn.init.normal_(other.blocks[0].attention.o_proj.weight, std=0.1)  # one matrix is another
load_adapter_state(deepcopy(base), state)
try:
    load_adapter_state(other, state)
except ValueError as error:
    print(re.sub("[0-9a-f]{16}", "…", str(error)))  # without the fingerprints

# %% [markdown]
# The copy with one changed matrix is refused.
#
# ## Against full tuning
#
# How much of full tuning's result does LoRA reach, and at which rate? A single pair of runs cannot
# tell, since each method has a learning rate of its own. So `python benchmarks/lora.py` tuned at
# six peak rates (each falls linearly to zero), with ranks 1 to 16 on all linear layers and in full:
# a hundred steps on the same batches, too few to finish, so that differences can be seen, with
# three {term}`seeds <seed>` at the three best rates and two at the others.

# %% [markdown] tags=["engine"]
# ### Engine room: the runs of the table


# %% tags=["engine"]
#| export
class TuningRun(NamedTuple):
    """What was tuned, how, and what came of it; ``rank`` 0 is full tuning."""

    targets: str  # "all-linear", "attention" or "feed-forward"
    rank: int
    learning_rate: float
    seed: int
    parameters: int  # that were trained
    optimizer_bytes: int
    right: float  # share of held-out questions answered right
    story_bits: float  # of held-out stories, as a multiple of the base's


# %% tags=["engine"]
#| export
_PARTS = {"attention": r".*\.[qkvo]_proj", "feed-forward": r".*\.(gate|up|down)_proj"}


def _prepared(rank: int, targets: str, seed: int) -> TransformerLM:
    """Return a copy of the base with what is to be trained."""
    model = deepcopy(pretrained("tinyworld").model)
    if rank:
        chosen = _PARTS.get(targets, targets)
        apply_lora(model, LoRAConfig(rank=rank, targets=chosen), seed=seed)
    return model


# %% tags=["engine"]
#| export
def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors that an optimizer keeps."""
    kept = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in kept if isinstance(value, Tensor) and value.ndim)


# %% tags=["engine"]
#| export
def tuning_run(
    rank: int, learning_rate: float, seed: int, *, targets: str = "all-linear", n_steps: int = 100
) -> TuningRun:
    """Tune the base on questions about half of the characters, and test it on the other half.

    ``rank`` 0 is full tuning. ``targets``: "all-linear", "attention" or "feed-forward".
    """
    check_whole("rank", rank, 0)
    check_choice("targets", targets, ("all-linear", *_PARTS))
    check_whole("seed", seed, 0, 2**32 - 1)
    base, model = pretrained("tinyworld"), _prepared(rank, targets, seed)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_bytes = optimizer_bytes(tune_on_facts(model, n_steps, learning_rate, seed=seed))
    if rank:
        merge_lora(model)
    held_out = [story.text for story in TinyWorld().stories(200, seed=7)]
    bits = [documents_score(m, base.tokenizer, held_out)[0] for m in (model, base.model)]
    place = (targets, rank, learning_rate, seed)
    return TuningRun(*place, n_trained, n_bytes, replies_right(model), bits[0] / bits[1])


# %% tags=["engine"]
# The table, for each rank at its best rate
def runs_at(
    runs: list[TuningRun], rank: int, rate: float, part: str = "all-linear"
) -> list[TuningRun]:
    return [run for run in runs if (run.targets, *run[1:3]) == (part, rank, rate)]


def rate_table(part: str = "all-linear", ranks: Sequence[int] = (0, 1, 2, 4, 8, 16)) -> Any:
    kinds = (str, int, float, int, int, int, float, float)
    rows = [zip(kinds, row.values(), strict=True) for row in table_of("lora.csv")]
    runs = [TuningRun(*(kind(value) for kind, value in row)) for row in rows]
    curves: dict[int, dict[float, float]] = {}
    lines = ["rank    numbers   Adam's bytes   best rate   right, interval     stories, bits"]
    for rank in ranks:
        rates = sorted({run.learning_rate for run in runs if run[:2] == (part, rank)})
        some = {rate: runs_at(runs, rank, rate, part) for rate in rates}
        curve = curves[rank] = {r: float(np.mean([x.right for x in some[r]])) for r in rates}
        best = max((r for r in rates if len(some[r]) > 1), key=lambda r: curve[r])
        right = mean_interval([run.right for run in some[best]])
        told = np.mean([run.story_bits for run in some[best]]) - 1
        size, first = f"{rank or 'full':4} {some[best][0].parameters:10,}", some[best][0]
        interval = f"{right.estimate:.0%} [{max(0, right.low):.0%}, {min(1, right.high):.0%}]"
        lines.append(f"{size} {first.optimizer_bytes:14,} {best:11} {interval:>17} {told:+14.1%}")
    return "\n".join(lines), curves


# %% tags=["engine"]
def show_parts(ranks: dict[str, int]) -> None:
    """Print the row of each choice of layers, and the shares right at the two highest rates."""
    for at, (part, rank) in enumerate(ranks.items()):
        table, curves = rate_table(part, [rank])
        head, row = table.splitlines()
        if not at:
            print(f"{'layers':12} {head}   at 0.06, 0.1")
        further = [curves[rank].get(rate) for rate in (0.06, 0.1)]
        shown = ", ".join(f"{share:.0%}" for share in further) if None not in further else ""
        print(f"{part:12} {row}   {shown:>11}".rstrip())


# %% [markdown]
# ### Best against best
#
# We repeat one of these runs live, with a new seed. The table has each rank at its best rate, with
# 95 % {term}`intervals <confidence interval>` (cut at 100 %):

# %%
live = tuning_run(8, 0.01, seed=3)
about("rank 8 at 0.01: questions answered right", live.right, 0.82, 1.0)
table, curves = rate_table()
print(table)

# %% [markdown]
# {numref}`fig-lora-rates` shows all rates:

# %% mystnb={"figure": {"caption": "Questions answered right after a hundred steps, over the peak learning rate.", "name": "fig-lora-rates"}, "image": {"alt": "Four curves over learning rates from 0.0003 to 0.1 on a logarithmic axis. Full tuning is ahead at all rates up to 0.03, best at 0.01, and falls to a quarter at 0.1. Ranks 1, 4 and 16 rise later, are best between 0.01 and 0.03, and fall deeply at 0.1."}}
draw_rates({"full": curves[0], "rank 1": curves[1], "rank 4": curves[4], "rank 16": curves[16]})

# %% [markdown]
# At its best rate, full tuning answers nearly everything after a hundred steps, and LoRA about nine
# questions in ten from rank 2 on: at equal steps it is a little behind. Three seeds cannot tell the
# ranks from 2 to 16 apart; rank 1 seems to fall short, though its interval overlaps most of theirs.
# (Choosing the best rates by the same questions flatters all rows.) What differs most is the price.
# Adam keeps two numbers for each trained one, so rank 2 takes 2 % of full tuning's bytes. At the
# best rates LoRA also forgets less: stories cost 1 to 2 % more bits than before with any rank, and
# 4 % more with full tuning. (At 0.001, where few answers are right yet, all ranks cost 5 to 6 %
# more, and full tuning 1.5 %.)
#
# The curves of the ranks above 1 lie close together and have their best rates in the same place,
# from 0.01 to 0.03, which agrees with the derivation for Adam and $\alpha/r$. The best rate of full
# tuning is 0.01. "LoRA without regret" reports that LoRA wants ten times the rate of full tuning,
# nearly independently of model and task, and even about fifteen times in very short runs
# {cite}`schulman2025lora`. **Between the best rates we do not find a factor of ten here, but one
# between one and three.** (At small rates the shift is larger: full tuning at 0.0003 is about as
# good as LoRA at 0.003, a factor of ten.) Why it is smaller we do not know; that our runs are short
# would speak for a larger one. So measure the best rate of your own task.
#
# Which layers should have an adapter? With about as many numbers as rank 8 has on all of them,
# attention alone gets rank 17 and feed-forward networks alone rank 15:

# %%
show_parts({"all-linear": 8, "attention": 17, "feed-forward": 15})

# %% [markdown]
# Attention alone is as good as all layers, and feed-forward networks alone are far worse, at two
# higher rates too. That is the reverse of what was found on large models, where feed-forward layers
# alone do as well as all, and attention alone is behind even at equal parameters
# {cite}`schulman2025lora`. A likely reason is our task: the facts are stored already, and what has
# to be learned is where in a question the name and the attribute stand, which is work for
# attention. With all linear layers one need not know the answer beforehand, which is the better
# argument for them as the default.

# %% [markdown]
# ## What a rank can store
#
# So far the model had the knowledge and had to learn a form. If it is taught new facts, the adapter
# becomes a memory, and one can ask how many bits it holds. In the tiny world this can be counted.
# Draw the facts of 96 characters anew: each has seven public attributes, and a value that is one of
# $k$ equally likely ones takes $\log_2 k$ bits to state. There are 12 species and 12 traits, 16
# homes, foods, toys, and jobs each, and 95 possible friends. The 672 facts are hence
#
# $$
# 96 \cdot (2 \log_2 12 + 4 \log_2 16 + \log_2 95) \approx 2{,}850 \text{ bits} .
# $$
#
# The base, which knows other things about some of these names, is tuned for 400 steps on one
# question about each fact. What does it know afterward? If it gives the right value the probability
# $q$ among the possible ones, where a guess would give $1/k$, it has stored
#
# $$
# \log_2 q - \log_2 \tfrac1k = \log_2 (q k) \text{ bits}
# $$ (lora-bits)
#
# of this fact: all of $\log_2 k$ if it is sure, nothing if it guesses, and less than nothing if it
# is sure of something else. (We look only at the first token of a value, and count values that
# share it as one, so a little less can be stored, 2,767 bits.)

# %% [markdown] tags=["engine"]
# ### Engine room: new facts, and the bits that a model has of them


# %% tags=["engine"]
#| export
class StorageRun(NamedTuple):
    """How many bits about new characters were stored in how many trained numbers."""

    n_steps: int
    rank: int
    learning_rate: float
    seed: int
    parameters: int  # that were trained
    facts: int  # that were to be learned
    bits: float  # the information in them
    right: int  # facts whose value is the most likely one
    stored: float  # bits that the model has of them


# %% tags=["engine"]
#| export
class NewFact(NamedTuple):
    """A question about a new fact, and what its answer can be."""

    example: Example  # the conversation
    place: int  # of the value's first token
    counts: dict[int, int]  # by first token, how many values begin with it


def new_facts(world: TinyWorld, tokenizer: BPETokenizer) -> list[NewFact]:
    """Return all facts of ``world`` but the secrets, each asked in one wording."""
    found = []
    for question in (q for half in ("tuning", "held_out") for q in _asked(world, half)):
        value = world.cast.facts[question.character][question.attribute]
        options = set(VALUES[question.attribute] or world.cast.facts) - {question.character}
        first = Counter(tokenizer.encode(f" {option}")[0] for option in options)
        talk = [Message("user", question.text), Message("assistant", question.reply)]
        example = WORLD_CHAT.encode(tokenizer, talk)
        wanted, learned = tokenizer.encode(f" {value}")[0], example.learned
        place = max(i for i, id in enumerate(example.ids) if id == wanted and learned[i])
        found.append(NewFact(example, place, dict(first)))
    return found


def _asked(world: TinyWorld, split: Any) -> Iterator[Question]:
    yield from (q for q in make_questions(world, "fact", split) if q.wording == 0)


# %% tags=["engine"]
#| export
@torch.no_grad()
def bits_stored(model: nn.Module, facts: Sequence[NewFact]) -> tuple[float, int]:
    """Return how many bits a model has of the ``facts``, and how many values it finds likeliest.

    Of a value that it gives the probability q among all possible ones, whose tokens a guess
    would give 1/k, it has log2(q k) bits; below zero if it is surer of another one.
    """
    bits, right = 0.0, 0
    for start in range(0, len(facts), 128):
        some = facts[start : start + 128]
        length = max(len(fact.example.ids) for fact in some)
        ids = torch.zeros(len(some), length, dtype=torch.int64)
        for row, fact in zip(ids, some, strict=True):
            row[: len(fact.example.ids)] = torch.tensor(fact.example.ids)
        logits = model(ids)
        for row, fact in zip(logits, some, strict=True):
            tokens = list(fact.counts)
            log_q = row[fact.place - 1, tokens].double().log_softmax(-1)
            at = tokens.index(fact.example.ids[fact.place])
            guess = fact.counts[tokens[at]] / sum(fact.counts.values())
            bits += float(log_q[at]) / math.log(2) - math.log2(guess)
            right += int(log_q.argmax()) == at
    return bits, right


# %% tags=["engine"]
#| export
def storage_run(
    rank: int, learning_rate: float, seed: int, *, n_characters: int = 96, n_steps: int = 400
) -> StorageRun:
    """Tune the base on facts that it has never met, and count what it has of them afterward.

    The facts are those of a world of other characters. ``rank`` 0 is full tuning.
    """
    check_whole("rank", rank, 0)
    tokenizer = pretrained("tinyworld").tokenizer
    world = TinyWorld(n_characters=n_characters, seed=1000 + seed)
    facts = new_facts(world, tokenizer)
    end = tokenizer.special_tokens["<|endoftext|>"]
    data = InstructionDataset([fact.example for fact in facts], 32, 128, end, seed=seed)
    model = _prepared(rank, "all-linear", seed)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _train(model, data, n_steps, learning_rate)
    stored, right = bits_stored(model.eval(), facts)
    whole = sum(
        -math.log2(f.counts[f.example.ids[f.place]] / sum(f.counts.values())) for f in facts
    )
    place = (n_steps, rank, learning_rate, seed)
    return StorageRun(*place, n_trained, len(facts), whole, right, stored)


# %% tags=["engine"]
# The table, for each rank at its best rate
def storage_table(n_steps: int = 400, ranks: Sequence[int] = (1, 2, 4, 8, 16, 0)) -> Any:
    kinds = (int, int, float, int, int, int, float, int, float)
    rows = [zip(kinds, row.values(), strict=True) for row in table_of("lora_storage.csv")]
    runs = [StorageRun(*(kind(value) for kind, value in row)) for row in rows]
    curve, lines = {}, ["rank    numbers    facts known   bits stored, interval   bits per number"]
    for rank in ranks:
        some = [run for run in runs if (run.n_steps, run.rank) == (n_steps, rank)]
        rates = sorted({run.learning_rate for run in some})
        by_rate = [[run for run in some if run.learning_rate == rate] for rate in rates]
        by_rate = [runs for runs in by_rate if len(runs) == max(map(len, by_rate))]
        best = max(by_rate, key=lambda runs: np.mean([run.stored for run in runs]))
        bits, numbers = [run.stored for run in best], best[0].parameters
        curve[rank] = numbers, float(np.mean(bits)), mean_interval(bits).high - np.mean(bits)
        found = mean_interval(bits)
        interval = f" [{found.low:5.0f}, {found.high:5.0f}]"
        known = f"{np.mean([run.right for run in best]):7.0f} of 672"
        line = f"{rank or 'full':4} {numbers:10,} {known:>14} {curve[rank][1]:9.0f}{interval:15}"
        lines.append(f"{line} {curve[rank][1] / numbers:12.3f}")
    return "\n".join(lines), curve, runs[0].bits


# %% [markdown]
# ### Bits counted
#
# `python benchmarks/lora.py storage` ran ranks 1 to 16 at the rate 0.01 and full tuning at 0.003,
# with three seeds. These rates served above and were not searched for here:

# %%
table, curve, most = storage_table()
print(table)

# %% [markdown]
# {numref}`fig-lora-storage` draws bits over numbers:

# %% mystnb={"figure": {"caption": "Bits of new facts that are stored after 400 steps, over the numbers that were trained; bars, 95 % intervals of three seeds.", "name": "fig-lora-storage"}, "image": {"alt": "Five connected points for ranks 1 to 16, with wide bars, rise from a little below zero bits at 2,000 numbers to about 900 bits at 17,000 and at 35,000 numbers. A separate square for full tuning stands at about 2,100 bits and 200,000 numbers, below a dotted line at 2,767 bits."}}
draw_stored(curve, most)

# %% [markdown]
# Rank 1 knows a sixth of the facts, where guessing would get 41 of them right, and yet on average
# stores nothing: where it is wrong it is too sure. From there storage grows with the rank, to about
# a third of the information, and full tuning has about three quarters. In the section before, rank
# 2 was nearly as good as rank 16. A form is a small load for an adapter, and facts are a large one:
# the rank that taught a model to answer may be too small to teach it a handbook.
#
# Is this what the numbers *can* hold? No: models hold about two bits per parameter when they have
# met each fact a thousand times {cite}`allenzhu2025capacity`, and ours have met each one 19 times,
# in 400 batches of 32. So the last column says what was stored in the given time. From rank 2 on it
# falls, and from 8 to 16 the mean hardly grows, though three seeds scatter widely: at this end,
# steps may be scarce and not room. At the other end a higher rank helps: in the same steps, rank 2
# stores a third of what rank 8 does, although at two bits per number it would have room for
# everything. What a low rank lacks here is not room, but probably speed. And full tuning, at a
# hundredth of a bit per number, stores the most in the given time.

# %% [markdown]
# ## Ten adapters over one base
#
# So far one adapter has served one user. Now for the ten hospitals: all of them have tuned the same
# model, and all of them ask at the same moment. With ten merged copies, the server holds ten models
# and runs ten batches of one question each. With adapters it could hold the base once. Could it
# also answer all ten in one batch?
#
# The base's part of the layer, $Wx$, is the same for everybody, so one product of matrices serves
# the whole batch. Only the thin part differs from row to row. Stack the thin matrices of all users,
# $A$ with shape (users, rank, in) and $B$ with shape (users, out, rank), and let `rows` say whose
# row each one is. Then indexing puts the right pair of matrices beside each row, and a batched
# product does the rest:

# %%
A, B, x = torch.randn(10, 2, 8), torch.randn(10, 6, 2), torch.randn(3, 5, 8)
rows = torch.tensor([7, 0, 7])  # user 7 asks twice, user 0 once
batch = x @ A[rows].mT @ B[rows].mT
same = [torch.allclose(batch[i], x[i] @ A[r].T @ B[r].T, atol=1e-5) for i, r in enumerate(rows)]
print(f"{sum(same)} of {len(rows)} rows are multiplied by the matrices of their own user")

# %% [markdown]
# In the room below, {py:func}`~llmbook.lora.rows_update` is this product, and the class
# {py:class}`~llmbook.lora.AdapterBank` puts it into each adapted layer of a model. Adapters come
# and go by name while the base stays as it is; number 0 of each stack is zero, for the rows that
# want the base alone. Adapters of different ranks fit into one stack, since a thin matrix padded
# with zeros adds the same product.

# %% [markdown] tags=["engine"]
# ### Engine room: a bank that adds and removes adapters, and follows each row through generation

# %% [markdown] tags=["engine"]
# A layer of the bank holds the stacks. The scale of an adapter is multiplied into its $B$ when it
# is added, so that adapters of different scales can stand side by side. All layers look up whose
# row is whose in one shared object.


# %% tags=["engine"]
#| export
def rows_update(
    x: Float[Tensor, "batch sequence n_in"],
    a: Float[Tensor, "adapters rank n_in"],
    b: Float[Tensor, "adapters n_out rank"],
    rows: Int64[Tensor, " batch"],
) -> Float[Tensor, "batch sequence n_out"]:
    """Return what each row's adapter adds: ``x[i]`` times ``b[r] @ a[r]``, ``r = rows[i]``.

    Source: Chen et al., 2024, "Punica". As many numbers as rows, or a ``ValueError``.
    """
    if len(rows) != len(x):
        raise ValueError(f"rows: expected a number for each of {len(x)} rows, got {len(rows)}")
    return x @ a.index_select(0, rows).mT @ b.index_select(0, rows).mT


# %% tags=["engine"]
#| export
class _Rows:
    """Whose rows these are: for each row of a batch the number of an adapter, 0 for none."""

    def __init__(self) -> None:
        self.numbers: Tensor | None = None


class BankLinear(nn.Module):
    """A linear layer with the thin matrices of ``n`` adapters, zero until ``put`` sets them."""

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, rows: _Rows, n: int):
        super().__init__()
        self.base, self.rows = base, rows
        like = dense_weight(base)
        self.out_features, self.in_features = like.shape
        self.register_buffer("a", like.new_zeros(n + 1, 1, self.in_features).detach())
        self.register_buffer("b", like.new_zeros(n + 1, self.out_features, 1).detach())

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the base's output, and for each row what its adapter adds."""
        out, numbers = self.base(x), self.rows.numbers
        if numbers is None:
            return out
        if len(x) != len(numbers):
            raise ValueError(f"x: expected a row for each of {len(numbers)} names, got {len(x)}")
        wide = x.reshape(len(x), -1, self.in_features).to(self.a.dtype)
        return out + rows_update(wide, self.a, self.b, numbers).reshape(out.shape).to(out.dtype)


# %% tags=["engine"]
#| export
class BankLinear(BankLinear):  # continued
    def append(self, a: Tensor | None, b: Tensor | None) -> None:
        """Add a pair of thin matrices, the scale multiplied into ``b``; or zeros."""
        rank = self.a.size(1) if a is None else max(self.a.size(1), len(a))
        new_a = self.a.new_zeros(len(self.a) + 1, rank, self.in_features)
        new_b = self.b.new_zeros(len(self.b) + 1, self.out_features, rank)
        new_a[:-1, : self.a.size(1)], new_b[:-1, :, : self.b.size(2)] = self.a, self.b
        if a is not None and b is not None:
            new_a[-1, : len(a)], new_b[-1, :, : b.size(1)] = a, b
        self.a, self.b = new_a, new_b

    def drop(self, number: int) -> None:
        """Remove an adapter, and with it the room that only its rank needed."""
        kept = [i for i in range(len(self.a)) if i != number]
        a, b = self.a[kept], self.b[kept]
        used = b.abs().sum(dim=(0, 1)).nonzero()
        rank = 1 if not len(used) else int(used.max()) + 1
        self.a, self.b = a[:, :rank].contiguous(), b[:, :, :rank].contiguous()


# %% [markdown] tags=["engine"]
# The bank works on a second set of modules over the same tensors: `deepcopy` is told that each
# parameter is its own copy. So the base itself stays untouched, and is in memory only once.


# %% tags=["engine"]
#| export
class AdapterBank:
    """Several adapters over one base, and batches in which each row has its own.

    ``model`` is a ``TransformerLM`` without adapters, in floats or quantized; it is not changed.
    """

    def __init__(self, model: TransformerLM):
        if not isinstance(model, TransformerLM):
            raise ValueError(f"model: expected a TransformerLM, got {_named(model)}")
        _check_plain(model)
        same = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.base, self.names = model, list[str]()
        self._fingerprint, self._rows = base_fingerprint(model), _Rows()
        self._model = deepcopy(model, same).eval()
        self._waiting: Tensor | None = None  # whose rows will be generated
        vars(self._model)["new_cache"] = self._new_cache  # of this set of modules only

    def add(self, name: str, state: AdapterState, *, any_base: bool = False) -> None:
        """Add an adapter. ``any_base`` is that of ``load_adapter_state``."""
        self._check_new(name, state)
        if not any_base and state.base != self._fingerprint:
            expected = f"an adapter for this base, {self._fingerprint}"
            raise ValueError(f"state: expected {expected}, got one for {state.base}")
        targeted = _targeted(self.base, state.config)
        _check_state(self.base, state, targeted)
        for layer in targeted:
            own = self._model.get_submodule(layer)
            if not isinstance(own, BankLinear):
                _replace(self._model, layer, BankLinear(own, self._rows, len(self.names)))
        for layer, own in self._layers().items():
            a, b = (state.tensors.get(f"{layer}.lora_{kind}") for kind in "ab")
            own.append(a, None if b is None else b * state.config.scale)
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Remove an adapter; the others stay."""
        check_choice("name", name, self.names)
        for own in self._layers().values():
            own.drop(1 + self.names.index(name))
        self.names.remove(name)


# %% [markdown] tags=["engine"]
# Chapter 14's `generate` sorts prompts by length, and takes rows that have finished out of the
# batch. Everything that belongs to a row has to follow it. The {term}`KV cache` moves with the
# rows, so the bank hands out caches that tell it when they are made and when they are reordered.
# Without a cache, or when a row slides over the end of the context, rows would be read anew without
# the bank being told; both are refused.


# %% tags=["engine"]
#| export
class AdapterBank(AdapterBank):  # continued
    def __call__(
        self,
        ids: Int64[Tensor, "batch sequence"],
        adapters: Sequence[str | None],
        **options: Any,
    ) -> Float[Tensor, "batch sequence vocab_size"]:
        """Return logits, each row with its own adapter, or with none where ``adapters`` has None.

        ``options`` are those of the model, such as ``position_ids``.
        """
        try:
            self._rows.numbers = self._numbers(adapters, len(ids))
            return self._model(ids, **options)
        finally:
            self._rows.numbers = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        adapters: Sequence[str | None],
        **options: Any,
    ) -> list[Completion]:
        """Return completions as chapter 14's ``generate`` does, each row with its own adapter."""
        for option, bad in (("on_full", "slide"), ("use_cache", False)):
            if options.get(option) == bad:
                expected = "a cache, and rows that do not slide over the end of the context"
                raise ValueError(f"options: expected {expected}, got {option}={bad!r}")
        numbers, tokenizer = self._numbers(adapters, len(prompts)), options.get("tokenizer")
        texts: list[Any] = [
            tokenizer.encode(p) if tokenizer and isinstance(p, str) else p for p in prompts
        ]
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        try:
            self._waiting = numbers[order]
            return generate(self._model, texts, **options)
        finally:
            self._rows.numbers = self._waiting = None

    def _new_cache(self, batch_size: int, capacity: int | None = None, spare: int = 0) -> KVCache:
        cache = TransformerLM.new_cache(self._model, batch_size, capacity, spare)
        if self._waiting is not None:
            self._rows.numbers = self._waiting[:batch_size]
            self._waiting, reorder = self._waiting[batch_size:], cache.reorder

            def follow(rows: Tensor) -> None:
                reorder(rows)
                assert self._rows.numbers is not None  # they were set with the cache
                self._rows.numbers = self._rows.numbers[rows]

            vars(cache)["reorder"] = follow
        return cache


# %% tags=["engine"]
#| export
class AdapterBank(AdapterBank):  # continued
    @property
    def nbytes(self) -> int:
        """The size of the base and all adapters, each tensor once."""
        return stored_bytes(self._model)

    def _layers(self) -> dict[str, BankLinear]:
        return {n: m for n, m in self._model.named_modules() if isinstance(m, BankLinear)}

    def _check_new(self, name: object, state: object) -> None:
        if not check_text(name, "name") or name in self.names:
            raise ValueError(f"name: expected a new one, not of {self.names}, got {name!r}")
        if not isinstance(state, AdapterState):
            raise ValueError(f"state: expected an AdapterState, got {state!r:.60}")

    def _numbers(self, adapters: Any, n: int) -> Tensor:
        if isinstance(adapters, str) or not isinstance(adapters, Sequence) or len(adapters) != n:
            expected = f"a name or None for each of {n} rows"
            raise ValueError(f"adapters: expected {expected}, got {adapters!r:.60}")
        for name in adapters:
            if name is not None and name not in self.names:
                known = ", ".join(self.names) or "(the bank is empty)"
                raise ValueError(f"adapters: expected None or one of {known}, got {name!r:.60}")
        numbers = [0 if name is None else 1 + self.names.index(name) for name in adapters]
        return torch.tensor(numbers, device=self.base.embedding.weight.device)


# %% [markdown]
# ### Ten users in one batch
#
# For the experiment, each of ten users has a favorite character of the tiny world. The function
# `storyteller` in the room below trains an adapter of rank 2 for twenty steps on 16 stories about
# this character.

# %% [markdown] tags=["engine"]
# ### Engine room: small adapters and their copies, and times measured in turns

# %% tags=["engine"]
import time

world = TinyWorld()
NAMES = list(world.cast.facts)[:10]
TEXTS = [story.text for story in world.stories(2000, seed=3)]
tokenizer = pretrained("tinyworld").tokenizer
END = tokenizer.special_tokens["<|endoftext|>"]


def storyteller(name: str) -> AdapterState:
    """Return an adapter with which the base tells stories about ``name``."""
    texts = [text for text in TEXTS if min(world.cast.facts, key=place_in(text)) == name]
    ids = [(END, *tokenizer.encode(text), END) for text in texts[:16]]
    examples = [Example(i, (False, *[True] * (len(i) - 1))) for i in ids]
    model = deepcopy(base)
    apply_lora(model, LoRAConfig(rank=2, alpha=4.0), seed=0)
    rates = {"learning_rate": 0.03, "weight_decay": 0.0, "warmup": 2}
    data = InstructionDataset(examples, 8, 128, END)
    Trainer(model, data, TrainingConfig(n_steps=20, batch_size=8, **rates)).train()
    return adapter_state(model)


def place_in(text: str) -> Any:
    """Return a function that says where in a text a name stands first, or after its end."""
    return lambda name: text.find(name) if name in text else len(text)


# %% tags=["engine"]
def merged_copy(state: AdapterState) -> TransformerLM:
    """Return a copy of the base with an adapter merged into it."""
    model = deepcopy(base)
    load_adapter_state(model, state)
    merge_lora(model)
    return model.eval()


def ratio_of_times(slow: Any, fast: Any, repeats: int = 3) -> float:
    """Return how much longer one function takes than another: best times of runs in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for place, function in enumerate((slow, fast)):
            start = time.perf_counter()
            function()
            best[place] = min(best[place], time.perf_counter() - start)
    return best[0] / best[1]


# %% tags=["engine"]
options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 12}
options["sampling"] = Sampling(temperature=0.0)
prompt = [END]  # a story begins after the end of another
ids = torch.tensor([[END, *tokenizer.encode(text)[:31]] for text in TEXTS[:10]])
adapters = {name: storyteller(name) for name in NAMES}
copies = {name: merged_copy(state) for name, state in adapters.items()}


def one_by_one() -> list[Completion]:
    """The replies of ten merged copies, called one after the other."""
    return [generate(copies[name], [prompt], **options)[0] for name in NAMES]


def one_batch() -> list[Completion]:
    """The same replies from the bank."""
    return bank.generate([prompt] * 10, list(NAMES), **options)


# %% [markdown]
# ### One call for all
#
# The dictionary `adapters` has the ten adapters by name; `prompt` is the token after which a story
# begins. An eleventh row asks the base itself:

# %%
bank = AdapterBank(base)
for name, state in adapters.items():
    bank.add(name, state)
together = bank.generate([prompt] * 11, [*NAMES, None], **options)
assert [reply.ids for reply in together[:10]] == [reply.ids for reply in one_by_one()]
said = sum(name in str(reply.text) for name, reply in zip(NAMES, together, strict=False))
print(f"{said} of 10 rows name their own character, as their merged copies do")
for name, reply in zip((*NAMES[:2], "nobody"), (*together[:2], together[10]), strict=True):
    print(f"for {name:6}: {str(reply.text)[:19]} ...")

# %% [markdown]
# Each of the ten rows names its own character, and every token is that of the merged copy. What is
# gained is time and memory: each step reads the base's weights once for all rows, and the bank
# holds one base and ten adapters of rank 2.

# %% tags=["nbval-ignore-output"]
ratio = ratio_of_times(one_by_one, one_batch)
print(f"ten calls of merged copies take {ratio:.1f} times as long as one batch of the bank")

# %% [markdown]
# The logits agree up to rounding, and the memory can be counted:

# %%
alone = torch.cat([copies[name](ids[row : row + 1]) for row, name in enumerate(NAMES)])
assert (bank(ids, NAMES) - alone).abs().max() < 1e-3
ten, held = 10 * stored_bytes(base), bank.nbytes
print(f"ten copies: {ten / 1e6:.1f} MB; the bank: {held / 1e6:.1f} MB, {ten / held:.1f} times less")

# %% [markdown]
# One batch is about three times as fast here, in an eighth of the memory. With a larger base the
# memory comes closer to a tenth, since the adapters weigh less in comparison. Servers go further:
# Punica {cite}`chen2023punica` has a kernel that multiplies each row by its own matrices without
# first copying them side by side, as our indexing does, and S-LoRA {cite}`sheng2023slora` keeps
# thousands of adapters in main memory and fetches those that the current batch needs. For a single
# user a merged adapter is fastest: its thin products are gone.


# %% [markdown]
# ## A base in four bits
#
# An adapter saves the memory of gradients and moments, but the frozen base still has to be there:
# seven billion weights of 16 bits are 14 GB. The base is never updated, though, so it need not be
# able to hold small changes: numbers of fewer bits will do as long as the model computes nearly the
# same. That is {term}`QLoRA` {cite}`dettmers2023qlora`: a base in four bits, and adapters in
# ordinary floats beside it. The adapters are tuned over the *rounded* base, so they can make up for
# some of the rounding.
#
# Four bits have 16 codes. Which 16 numbers should they stand for? The whole numbers of chapter 14's
# {term}`quantization` are evenly spaced. But if weights come from a normal distribution, evenly
# spaced levels at the ends are hardly ever used, while those in the middle stand for far too many
# weights. A code carries the most information when all codes are equally likely, so the levels of
# {term}`NF4`, NormalFloat of four bits, are *quantiles* of the distribution, with the same share of
# the probability between each and the next.
#
# Three conditions turn this into numbers. Zero must be a level, exactly, because a weight of zero
# should stay zero. The outermost levels must be -1 and 1, since each block of weights is divided by
# its largest absolute value. And the quantile of probability 1 is infinite, so the outermost level
# has to be taken at some $p < 1$. With one level for zero, 15 are left: seven go below zero and
# eight above. A side with $n$ steps from zero has its levels at the probabilities
#
# $$p_i = \frac12 + \Bigl(p - \frac12\Bigr)\frac{i}{n}, \qquad i = 1, \dots, n,$$
#
# at a distance of $\Phi^{-1}(p_i)$ from zero, where $\Phi$ is the distribution function of the
# normal distribution. If 15 or 16 levels each stood in the middle of a share of the probability,
# the last one would be at $1 - 1/30$ or $1 - 1/32$; the authors' code takes $p$ halfway between
# these two, which is 0.9677. In the end everything is divided by the largest level:


# %%
#| export
def nf4_levels() -> Float[Tensor, " 16"]:
    """Return the 16 levels of NormalFloat, from -1 to 1 (Dettmers et al., 2023, section 3).

    Eight steps of equal probability lead from 0 up to 1, and seven from 0 down to -1. The share of
    probability within them is that of the authors' code.

    >>> [round(level, 3) for level in nf4_levels().tolist()[6:10]]
    [-0.091, 0.0, 0.08, 0.161]
    """
    end, quantile = (31 / 32 + 29 / 30) / 2, NormalDist().inv_cdf
    below = [-quantile(0.5 + (end - 0.5) * step / 7) for step in range(7, 0, -1)]
    above = [quantile(0.5 + (end - 0.5) * step / 8) for step in range(1, 9)]
    return torch.tensor([*below, 0.0, *above]) / above[-1]


# %% [markdown]
# The 16 levels, rounded:

# %%
levels = nf4_levels()
print(" ".join(f"{level:.3f}" for level in levels.tolist()))

# %% [markdown]
# The levels are dense near zero. A matrix is cut into blocks of 64 neighbors, each divided by its
# largest absolute value, its scale, and each number goes to the nearest level. The code is the
# number of the level, and two codes share a byte. So far that makes 4 bits for a weight and one
# float of 32 bits for each block, half a bit a weight.
# {term}`Double quantization <double quantization>` shrinks that half: the scales are all positive
# and close to one another, so they are rounded, too, to 8 bits around their mean (floats in the
# paper, whole numbers here), with one float for each 256 of them. That leaves
#
# $$4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127 \text{ bits a weight}.$$

# %% [markdown] tags=["engine"]
# ### Engine room: four bits packed, a layer that multiplies by them, merging


# %% tags=["engine"]
#| export
class NF4Weight(NamedTuple):
    """A matrix in four bits: two codes in a byte, and scales that are quantized, too."""

    codes: UInt8[Tensor, " bytes"]
    scales: Int8[Tensor, " blocks"]  # steps above or below their mean
    steps: Float[Tensor, " groups"]  # what a step is worth, for 256 scales
    mean: Float[Tensor, ""]
    levels: Float[Tensor, " 16"]
    shape: tuple[int, int]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """Return the matrix that this stands for."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], dim=1).flatten().int()
        steps = self.steps.repeat_interleave(_SCALES)[: len(self.scales)]
        # Rounding may take a scale below zero, which would turn the signs of its block around
        scales = (self.scales * steps + self.mean).clamp(min=0)
        blocks = self.levels[codes].view(len(scales), _BLOCK) * scales[:, None]
        return blocks.flatten()[: self.shape[0] * self.shape[1]].view(self.shape)


# %% tags=["engine"]
#| export
_BLOCK, _SCALES = 64, 256  # weights that share a scale, and scales that share a step


def quantize_nf4(
    weight: Float[Tensor, "rows columns"], *, levels: Float[Tensor, " 16"] | None = None
) -> NF4Weight:
    """Round a matrix to four bits: each weight to the level that is nearest to it.

    64 neighbors are divided by the largest absolute value among them, their scale. Of the scales,
    256 neighbors are rounded together, to whole numbers of 8 bits around the mean of all
    ("double quantization"; Dettmers et al., 2023, section 3). ``levels``: 16 rising numbers from
    -1 to 1, by default ``nf4_levels()``. NaN and infinity raise a ``ValueError``.
    """
    _check_floats(weight)
    levels = nf4_levels() if levels is None else _checked_levels(levels)
    levels = levels.to(weight.device, torch.float32)
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1)
    borders = (levels[1:] + levels[:-1]) / 2
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, borders).to(torch.uint8).view(-1, 2)
    mean = scales.mean()
    rest = F.pad(scales - mean, (0, -len(scales) % _SCALES)).view(-1, _SCALES)
    steps = rest.abs().amax(dim=1) / 128
    whole = (rest / steps.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    small = whole.clamp(-128, 127).to(torch.int8).flatten()[: len(scales)]
    packed = codes[:, 0] << 4 | codes[:, 1]
    return NF4Weight(packed, small, steps, mean, levels, (weight.size(0), weight.size(1)))


# %% tags=["engine"]
#| export
class NF4Linear(nn.Module):
    """A frozen linear layer whose weights are stored in four bits, and multiplied as floats.

    All it has are buffers: no gradient reaches them, only the input's passes through.
    """

    codes: Tensor
    scales: Tensor
    steps: Tensor
    mean: Tensor
    levels: Tensor
    bias: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Float[Tensor, " out_features"] | None = None):
        super().__init__()
        if not isinstance(weight, NF4Weight):
            raise ValueError(f"weight: expected an NF4Weight, got {weight!r:.60}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            expected = f"{self.out_features} numbers"
            raise ValueError(f"bias: expected {expected}, got shape {tuple(bias.shape)}")
        for name in ("codes", "scales", "steps", "mean", "levels"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, *, levels: Float[Tensor, " 16"] | None = None) -> "NF4Linear":
        """Return the layer with the weights of ``linear``, rounded."""
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: expected a Linear layer, got {_named(linear)}")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(quantize_nf4(linear.weight, levels=levels), bias)

    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        """Return the matrix that the layer multiplies by."""
        parts = self.codes, self.scales, self.steps, self.mean, self.levels
        return NF4Weight(*parts, (self.out_features, self.in_features)).dequantize()

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the linear map of ``x``, in its dtype."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            expected = f"floats of shape (..., {self.in_features})"
            raise ValueError(f"x: expected {expected}, got {x.dtype} of {tuple(x.shape)}")
        out = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(x.dtype)


# %% [markdown] tags=["engine"]
# PyTorch keeps what a product needs for its backward pass: here it would be the dequantized matrix
# of every layer, and the memory would be that of the float model again. So the product is a
# function of its own, which dequantizes once more in the backward pass.


# %% tags=["engine"]
#| export
class _Product(torch.autograd.Function):
    """The product of ``x`` and the matrix of a layer, which is made anew each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantize().to(gradient.dtype), None


# %% tags=["engine"]
#| export
def quantize_base(model: nn.Module, kind: Literal["nf4", "int8"] = "nf4") -> nn.Module:
    """Return a copy of ``model`` whose linear layers are quantized, but for the head.

    A layer that shares its matrix with another module stays as it is. A model with adapters is
    refused: quantize its base, then add the adapters.
    """
    check_choice("kind", kind, ("nf4", "int8"))
    _check_plain(model)
    made = deepcopy(model)
    layers: dict[str, Any] = dict(_linear_layers(made))
    for name, layer in layers.items():
        plain = type(layer) is nn.Linear and name.rpartition(".")[2] != "lm_head"
        if plain and not _shares(made, layer):
            new = NF4Linear.of(layer) if kind == "nf4" else QuantizedLinear.of(layer)
            _replace(made, name, new)
    return made


# %% tags=["engine"]
#| export
def merge_quantized(model: nn.Module, *, requantize: bool) -> dict[str, float]:
    """Add each adapter to the matrix of its quantized base: dequantized, added to, and kept so.

    With ``requantize`` the sum is rounded again to the base's kind, which loses a part of the
    update; without, the layers become Linear ones. Returns for each layer the error of the merged
    matrix relative to the update: the root of the sum of squares of each. An adapter that was never
    trained has no update; the error is then infinity if the matrix changes, and 0 if it does not.
    """
    if not isinstance(requantize, bool):
        raise ValueError(f"requantize: expected True or False, got {requantize!r:.60}")
    errors = {}
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            update = layer.update
            dense = dense_weight(layer.base) + update
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dense, requires_grad=False)
        bias = getattr(layer.base, "bias", None)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        linear.register_parameter("bias", frozen)
        new: nn.Module = linear
        if requantize and isinstance(layer.base, NF4Linear):
            new = NF4Linear.of(linear, levels=layer.base.levels)
        elif requantize and isinstance(layer.base, QuantizedLinear):
            new = QuantizedLinear.of(linear)
        error, size = float((dense_weight(new) - dense).norm()), float(update.norm())
        errors[name] = error / size if size else (math.inf if error else 0.0)
        _replace(model, name, new)
    return errors


# %% tags=["engine"]
#| export
# What weights and levels must be
def _check_floats(weight: object) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise ValueError(f"weight: expected a matrix of floats, got {weight!r:.60}")
    if not weight.numel():
        raise ValueError(f"weight: expected at least one number, got {tuple(weight.shape)}")
    if not weight.isfinite().all():
        wrong = weight[~weight.isfinite()][0].item()
        raise ValueError(f"weight: expected finite numbers, got {wrong}")


def _checked_levels(levels: Any) -> Tensor:
    if not isinstance(levels, Tensor) or levels.shape != (16,) or not levels.is_floating_point():
        raise ValueError(f"levels: expected 16 floats, got {levels!r:.60}")
    if levels[0] != -1 or levels[-1] != 1 or not (levels[1:] > levels[:-1]).all():
        raise ValueError(f"levels: expected to rise from -1 to 1, got {levels.tolist()!r:.60}")
    return levels


def _shares(model: nn.Module, layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return sum(module._parameters.get("weight") is weight for module in model.modules()) > 1


# %% tags=["engine"]
import numpy as np


def draw_levels(shares: list[float]) -> None:
    """Draw the levels over the normal density, and the share of weights that has each."""
    _, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    x = torch.linspace(-1.3, 1.3, 200)
    spread = NormalDist().inv_cdf((31 / 32 + 29 / 30) / 2)  # one level is so many deviations
    left.plot(x, torch.exp(-((x * spread) ** 2) / 2))
    left.vlines(nf4_levels(), 0, torch.exp(-((nf4_levels() * spread) ** 2) / 2), color="C1")
    left.set(xlabel="level", ylabel="density (relative)", ylim=(0, None))
    right.bar(range(16), shares, color="C1")
    right.axhline(1 / 16, linestyle="--", color="C0")
    right.set(xlabel="code", ylabel="share of weights")
    plt.show()


normal = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
even = torch.cat([torch.arange(-8, 0) / 8, torch.arange(0, 8) / 7])


def shares_of_codes(weight: Tensor) -> list[float]:
    """Return how often each of the 16 codes occurs in a matrix of NF4."""
    packed = quantize_nf4(weight).codes
    codes = torch.stack([packed >> 4, packed & 15]).flatten().int()
    return (torch.bincount(codes, minlength=16) / len(codes)).tolist()


def relative_error(rounded: Tensor, exact: Tensor) -> float:
    """Return the root of the squared errors' sum, relative to that of the numbers."""
    return float((rounded - exact).norm() / exact.norm())


# %% tags=["engine"]
def show_runs(name: str) -> None:
    """Print the means over seeds, and the difference of NF4 and floats seed by seed."""
    runs, right = table_of(name), {}
    print(
        "base      stories   right [95 %, 5 seeds]    merged, rounded again   error of the update"
    )
    for kind in ("float32", "int8", "nf4"):
        rows = [row for row in runs if row["base"] == kind]
        columns = ("story_bits", "right", "merged_right", "merge_error")
        bits, right[kind], merged, error = ([float(row[c]) for row in rows] for c in columns)
        cells = [
            f"{100 * i.estimate:.0f} % [{100 * i.low:.0f}, {100 * i.high:.0f}]"
            for i in (mean_interval(right[kind]), mean_interval(merged))
        ]
        print(
            f"{kind:8} {bits[0]:7.1%}    {cells[0]:22} {cells[1]:24} {sum(error) / len(error):4.0%}"
        )
    difference = mean_interval(np.subtract(right["nf4"], right["float32"]))
    low, high = (f"{100 * end:+.0f}" for end in (difference.low, difference.high))
    print(f"NF4 minus floats, paired by seed, 95 % interval: {low} to {high} percentage points")
    rows = [row for row in runs if row["base"] == "nf4"]
    fewer = sum(float(row["merged_right"]) < float(row["right"]) for row in rows)
    print(f"NF4, merged and rounded again: fewer right in {fewer} of {len(rows)} runs")


# %% [markdown]
# ### What rounding costs
#
# {numref}`fig-lora-nf4` shows the levels, and how often each of them is used for normal weights:

# %% mystnb={"figure": {"caption": "Left: the 16 levels of NF4 under the density that they are quantiles of. Right: the share of normal weights that gets each code, in blocks of 64; dashed, an equal share.", "name": "fig-lora-nf4"}, "image": {"alt": "Two panels. Left, a bell curve with 16 vertical lines, dense in the middle and sparse outside. Right, 16 bars around the dashed line of one sixteenth, lower at both ends."}}
draw_levels(shares_of_codes(normal))

# %% [markdown]
# The shares are not equal, in contrast to the argument: a number divided by the largest of its
# block is no longer normal, and Yoshida {cite}`yoshida2023nf4` shows how its distribution depends
# on the block's size. To compare errors, the even levels of four-bit integers, in blocks of the
# same size, are the control. `normal` is a matrix of a million normal numbers, and `even` has the
# 16 even levels:

# %%
for name, chosen in (("even levels", even), ("NF4", levels)):
    error = relative_error(quantize_nf4(normal, levels=chosen).dequantize(), normal)
    print(f"{name:11}: norm of the error / norm of the weights: {error:.1%}")

# %% [markdown]
# NF4's error is a tenth smaller, but 9 % of the weights still sounds like much. Does tuning succeed
# over such a base? `python benchmarks/qlora.py` repeated the experiment of "Against full tuning"
# over the base in floats, in int8, and in NF4: 100 steps at a rate of 0.01 with adapters of rank 8
# in all linear layers. The first column of numbers is the loss of the untuned base on stories,
# relative to that of the base in floats. The last two are about merging.

# %%
show_runs("qlora.csv")

# %% [markdown]
# About 90 % are right over each of the three bases, and zero lies well inside the interval of the
# difference. The interval also says how little five seeds can tell: a loss of several points is not
# excluded, and the results over NF4 are the most scattered. The rounded base itself is hardly worse
# on stories, by less than half a percent of the loss.
#
# One live run must fall into the range of the table. It also counts what is stored:

# %%
tuned = quantize_base(base)
print(f"the whole model: {stored_bytes(base):,} bytes in floats, {stored_bytes(tuned):,} in NF4")
apply_lora(tuned, LoRAConfig(rank=8), seed=0)
tune_on_facts(tuned, 100, 0.01)
about("right over NF4", replies_right(tuned.eval()), 0.79, 0.99)

# %% [markdown]
# The tiny model keeps two thirds of its bytes, as more than half of its weights are in the
# embedding and the head, which stay in floats. With 7B parameters, where they are a few percent, 14
# GB become about 4.

# %% [markdown]
# ### Merging back
#
# To merge an adapter into a quantized base, its matrix must be dequantized and the update added. If
# the sum is kept in floats, nothing is lost but the saving. If it is rounded again, the rounding
# falls on the update, too: its error depends on the size of the weights in a block, while the
# update may be much smaller. {py:func}`~llmbook.lora.merge_lora` therefore refuses a quantized
# base, and {py:func}`~llmbook.lora.merge_quantized` has to be told which of the two is meant. It
# returns the error of each matrix relative to the update. The table above has both: its last column
# is this error, the one before it the share of right replies after merging and rounding.
#
# Over NF4 the error is about 43 % of the update, and the merged and rounded model answers fewer
# questions in each of the five runs, about 4 percentage points on average. Over int8 it is 3 %, and
# the replies hardly change. So an adapter tuned over four bits should stay beside its base, or be
# merged into floats. (Merging into the *original* base needs a test, too: the adapter was tuned
# over another one.)


# %% [markdown]
# ## Files that PEFT opens
#
# Many adapters are exchanged in the layout of PEFT, a folder with two files. `adapter_config.json`
# says what the adapter is: its rank, alpha, and the names of the layers.
# `adapter_model.safetensors` has two tensors for each layer, named after the layer in *Hugging
# Face's* class for the model, such as `…layers.0.self_attn.q_proj.lora_A.weight`. Chapter 11 writes
# the base so that their library opens it. So a model tuned here can be served by programs that know
# PEFT, and an adapter from elsewhere can be tuned further here.
#
# Two things can go wrong silently. The first is a name that matches nothing: if its tensors are
# skipped, the "tuned" model is the base. So a tensor that is missing or left over is an error here.
# The second is an entry of the configuration that stands for a different function. An adapter with
# `use_dora` has the same two matrices and computes something else with them. So every entry that we
# do not implement is refused by its name, unless it is switched off.

# %% [markdown]
# {py:func}`~llmbook.lora.save_adapter` and {py:func}`~llmbook.lora.load_adapter` are in the room
# below. Nothing is ever unpickled, and a folder appears only when it is complete.

# %% [markdown] tags=["engine"]
# ### Engine room: names, fused matrices, and what is refused in a file

# %% [markdown] tags=["engine"]
# The layers of our Llama-like models have the same last names as those of Hugging Face; only the
# modules around them are called differently. A model that belongs to none of their families keeps
# its names, since PEFT can wrap any module of PyTorch, ours included.

# %% tags=["engine"]
#| export
_HF_PARTS = {"blocks": "layers", "attention": "self_attn", "feed_forward": "mlp"}
_GPT2_PARTS = {
    "attention.q_proj": "attn.c_attn",
    "attention.k_proj": "attn.c_attn",
    "attention.v_proj": "attn.c_attn",
    "attention.o_proj": "attn.c_proj",
    "feed_forward.up_proj": "mlp.c_fc",
    "feed_forward.down_proj": "mlp.c_proj",
}


# %% tags=["engine"]
#| export
def peft_names(model: TransformerLM) -> dict[str, str]:
    """Return what the linear layers of ``model`` are called in Hugging Face's class for it.

    In GPT-2 three of ours have one name, as one matrix there makes queries, keys and values.
    """
    if not isinstance(model, TransformerLM):
        raise ValueError(f"model: expected a TransformerLM, got {_named(model)}")
    family = model_type(model.config)
    names = [name.removesuffix(".base") for name in _linear_layers(model)]  # of adapted layers
    if family != "llmbook":
        names = [name for name in names if not name.endswith(".router")]  # no layer of theirs
    return {name: _peft_name(name, family) for name in names}


# %% tags=["engine"]
#| export
def _peft_name(name: str, family: str) -> str:
    if family == "llmbook" or name == "lm_head":
        return name
    if family == "gpt2":
        number, _, rest = name.removeprefix("blocks.").partition(".")
        return f"transformer.h.{number}.{_GPT2_PARTS[rest]}"
    return "model." + ".".join(_HF_PARTS.get(part, part) for part in name.split("."))


# %% [markdown] tags=["engine"]
# Hugging Face's GPT-2 makes queries, keys, and values with one matrix, which gets one pair of thin
# matrices. Our three pairs become one of three times the rank: the three $A$ are stacked, and the
# three $B$ become blocks of a larger matrix that is zero elsewhere. A pair that we do not have
# becomes zeros. The entries `rank_pattern` and `alpha_pattern` of the configuration say so. In the
# other direction, PEFT's own adapter of the fused matrix has one $A$ for all three, and its $B$ is
# cut into three parts.


# %% tags=["engine"]
#| export
def _fused(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Return one pair of thin matrices that does what several do, for outputs side by side.

    Where there is none, zeros stand for it.
    """
    a, b = next(pair for pair in pairs if pair is not None)
    whole = [(a.new_zeros(a.shape), b.new_zeros(b.shape)) if p is None else p for p in pairs]
    return torch.cat([pair[0] for pair in whole]), torch.block_diag(*[pair[1] for pair in whole])


# %% tags=["engine"]
#| export
def _split(a: Tensor, b: Tensor, rank: int) -> list[tuple[Tensor, Tensor] | None]:
    """Return the pairs that a fused one was made of; or raise a ``ValueError``."""
    n = 3  # queries, keys, values
    if len(a) == rank:
        return [(a, part) for part in b.chunk(n)]
    blocks = (
        [part.contiguous() for part in a.chunk(n)],
        [part[:, i * rank : (i + 1) * rank].contiguous() for i, part in enumerate(b.chunk(n))],
    )
    if len(a) != n * rank or not torch.equal(torch.block_diag(*blocks[1]), b):
        raise ValueError(f"rank_pattern: expected three adapters of rank {rank}, side by side")
    return [(a, b) if a.any() else None for a, b in zip(*blocks, strict=True)]


# %% [markdown] tags=["engine"]
# When an adapter is saved, the names of its targets are the shortest that select exactly the
# adapted layers. The fingerprint of the base goes into the header of the safetensors file, which
# PEFT ignores.

# %% tags=["engine"]
#| export
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


# %% tags=["engine"]
#| export
def save_adapter(model: TransformerLM, folder: str | Path, *, base_name: str | None = None) -> None:
    """Write the adapter of ``model`` as PEFT does: adapter_config.json and safetensors.

    ``folder`` is new or empty, and appears only when it is complete. ``base_name`` is where PEFT
    can find the base by itself, such as a folder of ``save_pretrained``.
    """
    folder = check_path(folder, "folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: expected a new or an empty one, got {folder}")
    if base_name is not None:
        check_text(base_name, "base_name")
    names, state = peft_names(model), adapter_state(model)
    adapted = list(lora_layers(model))
    if unknown := [name for name in adapted if name not in names]:
        expected = "adapters of layers that Hugging Face's class has"
        raise ValueError(f"model: expected {expected}, got one of {unknown[0]}")
    config, entries = state.config, _entries(state.config, base_name)
    tensors, fused = dict[str, Tensor](), model_type(model.config) == "gpt2"
    for theirs in dict.fromkeys(names[name] for name in adapted):
        ours = [name for name in names if names[name] == theirs]
        pairs = [_pair(state, name) if name in adapted else None for name in ours]
        a, b = next(pair for pair in pairs if pair is not None)
        if fused and len(ours) > 1:
            a, b = _fused(pairs)
            share = len(a) // config.rank
            entries["rank_pattern"][theirs.rpartition(".")[2]] = len(a)
            # The scale stays: alpha / rank, or alpha / sqrt(rank).
            grown = config.alpha * (math.sqrt(share) if config.rslora else share)
            entries["alpha_pattern"][theirs.rpartition(".")[2]] = grown
        tensors[f"base_model.model.{theirs}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{theirs}.lora_B.weight"] = b.cpu().contiguous()
    entries["target_modules"] = _shortest({names[name] for name in adapted}, set(names.values()))
    entries["fan_in_fan_out"] = fused
    with whole_directory(folder) as draft:
        (draft / _CONFIG).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, draft / _TENSORS, metadata={"format": "pt", "base": state.base})


# %% tags=["engine"]
#| export
def _pair(state: AdapterState, name: str) -> tuple[Tensor, Tensor]:
    return state.tensors[f"{name}.lora_a"], state.tensors[f"{name}.lora_b"]


def _entries(config: LoRAConfig, base_name: str | None) -> dict[str, Any]:
    """Return a configuration in PEFT's words."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
    }


# %% tags=["engine"]
#| export
def _shortest(wanted: set[str], known: set[str]) -> list[str]:
    last = {name.rpartition(".")[2] for name in wanted}
    selected = {name for name in known if name.rpartition(".")[2] in last}
    return sorted(last if selected == wanted else wanted)


# %% [markdown] tags=["engine"]
# Opening is stricter. A configuration of PEFT has some forty entries, and an entry that we do not
# implement may change what the adapter computes. So whatever is neither known nor switched off is
# refused by its name, and so is each tensor that is missing, left over, or of another shape.

# %% tags=["engine"]
#| export
# Entries that may say anything, as they don't change what a loaded adapter computes
_FREE = frozenset(
    "base_model_name_or_path revision inference_mode peft_version auto_mapping r lora_alpha "
    "lora_dropout use_rslora target_modules rank_pattern alpha_pattern fan_in_fan_out "
    "megatron_core "
    "qalora_group_size ensure_weight_tying layers_pattern runtime_config".split()
)
# Other entries, and what they may say; a start by "pissa", say, has changed the base
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
_OFF: tuple[Any, ...] = (None, False, {}, [])


# %% tags=["engine"]
#| export
def _read_config(path: Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """Return the configuration in a file, and all its entries."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing: is this the folder of an adapter?") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(entries, dict) or "r" not in entries or "target_modules" not in entries:
        raise ValueError(f"{path}: expected an object with r and target_modules")
    for name, value in entries.items():
        allowed = _ALLOWED.get(name, _OFF)
        if name not in _FREE and not any(value is e or value == e for e in allowed):
            wanted = " or ".join(map(repr, allowed[:2])) if name in _ALLOWED else "it switched off"
            raise ValueError(f"{path}: {name}: expected {wanted}, got {value!r:.60}")
    if "peft_type" not in entries:
        raise ValueError(f"{path}: peft_type: expected 'LORA', but it is missing")
    targets = entries["target_modules"]
    if not targets or not isinstance(targets, str | list):
        expected = "a text, or a list of texts"
        raise ValueError(f"{path}: target_modules: expected {expected}, got {targets!r:.60}")
    if not isinstance(rslora := entries.get("use_rslora", False), bool):
        raise ValueError(f"{path}: use_rslora: expected true or false, got {rslora!r:.60}")
    try:
        check_whole("r", entries["r"], 1)
        _check_positive("lora_alpha", entries.get("lora_alpha", 8))
        check_fraction("lora_dropout", entries.get("lora_dropout", 0.0))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    given = {
        "rank": entries["r"],
        "alpha": float(entries.get("lora_alpha", 8)),  # as PEFT has it
        "dropout": float(entries.get("lora_dropout", 0.0)),
        "targets": tuple(targets) if isinstance(targets, list) else targets,
        "rslora": rslora,
    }
    try:
        return LoRAConfig(**given), entries
    except (TypeError, ValueError) as error:
        words = str(error).replace("targets:", "target_modules:", 1)
        raise ValueError(f"{path}: {words}") from None


# %% tags=["engine"]
#| export
def read_adapter(folder: str | Path, model: TransformerLM) -> AdapterState:
    """Return the adapter in ``folder``, ours or PEFT's, in the names of ``model``, its base.

    Only safetensors are read, never a pickle. A file of PEFT does not say which weights it belongs
    to: the adapter is then taken to be one for ``model``, if all shapes fit. A ``ValueError`` names
    an entry or a tensor that is missing, unknown, or does not fit.
    """
    folder = check_path(folder, "folder")
    names = peft_names(model)
    config, entries = _read_config(folder / _CONFIG)
    _check_patterns(folder, entries, names, model)
    found, base = _read_tensors(folder)
    hit = {theirs for theirs in names.values() if _is_target(config.targets, theirs)}
    if not hit:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names.values()}))
        got = entries["target_modules"]
        raise ValueError(f"{folder}: target_modules: expected some of {known}, got {got!r:.80}")
    wanted = {f"base_model.model.{n}.lora_{kind}.weight" for n in hit for kind in "AB"}
    for words, faults in (
        ("missing", wanted - found.keys()),
        ("unexpected", found.keys() - wanted),
    ):
        if faults:
            raise ValueError(f"{folder}: {len(faults)} tensors are {words}: {min(faults)}")
    tensors = dict[str, Tensor]()
    for theirs in sorted(hit):
        a, b = (found[f"base_model.model.{theirs}.lora_{kind}.weight"] for kind in "AB")
        ours = [name for name in names if names[name] == theirs]
        _check_pair(folder, theirs, a, b, [model.get_submodule(name) for name in ours], entries)
        pairs = [(a, b)] if len(ours) == 1 else _split(a, b, config.rank)
        for name, pair in zip(ours, pairs, strict=True):
            if pair is not None:
                tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = pair
    adapted = {name.rpartition(".")[0] for name in tensors}
    targets = tuple(_shortest(adapted, set(names)))
    return AdapterState(replace(config, targets=targets), tensors, base or base_fingerprint(model))


# %% tags=["engine"]
#| export
def load_adapter(model: TransformerLM, folder: str | Path, *, any_base: bool = False) -> None:
    """Give ``model`` the adapter in ``folder``, see ``read_adapter`` and ``load_adapter_state``."""
    state = read_adapter(folder, model)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    if layers and replace(layers[0].config, targets=state.config.targets) == state.config:
        state = state._replace(config=layers[0].config)  # the same layers in other words, perhaps
    load_adapter_state(model, state, any_base=any_base)


# %% tags=["engine"]
#| export
def _is_target(targets: str | tuple[str, ...], name: str) -> bool:
    """Whether PEFT adapts the layer ``name``."""
    if targets == "all-linear":
        return name.rpartition(".")[2] != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


# %% tags=["engine"]
#| export
def _check_patterns(
    folder: Path, entries: Mapping[str, Any], names: Mapping[str, str], model: TransformerLM
) -> None:
    """Allow other ranks for fused matrices only."""
    fused = {"c_attn"} if model_type(model.config) == "gpt2" else set()
    for entry in ("rank_pattern", "alpha_pattern"):
        pattern = entries.get(entry) or {}
        if not isinstance(pattern, dict) or pattern.keys() - fused:
            expected = "one rank and one alpha for all layers"
            raise ValueError(
                f"{folder / _CONFIG}: {entry}: expected {expected}, got {pattern!r:.60}"
            )


# %% tags=["engine"]
#| export
def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    path = folder / _TENSORS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        reason = f"; {pickle.name} could run any program when it is opened" * pickle.exists()
        raise ValueError(f"{folder}: expected {_TENSORS}{reason}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get("base")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file: {error}") from None


# %% tags=["engine"]
#| export
def _check_pair(
    folder: Path,
    theirs: str,
    a: Tensor,
    b: Tensor,
    layers: Sequence[Any],
    entries: Mapping[str, Any],
) -> None:
    """Demand the shapes of a layer's thin matrices, and in fused ones the scale of the others."""
    last, rslora = theirs.rpartition(".")[2], entries.get("use_rslora", False)
    rank = (entries.get("rank_pattern") or {}).get(last, entries["r"])
    alpha = (entries.get("alpha_pattern") or {}).get(last, entries.get("lora_alpha", 8))
    n_out = sum(layer.out_features for layer in layers)
    for kind, tensor, shape in (
        ("A", a, (rank, layers[0].in_features)),
        ("B", b, (n_out, rank)),
    ):
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"{folder}: expected floats of shape {shape} for {theirs}.lora_{kind}, got {got}"
            )
    power = 0.5 if rslora else 1.0
    scale = entries.get("lora_alpha", 8) / entries["r"] ** power
    if not math.isclose(alpha / rank**power, scale):
        raise ValueError(f"{folder / _CONFIG}: alpha_pattern: expected a scale of {scale:g}")


# %% tags=["engine"]
# PEFT and transformers, without their remarks on this computer; and a folder for the files
import logging
import tempfile
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable()
    import peft
    import transformers

    logging.disable(logging.NOTSET)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
files = Path(tempfile.mkdtemp())


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest number."""
    return float(((one - other).abs().max() / other.abs().max()).detach())


PUBLISHED = torch.tensor(
    [
        [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0],
        [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0],
    ]
).flatten()


def opened_by_peft(folder: Path) -> Any:
    """Return PEFT's model of the exported base and the adapter in ``folder``."""
    opened = transformers.AutoModelForCausalLM.from_pretrained(files / "base")
    return peft.PeftModel.from_pretrained(opened, folder, is_trainable=True).eval()


# %% tags=["engine"]
def training_pass(model: Any) -> None:
    """One pass forward and backward, with our models and with theirs."""
    logits = model(ids)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def gradient_difference(own: Any, other: Any) -> float:
    """Return the largest relative difference of any thin matrix's gradient, ours to PEFT's."""
    training_pass(own), training_pass(other)
    theirs, names = dict(other.named_parameters()), peft_names(own)
    worst = 0.0
    for name, layer in lora_layers(own).items():
        for kind, matrix in (("A", layer.lora_a), ("B", layer.lora_b)):
            found = theirs[f"base_model.model.{names[name]}.lora_{kind}.default.weight"].grad
            worst = max(worst, largest_difference(matrix.grad, found))
    return worst


# %% [markdown]
# ### There and back
#
# We save the adapter for Tess, PEFT opens it over the exported base, and we compare the logits.
# Then we change all numbers of PEFT's adapter, PEFT saves it, and we open it here (`load_adapter`
# replaces the numbers of an adapter that is already there):

# %%
ours = deepcopy(base)
load_adapter_state(ours, adapters["Tess"])
base.save_pretrained(files / "base")
save_adapter(ours, files / "tess")
theirs = opened_by_peft(files / "tess")
differences = [largest_difference(ours(ids), theirs(ids).logits)]
with torch.no_grad():
    [p.add_(0.01) for name, p in theirs.named_parameters() if "lora_" in name]
theirs.save_pretrained(files / "theirs")
load_adapter(ours, files / "theirs")
differences.append(largest_difference(ours(ids), theirs(ids).logits))
assert max(differences) < 1e-4
print("ours opened by PEFT, and PEFT's opened here: the same logits to 4 digits")

# %% [markdown]
# The tests do the same with the classes of Llama, Qwen3, Mistral, and GPT-2, with names, regular
# expressions, and "all-linear" as targets, and damage the files in every way that the room names.


# %% [markdown]
# ## Is it the real thing?
#
# The logits agreed. The gradients must agree, too: PEFT's model from above and ours have the same
# thin matrices now, and both get the same batch. The second comparison is with the 16 levels that
# the authors of QLoRA publish {cite}`dettmers2023qlora`. (Where torchao is installed, a test
# compares codes and matrices with its NF4, too.)

# %%
assert gradient_difference(ours, theirs) < 1e-3
print(f"gradients of {2 * len(lora_layers(ours))} thin matrices: the same as PEFT's to 3 digits")
assert largest_difference(nf4_levels(), PUBLISHED) < 1e-6
print("levels of NF4: those that were published, to 6 digits")

# %% [markdown]
# Gradients and levels agree.
#
# ## How fast is it?
#
# We time one pass, forward and backward, on the same batch of ten rows:

# %% tags=["nbval-ignore-output"]
four_bits, full = quantize_base(base), deepcopy(base).requires_grad_(True)
load_adapter_state(four_bits, adapter_state(ours), any_base=True)  # rounded: another fingerprint
for name, model in (("PEFT", theirs), ("over NF4", four_bits), ("full tuning", full)):
    ratio = ratio_of_times(lambda m=model: training_pass(m), lambda: training_pass(ours), 10)
    print(f"{name:11}: {ratio:.2f} times the time of our LoRA")

# %% [markdown]
# PEFT takes somewhat longer, and full tuning somewhat less time than our LoRA, which calls more
# functions; in a model this small, calls are probably much of the work. In larger models the thin
# products hardly count, and the gradients of the frozen matrices, a third of the work of full
# tuning, need not be computed. NF4 costs time everywhere, since each matrix is dequantized once for
# the forward pass and once for the backward pass; kernels for GPUs can do so while they multiply.

# %% [markdown]
# ## Exercises
#
# ````{exercise} A full tuning as an adapter
# :label: ex-lora-extract
# *Fifteen minutes.* Somebody gives you a matrix before and after full tuning, and you would like to
# keep the difference as an adapter. Write `extracted(before, after, rank)`, which returns `a`, of
# shape (rank, inputs), and `b`, of shape (outputs, rank), such that `before + b @ a` is as near to
# `after` as any matrix of this kind can be. Let both share the size of the singular values evenly,
# so that neither is much larger than the other.
# ````


# %% tags=["solution"]
def extracted(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best adapter of a rank for the difference of two matrices, as ``a`` and ``b``."""
    u, s, v = torch.linalg.svd(after - before, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


# %% tags=["check"]
seed_everything(0)
before, after = torch.randn(2, 12, 20).double().unbind()
a, b = extracted(before, after, 3)
assert a.shape == (3, 20) and b.shape == (12, 3), "a is (rank, inputs), b is (outputs, rank)"
values = torch.linalg.svdvals(after - before)
error, least = float((after - before - b @ a).norm()), float((values[3:] ** 2).sum().sqrt())
assert error < least * 1.000001, f"the error is {error:.2f}, but {least:.2f} can be reached"
assert abs(float(a.norm() / b.norm()) - 1) < 1e-6, "a and b are not of one size"
whole = extracted(before, after, 12)
assert torch.allclose(before + whole[1] @ whole[0], after), "with all directions nothing is lost"

# %% [markdown]
# ````{exercise} Which adapter broke?
# :label: ex-lora-broken
# *Twenty minutes.* A run with adapters has ended, and the model is no better than its base. Write
# `faults(base, model)`, which compares an adapted model with a copy of its base and returns a
# dictionary from the name of each faulty layer to one of three words: `"dead"` if no training can
# ever move the adapter; `"moved"` if the matrix under it is no longer that of the base;
# `"not finite"` if the adapter contains infinity or NaN. `lora_layers(model)` returns the adapted
# layers by name, each with `base`, `lora_a`, and `lora_b`; `base.get_submodule(name)` is a layer of
# the base. An adapter that simply has not been trained yet has no fault. If several things are
# wrong with a layer, the first of the three counts.
# ````


# %% tags=["solution"]
def faults(base: nn.Module, model: nn.Module) -> dict[str, str]:
    """What is wrong with the adapters of ``model``, by the name of the layer."""
    found = {}
    for name, layer in lora_layers(model).items():
        finite = layer.lora_a.isfinite().all() and layer.lora_b.isfinite().all()
        if not layer.lora_a.any() and not layer.lora_b.any():
            found[name] = "dead"
        elif not torch.equal(layer.base.weight, base.get_submodule(name).weight):
            found[name] = "moved"
        elif not finite:
            found[name] = "not finite"
    return found


# %% tags=["check"]
model = deepcopy(base)
apply_lora(model, LoRAConfig(rank=2), seed=0)
fine = faults(base, model)
assert fine == {}, f"B is zero at first, and the first step moves it; got {fine}"
first, attention = (block.attention for block in model.blocks)
with torch.no_grad():
    first.q_proj.base.weight[0, 0] += 1e-3
    first.q_proj.lora_b[0, 0] = math.nan
    first.k_proj.lora_a[0, 0] = math.nan
    attention.q_proj.lora_a.zero_()
    attention.k_proj.base.weight[0, 0] += 1e-3
    attention.v_proj.lora_b[0, 0] = math.inf
    attention.o_proj.lora_a.zero_()
    attention.o_proj.lora_b.fill_(0.1)
everything = {name.split(".", 1)[1]: word for name, word in faults(base, model).items()}
found = {n.rpartition(".")[2]: word for n, word in everything.items() if n.startswith("1.")}
assert found.get("q_proj") == "dead", "where both matrices are zero, so are both gradients"
assert "o_proj" not in found, "A is zero, but B is not: A has a gradient"
assert found.get("k_proj") == "moved", "a single number of the base has changed"
assert found.get("v_proj") == "not finite", "infinity is not a number to train with"
broken = {n.rpartition(".")[2]: word for n, word in everything.items() if n.startswith("0.")}
assert broken.get("q_proj") == "moved", "NaN over a changed base: the first of the three counts"
assert broken.get("k_proj") == "not finite", "NaN in A is as bad as in B"
assert len(everything) == 5, f"five layers are broken, but {len(everything)} were found"

# %% [markdown]
# ````{exercise} Direction and magnitude
# :label: ex-lora-dora
# *Thirty minutes.* DoRA {cite}`liu2024dora` takes the sum $V = W + sBA$ and multiplies each *row*
# of it, the weights of one output, so that its length becomes a trained number $m_i$. The
# magnitudes $m$ start as the lengths of the rows of $W$. Write `dora(x, weight, a, b, scale,
# magnitude)`, the output of such a layer for `x` of shape (batch, in). No gradient passes through
# the lengths that it divides by: the authors treat them as constants, which saves memory.
# ````


# %% tags=["solution"]
def dora(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor
) -> Tensor:
    """The output of a DoRA layer."""
    changed = weight + scale * (b @ a)
    length = changed.norm(dim=1).detach()
    return x @ (changed * (magnitude / length)[:, None]).T


# %% tags=["check"]
draw = torch.Generator().manual_seed(0)
w, x = torch.randn(6, 5, generator=draw), torch.randn(3, 5, generator=draw)
a, b = torch.randn(2, 5, generator=draw), torch.randn(6, 2, generator=draw, requires_grad=False)
start = dora(x, w, a, torch.zeros(6, 2), 2.0, w.norm(dim=1))
assert torch.allclose(start, x @ w.T, atol=1e-5), "with B = 0 it is not the base"
unit = dora(torch.eye(5), w, a, b, 2.0, torch.ones(6))
assert torch.allclose(unit.norm(dim=0), torch.ones(6)), "a row's length is not its magnitude"
config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], use_dora=True)
plain = nn.Sequential(nn.Linear(5, 6, bias=False))
plain[0].weight.data = w.clone()
layer = peft.get_peft_model(plain, config).base_model.model[0]
layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = a.clone(), b.clone()
b_own = b.clone().requires_grad_()
m = layer.lora_magnitude_vector.default.weight.detach()
value = dora(x, w, a, b_own, 2.0, m)
assert torch.allclose(value, layer(x), atol=1e-4), "the output is not PEFT's"
(found,) = torch.autograd.grad(value.square().sum(), b_own)
(wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.lora_B.default.weight)
same = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
assert same, "a gradient passes through the length"

# %% [markdown]
# ````{exercise} A start that is not zero
# :label: ex-lora-pissa
# *Twenty minutes.* PiSSA {cite}`meng2024pissa` gives the thin matrices the strongest directions of
# $W$ itself, and freezes the rest. Write `pissa(weight, rank)`, which returns $A$, $B$ and the
# residual $W - BA$. Of the singular value decomposition $W = U\Sigma V^\top$, the top `rank`
# directions go into the thin matrices, the root of each singular value into both. Then answer:
# what does a model compute whose adapter is switched off, and why does
# {py:func}`~llmbook.lora.read_adapter` refuse a file that says `"init_lora_weights": "pissa"`?
# ````


# %% tags=["solution"]
def pissa(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Thin matrices from the strongest directions, and what is left of the weight."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    # With the adapter off, the residual computes: the base without its strongest directions. So the
    # adapter does not fit the base itself, and read_adapter refuses "init_lora_weights": "pissa".
    return a, b, weight - b @ a


# %% tags=["check"]
w = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
a, b, rest = pissa(w, 2)
assert a.shape == (2, 5) and b.shape == (6, 2), "A is (rank, in), and B is (out, rank)"
assert torch.allclose(rest + b @ a, w), "residual and thin matrices do not add up to W"
values = torch.linalg.svdvals(w)
assert torch.allclose(torch.linalg.svdvals(rest)[0], values[2]), "these are not the top directions"
assert torch.allclose(a.norm(dim=1), b.norm(dim=0)), "A and B do not share the singular values"
assert torch.allclose(a.norm(dim=1) ** 2, values[:2]), "A and B do not share the singular values"

# %% [markdown]
# ````{exercise} Better levels
# :label: ex-lora-levels
# *Twenty minutes.* NF4's levels are quantiles, which are not the levels with the smallest squared
# error. Lloyd's algorithm improves any set of levels: each number goes to its nearest level, then
# each level moves to the mean of its numbers. Write one step of it, `improved(levels, numbers)`.
# The levels -1, 0, and 1 stay where they are, and so does a level that no number goes to.
# ````


# %% tags=["solution"]
def improved(levels: Tensor, numbers: Tensor) -> Tensor:
    """One step of Lloyd's algorithm, with -1, 0 and 1 fixed."""
    nearest = (numbers[:, None] - levels).abs().argmin(dim=1)
    new = levels.clone()
    for code, level in enumerate(levels.tolist()):
        own = numbers[nearest == code]
        if level not in (-1.0, 0.0, 1.0) and len(own):
            new[code] = own.mean()
    return new


# %% tags=["check"]
blocks = torch.randn(500, 64, generator=torch.Generator().manual_seed(2))
numbers = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
found, errors = nf4_levels(), list[float]()
for _ in range(6):
    errors.append(float((numbers[:, None] - found).abs().amin(dim=1).square().mean()))
    found = improved(found, numbers)
    assert found[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0], "-1, 0 and 1 must stay"
assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1], "the error does not fall"
few = improved(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), torch.tensor([0.4, 0.5, 0.1]))
assert few[1] == -0.5, "a level without numbers must stay"
assert abs(few[3] - 0.45) < 1e-6, "a level does not move to the mean of its own numbers"
# %% [markdown]
# ## Summary
#
# LoRA leaves $W$ frozen and trains $sBA$ beside it: $r(m+n)$ numbers in place of $mn$, with memory
# for the gradients and moments of those alone. Because $B = 0$ at first, the model starts as its
# base, to the bit. The update that full tuning finds is not of low rank, but a few of its
# directions do most of its work. At equal steps LoRA came near full tuning, and at its best rate it
# forgot less. This rate was one to three times that of full tuning, not ten times. What an adapter
# stored of new facts grew with its rank up to 8.
#
# One batch can serve many adapters: the base's product is shared, and each row is multiplied by the
# thin matrices of its own user. NF4 puts 16 levels at quantiles of the normal distribution, and a
# weight takes little more than four bits. Tuning over such a base was as good as over floats,
# within the noise of five seeds; merging back into it loses much of the update. Files in PEFT's
# layout carry adapters in both directions.
#
# ### Checklist
#
# - Try full tuning's learning rate and ten times it, with at least one value between; measure.
# - Take rank 8 or 16 to learn a form. For new facts, count the bits first, and take more.
# - Adapt all linear layers unless you know what the task needs; not the head, above all not a tied
#   one.
# - Keep $\alpha$ fixed (16 or 32), with $\alpha/r$ under Adam.
# - Compare logits: before training with the base's, to the bit; after merging, within tolerance.
# - Store the fingerprint of the base beside the adapter.
# - Many users of one base: keep the adapters beside it, in one batch. One user: merge into floats.
# - If the base doesn't fit into memory: four bits for the base, ordinary floats for adapters, and
#   no merging back.
# - With an adapter file from others, check that no tensor was skipped, that every entry is
#   implemented, and that the base is the one it was tuned on.
#
# ### Further reading
#
# The method comes from Hu and colleagues {cite}`hu2022lora`. Kalajdzievski
# {cite}`kalajdzievski2023rank` derives the factor for high ranks, and Schulman and colleagues
# {cite}`schulman2025lora` ask when LoRA equals full tuning. QLoRA {cite}`dettmers2023qlora` has NF4
# and double quantization, and Yoshida {cite}`yoshida2023nf4` says what the quantiles do not account
# for. Punica {cite}`chen2023punica` and S-LoRA {cite}`sheng2023slora` serve many adapters at once;
# DoRA {cite}`liu2024dora` and PiSSA {cite}`meng2024pissa` change what is trained, and where it
# starts.
