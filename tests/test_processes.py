"""The start of a job, by JAX: a process that waits in vain is ended in time."""

import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, 0, initialization_timeout=2)
"""


def test_a_process_whose_partner_does_not_come_ends_with_an_error():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  begin = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, address],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode != 0
  assert "DEADLINE_EXCEEDED" in done.stderr
  assert time.monotonic() - begin < 60
