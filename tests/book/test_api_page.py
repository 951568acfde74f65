"""The script on the first page of the package's reference runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

from book import ROOT


def test_raw_text_to_batches(tmp_path: Path) -> None:
    page = (ROOT / "api" / "index.md").read_text(encoding="utf-8")
    section = page.split("## From raw text to batches")[1]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept, tokens, text = done.stdout.split("\n", 2)
    documents, raw = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", kept))
    assert 20_000 < documents < raw
    assert int(tokens.split()[0].replace(",", "")) > 1_000_000
    assert len(text) > 256
    assert (tmp_path / "data" / "tokenizer.json").exists()
