# %% [markdown]
# # Loss and optimizers
#
# > What training makes small, and how it is made small: cross-entropy that stays finite and never
# > holds all logits, AdamW and Muon, schedules and clipping, equal to torch's step by step.
#
# | | |
# |---|---|
# | **You build** | {py:func}`~llmbook.optimization.cross_entropy` |
# | **You need** | the model ({doc}`11_model`) |
# | **It takes** | 90 minutes to read, 60 seconds to run |

# %% tags=["remove-cell"]
#| default_exp optimization

# %%
#| export
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from llmbook.attention import Backend
from llmbook.blocks import _check_choice, _check_probability, _embeddings
from llmbook.corpus import _check_at_least

# %% [markdown]
# ## Loss
# LSE


# %%
#| export
def log_sum_exp(logits: Float[Tensor, "*batch vocab_size"]) -> Float[Tensor, "*batch"]:
    """Return log(sum(exp(logits))) over the last dimension; finite wherever the logits are.

    Computed in float32 or wider, whatever the dtype of ``logits``.

    >>> log_sum_exp(torch.tensor([1000.0, 1000.0])) - 1000
    tensor(0.6931)
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = wide.detach().amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), 0.0)  # of nothing but -inf the answer is -inf, not NaN
    return (wide - peak).exp().sum(dim=-1).log() + peak.squeeze(-1)


# %% [markdown]
# checks

# %%
#| export
Reduction = Literal["mean", "sum", "none"]


def _check_amount(name: str, value: float, *, positive: bool = False) -> None:
    """Refuse what is negative, infinite or not a number, and zero if it must be ``positive``."""
    if not (0 < value < math.inf or (value == 0 and not positive)):
        expected = "a finite number above 0" if positive else "a finite number of at least 0"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_loss(targets: Tensor, vocab_size: int, ignore_index: int, **options: Any) -> None:
    _check_amount("z_loss", options["z_loss"])
    if options["soft_cap"] is not None:
        _check_amount("soft_cap", options["soft_cap"], positive=True)
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return  # to look at values would make the processor wait for the accelerator
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
    if len(wrong):
        expected = f"ids from 0 to {vocab_size - 1}, or {ignore_index}"
        raise ValueError(f"targets: expected {expected}, got {wrong[0]}")


# %% [markdown]
# reference


# %%
#| export
def _capped(
    logits: Float[Tensor, "*batch vocab_size"], soft_cap: float | None
) -> Float[Tensor, "*batch vocab_size"]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if soft_cap is None else soft_cap * torch.tanh(wide / soft_cap)


def _losses(
    logits: Float[Tensor, "*batch vocab_size"], targets: Int64[Tensor, "*batch"], z_loss: float
) -> Float[Tensor, "*batch"]:
    """The equations of chapter 12, term by term."""
    log_z = log_sum_exp(logits)
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    return log_z - chosen + z_loss * log_z**2


def _fused_losses(
    logits: Float[Tensor, "*batch vocab_size"], targets: Int64[Tensor, "*batch"], z_loss: float
) -> Float[Tensor, "*batch"]:
    """The same by torch's own functions."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    losses = flat.view(targets.shape)
    return losses + z_loss * logits.logsumexp(dim=-1) ** 2 if z_loss else losses


# %% [markdown]
# exported


