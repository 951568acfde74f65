"""What is refused is refused in words that help: for everything public, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import llmbook

TESTS = Path(__file__).parent


def test_bad_input_is_refused_by_the_name_of_the_argument():
    package = str(Path(llmbook.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, TESTS / "bad_input.py", "--json"],
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    complaints = json.loads(done.stdout)
    assert not complaints, "\n".join(complaints)
