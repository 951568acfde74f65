# %% exercise="ex-generation-sigma" says="not V - 1"
# The deviation of a sample, which PyTorch takes by default
def keep_n_sigma(logits, n):
    least = logits.amax(-1, keepdim=True) - n * logits.std(-1, keepdim=True)
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


# %% exercise="ex-generation-sigma" says="each row has a deviation of its own"
# One deviation for the whole batch
def keep_n_sigma(logits, n):
    least = logits.amax(-1, keepdim=True) - n * logits.std(correction=0)
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


# %% exercise="ex-generation-sigma" says="rows sum to one"
# Cut, but not scaled up again
def keep_n_sigma(logits, n):
    least = logits.amax(-1, keepdim=True) - n * logits.std(-1, correction=0, keepdim=True)
    return torch.where(logits < least, 0, logits.softmax(-1))


# %% exercise="ex-generation-sigma" says="the bar itself is inside"
# What lies on the bar is cut as well
def keep_n_sigma(logits, n):
    least = logits.amax(-1, keepdim=True) - n * logits.std(-1, correction=0, keepdim=True)
    return logits.masked_fill(logits <= least, -torch.inf).softmax(-1)


# %% exercise="ex-generation-sigma" says="must not depend on temperature"
# The deviation of probabilities, not of logits
def keep_n_sigma(logits, n):
    p = logits.softmax(-1)
    kept = torch.where(
        p < p.amax(-1, keepdim=True) - n * p.std(-1, correction=0, keepdim=True), 0, p
    )
    return kept / kept.sum(-1, keepdim=True)


# %% exercise="ex-generation-gumbel" says="the largest number wins"
# The noise with the wrong sign
def gumbel_draw(logits, uniforms):
    return (logits + (-uniforms.log()).log()).argmax(-1)


# %% exercise="ex-generation-gumbel" says="the largest number wins"
# One logarithm forgotten
def gumbel_draw(logits, uniforms):
    return (logits - uniforms.log()).argmax(-1)


# %% exercise="ex-generation-gumbel" says="impossible is never drawn"
# Noise added to probabilities
def gumbel_draw(logits, uniforms):
    return (logits.softmax(-1) - (-uniforms.log()).log()).argmax(-1)


# %% exercise="ex-generation-gumbel" says="not the distribution softmax"
# Plain uniforms as noise
def gumbel_draw(logits, uniforms):
    return (logits + uniforms).argmax(-1)


# %% exercise="ex-generation-gumbel" says="one token for each row"
# One token for the whole batch
def gumbel_draw(logits, uniforms):
    return (logits - (-uniforms.log()).log()).argmax()


# %% exercise="ex-generation-guesses" says="does not pay"
# As many tokens as possible, whatever they cost
def best_n_draft(acceptance, cost, most=64):
    return max(range(most + 1), key=lambda n: expected_tokens(acceptance, n))


# %% exercise="ex-generation-guesses" says="does not pay"
# At least one guess
def best_n_draft(acceptance, cost, most=64):
    return max(range(1, most + 1), key=lambda n: expected_tokens(acceptance, n) / (1 + n * cost))


# %% exercise="ex-generation-guesses" says="equally good"
# The largest of several that are equally good
def best_n_draft(acceptance, cost, most=64):
    return max(
        reversed(range(most + 1)), key=lambda n: expected_tokens(acceptance, n) / (1 + n * cost)
    )


# %% exercise="ex-generation-guesses" says="as many as one may"
# A range that ends too early
def best_n_draft(acceptance, cost, most=64):
    return max(range(most), key=lambda n: expected_tokens(acceptance, n) / (1 + n * cost))


# %% exercise="ex-generation-guesses" says="does not pay"
# The token that the target adds is forgotten
def best_n_draft(acceptance, cost, most=64):
    return max(range(most + 1), key=lambda n: (expected_tokens(acceptance, n) - 1) / (1 + n * cost))


# %% exercise="ex-generation-ngrams" says="followed by 2 and by 3"
# Only the last token that followed is remembered
class Phrases:
    def __init__(self, n):
        self.n, self.ids, self.followers = n, [], {}

    def add(self, token):
        self.ids.append(token)
        if len(self.ids) >= self.n:
            self.followers[tuple(self.ids[-self.n : -1])] = token
        end = tuple(self.ids[len(self.ids) - self.n + 1 :])
        return {self.followers[end]} if end in self.followers else set()


# %% exercise="ex-generation-ngrams" says="nothing may return"
# A slice from minus zero on
class Phrases:
    def __init__(self, n):
        self.n, self.ids, self.followers = n, [], {}

    def add(self, token):
        self.ids.append(token)
        if len(self.ids) >= self.n:
            self.followers.setdefault(tuple(self.ids[-self.n : -1]), set()).add(token)
        return self.followers.get(tuple(self.ids[-(self.n - 1) :]), set())


# %% exercise="ex-generation-ngrams" says="must not grow with the text"
# All of the text again at each step
class Phrases:
    def __init__(self, n):
        self.n, self.ids = n, []

    def add(self, token):
        self.ids.append(token)
        last = self.ids[len(self.ids) - self.n + 1 :]
        runs = [self.ids[at : at + self.n] for at in range(len(self.ids) - self.n + 1)]
        return {run[-1] for run in runs if run[:-1] == last}


# %% exercise="ex-generation-ngrams" says="1 2 has been followed by 3"
# Runs of n tokens looked up in place of their first n - 1
class Phrases:
    def __init__(self, n):
        self.n, self.ids, self.followers = n, [], {}

    def add(self, token):
        self.followers.setdefault(tuple(self.ids[-self.n :]), set()).add(token)
        self.ids.append(token)
        return self.followers.get(tuple(self.ids[-self.n :]), set())


# %% exercise="ex-generation-groups" says="is 127 steps"
# The grid has one number more on the negative side
def round_in_groups(weight, bits, group):
    groups = weight.view(len(weight), -1, group)
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 2 ** (bits - 1)
    return ((groups / step).round() * step).view_as(weight)


# %% exercise="ex-generation-groups" says="of its own group"
# One step for a row, whatever the groups
def round_in_groups(weight, bits, group):
    step = weight.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


# %% exercise="ex-generation-groups" says="of its own group"
# Groups of rows
def round_in_groups(weight, bits, group):
    if group == weight.shape[1]:
        groups = weight.view(len(weight), -1, group)
    else:
        groups = weight.t().reshape(-1, group)
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    rounded = (groups / step).round() * step
    if group == weight.shape[1]:
        return rounded.view_as(weight)
    return rounded.reshape(weight.shape[1], -1).t()


# %% exercise="ex-generation-groups" says="zeros stays zero"
# Nothing divided by nothing
def round_in_groups(weight, bits, group):
    groups = weight.view(len(weight), -1, group)
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / step).round() * step).view_as(weight)


# %% exercise="ex-generation-groups" says="is 127 steps"
# Cut off in place of rounded
def round_in_groups(weight, bits, group):
    groups = weight.view(len(weight), -1, group)
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return ((groups / step).trunc() * step).view_as(weight)
