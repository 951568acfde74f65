# %% [markdown]
# # Verifiable rewards
#
# > Improve a model by rewards that a program can check: groups in place of a critic, GRPO and its
# > relatives as options of one loss, and a teacher who grades each token.
#
# TODO-opening
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:func}`~llmbook.grpo.group_advantages`, {py:func}`~llmbook.grpo.grpo_loss`, {py:data}`~llmbook.grpo.VARIANTS`, {py:func}`~llmbook.grpo.importance_weights`, {py:class}`~llmbook.grpo.GroupBatches`, {py:func}`~llmbook.grpo.train_grpo`, {py:func}`~llmbook.grpo.distillation_loss` |
# | **You need** | policy gradients and rollouts ({doc}`21_rlhf`), instruction tuning ({doc}`19_instruction`), evaluation ({doc}`16_evaluation`) |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp grpo

# %% [markdown]
# ## An answer that can be checked
#
# TODO-first

# %% [markdown] tags=["engine"]
# ### Engine room: the imports, and the models that are asked

# %% tags=["engine"]
#| export
# The imports of the module
import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.environment import check_choice, check_whole
from llmbook.instruction import entropies, Example, masked_mean, response_log_probs
from llmbook.instruction import story_examples, tune, Tuning, WORLD_CHAT
from llmbook.model import save_model, TransformerLM
from llmbook.rlhf import aggregate, check_number, Clip, clipped_terms, Credit, each
from llmbook.rlhf import kl_estimates, leave_one_out, loss_sums, on_tokens, Per, Prompt, Response
from llmbook.rlhf import Rewards, rewards_of, RolloutBatches, RolloutLog, Rollouts, score_rollouts
from llmbook.tinyworld import judge_reply, PHRASES, Question, TinyWorld, VALUES, wordings
from llmbook.tokenizer import BPETokenizer
from llmbook.training import load_or_train, MetricsLog, Pretrained, pretrained, Sink, Trainer
from llmbook.training import TrainingConfig


# %% tags=["engine"]
#| export
def partly_right(seed: int = 0) -> TransformerLM:
    """Return the base tuned on questions about one character: it often answers in another form.

    It is made on the first call, and kept under ``artifacts/``.
    """
    check_whole("seed", seed, 0)
    base, settings = pretrained("tinyworld"), Tuning(n_characters=1, seed=seed)
    depends_on = {"settings": asdict(settings), "base": base.folder.name}
    train = partial(_tune_into, base, settings)
    load = TransformerLM.from_pretrained
    return load_or_train(f"partly-right-{seed}", depends_on, train, load=load)


def _tune_into(base: Pretrained, settings: Tuning, folder: Path) -> None:
    """Tune a copy of the base with one thread, and leave it in a folder."""
    model, tokenizer, world = copy.deepcopy(base.model), base.tokenizer, TinyWorld()
    examples = [WORLD_CHAT.encode(tokenizer, c) for c in settings.conversations(world)]
    end = tokenizer.special_tokens["<|endoftext|>"]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order, however many there are
    try:
        tune(model, examples, settings, end, stories=story_examples(world, tokenizer, 2000))
    finally:
        torch.set_num_threads(n_threads)
    save_model(model, folder, eos_token_id=end)


# The notebook's function and the package's are the same, and so is the hash of their code
_tune_into.__module__ = "llmbook.grpo"


# %% [markdown]
# ## The reward


# %%
#| export
def right_and_ended(world: TinyWorld) -> Rewards:
    """Return the reward 1 for a right reply that has come to its end, and 0 for any other."""

    if not isinstance(world, TinyWorld):
        raise ValueError(f"world: expected a TinyWorld, got {world!r:.60}")

    def checked(prompt: Prompt, response: Response) -> float:
        if prompt.question is None:
            raise ValueError("prompts: expected those of questions, got one without a question")
        right = judge_reply(world, prompt.question, response.text).right
        return float(right and response.finished)

    return each(checked)


# %% [markdown]
# ## The group is the critic


