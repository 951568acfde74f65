# %% [markdown]
# # Setup
#
# > What this machine is, which device to compute on, and the seeds that make a run repeatable.
#
# A recipe that works only in one kitchen is not a recipe. This book prints hundreds of numbers,
# and each of them was computed by the cell above it. If you run that cell, you should get the same
# number, on your own computer, without a network or a graphics card. This chapter sets that up,
# shows how a chapter is made and read, and says exactly how far the promise goes: what is
# repeatable to the last bit, what only to three digits, and why. Installing takes a few minutes,
# once.
#
# | | |
# |---|---|
# | **Part** | I. Foundations and data |
# | **You build** | {py:func}`~llmbook.environment.seed_everything`, {py:func}`~llmbook.environment.best_device`, {py:func}`~llmbook.environment.describe_environment`, {py:func}`~llmbook.environment.whole_file` |
# | **You need** | some Python; a terminal |
# | **It takes** | 25 minutes for the main line, 40 minutes for everything, 15 seconds to run |

# %% tags=["remove-cell"]
#| default_exp environment

# %% tags=["engine"]
#| export
# The imports of the module
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from glob import escape
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, formatannotation, signature
from pathlib import Path
from types import FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:  # loading PyTorch takes a second, and many programs do not need it
    import torch

# %% [markdown]
# ## Where this leads
#
# {numref}`fig-pipeline` is the whole book. Raw text comes in on one side: stories that we
# generate, and the documentation that lies on your own disk. It is cleaned, freed of duplicates,
# and cut into tokens. A transformer, built from its parts, learns to predict the next token. Then
# the model is tuned to answer questions, to admit what it does not know and to keep what is
# confidential. The numbers are chapters. Each chapter is a module of the package `llmbook`,
# tested, and used by the chapters after it.
#
# ```{figure} ../figures/pipeline.svg
# :name: fig-pipeline
# :alt: The book's pipeline in four bands. Foundations and data: raw text, clean, deduplicate, tokens, batches. Architecture: embedding, attention, SwiGLU, the model. Pretraining. Alignment, which ends in the assistant.
#
# From raw text to an assistant. The numbers are chapters.
# ```
#
# The scale is small on purpose. The models here have thousands to millions of parameters, where
# those in the news have billions. The code is the same in kind, and wherever an industrial
# implementation exists, a cell compares ours with it. What does not carry over from small to large
# is said where it comes up.
#
# ## Install, run, read
#
# You need Python 3.11 or newer and `make`. In a copy of the repository, one command sets up
# everything and builds the pages that you may be reading now:
#
# ```text
# make book
# ```
#
# It makes a private environment in `.venv`, installs the versions listed in `constraints.txt`, and
# builds the site in `_build/html`. `make lab` opens the chapters in JupyterLab, where you can run
# and change every cell. `make test` proves the book: it runs every chapter and compares what is
# printed with what you see here. Users of conda get the same from `environment.yml`.
#
# A chapter comes in three forms: as a page, as a notebook, and as the plain script it is written
# in. Cells whose first line is `#| export` become part of the package. Exercises come at the end,
# each followed by a solution and by a check that tells right from wrong; `make workbook` writes
# notebooks with the solutions left blank.
#
# Each chapter goes the same way: a concrete problem, an idea, its derivation, the smallest code
# that shows it, a check. Two sections come back from chapter 01 on. *Is it the real thing?* holds
# our code against the library that industry uses. *How fast is it?* measures where the time goes.
# Chapters build on each other, but what a chapter needs from an earlier one it imports, so you can
# start anywhere and look things up: names in the text link to the package reference, and that
# links back. Symbols are in the notation, terms in the glossary. If time is short, read the first
# and the last section of a chapter and do the first exercise.
#
# ### Two paths through a chapter
#
# An idea is usually short. Code that other people can rely on is longer: it checks its arguments,
# reads and writes files, survives an interruption, and says what went wrong. If all of that stood
# in the text at full length, the idea would drown in it. So each chapter has two paths.
#
# The **main line** is what you need to understand an idea and build it again: prose, derivation,
# the smallest code, a check, a picture. It makes sense on its own and takes at most an hour. The
# **engine rooms** hold what makes the idea fit for use. They are written out and explained like
# everything else, but they are folded. You see a single line that says what is inside and why:
#
# ```text
# ▸ Engine room: a wrong argument is named where it enters
# ```
#
# Click on that line to open the room, or move to it with the Tab key and press Enter. A link into a
# folded room opens it, for example a link from the package reference. In JupyterLab, a room is
# folded under its heading, and the arrow beside the heading opens it. A single folded cell, such as
# the imports at the top of a chapter, opens in the same way. Folded code still runs, and it goes
# into the package like any other. On a first reading, leave the rooms shut: nothing in the main
# line or in the exercises depends on what is inside. The table at the head of each chapter says how
# long either path takes.
#
# ## How a chapter becomes a package
#
# ```{figure} ../figures/press.svg
# :name: fig-press
# :alt: A chapter's script and its notebook are paired. The exported cells go into a module of the package llmbook, which later chapters import and tests check. The notebook's outputs are compared by nbval and shown on the site.
#
# One source, three products: a page, a module, and a proof.
# ```
#
# The script `chapters/00_environment.py` is the source of this page. `make sync` pairs it with the
# notebook (by a tool called jupytext), writes the exported cells to `llmbook/environment.py` (by
# nbdev), and runs what has changed. The tests run each notebook and compare its outputs (by
# nbval).
#
# Here is a function that goes that way. A program has several generators of random numbers, each
# with a state of its own: Python's, NumPy's, and one for each device PyTorch knows. To repeat a
# run, all of them must start from the same seed.