# %%
#| export
def cross_entropy(
    logits: Float[Tensor, "*batch vocab_size"],
    targets: Int64[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    backend: Backend = "torch",
) -> Float[Tensor, "*shape"]:
    """Return the loss of predicting ``targets``, in nats, in float32 or wider.

    Targets of ``ignore_index`` do not count; the mean over none is NaN. ``soft_cap`` bounds logits
    to cap tanh(logits / cap) (Gemma 2). ``z_loss`` times the square of their log-sum-exp is added
    for each target (PaLM, section 5). Targets out of range raise a ``ValueError``; on an
    accelerator, where a look would wait for the device, its kernel stops the program.
    """
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    _check_choice("backend", backend, ("reference", "torch"))
    _check_loss(targets, logits.size(-1), ignore_index, z_loss=z_loss, soft_cap=soft_cap)
    counts = targets != ignore_index
    losses_of = _losses if backend == "reference" else _fused_losses
    losses = losses_of(_capped(logits, soft_cap), targets.masked_fill(~counts, 0), z_loss)
    losses = losses.masked_fill(~counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


# %% [markdown]
# ## Chunked


# %%
#| export
def _capped_in_place(logits: Tensor, soft_cap: float | None) -> Tensor | None:
    """Bound ``logits``, and return the derivative of doing so, if there is a bound."""
    if soft_cap is None:
        return None
    logits.div_(soft_cap).tanh_()
    slope = 1 - logits**2
    logits.mul_(soft_cap)
    return slope


def _chunk(
    logits: Float[Tensor, "rows vocab_size"],
    targets: Int64[Tensor, "rows 1"],
    counts: Bool[Tensor, "rows 1"],
    z_loss: float,
    soft_cap: float | None,
) -> Float[Tensor, ""]:
    """Return the summed loss of some rows, and turn ``logits`` into its gradient, in place."""
    slope = _capped_in_place(logits, soft_cap)
    chosen = logits.gather(1, targets)
    peak = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
    log_z = total.log() + peak
    losses = log_z - chosen + z_loss * log_z**2
    # The gradient of a row is (1 + 2 z log Z) p - y, or nothing where the target does not count.
    logits.mul_(((1 + 2 * z_loss * log_z) / total).masked_fill_(~counts, 0.0))
    logits.scatter_add_(1, targets, -counts.to(logits.dtype))
    if slope is not None:
        logits.mul_(slope)
    return losses.masked_fill_(~counts, 0.0).sum()


# %% [markdown]
# loop


# %%
#| export
class _ChunkedLoss(torch.autograd.Function):
    """The summed loss; both gradients are made on the way, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens d_model"],
        weight: Float[Tensor, "vocab_size d_model"],
        targets: Int64[Tensor, "tokens 1"],
        counts: Bool[Tensor, "tokens 1"],
        options: tuple[int, float, float | None],
    ) -> Float[Tensor, ""]:
        chunk_size, *settings = options
        wide = torch.promote_types(hidden.dtype, torch.float32)
        to_hidden, to_weight, *_ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for at in range(0, len(hidden), chunk_size):
            rows = slice(at, at + chunk_size)
            logits = (hidden[rows] @ weight.T).to(wide)
            total += _chunk(logits, targets[rows], counts[rows], *settings)
            _add_gradients(logits, hidden, weight, rows, d_hidden, d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scaled = [None if d is None else d * d_total.to(d.dtype) for d in (d_hidden, d_weight)]
        return (*scaled, None, None, None)


# %% [markdown]
# gradients


# %%
#| export
def _add_gradients(
    d_logits: Float[Tensor, "rows vocab_size"],
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    rows: slice,
    d_hidden: Float[Tensor, "tokens d_model"] | None,
    d_weight: Float[Tensor, "vocab_size d_model"] | None,
) -> None:
    narrow = d_logits.to(hidden.dtype)
    if d_hidden is not None:
        torch.mm(narrow, weight, out=d_hidden[rows])
    if d_weight is None:
        return
    if d_weight.dtype == narrow.dtype:
        d_weight.addmm_(narrow.T, hidden[rows])
    else:  # a sum over many chunks, so it is kept in 32 bits
        d_weight.add_(narrow.T @ hidden[rows])


# %% [markdown]
# wrapper


# %%
#| export
def chunked_cross_entropy(
    hidden: Float[Tensor, "*batch d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    targets: Int64[Tensor, "*batch"],
    *,
    chunk_size: int = 512,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> Float[Tensor, ""]:
    """Return ``cross_entropy(hidden @ weight.T, targets)`` without ever holding all logits.

    There are never more than ``chunk_size`` rows of them. Gradients for ``hidden`` and ``weight``
    are made in the forward pass, so logits are computed once; there is no second derivative.
    Under autocast the products are in its dtype, the softmax in float32 all the same.
    """
    _check_at_least(chunk_size=(1, chunk_size))
    _check_choice("reduction", reduction, ("mean", "sum"))
    _check_loss(targets, len(weight), ignore_index, z_loss=z_loss, soft_cap=soft_cap)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    counts = (targets != ignore_index).view(-1, 1)
    column = targets.reshape(-1, 1).masked_fill(~counts, 0)
    options = (chunk_size, z_loss, soft_cap)
    with torch.autocast(device, enabled=False):
        total = _ChunkedLoss.apply(hidden.flatten(0, -2), weight, column, counts, options)
    return total / counts.sum() if reduction == "mean" else total


# %% [markdown]
# ## Optimizers


# %%
#| export
class _Stepper(torch.optim.Optimizer):
    """What our optimizers share: settings that are checked, and a step over the groups."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings, or the optimizer's defaults, are checked."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change all parameters that have a gradient; return what ``closure`` gave, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(group, parameters, [p.grad for p in parameters])
        return loss

    def _buffers(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """Return what is kept for each parameter under ``name``, zeros at first."""
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if state.get(name) is None:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [state[name] for state in states]

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, this class's or the class's of the same name in torch."""
        for group in state_dict["param_groups"]:
            self._check({**self.defaults, **group})
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # torch keeps it elsewhere, unless it is fused
                state["step"] = state["step"].to(parameter.device, torch.float32)


# %% [markdown]
# SGD


# %%
#| export
def _is_fusable(tensor: Tensor) -> bool:
    """Whether torch has kernels that do a whole step at once for tensors like this one."""
    return tensor.device.type in ("cpu", "cuda") and tensor.is_floating_point()


class SGD(_Stepper):
    """Stochastic gradient descent with momentum; state dicts are those of ``torch.optim.SGD``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        backend: Backend = "torch",
    ):
        _check_choice("backend", backend, ("reference", "torch"))
        self.backend = backend
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "nesterov": nesterov})

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            _check_amount(name, group[name])
        _check_probability("momentum", group["momentum"])
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov: expected a momentum above 0 with it, got momentum 0")
        _refuse(group, maximize=False, dampening=0)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        velocities = self._buffers(parameters, "momentum_buffer") if group["momentum"] else None
        if self.backend == "reference":
            _sgd_step(group, parameters, grads, velocities)
        else:
            _fused_sgd_step(group, parameters, grads, velocities)