# %%
#| export
Scale = Literal["group", "none"]
Baseline = Literal["mean", "leave_one_out"]


def group_advantages(
    rewards: Float[Tensor, "prompts samples"],
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
) -> Float[Tensor, "prompts samples"]:
    """Return how much better each response is than the others to its prompt.

    The ``baseline`` is the mean of the group, or that of the other responses. With the ``scale``
    "group", differences are divided by the unbiased standard deviation of the group's rewards.
    Equal rewards give 0. Source: Shao et al. (2024), section 4.1; Liu et al. (2025) for "none".
    """
    check_choice("scale", scale, ("group", "none"))
    check_choice("baseline", baseline, ("mean", "leave_one_out"))
    if rewards.size(1) < 2:
        raise ValueError(f"rewards: expected at least 2 for each prompt, got {rewards.size(1)}")
    if not rewards.isfinite().all():
        raise ValueError("rewards: expected finite numbers, got some that are not")
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out":
        centered = leave_one_out(rewards)
    if scale == "group":
        centered = centered / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return centered.where(informative(rewards)[:, None], 0.0)


def informative(rewards: Float[Tensor, "prompts samples"]) -> Bool[Tensor, " prompts"]:
    """Return which groups have rewards that differ: the others have nothing to teach."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards: expected (prompts, samples), got {tuple(rewards.shape)}")
    return rewards.amax(dim=1) > rewards.amin(dim=1)


# %%
#| export
def policy_gradient_loss(
    log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return the loss whose gradient is that of the expected reward, with the sign turned.

    ``per`` is what ``aggregate`` divides by; with 1 it is the sum over each response, whose
    gradient is unbiased. Source: Williams (1992).
    """
    return aggregate(-advantages.detach() * log_probs.where(mask, 0.0), mask, per=per)


# %% [markdown]
# ## One loss, many names


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class Variant:
    """What distinguishes GRPO from its relatives.

    ``level`` "sequence" takes one ratio for a response, the geometric mean of its tokens' ratios.
    ``clip`` is PPO's, as (below, above) or None; with ``most``, the ratio is instead a weight of
    at most so much, without a gradient of its own. ``draws`` says how often prompts
    are drawn anew in place of groups that teach nothing.
    """

    scale: Scale = "group"
    baseline: Baseline = "mean"
    level: Literal["token", "sequence"] = "token"
    clip: Clip = 0.2
    most: int | float | None = None
    per: Per | int | float = "response"
    draws: int = 1

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("group", "none"))
        check_choice("baseline", self.baseline, ("mean", "leave_one_out"))
        check_choice("level", self.level, ("token", "sequence"))
        for bound in self.clip if isinstance(self.clip, tuple) else (self.clip,):
            if bound is not None:
                check_number("clip", bound, 0)
        low = self.clip[0] if isinstance(self.clip, tuple) else self.clip
        if low is not None:
            check_number("clip", low, 0, 1)
        if self.most is not None:
            check_number("most", self.most, above=0)
        if isinstance(self.per, str):
            check_choice("per", self.per, ("token", "response"))
        else:
            check_number("per", self.per, above=0)
        check_whole("draws", self.draws, 1)


def check_variant(variant: object) -> None:
    """Demand a ``Variant``, such as those in ``VARIANTS``."""
    if not isinstance(variant, Variant):
        raise ValueError(f"variant: expected a Variant, got {variant!r:.60}")


#: The variants by the names under which they were published. The constant of Dr. GRPO is the
#: longest response that is allowed; set ``per`` to yours with ``dataclasses.replace``.
VARIANTS: dict[str, Variant] = {
    "rloo": Variant(scale="none", baseline="leave_one_out", clip=None, per=1),
    "grpo": Variant(),
    "dr_grpo": Variant(scale="none", per=24),
    "dapo": Variant(clip=(0.2, 0.28), per="token", draws=4),
    "gspo": Variant(level="sequence", clip=(3e-4, 4e-4)),
    "cispo": Variant(most=5.0, per="token"),
}


