"""Two real processes that disagree: both hear of it, and neither waits."""

import pathlib
import re
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_processes_that_disagree_get_an_error_each():
  script = pathlib.Path(__file__).with_name("disagreeing_process.py")
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, str(script), address, str(i)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    shapes = re.search(r"shapes: (.*)", printed)[1]
    assert (
      "at ['x'] float32[6, 3] in process 1 for float32[4, 3] in process 0"
    ) in shapes
    values = re.search(r"values: (.*)", printed)[1]
    assert "got at .params['w'] float32[3], digest" in values
    structure = re.search(r"structure: (.*)", printed)[1]
    assert "got at [1] int32[], digest" in structure
    assert "in process 1 for nothing in process 0" in structure
    assert "evenly over 4 devices or groups, got 6 rows" in printed
    assert "{'w': 21.0}" in printed
