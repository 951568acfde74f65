# %% [markdown]
# Wrong answers to the exercises of chapter 20, and what the checks must say of them.


# %% exercise="ex-lora-extract" says="can be reached"
# The singular values are forgotten
def extracted(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(after - before, full_matrices=False)
    return v[:rank], u[:, :rank]


# %% exercise="ex-lora-extract" says="can be reached"
# The smallest directions instead of the largest
def extracted(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(after - before, full_matrices=False)
    root = s[-rank:].sqrt()
    return root[:, None] * v[-rank:], u[:, -rank:] * root


# %% exercise="ex-lora-extract" says="not of one size"
# All of the size in b
def extracted(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(after - before, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


# %% exercise="ex-lora-extract" says="a is (rank, inputs)"
# The other way round
def extracted(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(after - before, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


# %% exercise="ex-lora-extract" says="can be reached"
# The matrix after tuning instead of the difference
def extracted(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(after, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


# %% exercise="ex-lora-broken" says="B is zero at first"
# A zero B is how every adapter begins
def faults(base, model):
    layers = lora_layers(model).items()
    return {name: "dead" for name, layer in layers if not layer.lora_b.any()}


# %% exercise="ex-lora-broken" says="A is zero, but B is not"
# Either of the two
def faults(base, model):
    layers = lora_layers(model).items()
    return {name: "dead" for name, layer in layers if not layer.lora_a.any()}


# %% exercise="ex-lora-broken" says="a single number of the base has changed"
# Compared as nearly equal
def faults(base, model):
    found = {}
    for name, layer in lora_layers(model).items():
        matrices = layer.lora_a, layer.lora_b
        near = torch.allclose(layer.base.weight, base.get_submodule(name).weight, atol=0.01)
        if not any(matrix.any() for matrix in matrices):
            found[name] = "dead"
        elif not near:
            found[name] = "moved"
        elif not all(matrix.isfinite().all() for matrix in matrices):
            found[name] = "not finite"
    return found


# %% exercise="ex-lora-broken" says="infinity is not a number"
# Only NaN is looked for
def faults(base, model):
    def fault(name, a, b, weight):
        if not (a.any() or b.any()):
            return "dead"
        if not torch.equal(weight, base.get_submodule(name).weight):
            return "moved"
        return "not finite" if a.isnan().any() or b.isnan().any() else None

    words = {n: fault(n, m.lora_a, m.lora_b, m.base.weight) for n, m in lora_layers(model).items()}
    return {name: word for name, word in words.items() if word}


# %% exercise="ex-lora-broken" says="NaN over a changed base"
# The last fault counts, not the first
def faults(base, model):
    found = {}
    for name, layer in lora_layers(model).items():
        if not torch.equal(layer.base.weight, base.get_submodule(name).weight):
            found[name] = "moved"
        if not (layer.lora_a.sum() + layer.lora_b.sum()).isfinite():
            found[name] = "not finite"
        if not (layer.lora_a.any() or layer.lora_b.any()):
            found[name] = "dead"
    return found


# %% exercise="ex-lora-broken" says="NaN in A is as bad as in B"
# Only B is looked at, as A is not zero at first
def faults(base, model):
    words = {}
    for name, layer in lora_layers(model).items():
        changed = (layer.base.weight != base.get_submodule(name).weight).any()
        tests = {
            "dead": not (layer.lora_a.any() or layer.lora_b.any()),
            "moved": changed,
            "not finite": not layer.lora_b.isfinite().all(),
        }
        words |= {name: word for word in list(tests)[::-1] if tests[word]}
    return words


# %% exercise="ex-lora-dora" says="with B = 0 it is not the base"
# The magnitudes multiply the sum, which is not divided by its lengths
def dora(x, weight, a, b, scale, magnitude):
    return x @ ((weight + scale * (b @ a)) * magnitude[:, None]).T


# %% exercise="ex-lora-dora" says="with B = 0 it is not the base"
# The columns are normalized, not the rows
def dora(x, weight, a, b, scale, magnitude):
    changed = weight + scale * (b @ a)
    return x @ (changed / changed.norm(dim=0).detach() * magnitude[:, None]).T


# %% exercise="ex-lora-dora" says="a row's length is not its magnitude"
# Divided by the lengths of the weight without the update
def dora(x, weight, a, b, scale, magnitude):
    length = weight.norm(dim=1).detach()
    return x @ ((weight + scale * (b @ a)) * (magnitude / length)[:, None]).T


# %% exercise="ex-lora-dora" says="the output is not PEFT's"
# The scale is forgotten
def dora(x, weight, a, b, scale, magnitude):
    changed = weight + b @ a
    return x @ (changed * (magnitude / changed.norm(dim=1).detach())[:, None]).T


# %% exercise="ex-lora-dora" says="a gradient passes through the length"
# The lengths are not treated as constants
def dora(x, weight, a, b, scale, magnitude):
    changed = weight + scale * (b @ a)
    return x @ (changed * (magnitude / changed.norm(dim=1))[:, None]).T


# %% exercise="ex-lora-pissa" says="residual and thin matrices do not add up to W"
# The weight itself in place of the residual
def pissa(weight, rank):
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root, weight


# %% exercise="ex-lora-pissa" says="these are not the top directions"
# The weakest directions, as MiLoRA takes them
def pissa(weight, rank):
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[-rank:].sqrt()
    a, b = root[:, None] * v[-rank:], u[:, -rank:] * root
    return a, b, weight - b @ a


# %% exercise="ex-lora-pissa" says="A and B do not share the singular values"
# All of the singular values in B
def pissa(weight, rank):
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    a, b = v[:rank], u[:, :rank] * s[:rank]
    return a, b, weight - b @ a


# %% exercise="ex-lora-levels" says="-1, 0 and 1 must stay"
# Every level moves
def improved(levels, numbers):
    nearest = (numbers[:, None] - levels).abs().argmin(dim=1)
    own = [numbers[nearest == code] for code in range(len(levels))]
    return torch.stack([o.mean() if len(o) else l for o, l in zip(own, levels)])


# %% exercise="ex-lora-levels" says="a level without numbers must stay"
# The mean of nothing is zero
def improved(levels, numbers):
    nearest = (numbers[:, None] - levels).abs().argmin(dim=1)
    new = levels.clone()
    for code, level in enumerate(levels.tolist()):
        if level not in (-1.0, 0.0, 1.0):
            new[code] = numbers[nearest == code].sum() / max(1, int((nearest == code).sum()))
    return new


# %% exercise="ex-lora-levels" says="the error does not fall"
# Nothing moves
def improved(levels, numbers):
    return levels.clone()
