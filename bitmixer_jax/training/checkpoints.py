"""Checkpoints: states of a run, saved and restored by orbax."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bitmixer_jax.errors import UserError
from bitmixer_jax.files import cannot_write, read_json
from bitmixer_jax.training import hosts

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
            f"{' '.join(found)}; take another folder"
        )


class Damaged(UserError):
    """A checkpoint cannot be read, or holds other values than were saved."""

    default_code = "damaged"


class Checkpoints:
    """The checkpoints of a run, ``workdir/checkpoints/STEP``.

    Saving is asynchronous and atomic: a folder has its final name only when it is whole.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        keep: int = 2,
        keep_steps: Iterable[int] = (),
        read_only: bool = False,
    ) -> None:
        """Opens the folder.

        Args:
          keep: how many of the newest are kept.
          keep_steps: steps that are kept in any case (ends of stages).
          read_only: nothing is written, cleaned up or made.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        # It warns of every restored leaf that has no sharding (the loop places states itself), and
        # logs errors that it raises as well.
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
            bad = _with_damaged_metadata(self.folder)
            if bad is None:
                raise
            raise Damaged(
                f"{bad}: damaged checkpoint ({_brief(error)}). Remove it to go back to the "
                "checkpoint before it"
            ) from None
        # Writes go on behind the training, so they must be quiet until the folder is closed.
        self._loud = (lambda: None) if read_only else _silence()

    @property
    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, notes: Mapping[str, Any]) -> None:
        """Saves ``state`` (a pytree with ``step``) with JSON ``notes``, unless it is there.

        Raises:
          UserError: the disk is full or cannot be written; what was saved before stays.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        nested = _nested(state)
        if jax.process_count() > 1:  # all hold the same; orbax has the first one write it
            nested = jax.tree.map(np.asarray, nested)
        own = {"format": FORMAT, "step": step, "sha256": digest(nested)}
        with self._disk_errors():
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(nested), notes=args.JsonSave({**notes, **own})
                ),
            )

    def wait(self) -> None:
        """Returns when all that was asked to be saved is on the disk. Raises as `save`."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = str(error)
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
                sign in text for sign in ("No space left", "Disk quota", "OS error 28")
            )
            signs = ("Permission denied", "RESOURCE_EXHAUSTED", "File too large", "OS error")
            denied = isinstance(error, OSError) or any(sign in text for sign in signs)
            if not (full or denied):
                raise
            what = "the disk is full" if full else _brief(error)
            todo = "Make room" if full else "Mend this"
            with contextlib.suppress(Exception):
                self._manager.reload()
            last = max(self._manager.all_steps(), default=None)
            kept = "there is none before it" if last is None else f"that of step {last} is whole"
            raise UserError(
                f"{self.folder}: cannot save a checkpoint: {what}; {kept}. {todo} and start the "
                "same command again"
            ) from None

    def restore(self, like: Any, step: int | None = None, *, on_host: bool = False) -> Any:
        """Restores a checkpoint, by default the newest.

        Args:
          like: a state with the structure, shapes and dtypes to expect (arrays or
            ShapeDtypeStructs).
          step: which one.
          on_host: as numpy arrays, so that no memory of a device is needed.

        Returns:
          a state like ``like``, on the first device, or None if there is no checkpoint.

        Raises:
          UserError: it is damaged, not of this format, or of another network or optimiser.
        """
        steps = self.steps
        step = step if step is not None else max(steps, default=None)
        if step is None:
            return None
        path = self.folder / str(step)
        if step not in steps:
            raise UserError(f"{path}: no such checkpoint; there are steps {steps}")
        args = self._ocp.args
        # With a sharding of our own, a run may go on with other devices than it was saved from.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like
        )
        if on_host or jax.process_count() > 1:  # each process reads all of it
            abstract = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        advice = f"Remove {path} to go back to the checkpoint before it"
        try:
            with _quiet_reads():
                item = self._manager.restore(step, args=args.Composite(notes=args.JsonRestore()))
                found = self._shapes(step)
            notes = item["notes"]
            if notes.get("format") != FORMAT:
                raise UserError(f"{path}: not a checkpoint of this library ({FORMAT})")
            if notes.get("step") != step:
                raise UserError(
                    f"{path}: holds the checkpoint of step {notes.get('step')}; give it its name"
                )
        except UserError:
            raise
        except Exception as error:
            _check_machine(path, error)
            raise Damaged(f"{path}: damaged checkpoint ({_brief(error)}). {advice}") from None
        wanted = _shapes_by_name(abstract)
        wrong = [
            f"{name}: {found.get(name, 'absent')} in the file, "
            f"{wanted.get(name, 'absent')} expected"
            for name in sorted({*found, *wanted})
            if found.get(name) != wanted.get(name)
        ]
        if wrong:
            raise UserError(
                f"{path}: a checkpoint of another network or optimiser: {wrong[0]} "
                f"({len(wrong)} differences)"
            )
        try:
            with _quiet_reads():
                restored = self._manager.restore(
                    step, args=args.Composite(state=args.StandardRestore(_nested(abstract)))
                )["state"]
        except Exception as error:
            _check_machine(path, error)
            raise Damaged(f"{path}: damaged checkpoint ({_brief(error)}). {advice}") from None
        # Array files carry no checksum of their own.
        if notes.get("sha256") != digest(restored):
            raise Damaged(
                f"{path}: damaged checkpoint (the values are not those that were saved). {advice}"
            )
        leaves = traverse_util.flatten_dict(restored)
        return jax.tree_util.tree_map_with_path(lambda keys, _: leaves[_names(keys)], like)

    def restore_whole(self, like: Any, say: Callable[[str], None]) -> Any:
        """Restores the newest checkpoint that is whole, and moves damaged ones out of the way.

        They go to ``workdir/damaged``: a run that comes past their step saves it again.

        Args:
          like: as `restore`.
          say: is told of each that was skipped, and why.

        Returns:
          a state, or None if there is no checkpoint.

        Raises:
          UserError: the newest whole one is of another network, or none of those there is whole.
        """
        damaged: list[tuple[int, str]] = []
        state = None
        for step in reversed(self.steps):
            said, failed = "", None
            other = f"{self.folder / str(step)}: another process cannot read it"
            try:
                state = self.restore(like, step)
            except Damaged as error:
                said = str(error).partition(". Remove")[0]
            except UserError as error:
                failed = error
            # All processes go on with the same checkpoint, or all of them stop.
            any_damaged, any_failed = hosts.all_reduce_max(
                float(bool(said)), float(failed is not None)
            )
            if any_failed:
                raise failed or UserError(other)
            if not any_damaged:
                break
            damaged.append(
                (step, said or f"{self.folder / str(step)}: damaged for another process")
            )
            state = None
        if damaged and state is None:
            raise UserError(
                f"{self.folder}: no checkpoint is whole: {'; '.join(s for _, s in damaged)}. To "
                "train from the start, take another --workdir"
            )
        for step, said in damaged:
            (aside,) = self.set_aside([step])
            say(f"skipped {said}; moved to {aside}")
        return state

    def set_aside(self, steps: Iterable[int]) -> list[pathlib.Path]:
        """Moves checkpoints to new folders in ``workdir/damaged`` and returns these.

        A run that comes past their step saves it again.

        Raises:
          UserError: they cannot be moved.
        """
        moved = []
        parent = self.folder.parent / "damaged"
        for step in steps:
            more = (f"{step}-{number}" for number in itertools.count(1))
            names = itertools.chain([str(step)], more)
            aside = next(parent / name for name in names if not (parent / name).exists())
            hosts.on_primary(partial(self._move, step, aside), lambda: None)
            moved.append(aside)
        if moved:
            self._manager.reload()
        return moved

    def _move(self, step: int, aside: pathlib.Path) -> None:
        try:
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
        except OSError as error:
            raise UserError(f"{aside}: cannot move there ({error.strerror})") from None

    def _shapes(self, step: int) -> dict[str, str]:
        metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:
            raise ValueError("no metadata of the state")
        return _shapes_by_name(getattr(metadata, "tree", metadata))

    def close(self) -> None:
        """Waits for what is being saved, and lets go of the folder."""
        try:
            self.wait()
        finally:
            try:
                with self._disk_errors():  # it raises the error of the last save again
                    self._manager.close()
            finally:
                self._loud()


def _with_damaged_metadata(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the first checkpoint whose metadata file of orbax is damaged."""
    for path in sorted(folder.glob("*/_CHECKPOINT_METADATA")):
        try:
            found = read_json(path)
        except (OSError, ValueError):  # orbax goes on without it
            continue
        nested = ("item_handlers", "metrics", "custom_metadata")
        if not isinstance(found, dict) or not all(
            isinstance(found.get(key) or {}, dict) for key in nested
        ):
            return path.parent
    return None


