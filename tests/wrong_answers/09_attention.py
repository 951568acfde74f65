# %% [markdown]
# Wrong answers to the exercises of chapter 09, each with what the check must say about it.

# %% exercise="ex-attention-sharp" says="sharper than"
# All n keys counted as the others
def needed_sharpness(n, gap, weight):
    return math.log(n * weight / (1 - weight)) / gap


# %% exercise="ex-attention-sharp" says="not sharp enough"
# The odds of the weight are left out
def needed_sharpness(n, gap, weight):
    return math.log(n - 1) / gap


# %% exercise="ex-attention-sharp" says="not sharp enough"
# A larger gap taken to need a larger factor
def needed_sharpness(n, gap, weight):
    return math.log((n - 1) * weight / (1 - weight)) * gap


# %% exercise="ex-attention-sharp" says="sharper than"
# A factor that is large enough for anything
def needed_sharpness(n, gap, weight):
    return 100.0


# %% exercise="ex-attention-budget" says="a key and a value"
# Keys only
def users_that_fit(memory, tokens, n_layers, n_kv_heads, d_head, window):
    kept = tokens if window is None else min(tokens, window)
    return memory // (2 * n_layers * n_kv_heads * d_head * kept)


# %% exercise="ex-attention-budget" says="bounds what is kept"
# The window does not matter
def users_that_fit(memory, tokens, n_layers, n_kv_heads, d_head, window):
    return memory // (2 * 2 * n_layers * n_kv_heads * d_head * tokens)


# %% exercise="ex-attention-budget" says="does not fill a window"
# The window even where the text is shorter
def users_that_fit(memory, tokens, n_layers, n_kv_heads, d_head, window):
    return memory // (2 * 2 * n_layers * n_kv_heads * d_head * (window or tokens))


# %% exercise="ex-attention-budget" says="users are whole"
# Parts of users
def users_that_fit(memory, tokens, n_layers, n_kv_heads, d_head, window):
    kept = tokens if window is None else min(tokens, window)
    return memory / (2 * 2 * n_layers * n_kv_heads * d_head * kept)


# %% exercise="ex-attention-budget" says="one byte is missing"
# Rounded to the nearest number of users
def users_that_fit(memory, tokens, n_layers, n_kv_heads, d_head, window):
    kept = tokens if window is None else min(tokens, window)
    users = memory / (2 * 2 * n_layers * n_kv_heads * d_head * kept)
    return round(users) if users % 1 > 0.9 else math.floor(users)


# %% exercise="ex-attention-merge" says="overflow"
# Exponentials of the log-sums as they are
def merge(out_a, log_sum_a, out_b, log_sum_b):
    a, b = log_sum_a.exp(), log_sum_b.exp()
    return (a * out_a + b * out_b) / (a + b), (a + b).log()


# %% exercise="ex-attention-merge" says="scores that fit: not the output"
# Each half counts alike
def merge(out_a, log_sum_a, out_b, log_sum_b):
    return (out_a + out_b) / 2, torch.logaddexp(log_sum_a, log_sum_b)


# %% exercise="ex-attention-merge" says="not the log-sum-exp"
# Logarithms added, as if the sums were multiplied
def merge(out_a, log_sum_a, out_b, log_sum_b):
    weight_a, weight_b = softmax(torch.cat([log_sum_a, log_sum_b], dim=-1)).split(1, dim=-1)
    return weight_a * out_a + weight_b * out_b, log_sum_a + log_sum_b


# %% exercise="ex-attention-merge" says="sees neither half"
# PyTorch's softmax, which makes NaN of nothing and nothing
def merge(out_a, log_sum_a, out_b, log_sum_b):
    both = torch.cat([log_sum_a, log_sum_b], dim=-1)
    weight_a, weight_b = both.softmax(dim=-1).split(1, dim=-1)
    return weight_a * out_a + weight_b * out_b, both.logsumexp(dim=-1, keepdim=True)


# %% exercise="ex-attention-window-tiles" says="of no use"
# All blocks up to the diagonal
def window_columns(rows, size, window):
    return [slice(at, min(at + size, rows.stop)) for at in range(0, rows.stop, size)]


