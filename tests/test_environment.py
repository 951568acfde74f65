import os
import platform
import random
import subprocess
import sys
import types
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Literal

import jaxtyping
import numpy as np
import pytest
import torch
from jaxtyping import Float

import llmbook
from llmbook import environment
from llmbook.environment import (
    REPORTED_PACKAGES,
    best_device,
    check_at_least,
    check_choice,
    check_even,
    check_fraction,
    check_path,
    check_text,
    describe_environment,
    explain_calls,
    requires_extra,
    seed_everything,
    whole_directory,
    whole_file,
)


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draw():
    return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002


def test_same_seed_same_numbers():
    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert draw() != first


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_whole_range_of_seeds_is_taken(seed):
    seed_everything(seed)


@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_impossible_seed_is_named(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        seed_everything(seed)


def test_best_device_computes():
    device = best_device()
    assert device.type in {"cuda", "mps", "cpu"}
    assert torch.ones(4, device=device).sum().item() == 4


def test_description_reports_versions_and_no_names():
    description = describe_environment()
    assert torch.__version__.startswith(description["torch"])  # which may say +cu126 besides
    assert int(description["torch threads"]) == torch.get_num_threads()
    assert all(isinstance(value, str) for value in description.values())
    assert not any("/" in value for value in description.values())


def test_package_imports_nothing_heavy():
    program = "import sys, llmbook; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- what every chapter asks of its arguments and files -----------------------------------------


@pytest.mark.parametrize("value", [0, -3, np.int64(0)])
def test_too_small_a_number_is_named(value):
    with pytest.raises(ValueError, match=rf"size: expected at least 1, got {value}"):
        check_at_least(size=(1, value))


@pytest.mark.parametrize("value", [1.0, "3", True, [1]])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match="size: expected a whole number, got"):
        check_at_least(size=(1, value))


def test_numbers_of_any_integer_type_and_none_pass():
    check_at_least(a=(1, 1), b=(1, np.int64(2)), c=(1, None))


@pytest.mark.parametrize(("value", "message"), [(3, "an even number, got 3"), (0, "at least 2")])
def test_odd_and_empty_sizes_are_named(value, message):
    with pytest.raises(ValueError, match=f"d_head: expected {message}"):
        check_even(d_head=value)
    check_even(d_head=2)


@pytest.mark.parametrize("value", [1, 1.5, -0.1, float("nan"), "0.5", None])
def test_no_fraction_is_named(value):
    with pytest.raises(ValueError, match="dropout: expected at least 0 and less than 1, got"):
        check_fraction("dropout", value)
    check_fraction("dropout", 0)


@pytest.mark.parametrize("value", ["c", None, 1, ["a"]])
def test_no_choice_is_named(value):
    with pytest.raises(ValueError, match="backend: expected one of a, b, got"):
        check_choice("backend", value, ("a", "b"))
    check_choice("backend", "a", ("a", "b"))


def test_no_text_is_named():
    assert check_text("a") == "a"
    with pytest.raises(ValueError, match=r"line: expected a str, got b'a'"):
        check_text(b"a", "line")


def test_a_missing_library_names_the_extra():
    with (
        pytest.raises(ImportError, match=r"Parquet needs an extra: pip install 'llmbook\[scale\]'"),
        requires_extra("Parquet", extra="scale"),
    ):
        import no_such_library_anywhere  # noqa: F401


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as draft:
        draft.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), whole_file(path) as draft:
        draft.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError), whole_directory(path) as draft:
        (draft / "half").touch()
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    (tmp_path / "new" / ".folder.part-left").mkdir()  # by a run that was killed
    with whole_directory(path) as draft:
        (draft / "all").touch()
    assert [file.name for file in path.parent.rglob("*")] == ["folder", "all"]
    with (
        pytest.raises(ValueError, match="directory: expected a new or an empty one"),
        whole_directory(path),
    ):
        pass


