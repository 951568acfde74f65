# %% [markdown]
# Wrong answers to the exercises of chapter 23, and what the checks must say of them.


# %% exercise="ex-grpo-idle" says="the same in half of all cases"
# Only the wrong replies
def idle(share, samples):
    return (1 - share) ** samples


# %% exercise="ex-grpo-idle" says="the same in half of all cases"
# Both at once
def idle(share, samples):
    return share**samples * (1 - share) ** samples


# %% exercise="ex-grpo-idle" says="of drawn groups"
# A group of two, whatever its size
def idle(share, samples):
    return share**2 + (1 - share) ** 2


# %% exercise="ex-grpo-room" says="it takes 25 rollouts"
# Growth by steps of the same size
def rollouts_needed(start, goal, high):
    return math.ceil((goal - start) / high)


# %% exercise="ex-grpo-room" says="it takes 25 rollouts"
# Rounded down
def rollouts_needed(start, goal, high):
    return int(math.log(goal / start) / math.log1p(high))


# %% exercise="ex-grpo-room" says="it takes 25 rollouts"
# The first order of the logarithm
def rollouts_needed(start, goal, high):
    return math.ceil(math.log(goal / start) / high)


# %% exercise="ex-grpo-divisor" says="per response: not the factors"
# The rows without tokens are counted as responses
def token_weights(mask, per):
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    ones = torch.ones(mask.shape)
    if per == "token":
        weights = ones / mask.sum()
    elif per == "response":
        weights = ones / lengths / len(mask)
    else:
        weights = ones / per / len(mask)
    return weights.where(mask, 0.0)


# %% exercise="ex-grpo-divisor" says="per 6: not the factors"
# A number alone, without the mean over responses
def token_weights(mask, per):
    lengths = mask.sum(dim=1, keepdim=True)
    ones = torch.ones(mask.shape)
    if per == "token":
        weights = ones / mask.sum()
    elif per == "response":
        weights = ones / lengths.clamp(min=1) / (lengths > 0).sum()
    else:
        weights = ones / per
    return weights.where(mask, 0.0)


# %% exercise="ex-grpo-divisor" says="what is masked has a weight"
# Padding counts
def token_weights(mask, per):
    return torch.ones(mask.shape) / mask.sum()


# %% exercise="ex-grpo-effective" says="equal weights lose nothing"
# Without the size of the weights
def effective_share(weights, mask):
    chosen = weights[mask]
    return float(1 / chosen.square().sum() * len(chosen))


# %% exercise="ex-grpo-effective" says="one weight of four"
# The padding's weights of 1 are counted
def effective_share(weights, mask):
    return float(weights.sum() ** 2 / weights.square().sum() / weights.numel())


# %% exercise="ex-grpo-effective" says="worth 2.67 tokens"
# The share of weights that are not zero
def effective_share(weights, mask):
    return float((weights[mask] > 0).double().mean())


# %% exercise="ex-grpo-batch" says="one scale"
# The deviation of each group
def batch_advantages(rewards):
    return group_advantages(rewards)


# %% exercise="ex-grpo-batch" says="whatever others do"
# One mean for all groups
def batch_advantages(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


# %% exercise="ex-grpo-batch" says="no NaN"
# Nothing against a deviation of zero
def batch_advantages(rewards):
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / centered.std()


# %% exercise="ex-grpo-batch" says="is not 1"
# The deviation of the rewards, which that between the groups is a part of
def batch_advantages(rewards):
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / (rewards.std() + 1e-6)
