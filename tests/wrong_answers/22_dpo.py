# %% [markdown]
# Wrong answers to the exercises of chapter 22, and what the checks must say of them.


# %% exercise="ex-dpo-start" says="hinge begins at 1.0000"
# The same for every loss
def first_loss(loss: str, beta: float) -> float:
    return math.log(2)


# %% exercise="ex-dpo-start" says="ipo begins at 25.0000"
# IPO without the square
def first_loss(loss: str, beta: float) -> float:
    known = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * beta)}
    return known.get(loss, 1.0)


# %% exercise="ex-dpo-start" says="apo_zero begins at 1.0000"
# A half from each sigmoid is counted once
def first_loss(loss: str, beta: float) -> float:
    known = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * beta**2)}
    return known.get(loss, 0.5)


# %% exercise="ex-dpo-optimum" says="the probabilities do not add up to one"
# Not divided by the sum
def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return reference + rewards / beta


# %% exercise="ex-dpo-optimum" says="are not the rewards"
# Multiplied by beta
def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return (reference + beta * rewards).log_softmax(-1)


# %% exercise="ex-dpo-optimum" says="are not the rewards"
# The reference is forgotten
def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return (rewards / beta).log_softmax(-1)


# %% exercise="ex-dpo-optimum" says="rewards in the thousands overflow"
# Powers that overflow
def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    weights = reference.exp() * (rewards / beta).exp()
    return (weights / weights.sum()).log()


# %% exercise="ex-dpo-settled" says="with noise 0.1 the loss is not least at 2.20 nats"
# The implicit reward, not the log-ratio
def settled_at(label_smoothing: float, beta: float) -> float:
    return math.log((1 - label_smoothing) / label_smoothing) if label_smoothing else math.inf


# %% exercise="ex-dpo-settled" says="with noise 0.1 the loss is not least at -21.97 nats"
# The other way round
def settled_at(label_smoothing: float, beta: float) -> float:
    if not label_smoothing:
        return math.inf
    return math.log(label_smoothing / (1 - label_smoothing)) / beta


# %% exercise="ex-dpo-settled" says="without noise there is always more to gain"
# No smoothing is not thought of
def settled_at(label_smoothing: float, beta: float) -> float:
    return math.log((1 - label_smoothing) / max(label_smoothing, 1e-9)) / beta


# %% exercise="ex-dpo-ranked" says="the orders' probabilities do not add to one"
# Each against the next one: pairs, not the choice among all that are left
def ranked_loss(log_ratios: Tensor, beta: float) -> Tensor:
    return -logsigmoid(beta * (log_ratios[:, :-1] - log_ratios[:, 1:])).sum(1)


# %% exercise="ex-dpo-ranked" says="the orders' probabilities do not add to one"
# Only the best is chosen
def ranked_loss(log_ratios: Tensor, beta: float) -> Tensor:
    return -(beta * log_ratios).log_softmax(1)[:, 0]


# %% exercise="ex-dpo-ranked" says="with two replies it is not the loss of DPO"
# All are in the running all along
def ranked_loss(log_ratios: Tensor, beta: float) -> Tensor:
    return -(beta * log_ratios).log_softmax(1).sum(1)


# %% exercise="ex-dpo-guard" says="a chosen reply that has risen"
# The guard pays for a rise as well
def guarded_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    weight: float,
) -> Tensor:
    h_chosen, h_rejected = chosen - reference_chosen, rejected - reference_rejected
    return -logsigmoid(beta * (h_chosen - h_rejected - weight * h_chosen.abs()))


# %% exercise="ex-dpo-guard" says="a chosen reply that has risen"
# The guard watches the rejected reply
def guarded_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    weight: float,
) -> Tensor:
    h_chosen, h_rejected = chosen - reference_chosen, rejected - reference_rejected
    return -logsigmoid(beta * (h_chosen - h_rejected - weight * (-h_rejected).clamp(min=0)))


# %% exercise="ex-dpo-guard" says="a chosen reply that has fallen costs nothing more"
# The guard has the wrong sign: a fall is rewarded
def guarded_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    weight: float,
) -> Tensor:
    h_chosen, h_rejected = chosen - reference_chosen, rejected - reference_rejected
    return -logsigmoid(beta * (h_chosen - h_rejected + weight * (-h_chosen).clamp(min=0)))


# %% exercise="ex-dpo-guard" says="no gradient comes through the penalty"
# The penalty is a number for the log
def guarded_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    weight: float,
) -> Tensor:
    h_chosen, h_rejected = chosen - reference_chosen, rejected - reference_rejected
    penalty = weight * (-h_chosen).clamp(min=0).detach()
    return -logsigmoid(beta * (h_chosen - h_rejected - penalty))
