"""The batches: a permutation an epoch, in order, wherever a run starts."""

import numpy as np
from small_program import mesh_of

from fsam_optax.experiments.train import batches


def test_every_epoch_is_a_permutation_and_a_later_start_sees_the_same():
  order = batches.Order(50, 16, drop_last=False, seed=3)
  assert (order.steps_an_epoch, order.last_size) == (4, 2)
  epochs = [
    np.concatenate([order.rows_of(4 * epoch + i) for i in range(4)])
    for epoch in range(3)
  ]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
  assert not np.array_equal(epochs[0], epochs[1])
  again = batches.Order(50, 16, drop_last=False, seed=3)
  np.testing.assert_array_equal(again.rows_of(9), order.rows_of(9))
  other = batches.Order(50, 16, drop_last=False, seed=4)
  assert not np.array_equal(other.rows_of(9), order.rows_of(9))
  dropping = batches.Order(50, 16, drop_last=True, seed=3)
  assert (dropping.steps_an_epoch, dropping.last_size) == (3, 0)


def test_batches_come_in_order_and_their_wait_is_counted():
  x = np.arange(48, dtype=np.float32).reshape(48, 1, 1, 1)
  y = np.arange(48, dtype=np.int32)
  order = batches.Order(48, 16, drop_last=False, seed=0)
  mesh = mesh_of(8)
  stream = batches.Batches(order, x, y, mesh, start=2, stop=7)
  found = list(stream)
  assert len(found) == 5
  for number, batch in zip(range(2, 7), found, strict=True):
    rows = order.rows_of(number)
    np.testing.assert_array_equal(batch["label"], rows)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], rows)
    assert len(batch["label"].sharding.device_set) == 8
  assert stream.waited > 0
