"""``--launch``: the processes of a job, started here and ended together."""

from collections.abc import Sequence
import signal
import socket
import subprocess
import sys
import time

# What a process ends with that was told to and has saved, by the signal.
_STATUS: dict[int, int] = {
  signal.SIGTERM: 0,
  signal.SIGINT: 130,
  signal.SIGHUP: 129,
}


def launch(number: int, arguments: Sequence[str]) -> int:
  """Starts the processes of a job here, and ends all when one fails.

  They meet at a free port of this machine. SIGTERM, SIGINT and SIGHUP are
  passed on to them, for them to save.

  Args:
    number: of processes.
    arguments: of each, behind ``python``.

  Returns:
    The status to end with: 0 where all of them ended so, 130 or 129 where they
    did because of SIGINT or SIGHUP.
  """
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  processes: list[subprocess.Popen] = []
  told: list[int] = []

  def pass_on(number, _):
    told.append(number)
    for p in processes:
      p.terminate()

  before = {
    number: signal.signal(number, pass_on)
    for number in _STATUS
    if signal.getsignal(number) != signal.SIG_IGN
  }
  try:
    for i in range(number):
      job = [
        f"--coordinator-address=127.0.0.1:{port}",
        f"--num-processes={number}",
        f"--process-id={i}",
      ]
      processes.append(subprocess.Popen([sys.executable, *arguments, *job]))
    print("processes", *(p.pid for p in processes), flush=True)
    return _watch(processes) or (_STATUS[told[0]] if told else 0)
  finally:
    # The others of one that has failed would wait for it.
    for p in processes:
      p.kill()
      p.wait()
    for number, handler in before.items():
      signal.signal(number, handler)


def _watch(processes: Sequence[subprocess.Popen]) -> int:
  """Waits until all processes have ended well, or one of them has not."""
  while True:
    codes = [p.poll() for p in processes]
    ended_well = (None, *_STATUS.values())
    if failed := {i: c for i, c in enumerate(codes) if c not in ended_well}:
      for i, code in failed.items():
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        print(f"process {i} ended {how}; ending the others", file=sys.stderr)
      return 1
    if None not in codes:
      return 0
    time.sleep(0.1)
