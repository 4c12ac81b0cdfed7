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

import numpy as np
import pytest
import real_run
from real_run import SECONDS
from real_run import arrays
from real_run import checkpoint
from real_run import checkpoints
from real_run import finish
from real_run import lines
from real_run import wait_for

pytestmark = pytest.mark.slow

# The network with the fewest layers; 20 steps an epoch.
FLAGS = (
  "--model=wide_resnet",
  "--depth=10",
  "--width=1",
  "--epochs=3",
  "--batch-size=64",
  "--save-every=3",
  "--log-every=2",
)
STEPS = 60


@pytest.fixture(scope="module", name="environment")
def fixture_environment(tmp_path_factory):
  return real_run.environment(tmp_path_factory)


@pytest.fixture(scope="module", name="command")
def fixture_command(tmp_path_factory):
  data = tmp_path_factory.mktemp("data") / "digits.npz"
  real_run.write_digits(data)
  return lambda output, *flags: real_run.command(output, data, *FLAGS, *flags)


@pytest.fixture(scope="module", name="start")
def fixture_start(environment, command):
  with real_run.processes(environment) as start:
    yield lambda output, *flags, prefix=(): start(
      [*prefix, *command(output, *flags)]
    )


def assert_same(output, unbroken):
  real_run.assert_same(output, unbroken, STEPS)


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
  assert [line["epoch"] for line in epochs] == [1, 2, 3]
  assert [line["batches"] for line in steps] == list(range(2, STEPS + 1, 2))
  assert epochs[-1]["learning_rate"] == 0
  # The last two, and the best.
  accuracy = {line["batches"]: line["test_accuracy"] for line in epochs}
  best = max(accuracy, key=lambda n: (accuracy[n], n))
  assert checkpoints(unbroken) == sorted({57, STEPS, best})
  summary = json.loads((unbroken / "summary.json").read_text())
  assert summary["final_accuracy"] == [epochs[-1]["test_accuracy"]]
  assert (unbroken / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_is_not_run_again(unbroken, start):
  before = (unbroken / "seed-1" / "metrics.jsonl").read_text()
  printed = finish(start(unbroken))
  assert "from batch" not in printed
  assert "test accuracy %" in printed
  assert (unbroken / "seed-1" / "metrics.jsonl").read_text() == before


def test_a_terminal_gets_a_bar(unbroken, environment, command, tmp_path):
  output = tmp_path / "run"
  shutil.copytree(unbroken, output)
  shutil.rmtree(checkpoint(output, STEPS))
  shutil.rmtree(checkpoint(output, 57))
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
  assert re.search(
    r"loss [\d.]+  accuracy [\d.]+ %  sharpness [-\d.]+ +[\d,]+ images/s", text
  )
  assert_same(output, unbroken)


def test_a_seed_more_is_trained_besides(unbroken, start, tmp_path):
  output = tmp_path / "run"
  shutil.copytree(unbroken, output)
  # Of before there was this flag, and to a terminal without a plus-minus sign.
  config = json.loads((output / "config.json").read_text())
  del config["--average"]
  (output / "config.json").write_text(json.dumps(config))
  ascii_ = ("env", "PYTHONIOENCODING=ascii")
  printed = finish(start(output, "--seeds=2", prefix=ascii_))
  assert re.search(r"mean +[\d.]+ \\xb1 \d", printed)
  assert "seed 1: from" not in printed
  assert f"seed 2: from batch 0 of {STEPS}" in printed
  first = json.loads((unbroken / "summary.json").read_text())
  both = json.loads((output / "summary.json").read_text())
  assert both["final_accuracy"][:1] == first["final_accuracy"]
  assert both["seeds"] == [1, 2]
  assert both["standard_error"] is not None
  assert lines(output) == lines(unbroken)


def test_five_kills_at_random_moments_change_no_bit(unbroken, start, tmp_path):
  rng = random.Random(0)
  folder, kills = 0, 0
  is_over = True
  while kills < 5 or not is_over:
    if is_over:
      folder += 1
    output = tmp_path / f"run-{folder}"
    process = start(output)
    begin = process.stdout.readline()
    assert "from batch" in begin, begin + process.stdout.read()
    # Within a step, a save or an evaluation.
    if kills < 5:
      time.sleep(rng.uniform(0, 0.5))
      process.kill()
    printed, _ = process.communicate(timeout=SECONDS)
    assert "warning" not in printed
    is_over = process.returncode == 0
    kills += not is_over
    assert is_over or process.returncode == -signal.SIGKILL, printed
    if is_over:
      assert_same(output, unbroken)
      assert not list((output / "seed-1" / "checkpoints").glob("*tmp*"))


def test_sigterm_saves_and_exits_with_0_within_seconds(
  unbroken, start, tmp_path
):
  output = tmp_path / "run"
  process = start(output, "--save-every=1000")
  assert "from batch 0" in process.stdout.readline()
  time.sleep(0.5)
  process.terminate()
  began = time.monotonic()
  printed = finish(process)
  assert time.monotonic() - began < 10
  saved = int(re.search(r"saved after batch (\d+) of", printed)[1])
  assert checkpoint(output, saved).is_dir()
  printed = finish(start(output))
  assert f"from batch {saved} of {STEPS}" in printed
  assert_same(output, unbroken)


def test_a_gated_run_goes_on_with_the_program_that_was_next(start, tmp_path):
  flags = ("--every=3", "--start=1epochs", "--stop=50")
  unbroken, output = tmp_path / "unbroken", tmp_path / "run"
  finish(start(unbroken, *flags))
  radii = {x["batches"]: x["perturbation_norm"] for x in lines(unbroken)}
  # The batch before a line is the one that its number counts to.
  assert [n for n in range(2, 61, 2) if radii[n] and n % 20] == [
    24,
    30,
    36,
    42,
    48,
  ]
  process = start(output, *flags)
  wait_for(checkpoint(output, 24), process)
  process.kill()
  process.communicate()
  printed = finish(start(output, *flags))
  assert int(re.search(r"from batch (\d+) of", printed)[1]) >= 24
  assert_same(output, unbroken)


def test_sigterm_before_the_first_step_ends_at_once(start, tmp_path):
  output = tmp_path / "run"
  # Of another width, so that it has to be compiled.
  process = start(output, "--width=2")
  wait_for(output / "config.json", process)
  time.sleep(1)
  process.terminate()
  began = time.monotonic()
  finish(process, status=-signal.SIGTERM)
  assert time.monotonic() - began < 5
  assert not list(output.glob("seed-1/checkpoints/[0-9]*"))


def test_control_c_saves_and_says_so_by_its_status(start, tmp_path):
  process = start(tmp_path / "run")
  assert "from batch 0" in process.stdout.readline()
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGTERM)  # The first one's status counts.
  assert "saved after batch" in finish(process, status=130)