# %%
#| export
import random

import numpy as np


def seed_everything(seed: int) -> None:
    """Start the random generators of Python, NumPy and PyTorch (all devices) from ``seed``.

    The seed is a whole number from 0 to 2**32 - 1, the range that NumPy takes. Hashes of strings,
    and so the order of sets of strings, stay random: they depend on the environment variable
    PYTHONHASHSEED at the start of the process.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}, but must be a whole number from 0 to 2**32 - 1")
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (other people's code uses the global generator)
    torch.manual_seed(seed)


# %% [markdown]
# Drawing twice after the same seed gives the same numbers, from all three generators:


# %%
import torch


def draw() -> tuple[float, ...]:
    numbers = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    return tuple(round(number, 4) for number in numbers)


print("           Python   NumPy  PyTorch")
for run in ("first", "second"):
    seed_everything(0)
    print(f"{run:10} " + "  ".join(f"{number:.4f}" for number in draw()))

# %% [markdown]
# And the package has this very function. We ask Python for the source of the imported one, and it
# is the source of the one defined above, character for character:

# %%
import inspect

import llmbook.environment

imported = inspect.getsource(llmbook.environment.seed_everything)
assert imported == inspect.getsource(seed_everything)
print("llmbook/environment.py:", imported.splitlines()[0])

# %% [markdown]
# Try it. Change the docstring of `seed_everything` in the script or in the notebook, run
# `make sync`, and look at `llmbook/environment.py`. Never edit the module itself: it is written
# anew from the chapter, and a test compares the two byte for byte.
#
# ### A class in several cells
#
# A function fits into one cell. A class often does not, and its methods are easier to follow one
# idea at a time. So a later cell may **continue** a class. It begins with
# `class Name(Name):  # continued`. Here is a class that counts what it sees:


# %%
class Tally:
    """How often each thing was seen."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, thing: str) -> None:
        self.counts[thing] = self.counts.get(thing, 0) + 1


# %% [markdown]
# A few paragraphs later, say, we want to know shares. The class goes on:


# %%
class Tally(Tally):  # continued
    def share(self, thing: str) -> float:
        return self.counts.get(thing, 0) / sum(self.counts.values())


# %% [markdown]
# To Python, this is plain inheritance: the new `Tally` is a subclass of the old one and takes over
# its name. In the notebook you can therefore try each part as soon as you have read it:

# %%
tally = Tally()
for word in "the cat sat on the mat".split():
    tally.add(word)
print(f"'the' was seen {tally.counts['the']} times, {tally.share('the'):.0%} of the words")