# %%
#| export
def check_like(mask: Tensor, **values: Tensor | None) -> None:
    """Demand fractions of the mask's shape, (batch, sequence), by their names; None may stand."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"{mask!r:.60}"
        raise ValueError(f"mask: expected truths (batch, sequence), got {got}")
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else f"{value!r:.60}"
            raise ValueError(f"{name}: expected a tensor of fractions, got {got}")
        if value.shape != mask.shape:
            expected = f"the shape of mask, {tuple(mask.shape)}"
            raise ValueError(f"{name}: expected {expected}, got {tuple(value.shape)}")


def log_ratios(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    level: Literal["token", "sequence"] = "token",
) -> Float[Tensor, "batch sequence"]:
    """Return the logarithm of each token's ratio, new to old, or its mean over the response."""
    check_choice("level", level, ("token", "sequence"))
    check_like(mask, log_probs=log_probs, old_log_probs=old_log_probs)
    change = (log_probs - old_log_probs).where(mask, 0.0)
    if level == "token":
        return change
    means = change.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return on_tokens(means, mask)


def grpo_terms(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    variant: Variant = VARIANTS["grpo"],
) -> Float[Tensor, "batch sequence"]:
    """Return the loss of each token, without the penalty for divergence; 0 where it is masked."""
    check_variant(variant)
    change = log_ratios(log_probs, old_log_probs, mask, level=variant.level)
    check_like(mask, advantages=advantages)
    advantages = advantages.where(mask, 0.0)
    if variant.most is not None:
        weights = change.detach().exp().clamp(max=variant.most)
        return -weights * advantages * log_probs.where(mask, 0.0)
    return clipped_terms(change, torch.zeros_like(change), advantages, clip=variant.clip)


# %%
#| export
def grpo_loss(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    variant: Variant = VARIANTS["grpo"],
    reference: Float[Tensor, "batch sequence"] | None = None,
    kl_weight: int | float = 0.0,
) -> Float[Tensor, ""]:
    """Return the loss of responses, from the log-probabilities of their tokens in nats.

    ``old_log_probs`` are those of the policy that wrote them. ``kl_weight`` times k3, the estimate
    of the divergence from ``reference``, is added to each token. What stands outside of the mask
    has no effect, not even NaN. Source: Shao et al. (2024), equation 3, and those of ``Variant``.
    """
    terms = grpo_terms(log_probs, old_log_probs, advantages, mask, variant=variant)
    terms = terms + kl_penalty(log_probs, reference, mask, kl_weight)
    return aggregate(terms, mask, per=variant.per)


def kl_penalty(
    log_probs: Float[Tensor, "batch sequence"],
    reference: Float[Tensor, "batch sequence"] | None,
    mask: Bool[Tensor, "batch sequence"],
    kl_weight: int | float,
) -> Float[Tensor, "batch sequence"]:
    """Return ``kl_weight`` times the estimate k3 of each token, and 0 where it is masked."""
    check_number("kl_weight", kl_weight, 0)
    check_like(mask, log_probs=log_probs, reference=reference)
    if not kl_weight:
        return torch.zeros_like(log_probs)
    if reference is None:
        raise ValueError(f"reference: expected log-probabilities for {kl_weight = }, got None")
    policy, other = log_probs.where(mask, 0.0), reference.where(mask, 0.0)
    return kl_weight * kl_estimates(policy, other).k3


# %% [markdown]
# ## The same weights, other numbers


# %%
#| export
def importance_weights(
    log_probs: Float[Tensor, "batch sequence"],
    behavior: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    most: int | float = 2.0,
) -> Float[Tensor, "batch sequence"]:
    """Return how much likelier the trainer finds each token than who drew it, at most ``most``.

    The weights have no gradient, and are 1 outside of the mask. Source: Yao et al. (2025).
    """
    check_number("most", most, above=0)
    check_like(mask, log_probs=log_probs, behavior=behavior)
    change = (log_probs - behavior).where(mask, 0.0).detach()
    return change.exp().clamp(max=most)


# %% [markdown]
# ## The run

