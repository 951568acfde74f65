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
def faults(base: nn.Module, model: nn.Module) -> dict[str, str]:
    found = {}
    for name, layer in lora_layers(model).items():
        if not layer.lora_b.any():
            found[name] = "dead"
        elif not torch.equal(layer.base.weight, base.get_submodule(name).weight):
            found[name] = "moved"
        elif not (layer.lora_a.isfinite().all() and layer.lora_b.isfinite().all()):
            found[name] = "not finite"
    return found


# %% exercise="ex-lora-broken" says="A is zero, but B is not"
# Either of the two
def faults(base: nn.Module, model: nn.Module) -> dict[str, str]:
    found = {}
    for name, layer in lora_layers(model).items():
        if not layer.lora_a.any():
            found[name] = "dead"
        elif not torch.equal(layer.base.weight, base.get_submodule(name).weight):
            found[name] = "moved"
        elif not (layer.lora_a.isfinite().all() and layer.lora_b.isfinite().all()):
            found[name] = "not finite"
    return found


# %% exercise="ex-lora-broken" says="a single number of the base has changed"
# Compared as nearly equal
def faults(base: nn.Module, model: nn.Module) -> dict[str, str]:
    found = {}
    for name, layer in lora_layers(model).items():
        if not layer.lora_a.any() and not layer.lora_b.any():
            found[name] = "dead"
        elif not torch.allclose(layer.base.weight, base.get_submodule(name).weight, atol=0.01):
            found[name] = "moved"
        elif not (layer.lora_a.isfinite().all() and layer.lora_b.isfinite().all()):
            found[name] = "not finite"
    return found


# %% exercise="ex-lora-broken" says="infinity is not a number"
# Only NaN is looked for
def faults(base: nn.Module, model: nn.Module) -> dict[str, str]:
    found = {}
    for name, layer in lora_layers(model).items():
        if not layer.lora_a.any() and not layer.lora_b.any():
            found[name] = "dead"
        elif not torch.equal(layer.base.weight, base.get_submodule(name).weight):
            found[name] = "moved"
        elif layer.lora_a.isnan().any() or layer.lora_b.isnan().any():
            found[name] = "not finite"
    return found
