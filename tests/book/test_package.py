"""The package as others get it: a copy, a source distribution, an installation in sight."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import install
import pytest
from book import ROOT


def test_a_copy_that_is_not_installed_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "llmbook").mkdir()
    shutil.copy(ROOT / "llmbook/__init__.py", tmp_path / "llmbook")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import llmbook; "
    command = [sys.executable, "-I", "-S", "-c", code + "print(llmbook.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "0+unknown\n", done.stderr


def test_a_source_distribution_has_the_tests_and_their_helpers(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    names = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("llmbook", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")}
    assert tests <= held
    assert not [name for name in held if name.startswith("tests/book")]
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmbook").glob("*.*")}
    assert package <= held


PIP_SAYS = """\
Looking in indexes: https://user:secret@example.org/simple
Collecting numpy>=1.26 (from llmbook==0.1.0)
  Downloading https://example.org/files/numpy-2.4.6-cp311-cp311-many.whl.metadata (6.6 kB)
Processing /somewhere/torch-2.13.0-cp311.whl
  Downloading https://example.org/files/torch-2.13.0+cpu-cp311-many.whl (190.2 MB)
Installing collected packages: numpy, torch
""".splitlines()


def test_what_pip_does_is_said_in_a_few_words() -> None:
    progress, said = install.Progress(), []
    for line in PIP_SAYS:
        progress.read(install.without_addresses(line))
        said.append(str(progress))
    assert said == [
        "looking for packages",
        "looking for packages: 1 found, now numpy",
        "looking for packages: 1 found, now numpy",
        "looking for packages: 2 found, now torch",
        "downloading torch 2.13.0, 190.2 MB",
        "installing: 0 of 2 packages",
    ]


def test_why_pip_failed_is_shown_without_addresses(monkeypatch, capfd) -> None:
    text = "\n".join(PIP_SAYS)
    code = f"print({text!r}); print('ERROR: no torch'); raise SystemExit(3)"
    monkeypatch.setattr(install, "PIP", [sys.executable, "-c", code])
    assert install.install([]) == 3
    shown = capfd.readouterr().err
    assert "ERROR: no torch" in shown and "Downloading torch-2.13.0+cpu" in shown
    assert "example.org" not in shown and "secret" not in shown
