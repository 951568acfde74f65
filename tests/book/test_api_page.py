"""The scripts on the first page of the package's reference run as they stand there."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from book import ROOT


def script_of(title: str) -> str:
    """Return the script of a section."""
    page = (ROOT / "api" / "index.md").read_text(encoding="utf-8")
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return script


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    """Start a script in ``folder``, warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", script]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the site is being built on the other core
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes)


def run_script(title: str, folder: Path) -> str:
    """Run the script of a section in ``folder``; return what it printed."""
    process = start(script_of(title), folder)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


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


def test_train_stop_go_on_and_listen(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    script = script_of("Train, stop, go on, and listen")
    killed = start(script, tmp_path / "killed")
    saved = tmp_path / "killed" / "data" / "run"
    while killed.poll() is None and not list(saved.glob("step-*.safetensors")):
        time.sleep(0.01)
    killed.kill()
    _, errors = killed.communicate()
    assert killed.returncode != 0 and not errors, "it should have been killed before its end"
    (tmp_path / "whole").mkdir()
    texts = [
        run_script("Train, stop, go on, and listen", tmp_path / n) for n in ("killed", "whole")
    ]
    assert texts[0] == texts[1]
    loss, story = texts[0].split("\n", 1)
    assert float(loss.split()[1]) < 2, "chance is ln 512 = 6.2"
    assert len(re.findall(r"[a-z]{2,}", story)) > 20, story
