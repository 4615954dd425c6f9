"""The `checkpoint-N` folders of a run: written whole, found whole, and removed without ever losing the last whole one.

    OUT/.partial/checkpoint-20      the Trainer writes here, every rank its files
                                    all files on disk, then their manifest (`manifest.seal`)
    OUT/checkpoint-20               one rename: from now on it counts
    OUT/checkpoint-10               removed, if `save_total_limit` newer ones are whole

A power cut or a kill at any moment leaves the older checkpoints as they were, and at most hidden folders that the next
run clears away. `--resume` takes the newest checkpoint whose files all agree with its manifest.
"""

import glob
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoints import (
    RUN_FILE,
    TRAINER_STATE,
    check_checkpoint,
    checkpoint_folders,
    failures_are_clear,
)
from .errors import UserError
from .manifest import MANIFEST, check_sealed, flush, seal

# What training cannot go on without, beside weights and TRAINER_STATE: as the Trainer writes it, and under FSDP2
# accelerate, in one file or sharded. Of shards, torch writes `.metadata` last.
SCHEDULER = "scheduler.pt"
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata")
SHARDED_WEIGHTS = "pytorch_model_fsdp_0/.metadata"

PARTIAL = ".partial"


@dataclass
class Found:
    """What a run folder holds to resume from.

    Attributes:
        checkpoint: the newest whole one, or None.
        faults: of each newer one, its name and what is wrong with it.
        sealed: whether its files were compared with a manifest.
    """

    checkpoint: Path | None = None
    faults: list[str] = field(default_factory=list)
    sealed: bool = True

    def notes(self) -> list[str]:
        """Lines for the user: what was stepped over, and what could not be checked."""
        if self.checkpoint is None:
            return []
        name = self.checkpoint.name
        lines = [f"{'; '.join(self.faults)}; going on from {name}"] if self.faults else []
        if not self.sealed:
            lines.append(f"{name} is of an earlier version, without {MANIFEST}: its weights cannot be checked")
        return lines


def find_whole(run_dir: Path) -> Found:
    """Looks for the newest checkpoint from which training can go on, reading every file of those it looks at."""
    faults = []
    for folder in checkpoint_folders(run_dir):
        try:
            sealed = check_resumable(folder)
        except UserError as error:
            faults.append(f"{folder.name} is not whole ({error})")
        else:
            return Found(folder, faults, sealed)
    return Found(None, faults)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest `checkpoint-N` of a run from which training can go on, if there is one."""
    return find_whole(run_dir).checkpoint


def check_resumable(folder: Path) -> bool:
    """Checks that training can go on from a `checkpoint-N`, down to the last byte where it has a manifest.

    Returns:
        Whether it has one. Without, headers of weights and checksums within torch's own files are all that is checked.

    Raises:
        UserError: a file is missing or damaged.
    """
    sealed = check_sealed(folder)
    if not (folder / SHARDED_WEIGHTS).is_file():
        check_checkpoint(folder)
    for names in ((SCHEDULER,), OPTIMIZER):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{names[0]} is missing")
    for name, key in ((RUN_FILE, None), (TRAINER_STATE, "global_step")):
        _check_json(folder, name, key)
    return sealed


def partial(folder: Path) -> Path:
    """Where the files of the checkpoint `folder` are written until all are there."""
    return folder.parent / PARTIAL / folder.name


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Gives the empty folder `partial(folder)`; when the block succeeds, it is sealed and becomes `folder`.

    If the block fails, `folder` is what it was before. In a distributed run, enter it on one process, before any of
    them writes, and leave it when all have written.

    Raises:
        UserError: the disk, the quota or the file-size limit is full, or the run's folder cannot be written to.
    """
    folder = Path(folder).absolute()
    written, aside = partial(folder), folder.with_name(f".{folder.name}.previous")
    with failures_are_clear(folder):
        try:
            shutil.rmtree(written.parent, ignore_errors=True)
            written.mkdir(parents=True)
            yield written
            seal(written)
            if folder.exists():
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
            os.replace(written, folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(written.parent, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def rotate(run_dir: Path, limit: int | None, protected: Collection[Path], known: set[Path]) -> None:
    """Removes old checkpoints, and none before `limit` newer ones are whole.

    Args:
        run_dir: folder of the run.
        limit: how many whole ones to keep, the protected ones included; None or 0 keeps all.
        protected: checkpoints that stay: the newest, the best.
        known: those that are known to be whole; what is read and found whole here is added.
    """
    if not limit:
        return
    protected = {path.absolute() for path in protected}

    def is_whole(folder: Path) -> bool:
        if folder not in known and _is_whole(folder):
            known.add(folder)
        return folder in known

    others = limit - sum(is_whole(folder) for folder in protected)
    for folder in checkpoint_folders(Path(run_dir).absolute()):
        if folder in protected:
            continue
        if others <= 0:
            _remove(folder)
        else:
            others -= is_whole(folder)


def clear_leftovers(run_dir: Path) -> None:
    """Removes what a killed process left: hidden folders that nothing reads.

    A checkpoint that was put aside for one of the same step comes back if that one did not arrive.
    """
    run_dir = Path(run_dir).absolute()
    for aside in run_dir.glob(".checkpoint-*.previous"):
        if not (folder := run_dir / aside.name[1:].removesuffix(".previous")).exists():
            os.replace(aside, folder)
    saving = run_dir.parent.glob(f".{glob.escape(run_dir.name)}.partial-*")
    left = (run_dir.glob(f".checkpoint-*.{kind}") for kind in ("previous", "removed"))
    for folder in [*saving, run_dir / PARTIAL, *(path for paths in left for path in paths)]:
        shutil.rmtree(folder, ignore_errors=True)


def _check_json(folder: Path, name: str, key: str | None) -> None:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be read ({error})") from error
    if not isinstance(content, dict) or (key is not None and not isinstance(content.get(key), int)):
        raise UserError(f"{name} is damaged: it must be an object{f' with a whole number {key}' if key else ''}")


def _remove(folder: Path) -> None:
    """By one rename, so that a half removed one never looks like a checkpoint."""
    away = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(away, ignore_errors=True)
    try:
        os.replace(folder, away)
    except OSError:
        return  # it stays, as any folder that cannot be removed
    shutil.rmtree(away, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        check_resumable(folder)
    except UserError:
        return False
    return True
