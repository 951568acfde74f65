# %% [markdown]
# Wrong answers to the exercises of chapter 12, and what the checks must say of them.


# %% exercise="ex-optimization-smoothing" says="a probability overflows, or becomes 0"
# By way of the softmax, which makes zeros of what is unlikely
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    y = (1 - epsilon) * F.one_hot(targets, logits.size(-1)) + epsilon / logits.size(-1)
    return -(y * logits.softmax(-1).log()).sum(-1).mean()


# %% exercise="ex-optimization-smoothing" says="it is no mean"
# The sum over tokens
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    losses = log_sum_exp(logits) - (1 - epsilon) * chosen - epsilon * logits.mean(dim=-1)
    return losses.sum()


# %% exercise="ex-optimization-smoothing" says="with y' as in the text"
# Epsilon is shared among the other tokens only
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    others = (logits.sum(dim=-1) - chosen) / (logits.size(-1) - 1)
    return (log_sum_exp(logits) - (1 - epsilon) * chosen - epsilon * others).mean()


# %% exercise="ex-optimization-smoothing" says="a constant added to all logits"
# The log-sum-exp belongs to the first term only
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    losses = (1 - epsilon) * (log_sum_exp(logits) - chosen) - epsilon * logits.mean(dim=-1)
    return losses.mean()


# %% exercise="ex-optimization-smoothing" says="a constant added to all logits"
# The sum of all logits, not their mean
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    losses = log_sum_exp(logits) - (1 - epsilon) * chosen - epsilon * logits.sum(dim=-1)
    return losses.mean()


# %% exercise="ex-optimization-smoothing" says="with y' as in the text"
# The plain loss, a little smaller
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    return (1 - epsilon) * (log_sum_exp(logits) - chosen).mean()


# %% exercise="ex-optimization-smoothing" says="without smoothing it is no cross-entropy"
# Epsilon and 1 - epsilon are exchanged
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    losses = log_sum_exp(logits) - epsilon * chosen - (1 - epsilon) * logits.mean(dim=-1)
    return losses.mean()


# %% exercise="ex-optimization-memory" says="is left after"
# The sum of all weights, 1 / (1 - beta), is another measure
def half_life(beta: float) -> float:
    return 1 / (1 - beta)


# %% exercise="ex-optimization-memory" says="is left after"
# Whole steps only
def half_life(beta: float) -> float:
    return math.ceil(math.log(0.5) / math.log(beta))


# %% exercise="ex-optimization-memory" says="is left after"
# The logarithms the wrong way around
def half_life(beta: float) -> float:
    return math.log(beta) / math.log(0.5)


# %% exercise="ex-optimization-memory" says="tokens in batches of"
# Tokens and tokens of a batch exchanged
def beta_for(tokens: float, batch_tokens: float) -> float:
    return 0.5 ** (tokens / batch_tokens)


# %% exercise="ex-optimization-memory" says="tokens in batches of"
# After so many tokens 1/e is left, and not half
def beta_for(tokens: float, batch_tokens: float) -> float:
    return math.exp(-batch_tokens / tokens)


# %% exercise="ex-optimization-memory" says="is no share"
# Linear, as if no power were taken
def beta_for(tokens: float, batch_tokens: float) -> float:
    return 1 - batch_tokens / tokens


# %% exercise="ex-optimization-memory" says="tokens in batches of"
# Whole steps only
def beta_for(tokens: float, batch_tokens: float) -> float:
    return 0.5 ** (1 / max(1, tokens // batch_tokens))


# %% exercise="ex-optimization-coefficients" says="needs no step"
# At least one step, always
def steps_needed(coefficients: tuple[float, float, float], strength: float, low: float) -> int:
    (a, b, c), steps = coefficients, 0
    while True:
        strength = a * strength + b * strength**3 + c * strength**5
        steps += 1
        if strength >= low:
            return steps


# %% exercise="ex-optimization-coefficients" says="needs no step"
# At least is taken for more than
def steps_needed(coefficients: tuple[float, float, float], strength: float, low: float) -> int:
    (a, b, c), steps = coefficients, 0
    while strength <= low:
        strength = a * strength + b * strength**3 + c * strength**5
        steps += 1
    return steps


# %% exercise="ex-optimization-coefficients" says="do not reach it"
# Five, as Muon takes
def steps_needed(coefficients: tuple[float, float, float], strength: float, low: float) -> int:
    return 0 if strength >= low else 5


# %% exercise="ex-optimization-coefficients" says="do not reach it"
# As if each step multiplied by the first coefficient
def steps_needed(coefficients: tuple[float, float, float], strength: float, low: float) -> int:
    if strength >= low:
        return 0
    return math.ceil(math.log(low / strength) / math.log(coefficients[0]))


# %% exercise="ex-optimization-coefficients" says="but fewer reach it already"
# One too many
def steps_needed(coefficients: tuple[float, float, float], strength: float, low: float) -> int:
    if strength >= low:
        return 0
    (a, b, c), steps = coefficients, 1
    while strength < low:
        strength = a * strength + b * strength**3 + c * strength**5
        steps += 1
    return steps


# %% exercise="ex-optimization-coefficients" says="do not reach it"
# The polynomial of all powers, without its even ones left out
def steps_needed(coefficients: tuple[float, float, float], strength: float, low: float) -> int:
    (a, b, c), steps = coefficients, 0
    while strength < low and steps < 1000:
        strength = a * strength + abs(b) * strength**2 + c * strength**3
        steps += 1
    return steps


# %% exercise="ex-optimization-kept" says="none was left out"
# All rows go in
def loss_of_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden, weight, targets)


# %% exercise="ex-optimization-kept" says="none was left out"
# Rows that do not count are set to zero, and go in all the same
def loss_of_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden * (targets != -100)[..., None], weight, targets)


