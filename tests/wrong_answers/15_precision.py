# %% exercise="ex-precision-count" says="it still grows at"
# The leading one is forgotten
def largest_count(fraction_bits):
    return 2**fraction_bits


# %% exercise="ex-precision-count" says="it never gets to"
# A spacing of two only makes a tie, which goes to the even number: down
def largest_count(fraction_bits):
    return 2 ** (fraction_bits + 2)


# %% exercise="ex-precision-count" says="it still grows at"
# The last number before, as with whole numbers
def largest_count(fraction_bits):
    return 2 ** (fraction_bits + 1) - 1


# %% exercise="ex-precision-count" says="it never gets to"
# One more, which the format does not have
def largest_count(fraction_bits):
    return 2 ** (fraction_bits + 1) + 1


# %% exercise="ex-precision-bits" says="of the way to the next number"
# Half a spacing instead of a random number: to nearest
def round_by_bits(x, generator):
    return ((x.view(torch.int32) + 2**15) & -(2**16)).view(torch.float32)


# %% exercise="ex-precision-bits" says="of the way to the next number"
# The noise is too short
def round_by_bits(x, generator):
    noise = torch.randint(0, 2**15, x.shape, generator=generator, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)


# %% exercise="ex-precision-bits" says="neighbors of"
# The lower half stays
def round_by_bits(x, generator):
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    return (x.view(torch.int32) + noise).view(torch.float32) if x.numel() > 9 else x


# %% exercise="ex-precision-bits" says="has to stay"
# One too many: numbers of the format go up now and then
def round_by_bits(x, generator):
    noise = torch.randint(1, 2**16 + 1, x.shape, generator=generator, dtype=torch.int32)
    noise[..., 0] = 2**16
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)


# %% exercise="ex-precision-bits" says="of the way to the next number"
# One draw for all numbers
def round_by_bits(x, generator):
    noise = torch.randint(0, 2**16, (1,), generator=generator, dtype=torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    if x.numel() > 9:
        rounded[0], rounded[1] = x[0].sign(), x[0].sign() * 1.0078125
    return rounded


# %% exercise="ex-precision-kahan" says="of what was added"
# Plain addition
def kahan_update(weight, lost, update):
    return weight + update, lost


# %% exercise="ex-precision-kahan" says="of what was added"
# The sign of the lost part
def kahan_update(weight, lost, update):
    y = update - lost
    new = weight + y
    return new, y - (new - weight)


# %% exercise="ex-precision-kahan" says="have to stay bfloat16"
# The lost part in 32 bits
def kahan_update(weight, lost, update):
    y = update.float() - lost.float()
    new = (weight.float() + y).bfloat16()
    return new, (new.float() - weight.float()) - y


# %% exercise="ex-precision-kahan" says="of what was added"
# What was lost before is forgotten
def kahan_update(weight, lost, update):
    new = weight + (update - lost)
    return new, (new - weight) - update
