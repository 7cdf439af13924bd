"""Checkpoints: states of a run, saved and restored by orbax.

A checkpoint is a folder ``workdir/checkpoints/STEP`` with two items: "state", all arrays of a
`TrainState` as nested dicts, and "notes", a JSON object with the name of the stage, this format,
the step, and a SHA-256 of all arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bitmixer_jax import distributed
from bitmixer_jax.errors import UserError, reason
from bitmixer_jax.files import cannot_write
from bitmixer_jax.training.orbax_errors import (
    Damaged,
    damaged,
    is_disk_error,
    is_disk_full,
    read_errors,
    silence,
    with_damaged_metadata,
)

FORMAT = "bitmixer-checkpoint"
_PATTERN_CHARACTERS = "*?[]\\"


def check_path(workdir: pathlib.Path) -> None:
    """Refuses a folder whose checkpoints could be written but not read back.

    Raises:
      UserError: the path has characters that orbax takes for patterns of file names.
    """
    found = sorted(set(str(workdir.absolute())) & set(_PATTERN_CHARACTERS))
    if found:
        raise UserError(
            f"--workdir {workdir}: checkpoints cannot be read from a path with "
            f"{' '.join(found)}; take another folder",
            "bad-path",
        )


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Returns whether a workdir has a checkpoint, so that training resumes from it."""
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


