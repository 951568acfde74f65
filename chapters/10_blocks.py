# %% [markdown]
# # The block
#
# > Normalize, transform, add: the parts around attention that make a deep stack of layers
# > trainable, up to a mixture of experts, and the block that puts them together.
#
# (in preparation)

# %% tags=["remove-cell"]
#| default_exp blocks

# %%
#| export
import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from llmbook.corpus import _check_at_least
from llmbook.positions import LearnedEmbedding

# %%
#| export
Backend = Literal["reference", "torch"]


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected at least 0 and less than 1, got {value!r}")


def _check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise ValueError(f"eps: expected a small positive number, got {eps!r}")


# %%
#| export
def layer_norm(
    x: Float[Tensor, "*shape d_model"],
    weight: Float[Tensor, " d_model"],
    bias: Float[Tensor, " d_model"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*shape d_model"]:
    """Center each vector of ``x``, scale it to variance one, then by ``weight``; add ``bias``.

    Mean and variance are taken in float32 (float64 for float64), and the variance is divided by
    ``d_model``, not by ``d_model - 1``. Source: Ba, Kiros and Hinton (2016).

    >>> layer_norm(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3))
    tensor([-0.9258, -0.4629,  1.3887])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    normal = (centered * torch.rsqrt(variance + eps)).to(x.dtype)
    return normal * weight if bias is None else normal * weight + bias


# %%
#| export
def rms_norm(
    x: Float[Tensor, "*shape d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "*shape d_model"]:
    """Scale each vector of ``x`` to root mean square one, then by ``weight``.

    The mean square is taken in float32 (float64 for float64), and the result is rounded to the
    dtype of ``x`` before the gain, as in transformers' Llama. Source: Zhang and Sennrich (2019).

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2))
    tensor([0.8485, 1.1314])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


# %%
#| export
def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each vector, without a copy of ``x`` for its squares."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


class _RMSNormFloat32(torch.autograd.Function):
    """RMSNorm with its gradient by hand: saves only ``x`` and one number a vector."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        gx = g * x
        rows = gx.view(-1, x.size(-1))
        d_weight = inverse.view(-1) @ rows
        along = (rows @ weight).view_as(inverse) * inverse.square() / x.size(-1)
        d_x = torch.mul(g, weight, out=gx)  # its memory is used again
        return d_x.addcmul_(x, along, value=-1).mul_(inverse), d_weight, None


# %%
#| export
def _fast_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by the fastest way that torch has for this device and dtype."""
    plain = x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not plain or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNormFloat32.apply(x, weight, eps)
    return (x * _inverse_rms(x, eps)).mul_(weight)


# %%
#| export
class LayerNorm(nn.Module):
    """LayerNorm over the last dimension; the gain starts at one, the bias at zero."""

    def __init__(
        self, d_model: int, eps: float = 1e-5, bias: bool = True, backend: Backend = "torch"
    ):
        super().__init__()
        _check_at_least(d_model=(1, d_model))
        _check_eps(eps)
        _check_choice("backend", backend, ("reference", "torch"))
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return ``x``, normalized."""
        if self.backend == "reference":
            return layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


# %%
#| export
class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, with a gain that starts at one.

    ``backend="torch"`` computes the same faster; in float32 on a CPU its gradient is written by
    hand and cannot be differentiated again.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, backend: Backend = "torch"):
        super().__init__()
        _check_at_least(d_model=(1, d_model))
        _check_eps(eps)
        _check_choice("backend", backend, ("reference", "torch"))
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return ``x``, normalized."""
        if self.backend == "reference":
            return rms_norm(x, self.weight, self.eps)
        return _fast_rms_norm(x, self.weight, self.eps)


