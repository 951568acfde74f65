# %% [markdown]
# Wrong answers to the exercises of chapter 08, each with what the check must say about it.

# %% exercise="ex-positions-gradient" says="add up"
# Assigned: the last place of an id wins
def embedding_gradient(ids, gradient, vocab_size):
    table = torch.zeros(vocab_size, gradient.size(-1), dtype=gradient.dtype)
    table[ids] = gradient
    return table


# %% exercise="ex-positions-gradient" says="add up"
# += with an index, which adds once for each id, however often it stands there
def embedding_gradient(ids, gradient, vocab_size):
    table = torch.zeros(vocab_size, gradient.size(-1), dtype=gradient.dtype)
    table[ids.flatten()] += gradient.flatten(0, -2)
    return table


# %% exercise="ex-positions-gradient" says="one row for each id of the vocabulary"
# A table that ends with the largest id that occurs
def embedding_gradient(ids, gradient, vocab_size):
    table = torch.zeros(int(ids.max()) + 1, gradient.size(-1), dtype=gradient.dtype)
    return table.index_add(0, ids.flatten(), gradient.flatten(0, -2))


# %% exercise="ex-positions-gradient" says="add up"
# The mean over the places of an id
def embedding_gradient(ids, gradient, vocab_size):
    table = torch.zeros(vocab_size, gradient.size(-1), dtype=gradient.dtype)
    counts = ids.flatten().bincount(minlength=vocab_size).clamp(min=1)
    return table.index_add(0, ids.flatten(), gradient.flatten(0, -2)) / counts[:, None]


# %% exercise="ex-positions-shift" says="not forward"
# The transpose: the rotation of pairs (cosine, sine), taken over from RoPE
def shift_matrix(d_model, shift):
    angles = shift * rope_frequencies(d_model)
    blocks = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1)
    return torch.block_diag(*blocks.view(-1, 2, 2))


# %% exercise="ex-positions-shift" says="its own cosine only"
# Sines in the first half, cosines in the second
def shift_matrix(d_model, shift):
    angles = shift * rope_frequencies(d_model)
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat((torch.cat((cos, sin), dim=1), torch.cat((-sin, cos), dim=1)))


# %% exercise="ex-positions-shift" says="a frequency of its own"
# One angle for all pairs
def shift_matrix(d_model, shift):
    angle = torch.tensor(float(shift))
    block = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos())).view(2, 2)
    return torch.block_diag(*[block] * (d_model // 2))


# %% exercise="ex-positions-shift" says="the first pair"
# Degrees for radians
def shift_matrix(d_model, shift):
    angles = torch.deg2rad(shift * rope_frequencies(d_model))
    blocks = torch.stack((angles.cos(), angles.sin(), -angles.sin(), angles.cos()), dim=-1)
    return torch.block_diag(*blocks.view(-1, 2, 2))


# %% exercise="ex-positions-base" says="not the smallest base"
# Without 2 pi: half a wavelength and more beyond the context
def least_base(d_head, context_length):
    return context_length ** (d_head / (d_head - 2))


# %% exercise="ex-positions-base" says="more than once"
# The pair after the last, i = d / 2, taken for the slowest
def least_base(d_head, context_length):
    return context_length / (2 * math.pi)


# %% exercise="ex-positions-base" says="more than once"
# The exponent upside down
def least_base(d_head, context_length):
    return (context_length / (2 * math.pi)) ** ((d_head - 2) / d_head)


# %% exercise="ex-positions-base" says="not the smallest base"
# A base that is enough for all three, from Llama 3
def least_base(d_head, context_length):
    return 1e7


# %% exercise="ex-positions-partial" says="only the first 8"
# The last dimensions turn
def apply_partial_rope(x, cos, sin):
    rest, rotated = x.tensor_split([x.size(-1) - 2 * cos.size(-1)], dim=-1)
    return torch.cat((rest, apply_rope(rotated, cos, sin)), dim=-1)


# %% exercise="ex-positions-partial" says="pairs are"
# Neighbors make the pairs
def apply_partial_rope(x, cos, sin):
    rotated, rest = x.tensor_split([2 * cos.size(-1)], dim=-1)
    return torch.cat((apply_rope(rotated, cos, sin, layout="interleaved"), rest), dim=-1)


# %% exercise="ex-positions-partial" says="only the first 8"
# Angles of zero for the other pairs, but pairs half a head apart
def apply_partial_rope(x, cos, sin):
    missing = x.size(-1) // 2 - cos.size(-1)
    cos = nn.functional.pad(cos, (0, missing), value=1.0)
    return apply_rope(x, cos, nn.functional.pad(sin, (0, missing)))


# %% exercise="ex-positions-partial" says="all dimensions come back"
# The rest is lost
def apply_partial_rope(x, cos, sin):
    return apply_rope(x[..., : 2 * cos.size(-1)], cos, sin)


# %% exercise="ex-positions-partial" says="the other way"
# Rotated by minus the angle
def apply_partial_rope(x, cos, sin):
    rotated, rest = x.tensor_split([2 * cos.size(-1)], dim=-1)
    return torch.cat((apply_rope(rotated, cos, -sin), rest), dim=-1)


# %% exercise="ex-positions-alibi" says="1/2, 1/4"
# Heads counted from 0
def alibi_slopes(n_heads):
    return 2.0 ** (-8 * torch.arange(n_heads) / n_heads)


# %% exercise="ex-positions-alibi" says="the last is always 1/256"
# The slopes of eight heads, for any number of them
def alibi_slopes(n_heads):
    return 0.5 ** torch.arange(1, n_heads + 1)


# %% exercise="ex-positions-alibi" says="count less"
# Added instead of subtracted
def alibi_bias(n_heads, position_ids):
    distance = (position_ids[:, :, None] - position_ids[:, None, :]).clamp(min=0)
    return alibi_slopes(n_heads)[:, None, None] * distance[:, None]


# %% exercise="ex-positions-alibi" says="0 for keys after the query"
# Distances in both directions
def alibi_bias(n_heads, position_ids):
    distance = (position_ids[:, :, None] - position_ids[:, None, :]).abs()
    return -alibi_slopes(n_heads)[:, None, None] * distance[:, None]


# %% exercise="ex-positions-alibi" says="not of places"
# Distances within the row, whatever its position ids
def alibi_bias(n_heads, position_ids):
    places = torch.arange(position_ids.size(1))
    distance = (places[:, None] - places).clamp(min=0).expand(len(position_ids), -1, -1)
    return -alibi_slopes(n_heads)[:, None, None] * distance[:, None]
