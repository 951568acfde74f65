"""Run the tests with the arithmetic of other processors.

A processor with other vector instructions adds numbers in another order, and floating-point sums
come out a little different. Three libraries choose by the processor, and each can be told to
choose as if it were another one. Models are trained anew under each setting, since training makes a
small difference larger.

Use: ``make test-elsewhere``, or ``python tools/elsewhere.py SETTING --stages unit`` for one setting
and some of the stages of ``tools/test.py``. ``pytest -p margins`` tells how near each comparison
comes to its bound (see ``tools/margins.py``).
"""

import argparse
import os
import subprocess
import sys

from book import ROOT

SETTINGS = {
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
STAGES = ("unit", "tinyworld", "documentation", "notebooks")


def environment(setting: str) -> dict[str, str]:
    """Return the variables that a setting adds, with a place for its own models."""
    models = ROOT / "_build" / "elsewhere" / setting
    return SETTINGS[setting] | {"LLMBOOK_ARTIFACTS": str(models)}


def main() -> int:
    """Run the stages under each setting; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of: {', '.join(SETTINGS)}")
    parser.add_argument("--stages", default=",".join(STAGES), help="of tools/test.py, with commas")
    options = parser.parse_args()
    if unknown := set(options.settings) - set(SETTINGS):
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    for setting in options.settings or SETTINGS:
        shown = " ".join(f"{name}={value}" for name, value in SETTINGS[setting].items())
        print(f"--- {setting}: {shown}", flush=True)
        command = [sys.executable, str(ROOT / "tools/test.py"), *options.stages.split(",")]
        code = subprocess.run(command, env=os.environ | environment(setting)).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
