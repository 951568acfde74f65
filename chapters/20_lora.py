# %% [markdown]
# # LoRA
#
# > Tune a model by a few thousand numbers beside its frozen weights: what a low rank can hold,
# > what it saves, and what it costs.
#
# LEAD
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:class}`~llmbook.lora.LoRAConfig`, {py:class}`~llmbook.lora.LoRALinear`, {py:func}`~llmbook.lora.apply_lora`, {py:func}`~llmbook.lora.merge_lora`, {py:func}`~llmbook.lora.unmerge_lora`, {py:func}`~llmbook.lora.without_lora`, {py:func}`~llmbook.lora.adapter_state`, {py:func}`~llmbook.lora.load_adapter_state` |
# | **You need** | instruction tuning ({doc}`19_instruction`), training ({doc}`13_training`), matrices and their singular values |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp lora

# %% tags=["engine"]
#| export
# The imports of the module
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import nn, Tensor
from torch.nn import functional as F

# %% [markdown]
# ## The bill for ten copies
#
# TEXT

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.environment import check_choice, check_fraction, check_whole
from llmbook.generation import generate, QuantizedLinear, Sampling
from llmbook.instruction import chat_form, Example, InstructionDataset, Message, story_examples
from llmbook.instruction import WORLD_CHAT, world_conversations
from llmbook.model import TransformerLM
from llmbook.tinyworld import judge_reply, make_questions, Question, TinyWorld, VALUES
from llmbook.tokenizer import BPETokenizer
from llmbook.training import documents_score, pretrained, Trainer, TrainingConfig

# %% [markdown]
# ## Two thin matrices


# %%
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


# %%
#| export
class LoRALinear(nn.Module):
    """A frozen linear layer, and beside it two thin matrices that are trained (Hu et al., 2022).

    ``base`` is a ``Linear``, or a quantized layer with ``in_features`` and ``out_features``.
    ``lora_a``, (rank, in), is drawn as PEFT does, from a uniform distribution of variance
    1/(3 in); ``lora_b``, (out, rank), is zero, so that the layer begins as its base.
    """

    def __init__(
        self, base: nn.Module, config: LoRAConfig, *, generator: torch.Generator | None = None
    ):
        super().__init__()
        _check_base(base, config)
        self.base, self.config, self.enabled = base, config, True
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)
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
    if isinstance(layer, QuantizedLinear):
        return layer.weight.to(layer.scale.dtype) * layer.scale[:, None]
    dequantize = getattr(layer, "dequantize", None)
    weight = getattr(layer, "weight", None) if dequantize is None else dequantize()
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"layer: expected a linear layer, got {layer!r:.60}")
    return weight


# %% [markdown]
# ## Which matrices, by name


# %%
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
def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of a model by name; a ``ValueError`` if there are none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not found:
        raise ValueError(
            f"model: expected one with adapters, as apply_lora makes, got {model!r:.60}"
        )
    return found


# %% tags=["engine"]
#| export
def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the thin matrices of a model, which are what is trained."""
    layers = lora_layers(model).values()
    return [matrix for layer in layers for matrix in (layer.lora_a, layer.lora_b)]


# %%
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


# %%
#| export
def unmerge_lora(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Take the adapters that ``merge_lora`` returned out of the matrices, and put them beside."""
    for name, layer in layers.items():
        if _submodule(model, name) is not layer.base:
            raise ValueError(f"layers: expected those that were merged into model, got {name}")
    for name, layer in layers.items():
        with torch.no_grad():
            layer.base.weight.sub_(layer.update)
        _replace(model, name, layer)


# %%
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


# %%
#| export
class AdapterState(NamedTuple):
    """An adapter by itself: what ``load_adapter_state`` puts beside the base it was made for."""

    config: LoRAConfig
    tensors: dict[str, Tensor]  # "<layer>.lora_a" and "<layer>.lora_b"
    base: str  # fingerprint of the base


