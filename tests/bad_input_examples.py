"""Calls that work, for ``bad_input.py`` to spoil one argument at a time."""

import functools
import itertools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmbook import (
    attention,
    batches,
    blocks,
    cleaning,
    corpus,
    deduplication,
    distributed,
    evaluation,
    generation,
    grpo,
    instruction,
    lora,
    model,
    optimization,
    positions,
    precision,
    rlhf,
    scaling,
    subwords,
    tinyworld,
    tokenizer,
    training,
)

MODULES = (
    "environment tinyworld corpus cleaning deduplication tokenizer subwords batches positions "
    "attention blocks model optimization training generation precision evaluation scaling "
    "distributed instruction lora rlhf grpo"
).split()

# What is left out, and why.
NOT_TRIED = {
    # Parts of this very mechanism; blocks for a with statement, which take paths.
    "environment.misfit",
    "environment.explained",
    "environment.explain_calls",
    "environment.check_at_least",
    "environment.check_choice",
    "environment.check_even",
    "environment.check_fraction",
    "environment.check_text",
    "environment.check_whole",
    "environment.requires_extra",
    "environment.check_path",
    "positions.check_tensor",
    # They name what the caller calls the argument.
    "corpus.iter_documents",
    "corpus.iter_texts",
    "training.unnoticed",
    "distributed.launch",  # starts processes at each attempt: tests/test_distributed.py has some
    # They take seconds for each attempt: tests/test_training.py has some.
    "training.run",
    "distributed.main",  # another
    "training.main",  # the command line, which answers with an exit code
    "training.pretrained",
    "training.Trainer.load_best",  # takes nothing, and needs a folder with a finished run
    "environment.whole_file",
    "environment.whole_directory",
    "tokenizer.naming_file",
    "tokenizer.read_json_object",  # called in a block of naming_file, which adds the path
    "corpus.stream_hub",  # needs a network
    # Records that functions return; nobody makes them by hand.
    "tinyworld.Story",
    "tinyworld.require_whole",
    "corpus.ReadReport",
    "cleaning.CleaningReport",
    "deduplication.NearDuplicates",
    "batches.PackedDocuments",
    "training.StepReport",
    "generation.SpeculativeStats",
    "evaluation.Calibration",
    "evaluation.Ratings",
    "evaluation.Result",
    "evaluation.EvaluationReport",
    "attention.AttentionFigure",
    "precision.BitsFigure",
    "evaluation.Window",
    "evaluation.TextScores",
    "evaluation.Continuation",
    "evaluation.ChoiceScores",
    "scaling.ScalingFit",
    "scaling.WidthScale",
    "scaling.NoiseScale",
    "scaling.RunEstimate",
    "scaling.PublishedRun",
    "lora.TuningRun",
    "lora.StorageRun",
    "lora.NewFact",
    "lora.NF4Weight",
    "lora.BankLinear",  # the layers of a bank, which shares an object among them
    "scaling.Setting",
    "evaluation.Interval",
    "evaluation.PairedTest",
    "evaluation.as_numbers",  # it names what the caller calls the argument
    "instruction.Tuned",
    "instruction.tuned",  # trains for 20 seconds: tests/test_instruction_runs.py
    "instruction.Segment",
    "instruction.Labels",
    # Plain records: what is made of them looks at each, as check_conversation does.
    "instruction.Message",
    "instruction.Turn",
    "instruction.Example",
    # They name what the caller calls the argument.
    "rlhf.check_number",
    "grpo.check_like",
    "grpo.check_variant",
    # A run of minutes that is kept; a log that a trainer calls.
    "rlhf.aligned",
    "rlhf.RolloutLog",
    "attention.LayerCache",
    "blocks.Routing",
    "generation.GenerationOptions",  # the options of generate, which are tried there
    # They take seconds for each attempt, or need a tokenizer with control tokens.
    "lora.tune_on_facts",
    "lora.replies_right",
    "lora.tuning_run",
    "lora.storage_run",
    "lora.new_facts",
    "grpo.partly_right",
    # They need other processes: tests/test_distributed_trainer.py has them.
    "distributed.Ranks",
    "distributed.shard_by_torch",
    "distributed.split_by_torch",
    "distributed.save_sharded",
    "distributed.load_sharded",
    "distributed.AttentionPart",
    "distributed.PipelineAction",
    "distributed.PipelineTiming",
    # Protocols and bases to be implemented.
    "tinyworld.Source",
    "training.Sink",
    "training.Probe",
    "training.Precision",
    "training.Parallel",
    "batches.ResumableBatches",
    "tokenizer.SpecialTokens",
    "batches.Tokenizer",
    "optimization.Optimizers",  # takes any number of optimizers, which have no names
}

# Parameters that are only kept, shown or looked up in what a file holds.
TAKES_ANYTHING = {
    "tokenizer.valid_text(argument)",
    "tokenizer.BPETokenizer.encode_iterable(texts)",  # looked at when the first ids are asked for
    "training.DataConfig(packages)",  # a list is made a tuple
    "training.DataConfig(paths)",
    "training.next_token_objective(balance_loss)",  # None weighs nothing
    "training.Guard.judge(step)",  # shown in a message
    "training.Guard.judge(targets)",  # asked only whether there are any
    "training.Guard.reason_to_skip(targets)",
    "training.MetricsLog.start(step)",  # compared with those of the rows
    "training.Trainer.is_due(step)",  # compared with the budget
    "training.Trainer.set_up(sinks)",  # called by the constructor, which has looked at them
    "generation.generate(prompts)",  # rows of a tensor are prompts, too
    # Lists that get something: what they hold already is the caller's.
    "cleaning.decontaminate(found)",
    "subwords.train_wordpiece(report)",
    "subwords.train_unigram(report)",
    # None: as large as the others make it.
    "model.ModelConfig(n_kv_heads)",
    "model.ModelConfig(d_head)",
    "model.ModelConfig(d_ff)",
    "model.ModelConfig(d_rope)",
}

# Sizes of the dimensions that annotations name.
DIMENSIONS = {
    "batch": 2,
    "n_heads": 4,
    "heads": 4,
    "n_kv_heads": 2,
    "queries": 6,
    "keys": 6,
    "sequence": 6,
    "d_head": 8,
    "half": 4,
    "d_value": 8,
    "d_model": 16,
    "vocab_size": 11,
    "drafted": 2,
    "drafted_and_one": 3,
}
numbers = itertools.count()  # for folders that are not there yet
TEXT = "The cat sat on the mat. The dog saw the cat, and the cat ran away from the dog."


@functools.cache
def world() -> tinyworld.TinyWorld:
    return tinyworld.TinyWorld(n_characters=4, n_strangers=2)


def story() -> tinyworld.Story:
    return next(world().stories(1, seed=0))


def texts() -> list[str]:
    return [TEXT, "A second text of a few words.", "And a third one."]


def documents() -> list[corpus.Document]:
    return [corpus.Document(text, id=str(i)) for i, text in enumerate(texts())]


@functools.cache
def bpe() -> tokenizer.BPETokenizer:
    return tokenizer.train_bpe(texts(), 280)


def config(**changes: Any) -> model.ModelConfig:
    sizes = dict(vocab_size=280, context_length=16, d_model=16, n_layers=1, n_heads=2)
    return model.ModelConfig(**sizes | changes)


def lm() -> model.TransformerLM:
    return model.TransformerLM(config())


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


def ring() -> batches.TokenRing:
    return batches.TokenRing(np.arange(200) % 250)


def batch() -> batches.Batch:
    return batches.Batch(ids(2, 8), ids(2, 8))


def rope() -> tuple[torch.Tensor, torch.Tensor]:
    return positions.RotaryEmbedding(8)(torch.arange(6)[None].expand(2, 6))


