# %% exercise="ex-training-noise" says="number of its targets"
# Gradients of summed losses, not of means
def noise_scale(trainer, batch):
    gradients = []
    for row in split_rows(batch, 1):
        trainer.model.zero_grad()
        trainer.accumulate(row)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    trainer.model.zero_grad()
    stacked = torch.stack(gradients)
    return float(stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum())


# %% exercise="ex-training-noise" says="one less than the rows"
# The variance of a population
def noise_scale(trainer, batch):
    gradients = []
    for row in split_rows(batch, 1):
        trainer.model.zero_grad()
        count = trainer.accumulate(row).targets
        gradients.append(torch.cat([(p.grad / count).flatten() for p in trainer.parameters]))
    trainer.model.zero_grad()
    stacked = torch.stack(gradients)
    return float(stacked.var(dim=0, correction=0).sum() / stacked.mean(dim=0).square().sum())


# %% exercise="ex-training-noise" says="is squared"
# The norm of the mean, not its square
def noise_scale(trainer, batch):
    gradients = []
    for row in split_rows(batch, 1):
        trainer.model.zero_grad()
        count = trainer.accumulate(row).targets
        gradients.append(torch.cat([(p.grad / count).flatten() for p in trainer.parameters]))
    trainer.model.zero_grad()
    stacked = torch.stack(gradients)
    return float(stacked.var(dim=0).sum() / stacked.mean(dim=0).norm())


# %% exercise="ex-training-noise" says="of its own"
# Gradients that pile up from row to row
def noise_scale(trainer, batch):
    gradients = []
    for row in split_rows(batch, 1):
        count = trainer.accumulate(row).targets
        gradients.append(torch.cat([(p.grad / count).flatten() for p in trainer.parameters]))
    trainer.model.zero_grad()
    stacked = torch.stack(gradients)
    return float(stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum())


# %% exercise="ex-training-noise" says="must be left empty"
# What was borrowed is not given back
def noise_scale(trainer, batch):
    gradients = []
    for row in split_rows(batch, 1):
        trainer.model.zero_grad()
        count = trainer.accumulate(row).targets
        gradients.append(torch.cat([(p.grad / count).flatten() for p in trainer.parameters]))
    stacked = torch.stack(gradients)
    return float(stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum())


# %% exercise="ex-training-average" says="copy the parameters"
# Views of the parameters, which the optimizer changes
class Averaged(Averaged):
    def attach(self, trainer):
        self.average = [p.detach() for p in trainer.parameters]
        trainer.register("average", self)


# %% exercise="ex-training-average" says="0.9 of the old"
# The weights changed places
class Averaged(Averaged):
    def after_step(self, trainer, report):
        if report.taken:
            torch._foreach_lerp_(self.average, [p.detach() for p in trainer.parameters], 0.9)


# %% exercise="ex-training-average" says="must not count"
# A step is taken for taken if its loss is finite
class Averaged(Averaged):
    def after_step(self, trainer, report):
        if math.isfinite(report.loss):
            torch._foreach_lerp_(self.average, [p.detach() for p in trainer.parameters], 0.1)


# %% exercise="ex-training-average" says="register the probe"
# Not registered
class Averaged(Averaged):
    def attach(self, trainer):
        self.average = [p.detach().clone() for p in trainer.parameters]


# %% exercise="ex-training-average" says="come back"
# Saved, but not taken from the state
class Averaged(Averaged):
    def load_state_dict(self, state):
        pass


# %% exercise="ex-training-interval" says="set the slope to zero"
# A factor of two lost
def best_interval(save_seconds, failure_seconds):
    return math.sqrt(save_seconds * failure_seconds)


# %% exercise="ex-training-interval" says="set the slope to zero"
# The root forgotten
def best_interval(save_seconds, failure_seconds):
    return 2 * save_seconds * failure_seconds


# %% exercise="ex-training-interval" says="one for repeating"
# A failure costs the whole interval
def wasted(interval, save_seconds, failure_seconds):
    return save_seconds / interval + interval / failure_seconds


# %% exercise="ex-training-interval" says="set the slope to zero"
# The best of some rounded intervals
def best_interval(save_seconds, failure_seconds):
    return min(range(1, 100_000), key=lambda t: wasted(t, save_seconds, failure_seconds))


# %% exercise="ex-training-layers" says="not a mean of ratios"
# The mean of the ratios of single tensors
def ratio_by_part(trainer, batch):
    def part_of(name):
        words = name.split(".")
        return ".".join(words[: 2 if words[0] == "blocks" else 1])

    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train_step(batch)
    found = {}
    for name, p in trainer.model.named_parameters():
        ratio = update_ratio([before[name]], [p.detach()])
        found.setdefault(part_of(name), []).append(ratio)
    return {part: sum(ratios) / len(ratios) for part, ratios in found.items()}


# %% exercise="ex-training-layers" says="before the step"
# Over the weights after the step
def ratio_by_part(trainer, batch):
    def parts():
        found = {}
        for name, p in trainer.model.named_parameters():
            words = name.split(".")
            part = ".".join(words[: 2 if words[0] == "blocks" else 1])
            found.setdefault(part, []).append(p.detach().clone())
        return found

    before = parts()
    trainer.train_step(batch)
    after = parts()
    return {part: update_ratio(after[part], before[part]) for part in before}


# %% exercise="ex-training-layers" says="one for each part"
# All blocks together
def ratio_by_part(trainer, batch):
    def parts():
        found = {}
        for name, p in trainer.model.named_parameters():
            found.setdefault(name.split(".")[0], []).append(p.detach().clone())
        return found

    before = parts()
    trainer.train_step(batch)
    after = parts()
    return {part: update_ratio(before[part], after[part]) for part in before}


# %% exercise="ex-training-layers" says="before the step"
# No copies, so that nothing seems to change
def ratio_by_part(trainer, batch):
    def parts():
        found = {}
        for name, p in trainer.model.named_parameters():
            words = name.split(".")
            part = ".".join(words[: 2 if words[0] == "blocks" else 1])
            found.setdefault(part, []).append(p.detach())
        return found

    before = parts()
    trainer.train_step(batch)
    after = parts()
    return {part: update_ratio(before[part], after[part]) for part in before}


# %% exercise="ex-training-layers" says="exactly one step"
# The gradient alone, without a step
def ratio_by_part(trainer, batch):
    trainer.accumulate(batch)
    found = {}
    for name, p in trainer.model.named_parameters():
        words = name.split(".")
        part = ".".join(words[: 2 if words[0] == "blocks" else 1])
        found[part] = float(p.grad.norm() / p.norm())
    return found