# %% [markdown]
# step


# %%
#| export
def _refuse(group: dict[str, Any], **expected: Any) -> None:
    """Refuse settings of torch's optimizers that ours do not have, as a state dict may hold them."""
    for name, value in expected.items():
        if group.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, got {group[name]!r}")


def _sgd_step(group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor],
              velocities: list[Tensor] | None) -> None:  # fmt: skip
    momentum = group["momentum"]
    for number, (p, g) in enumerate(zip(parameters, grads, strict=True)):
        update = g + group["weight_decay"] * p
        if velocities is not None:
            v = velocities[number].mul_(momentum).add_(update)
            update = update + momentum * v if group["nesterov"] else v
        p.sub_(group["lr"] * update)


def _fused_sgd_step(group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor],
                    velocities: list[Tensor] | None) -> None:  # fmt: skip
    names = ("lr", "momentum", "weight_decay", "nesterov")
    sgd(
        parameters, grads, [None] * len(grads) if velocities is None else velocities,
        fused=_is_fusable(parameters[0]), dampening=0, maximize=False,
        **{name: group[name] for name in names},
    )  # fmt: skip


# %% [markdown]
# adamw


# %%
#| export
class AdamW(_Stepper):
    """Adam with decoupled weight decay; state dicts are those of ``torch.optim.AdamW``.

    Sources: Kingma & Ba (2015), algorithm 1; Loshchilov & Hutter (2019), algorithm 2, with the
    rate times the decay as in torch. Settings out of range raise a ``ValueError``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        backend: Backend = "torch",
    ):
        _check_choice("backend", backend, ("reference", "torch"))
        self.backend = backend
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            _check_amount(name, group[name])
        for number, beta in enumerate(group["betas"]):
            _check_probability(f"betas[{number}]", beta)
        decoupled = {"decoupled_weight_decay": True} if group["weight_decay"] else {}
        _refuse(group, amsgrad=False, maximize=False, **decoupled)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        means, squares = (self._buffers(parameters, n) for n in ("exp_avg", "exp_avg_sq"))
        tensors = (parameters, grads, means, squares, self._steps(parameters))
        (_adamw_step if self.backend == "reference" else _fused_adamw_step)(group, *tensors)

    def _steps(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return for each parameter how many steps it has taken, as a tensor beside it."""
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), device=parameter.device)
        return [state["step"] for state in states]