# %% [markdown]
# `Tally` stays in the notebook. When the parts of a class are exported, the module gets a single
# class with all the methods, as if it had been written in one piece. If two parts define the same
# method, the later one counts. One thing to keep in mind when you experiment: an object that was
# made before its class was continued has none of the new methods, so make a new one.
#
# ## What a seed does not fix
#
# A seed fixes the random numbers. Three other things can still make two runs differ: order,
# rounding, and versions.
#
# **Order.** Python scrambles the hashes of strings with a new key in each process, to protect
# servers from crafted input. A set is ordered by its hashes, so a program that loops over a set of
# words does so in a new order each time it starts. The environment variable `PYTHONHASHSEED` sets
# the key. Three processes with three keys list the same five words:

# %%
import subprocess
import sys

program = "print(*{'the', 'cat', 'sat', 'on', 'mat'})"
for key in ("1", "2", "3"):
    environment = os.environ | {"PYTHONHASHSEED": key}
    order = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    print(f"key {key}:", order.strip())

# %% [markdown]
# Sorting the set before looping over it is the cure. The same goes for the files of a folder,
# which come in whatever order the disk keeps them.
#
# **Rounding.** A 32-bit floating-point number keeps 24 binary digits. Each addition rounds its
# result to the nearest such number $\operatorname{fl}(a + b)$, and makes a relative error of at
# most $u = 2^{-24}$:
#
# $$
# \operatorname{fl}(a + b) = (a + b)(1 + \delta), \qquad |\delta| \le u \approx 6 \cdot 10^{-8} .
# $$ (rounding)
#
# Because every partial sum is rounded, the order of a sum matters:

# %%
big, small = torch.tensor(1e8), torch.tensor(1.0)
print("(1e8 + 1) - 1e8 =", ((big + small) - big).item())
print("(1e8 - 1e8) + 1 =", ((big - big) + small).item())

# %% [markdown]
# How large can the difference get? Add $n$ numbers from left to right. The first two take part in
# $n - 1$ additions, so they are multiplied by $n - 1$ factors $(1 + \delta_i)$, and the later ones
# by fewer. To first order in $u$ such a product differs from one by at most $(n - 1) u$. The error
# of the whole sum $\hat s$ is therefore at most
#
# $$
# |\hat s - s| \;\le\; (n - 1)\, u \sum_{i=1}^{n} |x_i| + O(u^2) .
# $$ (summation-error)
#
# This is the worst case, in which all the roundings go the same way. If they go up and down at
# random, they partly cancel, and a rule of thumb puts $\sqrt n$ in the place of $n$
# {cite}`higham2002accuracy`. {numref}`fig-rounding` measures the error over twenty random vectors
# for each length. Adding one by one keeps near the rule of thumb. PyTorch's own sum does better
# still: it adds in blocks, then adds the blocks, so that each number passes through few additions.

# %% mystnb={"figure": {"caption": "Relative error of summing n random numbers in 32 bits, root mean square over twenty vectors. Adding one by one stays far below the worst case; adding in blocks hardly errs at all.", "name": "fig-rounding"}, "image": {"alt": "Relative error against n, both axes logarithmic. The bound, a dashed line, rises in proportion to n up to 6e-2. The rule of thumb, a dotted line, rises half as steeply, and the measured error of adding one by one keeps close to it. The error of torch.sum stays level, below 1e-7."}}
import matplotlib.pyplot as plt

plt.style.use("llmbook.book")
sizes = np.array([2**k for k in range(7, 19)])
one_by_one, in_blocks = [], []
for n in sizes:
    numbers = np.random.default_rng(n).random((20, n), dtype=np.float32)
    exact = numbers.sum(axis=1, dtype=np.float64)
    # cumsum adds from left to right, and its last entry is the sum
    naive = numbers.cumsum(axis=1, dtype=np.float32)[:, -1]
    blocks = torch.from_numpy(numbers).sum(dim=1).numpy()
    for errors, sums in ((one_by_one, naive), (in_blocks, blocks)):
        errors.append(np.sqrt(np.mean((sums / exact - 1) ** 2)))
