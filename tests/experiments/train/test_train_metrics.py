"""The metrics of a run: their means, and the file that they are written to."""

import json
import pathlib
import zlib

from jax import numpy as jnp
import numpy as np
import pytest

from fsam_optax.experiments.train import means
from fsam_optax.experiments.train import metrics
from fsam_optax.experiments.train.folder import FolderError


def metrics_of(loss, skipped=0):
  return {
    **{name: jnp.float32(loss) for name in means.NAMES},
    "skipped": jnp.int32(skipped),
  }


def sums_of(numbers=None):
  found = means.from_json(numbers or {}, np.float32)
  return {name: jnp.asarray(x) for name, x in found.items()}


def test_means_weigh_rows_leave_out_what_was_skipped_and_begin_anew():
  sums = sums_of()
  assert means.finish(sums)["loss"] is None
  for loss, rows, skipped in ((1.0, 4, 0), (np.inf, 4, 1), (4.0, 2, 0)):
    sums = means.add(sums, metrics_of(loss, skipped), rows, jnp.array(False))
  assert means.finish(sums) == {name: 2.0 for name in means.NAMES}
  sums = means.add(sums, metrics_of(7.0), 4, jnp.array(True))
  assert means.finish(sums)["loss"] == 7


def test_sums_lose_no_bit_on_their_way_through_json():
  sums = sums_of()
  for loss in (1 / 3, 1e-30, 0.1):
    sums = means.add(sums, metrics_of(loss), 3, jnp.array(False))
  again = sums_of(json.loads(json.dumps(means.to_json(sums))))
  for name, x in sums.items():
    np.testing.assert_array_equal(again[name], x)


def test_a_metric_of_today_begins_where_a_checkpoint_of_before_ends():
  numbers = {"loss": [6.0, 3.0], "no longer reported": [1.0, 1.0]}
  sums = sums_of(numbers)
  assert tuple(sums) == means.NAMES
  sums = means.add(sums, metrics_of(8.0), 1, jnp.array(False))
  assert means.finish(sums)["loss"] == 3.5
  assert means.finish(sums)["accuracy"] == 8


EPOCH = {"loss": 1.0, "accuracy": 50.0, "test_accuracy": 40.0}


def line_of(kind, batches, epoch):
  line = {"kind": kind, "batches": batches, "epoch": epoch}
  return line | (EPOCH if kind == "epoch" else {})


def as_written(line):
  """A line with the checksum of its JSON."""
  crc32 = zlib.crc32(json.dumps(line).encode())
  return json.dumps(line | {"crc32": crc32}) + "\n"


def test_a_line_that_a_full_disk_refuses_is_an_error(tmp_path):
  journal = metrics.Journal(tmp_path / "metrics.jsonl", 0, 0)
  journal._path = pathlib.Path("/dev/full")
  with pytest.raises(FolderError, match=r"No space left.*full disk"):
    journal.append(line_of("step", 1, 0.5))
  assert not journal.lines


def test_a_journal_drops_what_was_cut_and_what_will_be_written_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [line_of("step", i, i / 4) for i in (2, 4, 6)]
  path.write_text("".join(map(as_written, lines)) + '{"kin')
  journal = metrics.Journal(path, 4, 0)
  journal.append(line_of("epoch", 5, 1))
  assert [line["batches"] for line in journal.lines] == [2, 4, 5]
  assert journal.epochs == [line_of("epoch", 5, 1)]
  assert path.read_text() == "".join(map(as_written, journal.lines))


@pytest.mark.parametrize(
  "damaged",
  [
    "",
    '{"kind": "epoch"}',
    '{"batches": 8, "epoch": 2}',
    as_written(line_of("epoch", 8, 2)).strip().replace("1.0", "NaN"),
    as_written(line_of("epoch", 8, 2)).strip().replace("40.0", "90.0"),
    "null",
    "[8]",
    "[" * 100_000,
    '{"kind": "epoch", "batches": "8", "epoch": 2}',
    "\x00\x00\x00",
  ],
  ids=[
    "lost",
    "cut",
    "kind",
    "nan",
    "digit",
    "null",
    "list",
    "deep",
    "words",
    "zeros",
  ],
)
def test_a_checkpoint_ahead_of_its_metrics_is_an_error_by_epoch(
  tmp_path, damaged
):
  """Not an accuracy of another epoch, nor a shorter curve."""
  path = tmp_path / "metrics.jsonl"
  whole = [as_written(line_of("epoch", 4 * i, i)).strip() for i in (1, 3)]
  path.write_text("\n".join([whole[0], damaged, whole[1]]) + "\n")
  with pytest.raises(FolderError, match=r"each of the 3 epochs.*read for 2\."):
    metrics.Journal(path, 12, 3)
  # What it was given stays as it was.
  assert path.read_text().splitlines()[0] == whole[0]
  path.write_text("\n".join([whole[0], "{", whole[1]]) + "\n")
  assert len(metrics.Journal(path, 4, 1).epochs) == 1