# %% [markdown]
# step


# %%
#| export
def _adamw_step(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    for p, g, m, v, t in zip(parameters, grads, means, squares, steps, strict=True):
        t += 1
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g**2)
        unbiased_m = m / (1 - beta1 ** t.item())
        unbiased_v = v / (1 - beta2 ** t.item())
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * unbiased_m / (unbiased_v.sqrt() + group["eps"]))


def _fused_adamw_step(group: dict[str, Any], *tensors: list[Tensor]) -> None:
    parameters, grads, means, squares, steps = tensors
    adamw(
        parameters, grads, means, squares, [], steps,
        fused=_is_fusable(parameters[0]), amsgrad=False, maximize=False,
        lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
        weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


# %% [markdown]
# ## Muon

# %%
#| export
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrix: Float[Tensor, "*batch rows columns"],
    steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = _COEFFICIENTS,
    eps: float = 1e-7,
) -> Float[Tensor, "*batch rows columns"]:
    """Push the singular values of each matrix toward 1 and keep its singular vectors.

    With the default coefficients those above about 0.01 of the norm end between 0.7 and 1.2 after
    five steps. Computed in the dtype of ``matrix``. Source: Jordan et al. (2024), Newton-Schulz.
    """
    _check_at_least(steps=(0, steps))
    a, b, c = coefficients
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix  # so that x x^T is the smaller of the two products
    x = x.reshape(-1, *x.shape[-2:])
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b G + c G G) x, for G = x x^T
    x = x.view(matrix.mT.shape if tall else matrix.shape)
    return x.mT if tall else x


# %% [markdown]
# muon


# %%
#| export
class Muon(_Stepper):
    """Momentum, orthogonalized: for matrices, (out, in) or stacked as (expert, out, in).

    State dicts are those of ``torch.optim.Muon``, and ``adjust_lr_fn`` is its: None scales the rate
    by sqrt(max(1, out / in)), "match_rms_adamw" by 0.2 sqrt(max(out, in)), so that a rate that
    suits AdamW will do. ``ns_dtype`` is what matrices are orthogonalized in; None is bfloat16 on
    accelerators and float32 elsewhere. Sources: Jordan et al. (2024), Liu et al. (2025).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
    ):
        self.ns_dtype = ns_dtype
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        settings |= {"nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps}
        super().__init__(params, {**settings, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn})

    def _check(self, group: dict[str, Any]) -> None:
        _check_muon(group)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        momenta = self._buffers(parameters, "momentum_buffer")
        _muon_step(group, parameters, grads, momenta, self.ns_dtype)


# %% [markdown]
# muon's step


# %%
#| export
def _check_muon(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "eps"):
        _check_amount(name, group[name])
    _check_probability("momentum", group["momentum"])
    _check_at_least(ns_steps=(0, group["ns_steps"]))
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        expected = "None, original or match_rms_adamw"
        raise ValueError(f"adjust_lr_fn: expected {expected}, got {group['adjust_lr_fn']!r}")
    for parameter in group["params"]:
        if isinstance(parameter, Tensor) and parameter.ndim not in (2, 3):
            shape = tuple(parameter.shape)
            raise ValueError(f"params: expected matrices, or stacks of them, got shape {shape}")


def _scale_of_rate(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    rows, columns = shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


# %% [markdown]
# step


# %%
#| export
def _orthogonalized(
    updates: list[Tensor], group: dict[str, Any], dtype: torch.dtype | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield each update's number and what Newton-Schulz makes of it; equal shapes go together."""
    batches: dict[tuple[int, ...], list[int]] = {}
    for number, update in enumerate(updates):
        batches.setdefault(tuple(update.shape), []).append(number)
    for numbers in batches.values():
        stacked = torch.stack([updates[number] for number in numbers])
        stacked = stacked.to(dtype or _fast_dtype(stacked.device))
        settings = {"coefficients": group["ns_coefficients"], "eps": group["eps"]}
        yield from zip(numbers, orthogonalize(stacked, group["ns_steps"], **settings), strict=True)


