"""For every test: shapes and types are checked, examples and seeds are the same on each run."""

import random
import sys

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# The hook rewrites modules as they are imported: too late for one that is loaded already.
loaded = [name for name in sys.modules if name.split(".")[0] == "llmbook"]
if loaded:
    raise RuntimeError(f"imported before shapes could be checked: {', '.join(loaded)}")
install_import_hook("llmbook", "beartype.beartype")

# Solutions to be, which mean nothing outside their chapter; see tools/wrong_answers.py.
collect_ignore = ["wrong_answers"]

settings.register_profile("book", derandomize=True, deadline=None)
settings.load_profile("book")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    if torch := sys.modules.get("torch"):  # tests of the book as data need not wait for it
        torch.manual_seed(0)
