"""The loop of a run: from its last checkpoint to its end, or to a signal."""

import contextlib
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.common import files
from fsam_optax.experiments.train import batches
from fsam_optax.experiments.train import job
from fsam_optax.experiments.train import journal as journal_lib
from fsam_optax.experiments.train import signals
from fsam_optax.experiments.train.checkpoints import Checkpoints
from fsam_optax.experiments.train.flags_and_recipes import Run
from fsam_optax.experiments.train.program import Program
from fsam_optax.experiments.train.run_folder import RunError
from fsam_optax.experiments.train.run_state import RunState


class Runner:
  """Trains seeds by the same compiled program."""

  def __init__(self, program: Program, step: Any, run: Run) -> None:
    """Takes the step of :meth:`Program.lower_step`; compiles nothing yet."""
    self._program, self._run = program, run
    self._interruption = signals.Interruption()
    self._evaluate = program.evaluator(run.evaluation_batch_size)
    self._compiled = functools.cache(step.compile)

  def __call__(
    self, rows: data.Images, seed: int, folder: pathlib.Path
  ) -> list[dict[str, Any]]:
    """Trains a seed from the last checkpoint to the end: a line an epoch.

    Raises:
      Interrupted: if a signal came; everything is saved.
      RunError: if the loss of an epoch is not finite, or the folder cannot be
        read or written.
    """
    program = self._program
    with contextlib.closing(
      Checkpoints(folder / "checkpoints", seed)
    ) as checkpoints:
      run_state = checkpoints.restore(program.abstract())
      if run_state is None:
        journal_lib.check_new(folder)
        run_state = program.place(program.create(seed))
      done = int(run_state.batches)
      journal = journal_lib.Journal(
        folder,
        checkpoints.epochs,
        tensorboard=self._run.tensorboard,
        title=f"seed {seed}",
        total=program.steps,
        done=done,
      )
      if done < program.steps:
        self._compiled()  # Before a signal is something to save for.
        if job.is_first():
          print(
            f"seed {seed}: from batch {done:,} of {program.steps:,}, on "
            f"{program.mesh.size} devices",
            flush=True,
          )
        with self._interruption, journal:
          self._train(run_state, done, rows, seed, journal, checkpoints)
      return checkpoints.epochs

  def _train(
    self,
    run_state: RunState,
    done: int,
    rows: data.Images,
    seed: int,
    journal: journal_lib.Journal,
    checkpoints: Checkpoints,
  ) -> None:
    program, run = self._program, self._run
    batch_size = program.config.descent.batch_size
    stream = batches.stream(
      rows.x_train,
      rows.y_train,
      program.mesh,
      seed=seed,
      batch_size=batch_size,
      start=done,
      stop=program.steps,
    )
    since, waited, begun = time.perf_counter(), 0.0, done
    for number in range(done + 1, program.steps + 1):
      asked = time.perf_counter()
      batch = next(stream)
      waited += time.perf_counter() - asked
      run_state, metrics = self._compiled()(run_state, batch)
      # On a CPU the collectives of steps in flight can wait for each other
      # forever.
      if jax.default_backend() == "cpu":
        jax.block_until_ready(run_state)
      epoch, position = divmod(number, program.steps_an_epoch)
      is_end, is_logged = position == 0, number % run.log_every == 0
      at = epoch if is_end else number / program.steps_an_epoch
      at = {"batches": number, "epoch": at}
      if is_logged:
        found = {name: np.asarray(x).item() for name, x in metrics.items()}
        line = {"kind": "step", **at, **files.finite(found)}
        journal.write(line)
      if is_end:
        line = {"kind": "epoch", **at, **self._measure(run_state, rows)}
        now, images = time.perf_counter(), (number - begun) * batch_size
        line["seconds"] = seconds = now - since
        line["images_per_second"] = images / seconds
        line["waiting_fraction"] = waited / seconds
        since, waited, begun = now, 0.0, number
        checkpoints.epochs.append(line)
        journal.write(line)
      is_due = run.save_every and number % run.save_every == 0
      status = self._interruption.status(has_failed=checkpoints.has_failed)
      if is_end or is_due or status is not None:
        checkpoints.save(number, run_state)
      if status is not None:
        checkpoints.wait()
        raise signals.Interrupted(
          f"told to end; saved after batch {number:,} of {program.steps:,}. "
          "Give the same command to go on",
          status,
        )
    checkpoints.wait()

  def _measure(self, run_state: RunState, rows: data.Images) -> dict[str, Any]:
    """The means of an epoch, the next learning rate, and the evaluation."""
    state, means = run_state.state, run_state.means()
    what = "validation" if self._program.config.images.validation else "test"
    evaluated = self._evaluate(state, rows.x_test, rows.y_test)
    # Where all steps were skipped the first is NaN; weights that are not finite
    # show in the second.
    losses = means["loss"], evaluated["loss"]
    if not np.isfinite(losses).all():
      raise RunError(
        "an epoch must end with mean losses that are finite, got "
        f"{losses[0]:g} in training and {losses[1]:g} of the {what} rows. "
        "Choose a smaller --learning-rate or --rho and another --output, and "
        "leave out --no-skip-nonfinite"
      )
    rate = self._program.learning_rate(int(state.step))
    return {
      "learning_rate": np.asarray(rate).item(),
      **files.finite(means),
      "skipped": int(run_state.skipped),
      **{f"{what}_{k}": v for k, v in evaluated.items()},
    }
