# %% [markdown]
# Wrong answers to the exercises of chapter 07, each with what the check must say about it.

# %% exercise="ex-batches-missed" says="too few"
# The windows that it takes if none overlap
def rows_until_seen(share, n_tokens, context_length):
    return math.ceil(share * n_tokens / context_length)


# %% exercise="ex-batches-missed" says="too few"
# Rounded down
def rows_until_seen(share, n_tokens, context_length):
    return math.floor(math.log1p(-share) / math.log1p(-context_length / n_tokens))


# %% exercise="ex-batches-missed" says="not the least"
# The limit for rows much shorter than the corpus, e^(-rows T / n), taken for the whole truth
def rows_until_seen(share, n_tokens, context_length):
    return math.ceil(-math.log(1 - share) * n_tokens / context_length)


# %% exercise="ex-batches-missed" says="whole numbers"
# Not rounded
def rows_until_seen(share, n_tokens, context_length):
    return math.log(1 - share) / math.log(1 - context_length / n_tokens)


# %% exercise="ex-batches-context" says="its own place included"
# Without the input at the place itself
def mean_context(batch):
    ids = batch.document_ids
    mask = document_mask(torch.zeros_like(batch.inputs) if ids is None else ids)
    return (mask.sum(dim=-1)[:, 0][batch.targets != -100] - 1).float().mean().item()


# %% exercise="ex-batches-context" says="its own document"
# Causal, as if the row were one document
def mean_context(batch):
    mask = document_mask(torch.zeros_like(batch.inputs))
    return mask.sum(dim=-1)[:, 0][batch.targets != -100].float().mean().item()


# %% exercise="ex-batches-context" says="places without a target do not count"
# Over all places, padding too
def mean_context(batch):
    ids = batch.document_ids
    mask = document_mask(torch.zeros_like(batch.inputs) if ids is None else ids)
    return mask.sum(dim=-1).float().mean().item()


# %% exercise="ex-batches-context" says="not over rows"
# The mean of the rows' means
def mean_context(batch):
    ids = batch.document_ids
    mask = document_mask(torch.zeros_like(batch.inputs) if ids is None else ids)
    counts, here = mask.sum(dim=-1)[:, 0].float(), batch.targets != -100
    return ((counts * here).sum(dim=1) / here.sum(dim=1)).mean().item()


# %% exercise="ex-batches-mixture" says="not exact far from the start"
# Floats, though with care: the share is rounded to 53 bits
def mixed_row(row, share):
    near = round(row * float(share), 6), round((row + 1) * float(share), 6)
    before, after = map(math.floor, near)
    return (0, before) if after > before else (1, row - before)


# %% exercise="ex-batches-mixture" says="are from source 0"
# Rounded up: source 0 gives first
def mixed_row(row, share):
    before, after = math.ceil(row * share), math.ceil((row + 1) * share)
    return (0, before) if after > before else (1, row - before)


# %% exercise="ex-batches-mixture" says="is number"
# The number of the row in all, not within its source
def mixed_row(row, share):
    before, after = math.floor(row * share), math.floor((row + 1) * share)
    return (0, before) if after > before else (1, row)


# %% exercise="ex-batches-mixture" says="are from source 0"
# The right share, but all of source 0 at the beginning of each period
def mixed_row(row, share):
    period, place = divmod(row, share.denominator)
    if place < share.numerator:
        return 0, period * share.numerator + place
    rest = share.denominator - share.numerator
    return 1, period * rest + place - share.numerator


# %% exercise="ex-batches-llmc" says="unsigned 16-bit"
# Signed numbers
def read_llmc(path):
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ShardError(f"{path}: not a shard of llm.c")
    return TokenRing([np.fromfile(path, "<i2", offset=1024)])


# %% exercise="ex-batches-llmc" says="a token is missing"
# The number of tokens is not compared with the size of the file
def read_llmc(path):
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ShardError(f"{path}: not a shard of llm.c")
    return TokenRing([np.memmap(path, "<u2", "r", 1024)])


# %% exercise="ex-batches-llmc" says="a token too many"
# Only a file that is too short is found
def read_llmc(path):
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ShardError(f"{path}: not a shard of llm.c")
    if path.stat().st_size < 1024 + 2 * int(header[2]):
        raise ShardError(f"{path}: truncated")
    return TokenRing([np.memmap(path, "<u2", "r", 1024, shape=int(header[2]))])


# %% exercise="ex-batches-llmc" says="the header is cut off"
# A header of any length is looked into
def read_llmc(path):
    header = np.fromfile(path, "<i4", count=256)
    if header[0] != 20240520 or header[1] != 1:
        raise ShardError(f"{path}: not a shard of llm.c")
    if path.stat().st_size != 1024 + 2 * int(header[2]) and len(header) == 256:
        raise ShardError(f"{path}: truncated")
    return TokenRing([np.memmap(path, "<u2", "r", 1024)])


# %% exercise="ex-batches-llmc" says="does not name the file"
# An error without the file
def read_llmc(path):
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ShardError("not a shard of llm.c")
    if path.stat().st_size != 1024 + 2 * int(header[2]):
        raise ShardError("truncated")
    return TokenRing([np.memmap(path, "<u2", "r", 1024)])
