# %% [markdown]
# Wrong answers to the exercises of chapter 21, and what the checks must say of them.


# %% exercise="ex-rlhf-zero" says="the scores of a prompt do not add up to 0"
# The mean of all rows instead of that of the prompt's
def centered(scores: Tensor, prompts: Tensor) -> Tensor:
    return scores - scores.mean()


# %% exercise="ex-rlhf-zero" says="the scores of a prompt do not add up to 0"
# Neighbors taken for the responses to the same prompt
def centered(scores: Tensor, prompts: Tensor) -> Tensor:
    groups = scores.view(-1, 2)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


# %% exercise="ex-rlhf-zero" says="got"
# The mean of the others: of the right sign, and twice as large
def centered(scores: Tensor, prompts: Tensor) -> Tensor:
    same = (prompts[:, None] == prompts[None, :]).to(scores)
    others = same - torch.eye(len(scores))
    return scores - others @ scores / others.sum(dim=1)


# %% exercise="ex-rlhf-margin" says="a difference of 0.5 is even"
# The grade itself as the margin
def graded_loss(chosen: Tensor, rejected: Tensor, grades: Tensor) -> Tensor:
    return -nn.functional.logsigmoid(chosen - rejected - grades).mean()


# %% exercise="ex-rlhf-margin" says="a difference of 0.5 is even"
# The margin added to the difference
def graded_loss(chosen: Tensor, rejected: Tensor, grades: Tensor) -> Tensor:
    return -nn.functional.logsigmoid(chosen - rejected + 0.5 * grades).mean()


# %% exercise="ex-rlhf-margin" says="it overflows"
# The logarithm of a probability that has become zero
def graded_loss(chosen: Tensor, rejected: Tensor, grades: Tensor) -> Tensor:
    return -torch.log(torch.sigmoid(chosen - rejected - 0.5 * grades)).mean()


# %% exercise="ex-rlhf-margin" says="the mean over pairs"
# The sum over the pairs
def graded_loss(chosen: Tensor, rejected: Tensor, grades: Tensor) -> Tensor:
    return -nn.functional.logsigmoid(chosen - rejected - 0.5 * grades).sum()


# %% exercise="ex-rlhf-distance" says="just below the bound of 5 samples"
# The nearest one, which may be beyond
def samples_for(nats: float) -> int:
    return min(range(1, 20_000), key=lambda n: abs(best_of_n_kl(n) - nats))


# %% exercise="ex-rlhf-distance" says="at the bound of 4 samples"
# The logarithm of n alone
def samples_for(nats: float) -> int:
    return math.floor(math.exp(nats) + 1e-6)


# %% exercise="ex-rlhf-distance" says="of 12 nats"
# A search that gives up
def samples_for(nats: float) -> int:
    n = 1
    while n < 10_000 and best_of_n_kl(n + 1) <= nats:
        n += 1
    return n


# %% exercise="ex-rlhf-returns" says="what is masked has leaked in"
# NaN times 0 is NaN
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    kept = rewards * mask
    found, running = torch.zeros_like(kept), torch.zeros_like(kept[:, 0])
    for t in reversed(range(mask.size(1))):
        running = (kept[:, t] + gamma * running) * mask[:, t]
        found[:, t] = running
    return found


# %% exercise="ex-rlhf-returns" says="masked places are 0"
# The sum goes on before the response begins
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    kept = torch.where(mask, rewards, 0.0)
    found, running = torch.zeros_like(kept), torch.zeros_like(kept[:, 0])
    for t in reversed(range(mask.size(1))):
        running = kept[:, t] + gamma * running
        found[:, t] = running
    return found


# %% exercise="ex-rlhf-returns" says="expected 1"
# All later rewards, without a discount
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    kept = torch.where(mask, rewards, 0.0)
    return torch.where(mask, kept.flip(1).cumsum(1).flip(1), 0.0)


# %% exercise="ex-rlhf-returns" says="the last token has its own reward"
# The later rewards without the own one
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    kept = torch.where(mask, rewards, 0.0)
    found, running = torch.zeros_like(kept), torch.zeros_like(kept[:, 0])
    for t in reversed(range(mask.size(1))):
        found[:, t] = torch.where(mask[:, t], gamma * running, 0.0)
        running = torch.where(mask[:, t], kept[:, t] + gamma * running, 0.0)
    return found