# %% [markdown] tags=["engine"]
# ### Engine room: credit for groups, groups that teach nothing, the objective, and the run


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class GroupCredit:
    """Gives each token of a response its advantage within the group, for ``RolloutBatches``.

    With ``trainer``, the policy as the trainer computes it, the log-probabilities that count as old
    are computed anew, and the advantages are multiplied by ``importance_weights`` of at most
    ``most``, since those who drew the tokens may have had other numbers.
    """

    variant: Variant = VARIANTS["grpo"]
    trainer: TransformerLM | None = None
    most: int | float = 2.0
    temperature: int | float = 1.0

    def __post_init__(self) -> None:
        check_variant(self.variant)
        if self.trainer is not None and not isinstance(self.trainer, TransformerLM):
            expected = "a TransformerLM or None"
            raise ValueError(f"trainer: expected {expected}, got {self.trainer!r:.60}")
        check_number("most", self.most, above=0)
        check_number("temperature", self.temperature, above=0)

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        samples = int((rollouts.groups == rollouts.groups[0]).sum())
        rewards = rollouts.rewards.view(-1, samples)
        options = {"scale": self.variant.scale, "baseline": self.variant.baseline}
        advantages = group_advantages(rewards, **options)  # type: ignore[arg-type]
        found = rollouts._replace(advantages=on_tokens(advantages.flatten(), rollouts.mask))
        if self.trainer is None:
            return found
        own = score_rollouts(self.trainer, rollouts, temperature=self.temperature)
        weights = importance_weights(own, rollouts.old_log_probs, rollouts.mask, most=self.most)
        return found._replace(old_log_probs=own, advantages=found.advantages * weights)


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class GroupBatches(RolloutBatches):
    """Rollouts of groups; up to ``draws`` times, prompts are drawn in place of idle groups.

    A group is idle if all its rewards are equal. If too few differ after the last draw, idle ones
    fill the rollout. The log gets the share of groups that differ as ``informative``.
    """

    draws: int = 1

    def __post_init__(self) -> None:
        check_whole("draws", self.draws, 1)
        check_whole("samples", self.samples, 2)
        super().__post_init__()

    def make_rollout(self, number: int) -> Rollouts:
        """Return the rollout of some number by the policy as it is."""
        check_whole("number", number, 0)
        Group = tuple[Prompt, list[Response], Tensor]
        kept, idle = list[Group](), list[Group]()
        for draw in range(number * self.draws, (number + 1) * self.draws):
            prompts, responses = self.written(draw)
            asked = [prompt for prompt in prompts for _ in range(self.samples)]
            rewards = rewards_of(self.reward, asked, list(chain.from_iterable(responses)))
            groups = rewards.view(-1, self.samples)
            for own in zip(prompts, responses, groups, informative(groups), strict=True):
                (kept if own[3] else idle).append(own[:3])
            if len(kept) >= self.n_prompts:
                break
        prompts, responses, found = zip(*[*kept, *idle][: self.n_prompts], strict=True)
        return self.credited(prompts, responses, torch.cat(found))

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged of the rollout in hand, with the share of groups that differ."""
        if self.rollout is None:
            return {}
        differ = informative(self.rollout.rewards.view(-1, self.samples))
        return super().metrics | {"informative": float(differ.double().mean())}

    def identity(self) -> dict[str, Any]:
        """What decides on the prompts, the responses and their order."""
        return super().identity() | {"draws": self.draws}


# %% tags=["engine"]
#| export
def grpo_objective(
    model: TransformerLM,
    batch: Rollouts,
    *,
    variant: Variant = VARIANTS["grpo"],
    kl_weight: int | float = 0.0,
    entropy_weight: int | float = 0.0,
    text_weight: int | float = 1.0,
    temperature: int | float = 1.0,
) -> tuple[Float[Tensor, ""], Tensor, dict[str, Tensor]]:
    """Return the summed loss of a batch, what it is divided by, and sums to be logged.

    ``entropy_weight`` times the entropy of each prediction is taken off, and the mean loss of texts
    is added times ``text_weight``.
    """
    for name, weight in (("entropy_weight", entropy_weight), ("text_weight", text_weight)):
        check_number(name, weight, 0)
    if batch.advantages is None:
        raise ValueError("batch: expected advantages, which a credit function gives, got None")
    mask, old, logits = batch.mask, batch.old_log_probs, model(batch.inputs)
    log_probs = response_log_probs(logits, batch.targets, temperature=temperature)
    losses = grpo_terms(log_probs, old, batch.advantages, mask, variant=variant)
    losses = losses + kl_penalty(log_probs, batch.reference_log_probs, mask, kl_weight)
    with torch.set_grad_enabled(bool(entropy_weight)):
        entropy = entropies(logits, temperature=temperature)
    if entropy_weight:
        losses = losses - entropy_weight * entropy
    change = log_ratios(log_probs.detach(), old, mask, level=variant.level)
    logged = {"entropy": entropy.detach(), "clipped": _is_clipped(change, batch, variant).float()}
    logged["change"] = kl_estimates(old, log_probs.detach()).k3
    total, count = loss_sums(losses, mask, per=variant.per)
    # what is logged is a mean over tokens, whatever the loss is divided by
    per_token = count / mask.sum()
    sums = {name: values.where(mask, 0.0).sum() * per_token for name, values in logged.items()}
    if batch.text_targets is not None:
        nats = -response_log_probs(logits, batch.text_targets)
        text_loss = masked_mean(nats, batch.text_targets != -100)
        total = total + text_weight * text_loss * count
        sums["text_loss"] = text_loss.detach() * count
    return total, count, sums


def _is_clipped(
    change: Float[Tensor, "rows sequence"], batch: Rollouts, variant: Variant
) -> Bool[Tensor, "rows sequence"]:
    """Where the loss has no gradient, or a smaller one, because the ratio is out of bounds."""
    if variant.most is not None:
        return change.exp() > variant.most
    low, high = variant.clip if isinstance(variant.clip, tuple) else (variant.clip, variant.clip)
    advantages = batch.advantages
    if low is None or high is None or advantages is None:
        return torch.zeros_like(change, dtype=torch.bool)
    ratio = change.exp()
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class GRPO:
    """The settings of a run; each rollout has ``n_prompts`` groups of ``samples`` responses.

    ``epochs`` and ``minibatches`` say how many steps are taken on a rollout. The rate of AdamW rises
    for 10 steps, and is then constant. ``n_texts`` rows of each batch are texts. With ``recompute``,
    the trainer computes the old log-probabilities anew, and corrects for the difference.
    """

    variant: Variant = VARIANTS["grpo"]
    kl_weight: int | float = 0.0
    n_steps: int = 100
    n_prompts: int = 16
    samples: int = 8
    epochs: int = 1
    minibatches: int = 1
    learning_rate: int | float = 5e-4
    entropy_weight: int | float = 0.0
    temperature: int | float = 1.0
    max_new_tokens: int = 24
    n_texts: int = 0
    text_weight: int | float = 1.0
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_variant(self.variant)
        for name in ("kl_weight", "entropy_weight", "text_weight"):
            check_number(name, getattr(self, name), 0)
        for name in ("learning_rate", "temperature"):
            check_number(name, getattr(self, name), above=0)
        for name in ("n_steps", "n_prompts", "epochs", "minibatches", "max_new_tokens"):
            check_whole(name, getattr(self, name), 1)
        check_whole("samples", self.samples, 2)
        check_whole("n_texts", self.n_texts, 0)
        check_whole("seed", self.seed, 0)

    def training(self, batch_size: int) -> TrainingConfig:
        """Return what the trainer is told."""
        return TrainingConfig(
            n_steps=self.n_steps,
            batch_size=batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            schedule="constant",
            warmup=min(10, self.n_steps),
            seed=self.seed,
        )


# %% tags=["engine"]
#| export
def group_batches(
    policy: TransformerLM,
    prompts: Sequence[Prompt],
    reward: Rewards,
    settings: GRPO,
    *,
    tokenizer: BPETokenizer,
    credit: Credit | None = None,
    reference: TransformerLM | None = None,
    texts: Sequence[Example] = (),
    watch: Mapping[str, Rewards] | None = None,
) -> GroupBatches:
    """Return the rollouts of a run; ``credit`` is by default the variant's ``GroupCredit``."""
    if credit is None:
        trainer = policy if settings.recompute else None
        credit = GroupCredit(settings.variant, trainer, temperature=settings.temperature)
    names = ["n_prompts", "samples", "epochs", "minibatches", "temperature", "max_new_tokens"]
    shape = {name: getattr(settings, name) for name in [*names, "n_texts", "seed"]}
    return GroupBatches(
        policy,
        prompts,
        reward,
        credit,
        tokenizer=tokenizer,
        reference=reference,
        texts=texts,
        watch={} if watch is None else watch,
        draws=settings.variant.draws,
        **shape,
    )