def _check_machine(path: pathlib.Path, error: BaseException) -> None:
    """Raises UserError if the machine, not the checkpoint, made a read fail.

    Such as input errors of the disk, missing permissions, or no memory.
    """
    text = str(error)
    signs = (
        *("RESOURCE_EXHAUSTED", "ut of memory", "PERMISSION_DENIED", "Permission denied"),
        *("Too many open files", "Input/output error", "Stale file handle", "UNAVAILABLE"),
    )
    machine = getattr(error, "errno", None) in (
        *(errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    )
    if machine or isinstance(error, MemoryError) or any(sign in text for sign in signs):
        raise UserError(f"{path}: cannot be read now ({_brief(error)})") from None


def _names(path: Any) -> tuple[str, ...]:
    """The names along a path in a pytree, whatever its nodes are: a key, a field or a position."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None)))) for k in path)


def _nested(tree: Any) -> Any:
    """A pytree as nested dicts, so that the file does not depend on optax's containers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return traverse_util.unflatten_dict({_names(path): leaf for path, leaf in leaves})


def digest(tree: Any) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a tree of arrays."""
    found = hashlib.sha256()
    for name, leaf in sorted(
        ("/".join(_names(path)), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ):
        found.update(f"{name} {leaf.dtype}{list(leaf.shape)}\n".encode())
        found.update(leaf.tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def _quiet_reads() -> Iterator[None]:
    """Keeps orbax's reading quiet on standard error where it fails: its error is raised anyway.

    Reads that were under way when one failed end later, on other threads, each with a traceback
    about a closed event loop. So after a failure the filter stays.
    """
    loud = _silence()
    yield
    loud()


def _silence() -> Callable[[], None]:
    """Drops what threads of orbax and tensorstore print after a failure that is raised anyway.

    Returns:
      a function that undoes it.
    """
    logger = logging.getLogger("asyncio")
    level, unraisable, uncaught = logger.level, sys.unraisablehook, sys.excepthook

    def drop_unraisable(found: Any) -> None:
        about = f"{found.exc_value} {found.object!r}"
        if "Event loop is closed" not in about and "_read_" not in about:
            unraisable(found)

    def drop_uncaught(kind: Any, error: BaseException, trace: Any) -> None:
        if "Event loop is closed" not in str(error):
            uncaught(kind, error, trace)

    def undo() -> None:
        logger.setLevel(level)
        sys.unraisablehook, sys.excepthook = unraisable, uncaught

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook, sys.excepthook = drop_unraisable, drop_uncaught
    return undo


def _shapes_by_name(tree: Any) -> dict[str, str]:
    """``{path: "dtype[shape]"}`` of a tree of arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_names(path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no details'}"
