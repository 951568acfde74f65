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


# %% exercise="ex-evaluation-order" says="has p = 1/20, not 0"
# The share of better orders, without the file's own
def order_p_value(own, shuffled):
    return sum(other >= own for other in shuffled) / len(shuffled)


# %% exercise="ex-evaluation-order" says="the best of 20 orders"
# Counted from the other end
def order_p_value(own, shuffled):
    return (1 + sum(other <= own for other in shuffled)) / (1 + len(shuffled))


# %% exercise="ex-evaluation-order" says="count as at least as good"
# Ties in favor of the suspicion
def order_p_value(own, shuffled):
    return (1 + sum(other > own for other in shuffled)) / (1 + len(shuffled))


# %% exercise="ex-evaluation-order" says="the best of 20 orders"
# The file's own order counted, but not drawn
def order_p_value(own, shuffled):
    return (1 + sum(other >= own for other in shuffled)) / len(shuffled)


# %% exercise="ex-evaluation-adaptive" says="each outcome with its own answer"
# Outcomes stay where they were
def adaptive_error(confidences, right, n_bins):
    c, y = np.sort(confidences), np.array(right, dtype=float)
    parts = np.array_split(np.arange(len(c)), n_bins)
    return float(sum(abs((y[part] - c[part]).sum()) for part in parts) / len(c))


# %% exercise="ex-evaluation-adaptive" says="bins hold equally many answers"
# Bins of equal width
def adaptive_error(confidences, right, n_bins):
    return calibration(confidences, right, n_bins=n_bins, n_resamples=1).error


# %% exercise="ex-evaluation-adaptive" says="a bin counts by its answers"
# All bins count alike
def adaptive_error(confidences, right, n_bins):
    c, y = np.array(confidences, dtype=float), np.array(right, dtype=float)
    parts = np.array_split(np.argsort(c, kind="stable"), n_bins)
    return float(np.mean([abs((y[part] - c[part]).mean()) for part in parts]))


# %% exercise="ex-evaluation-adaptive" says="misses to both sides cancel"
# The distance of each answer instead of that of the means
def adaptive_error(confidences, right, n_bins):
    c, y = np.array(confidences, dtype=float), np.array(right, dtype=float)
    if n_bins > 1:
        parts = np.array_split(np.argsort(c, kind="stable"), n_bins)
        return float(sum(abs((y[part] - c[part]).sum()) for part in parts) / len(c))
    return float(np.abs(y - c).mean())


# %% exercise="ex-evaluation-elo" says="to lose against a weaker player costs more"
# Every game is worth the same
def elo(games, n_players, k=32.0):
    ratings = [1000.0] * n_players
    for winner, loser in games:
        ratings[winner] += k / 2
        ratings[loser] -= k / 2
    return ratings


# %% exercise="ex-evaluation-elo" says="to lose against a weaker player costs more"
# The favorite's gain is the larger
def elo(games, n_players, k=32.0):
    ratings = [1000.0] * n_players
    for winner, loser in games:
        expected = 1 / (1 + 10 ** ((ratings[loser] - ratings[winner]) / 400))
        ratings[winner] += k * expected
        ratings[loser] -= k * expected
    return ratings


# %% exercise="ex-evaluation-elo" says="what one gets, the other gives"
# The loser's loss by the rating that the winner has after the game
def elo(games, n_players, k=32.0):
    ratings = [1000.0] * n_players
    for winner, loser in games:
        expected = 1 / (1 + 10 ** ((ratings[loser] - ratings[winner]) / 400))
        ratings[winner] += k * (1 - expected)
        again = 1 / (1 + 10 ** ((ratings[loser] - ratings[winner]) / 400))
        ratings[loser] -= k * (1 - again)
    return ratings


# %% exercise="ex-evaluation-elo" says="use powers of 10 and 400"
# A natural exponential in the place of a power of ten
def elo(games, n_players, k=32.0):
    ratings = [1000.0] * n_players
    for winner, loser in games:
        expected = 1 / (1 + np.exp((ratings[loser] - ratings[winner]) / 400))
        gain = k * (1 - expected)
        ratings[winner] += gain
        ratings[loser] -= gain
    return ratings
