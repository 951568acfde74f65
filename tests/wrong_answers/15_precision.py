# %% [markdown]
# Wrong answers to the exercises of chapter 15, second half, and what the checks must say of them.


# %% exercise="ex-precision-order" says="clip after unscaling"
# Clips the scaled gradients
def scaled_step(model, optimizer, scaler, losses, max_norm) -> bool:
    optimizer.zero_grad()
    for loss in losses:
        scaler.scale(loss).backward()
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
    for loss in losses:
        scaler.scale(loss).backward()
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
    for loss in losses:
        scaler.scale(loss).backward()
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
    for loss in losses:
        scaler.scale(loss).backward()
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


# %% exercise="ex-precision-fit" says="millions of short rows fit"
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
