"""The tests do not depend on the environment in which they are started."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/nonexistent",
    "TRANSFORMERS_OFFLINE": "1",
    "XDG_CACHE_HOME": "/nonexistent",
    "XDG_CONFIG_HOME": "/nonexistent",
    "LANG": "tr_TR.UTF-8",
    "LC_ALL": "C",
    "TZ": "Asia/Tokyo",
    "COLUMNS": "20",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
}


def test_a_hostile_environment_changes_nothing(tmp_path):
    """With HF_HUB_OFFLINE set two tests of the doctor once failed."""
    chosen = [TESTS / "tools" / "test_doctor.py", TESTS / "test_optim.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, chosen)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | HOSTILE, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:]