class Checkpoints:
    """Saves and restores the states of a run.

    Saving is asynchronous and atomic: it goes on behind the training, and a folder gets its final
    name only when it is complete. Every restore compares the arrays with the saved SHA-256.

    Attributes:
      folder: ``workdir/checkpoints``.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        keep: int = 2,
        keep_steps: Iterable[int] = (),
        read_only: bool = False,
    ) -> None:
        """Opens the folder, and creates it unless ``read_only``.

        Args:
          workdir: folder of the run.
          keep: how many of the newest checkpoints are kept.
          keep_steps: steps that are kept in any case (the stage ends).
          read_only: write, create and clean up nothing.

        Raises:
          Damaged: the metadata of a checkpoint are damaged.
          UserError: the folder cannot be written.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        # Orbax warns of every restored leaf that has no sharding (the loop places states itself),
        # and it logs errors that it raises as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._ocp = ocp
        self.folder = (pathlib.Path(workdir) / "checkpoints").absolute()
        try:
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)  # orbax accepts a file in its place
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "notes": ocp.JsonCheckpointHandler(),
                },
                # Stage ends are kept: WORKDIR@STAGE opens them later, to start or compare runs.
                options=ocp.CheckpointManagerOptions(
                    read_only=read_only,
                    create=not read_only,
                    preservation_policy=policy.AnyPreservationPolicy(
                        [policy.LatestN(keep), policy.CustomSteps(list(keep_steps))]
                    ),
                    cleanup_tmp_directories=not read_only,
                ),
            )
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        except Exception as error:  # orbax reads a file of each checkpoint here
            bad = with_damaged_metadata(self.folder)
            if bad is None:
                raise
            raise damaged(bad, reason(error)) from None
        # Saving goes on in other threads, which must print nothing until the folder is closed.
        self._restore_output = (lambda: None) if read_only else silence()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, notes: Mapping[str, Any]) -> None:
        """Starts to save a state, unless there is a checkpoint of its step. Returns at once.

        Args:
          state: a pytree with an attribute ``step``.
          notes: JSON object.

        Raises:
          UserError: the disk is full or cannot be written; earlier checkpoints stay.
        """
        step = int(state.step)  # waits for the devices
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        nested = _nested(state)
        if jax.process_count() > 1:  # all hold the same values; orbax has the first one write them
            nested = jax.tree.map(np.asarray, nested)
        # Orbax copies the arrays before it returns, so the next step may donate them.
        header = {"format": FORMAT, "step": step, "sha256": digest(nested)}
        with self._disk_errors():
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(nested), notes=args.JsonSave({**notes, **header})
                ),
            )

    def wait(self) -> None:
        """Waits until all that was saved is on the disk. Raises as `save`."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns what orbax raises for a disk into a `UserError` that names the last checkpoint."""
        try:
            yield
        except Exception as error:
            if not is_disk_error(error):
                raise
            full = is_disk_full(error)
            # The failed step may be listed as saved: read the folder again, if that is possible.
            what = "the disk is full" if full else reason(error)
            advice = "Make room" if full else "Mend this"
            with contextlib.suppress(Exception):
                self._manager.reload()
            last = max(self._manager.all_steps(), default=None)
            kept = "there is none before it" if last is None else f"that of step {last} is whole"
            raise UserError(
                f"{self.folder}: cannot save a checkpoint: {what}; {kept}. {advice} and start the "
                "same command again",
                "not-writable",
            ) from None

    def restore(self, like: Any, step: int | None = None, *, on_host: bool = False) -> Any:
        """Restores a checkpoint.

        Args:
          like: a state with the expected structure, shapes and dtypes (arrays or
            ShapeDtypeStructs).
          step: of the checkpoint; None takes the newest.
          on_host: return numpy arrays, which need no memory of a device.

        Returns:
          a state like ``like`` on the first device, or None if there is no checkpoint.

        Raises:
          Damaged: a file is damaged, or holds other values than were saved.
          UserError: no such checkpoint, or it is of another format, network or optimiser.
        """
        steps = self.steps
        step = step if step is not None else max(steps, default=None)
        if step is None:
            return None
        path = self.folder / str(step)
        if step not in steps:
            raise UserError(f"{path}: no such checkpoint; there are steps {steps}", "no-run")
        args = self._ocp.args
        if on_host or jax.process_count() > 1:  # each process reads all of it
            abstract = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        else:
            # A checkpoint names the devices it was saved from; a run may resume on others.
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
            )
        sha256 = self._check_header(step, abstract)
        with read_errors(path):
            restored = self._manager.restore(
                step, args=args.Composite(state=args.StandardRestore(_nested(abstract)))
            )["state"]
        # Array files carry no checksum of their own.
        if sha256 != digest(restored):
            raise damaged(path, "the values are not those that were saved")
        # Back from nested dicts to the containers of ``like``, such as optax's named tuples.
        leaves = traverse_util.flatten_dict(restored)
        return jax.tree_util.tree_map_with_path(lambda keys, _: leaves[_path_names(keys)], like)

    def _check_header(self, step: int, abstract: Any) -> Any:
        """Checks notes and shapes of a checkpoint, and returns the SHA-256 of its arrays."""
        # Shapes are compared before the arrays are read: orbax's own message about a difference is
        # long, and names neither the layer nor what to do.
        path, args = self.folder / str(step), self._ocp.args
        with read_errors(path):
            notes = self._manager.restore(step, args=args.Composite(notes=args.JsonRestore()))[
                "notes"
            ]
            metadata = self._manager.item_metadata(step)["state"]
            if metadata is None:
                raise ValueError("no metadata of the state")
            found = _shapes_by_name(getattr(metadata, "tree", metadata))
            if notes.get("format") != FORMAT:
                raise UserError(
                    f"{path}: not a checkpoint of this library ({FORMAT})", "wrong-format"
                )
            if notes.get("step") != step:  # somebody renamed the folder
                raise UserError(
                    f"{path}: holds the checkpoint of step {notes.get('step')}; give it its name",
                    "damaged",
                )
        expected = _shapes_by_name(abstract)
        wrong = [
            f"{name}: {found.get(name, 'absent')} in the file, "
            f"{expected.get(name, 'absent')} expected"
            for name in sorted({*found, *expected})
            if found.get(name) != expected.get(name)
        ]
        if wrong:
            raise UserError(
                f"{path}: a checkpoint of another network or optimiser: {wrong[0]} "
                f"({len(wrong)} differences)",
                "other-network",
            )
        return notes.get("sha256")

    def restore_whole(self, like: Any, say: Callable[[str], None]) -> Any:
        """Restores the newest checkpoint that is not damaged, and sets damaged ones aside.

        Args:
          like: as in `restore`.
          say: receives one line for each checkpoint that is skipped.

        Returns:
          a state, or None if there is no checkpoint.

        Raises:
          UserError: the newest undamaged one is of another network, or all are damaged.
        """
        skipped: list[tuple[int, str]] = []
        state = None
        for step in reversed(self.steps):
            path = self.folder / str(step)
            message, failed = "", None
            try:
                state = self.restore(like, step)
            except Damaged as error:
                message = str(error).partition(". Remove")[0]
            except UserError as error:
                failed = error
            # All processes resume from the same checkpoint, or all of them stop.
            any_damaged, any_failed = distributed.all_reduce_max(
                float(bool(message)), float(failed is not None)
            )
            if any_failed:
                raise failed or UserError(f"{path}: another process cannot read it", "not-readable")
            if not any_damaged:
                break
            skipped.append((step, message or f"{path}: damaged for another process"))
            state = None
        if skipped and state is None:
            # To train from the start in this workdir would hide that the run was lost.
            raise UserError(
                f"{self.folder}: no checkpoint is whole: {'; '.join(m for _, m in skipped)}. To "
                "train from the start, take another --workdir",
                "no-run",
            )
        for step, message in skipped:
            (aside,) = self.set_aside([step])
            say(f"skipped {message}; moved to {aside}")
        return state

    def set_aside(self, steps: Iterable[int]) -> list[pathlib.Path]:
        """Moves checkpoints to ``workdir/damaged`` and returns their new folders.

        A run that reaches their step again saves a new checkpoint.

        Raises:
          UserError: they cannot be moved.
        """
        moved = []
        parent = self.folder.parent / "damaged"
        for step in steps:
            numbered = (f"{step}-{number}" for number in itertools.count(1))
            names = itertools.chain([str(step)], numbered)
            aside = next(parent / name for name in names if not (parent / name).exists())
            distributed.on_primary(partial(self._move, step, aside), lambda: None)
            moved.append(aside)
        if moved:
            self._manager.reload()  # orbax caches the list of steps
        return moved

    def _move(self, step: int, aside: pathlib.Path) -> None:
        try:
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
        except OSError as error:
            raise UserError(
                f"{aside}: cannot move there ({reason(error)})", "not-writable"
            ) from None

    def close(self) -> None:
        """Waits until all is saved, and closes the folder. Raises as `save`."""
        try:
            self.wait()
        finally:
            try:
                with self._disk_errors():  # orbax raises the error of the last save again
                    self._manager.close()
            finally:
                self._restore_output()


def _path_names(path: Any) -> tuple[str, ...]:
    """Returns the keys, field names or positions along a path in a pytree."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None)))) for k in path)


def _nested(tree: Any) -> Any:
    """Returns a pytree as nested dicts, so that files do not depend on optax's containers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return traverse_util.unflatten_dict({_path_names(path): leaf for path, leaf in leaves})


def digest(tree: Any) -> str:
    """Returns a SHA-256 of the names, dtypes, shapes and values of a tree of arrays.

    >>> digest({"w": np.zeros(3, np.float32)})[:16]
    '10d62c5bf6c4c05d'
    """
    found = hashlib.sha256()
    # Sorted by name, so the digest does not depend on the order of dicts.
    for name, leaf in sorted(
        ("/".join(_path_names(path)), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ):
        found.update(f"{name} {leaf.dtype}{list(leaf.shape)}\n".encode())
        found.update(leaf.tobytes())
    return found.hexdigest()


def _shapes_by_name(tree: Any) -> dict[str, str]:
    """Returns ``{path: "dtype[shape]"}`` of a tree of arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_path_names(path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