def copy(unbroken, output):
  shutil.copytree(unbroken, output)
  (output / "summary.json").unlink()


def largest(folder):
  return max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


def cut(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(bytes(content))


@pytest.mark.parametrize(
  ("damage", "name"),
  [
    (cut, None),
    (flip, None),
    (lambda path: path.unlink(), None),
    (lambda path: path.unlink(), "manifest.ocdbt"),
  ],
  ids=["cut", "flipped", "lost", "manifest"],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_read(
  damage, name, unbroken, start, tmp_path
):
  output = tmp_path / "run"
  copy(unbroken, output)
  last = checkpoint(output, STEPS)
  damage(last / "progress" / name if name else largest(last))
  printed = finish(start(output))
  aside = output / "seed-1" / f"broken-checkpoint-{STEPS}"
  assert f"checkpoint {STEPS} cannot be read and was moved to" in printed
  assert aside.is_dir()
  assert f"from batch 57 of {STEPS}" in printed
  assert_same(output, unbroken)


def test_only_damaged_checkpoints_are_an_error(unbroken, start, tmp_path):
  output = tmp_path / "run"
  copy(unbroken, output)
  for number in checkpoints(output):
    cut(largest(checkpoint(output, number)))
  for _ in range(2):  # Nor does it begin anew when it is started again.
    printed = finish(start(output), status=1)
    assert "none of the 3 checkpoints in" in printed
    assert "). To begin anew, choose another --output" in printed
    assert not list((output / "seed-1").glob("broken*"))


def test_lines_cut_short_are_written_again(unbroken, start, tmp_path):
  output = tmp_path / "run"
  copy(unbroken, output)
  shutil.rmtree(checkpoint(output, STEPS))
  metrics = output / "seed-1" / "metrics.jsonl"
  metrics.write_text(metrics.read_text()[:-40])
  finish(start(output))
  assert_same(output, unbroken)


def test_two_runs_do_not_share_a_folder(start, tmp_path):
  output = tmp_path / "run"
  first = start(output)
  assert "from batch 0" in first.stdout.readline()
  first.send_signal(signal.SIGSTOP)
  printed = finish(start(output), status=1)
  assert "must not be in use, got" in printed
  first.kill()
  first.communicate()
  # The lock ends with its process.
  other = start(output)
  assert "from batch" in other.stdout.readline()
  other.kill()
  other.communicate()


def test_a_changed_flag_is_refused_by_name(unbroken, start):
  printed = finish(start(unbroken, "--rho=0.1", "--epochs=4"), status=1)
  assert "begun with --rho 0.2, got 0.1; --epochs 3, got 4" in printed
  assert "or another --output" in printed
  printed = finish(start(unbroken, "--data=mnist"), status=1)
  assert "--data (SHA-256)" in printed


def images_file(path, value=None):
  """Two classes of noise as floating images, one pixel of one row replaced."""
  rng = np.random.default_rng(0)
  draw = lambda rows: rng.normal(size=(rows, 8, 8)).astype(np.float32)
  x, x_test = draw(256), draw(32)
  if value is not None:
    x[100, 3, 3] = value
  labels = lambda rows: np.arange(rows) % 2
  np.savez(
    path, x_train=x, y_train=labels(256), x_test=x_test, y_test=labels(32)
  )


def test_a_batch_that_overflows_is_skipped_and_counted(start, tmp_path):
  images_file(tmp_path / "images.npz", 3e38)
  output = tmp_path / "run"
  flags = (
    f"--data={tmp_path / 'images.npz'}",
    "--mean=0",
    "--standard-deviation=0.1",
  )
  printed = finish(
    start(output, *flags, "--batch-size=32", "--crop-padding=0", "--cutout=0")
  )
  found = [line for line in lines(output) if line["kind"] == "epoch"]
  # The row is in one batch of each epoch.
  assert [line["skipped"] for line in found] == [1, 1, 1]
  assert all(np.isfinite(line["loss"]) for line in found)
  assert "skipped 1 steps that were not finite" in printed
  final = arrays(output, 24)
  assert all(
    np.isfinite(x).all() for x in final.values() if x.dtype == np.float32
  )
  assert final["['progress']['state']['step']"] == 24 - 3


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--mean=0", "--standard-deviation=2e-38"), "the last 20 steps were skip"),
    (
      ("--learning-rate=1e38", "--no-skip-nonfinite"),
      "must end with mean loss",
    ),
  ],
)
def test_a_run_that_diverges_ends_with_the_remedy(
  flags, message, start, tmp_path
):
  output = tmp_path / "run"
  printed = finish(start(output, *flags), status=1)
  assert message in printed
  assert "Choose a smaller --learning-rate or --rho" in printed
  assert not (output / "summary.json").exists()
  if "--no-skip-nonfinite" in flags:
    return
  final = arrays(output, max(checkpoints(output)))
  assert all(
    np.isfinite(x).all() for x in final.values() if x.dtype == np.float32
  )


def test_a_file_that_cannot_be_written_is_an_error(unbroken, start, tmp_path):
  output = tmp_path / "run"
  # No file may grow beyond 64 KiB, which a checkpoint's do.
  limit = ("sh", "-c", 'ulimit -f 128; exec "$@"', "sh")
  printed = finish(start(output, prefix=limit), status=1)
  assert "a checkpoint cannot be written to" in printed
  assert "there is none. Remove the cause, such as a full disk" in printed
  assert not checkpoints(output)


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
  assert_same(saved, unbroken)


def test_a_reader_who_goes_away_ends_no_run(
  unbroken, environment, command, tmp_path
):
  output = tmp_path / "run"
  with subprocess.Popen(
    command(output),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  ) as process:
    assert "from batch 0" in process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=SECONDS) == 0, errors
  assert "stdout was closed; going on" in errors
  assert_same(output, unbroken)


def test_a_hangup_saves_and_says_so_by_its_status(start, tmp_path):
  output = tmp_path / "run"
  process = start(output, "--epochs=1000")
  wait_for(checkpoint(output, 3), process)
  process.send_signal(signal.SIGHUP)
  assert "told to end; saved after batch" in finish(process, status=129)
