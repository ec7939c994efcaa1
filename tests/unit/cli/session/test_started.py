"""When a process was started."""

import subprocess
import sys
import time

import pytest

CODE = "import time; time.sleep(0.3); from sftcli.cli.session.processes import started; print(time.monotonic() - started())"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_age_of_a_process_counts_from_its_start_and_not_from_the_question():
    begin = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert 0.28 <= float(printed.stdout) <= time.monotonic() - begin + 0.02