# --- promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_fastest_device_is_taken(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert best_device() == torch.device(expected)


def test_a_graphics_card_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: asked.append(d) or "A fast card")
    assert describe_environment()["device"] == "A fast card"
    assert asked == [torch.device("cuda")]


def test_the_description_says_what_is_computed_with(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(environment, "REPORTED_PACKAGES", ("numpy", "no-such-package"))
    assert describe_environment() == {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
        "numpy": np.__version__,
    }
    assert set(REPORTED_PACKAGES) >= {"llmbook", "torch", "numpy"}


def test_seeds_reach_each_generator():
    seed_everything(5)
    assert random.random() == random.Random(5).random()
    assert np.random.rand() == np.random.RandomState(5).rand()  # noqa: NPY002
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("seed", [1.0, "1", None, float("nan")])
def test_what_is_no_seed_is_named(seed):
    with pytest.raises(ValueError, match=r"^seed.*(expected int|must be a whole number)"):
        seed_everything(seed)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("value", [None, False, True, 3.0, "4"])
def test_what_is_no_even_number_is_named(value):
    with pytest.raises(ValueError, match=f"d_head: expected .* number, got {value!r}"):
        check_even(d_head=value)


@pytest.mark.parametrize("value", [True, False, np.float32(1), np.int64(-1)])
def test_truth_is_no_fraction(value):
    with pytest.raises(ValueError, match="dropout: expected at least 0 and less than 1, got"):
        check_fraction("dropout", value)


def test_fractions_of_numpy_pass():
    check_fraction("dropout", np.float32(0.5))
    check_fraction("dropout", np.int64(0))
    check_fraction("dropout", 0.999999)


@pytest.mark.usefixtures("untyped")
def test_a_path_is_a_str_or_a_path(tmp_path):
    assert check_path("a/b") == Path("a/b") == check_path(Path("a/b"))
    for value in (5, None, b"a", ["a"]):
        with pytest.raises(ValueError, match=r"folder: expected a str or a Path, got"):
            check_path(value, "folder")
        for write, name in ((whole_file, "path"), (whole_directory, "directory")):
            with (
                pytest.raises(ValueError, match=f"{name}: expected a str or a Path, got"),
                write(value),
            ):
                pass
    with whole_file(str(tmp_path / "a")) as draft:
        draft.write_text("by its name")
    assert (tmp_path / "a").read_text() == "by its name"


def test_long_values_are_cut_in_messages():
    with pytest.raises(ValueError) as caught:
        check_text([0] * 1000)
    assert len(str(caught.value)) < 90


def test_a_draft_is_hidden_beside_its_file(tmp_path):
    with whole_file(tmp_path / "file") as draft:
        assert draft.parent == tmp_path
        assert draft.name.startswith(".file.")
        assert str(os.getpid()) in draft.name
        draft.touch()
    with whole_directory(tmp_path / "folder") as draft:
        assert draft.is_dir()
        assert draft.parent == tmp_path
        assert draft.name.startswith(".folder.")


def test_a_file_does_not_take_a_folders_place(tmp_path):
    with (
        pytest.raises(ValueError, match=r"path: expected a file to write, got the folder"),
        whole_file(tmp_path),
    ):
        raise AssertionError("the block must not run")


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    (tmp_path / "empty").mkdir()
    with whole_directory(tmp_path / "empty") as draft:
        (draft / "a").touch()
    (tmp_path / "file").touch()
    for taken in ("empty", "file"):
        with (
            pytest.raises(ValueError, match="directory: expected a new or an empty one, got"),
            whole_directory(tmp_path / taken),
        ):
            raise AssertionError("the block must not run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_a_draft_of_another_name_is_left_alone(tmp_path):
    (tmp_path / ".folder2.part-left").mkdir()
    with whole_directory(tmp_path / "folder"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".folder2.part-left", "folder"]


def test_other_errors_pass_through_unchanged():
    with pytest.raises(KeyError, match="no import"), requires_extra("Parquet", extra="scale"):
        raise KeyError("no import")
    with requires_extra("Parquet", extra="scale"):
        import json  # noqa: F401


class Scale(torch.nn.Module):
    def __init__(self, factor: float = 1.0, *, of: Literal["rows", "columns"] = "rows"):
        super().__init__()
        self.factor = factor + 0

    def forward(self, x: Float[torch.Tensor, "batch d"], y: Float[torch.Tensor, "batch d"]):
        return self.factor * x.mul(y)

    @classmethod
    def of_text(cls, text: str) -> "Scale":
        return cls(float(text.strip()))

    @staticmethod
    def length(text: str) -> int:
        return len(text)


def upper(text: str, *more: str, times: int = 1, **options: object) -> str:
    if times < 0:
        raise ValueError(f"times: expected at least 0, got {times}")
    return times * (text.upper() + "".join(more))


def letters(text: str) -> Iterator[str]:
    yield from text.strip()
    return 7


def opened(path: Path) -> bytes:
    return Path(path).read_bytes()


@pytest.fixture
def package(monkeypatch):
    """A module whose functions were explained, as the exporter does it."""
    module = types.ModuleType("explained_module")
    vars(module).update({f.__name__: f for f in (upper, letters, opened)})
    # A class of its own, since its methods are replaced.
    module.Scale = type("Scale", (Scale,), dict(vars(Scale)))
    module.__all__ = ["Scale", "upper", "letters", "opened", "LIMIT"]
    module.LIMIT = 5
    monkeypatch.setitem(sys.modules, "explained_module", module)
    explain_calls("explained_module")
    return module


TWO, THREE = torch.ones(2, 4), torch.ones(3, 4)
FAILED_CALLS = {
    "text: expected str, got 5": lambda p: p.upper(5),
    "text: expected str, got None": lambda p: list(p.letters(None)),
    "factor: expected float, got 'two'": lambda p: p.Scale("two"),
    "text: expected str, got 17": lambda p: p.Scale.of_text(17),
    "text: expected str, got 3": lambda p: p.Scale.length(3),
    r"y: expected Float\[Tensor, 'batch d'\], got torch.float32 of shape \(3, 4\)": lambda p: (
        p.Scale().forward(TWO, THREE)
    ),
    r"x: expected Float\[Tensor, 'batch d'\], got \[1\]": lambda p: p.Scale().forward([1], TWO),
}


@pytest.mark.parametrize("message", FAILED_CALLS)
def test_a_failed_call_names_the_argument_that_does_not_fit(package, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        FAILED_CALLS[message](package)
    assert caught.value.__cause__ is not None, "what Python said stays as the cause"


def test_only_what_fails_over_its_arguments_is_explained(package):
    assert package.upper("a", "b", times=2, other=None) == "AbAb"
    assert package.Scale.length([1, 2]) == 2, "a call that works is not looked at"
    assert package.Scale(3).factor == 3, "a whole number may stand for a fraction"
    assert (list(package.letters(" ab ")), package.LIMIT) == (["a", "b"], 5)
    with pytest.raises(ValueError, match=r"^times: expected at least 0"):
        package.upper(b"a", times=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'facto'"):
        package.Scale(facto=2)
    with pytest.raises(TypeError, match=r"can only concatenate|expected str instance"):
        package.upper("a", 5)  # one of several: their names are in no message
    with pytest.raises(FileNotFoundError):
        package.opened("nowhere")


def test_an_explained_function_is_still_itself(package):
    assert (package.upper.__name__, package.upper.__wrapped__) == ("upper", upper)
    assert str(signature(package.upper)) == str(signature(upper))
    assert package.Scale.length("abc") == 3


def test_every_module_explains_its_calls():
    for file in Path(llmbook.__file__).parent.glob("[a-z]*.py"):
        assert file.read_text(encoding="utf-8").endswith("\nexplain_calls(__name__)\n"), file
