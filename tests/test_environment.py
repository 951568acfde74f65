import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from llmbook.environment import best_device, describe_environment, seed_everything


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
    assert description["torch"] == torch.__version__
    assert int(description["torch threads"]) == torch.get_num_threads()
    assert all(isinstance(value, str) for value in description.values())
    assert not any("/" in value for value in description.values())


def test_package_imports_nothing_heavy():
    program = "import sys, llmbook; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
