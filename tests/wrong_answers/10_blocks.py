# %% [markdown]
# Wrong answers to the exercises of chapter 10, each with what the check must say about it.

# %% exercise="ex-blocks-fold" says="column j"
# Rows instead of columns: the gain of what comes out, not of what goes in
def fold_gain(norm, linear):
    with torch.no_grad():
        linear.weight.mul_(norm.weight[:, None])
        norm.weight.fill_(1.0)


# %% exercise="ex-blocks-fold" says="the gain becomes one"
# The gain stays, so that it acts twice
def fold_gain(norm, linear):
    with torch.no_grad():
        linear.weight.mul_(norm.weight)


# %% exercise="ex-blocks-fold" says="the gain becomes one"
# The gain becomes zero
def fold_gain(norm, linear):
    with torch.no_grad():
        linear.weight.mul_(norm.weight)
        norm.weight.zero_()


# %% exercise="ex-blocks-fold" says="the bias is added after"
# The bias is multiplied, too
def fold_gain(norm, linear):
    with torch.no_grad():
        linear.weight.mul_(norm.weight)
        linear.bias.mul_(norm.weight)
        norm.weight.fill_(1.0)


# %% exercise="ex-blocks-fold" says="column j"
# Divided, as if the gain were taken out of the matrix
def fold_gain(norm, linear):
    with torch.no_grad():
        linear.weight.div_(norm.weight)
        norm.weight.fill_(1.0)


# %% exercise="ex-blocks-center" says="the logits stay the same"
# Matrices centered over their inputs
def center_writes(model):
    with torch.no_grad():
        for table in (model.embedding, model.positions):
            table.weight.sub_(table.weight.mean(dim=1, keepdim=True))
        for block in model.blocks:
            for matrix in (block.attention.o_proj, block.feed_forward.down_proj):
                matrix.weight.sub_(matrix.weight.mean(dim=0, keepdim=True))
                matrix.weight.sub_(matrix.weight.mean(dim=1, keepdim=True))


# %% exercise="ex-blocks-center" says="after block 0"
# Matrices centered over the wrong axis
def center_writes(model):
    with torch.no_grad():
        for table in (model.embedding, model.positions):
            table.weight.sub_(table.weight.mean(dim=1, keepdim=True))
        for block in model.blocks:
            for matrix in (block.attention.o_proj, block.feed_forward.down_proj):
                matrix.weight.sub_(matrix.weight.mean(dim=1, keepdim=True))


# %% exercise="ex-blocks-center" says="the positions"
# Positions are forgotten
def center_writes(model):
    with torch.no_grad():
        model.embedding.weight.sub_(model.embedding.weight.mean(dim=1, keepdim=True))
        for block in model.blocks:
            for matrix in (block.attention.o_proj, block.feed_forward.down_proj):
                matrix.weight.sub_(matrix.weight.mean(dim=0, keepdim=True))


# %% exercise="ex-blocks-center" says="after block 0"
# Only attention writes
def center_writes(model):
    with torch.no_grad():
        for table in (model.embedding, model.positions):
            table.weight.sub_(table.weight.mean(dim=1, keepdim=True))
        for block in model.blocks:
            weight = block.attention.o_proj.weight
            weight.sub_(weight.mean(dim=0, keepdim=True))


# %% exercise="ex-blocks-center" says="the embeddings"
# One mean for a whole table
def center_writes(model):
    with torch.no_grad():
        for table in (model.embedding, model.positions):
            table.weight.sub_(table.weight.mean())
        for block in model.blocks:
            for matrix in (block.attention.o_proj, block.feed_forward.down_proj):
                matrix.weight.sub_(matrix.weight.mean(dim=0, keepdim=True))


# %% exercise="ex-blocks-swiglu" says="the derivative of SiLU"
# The derivative of the sigmoid alone
def swiglu_gradients(a, b, to_out):
    gate = torch.sigmoid(a)
    return to_out * b * gate * (1 - gate), to_out * a * gate


