import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from llmbook.environment import (
    best_device,
    check_at_least,
    check_choice,
    check_even,
    check_fraction,
    check_text,
    describe_environment,
    requires_extra,
    seed_everything,
    whole_directory,
    whole_file,
)


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