# %%
#| export
def adapter_state(model: nn.Module) -> AdapterState:
    """Return copies of the thin matrices of a model, with what they belong to."""
    layers = lora_layers(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_a"] = layer.lora_a.detach().clone()
        tensors[f"{name}.lora_b"] = layer.lora_b.detach().clone()
    return AdapterState(next(iter(layers.values())).config, tensors, base_fingerprint(model))


# %%
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
_SAMPLE = 4096  # numbers of each tensor


def base_fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits for the weights of a model, adapters left out.

    They depend on names, shapes, types, and of each tensor on up to 4096 numbers, evenly spread.
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


def _targeted(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the names of the layers that ``config`` targets, or say why they cannot be."""
    if adapted := [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]:
        raise ValueError(f"model: expected one without adapters, but {adapted[0]} has one")
    linear, targets = _linear_layers(model), config.targets
    if not linear:
        raise ValueError(f"model: expected one with linear layers, got {model!r:.60}")
    if targets == "all-linear":
        names = [name for name in linear if name.rpartition(".")[2] != "lm_head"]
    elif isinstance(targets, str):
        names = [name for name in linear if re.fullmatch(targets, name)]
    else:
        names = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in targets)]
    _check_found(targets, names, linear, model)
    for name in names:
        _check_alone(model, name)
        _check_rank(config.rank, linear[name], name)
    return names


# %% tags=["engine"]
#| export
# What a configuration and a layer must be
def _check_positive(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r:.60}")


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
        raise ValueError(f"base: expected a linear layer without an adapter, got {base!r:.60}")
    _check_rank(config.rank, base)


def _check_rank(rank: int, layer: Any, name: str = "base") -> None:
    most = min(layer.in_features, layer.out_features)
    if rank > most:
        shape = f"{layer.out_features} by {layer.in_features}"
        raise ValueError(f"rank: expected at most {most}, as {name} is {shape}, got {rank}")


# %% tags=["engine"]
#| export
# What a model and a state must have
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
            found = _submodule(model, target)
            got = repr(target) + ("" if found is None else f", a {type(found).__name__}")
            raise ValueError(f"targets: expected linear layers, such as {known}, got {got}")


def _check_alone(model: nn.Module, name: str) -> None:
    """Refuse a matrix that another module has, too: a change of one would change the other."""
    weight = model.get_submodule(name)._parameters.get("weight")
    for other, module in model.named_modules():
        if other != name and weight is not None and module._parameters.get("weight") is weight:
            expected = "layers with a matrix of their own"
            raise ValueError(f"targets: expected {expected}, but {name} shares its with {other}")


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


# %% [markdown]
# ## Against full tuning


# %%
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


def _tuned_on(
    model: nn.Module, data: InstructionDataset, n_steps: int, rate: float
) -> torch.optim.Optimizer:
    """Train by the settings of chapter 19, and return the optimizer."""
    settings: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0, "warmup": 10}
    settings |= {"schedule": "linear", "final": 0.0, "batch_size": data.batch_size}
    config = TrainingConfig(n_steps=n_steps, learning_rate=rate, seed=data.seed, **settings)
    trainer = Trainer(model, data, config)
    trainer.train()
    return trainer.optimizer


# %% tags=["engine"]
#| export
def replies_right(model: TransformerLM, tokenizer: BPETokenizer, world: TinyWorld) -> float:
    """Return the share of held-out questions about facts that a tuned model answers right."""
    asked = make_questions(world, "fact", "held_out")
    prompts = [chat_form(tokenizer).prompt(world, question) for question in asked]
    options: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "tokenizer": tokenizer}
    options["stop_tokens"] = (tokenizer.special_tokens["<|im_end|>"],)
    replies = generate(model, prompts, max_new_tokens=24, **options)
    pairs = zip(asked, replies, strict=True)
    return sum(judge_reply(world, q, str(reply.text)).right for q, reply in pairs) / len(asked)


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
    base, world = pretrained("tinyworld"), TinyWorld()
    tokenizer = base.tokenizer
    end = tokenizer.special_tokens["<|endoftext|>"]
    examples = [WORLD_CHAT.encode(tokenizer, talk) for talk in world_conversations(world)]
    stories = story_examples(world, tokenizer, 2000)
    data = InstructionDataset(examples, 32, 128, end, others=stories, share=0.25, seed=seed)
    model = _prepared(rank, targets, seed)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_bytes = optimizer_bytes(_tuned_on(model, data, n_steps, learning_rate))
    if rank:
        merge_lora(model)
    held_out = [story.text for story in world.stories(200, seed=7)]
    bits = [documents_score(m, tokenizer, held_out)[0] for m in (model, base.model)]
    right = replies_right(model, tokenizer, world)
    place = (targets, rank, learning_rate, seed)
    return TuningRun(*place, n_trained, n_bytes, right, bits[0] / bits[1])


# %% [markdown]
# ## What a rank can store


# %%
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
def bits_stored(model: TransformerLM, facts: Sequence[NewFact]) -> tuple[float, int]:
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
    """Tune the base on facts that it has never met, and count what it has of them afterwards.

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
    _tuned_on(model, data, n_steps, learning_rate)
    stored, right = bits_stored(model.eval(), facts)
    whole = sum(
        -math.log2(f.counts[f.example.ids[f.place]] / sum(f.counts.values())) for f in facts
    )
    place = (n_steps, rank, learning_rate, seed)
    return StorageRun(*place, n_trained, len(facts), whole, right, stored)
