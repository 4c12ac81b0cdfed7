"""``--launch``: the processes of a job, started here and ended together."""

from collections.abc import Sequence
import signal
import socket
import subprocess
import sys
import time


def launch(number: int, arguments: Sequence[str]) -> int:
  """Starts the processes of a job here, and ends all when one fails.

  They meet at a free port of this machine. SIGTERM is passed on to them, for
  them to save.

  Args:
    number: of processes.
    arguments: of each, behind ``python``.

  Returns:
    The status to end with: 0 where all of them ended so.
  """
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  processes: list[subprocess.Popen] = []

  def pass_on(*_):
    for p in processes:
      p.terminate()

  before = signal.signal(signal.SIGTERM, pass_on)
  try:
    for i in range(number):
      job = [
        f"--coordinator-address=127.0.0.1:{port}",
        f"--num-processes={number}",
        f"--process-id={i}",
      ]
      processes.append(subprocess.Popen([sys.executable, *arguments, *job]))
    print("processes", *(p.pid for p in processes), flush=True)
    return _watch(processes)
  finally:
    # The others of one that has failed would wait for it.
    for p in processes:
      p.kill()
      p.wait()
    signal.signal(signal.SIGTERM, before)


def _watch(processes: Sequence[subprocess.Popen]) -> int:
  """Waits until all processes have ended well, or one of them has not."""
  while True:
    codes = [p.poll() for p in processes]
    if failed := {i: code for i, code in enumerate(codes) if code}:
      for i, code in failed.items():
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        print(f"process {i} ended {how}; ending the others", file=sys.stderr)
      return 1
    if codes.count(0) == len(codes):
      return 0
    time.sleep(0.1)
