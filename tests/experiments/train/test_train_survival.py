"""Real runs of ``train`` that something happens to, and how they go on."""

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from real_run import SECONDS
from real_run import assert_same
from real_run import checkpoint
from real_run import checkpoints
from real_run import finish
from real_run import lines

from fsam_optax.experiments.train import run_folder

pytestmark = pytest.mark.slow

# The network with the fewest layers; 20 steps an epoch.
EPOCHS, STEPS = 2, 40
FLAGS = (
  *("--model=wide_resnet", "--depth=10", "--width=1", f"--epochs={EPOCHS}"),
  *("--batch-size=64", "--save-every=3", "--log-every=2"),
)


@pytest.fixture(scope="module", name="unbroken")
def fixture_unbroken(tmp_path_factory, start):
  output = tmp_path_factory.mktemp("unbroken") / "run"
  printed = finish(start(output))
  assert f"from batch 0 of {STEPS}" in printed
  return output


def test_an_unbroken_run_writes_what_it_promises(unbroken):
  found = lines(unbroken)
  epochs = [line for line in found if line["kind"] == "epoch"]
  steps = [line for line in found if line["kind"] == "step"]
  assert [line["epoch"] for line in epochs] == [1, EPOCHS]
  assert [line["batches"] for line in steps] == list(range(2, STEPS + 1, 2))
  assert epochs[-1]["learning_rate"] == 0
  # The last two, and the best.
  accuracy = {line["batches"]: line["test_accuracy"] for line in epochs}
  best = max(accuracy, key=lambda n: (accuracy[n], n))
  assert checkpoints(unbroken) == sorted({39, STEPS, best})
  summary = json.loads((unbroken / "summary.json").read_text())
  assert summary["final_accuracy"] == [epochs[-1]["test_accuracy"]]


def test_a_run_that_lost_its_end_writes_it_again_below_a_bar(
  unbroken, environment, command, tmp_path
):
  """Two checkpoints and half a line are lost; it was begun by an older one."""
  output = tmp_path / "run"
  shutil.copytree(unbroken, output)
  for number in checkpoints(output)[1:]:
    shutil.rmtree(checkpoint(output, number))
  metrics = output / "seed-1" / "metrics.jsonl"
  metrics.write_text(metrics.read_text()[:-40])
  config = json.loads((output / "config.json").read_text())
  del config["--average"]
  (output / "config.json").write_text(json.dumps(config))
  terminal, stdout = pty.openpty()
  with subprocess.Popen(
    command(output),
    stdout=stdout,
    stderr=subprocess.STDOUT,
    env={**environment, "TERM": "xterm", "COLUMNS": "200"},
  ) as process:
    os.close(stdout)
    shown = b""
    with contextlib.suppress(OSError):  # Its end, for Linux.
      while part := os.read(terminal, 2**16):
        shown += part
    os.close(terminal)
  assert process.returncode == 0
  text = shown.decode()
  assert f"{STEPS}/{STEPS}" in text
  assert re.search(r"loss [\d.]+  accuracy [\d.]+ %  sharpness [-\d.]+", text)
  assert_same(output, unbroken, STEPS)


def test_a_seed_more_is_trained_and_a_finished_one_not_again(
  unbroken, start, tmp_path
):
  output = tmp_path / "run"
  shutil.copytree(unbroken, output)
  # To a terminal without a plus-minus sign.
  printed = finish(start(output, "--seeds=2", PYTHONIOENCODING="ascii"))
  assert re.search(r"mean +[\d.]+ \\xb1 \d", printed)
  assert "seed 1: from" not in printed
  assert f"seed 2: from batch 0 of {STEPS}" in printed
  first = json.loads((unbroken / "summary.json").read_text())
  both = json.loads((output / "summary.json").read_text())
  assert both["final_accuracy"][:1] == first["final_accuracy"]
  assert both["seeds"] == [1, 2]
  assert both["standard_error"] is not None
  assert lines(output) == lines(unbroken)