fig, ax = plt.subplots()
ax.plot(sizes, (sizes - 1) * 2.0**-24, "--", color="C6", label="bound $(n-1)u$")
ax.plot(sizes, np.sqrt(sizes) * 2.0**-24, ":", color="C6", label=r"rule of thumb $\sqrt{n}\,u$")
ax.plot(sizes, one_by_one, "o-", label="one by one")
ax.plot(sizes, in_blocks, "s-", label="torch.sum")
ax.set(xscale="log", yscale="log", xlabel="n", ylabel="relative error", ylim=(1e-8, 1e-1))
ax.legend(ncols=2)
plt.show()

# %% [markdown]
# No sum passes the bound, and for the longest vectors the three numbers are orders of magnitude
# apart:

# %%
assert np.all(one_by_one <= (sizes - 1) * 2.0**-24) and max(in_blocks) < 1e-6
print(f"relative error of adding {sizes[-1]:,} numbers")
print(f"  bound       {(sizes[-1] - 1) * 2.0**-24:.3%}")
print(f"  one by one  {one_by_one[-1]:.3%}")
print("  torch.sum   below 0.0001%")

# %% [markdown]
# A processor with different vector units, or another number of threads, cuts the sums into other
# blocks. The last digits change. How much that matters depends on what follows. A training run
# feeds each step's result into the next, so a difference in the last digit grows with the steps.
# To see it, we train a small network (chapter 13 explains the loop), once with its inputs in one
# order and once in the other: the same sums, rounded otherwise.