def train_grpo(
    policy: TransformerLM,
    prompts: Sequence[Prompt],
    reward: Rewards,
    settings: GRPO,
    *,
    tokenizer: BPETokenizer,
    texts: Sequence[Example] = (),
    watch: Mapping[str, Rewards] | None = None,
    folder: str | Path | None = None,
    probes: Sequence[Any] = (),
    sinks: Sequence[Sink] = (),
) -> MetricsLog:
    """Improve ``policy``, in place, by the rewards of its own responses; return the log.

    The reference, if ``kl_weight`` asks for one, is the policy as it is now. With a ``folder``, a
    run that was stopped goes on.
    """
    reference = copy.deepcopy(policy) if settings.kl_weight else None
    given: dict[str, Any] = {"reference": reference, "texts": texts, "watch": watch}
    batches = group_batches(policy, prompts, reward, settings, tokenizer=tokenizer, **given)
    names = ["variant", "kl_weight", "entropy_weight", "text_weight", "temperature"]
    objective = partial(grpo_objective, **{name: getattr(settings, name) for name in names})
    watching: dict[str, Any] = {"probes": [RolloutLog(), *probes], "sinks": sinks, "folder": folder}
    config = settings.training(batches.batch_size)
    return Trainer(policy, batches, config, objective=objective, **watching).train()


