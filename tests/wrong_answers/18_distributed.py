# %% [markdown]
# Wrong answers to the exercises of chapter 18, and what the checks must say of them.


# %% exercise="ex-distributed-merge" says="were made relative to different m"
# The sums are added as they are
def merge_states(a, b):
    return torch.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]


# %% exercise="ex-distributed-merge" says="scores of 1,000 overflow"
# The exponentials are taken of the scores themselves
def merge_states(a, b):
    m = torch.maximum(a[0], b[0])
    in_a, in_b = torch.exp(a[0]), torch.exp(b[0])
    s = (in_a * a[1] + in_b * b[1]) / torch.exp(m)
    return m, s, (in_a[:, None] * a[2] + in_b[:, None] * b[2]) / torch.exp(m)[:, None]


# %% exercise="ex-distributed-merge" says="o must be rescaled as s is"
# The values of the first tile keep their old scale
def merge_states(a, b):
    m = torch.maximum(a[0], b[0])
    finite = m.masked_fill(m == -torch.inf, 0.0)
    in_a, in_b = torch.exp(a[0] - finite), torch.exp(b[0] - finite)
    return m, in_a * a[1] + in_b * b[1], a[2] + in_b[:, None] * b[2]


# %% exercise="ex-distributed-merge" says="two blind tiles give NaN"
# -inf minus -inf
def merge_states(a, b):
    m = torch.maximum(a[0], b[0])
    in_a, in_b = torch.exp(a[0] - m), torch.exp(b[0] - m)
    return m, in_a * a[1] + in_b * b[1], in_a[:, None] * a[2] + in_b[:, None] * b[2]


# %% exercise="ex-distributed-merge" says="m is not the largest score"
# The maximum of the second tile
def merge_states(a, b):
    in_a = torch.exp(a[0] - b[0])
    return b[0], in_a * a[1] + b[1], in_a[:, None] * a[2] + b[2]


# %% exercise="ex-distributed-limit" says="a stage keeps"
# 1F1B, whatever the limit
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    return [list(map(tuple, order)) for order in one_forward_one_backward(n_stages, n_microbatches)]


# %% exercise="ex-distributed-limit" says="a stage keeps"
# One forward pass too many at the beginning
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    schedule = []
    for stage in range(n_stages):
        ahead = min(n_stages - 1 - stage, limit, n_microbatches - 1)
        order = [("forward", i) for i in range(ahead)]
        for i in range(n_microbatches):
            if ahead + i < n_microbatches:
                order.append(("forward", ahead + i))
            order.append(("backward", i))
        schedule.append(order)
    return schedule


# %% exercise="ex-distributed-limit" says="slower than 1F1B"
# One micro-batch at a time, which keeps any limit
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    order = [(kind, i) for i in range(n_microbatches) for kind in ("forward", "backward")]
    return [order for _ in range(n_stages)]


# %% exercise="ex-distributed-limit" says="takes each micro-batch forward once"
# The forward passes at the end are not left out
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    schedule = []
    for stage in range(n_stages):
        ahead = min(n_stages - 1 - stage, limit - 1)
        order = [("forward", i) for i in range(ahead)]
        for i in range(n_microbatches):
            order += [("forward", ahead + i), ("backward", i)]
        schedule.append(order)
    return schedule


# %% exercise="ex-distributed-limit" says="more than 1F1B"
# Each stage fills its memory
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    ahead = min(limit, n_microbatches) - 1
    order = [("forward", i) for i in range(ahead)]
    for i in range(n_microbatches):
        if ahead + i < n_microbatches:
            order.append(("forward", ahead + i))
        order.append(("backward", i))
    return [list(order) for _ in range(n_stages)]