def _fast_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# %% [markdown]
# step


# %%
#| export
def _muon_step(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    dtype: torch.dtype | None,
) -> None:
    lr, momentum = group["lr"], group["momentum"]
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    nesterov = group["nesterov"]
    updates = list(torch._foreach_lerp(grads, momenta, momentum)) if nesterov else momenta
    torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    for number, update in _orthogonalized(updates, group, dtype):
        p = parameters[number]
        p.add_(update, alpha=-lr * _scale_of_rate(p.shape, group["adjust_lr_fn"]))


# %% [markdown]
# ## groups


# %%
#| export
def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is to be trained, by name; a parameter under two names once."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    return found


def _decayed_and_not(
    parameters: Iterable[nn.Parameter], embeddings: set[int], weight_decay: float
) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for parameter in parameters:
        is_decayed = parameter.ndim >= 2 and id(parameter) not in embeddings
        groups[weight_decay if is_decayed else 0.0].append(parameter)
    return [{"params": some, "weight_decay": decay} for decay, some in groups.items() if some]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: ``weight_decay`` for matrices, none for the others.

    Not decayed are vectors (gains, biases) and tables that are looked up, tied ones too. Each
    parameter is there once; frozen ones are left out. A ``ValueError`` if all are frozen.
    """
    _check_amount("weight_decay", weight_decay)
    return _decayed_and_not(_trainable(model).values(), _embeddings(model), weight_decay)


# %% [markdown]
# optimizers


# %%
#| export
class Optimizers(torch.optim.Optimizer):
    """Several optimizers as one; ``param_groups`` are all of theirs, so schedules fit it, too."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for o in optimizers for group in o.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each take a step; return what ``closure`` gave, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state dicts of all, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each its state dict; a ``ValueError`` if there are more or fewer."""
        states = state_dict.get("optimizers", ())
        if len(states) != len(self.optimizers):
            expected = f"{len(self.optimizers)} optimizers"
            raise ValueError(f"state_dict: expected {expected}, got {len(states)}")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [g for optimizer in self.optimizers for g in optimizer.param_groups]


# %% [markdown]
# matrices


