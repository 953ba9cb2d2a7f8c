"""`save` may be killed at any of its changes of the file system: the network before it stays, or the new one is there.

`make kills` does the same with all other commands that write, twice in a row.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the folder of a descriptor is looked up there")
def test_nothing_is_lost_wherever_saving_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.endurance.kills", "save", "--once"]  # forks need a process without threads
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