# %% exercise="ex-blocks-swiglu" says="the derivative of SiLU"
# The gate taken for a constant
def swiglu_gradients(a, b, to_out):
    gate = torch.sigmoid(a)
    return to_out * b * gate, to_out * a * gate


# %% exercise="ex-blocks-swiglu" says="times that of the result"
# The gradient of the result is left out
def swiglu_gradients(a, b, to_out):
    gate = torch.sigmoid(a)
    return b * gate * (1 + a * (1 - gate)), a * gate


# %% exercise="ex-blocks-swiglu" says="that of a product"
# The two gradients in the other order
def swiglu_gradients(a, b, to_out):
    gate = torch.sigmoid(a)
    return to_out * a * gate, to_out * b * gate * (1 + a * (1 - gate))


# %% exercise="ex-blocks-swiglu" says="SiLU is flat"
# Exponentials that overflow
def swiglu_gradients(a, b, to_out):
    e = torch.exp(-a)
    return to_out * b * (1 + e + a * e) / (1 + e) ** 2, to_out * a / (1 + e)


# %% exercise="ex-blocks-parallel" says="does not wait"
# One layer after the other, as in any block
class ParallelBlock(nn.Module):
    def __init__(self, d_model, attention, feed_forward):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x, **options):
        x = x + self.attention(self.norm(x), **options)
        return x + self.feed_forward(self.norm(x))


# %% exercise="ex-blocks-parallel" says="x itself is added"
# Without the stream
class ParallelBlock(nn.Module):
    def __init__(self, d_model, attention, feed_forward):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x, **options):
        y = self.norm(x)
        return self.attention(y, **options) + self.feed_forward(y)


# %% exercise="ex-blocks-parallel" says="the options reach attention"
# The options are swallowed
class ParallelBlock(nn.Module):
    def __init__(self, d_model, attention, feed_forward):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x, **options):
        y = self.norm(x)
        return x + self.attention(y) + self.feed_forward(y)


# %% exercise="ex-blocks-parallel" says="one norm serves both layers"
# A norm for each layer
class ParallelBlock(nn.Module):
    def __init__(self, d_model, attention, feed_forward):
        super().__init__()
        self.norm, self.other = RMSNorm(d_model), RMSNorm(d_model)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x, **options):
        return x + self.attention(self.norm(x), **options) + self.feed_forward(self.other(x))


# %% exercise="ex-blocks-parallel" says="make of norm(x)"
# The feed-forward network reads the stream as it is
class ParallelBlock(nn.Module):
    def __init__(self, d_model, attention, feed_forward):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x, **options):
        return x + self.attention(self.norm(x), **options) + self.feed_forward(x)


# %% exercise="ex-blocks-choice" says="leaves a better token"
# A softmax over the tokens, by which each expert chooses
def expert_choice(logits, capacity):
    weights, tokens = logits.softmax(dim=0).T.topk(capacity, dim=-1)
    return weights, tokens


# %% exercise="ex-blocks-choice" says="each expert takes 4 tokens"
# Tokens choose experts, as before
def expert_choice(logits, capacity):
    weights, tokens = logits.softmax(dim=-1).topk(min(capacity, logits.size(1)), dim=-1)
    return weights, tokens


# %% exercise="ex-blocks-choice" says="leaves a better token"
# The worst instead of the best
def expert_choice(logits, capacity):
    weights, tokens = logits.softmax(dim=-1).T.topk(capacity, dim=-1, largest=False)
    return weights, tokens


# %% exercise="ex-blocks-choice" says="best first"
# The best, in the order of the text
def expert_choice(logits, capacity):
    probabilities = logits.softmax(dim=-1).T
    tokens = probabilities.topk(capacity, dim=-1).indices.sort(dim=-1).values
    return probabilities.gather(1, tokens), tokens


# %% exercise="ex-blocks-choice" says="by a softmax over experts"
# The right tokens, with weights that sum to one for each expert
def expert_choice(logits, capacity):
    weights, tokens = logits.softmax(dim=-1).T.topk(capacity, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), tokens
