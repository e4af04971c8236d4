"""How fast the command line answers: commands that compute nothing load nothing heavy."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "onnx", "tvm", "prefect", "altair")


def test_check_loads_no_heavy_library() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['martlet', 'check', 'recipes/smoke.yaml']\n"
        "from flows.command_line import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print(sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    said, heavy = finished.stdout.splitlines()
    assert "valid" in said
    assert heavy == "[]"
