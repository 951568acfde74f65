# %% [markdown]
# Wrong answers to the exercises of chapter 11, and what the checks must say of them.


# %% exercise="ex-model-crossover" says="is nearer to half"
# Length 1 has one token of attention in it, too
def crossover(config: ModelConfig) -> int:
    b = flops_per_token(config, 2) - flops_per_token(config, 1)
    return round(flops_per_token(config, 1) / b)


# %% exercise="ex-model-crossover" says="which is not one half"
# Six times the width, as if there were layers only, and no head
def crossover(config: ModelConfig) -> int:
    return 6 * config.d_model


# %% exercise="ex-model-crossover" says="which is not one half"
# Half of what the parameters cost, instead of half of all
def crossover(config: ModelConfig) -> int:
    b = flops_per_token(config, 2) - flops_per_token(config, 1)
    return round((flops_per_token(config, 1) / b - 1) / 2)


# %% exercise="ex-model-crossover" says="which is not one half"
# With the mask, attention counts only half of the pairs
def crossover(config: ModelConfig) -> int:
    one, three = (flops_per_token(config, n, causal=True) for n in (1, 3))
    return round(one / ((three - one) / 2) - 1)


# %% exercise="ex-model-crossover" says="expected a whole number of tokens"
# Not rounded
def crossover(config: ModelConfig) -> int:
    b = flops_per_token(config, 2) - flops_per_token(config, 1)
    return flops_per_token(config, 1) / b - 1


# %% exercise="ex-model-crossover" says="an odd one"
# Learned by heart
def crossover(config: ModelConfig) -> int:
    return {768: 6702, 4096: 28628, 1024: 5197}.get(config.d_model, 5000)


# %% exercise="ex-model-fit" says="do not fit with weights"
# The weights are forgotten
def tokens_that_fit(config: ModelConfig, memory: int, batch_size: int) -> int:
    return min(config.context_length, memory // cache_bytes(config, batch_size, 1))


# %% exercise="ex-model-fit" says="do not fit with weights"
# The cache of one row only
def tokens_that_fit(config: ModelConfig, memory: int, batch_size: int) -> int:
    room = memory - 2 * count_parameters(config)
    if room >= cache_bytes(config, 1, config.context_length):
        return config.context_length
    return max(0, room // cache_bytes(config, 1, 1))


# %% exercise="ex-model-fit" says="would fit"
# Without the sliding window
def tokens_that_fit(config: ModelConfig, memory: int, batch_size: int) -> int:
    room = memory - 2 * count_parameters(config)
    return min(config.context_length, max(0, room // cache_bytes(config, batch_size, 1)))


# %% exercise="ex-model-fit" says="would fit"
# Weights in 32 bits
def tokens_that_fit(config: ModelConfig, memory: int, batch_size: int) -> int:
    room = memory - 4 * count_parameters(config)
    if room >= cache_bytes(config, batch_size, config.context_length):
        return config.context_length
    return max(0, room // cache_bytes(config, batch_size, 1))


# %% exercise="ex-model-fit" says="whole tokens, and not -"
# A model without room for its weights has less than no tokens
def tokens_that_fit(config: ModelConfig, memory: int, batch_size: int) -> int:
    room = memory - 2 * count_parameters(config)
    if room >= cache_bytes(config, batch_size, config.context_length):
        return config.context_length
    return room // cache_bytes(config, batch_size, 1)


# %% exercise="ex-model-fit" says="whole tokens, and not"
# Rows that are longer than the model can read
def tokens_that_fit(config: ModelConfig, memory: int, batch_size: int) -> int:
    room = memory - 2 * count_parameters(config)
    return max(0, room // cache_bytes(config, batch_size, 1))


# %% exercise="ex-model-chunks" says="128 tokens are made at once"
# All logits at once
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


# %% exercise="ex-model-chunks" says="128 tokens are made at once"
# Nothing is kept, but all logits are made at once, and without the module of the head
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    def whole(hidden: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ model.lm_head.weight.T, targets.flatten())

    hidden = model.hidden_states(ids).flatten(0, 1)
    return checkpoint(whole, hidden, use_reentrant=False)


# %% exercise="ex-model-chunks" says="are kept for the backward pass"
# Made in chunks, and all kept
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    hidden, wanted = model.hidden_states(ids).flatten(0, 1), targets.flatten()
    pieces = zip(hidden.split(chunk), wanted.split(chunk), strict=True)
    total = sum(F.cross_entropy(model.lm_head(h), w, reduction="sum") for h, w in pieces)
    return total / (wanted != -100).sum()


# %% exercise="ex-model-chunks" says="the mean over what counts"
# The mean of the means of the chunks, in which not as many targets count
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    def piece(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden), wanted)

    hidden, wanted = model.hidden_states(ids).flatten(0, 1), targets.flatten()
    pieces = list(zip(hidden.split(chunk), wanted.split(chunk), strict=True))
    return sum(checkpoint(piece, *pair, use_reentrant=False) for pair in pieces) / len(pieces)


# %% exercise="ex-model-chunks" says="the mean over what counts"
# Divided by all tokens, also those that do not count
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    def piece(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden), wanted, reduction="sum")

    hidden, wanted = model.hidden_states(ids).flatten(0, 1), targets.flatten()
    pieces = zip(hidden.split(chunk), wanted.split(chunk), strict=True)
    return sum(checkpoint(piece, *pair, use_reentrant=False) for pair in pieces) / wanted.numel()


# %% exercise="ex-model-chunks" says="tokens are made at once"
# Chunks of rows, not of tokens
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    def piece(hidden: Tensor, wanted: Tensor) -> Tensor:
        logits = model.lm_head(hidden).flatten(0, 1)
        return F.cross_entropy(logits, wanted.flatten(), reduction="sum")

    pieces = zip(model.hidden_states(ids).split(chunk), targets.split(chunk), strict=True)
    total = sum(checkpoint(piece, *pair, use_reentrant=False) for pair in pieces)
    return total / (targets != -100).sum()


# %% exercise="ex-model-chunks" says="gets no gradient"
# The head learns, the rest does not
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    def piece(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden), wanted, reduction="sum")

    hidden, wanted = model.hidden_states(ids).flatten(0, 1).detach(), targets.flatten()
    pieces = zip(hidden.split(chunk), wanted.split(chunk), strict=True)
    total = sum(checkpoint(piece, *pair, use_reentrant=False) for pair in pieces)
    return total / (wanted != -100).sum()


# %% exercise="ex-model-chunks" says="the loss has no gradient"
# Nothing is kept because nothing is tracked
def chunked_loss(model: TransformerLM, ids: Tensor, targets: Tensor, chunk: int) -> Tensor:
    with torch.no_grad():
        hidden, wanted = model.hidden_states(ids).flatten(0, 1), targets.flatten()
        pieces = zip(hidden.split(chunk), wanted.split(chunk), strict=True)
        total = sum(F.cross_entropy(model.lm_head(h), w, reduction="sum") for h, w in pieces)
    return total / (wanted != -100).sum()


# %% exercise="ex-model-deepen" says="it never begins to learn"
# All matrices of the new blocks are zero
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    deeper = TransformerLM(ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers}))
    deeper.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for block in deeper.blocks[model.config.n_layers :]:
            for parameter in block.parameters():
                parameter.zero_()
    return deeper


# %% exercise="ex-model-deepen" says="the function is another"
# Only attention is silenced
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    deeper = TransformerLM(ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers}))
    deeper.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for block in deeper.blocks[model.config.n_layers :]:
            block.attention.o_proj.weight.zero_()
    return deeper


