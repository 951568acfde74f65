# %% [markdown]
# Wrong answers to the exercises of chapter 17, and what the checks must say of them.


# %% exercise="ex-scaling-game" says="your model misses the best one by"
# All the money on one small run, and its size for the target
def spend(game: "BudgetGame") -> float:
    game.train(1e4, game.left / 6e4)
    return 1e4


# %% exercise="ex-scaling-game" says="your model misses the best one by"
# The best size for the budget of the game, not for the target
def spend(game: "BudgetGame") -> float:
    budget = game.left
    for size in np.geomspace(8e3, 130e3, 5):
        for share in (0.05, 0.15):
            game.train(size, share * budget / (6 * size))
    law = fit_scaling_law(*zip(*game.runs, strict=True), delta=0.01).law
    return compute_optimal(law, budget).parameters


# %% exercise="ex-scaling-game" says="was the whole budget used"
# The right strategy with a tenth of the money
def spend(game: "BudgetGame") -> float:
    for number in (1, 1.5):
        for size in np.geomspace(8e3, 130e3, 4):
            game.train(size, number * game.least / (6 * size))
    law = fit_scaling_law(*zip(*game.runs, strict=True), delta=0.01).law
    return compute_optimal(law, game.target).parameters


# %% exercise="ex-scaling-game" says="nothing was trained"
# Twenty tokens per parameter, because everybody says so
def spend(game: "BudgetGame") -> float:
    return math.sqrt(game.target / 120)


# %% exercise="ex-scaling-even" says="6 operations for each parameter and token in training"
# Use as expensive as training
def break_even(law: "ScalingLaw", small: float, large: float, loss: float) -> float:
    extra = small * law.tokens_for(loss, small) - large * law.tokens_for(loss, large)
    return max(0.0, extra / (large - small))


# %% exercise="ex-scaling-even" says="neither of these models ever has that loss"
# Infinity less infinity
def break_even(law: "ScalingLaw", small: float, large: float, loss: float) -> float:
    extra = small * law.tokens_for(loss, small) - large * law.tokens_for(loss, large)
    return max(0.0, 3 * extra / (large - small))


# %% exercise="ex-scaling-even" says="return a number of tokens"
# The answer is not returned
def break_even(law: "ScalingLaw", small: float, large: float, loss: float) -> float:
    max(0.0, 3 * (small * law.tokens_for(loss, small) - large * law.tokens_for(loss, large)))


# %% exercise="ex-scaling-even" says="here the small one is cheaper in training, too"
# A negative number of tokens
def break_even(law: "ScalingLaw", small: float, large: float, loss: float) -> float:
    extra = small * law.tokens_for(loss, small) - large * law.tokens_for(loss, large)
    return 3 * extra / (large - small)


# %% exercise="ex-scaling-even" says="6 operations for each parameter and token in training"
# Tokens compared instead of operations
def break_even(law: "ScalingLaw", small: float, large: float, loss: float) -> float:
    return max(0.0, 3 * (law.tokens_for(loss, small) - law.tokens_for(loss, large)))


# %% exercise="ex-scaling-inner" says="it should be far above that of the law"
# The exponent of the law itself
def inner_exponent(law: "ScalingLaw", total: Callable, flops: float) -> float:
    return law.exponent


# %% exercise="ex-scaling-inner" says="it should be far above that of the law"
# The loss of the inner parameters alone
def inner_exponent(law: "ScalingLaw", total: Callable, flops: float) -> float:
    def best(c: float) -> float:
        n = np.geomspace(1, c / 6, 2_000_001)
        return n[np.argmin(law.predict(n, c / (6 * n)))]

    return float(np.log(best(2 * flops) / best(flops)) / np.log(2))


# %% exercise="ex-scaling-inner" says="the tokens on n alone"
# Embeddings left out of nothing but the answer: the tokens depend on all parameters
def inner_exponent(law: "ScalingLaw", total: Callable, flops: float) -> float:
    def best(c: float) -> float:
        n = np.geomspace(1, c / 6, 2_000_001)
        return n[np.argmin(law.predict(total(n), c / (6 * total(n))))]

    return float(np.log(best(2 * flops) / best(flops)) / np.log(2))