# %%
def train(order: torch.Tensor, steps: int) -> torch.Tensor:
    torch.manual_seed(0)
    x, noise = torch.randn(256, 16), torch.randn(256, 1)
    y = x.prod(dim=1, keepdim=True).sign() + 0.1 * noise
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = (model(x[order]) - y[order]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([w.detach().flatten() for w in model.parameters()])


forward, backward = torch.arange(256), torch.arange(255, -1, -1)
once, again = train(forward, 300), train(forward, 300)
print(f"repeated, 300 steps:    {(once != again).sum()} of {len(once):,} weights differ")
early, late = (
    (train(forward, steps) - train(backward, steps)).abs().max().item() for steps in (1, 300)
)
assert early < 1e-6 and late > 10 * early
print("other order, 1 step:    weights agree to 0.000001")
print("other order, 300 steps: the difference is more than 10 times as large")

# %% [markdown]
# So two machines agree to six or seven digits in what takes a few steps, and to fewer in what is
# trained.
#
# **Versions.** A new release of a library may draw its random numbers in another order, or fuse
# two operations. The pinned versions in `constraints.txt` are those the book was computed with.
#
# From this follow the rules for every output in the book. Numbers are printed rounded. What
# depends on training is asserted to lie in a range and printed coarsely. On one processor with one
# version and one number of threads, the same seed gives the same bits, and chapter 13 relies on
# that: a training run that is killed and resumed ends with exactly the weights of one that was
# not.
#
# ## The device
#
# A model runs on whatever PyTorch can reach: an Nvidia or AMD card (`cuda`), Apple's graphics
# processor (`mps`), or the processor itself (`cpu`). The code of the book is the same for all.


# %%
#| export
def best_device() -> "torch.device":
    """The fastest device that PyTorch can use here: ``cuda``, else ``mps``, else ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# %% [markdown]
# Tensors are made on a device, and what is computed from them stays there until it is asked for:

# %%
x = torch.ones(3, device=best_device())
print("1 + 1 + 1 =", x.sum().item())

# %% [markdown]
# The chapters stay on the processor unless they say otherwise, because their outputs are compared.
# On a graphics card some kernels add in the order in which their threads happen to finish, so even
# the same run on the same card can differ in the last digits;
# `torch.use_deterministic_algorithms(True)` forbids such kernels, at some cost in speed. The same
# classes take a `device` argument when you train for real.
#
# ## Who computed this?
#
# When a number differs, the first question is what it was computed with. The answer belongs in
# every report and every checkpoint, so it is a function.


# %%
#| export
#: The packages whose versions decide what is computed.
REPORTED_PACKAGES = ("llmbook", "torch", "numpy", "tiktoken", "tokenizers", "transformers")


def describe_environment() -> dict[str, str]:
    """What this process computes with: system, processor, threads, device, versions.

    The values are strings, so that the description can go into a log or a checkpoint. Packages that
    are not installed are left out. Nothing in it names the user or the machine.
    """
    import torch

    device = best_device()
    description = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
    }
    if device.type == "cuda":
        description["device"] = torch.cuda.get_device_name(device)
    for package in REPORTED_PACKAGES:
        try:
            description[package] = version(package)
        except PackageNotFoundError:
            continue
    return description


# %% [markdown]
# This is the one output of the chapter that should differ on your machine, and the only one that
# the tests do not compare.

# %% tags=["nbval-ignore-output"]
for what, value in describe_environment().items():
    print(f"{what:14} {value}")

# %% [markdown]
# ## What every chapter asks of its arguments and its files
#
# `seed_everything` refuses a seed of -1 by name. The alternative is an error from somewhere inside
# NumPy, about a variable that the caller has never heard of. Every public function of the book
# does the same, and every file that the book writes is either complete or not there. Both take a
# few lines, written once, here. They are the first engine rooms. Open one, and see whether it
# bothers you that you had skipped it.

# %% [markdown] tags=["engine"]
# ### Engine room: a wrong argument is named where it enters

# %% [markdown] tags=["engine"]
# A message is useful if it says which argument is wrong, what was expected and what came. The
# checks take the names from keywords, so that a check of two sizes is one line:
# `check_at_least(d_model=(1, d_model), n_heads=(1, n_heads))`. To Python, a truth value is a whole
# number, but nobody means one by a size, so it is refused.


# %% tags=["engine"]
#| export
def check_at_least(**bounds: tuple[int, object]) -> None:
    """Demand whole numbers of at least so much: ``check_at_least(size=(1, size))``.

    ``None`` passes: it stands for an option that was not given.

    >>> check_at_least(workers=(1, 0))
    Traceback (most recent call last):
    ValueError: workers: expected at least 1, got 0
    """
    for argument, (least, value) in bounds.items():
        if value is None:
            continue
        # A tuple of types, because torch 2.6 cannot compile a union.
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{argument}: expected a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{argument}: expected at least {least}, got {value}")


# %% [markdown] tags=["engine"]
# That check lets `None` pass. One number that must be given, with an upper bound if it has one, and
# sizes that must be even are checked by these:


# %% tags=["engine"]
#| export
def check_whole(argument: str, value: object, least: int, most: int | None = None) -> None:
    """Demand a whole number from ``least`` to ``most``; ``None`` is refused.

    >>> check_whole("size", None, 1)
    Traceback (most recent call last):
    ValueError: size: expected a whole number of at least 1, got None
    """
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    known = () if isinstance(value, bool) else (int, np.integer)
    if not isinstance(value, known) or value < least or (most is not None and value > most):
        raise ValueError(f"{argument}: expected a whole number {bounds}, got {value!r:.60}")


def check_even(**sizes: int | np.integer) -> None:
    """Demand even whole numbers of at least 2."""
    for argument, size in sizes.items():
        check_at_least(**{argument: (2, size)})
        if size is None or size % 2:
            raise ValueError(f"{argument}: expected an even number, got {size}")


# %% [markdown] tags=["engine"]
# Four other kinds come up everywhere: shares, names chosen from a list, texts, for which bytes are
# easily mistaken, and paths of files.


# %% tags=["engine"]
#| export
def check_fraction(argument: str, value: object) -> None:
    """Demand a number of at least 0 and less than 1, such as a rate of dropout."""
    known = () if isinstance(value, bool) else (int, float, np.number)
    if not isinstance(value, known) or not 0 <= value < 1:
        raise ValueError(f"{argument}: expected at least 0 and less than 1, got {value!r}")


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """Demand one of ``choices``.

    >>> check_choice("backend", "tensorflow", ("reference", "torch"))
    Traceback (most recent call last):
    ValueError: backend: expected one of reference, torch, got 'tensorflow'
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}")


def check_text(value: object, argument: str = "text") -> str:
    """Return ``value`` if it is a ``str``, else raise a ``ValueError`` that names ``argument``."""
    if not isinstance(value, str):
        raise ValueError(f"{argument}: expected a str, got {value!r:.60}")
    return value