# %% exercise="ex-model-deepen" says="the function is another"
# The last block again and again
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    deeper = TransformerLM(ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers}))
    deeper.load_state_dict(model.state_dict(), strict=False)
    for block in deeper.blocks[model.config.n_layers :]:
        block.load_state_dict(model.blocks[-1].state_dict())
    return deeper


# %% exercise="ex-model-deepen" says="in the configuration, too"
# Blocks are added to a copy, whose configuration says nothing of them
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    deeper = deepcopy(model)
    for _ in range(n_layers - len(model.blocks)):
        block = deepcopy(model.blocks[-1])
        torch.nn.init.zeros_(block.attention.o_proj.weight)
        torch.nn.init.zeros_(block.feed_forward.down_proj.weight)
        deeper.blocks.append(block)
    return deeper


# %% exercise="ex-model-deepen" says="the old model has been changed"
# The model itself grows
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    for _ in range(n_layers - len(model.blocks)):
        block = deepcopy(model.blocks[-1])
        torch.nn.init.zeros_(block.attention.o_proj.weight)
        torch.nn.init.zeros_(block.feed_forward.down_proj.weight)
        model.blocks.append(block)
    model.config = ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers})
    return model


# %% exercise="ex-model-deepen" says="is shared with the old model"
# The old blocks themselves are in the new model
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    deeper = TransformerLM(ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers}))
    deeper.load_state_dict(model.state_dict(), strict=False)
    for number, block in enumerate(deeper.blocks):
        if number < len(model.blocks):
            deeper.blocks[number] = model.blocks[number]
        else:
            torch.nn.init.zeros_(block.attention.o_proj.weight)
            torch.nn.init.zeros_(block.feed_forward.down_proj.weight)
    return deeper