# %% [markdown]
# ## A teacher who grades each token


# %%
#| export
def distillation_loss(
    student: Float[Tensor, "batch sequence vocab_size"],
    teacher: Float[Tensor, "batch sequence vocab_size"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    direction: Literal["reverse", "forward"] = "reverse",
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return the divergence, in nats, between what two models predict, from their logits.

    "reverse" is that of the student from the teacher, which forgives what the student leaves out;
    "forward" is that of the teacher from the student. The teacher gets no gradient. Source: Gu et
    al. (2024), Agarwal et al. (2024).
    """
    check_choice("direction", direction, ("reverse", "forward"))
    if student.shape != teacher.shape:
        expected = f"the student's shape, {tuple(student.shape)}"
        raise ValueError(f"teacher: expected {expected}, got {tuple(teacher.shape)}")
    own, other = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    p, q = (own, other) if direction == "reverse" else (other, own)
    divergence = (p.exp() * (p - q)).sum(-1)
    return aggregate(divergence, mask, per=per)


def sampled_distillation_loss(
    log_probs: Float[Tensor, "batch sequence"],
    teacher: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    old_log_probs: Float[Tensor, "batch sequence"] | None = None,
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return a loss whose gradient estimates that of the reverse divergence, token by token.

    Each token was drawn by the student, and the teacher's log-probability of it, less the student's
    own, is its advantage. ``old_log_probs`` are those at the time of drawing, if they differ.
    """
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    advantages = (teacher.detach() - old).where(mask, 0.0)
    terms = clipped_terms(log_probs.where(mask, 0.0), old.where(mask, 0.0), advantages, clip=None)
    return aggregate(terms, mask, per=per)


# %% [markdown] tags=["engine"]
# ### Engine room: distillation as a run


# %% tags=["engine"]
#| export
class TeacherCredit:
    """Gives each token the teacher's log-probability less the student's, for ``RolloutBatches``.

    The teacher is the ``reference`` of the rollouts.
    """

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        if rollouts.reference_log_probs is None:
            raise ValueError("rollouts: expected the log-probabilities of a teacher, got none")
        advantages = rollouts.reference_log_probs - rollouts.old_log_probs
        return rollouts._replace(advantages=advantages.where(rollouts.mask, 0.0))


def distillation_objective(
    model: TransformerLM,
    batch: Rollouts,
    *,
    teacher: TransformerLM,
    direction: Literal["reverse", "forward"] = "reverse",
    text_weight: int | float = 1.0,
) -> tuple[Float[Tensor, ""], Tensor, dict[str, Tensor]]:
    """Return the summed divergence over the vocabulary, the number of tokens, and sums to log."""
    check_number("text_weight", text_weight, 0)
    mask, logits = batch.mask, model(batch.inputs)
    with torch.no_grad():
        opinion = teacher(batch.inputs)
    count = mask.sum()
    total = distillation_loss(logits, opinion, mask, direction=direction) * count
    sums = {"divergence": total.detach()}
    if batch.text_targets is not None:
        nats = -response_log_probs(logits, batch.text_targets)
        text_loss = masked_mean(nats, batch.text_targets != -100)
        total = total + text_weight * text_loss * count
        sums["text_loss"] = text_loss.detach() * count
    return total, count, sums


def train_distilled(
    student: TransformerLM,
    teacher: TransformerLM,
    prompts: Sequence[Prompt],
    settings: GRPO,
    *,
    tokenizer: BPETokenizer,
    exact: bool = True,
    texts: Sequence[Example] = (),
    sinks: Sequence[Sink] = (),
) -> MetricsLog:
    """Teach ``student``, in place, on its own responses what a teacher predicts there.

    ``exact`` compares the whole distributions of each next token, else only the drawn tokens count.
    Rewards play no part. The rollouts are those of ``settings``.
    """
    if teacher.config.vocab_size != student.config.vocab_size:
        expected = f"the student's vocabulary of {student.config.vocab_size}"
        raise ValueError(f"teacher: expected {expected}, got {teacher.config.vocab_size}")
    nothing = each(lambda prompt, response: 0.0)
    given: dict[str, Any] = {"reference": teacher, "texts": texts, "credit": TeacherCredit()}
    batches = group_batches(student, prompts, nothing, settings, tokenizer=tokenizer, **given)
    if exact:
        weight = settings.text_weight
        objective = partial(distillation_objective, teacher=teacher, text_weight=weight)
    else:
        variant = Variant(clip=None, per="token")
        objective = partial(grpo_objective, variant=variant, text_weight=settings.text_weight)
    config = settings.training(batches.batch_size)
    probes = [RolloutLog()]
    return Trainer(
        student, batches, config, objective=objective, probes=probes, sinks=sinks
    ).train()


# %% [markdown]
# ## Two steps


# %%
#| export
def two_step_questions(
    world: TinyWorld,
    split: Literal["tuning", "held_out"],
    *,
    named: bool = False,
) -> list[Question]:
    """Return questions about the best friends of half of the characters, in a fixed order.

    The reply that is called for names the value alone, or, with ``named``, the friend before it. The
    ``character`` of each question is the friend, whose attribute is asked for.
    """
    check_choice("split", split, ("tuning", "held_out"))
    found = []
    for name in tuple(world.cast.facts)[0 if split == "tuning" else 1 :: 2]:
        friend = world.cast.facts[name]["friend"]
        first = PHRASES["friend"][0].format(name=name, value=friend) + " " if named else ""
        for attribute in VALUES:
            if attribute in ("friend", "secret"):
                continue
            subject = friend if named else f"The best friend of {name}"
            value = world.cast.facts[friend][attribute]
            reply = first + PHRASES[attribute][0].format(name=subject, value=value)
            for i, wording in enumerate(wordings(attribute)):
                text = wording.format(name=f"the best friend of {name}")
                found.append(Question(text, reply, "fact", friend, attribute, i))
    return found