# %% exercise="ex-optimization-kept" says="the loss is"
# The mean over all rows
def loss_of_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    kept = targets != -100
    total = chunked_cross_entropy(hidden[kept], weight, targets[kept], reduction="sum")
    return total / targets.numel()


# %% exercise="ex-optimization-kept" says="the loss is"
# The id 0 is lost
def loss_of_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    kept = targets > 0
    return chunked_cross_entropy(hidden[kept], weight, targets[kept])


# %% exercise="ex-optimization-kept" says="is NaN, not"
# A loss of zero where nothing counts
def loss_of_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    kept = targets != -100
    if not kept.any():
        return torch.zeros(())
    return chunked_cross_entropy(hidden[kept], weight, targets[kept])


# %% exercise="ex-optimization-kept" says="hidden gets no gradient"
# Rows are taken out of the graph
def loss_of_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    kept = targets != -100
    return chunked_cross_entropy(hidden.detach()[kept], weight, targets[kept])


# %% exercise="ex-optimization-lion" says="the sign is that of the old mean"
# The mean first, then the step
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    grad = parameter.grad
    mean.mul_(betas[1]).add_((1 - betas[1]) * grad)
    update = torch.sign(betas[0] * mean + (1 - betas[0]) * grad)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * update)


# %% exercise="ex-optimization-lion" says="by the second beta"
# One beta for both
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    mean.mul_(betas[0]).add_((1 - betas[0]) * parameter.grad)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * torch.sign(mean))


# %% exercise="ex-optimization-lion" says="the sign is that of the old mean and the first beta"
# The second beta for both
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    mean.mul_(betas[1]).add_((1 - betas[1]) * parameter.grad)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * torch.sign(mean))


# %% exercise="ex-optimization-lion" says="decay is lr times weight_decay"
# Decay as part of the gradient
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    grad = parameter.grad + weight_decay * parameter
    parameter.sub_(lr * torch.sign(betas[0] * mean + (1 - betas[0]) * grad))
    mean.mul_(betas[1]).add_((1 - betas[1]) * grad)


# %% exercise="ex-optimization-lion" says="decay is lr times weight_decay"
# Decay without the rate
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    grad = parameter.grad
    update = torch.sign(betas[0] * mean + (1 - betas[0]) * grad)
    parameter.mul_(1 - weight_decay).sub_(lr * update)
    mean.mul_(betas[1]).add_((1 - betas[1]) * grad)


# %% exercise="ex-optimization-lion" says="decay is lr times weight_decay"
# No sign of zero: up or down
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    grad = parameter.grad
    update = torch.where(betas[0] * mean + (1 - betas[0]) * grad > 0, 1.0, -1.0)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * update)
    mean.mul_(betas[1]).add_((1 - betas[1]) * grad)


# %% exercise="ex-optimization-lion" says="kept in place"
# The mean is a new tensor, which is lost
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    grad = parameter.grad
    update = torch.sign(betas[0] * mean + (1 - betas[0]) * grad)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * update)
    mean = betas[1] * mean + (1 - betas[1]) * grad


# %% exercise="ex-optimization-lion" says="not to be followed by autograd"
# The decorator is forgotten
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    grad = parameter.grad
    update = torch.sign(betas[0] * mean + (1 - betas[0]) * grad)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * update)
    mean.mul_(betas[1]).add_((1 - betas[1]) * grad)


# %% exercise="ex-optimization-lion" says="the gradient has been changed"
# The gradient is scaled in place
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    grad = parameter.grad
    update = torch.sign(betas[0] * mean + (1 - betas[0]) * grad)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * update)
    mean.mul_(betas[1]).add_(grad.mul_(1 - betas[1]))