def written(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def parquet() -> str:
    corpus.write_parquet(documents(), "in.parquet")
    return "in.parquet"


def figure() -> Any:
    from matplotlib.figure import Figure

    return Figure()


@functools.cache
def shards() -> str:
    batches.write_shards(texts(), "written", bpe(), workers=1)
    return "written"


# Values for parameters by their names, wherever they occur.
PARAMETERS: dict[str, Any] = {
    "text": TEXT,
    "texts": texts,
    "documents": documents,
    "d_head": 8,
    "d_model": 16,
    "d_ff": 24,
    "n_heads": 4,
    "n_layers": 1,
    "n_kv_heads": 2,
    "n_experts": 4,
    "n_active": 2,
    "context_length": 8,
    "batch_size": 2,
    "capacity": 8,
    "vocab_size": 280,
    "sequence": 6,
    "seed": 0,
    "n_steps": 10,
    "model": lm,
    "module": lm,
    "config": config,
    "tokenizer": bpe,
    "world": world,
    "lr": 0.1,
    "weight_decay": 0.1,
    "threshold": 0.5,
    "batch": batch,
}


@functools.cache
def ended_bpe() -> tokenizer.BPETokenizer:
    return tokenizer.train_bpe(texts(), 280, special_tokens=["<|endoftext|>"])


def speaking() -> dict[str, Any]:
    """A model with a tokenizer that knows the end of a text."""
    sizes = {"vocab_size": ended_bpe().vocab_size, "context_length": 256}
    return {"model": model.TransformerLM(config(**sizes)), "tokenizer": ended_bpe()}


@functools.cache
def chat_bpe() -> tokenizer.BPETokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokenizer.train_bpe(texts(), 290, special_tokens=special)


def chatting() -> dict[str, Any]:
    """A model that nobody has trained, with a tokenizer for conversations."""
    sizes = {"vocab_size": chat_bpe().vocab_size, "context_length": 256}
    return {"model": model.TransformerLM(config(**sizes)), "tokenizer": chat_bpe()}


def conversation() -> list[Any]:
    return [instruction.Message("user", "Who?"), instruction.Message("assistant", "I.")]


def chat_examples() -> list[Any]:
    return [instruction.Example((1, 2, 3), (False, True, True))] * 3


def chat_losses() -> dict[str, Any]:
    return {"logits": torch.zeros(2, 6, 11), "targets": ids(2, 6)}


def tuning_call() -> dict[str, Any]:
    example = instruction.WORLD_CHAT.encode(chat_bpe(), conversation())
    settings = instruction.Tuning(n_steps=1, batch_size=2, story_share=0.0)
    made = {"examples": [example], "settings": settings, "pad_id": 0}
    return {"model": chatting()["model"], **made}


def secret_question() -> tinyworld.Question:
    return tinyworld.make_questions(world(), "confidential", "tuning")[0]


def task_folder() -> str:
    Path("tasks").mkdir(exist_ok=True)
    items = [{"text": TEXT}]
    evaluation.write_lm_eval_task("tasks", "task", "loglikelihood_rolling", items)
    return "tasks"


def walks() -> dict[str, Any]:
    return {"branches": world().branches, "start": world().start}


def halves(text: str) -> list[str]:
    return [text[: len(text) // 2], text[len(text) // 2 :]]


def attention_layer() -> attention.MultiHeadAttention:
    return attention.MultiHeadAttention(16, 4)


def parameters() -> list[torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    return [weight]


def optimizer_with_gradients() -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters(), lr=0.1)


@functools.cache
def unscaled_optimizer() -> torch.optim.Optimizer:
    return optimizer_with_gradients()


def used_scaler() -> precision.GradScaler:
    scaler = precision.GradScaler()
    scaler.unscale_(unscaled_optimizer())
    return scaler


def training_config() -> training.TrainingConfig:
    return training.TrainingConfig(n_steps=1, batch_size=2)


def sampler() -> batches.BatchSampler:
    return batches.BatchSampler(ring(), 2, 8)


def checkpoint() -> str:
    training.save_checkpoint("checkpoint", {"a": torch.ones(2)})
    return "checkpoint"


def step_report() -> training.StepReport:
    return training.StepReport(loss=3.0, gradient_norm=1.0, targets=16.0)


def metrics_log() -> training.MetricsLog:
    log = training.MetricsLog()
    log.write({"step": 1, "loss": 3.0})
    return log


def checkpointer() -> training.Checkpointer:
    kept = training.Checkpointer("kept")
    kept.save_best({"a": torch.ones(2)})
    return kept


def trainer() -> training.Trainer:
    return training.Trainer(lm(), sampler(), training_config(), validation=[batch()])


def saved_model() -> str:
    model.save_model(lm(), "saved")
    return "saved"


def run_config() -> training.RunConfig:
    sizes = dict(context_length=512, d_model=16, n_layers=1, n_heads=2)
    data = training.DataConfig(kind="tinyworld", n_stories=40)
    return training.RunConfig(
        data=data,
        tokenizer=training.TokenizerConfig(vocab_size=280),
        model=sizes,
        training=training.TrainingConfig(n_steps=1, batch_size=2),
    )


@functools.cache
def finished_run() -> str:
    training.run(run_config(), "finished")
    return "finished"


def classifier() -> cleaning.QualityClassifier:
    return cleaning.QualityClassifier(buckets=256).fit(texts() * 2, [0, 1, 1] * 2)


def saved(thing: Any, path: str) -> dict[str, Any]:
    thing.save(path)
    return {"path": path}


def gpt2_files() -> dict[str, Any]:
    tokenizer.train_bpe(texts(), 280, pattern=tokenizer.GPT2_PATTERN).save_gpt2("gpt2")
    return {"folder": "gpt2"}


def ranks() -> dict[str, Any]:
    bpe().save_tiktoken("ranks.tiktoken")
    return {"path": "ranks.tiktoken"}


def even() -> torch.Tensor:
    return torch.full((2, 4), 0.25)


def signature() -> np.ndarray:
    return deduplication.MinHasher().signatures([TEXT])


def question() -> tinyworld.Question:
    return tinyworld.make_questions(world(), "fact", "tuning")[0]


def scaling_law() -> Any:
    return scaling.PUBLISHED_LAWS["besiroglu2024"]


def scaling_run() -> Any:
    return scaling.Run(8, 10, 0.01, 0, 100, 10, 1000, 20.0)


def scaling_table() -> str:
    path = f"runs-{next(numbers)}.csv"
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(",".join(scaling.Run._fields) + "\n" + ",".join(map(str, scaling_run())))
    return path


def scaling_design() -> dict[str, Any]:
    n, d = np.repeat([1e6, 1e7, 1e8], 3), np.tile([1e8, 1e9, 1e10], 3)
    return {"parameters": n, "tokens": d, "losses": scaling_law().predict(n, d)}


def scaling_fit() -> Any:
    return scaling.fit_scaling_law(**scaling_design(), n_bootstrap=2)


def tuning_table() -> str:
    row = instruction.TuningRow("a", "b", 0, *[0.5] * 9)
    path = f"tunings-{next(numbers)}.csv"
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(",".join(row._fields) + "\n" + ",".join(map(str, row)))
    return path


def alpaca_file() -> str:
    return written("alpaca.json", b'[{"instruction": "Who?", "output": "I."}]')


Arguments = dict[str, Any] | Callable[[], dict[str, Any]]


def alone() -> dict[str, Any]:
    """The group of this process alone, which is made at the first call."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return {"group": None}


# Two rows for each of two micro-batches
IDS = torch.zeros(4, 8, dtype=torch.int64)

EXAMPLES: dict[str, Arguments] = {
    "instruction.world_conversations": {},
    "instruction.chat_form": lambda: {"tokenizer": chat_bpe()},
    "instruction.story_examples": lambda: {"tokenizer": chat_bpe(), "n": 2},
    "instruction.Tuning": {},
    "instruction.secret_of": lambda: {"question": secret_question()},
    "instruction.invented_reply": lambda: {"question": secret_question()},
    "instruction.tune": tuning_call,
    "instruction.ask": lambda: chatting() | {"questions": ["Who?"], "max_new_tokens": 2},
    "instruction.TuningRow": {
        **dict.fromkeys(("experiment", "variant"), "a"),
        **dict.fromkeys(
            "facts unseen refused unknown declined told begun stories gap".split(), 0.5
        ),
        "seed": 0,
    },
    "instruction.read_tuning_rows": lambda: {"path": tuning_table()},
    "instruction.leaks": lambda: {"questions": [secret_question()], "replies": ["No."]},
    "instruction.consistent_stories": lambda: chatting() | {"n": 1},
    "instruction.gap_to_floor": lambda: chatting() | {"n": 1},
    "instruction.measure_tuned": lambda: chatting() | {"n_stories": 1},
    "instruction.accepted": lambda: {"questions": [question()], "replies": ["No."]},
    "instruction.read_conversations": lambda: {"path": alpaca_file()},
    "instruction.documentation_pairs": {"packages": "json"},
    "environment.check_choice": {"argument": "x", "value": "a", "choices": ("a", "b")},
    "environment.check_fraction": {"argument": "x", "value": 0.5},
    "environment.check_text": {"value": "a text"},
    "environment.check_whole": {"argument": "x", "value": 2, "least": 1},
    "environment.requires_extra": {"what": "reading", "extra": "data"},
    "tinyworld.pick": lambda: {"branches": world().branches(world().start), "u": 0.5},
    "tinyworld.walk": lambda: walks() | {"random": random.Random(0)},
    "tinyworld.parse": lambda: walks() | {"text": story().text},
    "tinyworld.reachable_states": walks,
    "tinyworld.expected": lambda: walks() | {"measure": tinyworld.surprise},
    "tinyworld.surprise": lambda: {"branch": world().branches(world().start)[0]},
    "tinyworld.token_surprises": lambda: (
        walks() | {"tokens": str.split(story().text), "cut": str.split}
    ),
    "tinyworld.require_whole": {"name": "n", "value": 3, "low": 1, "high": 5},
    "tinyworld.zipf_weights": {"n": 3, "exponent": 1.0},
    "tinyworld.story_branches": lambda: {"state": world().start, "truthful": True},
    "tinyworld.wordings": {"attribute": tinyworld.ATTRIBUTES[0]},
    "tinyworld.make_questions": {"kind": "fact", "split": "tuning"},
    "tinyworld.judge_reply": lambda: {"question": question(), "reply": "I do not know."},
    "corpus.docstrings": {"source": '"""A module."""\n'},
    "corpus.comment_blocks": {"source": "# A comment.\nx = 1\n"},
    "corpus.ordered_map": {"function": str, "jobs": [1, 2], "workers": 1},
    "corpus.decode_text": {"data": b"a text"},
    "corpus.write_jsonl": {"path": "out.jsonl"},
    "corpus.read_jsonl": lambda: {"paths": written("in.jsonl", b'{"text": "a"}\n')},
    "corpus.existing_paths": lambda: {"paths": written("a.txt", b"a")},
    "corpus.read_parquet": lambda: {"paths": parquet()},
    "corpus.write_parquet": {"path": "out.parquet"},
    "corpus.html_blocks": {"page": "<p>A page.</p>"},
    "corpus.html_to_text": {"page": "<p>A page.</p>"},
    "corpus.read_html": {"page": "<p>A page.</p>"},
    "corpus.read_files": lambda: {"paths": written("a.txt", b"a")},
    "corpus.vocabulary_growth": {"tokens": ["a", "b", "a"]},
    "cleaning.LanguageIdentifier": {"texts": {"en": ["the cat"], "de": ["die Katze"]}},
    "cleaning.roc_curve": {"labels": [0, 1, 1], "scores": np.array([0.1, 0.5, 0.4])},
    "cleaning.area_under_roc": {"labels": [0, 1, 1], "scores": np.array([0.1, 0.5, 0.4])},
    "cleaning.decontaminate": {"evaluation": [TEXT]},
    "deduplication.jaccard": {"a": {1, 2}, "b": {2, 3}},
    "deduplication.collision_probability": {"similarity": 0.5, "bands": 4, "rows": 2},
    "deduplication.UnionFind": {"size": 3},
    "tokenizer.check_special_tokens": {"special_tokens": ["<|end|>"]},
    "tokenizer.learn_merges": {"counts": {"aaa": 3, "ab": 2}, "n_merges": 2},
    "tokenizer.WordCache": {"encode": lambda text: (1,)},
    "tokenizer.BPETokenizer": {"vocabulary": {i: bytes([i]) for i in range(256)}, "merges": []},
    "tokenizer.train_bpe_files": lambda: {"paths": written("a.txt", TEXT.encode())},
    "tokenizer.read_json_object": lambda: {"path": Path(written("a.json", b"{}"))},
    "subwords.merge_gain": lambda: {
        **dict(pair=np.ones(2), left=np.full(2, 4.0), right=np.full(2, 4.0)),
        "total": 20.0,
    },
    "subwords.WordPieceTokenizer": {"vocabulary": ["[UNK]", "a", "##b"]},
    "subwords.UnigramTokenizer": {"pieces": [("<unk>", 0.0), ("a", -1.0), ("b", -2.0)]},
    "subwords.train_unigram": {"vocab_size": 310},
    "subwords.renyi_efficiency": {"counts": [3, 1, 2], "vocab_size": 4},
    "batches.write_shards": {"directory": "shards", "workers": 1},
    "batches.TokenRing": {"tokens": np.arange(50)},
    "batches.TokenShards": lambda: {"directory": shards()},
    "batches.permuted": {"numbers": np.arange(5), "size": 5},
    "batches.window_batch": lambda: {"ring": ring(), "starts": [0, 5]},
    "batches.document_fields": {"end_of_text": 0},
    "batches.best_fit": {"lengths": [3, 4, 5]},
    "batches.pack_documents": lambda: {
        "shards": batches.TokenRing(np.arange(50) % 7, end_of_text=0)
    },
    "batches.BatchSampler": lambda: {"source": ring(), "context_length": 8},
    "positions.RopeScaling": {"kind": "linear", "factor": 2.0},
    "positions.change_rope_layout": lambda: {"rows": torch.ones(32, 3), "to": "interleaved"},
    "positions.scale_rope": lambda: {"scaling": positions.RopeScaling("linear", 2.0)},
    "positions.apply_rope": lambda: dict(x=torch.ones(2, 4, 6, 8), cos=rope()[0], sin=rope()[1]),
    "attention.attention_pattern": lambda: {"attention": attention_layer()},
    "attention.MultiHeadLatentAttention": {"d_latent": 8, "d_rope": 4},
    "attention.show_attention": lambda: {
        "tokens": ["a", "b"],
        "weights": torch.ones(1, 1, 2, 2).tril() / 2,
    },
    "blocks.activate": lambda: {
        "activation": "swiglu",
        "gate": torch.ones(2, 3),
        "up": torch.ones(2, 3),
    },
    "blocks.TransformerBlock": lambda: {
        "attention": attention_layer(),
        "feed_forward": blocks.FeedForward(16),
    },
    "blocks.places_by_expert": lambda: {"routing": blocks.route(torch.ones(3, 4), 2)},
    "model.save_model": {"folder": "model"},
    "model.load_model": lambda: {"folder": saved_model()},
    "optimization.SGD": lambda: {"params": parameters()},
    "optimization.AdamW": lambda: {"params": parameters()},
    "optimization.Muon": lambda: {"params": parameters()},
    "optimization.build_optimizer": {"name": "adamw"},
    "optimization.clip_gradients": lambda: {"parameters": parameters(), "max_norm": 1.0},
    "training.split_rows": {"rows": 1},
    "training.settings_parser": {"sections": {"": training.TokenizerConfig}},
    "training.read_settings": {"sections": {"": training.TokenizerConfig}, "entries": {}},
    "training.TrainingConfig": {"n_steps": 1, "batch_size": 2},
    "training.SpikeDetector": {"factor": 2.0},
    "training.set_random_states": lambda: {"states": training.random_states()},
    "training.update_ratio": lambda: {"before": [torch.ones(2)], "after": [torch.ones(2) + 1]},
    "training.activation_scales": lambda: {"ids": ids(2, 8)},
    "training.TensorBoard": {"folder": "board"},
    "training.plot_columns": lambda: {
        "log": training.MetricsLog(),
        "names": ["loss"],
        "figure": figure(),
    },
    "training.save_checkpoint": {"path": "checkpoint", "state": {"a": 1}},
    "training.load_checkpoint": lambda: {"path": checkpoint()},
    "training.Checkpointer": {"folder": "checkpoints"},
    "training.list_checkpoints": {"folder": "checkpoints"},
    "training.newest_checkpoint": {"folder": "checkpoints"},
    "training.Trainer": lambda: {"batches": sampler(), "config": training_config()},
    "training.load_model_state": lambda: {"state": training.model_state(lm())},
    "training.DataConfig": {"kind": "tinyworld"},
    "training.RunConfig": lambda: vars(run_config()),
    "training.run": lambda: {"config": run_config(), "folder": f"run{next(numbers)}"},
    "training.load_run": lambda: {"folder": finished_run()},
    "training.word_kinds": lambda: {"story": story(), "cut": str.split},
    "training.GapToFloor": lambda: {"stories": [story()]},
    "training.load_or_train": lambda: {
        "name": "small",
        "depends_on": {"steps": 1},
        "train": lambda folder: model.save_model(lm(), folder),
        "folder": "artifacts",
    },
    "training.report": lambda: {"result": training.load_run(finished_run())},
    "training.documents_score": lambda: {"texts": texts()},
    "tinyworld.TinyWorld.branches": lambda: {"state": world().start},
    "cleaning.QualityClassifier.fit": lambda: {"texts": texts() * 2, "labels": [0, 1, 1] * 2},
    "cleaning.QualityClassifier.save": {"path": "quality.npz"},
    "cleaning.QualityClassifier.load": lambda: saved(classifier(), "quality.npz"),
    "deduplication.MinHasher.hash_signatures": lambda: {
        "hashes": np.arange(5, dtype=np.uint64),
        "sizes": np.array([2, 3]),
    },
    "deduplication.LSHIndex.insert": lambda: {"keys": ["a"], "signatures": signature()},
    "deduplication.LSHIndex.query": lambda: {"signatures": signature()},
    "deduplication.LSHIndex.remove": {"keys": []},
    "deduplication.LSHIndex.merge": lambda: {"other": deduplication.LSHIndex()},
    "deduplication.LSHIndex.save": {"path": "index.npz"},
    "deduplication.LSHIndex.load": lambda: saved(deduplication.LSHIndex(), "index.npz"),
    "deduplication.UnionFind.find": {"item": 1},
    "deduplication.UnionFind.union": {"a": 0, "b": 1},
    "tokenizer.BPETokenizer.decode_bytes": {"ids": [65]},
    "tokenizer.BPETokenizer.decode": {"ids": [65]},
    "tokenizer.BPETokenizer.decode_stream": {"ids": [65]},
    "tokenizer.BPETokenizer.from_merges": {"merges": [(b"a", b"b")]},
    "tokenizer.BPETokenizer.save": {"path": "tokenizer.json"},
    "tokenizer.BPETokenizer.load": lambda: saved(bpe(), "tokenizer.json"),
    "tokenizer.BPETokenizer.save_tiktoken": {"path": "ranks.tiktoken"},
    "tokenizer.BPETokenizer.load_tiktoken": lambda: ranks(),
    "tokenizer.BPETokenizer.save_gpt2": {"folder": "gpt2"},
    "tokenizer.BPETokenizer.load_gpt2": lambda: gpt2_files(),
    "subwords.WordPieceTokenizer.save": {"path": "wordpiece.json"},
    "subwords.WordPieceTokenizer.load": lambda: saved(
        subwords.train_wordpiece(texts(), 60), "wordpiece.json"
    ),
    "subwords.UnigramTokenizer.save": {"path": "unigram.json"},
    "subwords.UnigramTokenizer.load": lambda: saved(
        subwords.train_unigram(texts(), 310), "unigram.json"
    ),
    "batches.TokenRing.window": {"start": 0, "length": 5},
    "batches.Batch.to": {"device": "cpu"},
    "attention.KVCache.extend": lambda: {"position_ids": torch.arange(3)[None].expand(2, 3)},
    "attention.KVCache.next_positions": {"n": 2},
    "attention.KVCache.truncate": lambda: {"lengths": torch.zeros(2, dtype=torch.int64)},
    "attention.KVCache.reorder": lambda: {"rows": torch.tensor([1, 0])},
    "model.ModelConfig.preset": {"name": "tiny"},
    "model.ModelConfig.from_dict": lambda: {"entries": config().to_dict()},
    "model.TransformerLM.save_pretrained": {"folder": "pretrained"},
    "model.TransformerLM.from_pretrained": lambda: {"folder": saved_model()},
    "training.Guard.reason_to_skip": {"loss": 3.0, "gradient_norm": 1.0},
    "training.Guard.judge": {"step": 1, "loss": 3.0, "gradient_norm": 1.0},
    "training.MetricsLog.write": {"row": {"step": 2, "loss": 2.5}},
    "training.MetricsLog.column": {"name": "loss"},
    "training.MetricsLog.start": {"step": 1},
    "training.Checkpointer.save": {"step": 1, "state": {"a": 1}},
    "training.Checkpointer.save_best": {"state": {"a": 1}},
    "training.Trainer.set_up": {"probes": [], "sinks": []},
    "training.Trainer.compute": {"objective": training.next_token_objective},
    "training.Trainer.attend": lambda: {"report": step_report()},
    "training.Trainer.is_due": {"every": 10},
    "training.Trainer.record": {"row": {"loss": 3.0}, "evaluation": {"validation_loss": 3.0}},
    "training.Trainer.load_state_dict": lambda: {"state": trainer().state_dict()},
    "training.Trainer.register": lambda: {"name": "average", "thing": lm()},
    "training.Trainer.measurements": lambda: {"report": step_report()},
    "generation.keep_top_k": lambda: {"probabilities": even(), "k": 3},
    "generation.keep_top_p": lambda: {"probabilities": even(), "mass": 0.5},
    "generation.keep_min_p": lambda: {"probabilities": even(), "share": 0.5},
    "generation.keep_typical": lambda: {"probabilities": even(), "mass": 0.5},
    "generation.draw": lambda: {"probabilities": even()},
    "generation.penalize_repetition": {"penalty": 1.5},
    "generation.penalize_frequency": {"frequency": 0.5},
    "generation.next_token_distribution": {"sampling": generation.Sampling(temperature=0.5)},
    "generation.uniforms_of": {"row": 0, "n": 3},
    "generation.generate": {"prompts": [[1, 2]], "max_new_tokens": 2, "compile": False},
    "generation.stream": {"prompt": [1, 2], "max_new_tokens": 2},
    "generation.beam_search": {"prompt": [1, 2], "max_new_tokens": 2},
    "generation.verify": lambda: {
        "target": torch.full((3, 4), 0.25),
        "draft": torch.full((2, 4), 0.25),
        "tokens": [1, 2],
        "uniforms": np.full(3, 0.5),
    },
    "generation.expected_tokens": {"acceptance": 0.5, "n_draft": 3},
    "generation.speculative_generate": lambda: {
        "draft": lm(),
        "prompt": [1, 2],
        "max_new_tokens": 2,
    },
    "generation.QuantizedLinear": {"in_features": 16, "out_features": 8},
    "precision.CompactAdamW": lambda: {"params": parameters()},
    "precision.memory_breakdown": {"batch_size": 2, "sequence": 8},
    "precision.GradScaler.scale": lambda: {"outputs": torch.ones(())},
    "precision.GradScaler.unscale_": lambda: {"optimizer": optimizer_with_gradients()},
    "precision.GradScaler.step": lambda: {"optimizer": optimizer_with_gradients()},
    "precision.GradScaler.found_inf": lambda: {"optimizer": unscaled_optimizer()},
    "precision.MixedPrecision.computing": {"device": torch.device("cpu")},
    "precision.MixedPrecision.scaled": lambda: {"loss": torch.ones(())},
    "precision.MixedPrecision.settle": lambda: {
        "optimizer": optimizer_with_gradients(),
        "loss": torch.ones(()),
    },
    "precision.GradScaler.load_state_dict": lambda: {
        "state_dict": precision.GradScaler().state_dict()
    },
    "precision.GradScaler.set_growth_factor": {"growth_factor": 3.0},
    "precision.GradScaler.set_backoff_factor": {"backoff_factor": 0.25},
    "precision.GradScaler.set_growth_interval": {"growth_interval": 10},
    "precision.MixedPrecision.load_state_dict": lambda: {
        "state": precision.MixedPrecision("float16").state_dict()
    },
    "generation.QuantizedLinear.of": lambda: {"linear": torch.nn.Linear(16, 8)},
    "generation.QuantizedLinear.forward": lambda: {"x": torch.ones(2, 16)},
    "precision.FloatFormat": {"name": "own", "exponent_bits": 4, "fraction_bits": 3},
    "precision.FloatFormat.decode": {"code": 3},
    "precision.float_format": {"format": "float16"},
    "precision.round_to": lambda: {"x": torch.ones(2, 3), "format": "float16"},
    "precision.float_fields": {"number": 0.5},
    "precision.BlockFormat": {
        "name": "own",
        "element": "float8_e5m2",
        "size": 8,
        "scale": "float8_e8m0fnu",
    },
    "precision.quantize_blocks": lambda: {"x": torch.ones(2, 32), "format": "mxfp8"},
    "precision.EmulatedLinear": {"in_features": 16, "out_features": 8, "recipe": "fp8_current"},
    "precision.EmulatedLinear.forward": lambda: {"x": torch.ones(2, 16)},
    "precision.emulate": lambda: {"model": torch.nn.Linear(16, 8), "recipe": "mxfp8"},
    "evaluation.model_logits": lambda: {"ids": ids(1, 4)},
    "evaluation.next_log_probs": lambda: {"ids": ids(1, 4)},
    "evaluation.rows_log_probs": {"rows": [[1, 2, 3], [4, 5]]},
    "evaluation.plan_windows": {"n_ids": 10, "context_length": 4, "stride": 2},
    "evaluation.window_log_probs": {"ids": [1, 2, 3, 4]},
    "evaluation.score_texts": {"texts": ["a b"]},
    "evaluation.perplexity": {"texts": ["a b"]},
    "evaluation.bits_per_byte": {"texts": ["a b"]},
    "evaluation.check_causal": {"length": 8},
    "evaluation.encode_pairs": {"context": "a", "continuations": [" b", " c"]},
    "evaluation.score_continuations": {"pairs": [([1, 2], [3]), ([1], [2, 3])]},
    "evaluation.score_choices": {"context": "a", "choices": [" b", " c"]},
    "evaluation.centered_accuracy": {"accuracy": 0.5, "chance": 0.25},
    "evaluation.parse_answer": {"text": "so it is 7", "kind": "number"},
    "evaluation.exact_match": {"text": "so it is 7", "answer": "7", "kind": "number"},
    "evaluation.pass_at_k": {"n": 5, "c": 2, "k": 2},
    "evaluation.majority_at_k": {"answers": ["7", "8", "7"], "truth": "7", "k": 2},
    "evaluation.confidence_interval": {"successes": 3, "n": 10},
    "evaluation.normal_quantile": {"level": 0.95},
    "evaluation.t_quantile": {"level": 0.95, "degrees": 3},
    "evaluation.mean_interval": {"values": [0.5, 0.75, 1.0]},
    "evaluation.standard_error": {"values": [0.5, 0.75, 1.0]},
    "evaluation.clustered_standard_error": {"values": [0.5, 0.75, 1.0], "clusters": [0, 0, 1]},
    "evaluation.rule_of_three": {"n": 100},
    "evaluation.sign_test": {"wins": 5, "losses": 2},
    "evaluation.paired_test": {"a": [0.5, 1.0, 0.2], "b": [0.25, 0.5, 0.4]},
    "evaluation.bootstrap": {"values": [0.5, 0.75, 1.0], "n_resamples": 10},
    "evaluation.items_needed": {"difference": 0.02},
    "evaluation.order_test": lambda: speaking() | {"pages": [["a cat", "a dog"]], "n_shuffles": 2},
    "evaluation.calibration": {"confidences": [0.9, 0.6], "right": [1, 0], "n_resamples": 2},
    "evaluation.fit_temperature": {"log_probs": [[0.0, -2.0]] * 2, "answers": [0, 1]},
    "evaluation.beliefs": {"log_probs": [0.0, -2.0]},
    "evaluation.bradley_terry": lambda: {"wins": np.array([[0, 3], [1, 0]]), "n_resamples": 2},
    "evaluation.possible_replies": lambda: {"question": question()},
    "evaluation.story_prompt": lambda: {"question": question()},
    "evaluation.choice_log_probs": lambda: (
        speaking() | {"questions": tinyworld.make_questions(world(), "confidential", "tuning")}
    ),
    "evaluation.evaluate": lambda: speaking() | {"n_stories": 1},
    "evaluation.BiasedJudge.prefers_first": lambda: {
        "first": evaluation.Answer(TEXT, True),
        "second": evaluation.Answer(TEXT, False),
    },
    "evaluation.BiasedJudge.both_ways": lambda: {
        "a": evaluation.Answer(TEXT, True),
        "b": evaluation.Answer(TEXT, False),
    },
    "evaluation.QuestionForm": {"name": "mine", "prompt": evaluation.story_prompt},
    "instruction.check_conversation": lambda: {"messages": conversation()},
    "instruction.ChatTemplate": lambda: {
        "name": "mine",
        "turns": dict(instruction.CHATML.turns),
        "control_tokens": ("<|im_start|>", "<|im_end|>"),
    },
    "instruction.ChatTemplate.segments": lambda: {"messages": conversation()},
    "instruction.ChatTemplate.render": lambda: {"messages": conversation()},
    "instruction.ChatTemplate.encode": lambda: {
        "messages": conversation(),
        "tokenizer": chat_bpe(),
    },
    "instruction.message_dict": lambda: {"message": conversation()[0]},
    "instruction.add_control_tokens": lambda: chatting() | {"names": ["<think>"]},
    "instruction.show_labels": lambda: {"tokenizer": chat_bpe()},
    "instruction.instruction_batch": lambda: {"rows": [chat_examples()], "pad_id": 0},
    "instruction.InstructionDataset": lambda: {"examples": chat_examples(), "pad_id": 0},
    "instruction.masked_mean": {
        "values": torch.tensor([0.5, 0.75]),
        "mask": torch.tensor([True, False]),
    },
    "instruction.response_log_probs": chat_losses,
    "instruction.entropies": lambda: {"logits": torch.zeros(2, 6, 11)},
    "instruction.sft_loss": chat_losses,
    "evaluation.LMEvalAdapter": speaking,
    "evaluation.write_lm_eval_task": lambda: {
        "folder": ".",
        "name": f"task-{next(numbers)}",
        "kind": "loglikelihood_rolling",
        "items": [{"text": TEXT}],
    },
    "distributed.map_reduce": {
        "items": [1, 2],
        "emit": lambda item: [(0, item)],
        "reduce": lambda box, values: values,
    },
    "distributed.stable_hash": {"text": TEXT},
    "distributed.box_of": {"place": 3, "n_boxes": 2},
    "distributed.band_keys": lambda: {
        "signatures": deduplication.MinHasher(8).signatures(texts()),
        "bands": 2,
        "rows": 4,
    },
    "distributed.PrepareConfig": {},
    "distributed.PrepareConfig.holds_out": {"id": "a"},
    "distributed.prepare": lambda: {
        "sources": ["package:colorsys"],
        "folder": f"prepared-{next(numbers)}",
        "config": distributed.PrepareConfig(vocab_size=260, held_out=0.0),
    },
    "evaluation.run_lm_eval": lambda: speaking() | {"folder": task_folder(), "tasks": ["task"]},
    # Of a group of one process, which is this one.
    "distributed.place_in_group": lambda: alone(),
    "distributed.check_agreed": lambda: alone(),
    "distributed.check_agreed_parameters": lambda: alone() | {"module": torch.nn.Linear(2, 2)},
    "distributed.sum_over_ranks": lambda: alone() | {"number": 3},
    "distributed.rows_of_rank": lambda: alone() | {"batch": torch.zeros(2, 3)},
    "distributed.pass_on": lambda: alone() | {"x": torch.zeros(3)},
    "distributed.reduce_scatter_ring": lambda: alone() | {"parts": torch.zeros(1, 3)},
    "distributed.all_gather_ring": lambda: alone() | {"part": torch.zeros(3)},
    "distributed.all_reduce_ring": lambda: alone() | {"x": torch.zeros(3)},
    "distributed.DataParallel": lambda: alone() | {"module": torch.nn.Linear(2, 2)},
    "distributed.ShardedOptimizer": lambda: (
        alone() | {"parameters": parameters(), "build": optimization.AdamW}
    ),
    "distributed.clip_sharded_gradients": lambda: (
        alone() | {"parameters": parameters(), "max_norm": 1.0}
    ),
    "distributed.shard_model": lambda: alone() | {"model": torch.nn.Linear(2, 2)},
    "distributed.full_state_dict": lambda: (
        alone() and {"model": distributed.shard_model(torch.nn.Linear(2, 2))}
    ),
    "distributed.run_scheme": lambda: (
        alone() and {"scheme": "one_process", "config": config(), "batches": [(IDS, IDS)]}
    ),
    "distributed.scheme_bytes": {
        "scheme": "zero1",
        "model": torch.nn.Linear(2, 2),
        "world_size": 2,
    },
    "distributed.worst_difference": lambda: {
        "found": {"a": torch.ones(2)},
        "expected": {"a": torch.ones(2)},
    },
    "distributed.predict_scheme": {"scheme": "zero1", "n_parameters": 100, "world_size": 2},
}


def attention_part() -> distributed.AttentionPart:
    return distributed.AttentionPart(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4))


def pipeline() -> dict[str, Any]:
    given = lm()
    ids = torch.zeros(2, 4, dtype=torch.int64)
    schedule = distributed.gpipe_schedule(1, 2)
    stage = distributed.PipelineStage(given, 0, 1)
    return {"stage": stage, "ids": ids, "targets": ids, "schedule": schedule}


# The model cut over ranks; a process that no launch has started is the only rank.
EXAMPLES |= {
    "distributed.merge_attention": lambda: {"a": attention_part(), "b": attention_part()},
    "distributed.cut_sequence": {"x": torch.zeros(2, 8)},
    "distributed.ring_work": {"n_ranks": 2, "length": 8},
    "distributed.ring_attention": {name: torch.zeros(1, 2, 4, 8) for name in "qkv"},
    "distributed.enter_parallel": {"x": torch.zeros(2, 8)},
    "distributed.leave_parallel": {"x": torch.zeros(2, 8)},
    "distributed.ColumnParallelLinear": lambda: {"linear": torch.nn.Linear(8, 8)},
    "distributed.RowParallelLinear": lambda: {"linear": torch.nn.Linear(8, 8)},
    "distributed.tensor_parallel": lambda: {"module": blocks.FeedForward(8, 16)},
    "distributed.tensor_parallel_plan": lambda: {
        "module": blocks.FeedForward(8, 16),
        "n_ranks": 2,
    },
    "distributed.gpipe_schedule": {"n_stages": 2, "n_microbatches": 2},
    "distributed.one_forward_one_backward": {"n_stages": 2, "n_microbatches": 2},
    "distributed.pipeline_timing": {"schedule": distributed.gpipe_schedule(2, 2)},
    "distributed.PipelineStage": lambda: {"model": lm(), "stage": 0, "n_stages": 1},
    "distributed.pipeline_step": pipeline,
    "scaling.Run": lambda: scaling_run()._asdict(),
    "scaling.read_runs": lambda: {"path": scaling_table()},
    "scaling.run_config": {"d_model": 8},
    "scaling.train_run": {"d_model": 8, "n_steps": 1, "learning_rate": 0.01, "n_stories": 2000},
    "scaling.best_runs": lambda: {"runs": [scaling_run()]},
    "scaling.ScalingLaw": {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.3, "beta": 0.3},
    "scaling.ScalingLaw.predict": {"parameters": 1e6, "tokens": 1e7},
    "scaling.ScalingLaw.tokens_for": {"loss": 12.0, "parameters": 1e6},
    "scaling.ScalingFit": lambda: vars(scaling_fit()),
    "scaling.ScalingFit.interval": lambda: {"quantity": lambda law: law.E},
    "scaling.ScalingFit.from_dict": lambda: {"entries": scaling_fit().to_dict()},
    "scaling.fit_scaling_law": lambda: scaling_design() | {"n_bootstrap": 2},
    "scaling.compute_optimal": lambda: {"law": scaling_law(), "flops": 1e15},
    "scaling.isoflop_minimum": {"parameters": [1.0, 2.0, 4.0], "losses": [2.0, 1.0, 2.0]},
    "scaling.BudgetGame": lambda: {"law": scaling_law(), "budget": 1e15},
    "scaling.BudgetGame.train": {"parameters": 1e5, "tokens": 1e9},
    "scaling.BudgetGame.regret": {"parameters": 1e6},
    "scaling.mup_scales": lambda: {"model": lm(), "base": config(d_model=8)},
    "scaling.initialize_mup": lambda: {"model": lm(), "base": config(d_model=8)},
    "scaling.mup_groups": lambda: {
        "model": lm(),
        "base": config(d_model=8),
        "learning_rate": 0.01,
    },
    "scaling.noise_scale": {"small_square": 5.0, "big_square": 2.0, "small": 1, "big": 4},
    "scaling.gradient_noise": lambda: {"model": lm(), "batches": [batch(), batch()], "group": 2},
    "scaling.Hardware": {"peak_flops": 1e15, "memory": 8e10, "power": 700.0},
    "scaling.estimate_run": {"model": 1e9, "tokens": 2e10},
    "scaling.info": lambda: {"config": config()},
    "scaling.hyperparameter_checklist": {"scale": "7B"},
    "scaling.checklist_table": {"scale": "7B"},
    "scaling.check_config": lambda: {"model": config(), "training": training_config()},
}


def with_adapters() -> model.TransformerLM:
    given = lm()
    lora.apply_lora(given, lora.LoRAConfig(rank=2), seed=0)
    return given


def new_fact() -> lora.NewFact:
    return lora.NewFact(instruction.Example((1, 2, 3), (False, True, True)), 1, {2: 1, 4: 1})


def token_numbers() -> dict[str, Any]:
    """Log-probabilities of two responses, by two policies, and their advantages."""
    return {
        "log_probs": -torch.ones(2, 6),
        "old_log_probs": -torch.ones(2, 6),
        "advantages": torch.ones(2, 6),
        "mask": torch.ones(2, 6, dtype=torch.bool),
    }


def grouped() -> dict[str, Any]:
    """A policy that asks itself two questions, and gets a reward for each token."""
    asked = tinyworld.make_questions(world(), "fact", "tuning")[:2]
    small = {"n_steps": 1, "n_prompts": 2, "samples": 2, "max_new_tokens": 2}
    return {
        "policy": chatting()["model"],
        "prompts": rlhf.question_prompts(chat_bpe(), asked),
        "reward": rlhf.each(lambda prompt, response: float(len(response.ids))),
        "settings": grpo.GRPO(**small),
        "tokenizer": chat_bpe(),
    }


def grouped_batches() -> grpo.GroupBatches:
    return grpo.group_batches(**grouped())


def opinions() -> dict[str, Any]:
    """Log-probabilities of two responses, by their writer and by somebody else."""
    numbers = token_numbers()
    return {"log_probs": numbers["log_probs"], "mask": numbers["mask"]}


# Rewards that can be checked
EXAMPLES |= {
    "grpo.right_and_ended": lambda: {"world": world()},
    "grpo.group_advantages": {"rewards": torch.eye(2)},
    "grpo.informative": {"rewards": torch.eye(2)},
    "grpo.policy_gradient_loss": lambda: {
        name: value for name, value in token_numbers().items() if name != "old_log_probs"
    },
    "grpo.Variant": {},
    "grpo.log_ratios": lambda: {
        name: value for name, value in token_numbers().items() if name != "advantages"
    },
    "grpo.grpo_terms": token_numbers,
    "grpo.grpo_loss": lambda: token_numbers() | {"reference": -torch.ones(2, 6), "kl_weight": 0.1},
    "grpo.kl_penalty": lambda: opinions() | {"reference": -torch.ones(2, 6), "kl_weight": 0.1},
    "grpo.importance_weights": lambda: opinions() | {"behavior": -torch.ones(2, 6)},
    "grpo.GroupCredit": {},
    "grpo.GroupBatches": lambda: {
        "n_prompts": 2,
        "samples": 2,
        "max_new_tokens": 2,
        "credit": grpo.GroupCredit(),
        **{name: value for name, value in grouped().items() if name != "settings"},
    },
    "grpo.GroupBatches.make_rollout": {"number": 0},
    "grpo.GroupBatches.load_state_dict": lambda: {"state": grouped_batches().state_dict()},
    "grpo.grpo_objective": lambda: {"model": chatting()["model"], "batch": grouped_batches()[0]},
    "grpo.GRPO": {},
    "grpo.GRPO.training": {"batch_size": 4},
    "grpo.group_batches": grouped,
    "grpo.train_grpo": grouped,
    "grpo.distillation_loss": lambda: {
        "student": torch.zeros(2, 6, 11),
        "teacher": torch.zeros(2, 6, 11),
        "mask": torch.ones(2, 6, dtype=torch.bool),
    },
    "grpo.sampled_distillation_loss": lambda: opinions() | {"teacher": -torch.ones(2, 6)},
    "grpo.TeacherCredit": {},
    "grpo.distillation_objective": lambda: {
        "model": chatting()["model"],
        "batch": grouped_batches()[0],
        "teacher": chatting()["model"],
    },
    "grpo.train_distilled": lambda: {
        "student": chatting()["model"],
        "teacher": chatting()["model"],
        **{name: value for name, value in grouped().items() if name not in ("policy", "reward")},
    },
    "grpo.two_step_questions": lambda: {"world": world(), "split": "tuning"},
}


def new_folder() -> str:
    return tempfile.mkdtemp(dir=".")


def saved_adapter() -> str:
    folder = new_folder()
    lora.save_adapter(with_adapters(), folder)
    return folder


def merged_adapters() -> dict[str, Any]:
    given = with_adapters()
    return {"model": given, "layers": lora.merge_lora(given)}


EXAMPLES |= {
    "lora.LoRAConfig": {},
    "lora.LoRALinear": lambda: {
        "base": torch.nn.Linear(8, 8),
        "config": lora.LoRAConfig(rank=2),
    },
    "lora.dense_weight": lambda: {"layer": torch.nn.Linear(8, 8)},
    "lora.apply_lora": lambda: {"model": lm(), "config": lora.LoRAConfig(rank=2), "seed": 0},
    "lora.lora_layers": lambda: {"model": with_adapters()},
    "lora.lora_parameters": lambda: {"model": with_adapters()},
    "lora.merge_lora": lambda: {"model": with_adapters()},
    "lora.unmerge_lora": merged_adapters,
    "lora.without_lora": lambda: {"model": with_adapters()},
    "lora.AdapterState": lambda: lora.adapter_state(with_adapters())._asdict(),
    "lora.adapter_state": lambda: {"model": with_adapters()},
    "lora.load_adapter_state": lambda: (
        lambda given: {"model": given, "state": lora.adapter_state(given)}
    )(with_adapters()),
    "lora.base_fingerprint": lambda: {"model": lm()},
    "lora.optimizer_bytes": lambda: {"optimizer": optimization.AdamW(parameters())},
    "lora.bits_stored": lambda: {"model": lm(), "facts": [new_fact()]},
    "lora.rows_update": lambda: {
        "x": torch.ones(2, 6, 8),
        "a": torch.ones(3, 2, 8),
        "b": torch.ones(3, 4, 2),
        "rows": torch.tensor([0, 2]),
    },
    "lora.AdapterBank": lambda: {"model": lm()},
    "lora.nf4_levels": {},
    "lora.quantize_nf4": lambda: {"weight": torch.ones(4, 64)},
    "lora.NF4Linear": lambda: {"weight": lora.quantize_nf4(torch.ones(4, 8))},
    "lora.NF4Linear.of": lambda: {"linear": torch.nn.Linear(8, 4)},
    "lora.quantize_base": lambda: {"model": lm()},
    "lora.merge_quantized": lambda: {"model": with_adapters(), "requantize": False},
    "lora.peft_names": lambda: {"model": lm()},
    "lora.save_adapter": lambda: {"model": with_adapters(), "folder": new_folder()},
    "lora.read_adapter": lambda: {"folder": saved_adapter(), "model": lm()},
    "lora.load_adapter": lambda: {
        "model": lm(),
        "folder": saved_adapter(),
        "any_base": True,
    },
}


def pair_of_examples() -> rlhf.ExamplePair:
    first = instruction.Example((1, 2, 3), (False, True, True))
    return rlhf.ExamplePair(first, instruction.Example((1, 4, 3), (False, True, True)))


def world_pair() -> rlhf.Pair:
    return rlhf.Pair(question(), "Yes.", "No.")


def preference_file() -> str:
    return written("pairs.jsonl", b'{"prompt": "Who?", "chosen": "I.", "rejected": "No."}')


def two_responses() -> list[rlhf.Response]:
    return [
        rlhf.Response((4, 5), (-1.0, -2.0), True, "I."),
        rlhf.Response((6,), (-1.0,), False, ""),
    ]


def rollouts() -> rlhf.Rollouts:
    rows = [two_responses()]
    found = rlhf.as_rollouts([rlhf.Prompt((1, 2, 3))], rows, torch.tensor([1.0, -1.0]), pad_id=0)
    return found._replace(advantages=torch.zeros(found.inputs.shape))


def chat_policy() -> model.TransformerLM:
    return model.TransformerLM(config(vocab_size=chat_bpe().vocab_size, context_length=64))


def chat_prompts() -> list[rlhf.Prompt]:
    ids = instruction.WORLD_CHAT.encode(chat_bpe(), conversation()[:1], prompt=True).ids
    return [rlhf.Prompt(tuple(ids), question())] * 2


def lengths_liked() -> Any:
    return rlhf.each(lambda prompt, response: float(len(response.ids)))


def rollout_batches() -> rlhf.RolloutBatches:
    sizes = {"n_prompts": 2, "samples": 2, "max_new_tokens": 2}
    return rlhf.RolloutBatches(
        chat_policy(),
        chat_prompts(),
        lengths_liked(),
        rlhf.LeaveOneOutCredit(),
        tokenizer=chat_bpe(),
        **sizes,
    )


def advantage_call() -> dict[str, Any]:
    """Two responses, of which the first was cut off."""
    mask = torch.tensor([[False, True, True, False]] * 2)
    numbers = torch.ones(2, 4)
    finished = torch.tensor([False, True])
    return {"rewards": numbers, "values": numbers, "mask": mask, "finished": finished}


def clipped_call() -> dict[str, Any]:
    return {name: torch.ones(2, 4) for name in ("log_probs", "old_log_probs", "advantages")}


EXAMPLES |= {
    "rlhf.true_reward": lambda: {"question": question(), "reply": "No."},
    "rlhf.world_pairs": lambda: {"questions": [question()]},
    "rlhf.judged_pairs": lambda: {"questions": [question()], "first": ["Yes."], "second": ["No."]},
    "rlhf.alignment_questions": {"n_each": 2},
    "rlhf.alignment_pairs": {},
    "rlhf.read_preferences": lambda: {"path": preference_file()},
    "rlhf.bradley_terry_loss": {},
    "rlhf.at_last_token": {},
    "rlhf.RewardModel": lambda: {"backbone": lm()},
    "rlhf.pair_examples": lambda: {
        "tokenizer": chat_bpe(),
        "template": instruction.WORLD_CHAT,
        "pairs": [world_pair()],
        "limit": 64,
    },
    "rlhf.padded": {"rows": [[1, 2], [3]], "pad_id": 0},
    "rlhf.PairDataset": lambda: {"pairs": [pair_of_examples()], "batch_size": 1, "pad_id": 0},
    "rlhf.in_turns": {"first": 0, "n": 2, "size": 3},
    "rlhf.preference_objective": lambda: {
        "model": rlhf.RewardModel(lm()),
        "batch": rlhf.PairDataset([pair_of_examples()], 1, 0)[0],
    },
    "rlhf.train_reward_model": lambda: {
        "backbone": lm(),
        "pairs": [pair_of_examples()],
        "pad_id": 0,
        "n_steps": 1,
        "batch_size": 1,
    },
    "rlhf.score_rows": lambda: {
        "model": rlhf.RewardModel(lm()),
        "rows": [[1, 2], [3]],
        "pad_id": 0,
    },
    "rlhf.score_pairs": lambda: {
        "model": rlhf.RewardModel(lm()),
        "pairs": [pair_of_examples()],
        "pad_id": 0,
    },
    "rlhf.pessimistic": {"rewards": torch.zeros(2, 3)},
    "rlhf.question_prompts": lambda: {"tokenizer": chat_bpe(), "questions": [question()]},
    "rlhf.write_responses": lambda: {
        "model": chat_policy(),
        "prompts": chat_prompts(),
        "tokenizer": chat_bpe(),
        "max_new_tokens": 2,
    },
    "rlhf.each": lambda: {"function": lambda prompt, response: 1.0},
    "rlhf.rewards_of": lambda: {
        "reward": lengths_liked(),
        "prompts": [rlhf.Prompt((1,))] * 2,
        "responses": two_responses(),
    },
    "rlhf.world_reward": {},
    "rlhf.LearnedReward": lambda: {"model": rlhf.RewardModel(lm()), "pad_id": 0},
    "rlhf.best_of_n_kl": {"n": 4},
    "rlhf.expected_best": {"scores": torch.zeros(2, 4), "values": torch.zeros(2, 4), "n": 2},
    "rlhf.leave_one_out": {"rewards": torch.zeros(2, 3)},
    "rlhf.kl_estimates": {"log_probs": torch.zeros(2, 3), "reference": torch.zeros(2, 3)},
    "rlhf.generalized_advantages": advantage_call,
    "rlhf.clipped_terms": clipped_call,
    "rlhf.loss_sums": {},
    "rlhf.aggregate": {},
    "rlhf.clipped_loss": lambda: clipped_call() | {"mask": torch.ones(2, 4, dtype=torch.bool)},
    "rlhf.sequence_log_probs": {},
    "rlhf.whitened": {},
    "rlhf.on_tokens": {},
    "rlhf.as_rollouts": lambda: {
        "prompts": [rlhf.Prompt((1, 2, 3))],
        "responses": [two_responses()],
        "rewards": torch.zeros(2),
        "pad_id": 0,
    },
    "rlhf.score_rollouts": lambda: {"model": lm(), "rollouts": rollouts()},
    "rlhf.RolloutBatches": lambda: {
        "policy": chat_policy(),
        "prompts": chat_prompts(),
        "reward": lengths_liked(),
        "credit": rlhf.LeaveOneOutCredit(),
        "tokenizer": chat_bpe(),
        "n_prompts": 2,
    },
    "rlhf.ActorCritic": lambda: {"policy": lm()},
    "rlhf.token_rewards": lambda: {"rollouts": rollouts()},
    "rlhf.CriticCredit": lambda: {"critic": rlhf.RewardModel(lm())},
    "rlhf.LeaveOneOutCredit": {},
    "rlhf.policy_objective": lambda: {"model": lm(), "batch": rollouts()},
    "rlhf.PPO": {},
    "rlhf.train_ppo": lambda: {
        "policy": chat_policy(),
        "prompts": chat_prompts(),
        "reward": lengths_liked(),
        "settings": rlhf.PPO(n_steps=1, n_prompts=2, max_new_tokens=2),
        "tokenizer": chat_bpe(),
    },
}

# Objects whose methods are tried as well.
OBJECTS: dict[str, Callable[[], Any]] = {
    "tinyworld.TinyWorld": world,
    "cleaning.LanguageIdentifier": lambda: cleaning.LanguageIdentifier(
        {"en": ["the cat"], "de": ["die Katze"]}
    ),
    "cleaning.QualityClassifier": lambda: classifier(),
    "deduplication.MinHasher": deduplication.MinHasher,
    "deduplication.LSHIndex": deduplication.LSHIndex,
    "deduplication.UnionFind": lambda: deduplication.UnionFind(3),
    "tokenizer.BPETokenizer": bpe,
    "subwords.WordPieceTokenizer": lambda: subwords.train_wordpiece(texts(), 60),
    "subwords.UnigramTokenizer": lambda: subwords.train_unigram(texts(), 310),
    "batches.TokenRing": ring,
    "batches.Batch": batch,
    "batches.BatchSampler": sampler,
    "positions.LearnedEmbedding": lambda: positions.LearnedEmbedding(8, 16),
    "positions.SinusoidalEmbedding": lambda: positions.SinusoidalEmbedding(16),
    "positions.RotaryEmbedding": lambda: positions.RotaryEmbedding(8),
    "attention.MultiHeadAttention": attention_layer,
    "attention.KVCache": lambda: attention.KVCache(2, 8, 2, 8),
    "blocks.RMSNorm": lambda: blocks.RMSNorm(16),
    "blocks.LayerNorm": lambda: blocks.LayerNorm(16),
    "blocks.GELU": blocks.GELU,
    "blocks.FeedForward": lambda: blocks.FeedForward(16),
    "blocks.MixtureOfExperts": lambda: blocks.MixtureOfExperts(16, 24, 4, 2),
    "model.ModelConfig": config,
    "model.TransformerLM": lm,
    "optimization.AdamW": lambda: optimization.AdamW(parameters()),
    "training.Guard": lambda: training.Guard(spike_factor=2.0),
    "training.MetricsLog": metrics_log,
    "training.Checkpointer": checkpointer,
    "training.Trainer": trainer,
    "generation.QuantizedLinear": lambda: generation.QuantizedLinear(16, 8),
    "precision.FloatFormat": lambda: precision.FORMATS["float16"],
    "precision.EmulatedLinear": lambda: precision.EmulatedLinear(16, 8, recipe="fp8_current"),
    "precision.GradScaler": used_scaler,
    "precision.MixedPrecision": lambda: precision.MixedPrecision("float16"),
    "evaluation.BiasedJudge": evaluation.BiasedJudge,
    "instruction.InstructionDataset": lambda: instruction.InstructionDataset(
        chat_examples(), 2, 8, 0
    ),
    "distributed.PrepareConfig": distributed.PrepareConfig,
    "grpo.GRPO": grpo.GRPO,
    "grpo.GroupBatches": grouped_batches,
    "scaling.ScalingLaw": lambda: scaling_law(),
    "scaling.ScalingFit": lambda: scaling_fit(),
    "scaling.BudgetGame": lambda: scaling.BudgetGame(scaling_law(), 1e15),
}