# %%
#| export
def _matrices_of_blocks(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what Muon is for, and the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in _trainable(model).items():
        in_block = "blocks" in name.split(".") and parameter.ndim in (2, 3)
        (matrices if in_block else rest).append(parameter)
    if not matrices:
        raise ValueError("model: expected blocks with matrices, which Muon is for, got none")
    return matrices, rest


# %% [markdown]
# build


# %%
#| export
def build_optimizer(
    model: nn.Module,
    name: Literal["adamw", "muon", "sgd"],
    lr: float,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float | None = None,
    adamw_lr: float | None = None,
    backend: Backend = "torch",
) -> torch.optim.Optimizer:
    """Return an optimizer for all parameters of ``model`` that are to be trained.

    "muon" is Muon for the matrices of ``model.blocks`` and AdamW, at ``adamw_lr`` or ``lr``, for
    the rest; Muon's rate is scaled so that both may be equal. ``momentum`` is by default 0.95 for
    "muon" and 0.9 for "sgd". Decay is that of ``parameter_groups``.
    """
    _check_choice("name", name, ("adamw", "muon", "sgd"))
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return AdamW(groups, lr, betas, weight_decay=weight_decay, backend=backend)
    if name == "sgd":
        momentum = 0.9 if momentum is None else momentum
        return SGD(groups, lr, momentum, weight_decay, backend=backend)
    matrices, rest = _matrices_of_blocks(model)
    others = _decayed_and_not(rest, _embeddings(model), weight_decay)
    momentum = 0.95 if momentum is None else momentum
    second_lr = lr if adamw_lr is None else adamw_lr
    return Optimizers(
        Muon(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, second_lr, betas, weight_decay=weight_decay, backend=backend),
    )


# %% [markdown]
# ## Schedules

# %%
#| export
Schedule = Callable[[int], float]


def _check_schedule(n_steps: int, warmup: int, final: float, decay: int = 0) -> None:
    _check_at_least(n_steps=(1, n_steps), warmup=(0, warmup), decay=(0, decay))
    if warmup + decay > n_steps:
        expected = f"warmup and decay within n_steps = {n_steps}"
        raise ValueError(f"warmup: expected {expected}, got {warmup} and {decay}")
    if not 0 <= final <= 1:
        raise ValueError(f"final: expected a share from 0 to 1, got {final!r}")


def _warmed_up(step: int, warmup: int, then: Schedule) -> float:
    """Rise linearly: the first of ``warmup`` steps is not 0, and the first after them is 1."""
    return (step + 1) / (warmup + 1) if step < warmup else then(step)


def constant_schedule(*, warmup: int = 0) -> Schedule:
    """Return the factor 1, after a linear rise in ``warmup`` steps."""
    _check_at_least(warmup=(0, warmup))
    return lambda step: _warmed_up(step, warmup, lambda _: 1.0)


# %% [markdown]
# shapes

# %%
#| export
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


def wsd_schedule(
    n_steps: int,
    *,
    warmup: int = 0,
    decay: int | None = None,
    final: float = 0.0,
    shape: str = "linear",
) -> Schedule:
    """Return warmup, stable, decay: the factor of the peak rate at a step, counted from 0.

    The last ``decay`` steps, a fifth unless given, fall from 1 to ``final``, which would be reached
    at step ``n_steps`` and stays: no step within them is wasted. ``shape`` is linear, cosine or
    sqrt, for 1 - sqrt(progress). Sources: Hu et al. (2024); Hägele et al. (2024) for the shapes.
    """
    _check_choice("shape", shape, tuple(_SHAPES))
    decay = min(n_steps // 5, n_steps - warmup) if decay is None else decay
    _check_schedule(n_steps, warmup, final, decay)

    def after_warmup(step: int) -> float:
        progress = min(max(0.0, (step - (n_steps - decay)) / decay), 1.0) if decay else 0.0
        return final + (1 - final) * _SHAPES[shape](progress)

    return lambda step: _warmed_up(step, warmup, after_warmup)


# %% [markdown]
# others


# %%
#| export
def cosine_schedule(n_steps: int, *, warmup: int = 0, final: float = 0.1) -> Schedule:
    """Return a linear warmup, then half a cosine from 1 to ``final`` at step ``n_steps``, then flat.

    >>> [round(cosine_schedule(4, final=0.0)(step), 2) for step in range(6)]
    [1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """
    _check_schedule(n_steps, warmup, final)
    decay = n_steps - warmup
    return wsd_schedule(n_steps, warmup=warmup, decay=decay, final=final, shape="cosine")


def linear_schedule(n_steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Return a linear warmup, then a linear fall from 1 to ``final`` at step ``n_steps``, then flat."""
    _check_schedule(n_steps, warmup, final)
    decay = n_steps - warmup
    return wsd_schedule(n_steps, warmup=warmup, decay=decay, final=final, shape="linear")


# %% [markdown]
# clip


# %%
#| export
def _by_kind(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors by device and dtype, as torch's functions on lists are fast on equal ones."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    yield from kinds.values()


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients, in place, so that their joint norm is at most ``max_norm``.

    Returns the norm before. If it is not finite the gradients stay as they are, so look at it
    before a step; ``max_norm`` may be infinite, to measure only. Computed in float32 or wider.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, got {max_norm!r}")
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    kinds = list(_by_kind(p.grad for p in given if p.grad is not None))
    if not kinds:
        return torch.zeros(())
    norm = _global_norm(kinds)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scale = scale.masked_fill(~norm.isfinite(), 1.0)
    if scale.device.type != "cpu" or scale < 1:  # elsewhere to look would be to wait
        for grads in kinds:
            torch._foreach_mul_(grads, scale.to(grads[0].device))
    return norm


def _global_norm(kinds: list[list[Tensor]]) -> Float[Tensor, ""]:
    norms: list[Tensor] = []
    for grads in kinds:
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norms += torch._foreach_norm(grads, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