# %%
#| export
def gelu(
    x: Float[Tensor, "*shape"], approximate: Literal["none", "tanh"] = "none"
) -> Float[Tensor, "*shape"]:
    """``x`` times the probability that a standard normal variable is below ``x``.

    ``approximate="tanh"`` is GPT-2's formula. Source: Hendrycks and Gimpel (2016).
    """
    _check_choice("approximate", approximate, ("none", "tanh"))
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class GELU(nn.Module):
    """The Gaussian error linear unit as a module, by torch's kernel or by ours."""

    def __init__(self, approximate: Literal["none", "tanh"] = "none", backend: Backend = "torch"):
        super().__init__()
        _check_choice("approximate", approximate, ("none", "tanh"))
        _check_choice("backend", backend, ("reference", "torch"))
        self.approximate, self.backend = approximate, backend

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return ``x``, gated by itself."""
        function = gelu if self.backend == "reference" else F.gelu
        return function(x, approximate=self.approximate)


# %%
#| export
class SwiGLU(nn.Module):
    """Gate ``up`` with the SiLU of ``gate``, element by element; it has no parameters."""

    def forward(
        self, gate: Float[Tensor, "*shape d_ff"], up: Float[Tensor, "*shape d_ff"]
    ) -> Float[Tensor, "*shape d_ff"]:
        """Return ``silu(gate) * up``."""
        return F.silu(gate) * up


# %%
#| export
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
_GATES = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}
ACTIVATIONS = (*_ACTIVATIONS, *_GATES)


def _activate(activation: str, gate: Tensor | None, up: Tensor) -> Tensor:
    """The inner vector of a feed-forward network, from one linear map of its input, or two."""
    if gate is None:
        return _ACTIVATIONS[activation](up)
    return _ACTIVATIONS[_GATES[activation]](gate) * up


def default_d_ff(d_model: int, activation: str = "swiglu", multiple_of: int = 8) -> int:
    """Return the usual inner width: 4 d_model, or 8/3 d_model with a gate, rounded up.

    Both have the same number of parameters, 8 d_model squared, but for the rounding.

    >>> default_d_ff(768, "gelu"), default_d_ff(4096, "swiglu", multiple_of=256)
    (3072, 11008)
    """
    _check_at_least(d_model=(1, d_model), multiple_of=(1, multiple_of))
    _check_choice("activation", activation, ACTIVATIONS)
    width = 8 * d_model // 3 if activation in _GATES else 4 * d_model
    return -(-width // multiple_of) * multiple_of


# %%
#| export
class FeedForward(nn.Module):
    """Two matrices with an activation between, or three with a gate; each token by itself.

    ``activation`` is one of relu, gelu, gelu_tanh, silu, or with a gate reglu, geglu, swiglu
    (Shazeer, 2020). ``d_ff`` is `default_d_ff` unless given. Dropout acts on the inner vector.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        d_ff = default_d_ff(d_model, activation) if d_ff is None else d_ff
        _check_at_least(d_model=(1, d_model), d_ff=(1, d_ff))
        _check_choice("activation", activation, ACTIVATIONS)
        _check_probability("dropout", dropout)
        self.activation, self.dropout = activation, dropout
        gated = activation in _GATES
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias) if gated else None
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return what is to be added to ``x``."""
        gate = None if self.gate_proj is None else self.gate_proj(x)
        inner = _activate(self.activation, gate, self.up_proj(x))
        return self.down_proj(F.dropout(inner, self.dropout, self.training))


# %%
#| export
class Routing(NamedTuple):
    """Where the tokens of a batch go: probabilities, and weights and numbers of their experts."""

    probabilities: Float[Tensor, "tokens n_experts"]
    weights: Float[Tensor, "tokens n_active"]
    experts: Int64[Tensor, "tokens n_active"]
    capacity: int | None = None

    @property
    def load(self) -> Float[Tensor, " n_experts"]:
        """The share of tokens that chose each expert; the shares sum to ``n_active``."""
        counts = self.experts.flatten().bincount(minlength=self.probabilities.size(1))
        return counts / len(self.experts)

    @property
    def balance_loss(self) -> Float[Tensor, ""]:
        """``n_experts * sum(load * mean probability)``: ``n_active`` where all is balanced.

        Only the probabilities carry a gradient. Source: Fedus, Zoph and Shazeer (2022), eq. 4; for
        several active experts as transformers' ``load_balancing_loss_func``.
        """
        return self.load.numel() * (self.load * self.probabilities.mean(dim=0)).sum()

    @property
    def dropped(self) -> float:
        """The share of choices that found their expert full."""
        kept = sum(len(places) for places in self.places())
        return 1 - kept / max(self.experts.numel(), 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        # A tensor with a history cannot be copied, and a copied model has no use for it.
        return Routing(self.probabilities.detach(), self.weights.detach(), *self[2:])

    def places(self) -> list[Int64[Tensor, " places"]]:
        """Return for each expert its tokens, as places in ``experts.T.flatten()``.

        Place ``p`` is token ``p % tokens``. First choices come before second ones, earlier tokens
        before later ones, and what exceeds the capacity is left out.
        """
        chosen = self.experts.T.flatten()
        counts = chosen.bincount(minlength=self.probabilities.size(1)).tolist()
        return [p[: self.capacity] for p in chosen.argsort(stable=True).split(counts)]


# %%
#| export
def route(
    logits: Float[Tensor, "tokens n_experts"],
    n_active: int,
    *,
    normalize: bool = True,
    capacity: int | None = None,
) -> Routing:
    """Send each token to the ``n_active`` experts with the largest logits.

    Their weights are softmax probabilities over all experts, in float32; with ``normalize`` those
    of a token sum to one, as in Mixtral. An expert takes at most ``capacity`` tokens.
    """
    probabilities = logits.float().softmax(dim=-1)
    weights, experts = probabilities.topk(n_active, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(probabilities, weights, experts, capacity)


# %%
#| export
class Router(nn.Module):
    """Scores experts for each token by a linear map, and picks the best ``n_active``."""

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        n_active: int,
        normalize: bool = True,
        capacity_factor: float | None = None,
    ):
        super().__init__()
        _check_at_least(d_model=(1, d_model), n_experts=(1, n_experts), n_active=(1, n_active))
        if n_active > n_experts:
            raise ValueError(f"n_active: expected at most n_experts {n_experts}, got {n_active}")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor: expected None or above 0, got {capacity_factor!r}")
        self.n_active, self.normalize = n_active, normalize
        self.capacity_factor = capacity_factor
        self.weight = nn.Parameter(torch.randn(n_experts, d_model) / math.sqrt(d_model))

    def forward(self, tokens: Float[Tensor, "tokens d_model"]) -> Routing:
        """Return where each token goes; capacity counts while training only."""
        capacity = None
        if self.training and self.capacity_factor is not None:
            fair = len(tokens) * self.n_active / len(self.weight)
            capacity = math.ceil(self.capacity_factor * fair)
        logits = F.linear(tokens, self.weight)
        return route(logits, self.n_active, normalize=self.normalize, capacity=capacity)


# %%
#| export
class Experts(nn.Module):
    """Feed-forward networks of one shape, their matrices stacked: (expert, out, in)."""

    def __init__(self, d_model: int, d_ff: int, n_experts: int, activation: str = "swiglu"):
        super().__init__()
        _check_at_least(d_model=(1, d_model), d_ff=(1, d_ff), n_experts=(1, n_experts))
        _check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        gated = activation in _GATES
        inward, outward = (n_experts, d_ff, d_model), (n_experts, d_model, d_ff)
        self.gate_proj = nn.Parameter(torch.empty(inward)) if gated else None
        self.up_proj = nn.Parameter(torch.empty(inward))
        self.down_proj = nn.Parameter(torch.empty(outward))
        for matrices in self.parameters():
            nn.init.normal_(matrices, std=matrices.size(-1) ** -0.5)

    def forward(
        self, tokens: Float[Tensor, "tokens d_model"], routing: Routing
    ) -> Float[Tensor, "tokens d_model"]:
        """Return each token's weighted sum of experts: gather, compute, scatter."""
        output, weights = torch.zeros_like(tokens), routing.weights.T.flatten()
        stacks = (self.gate_proj, self.up_proj, self.down_proj)
        matrices = [[None] * len(self.up_proj) if s is None else s.unbind() for s in stacks]
        for places, gate, up, down in zip(routing.places(), *matrices, strict=True):
            if len(places):
                which = places % len(tokens)
                x = tokens[which]
                gated = None if gate is None else F.linear(x, gate)
                result = F.linear(_activate(self.activation, gated, F.linear(x, up)), down)
                result = result * weights[places, None]
                output.index_add_(0, which, result.to(output.dtype))
        return output