def check_path(value: object, argument: str = "path") -> Path:
    """Return ``value`` as a ``Path``; refuse what is none, or empty, by the name of ``argument``.

    >>> check_path(5)
    Traceback (most recent call last):
    ValueError: path: expected a str or a Path, got 5
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{argument}: expected a str or a Path, got {value!r:.60}")
    return Path(value)


# %% [markdown] tags=["engine"]
# Kinds and shapes need no such line in every function, because the annotations state them
# already. A call that works never looks at them. But when a call fails with one of Python's own
# errors, say `'str' object has no attribute 'size'` from somewhere inside, its arguments are
# compared with the annotations, and the first that doesn't fit is named, with what was expected and
# what came. Dimensions of the same name must have the same size in all arguments. The error from
# inside stays in the traceback as the cause. A message that begins with the name of an argument, as
# those of the checks do, is left alone.


# %% tags=["engine"]
#| export
# What Python and PyTorch raise over an argument of the wrong kind or shape.
FROM_INSIDE = (TypeError, AttributeError, ValueError, IndexError, KeyError, RuntimeError)


def misfit(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    """Return a message about the first argument that its annotation doesn't allow, or None."""
    from beartype.door import is_bearable
    from jaxtyping import jaxtyped

    with jaxtyped("context"), suppress(Exception):  # a hint that cannot be read forbids nothing
        hints = get_type_hints(function)
        for name, value in arguments.items():
            hint = hints.get(name, Any)
            # A whole number may stand for a fraction.
            if is_bearable(value, hint) or (type(value) is int and is_bearable(float(value), hint)):
                continue
            expected = re.sub(r"\b(?:\w+\.)+(?=\w)", "", formatannotation(hint))
            of_shape = hasattr(value, "shape") and hasattr(value, "dtype")
            shown = " ".join(repr(value).split())[:60]
            got = f"{value.dtype} of shape {tuple(value.shape)}" if of_shape else shown
            return f"{name}: expected {expected}, got {got}"
    return None


# %% [markdown] tags=["engine"]
# `explained(function)` is the function with that comparison after a failure. A generator fails
# while it's being used up, so it's watched until its end.


# %% tags=["engine"]
#| export
def explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with failed calls that name the argument of the wrong kind or shape."""
    names = signature(function)
    several = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}  # annotated one by one

    def explain(error: Exception, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not isinstance(error, FROM_INSIDE) or str(error).partition(":")[0] in names.parameters:
            return
        try:
            given = names.bind(*arguments, **options).arguments
        except TypeError:  # Python has said which argument is missing or unknown
            return
        single = {n: v for n, v in given.items() if names.parameters[n].kind not in several}
        if message := misfit(function, single):
            raise ValueError(message) from error

    def watched(generator: Generator[Any, Any, Any], *call: Any) -> Generator[Any, Any, Any]:
        try:
            return (yield from generator)
        except Exception as error:
            explain(error, *call)
            raise

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            result = function(*arguments, **options)
        except Exception as error:
            explain(error, arguments, options)
            raise
        return watched(result, arguments, options) if type(result) is GeneratorType else result

    return call


# %% [markdown] tags=["engine"]
# Every module ends with a line that the exporter writes, `explain_calls(__name__)`: it puts
# explained functions and methods in the place of the public ones. In a notebook, where the code on
# the page is what runs, nothing is replaced.


# %% tags=["engine"]
#| export
def explain_calls(module: str) -> None:
    """Explain failed calls of what a module exports: functions, and the methods of its classes."""
    names = vars(import_module(module))
    for name in names["__all__"]:
        if isinstance(names[name], FunctionType):
            names[name] = explained(names[name])
        elif isinstance(names[name], type) and not getattr(names[name], "_is_protocol", False):
            for method, value in list(vars(names[name]).items()):
                if method.startswith("_") and method not in {"__init__", "__call__"}:
                    continue
                if isinstance(value, FunctionType):
                    setattr(names[name], method, explained(value))
                elif isinstance(value, classmethod | staticmethod):
                    setattr(names[name], method, type(value)(explained(value.__func__)))


# %% [markdown] tags=["engine"]
# Some functions need a library that is not installed with the package. Python's own message names
# the library. Ours names the extra that brings it.


# %% tags=["engine"]
#| export
@contextmanager
def requires_extra(what: str, extra: str) -> Iterator[None]:
    """Say which extra of the package to install when an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what} needs an extra: pip install 'llmbook[{extra}]'") from error