def test_ends_at_random_moments_change_no_bit(unbroken, start, tmp_path):
  rng = random.Random(0)
  folder, is_over = 0, True
  statuses = {signal.SIGINT: 130, signal.SIGTERM: 0, signal.SIGHUP: 129}
  ends = [*statuses, *3 * [signal.SIGKILL]]
  while ends or not is_over:
    folder += is_over
    output = tmp_path / f"run-{folder}"
    process = start(output)
    begin = process.stdout.readline()
    assert "from batch" in begin, begin + process.stdout.read()
    if ends:  # Within a step, a save or an evaluation.
      time.sleep(rng.uniform(0.2 if ends[0] in statuses else 0, 0.4))
      process.send_signal(ends[0])
      began = time.monotonic()
      if ends[0] == signal.SIGINT:
        process.send_signal(signal.SIGTERM)  # The first one's status counts.
    printed, _ = process.communicate(timeout=SECONDS)
    assert "warning" not in printed
    is_over = "wrote" in printed
    if ends and not is_over:
      end = ends.pop(0)
      assert time.monotonic() - began < 60
      assert process.returncode == statuses.get(end, -end), printed
      assert "Traceback" not in printed
      if end in statuses:
        saved = int(re.search(r"saved after batch (\d+) of", printed)[1])
        assert saved in checkpoints(output)
    elif is_over:
      assert process.returncode == 0, printed
      assert_same(output, unbroken, STEPS)
      assert not list((output / "seed-1" / "checkpoints").glob("*tmp*"))


def test_two_runs_do_not_share_a_folder(start, tmp_path):
  output = tmp_path / "run"
  first = start(output)
  assert "from batch 0" in first.stdout.readline()
  first.send_signal(signal.SIGSTOP)
  printed = finish(start(output), status=1)
  assert "must not be in use, got" in printed
  first.kill()
  first.communicate()
  with run_folder.lock(output):  # It ended with its process.
    pass


def test_changed_flags_and_data_are_refused_by_name(unbroken, start):
  flags = ("--rho=0.1", "--epochs=4", "--data=mnist")
  printed = finish(start(unbroken, *flags), status=1)
  assert f"begun with --rho 0.2, got 0.1; --epochs {EPOCHS}, got 4" in printed
  assert "--data (SHA-256)" in printed
  assert "or another --output" in printed


def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(
  unbroken, environment, command, tmp_path
):
  disk, saved = tmp_path / "disk", tmp_path / "saved"
  disk.mkdir()
  output = disk / "run"
  train = " ".join(map(str, command(output)))
  # Full from the first checkpoint on, for the first of the two runs: not even
  # a folder can be made.
  (tmp_path / "script").write_text(f"""
    mount -t tmpfs -o size=8m,nr_inodes=999 tmpfs {disk} || exit 77
    {train} & job=$!
    until test -d {checkpoint(output, 3)}; do
      kill -0 $job || exit 1
      sleep 0.01
    done
    mkdir {disk}/filler
    while mkdir {disk}/filler/$((n += 1)) 2>/dev/null; do :; done
    full=$(date +%s)
    wait $job
    echo "first: $? after $(($(date +%s) - full)) s"
    rm -r {disk}/filler
    {train}
    echo "second: $?"
    cp -r {output} {saved}
  """)
  done = subprocess.run(
    ["unshare", "--map-root-user", "--mount", "sh", tmp_path / "script"],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=environment,
    timeout=SECONDS,
  )
  if done.returncode == 77 or "unshare failed" in done.stdout:
    pytest.skip("this system lets nobody mount a small file system")
  first, second = done.stdout.split("first: ")
  seconds = re.match(r"1 after (\d+) s\n", second)
  assert seconds, done.stdout
  assert int(seconds[1]) < 100
  assert "cannot be written to" in first
  assert "and give the same command again" in first
  assert "second: 0" in second, second
  assert int(re.search(r"from batch (\d+) of", second)[1]) >= 3
  assert_same(saved, unbroken, STEPS)
