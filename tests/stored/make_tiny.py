"""Makes tiny.tar.gz: the runs of tests/tiny_config.py that most tests share, trained and reported.

``run`` went through the three stages in 2 + 6 + 80 steps, so that every pair of widths was visited;
``float`` is the full-precision baseline, of 8 steps. Of the
checkpoints those at the ends of stages are kept.
Plots are left out: what tests plots draws them. From the root of the repository:

    python -m tests.stored.make_tiny

Make it anew when ``tests/tiny_config.py`` or the format of a workdir changes. That training still
gives such a run is tested in ``tests/training/test_resume.py``.
"""

import gzip
import pathlib
import tarfile
import tempfile

from bitmixer_jax.report import report
from bitmixer_jax.training import load_config, train

ARCHIVE = pathlib.Path(__file__).with_name("tiny.tar.gz")
CONFIG = pathlib.Path(__file__).parents[1] / "tiny_config.py"
RUNS = {"run": ("", (2, 8, 88)), "float": ("float", (8,))}  # variant, ends of stages


def kept(member):
    """The member as it is stored, without what tells who made it and when; None: left out."""
    path = pathlib.PurePath(member.name)
    if path.suffix == ".png" or "tfevents" in path.name:
        return None
    if "checkpoints" in path.parts[:-1] and int(path.parts[2]) not in RUNS[path.parts[0]][1]:
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def pack(folder):
    """Packs the runs in ``folder``."""
    with (
        gzip.GzipFile(ARCHIVE, "wb", compresslevel=9, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in RUNS:
            archive.add(pathlib.Path(folder) / name, name, filter=kept)


def main():
    with tempfile.TemporaryDirectory() as folder:
        for name, (variant, _) in RUNS.items():
            config = load_config(f"{CONFIG}:{variant}", [])
            report(train(config, pathlib.Path(folder) / name))
        pack(folder)


if __name__ == "__main__":
    main()
