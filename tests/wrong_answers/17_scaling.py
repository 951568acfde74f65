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