# %% exercise="ex-scaling-inner" says="where nothing is left out"
# The share of the data
def inner_exponent(law: "ScalingLaw", total: Callable, flops: float) -> float:
    return 1 - law.exponent / 2


# %% exercise="ex-scaling-batch" says="at the critical batch size"
# The gain instead of its inverse
def steps_and_rows(batch, noise, least_steps):
    steps = least_steps / (1 + noise / batch)
    return steps, steps * batch


# %% exercise="ex-scaling-batch" says="with an enormous batch"
# Batch and noise exchanged
def steps_and_rows(batch, noise, least_steps):
    steps = least_steps * (1 + batch / noise)
    return steps, steps * batch


# %% exercise="ex-scaling-batch" says="it reads its batch"
# Rows of the fewest steps
def steps_and_rows(batch, noise, least_steps):
    return least_steps * (1 + noise / batch), least_steps * batch


# %% exercise="ex-scaling-batch" says="return two numbers"
# The answer is not returned
def steps_and_rows(batch, noise, least_steps):
    steps = least_steps * (1 + noise / batch)
    steps, steps * batch


# %% exercise="ex-scaling-rate" says="a rate is missing"
# No rate for what keeps its own
def rate_for(name, shape, base_shape, rate):
    if len(shape) > 1 and name != "embedding.weight":
        return rate * base_shape[-1] / shape[-1]


# %% exercise="ex-scaling-rate" says="looking up a row"
# All parameters alike
def rate_for(name, shape, base_shape, rate):
    return rate * base_shape[-1] / shape[-1]


# %% exercise="ex-scaling-rate" says="what counts is the number of terms"
# Rows instead of columns
def rate_for(name, shape, base_shape, rate):
    if len(shape) == 1 or name in ("embedding.weight",):
        return rate
    if name == "lm_head.weight":
        return rate * base_shape[-1] / shape[-1]
    return rate * base_shape[0] / shape[0]


# %% exercise="ex-scaling-rate" says="the head sums over the width"
# The head is left out
def rate_for(name, shape, base_shape, rate):
    if len(shape) == 1 or name in ("embedding.weight", "lm_head.weight"):
        return rate
    return rate * base_shape[-1] / shape[-1]


# %% exercise="ex-scaling-rate" says="a gain multiplies"
# Vectors are divided, too
def rate_for(name, shape, base_shape, rate):
    if name == "embedding.weight":
        return rate
    return rate * base_shape[-1] / shape[-1]


# %% exercise="ex-scaling-grant" says="an hour has 3600 seconds"
# Hours taken for seconds
def affordable_tokens(dollars, parameters):
    return dollars / 2.0 * HARDWARE["h100"].peak_flops * 0.4 / (6 * parameters)


# %% exercise="ex-scaling-grant" says="that many tokens cost"
# The backward pass forgotten
def affordable_tokens(dollars, parameters):
    return dollars / 2.0 * 3600 * HARDWARE["h100"].peak_flops * 0.4 / (2 * parameters)


# %% exercise="ex-scaling-grant" says="that many tokens cost"
# The peak taken for what is reached
def affordable_tokens(dollars, parameters):
    return dollars / 2.0 * 3600 * HARDWARE["h100"].peak_flops / (6 * parameters)


# %% exercise="ex-scaling-grant" says="twice the model has half the tokens"
# The size of the model left out
def affordable_tokens(dollars, parameters):
    return dollars / 2.0 * 3600 * HARDWARE["h100"].peak_flops * 0.4 / (6 * 1e9)


# %% exercise="ex-scaling-grant" says="return a number of tokens"
# The answer is not returned
def affordable_tokens(dollars, parameters):
    dollars / 2.0 * 3600 * HARDWARE["h100"].peak_flops * 0.4 / (6 * parameters)
