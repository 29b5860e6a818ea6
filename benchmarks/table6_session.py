"""A session of training for table 6 on a machine that is lent for minutes and is empty next time.

    python benchmarks/table6_session.py --data_dir=DIR --keep=KEEP --minutes=9

Continues from what earlier sessions left in KEEP, trains (one seed of every network first, without
ResNet-1202), and stops in time with everything saved. It leaves KEEP/runs.tar, which the next
session needs, and KEEP/table6.json with all results and curves so far, which merges into results/.
Of finished runs the results and curves are kept, of an unfinished run also its newest checkpoint.
"""

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

from resnet_flax.cli import main as resnet_flax

NETWORKS = ",".join(
    [f"{kind}-{depth}" for depth in (20, 32, 44, 56, 110) for kind in ("ResNet", "plain")]
)


def main() -> int:
    """Runs one session; returns the exit status, which is 143 if time ran out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data_dir", default="", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default=NETWORKS)
    arguments, settings = parser.parse_known_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    kept = arguments.keep / "runs.tar"
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch)
        if kept.exists():
            with tarfile.open(kept) as archive:
                archive.extractall(runs, filter="data")
        command = ["reproduce", "run", "table6", f"--workdir={runs}", f"--only={arguments.only}"]
        command += [f"--seeds={arguments.seeds}", f"--minutes={arguments.minutes}"]
        command += [f"--out={arguments.keep / 'table6.json'}", f"--data_dir={arguments.data_dir}"]
        status = resnet_flax([*command, *settings])
        with tarfile.open(kept.with_suffix(".part"), "w") as archive:
            for path in _worth_keeping(runs):
                archive.add(path, path.relative_to(runs))
        kept.with_suffix(".part").replace(kept)
    return status


def _worth_keeping(runs: Path) -> list[Path]:
    found = []
    for run in sorted(runs.glob("*/seed*")):
        found += [
            run / name for name in ("result.json", "sessions.json", "metrics.jsonl", "config.json")
        ]
        steps = [path for path in run.glob("checkpoints/*") if path.name.isdecimal()]
        if steps and not (run / "result.json").exists():
            found.append(max(steps, key=lambda path: int(path.name)))
    return [path for path in found if path.exists()]


if __name__ == "__main__":
    sys.exit(main())
