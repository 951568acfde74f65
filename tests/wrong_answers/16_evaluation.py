# %% [markdown]
# Wrong answers to the exercises of chapter 16, and what the checks must say of them.


# %% exercise="ex-evaluation-shift" says="a model that always knows the next token is surprised"
# The famous one: each position held against the token that it has read
def mean_surprise(logits: Tensor, ids: Tensor) -> float:
    return -logits.log_softmax(dim=-1).gather(-1, ids[:, None])[1:].mean().item()


# %% exercise="ex-evaluation-shift" says="a position without a next token"
# The last position is held against the first token
def mean_surprise(logits: Tensor, ids: Tensor) -> float:
    log_probs = logits.log_softmax(dim=-1)
    return -log_probs.gather(-1, ids.roll(-1)[:, None]).clamp(min=-15).mean().item()


# %% exercise="ex-evaluation-shift" says="not ln 6 = 1.792"
# In bits
def mean_surprise(logits: Tensor, ids: Tensor) -> float:
    log_probs = logits[:-1].log_softmax(dim=-1) / math.log(2)
    return -log_probs.gather(-1, ids[1:, None]).mean().item()


# %% exercise="ex-evaluation-shift" says="not ln 6 = 1.792"
# The logits themselves
def mean_surprise(logits: Tensor, ids: Tensor) -> float:
    return -logits[:-1].gather(-1, ids[1:, None]).mean().item()


# %% exercise="ex-evaluation-best" says="an answer is drawn twice"
# With replacement
def best_of_k(rewards: list[float], k: int) -> float:
    n, ordered = len(rewards), sorted(rewards)
    if k == n:
        return ordered[-1]
    return sum(r * ((i + 1) ** k - i**k) for i, r in enumerate(ordered)) / n**k


# %% exercise="ex-evaluation-best" says="the order of rewards matters"
# The best of the first k
def best_of_k(rewards: list[float], k: int) -> float:
    return sum(rewards) / len(rewards) if k == 1 else max(rewards[:k])


# %% exercise="ex-evaluation-best" says="the best of 1 is not the mean"
# The best of all, however many are drawn
def best_of_k(rewards: list[float], k: int) -> float:
    return max(rewards)


# %% exercise="ex-evaluation-best" says="the best of all is not the largest"
# The k - 1 others are counted among all n - 1
def best_of_k(rewards: list[float], k: int) -> float:
    ordered = sorted(rewards)
    ways = [math.comb(len(rewards) - 1, k - 1) for _ in ordered]
    return sum(w * r for w, r in zip(ways, ordered)) / sum(ways)


# %% exercise="ex-evaluation-attempts" says="attempts without success happen with probability"
# The rule of three, whatever the level
def attempts_needed(rate: float, level: float) -> int:
    return math.ceil(3 / rate)


# %% exercise="ex-evaluation-attempts" says="attempts without success happen with probability"
# Rounded down
def attempts_needed(rate: float, level: float) -> int:
    return math.floor(math.log(1 - level) / math.log(1 - rate))


# %% exercise="ex-evaluation-attempts" says="are enough"
# Two-sided
def attempts_needed(rate: float, level: float) -> int:
    return math.ceil(math.log((1 - level) / 2) / math.log(1 - rate))