# %% [markdown]
# ### All or nothing
#
# A program that is killed while it writes leaves half a file, and half a file looks like a file.
# The cure is old and short: write under another name in the same folder, and rename at the end. A
# rename within a file system happens as a whole or not at all. `whole_file(path)`
# gives its block a draft to write into, and moves it when the block ends well.

# %% [markdown] tags=["engine"]
# #### Engine room: how a file or a folder is written as a whole

# %% [markdown] tags=["engine"]
# The draft's name begins with a dot and carries the number of the process, so that two programs
# that write the same file do not share a draft. The last one to finish wins. A folder of that name
# is noticed before anything is written.


# %% tags=["engine"]
#| export
@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path; move it to ``path`` at the end, or remove it after an exception."""
    path = check_path(path)
    if path.is_dir():
        raise ValueError(f"path: expected a file to write, got the folder {str(path)!r}")
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# %% [markdown] tags=["engine"]
# A folder is written in the same way, into a hidden folder beside it. A run that was killed cannot
# sweep up after itself, so the next one with the same target does.


# %% tags=["engine"]
#| export
@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """Give a hidden directory to write into; rename it to ``path`` at the end, or remove it."""
    path = check_path(path, "directory")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"directory: expected a new or an empty one, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, trash = (path.with_name(f".{path.name}.part-{uuid.uuid4().hex}") for _ in range(2))
    for leftover in path.parent.glob(f".{escape(path.name)}.part-*"):
        with suppress(OSError):  # another run may sweep, too
            # Renamed first: it must not be finished by halves.
            shutil.rmtree(leftover.rename(trash))
    draft.mkdir()
    try:
        yield draft
        if path.exists():
            path.rmdir()
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# %% [markdown]
# ### A writer that is stopped
#
# Yesterday's results are complete. Today's program is interrupted in the middle of a word. Its
# draft is gone, and yesterday's file is untouched:

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    results = Path(folder, "results.txt")
    results.write_text("all of yesterday's results")
    with suppress(KeyboardInterrupt), whole_file(results) as draft:
        draft.write_text("half of toda")
        raise KeyboardInterrupt
    print("in the folder:", [file.name for file in Path(folder).iterdir()])
    print("in the file:  ", results.read_text())

# %% [markdown]
# ## Exercises
#
# ````{exercise} A private stream
# :label: ex-environment-stream
# Seeding the global generators is a blunt tool: a library that draws one number more shifts all
# that follow. Write `private_normals(n, seed)`, which draws a tensor of `n` standard normal
# numbers from a generator of its own (`torch.Generator`) and leaves the global one untouched. (5
# minutes)
# ````


# %% tags=["solution"]
def private_normals(n: int, seed: int) -> torch.Tensor:
    """``n`` standard normal numbers that depend on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator)


# %% tags=["check"]
def global_states() -> str:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return str((torch.get_rng_state().tolist(), random.getstate(), numpy_state))


before = global_states()
first, again, other = (private_normals(10_000, seed=seed) for seed in (3, 3, 4))
assert torch.is_tensor(first) and first.shape == (10_000,), "the result is a tensor of n numbers"
assert torch.equal(first, again), "the same seed must give the same numbers"
assert not torch.equal(first, other), "another seed must give other numbers"
assert global_states() == before, "a global generator was moved"
assert abs(first.mean()) < 0.05, "the mean of standard normal numbers is 0"
assert abs(first.std() - 1) < 0.05, "the standard deviation of standard normal numbers is 1"
assert abs((first.abs() > 2).float().mean() - 0.0455) < 0.01, (
    "of normal numbers 4.6 percent are beyond two standard deviations; these are not normal"
)

# %% [markdown]
# ````{exercise} A hash that stays
# :label: ex-environment-hash
# Chapter 04 will hash words, and the result must not depend on the process. Write
# `stable_hash(text)`, a whole number below $2^{64}$: the first 8 bytes, most significant first, of
# the SHA-256 digest (`hashlib`) of the text's UTF-8 bytes. (10 minutes)
# ````


