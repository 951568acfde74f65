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


# %% exercise="ex-distributed-doubling" says="no ranks at all must be refused"
# Tests the bits of the number only, and has no first vector
def recursive_doubling(vectors):
    n = len(vectors)
    if n & (n - 1):
        raise ValueError(f"vectors: expected a power of two of them, got {n}")
    size = vectors[0].size
    total = sum(vector.copy() for vector in vectors)
    return [total.copy() for _ in vectors], (n.bit_length() - 1) * size


# %% exercise="ex-distributed-doubling" says="one number, the same for all"
# A list with the numbers of each rank
def recursive_doubling(vectors):
    n = len(vectors)
    if n == 0 or n & (n - 1):
        raise ValueError(f"vectors: expected a power of two of them, got {n}")
    total = sum(vector.copy() for vector in vectors)
    return [total.copy() for _ in vectors], [(n.bit_length() - 1) * total.size] * n


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


# %% exercise="ex-distributed-factors" says="a list of factors for each rank"
# One factor for each rank
def loss_factors(counts):
    total = sum(map(sum, counts))
    if total == 0:
        raise ValueError("counts: expected at least one target, got none")
    return [len(counts) * sum(of_rank) / total for of_rank in counts]


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


# %% exercise="ex-distributed-fit" says="16,384 GPUs are still allowed"
# The last number is left out
def fewest_gpus(scheme, n_weights, memory, gathered=0):
    room = memory - (2 * gathered if scheme == "full" else 0)
    for n in range(8, 16_384, 8):
        if predict_scheme(scheme, n_weights, n).kept <= room:
            return n
    return None


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


# %% exercise="ex-distributed-merge" says="sees nothing of both tiles"
# A tile counts as blind only if all of its queries are
def merge_states(a, b):
    if bool((a[0] == -torch.inf).all()):
        return b
    if bool((b[0] == -torch.inf).all()):
        return a
    m = torch.maximum(a[0], b[0])
    in_a, in_b = torch.exp(a[0] - m), torch.exp(b[0] - m)
    return m, in_a * a[1] + in_b * b[1], in_a[:, None] * a[2] + in_b[:, None] * b[2]


# %% exercise="ex-distributed-merge" says="must not change"
# The second tile is added to the first one in place
def merge_states(a, b):
    m = torch.maximum(a[0], b[0])
    finite = m.masked_fill(m == -torch.inf, 0.0)
    in_a, in_b = torch.exp(a[0] - finite), torch.exp(b[0] - finite)
    s = a[1].mul_(in_a).add_(in_b * b[1])
    return m, s, a[2].mul_(in_a[:, None]).add_(in_b[:, None] * b[2])


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


# %% exercise="ex-distributed-limit" says="where alternating takes"
# Any limit below 1F1B's is taken for 2
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    schedule = []
    for stage in range(n_stages):
        most = limit if limit >= n_stages else min(limit, 2)
        ahead = min(n_stages - 1 - stage, most - 1, n_microbatches - 1)
        order = [("forward", i) for i in range(ahead)]
        for i in range(n_microbatches):
            if ahead + i < n_microbatches:
                order.append(("forward", ahead + i))
            order.append(("backward", i))
        schedule.append(order)
    return schedule


# %% exercise="ex-distributed-limit" says="2 micro-batches, limit 4: each stage takes"
# Starts with forward passes that a short batch does not have
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    schedule = []
    for stage in range(n_stages):
        ahead = min(n_stages - 1 - stage, limit - 1)
        order = [("forward", i) for i in range(ahead)]
        for i in range(n_microbatches):
            if ahead + i < n_microbatches:
                order.append(("forward", ahead + i))
            order.append(("backward", i))
        schedule.append(order)
    return schedule


# %% exercise="ex-distributed-limit" says="4 stages, 8 micro-batches, limit 4: schedule: expected one"
# Backward passes first, so that the stages wait for each other
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    order = [(kind, i) for i in range(n_microbatches) for kind in ("backward", "forward")]
    return [order for _ in range(n_stages)]


# %% exercise="ex-distributed-lines" says="must meet in one box"
# The document's box instead of the line's
def shared_lines(parts, n_boxes):
    def emit(part):
        for name, text in part.items():
            for line in text.splitlines():
                yield box_of(stable_hash(name), n_boxes), (line, name)

    def reduce(box, values):
        names = defaultdict(set)
        for line, name in values:
            names[line].add(name)
        return [line for line, found in names.items() if len(found) > 1]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="that one document repeats"
# Occurrences instead of documents
def shared_lines(parts, n_boxes):
    def emit(part):
        for text in part.values():
            for line in text.splitlines():
                yield box_of(stable_hash(line), n_boxes), line

    def reduce(box, values):
        return [line for line, count in Counter(values).items() if count > 1]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="each shared line once"
# Once for each further document
def shared_lines(parts, n_boxes):
    def emit(part):
        for name, text in part.items():
            for line in set(text.splitlines()):
                yield box_of(stable_hash(line), n_boxes), line

    def reduce(box, values):
        return [line for line, count in Counter(values).items() for _ in range(count - 1)]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="must meet in one box"
# Only the lines of one part are compared
def shared_lines(parts, n_boxes):
    shared = []
    for part in parts:
        names = defaultdict(set)
        for name, text in part.items():
            for line in text.splitlines():
                names[line].add(name)
        shared += [line for line, found in names.items() if len(found) > 1]
    return shared


# %% exercise="ex-distributed-lines" says="of one part can share a line"
# Each part sends a line once, and the box counts parts
def shared_lines(parts, n_boxes):
    def emit(part):
        for line in {line for text in part.values() for line in text.splitlines()}:
            yield box_of(stable_hash(line), n_boxes), line

    def reduce(box, values):
        return [line for line, count in Counter(values).items() if count > 1]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="that of its stable_hash"
# Python's own hash, which another process does not share
def shared_lines(parts, n_boxes):
    def emit(part):
        for name, text in part.items():
            for line in text.splitlines():
                yield hash(line) % n_boxes, (line, name)

    def reduce(box, values):
        names = defaultdict(set)
        for line, name in values:
            names[line].add(name)
        return [line for line, found in names.items() if len(found) > 1]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="that of its stable_hash"
# Everything in the box of one line
def shared_lines(parts, n_boxes):
    def emit(part):
        for name, text in part.items():
            for line in text.splitlines():
                yield box_of(stable_hash("one"), n_boxes), (line, name)

    def reduce(box, values):
        names = defaultdict(set)
        for line, name in values:
            names[line].add(name)
        return [line for line, found in names.items() if len(found) > 1]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="must meet by map_reduce"
# A loop over everything, without boxes
def shared_lines(parts, n_boxes):
    names = defaultdict(set)
    for part in parts:
        for name, text in part.items():
            for line in text.splitlines():
                names[line].add(name)
    return [line for line, found in names.items() if len(found) > 1]