# %%
#| export
class MixtureOfExperts(nn.Module):
    """Many feed-forward networks, of which each token uses the ``n_active`` that a router picks.

    ``d_shared`` is the width of one more that all tokens use. With a ``capacity_factor``, while
    training, an expert drops what exceeds that many times its fair share of the batch. After a
    forward pass ``routing`` says where the tokens went, padding included.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        n_active: int,
        *,
        activation: str = "swiglu",
        d_shared: int = 0,
        capacity_factor: float | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        _check_at_least(d_shared=(0, d_shared))
        self.router = Router(d_model, n_experts, n_active, normalize, capacity_factor)
        self.experts = Experts(d_model, d_ff, n_experts, activation)
        self.shared = FeedForward(d_model, d_shared, activation=activation) if d_shared else None
        self.routing: Routing | None = None

    balance_loss = property(attrgetter("routing.balance_loss"))
    load = property(attrgetter("routing.load"))

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return what is to be added to ``x``."""
        tokens = x.reshape(-1, x.size(-1))
        self.routing = self.router(tokens)
        output = self.experts(tokens, self.routing)
        output = output if self.shared is None else output + self.shared(tokens)
        return output.view_as(x)


# %%
#| export
class TransformerBlock(nn.Module):
    """Attention and feed-forward network, each with its normalization and residual connection.

    ``norm_position="pre"`` computes ``x + f(norm(x))``, ``"post"`` the original ``norm(x + f(x))``.
    Dropout acts on what is added to the stream.
    """

    def __init__(
        self,
        d_model: int,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        norm: Callable[[int], nn.Module] = RMSNorm,
        norm_position: Literal["pre", "post"] = "pre",
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_choice("norm_position", norm_position, ("pre", "post"))
        _check_probability("dropout", dropout)
        self.norm_position, self.dropout = norm_position, dropout
        self.attention_norm, self.attention = norm(d_model), attention
        self.feed_forward_norm, self.feed_forward = norm(d_model), feed_forward

    def forward(
        self,
        x: Float[Tensor, "batch sequence d_model"],
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch sequence d_model"]:
        """Return the stream after this block; the options go to attention."""
        attend = partial(self.attention, rope=rope, mask=mask, cache=cache)
        if self.norm_position == "pre":
            x = x + self._dropped(attend(self.attention_norm(x)))
            return x + self._dropped(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self._dropped(attend(x)))
        return self.feed_forward_norm(x + self._dropped(self.feed_forward(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


# %%
#| export
_WRITERS = {"o_proj", "down_proj"}


@torch.no_grad()
def initialize_weights(
    module: nn.Module,
    n_layers: int,
    *,
    std: float | None = None,
    embedding_std: float | None = None,
) -> None:
    """Draw all weights of ``module`` anew, for a model of ``n_layers`` blocks.

    Matrices are normal with standard deviation ``std``, by default 1 / sqrt(fan-in). What writes
    to the residual stream (``o_proj``, ``down_proj``) is divided by sqrt(2 ``n_layers``), as in
    GPT-2 (Radford et al., 2019). Embeddings count as matrices, their last dimension as the fan-in,
    unless ``embedding_std`` is given. Gains become 1, biases 0.
    """
    _check_at_least(n_layers=(1, n_layers))
    embeddings = {id(m.weight) for m in module.modules() if _is_embedding(m)}
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scale = std if std is not None else parameter.size(-1) ** -0.5
        if id(parameter) in embeddings and embedding_std is not None:
            scale = embedding_std
        elif _WRITERS & set(name.split(".")):
            scale /= math.sqrt(2 * n_layers)
        nn.init.normal_(parameter, std=scale)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | LearnedEmbedding)