# %% tags=["solution"]
def stable_hash(text: str) -> int:
    """The first 8 bytes of the SHA-256 digest of the UTF-8 text, as a number."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# %% tags=["check"]
salted = {hash("cat"), hash("cat") % 2**64}
of_nothing, of_cat = stable_hash(""), stable_hash("cat")
assert isinstance(of_nothing, int), "the result is a whole number"
assert of_cat not in salted, "Python's own hash depends on the process"
assert 0 <= of_cat < 2**64, "eight bytes, no more: the number is below 2**64"
assert of_cat >= 2**56, "eight bytes have sixteen hexadecimal digits, and this number has fewer"
assert of_cat.to_bytes(8, "little").hex() != "77af778b51abd4a3", (
    "the most significant byte is first"
)
assert of_nothing == 0xE3B0C44298FC1C14, "SHA-256 of nothing begins e3b0c44298fc1c14"
assert stable_hash("häuser") == 0x34C94DBC2853CFDE, "the bytes are those of the text in UTF-8"
assert stable_hash(" Cat") != of_cat, "the hash is of the text as it is, capitals and blanks too"

# %% [markdown]
# ````{exercise} Sum without loss
# :label: ex-environment-kahan
# Kahan's summation keeps what rounding cuts off. Beside the sum $s$ it keeps a correction $c$; for
# each $x$ it forms $y = x - c$ and $t = s + y$, then $c = (t - s) - y$ and $s = t$. Write
# `kahan_sum(numbers)` in 32 bits (`np.float32` throughout). In algebra $c$ is always zero; why
# does that forbid a compiler to simplify this program? (20 minutes)
# ````


# %% tags=["solution"]
def kahan_sum(numbers: np.ndarray) -> np.float32:
    """The sum of 32-bit numbers by compensated summation (Higham 2002, section 4.3)."""
    # Floats are not the numbers of algebra: (t - s) - y is what rounding cut off, not zero, and a
    # compiler that "simplifies" it to zero turns this back into the plain sum.
    total = correction = np.float32(0)
    for number in numbers.astype(np.float32):
        corrected = number - correction
        new_total = total + corrected
        correction = (new_total - total) - corrected  # zero in algebra, the lost part in floats
        total = new_total
    return total


# %% tags=["check"]
tenths = np.full(100_000, 0.1, dtype=np.float32)
exact = tenths.sum(dtype=np.float64)
naive_error = abs(float(tenths.cumsum(dtype=np.float32)[-1]) - exact)
kahan_error = abs(float(kahan_sum(tenths)) - exact)
assert isinstance(kahan_sum(tenths), np.float32), "the sum is a number of 32 bits, np.float32"
assert kahan_sum(np.array([1, 1e10, 1, -1e10], np.float32)) == 0, "32 bits throughout"
assert kahan_sum(np.array([1] + [2**-24] * 4, np.float32)) == 1 + 2**-22, "what is cut off is kept"
assert kahan_sum(np.array([1] + [2**-25] * 8, np.float32)) == 1 + 2**-22, (
    "what was cut off before must still be in the correction: it is of y, not of x"
)
assert kahan_error < 1e-3 < naive_error, f"error {kahan_error:.4f}, one by one {naive_error:.4f}"

# %% [markdown]
# ## Summary
#
# Two commands set up, build and prove the book. A chapter is a script paired with a notebook; its
# exported cells are a module, and a class that is written in several cells is one class there. The
# main line of a chapter can be read with all engine rooms shut. Seeds fix random numbers. They do
# not fix the order of sets, the rounding of sums cut in another way, or what another version
# computes, and so outputs are rounded and ranges are asserted.
#
# When two runs differ, ask in this order. Same versions? Same seed, set before the first random
# number? Any loop over a set, or over files in the order the disk gives them? Same number of
# threads, same device? If all are the same and the difference is in the last digits, it is
# rounding; if it is larger, it is a bug.
#
# Knuth {cite}`knuth1984literate` invented programs that are written to be read. Goldberg
# {cite}`goldberg1991floating` is the classic on floating-point numbers, Higham
# {cite}`higham2002accuracy` the complete account of how errors add up.
