"""``make test`` stops at the first fault, shows it, and ends what runs beside it."""

import importlib.util
import sys
import time

import pytest
from book import ROOT


@pytest.fixture(scope="module")
def stages():
    # By its path: the standard library has a package named test as well.
    spec = importlib.util.spec_from_file_location("stages", ROOT / "tools/test.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["stages"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["stages"]


def test_a_fault_is_shown_and_ends_the_rest(stages, capsys):
    def stage(name: str, code: str):
        return stages.Stage(name, "", ("-c", code))

    first = [
        stage("good", "print('no news'); print('1 passed')"),
        stage("bad", "print('the reason'); raise SystemExit(3)"),
        stage("after", "print('unreachable')"),
    ]
    runner, start = stages.Runner(), time.monotonic()
    sleep = "import time; time.sleep(60)"
    slow = stage(
        "slow", f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleep}'])"
    )
    runner.run_group([first, [slow]])
    assert time.monotonic() - start < 30
    assert runner.failed.is_set()
    verdicts = {name: verdict for name, verdict, _ in runner.times}
    assert verdicts == {"good": "ok", "bad": "FAILED", "slow": "stopped"}
    printed = capsys.readouterr().out
    assert "1 passed" in printed
    assert "the reason" in printed
    assert "no news" not in printed


def test_two_workers_have_one_thread_each(stages):
    (unit,) = [stage for stage in stages.STAGES if stage.name == "unit"]
    assert stages._environment(unit)["OMP_NUM_THREADS"] == "1"


def test_a_stage_that_passed_tells_its_news(stages, capsys):
    good = stages.Stage("good", "", ("-c", ""), news=lambda: "measured")
    bad = stages.Stage("bad", "", ("-c", "raise SystemExit(1)"), news=lambda: "unmeasured")
    stages.Runner().run_group([[good, bad]])
    printed = capsys.readouterr().out
    assert "\nmeasured\n" in printed and "unmeasured" not in printed