# %% exercise="ex-attention-window-tiles" says="miss keys"
# What the last query of the block sees, not the first
def window_columns(rows, size, window):
    first = max(0, rows.stop - window) // size * size
    return [slice(at, min(at + size, rows.stop)) for at in range(first, rows.stop, size)]


# %% exercise="ex-attention-window-tiles" says="multiples of the size"
# Blocks that begin where the window does
def window_columns(rows, size, window):
    first = max(0, rows.start - window + 1)
    return [slice(at, min(at + size, rows.stop)) for at in range(first, rows.stop, size)]


# %% exercise="ex-attention-window-tiles" says="of no use"
# The window one token too wide
def window_columns(rows, size, window):
    first = max(0, rows.start - window) // size * size
    return [slice(at, min(at + size, rows.stop)) for at in range(first, rows.stop, size)]


# %% exercise="ex-attention-window-tiles" says="more than a tile"
# One slice for all
def window_columns(rows, size, window):
    return [slice(max(0, rows.start - window + 1) // size * size, rows.stop)]


# %% exercise="ex-attention-group" says="weight of v_proj: head 0 is the mean"
# Values of the group's first head
def to_grouped(attention, n_kv_heads):
    grouped = copy.deepcopy(attention)
    grouped.n_kv_heads = n_kv_heads
    for name, pick in (("k_proj", lambda w: w.mean(dim=1)), ("v_proj", lambda w: w[:, 0])):
        wide = getattr(attention, name)
        rows = n_kv_heads * attention.d_head
        shared = nn.Linear(wide.in_features, rows, bias=wide.bias is not None)
        for old, new in zip(wide.parameters(), shared.parameters(), strict=True):
            new.data = pick(old.data.unflatten(0, (n_kv_heads, -1, attention.d_head))).flatten(0, 1)
        setattr(grouped, name, shared)
    return grouped


# %% exercise="ex-attention-group" says="head 0 is the mean of heads 0, 1, 2"
# Every second head belongs to a group, not neighbors
def to_grouped(attention, n_kv_heads):
    grouped = copy.deepcopy(attention)
    grouped.n_kv_heads = n_kv_heads
    for name in ("k_proj", "v_proj"):
        wide = getattr(attention, name)
        rows = n_kv_heads * attention.d_head
        shared = nn.Linear(wide.in_features, rows, bias=wide.bias is not None)
        for old, new in zip(wide.parameters(), shared.parameters(), strict=True):
            heads = old.data.unflatten(0, (-1, n_kv_heads, attention.d_head))
            new.data = heads.mean(dim=0).flatten(0, 1)
        setattr(grouped, name, shared)
    return grouped


# %% exercise="ex-attention-group" says="bias of k_proj"
# Biases of the first heads
def to_grouped(attention, n_kv_heads):
    grouped = copy.deepcopy(attention)
    grouped.n_kv_heads = n_kv_heads
    for name in ("k_proj", "v_proj"):
        wide = getattr(attention, name)
        rows = n_kv_heads * attention.d_head
        shared = nn.Linear(wide.in_features, rows, bias=wide.bias is not None)
        heads = wide.weight.data.unflatten(0, (n_kv_heads, -1, attention.d_head))
        shared.weight.data = heads.mean(dim=1).flatten(0, 1)
        if wide.bias is not None:
            shared.bias.data = wide.bias.data[:rows].clone()
        setattr(grouped, name, shared)
    return grouped


# %% exercise="ex-attention-group" says="equal heads make the same function"
# A new layer, whose norms are new, too, and whose scale is forgotten
def to_grouped(attention, n_kv_heads):
    norm = None if attention.q_norm is None else type(attention.q_norm)
    grouped = MultiHeadAttention(
        attention.q_proj.in_features,
        attention.n_heads,
        n_kv_heads=n_kv_heads,
        d_head=attention.d_head,
        bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        qk_norm=norm,
    )
    for name, weight in grouped.named_parameters():
        old = attention.get_parameter(name).data
        if name.startswith(("k_proj", "v_proj")):
            old = old.unflatten(0, (n_kv_heads, -1, attention.d_head)).mean(dim=1).flatten(0, 1)
        if "norm" not in name:
            weight.data = old.clone()
    return grouped


# %% exercise="ex-attention-group" says="must stay as it was"
# A shallow copy, which shares its matrices with the layer it came from
def to_grouped(attention, n_kv_heads):
    grouped = copy.copy(attention)
    grouped._modules = dict(attention._modules)
    grouped.n_kv_heads = n_kv_heads
    for name in ("k_proj", "v_proj"):
        wide = getattr(attention, name)
        rows = n_kv_heads * attention.d_head
        shared = nn.Linear(wide.in_features, rows, bias=wide.bias is not None)
        for old, new in zip(wide.parameters(), shared.parameters(), strict=True):
            heads = old.data.unflatten(0, (n_kv_heads, -1, attention.d_head))
            new.data = heads.mean(dim=1).flatten(0, 1)
        setattr(grouped, name, shared)
    return grouped


# %% exercise="ex-attention-ablation" says="seen a period before"
# One token too late: the first that can be known is left out
@torch.no_grad()
def loss_without(model, layer, heads):
    ids, targets, period = repeated_rows(64, torch.Generator().manual_seed(9))
    attention = model.layers[layer]
    saved = attention.o_proj.weight.clone()
    for head in heads:
        attention.o_proj.weight[:, head * attention.d_head : (head + 1) * attention.d_head] = 0
    loss = F.cross_entropy(model(ids).mT, targets, reduction="none")
    attention.o_proj.weight.copy_(saved)
    return loss[torch.arange(48) > period].mean().item()


# %% exercise="ex-attention-ablation" says="of the given rows"
# Other rows than the exercise asks for
@torch.no_grad()
def loss_without(model, layer, heads):
    ids, targets, period = repeated_rows(64, torch.Generator().manual_seed(5))
    attention = model.layers[layer]
    saved = attention.o_proj.weight.clone()
    for head in heads:
        attention.o_proj.weight[:, head * attention.d_head : (head + 1) * attention.d_head] = 0
    loss = F.cross_entropy(model(ids).mT, targets, reduction="none")
    attention.o_proj.weight.copy_(saved)
    return loss[torch.arange(48) >= period].mean().item()


# %% exercise="ex-attention-ablation" says="seen a period before"
# The mean over all tokens
@torch.no_grad()
def loss_without(model, layer, heads):
    ids, targets, _ = repeated_rows(64, torch.Generator().manual_seed(9))
    attention = model.layers[layer]
    saved = attention.o_proj.weight.clone()
    for head in heads:
        attention.o_proj.weight[:, head * attention.d_head : (head + 1) * attention.d_head] = 0
    loss = F.cross_entropy(model(ids).mT, targets)
    attention.o_proj.weight.copy_(saved)
    return loss.item()


# %% exercise="ex-attention-ablation" says="nothing may reach o_proj"
# Rows of o_proj, which are features of the stream, not of heads
@torch.no_grad()
def loss_without(model, layer, heads):
    ids, targets, period = repeated_rows(64, torch.Generator().manual_seed(9))
    attention = model.layers[layer]
    saved = attention.o_proj.weight.clone()
    for head in heads:
        attention.o_proj.weight[head * attention.d_head : (head + 1) * attention.d_head] = 0
    loss = F.cross_entropy(model(ids).mT, targets, reduction="none")
    attention.o_proj.weight.copy_(saved)
    return loss[torch.arange(48) >= period].mean().item()


# %% exercise="ex-attention-ablation" says="must be as it was"
# The weights are never put back
@torch.no_grad()
def loss_without(model, layer, heads):
    ids, targets, period = repeated_rows(64, torch.Generator().manual_seed(9))
    attention = model.layers[layer]
    for head in heads:
        attention.o_proj.weight[:, head * attention.d_head : (head + 1) * attention.d_head] = 0
    loss = F.cross_entropy(model(ids).mT, targets, reduction="none")
    return loss[torch.arange(48) >= period].mean().item()
