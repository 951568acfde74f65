"""The scripts on the first page of the package's reference run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from book import ROOT


def run_script(title: str, folder: Path) -> str:
    """Run the script of a section in ``folder``, warnings as errors; return what it printed."""
    page = (ROOT / "api" / "index.md").read_text(encoding="utf-8")
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    command = [sys.executable, "-W", "error", "-c", script]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the site is being built on the other core
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_raw_text_to_batches(tmp_path: Path) -> None:
    kept, tokens, text = run_script("From raw text to batches", tmp_path).split("\n", 2)
    documents, raw = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", kept))
    assert 20_000 < documents < raw
    assert int(tokens.split()[0].replace(",", "")) > 1_000_000
    assert len(text) > 256
    assert (tmp_path / "data" / "tokenizer.json").exists()


def test_a_model_in_another_librarys_hands(tmp_path: Path) -> None:
    printed = run_script("A model in another library's hands", tmp_path)
    parameters, loss, story = printed.split("\n", 2)
    assert 100_000 < int(parameters.split()[0].replace(",", "")) < 300_000
    assert float(loss.split()[1]) < 3, "chance is ln 512 = 6.2"
    assert len(re.findall(r"[a-z]{2,}", story)) > 20, story