# %% exercise="ex-model-deepen" says="new blocks come last"
# New blocks come first
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    deeper = TransformerLM(ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers}))
    deeper.load_state_dict(model.state_dict(), strict=False)
    new = n_layers - len(model.blocks)
    for block in deeper.blocks[:new]:
        torch.nn.init.zeros_(block.attention.o_proj.weight)
        torch.nn.init.zeros_(block.feed_forward.down_proj.weight)
    for block, old in zip(deeper.blocks[new:], model.blocks, strict=True):
        block.load_state_dict(old.state_dict())
    return deeper


# %% exercise="ex-model-deepen" says="it never begins to learn"
# The new blocks are frozen
def deepen(model: TransformerLM, n_layers: int) -> TransformerLM:
    deeper = TransformerLM(ModelConfig.from_dict(model.config.to_dict() | {"n_layers": n_layers}))
    deeper.load_state_dict(model.state_dict(), strict=False)
    for block in deeper.blocks[model.config.n_layers :]:
        torch.nn.init.zeros_(block.attention.o_proj.weight)
        torch.nn.init.zeros_(block.feed_forward.down_proj.weight)
        block.requires_grad_(False)
    return deeper


# %% exercise="ex-model-phi3" says="with 2 heads of keys"
# Three equal parts, which is right only where each head has a key
def read_phi3(folder: Path) -> TransformerLM:
    entries, tensors = json.loads((folder / "config.json").read_text()), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = {name: tensor}
        if "qkv_proj" in name:
            parts = {
                name.replace("qkv", kind): piece
                for kind, piece in zip("qkv", tensor.chunk(3), strict=True)
            }
        if "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        tensors |= {key: part.contiguous() for key, part in parts.items()}
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, Path(place, "model.safetensors"))
        Path(place, "config.json").write_text(json.dumps(entries | {"model_type": "llama"}))
        return TransformerLM.from_pretrained(place)


# %% exercise="ex-model-phi3" says="our parts of gate_up_proj have other rows"
# Up comes before gate
def read_phi3(folder: Path) -> TransformerLM:
    entries, tensors = json.loads((folder / "config.json").read_text()), {}
    width = entries["hidden_size"] // entries["num_attention_heads"]
    heads = [entries[f"num_{kind}_heads"] * width for kind in ("attention", "key_value")]
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = {name: tensor}
        if "qkv_proj" in name:
            pieces = zip("qkv", tensor.split([heads[0], heads[1], heads[1]]), strict=True)
            parts = {name.replace("qkv", kind): piece for kind, piece in pieces}
        if "gate_up_proj" in name:
            up, gate = tensor.chunk(2)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        tensors |= {key: part.contiguous() for key, part in parts.items()}
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, Path(place, "model.safetensors"))
        Path(place, "config.json").write_text(json.dumps(entries | {"model_type": "llama"}))
        return TransformerLM.from_pretrained(place)


# %% exercise="ex-model-phi3" says="our parts of qkv_proj have other rows"
# Heads of q, k and v by turns
def read_phi3(folder: Path) -> TransformerLM:
    entries, tensors = json.loads((folder / "config.json").read_text()), {}
    width = entries["hidden_size"] // entries["num_attention_heads"]
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = {name: tensor}
        if "qkv_proj" in name:
            by_turns = tensor.view(-1, 3, width, tensor.size(1))
            parts = {
                name.replace("qkv", kind): by_turns[:, i].flatten(0, 1)
                for i, kind in enumerate("qkv")
            }
        if "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        tensors |= {key: part.contiguous() for key, part in parts.items()}
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, Path(place, "model.safetensors"))
        Path(place, "config.json").write_text(json.dumps(entries | {"model_type": "llama"}))
        return TransformerLM.from_pretrained(place)


# %% exercise="ex-model-phi3" says="model_type"
# Tensors are cut, but the folder still says that it is a Phi-3
def read_phi3(folder: Path) -> TransformerLM:
    entries, tensors = json.loads((folder / "config.json").read_text()), {}
    width = entries["hidden_size"] // entries["num_attention_heads"]
    heads = [entries[f"num_{kind}_heads"] * width for kind in ("attention", "key_value")]
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = {name: tensor}
        if "qkv_proj" in name:
            pieces = zip("qkv", tensor.split([heads[0], heads[1], heads[1]]), strict=True)
            parts = {name.replace("qkv", kind): piece for kind, piece in pieces}
        if "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        tensors |= {key: part.contiguous() for key, part in parts.items()}
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, Path(place, "model.safetensors"))
        Path(place, "config.json").write_text(json.dumps(entries))
        return TransformerLM.from_pretrained(place)
