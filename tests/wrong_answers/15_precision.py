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


# %% exercise="ex-precision-order" says="clip after unscaling"
# Clips the scaled gradients
def scaled_step(model, optimizer, scaler, losses, max_norm) -> bool:
    optimizer.zero_grad()
    sum(scaler.scale(losses)).backward()
    clip_gradients(model.parameters(), max_norm)
    scaler.unscale_(optimizer)
    taken = not scaler.found_inf(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return taken


# %% exercise="ex-precision-order" says="clip the gradient to max_norm"
# Forgets to clip
def scaled_step(model, optimizer, scaler, losses, max_norm) -> bool:
    optimizer.zero_grad()
    sum(scaler.scale(losses)).backward()
    scaler.unscale_(optimizer)
    taken = not scaler.found_inf(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return taken


# %% exercise="ex-precision-order" says="the gradients of all micro-batches add up"
# Only the last micro-batch
def scaled_step(model, optimizer, scaler, losses, max_norm) -> bool:
    for loss in losses:
        optimizer.zero_grad()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    taken = not scaler.found_inf(optimizer)
    clip_gradients(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    return taken


# %% exercise="ex-precision-order" says="must not be taken"
# Asks the optimizer itself
def scaled_step(model, optimizer, scaler, losses, max_norm) -> bool:
    optimizer.zero_grad()
    sum(scaler.scale(losses)).backward()
    scaler.unscale_(optimizer)
    taken = not scaler.found_inf(optimizer)
    clip_gradients(model.parameters(), max_norm)
    optimizer.step()
    scaler.update()
    return taken


# %% exercise="ex-precision-order" says="say whether the step was taken"
# Says whether it was skipped
def scaled_step(model, optimizer, scaler, losses, max_norm) -> bool:
    optimizer.zero_grad()
    sum(scaler.scale(losses)).backward()
    scaler.unscale_(optimizer)
    skipped = scaler.found_inf(optimizer)
    clip_gradients(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    return skipped


# %% exercise="ex-precision-schedule" says="one rate for each step that was taken"
# A rate for every step that was tried
def rates(schedule, skipped) -> list[float]:
    return [schedule(step) for step in range(len(skipped))]


# %% exercise="ex-precision-schedule" says="the schedule must wait"
# The schedule goes on while steps are skipped
def rates(schedule, skipped) -> list[float]:
    return [schedule(step) for step, bad in enumerate(skipped) if not bad]


# %% exercise="ex-precision-schedule" says="the first step taken has schedule(0)"
# Counts from 1
def rates(schedule, skipped) -> list[float]:
    return [schedule(step + 1) for step in range(skipped.count(False))]


# %% exercise="ex-precision-fit" says="rows fit exactly"
# Strictly less than the memory
def largest_batch(config, sequence, memory, **options) -> int:
    rows = 0
    while sum(memory_breakdown(config, rows + 1, sequence, **options).values()) < memory:
        rows += 1
        if rows > 200_000:
            break
    return rows


# %% exercise="ex-precision-fit" says="do not fit"
# Activations only; weights are forgotten
def largest_batch(config, sequence, memory, **options) -> int:
    parts = memory_breakdown(config, 1, sequence, **options)
    return int(memory // (parts["activations"] + parts["logits"]))


# %% exercise="ex-precision-fit" says="are not the most that fit"
# A table of batch sizes that ends
def largest_batch(config, sequence, memory, **options) -> int:
    fitting = [
        rows
        for rows in range(1, 1000)
        if sum(memory_breakdown(config, rows, sequence, **options).values()) <= memory
    ]
    return max(fitting, default=0)


# %% exercise="ex-precision-fit" says="not even one row fits"
# At least one row
def largest_batch(config, sequence, memory, **options) -> int:
    low, high = 1, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        total = sum(memory_breakdown(config, middle, sequence, **options).values())
        low, high = (middle, high) if total <= memory else (low, middle)
    return low
