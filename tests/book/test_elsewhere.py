"""Other processors, bounds with room, and changes that a test should notice."""

import subprocess
import sys
from pathlib import Path

import elsewhere
import mutate
import pytest
from book import ROOT
from margins import share

TIGHT = """\
import torch

def test_near_its_bound():
    torch.testing.assert_close(torch.tensor([1.0, 2.0 + 1e-5]), torch.tensor([1.0, 2.0]))

def test_with_room():
    assert torch.allclose(torch.ones(2, dtype=torch.float64), torch.ones(2).double() + 1e-13)
"""


def test_a_setting_has_its_own_models():
    places = {elsewhere.environment(setting)["LLMBOOK_ARTIFACTS"] for setting in elsewhere.SETTINGS}
    assert len(places) == len(elsewhere.SETTINGS) == 2


@pytest.mark.parametrize(
    "setting, capability", [("plain", "NO AVX"), ("avx2", "AVX2")], ids=["plain", "avx2"]
)
def test_torch_follows_a_setting(setting, capability):
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    command = [sys.executable, "-c", code]
    env = elsewhere.environment(setting)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in {capability, "DEFAULT"}


def test_shares_of_a_bound():
    assert share([1.0, 2.5], [1.0, 2.0], rtol=0.5, atol=0.0) == 0.5
    assert share([3.0], [3.0], rtol=0.0, atol=0.0) == 0, "equal numbers need no room"
    assert share([], [], rtol=1.0, atol=0.0) == 0


def test_comparisons_near_their_bounds_are_listed(tmp_path):
    (tmp_path / "test_tight.py").write_text(TIGHT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "margins", "-p", "no:cacheprovider"]
    env = elsewhere.environment("avx2") | {"PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([*command, tmp_path], env=env, capture_output=True, text=True)
    assert "1 of 2 comparisons with less room than wanted" in done.stdout, done.stdout
    assert "torch.float32   test_tight.py:4" in done.stdout


SOURCE = '''\
"""Words that stay."""
LIMIT: int = 3


@lru_cache(maxsize=64)
def f(x: int = 2, *, on: bool = True) -> float:
    """Say 5 > 3."""
    if not on and x >= LIMIT:
        raise ValueError(f"x: expected less than {LIMIT + 0}")
    total = 0.5
    zip([total], [x], strict=True)
    for _ in range(x):
        total += 1
    print(total)
    return (total) * (x - 1)
'''
CHANGES = {
    "3 -> 4",
    "2 -> 3",
    "True -> False",
    "not on and x >= LIMIT -> False",
    "not on and x >= LIMIT -> True",
    "not on -> (on)",
    "and -> or",
    ">= -> >",
    "0.5 -> 1.0",
    "zip([total], [x], strict=True) -> pass",
    "total += 1 -> pass",
    "1 -> 2",
    "print(total) -> pass",
    "* -> /",
    "- -> +",
}


def test_what_is_changed_and_what_is_not():
    found = mutate.mutations("m", SOURCE)
    assert {str(m).partition(": ")[2] for m in found} == CHANGES
    for mutation in found:
        data = SOURCE.encode()
        changed = data[: mutation.start] + mutation.new.encode() + data[mutation.end :]
        compile(changed, "m", "exec")
        assert data[mutation.start : mutation.end].decode() == mutation.old


def test_one_file_of_the_package_is_changed(tmp_path):
    mutation = next(m for m in mutate.chosen(["positions"], 1, seed=1))
    mutate.mutated_package(tmp_path, mutation)
    changed = (tmp_path / "llmbook/positions.py").read_bytes()
    assert changed != (ROOT / "llmbook/positions.py").read_bytes()
    assert (tmp_path / "llmbook/blocks.py").samefile(ROOT / "llmbook/blocks.py")


def test_a_change_meets_the_tests_of_its_module_first():
    lines = (ROOT / "llmbook/blocks.py").read_text("utf-8").splitlines()
    likely = next(mutate.suites("blocks", [], lines.index("class RMSNorm(nn.Module):") + 2))
    assert likely and all(test.startswith("tests/test_blocks.py::test_") for test in likely)
    suites = list(mutate.suites("blocks", ["attention", "blocks", "model"]))
    assert suites[0] == ["tests/test_blocks.py"]
    assert suites[2:] == [["tests/test_model.py"]], "attention imports nothing from blocks"
    assert all(Path(ROOT, suite[0]).exists() for suite in suites)
