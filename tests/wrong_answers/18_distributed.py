# %% exercise="ex-distributed-doubling" says="has not the sum over all ranks"
# The distance grows by one in place of doubling
def recursive_doubling(vectors):
    n = len(vectors)
    if n == 0 or n & (n - 1):
        raise ValueError(f"vectors: expected a power of two of them, got {n}")
    held, sent, distance = [vector.copy() for vector in vectors], 0, 1
    while distance < n:
        held = [held[rank] + held[(rank ^ distance) % n] for rank in range(n)]
        sent += held[0].size
        distance += 1
    return held, sent


# %% exercise="ex-distributed-doubling" says="has not the sum over all ranks"
# One after the other, so that a rank adds what its partner has just changed
def recursive_doubling(vectors):
    n = len(vectors)
    if n == 0 or n & (n - 1):
        raise ValueError(f"vectors: expected a power of two of them, got {n}")
    held, sent, distance = [vector.copy() for vector in vectors], 0, 1
    while distance < n:
        for rank in range(n):
            held[rank] = held[rank] + held[rank ^ distance]
        sent += held[0].size
        distance *= 2
    return held, sent


# %% exercise="ex-distributed-doubling" says="the given vectors must not change"
# Adds in place
def recursive_doubling(vectors):
    n = len(vectors)
    if n == 0 or n & (n - 1):
        raise ValueError(f"vectors: expected a power of two of them, got {n}")
    total = sum(vector.copy() for vector in vectors)
    for vector in vectors:
        vector[:] = total
    return vectors, (n.bit_length() - 1) * vectors[0].size


# %% exercise="ex-distributed-doubling" says="three exchanges of six numbers"
# Counts what all ranks send
def recursive_doubling(vectors):
    n = len(vectors)
    if n == 0 or n & (n - 1):
        raise ValueError(f"vectors: expected a power of two of them, got {n}")
    held, sent, distance = [vector.copy() for vector in vectors], 0, 1
    while distance < n:
        held = [held[rank] + held[rank ^ distance] for rank in range(n)]
        sent += n * held[0].size
        distance *= 2
    return held, sent


# %% exercise="ex-distributed-doubling" says="must be refused"
# Takes any number, and leaves some ranks out
def recursive_doubling(vectors):
    n = len(vectors)
    held, sent, distance = [vector.copy() for vector in vectors], 0, 1
    while distance < n:
        held = [held[r] + held[r ^ distance] if r ^ distance < n else held[r] for r in range(n)]
        sent += held[0].size
        distance *= 2
    return held, sent


# %% exercise="ex-distributed-factors" says="make up for it"
# Forgets that the wrapper averages
def loss_factors(counts):
    total = sum(map(sum, counts))
    if total == 0:
        raise ValueError("counts: expected at least one target, got none")
    return [[n / total for n in of_rank] for of_rank in counts]


# %% exercise="ex-distributed-factors" says="every target must count the same"
# The share of the rank's own targets: a mean of means over ranks
def loss_factors(counts):
    if not sum(map(sum, counts)):
        raise ValueError("counts: expected at least one target, got none")
    return [[n / max(sum(of_rank), 1) for n in of_rank] for of_rank in counts]


# %% exercise="ex-distributed-factors" says="every target must count the same"
# The same factor for all micro-batches
def loss_factors(counts):
    if not sum(map(sum, counts)):
        raise ValueError("counts: expected at least one target, got none")
    return [[1 / len(of_rank) for _ in of_rank] for of_rank in counts]


# %% exercise="ex-distributed-factors" says="no targets at all must be refused"
# Divides by at least one, in silence
def loss_factors(counts):
    total = max(sum(map(sum, counts)), 1)
    return [[len(counts) * n / total for n in of_rank] for of_rank in counts]


# %% exercise="ex-distributed-fit" says="the next multiple of 8"
# Any number of GPUs
def fewest_gpus(scheme, n_weights, memory, gathered=0):
    room = memory - (2 * gathered if scheme == "full" else 0)
    for n in range(1, 16_385):
        if predict_scheme(scheme, n_weights, n).kept <= room:
            return n
    return None


# %% exercise="ex-distributed-fit" says="exactly enough memory do fit"
# Demands some memory to spare
def fewest_gpus(scheme, n_weights, memory, gathered=0):
    room = memory - (2 * gathered if scheme == "full" else 0)
    for n in range(8, 16_385, 8):
        if predict_scheme(scheme, n_weights, n).kept < room:
            return n
    return None


# %% exercise="ex-distributed-fit" says="only 60 GB are left"
# Forgets what is gathered
def fewest_gpus(scheme, n_weights, memory, gathered=0):
    for n in range(8, 16_385, 8):
        if predict_scheme(scheme, n_weights, n).kept <= memory:
            return n
    return None


# %% exercise="ex-distributed-fit" says="only full sharding gathers"
# Takes the room from every scheme
def fewest_gpus(scheme, n_weights, memory, gathered=0):
    for n in range(8, 16_385, 8):
        if predict_scheme(scheme, n_weights, n).kept + 2 * gathered <= memory:
            return n
    return None
