"""A session: all comparisons of `train_step.py` for a device, one after the other.

    python benchmarks/speed_session.py --plan=gpu --minutes=9 --out=results/train_step.json
    python benchmarks/speed_session.py --plan=cpu --figure=docs/train_step.png
    python benchmarks/speed_session.py --against=results/train_step.json   # `make bench`

A comparison that the file already has for these programs, this device and these versions is not
repeated, so several sessions complete one file. The comparisons of a plan are in order of
importance. Leads are single choices of implementation or compiler flags, each compared with the
step as it is; docs/speed.md says what was expected of them.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from train_step import available, compare, difference, floor, key, surroundings, table, versions

OUT = Path(__file__).parent.parent / "results" / "train_step.json"

PEERS = "ours,flax_example,torch,torch_last"
COMPILED = "ours,flax_example,torch_last,torch_compile:default,torch_compile"
# Choices for a GPU in ops/heuristics.py, each undone separately, and flags of XLA.
LEADS = (
    "conv_bn_1x1=unfused",
    "statistics=two_pass",
    "statistics=two_pass:fusion=free",
    "pooling=separable",
    "forward=conv:input_gradient=native:kernel_gradient=native",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_exhaustive_tiling_search=true",
    "--xla_gpu_enable_command_buffer=",
)

# Network, batch size, what is measured, sides.
PLANS: dict[str, list[tuple[str, int, str, str]]] = {
    "gpu": [
        ("resnet50", 256, "train", COMPILED),
        ("cifar_resnet20", 128, "resident", "ours,ours:conv_bn_3x3=unfused"),
        *(("resnet50", 256, "train", f"ours,ours:{lead}") for lead in LEADS),
        ("resnet50", 256, "infer", COMPILED),
        ("resnet18", 256, "train", COMPILED),
        ("cifar_resnet20", 128, "train", COMPILED),
        ("cifar_resnet56", 128, "train", COMPILED),
        ("cifar_resnet110", 128, "train", COMPILED),
        ("resnet18", 256, "infer", COMPILED),
    ],
    "cpu": [
        ("resnet50", 16, "train", PEERS),
        ("resnet18", 16, "train", PEERS),
        ("resnet50", 16, "infer", PEERS),
        ("cifar_resnet20", 128, "train", PEERS),
        ("resnet18", 16, "infer", PEERS),
        ("cifar_resnet20", 128, "infer", PEERS),
        ("cifar_resnet56", 128, "train", PEERS),
        ("cifar_resnet110", 128, "train", PEERS),
    ],
    "shortest": [
        ("cifar_resnet8", 8, "train", "ours,flax_example"),
        ("cifar_resnet8", 8, "infer", "ours,ours:forward=tap_matmul"),
        ("cifar_resnet8", 8, "resident", "ours"),
    ],
}


def main() -> int:
    """Compares; returns 75 if time ran out, 1 if ours is slower than committed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", choices=tuple(PLANS), default="cpu")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="only compare, with this JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    from resnet_flax.runtime.storage import read_json, write_json

    start = time.monotonic()
    about = surroundings()
    print(f"{about['device']}, {about['processor']}\n{versions(about)}", flush=True)
    dtype = "float32" if "cpu" in about["device"] else "bfloat16"
    took, worse = 0.0, False
    for network, batch, what, names in PLANS[arguments.plan]:
        begun = time.monotonic()
        left = 60 * arguments.minutes - (begun - start)
        if took and took > left:
            print("time is up; the same command continues")
            return 75
        kept = read_json(arguments.out, list) or []
        sides = available(names.split(","))
        planned = {"network": network, "batch": batch, "what": what, "dtype": dtype, **about}
        planned["sides"] = dict.fromkeys(sides)
        if not arguments.against and any(done(old, planned) for old in kept):
            continue
        found = compare(
            *(network, batch, what, dtype, sides),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            # However short the session, one comparison is made: a side gets five minutes to start.
            limit=max(60.0 if took else 300.0, min(left / 2, 600.0)),
            together=(os.cpu_count() or 1) >= 16,
        )
        if limits := floor(network, what, about["device"], dtype):
            found["floor"] = limits
        found |= about
        print(table(found), flush=True)
        if arguments.against:
            said, slower = difference(found, read_json(arguments.against, list) or [])
            print(said, flush=True)
            worse = worse or slower
        else:
            write_json(arguments.out, [*(old for old in kept if key(old) != key(found)), found])
        took = time.monotonic() - begun
    if arguments.figure:
        draw(read_json(arguments.out, list) or [], about["processor"], arguments.figure)
    return int(worse)


def done(old: dict[str, Any], planned: dict[str, Any]) -> bool:
    """Whether a comparison has already been made with these programs and versions."""
    return key(old) == key(planned) and all(
        old[name] == planned[name] for name in ("versions", "programs")
    )


def draw(rows: list[dict[str, Any]], processor: str, path: Path) -> None:
    """Draws our rate divided by that of each peer, with the range over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["processor"] == processor and len(row["sides"]) > 1]
    rows = [row for row in rows if not any(name.startswith("ours:") for name in row["sides"])]
    rows = [row for row in rows if row["versions"] == rows[-1]["versions"]]
    peers = list(dict.fromkeys(name for row in rows for name in row["sides"] if name != "ours"))
    figure, panel = pyplot.subplots(figsize=(9, 4), constrained_layout=True)
    for number, peer in enumerate(peers):
        found = [
            (place, row["sides"][peer]["ours_by_this"])
            for place, row in enumerate(rows)
            if "ours_by_this" in row["sides"].get(peer, {})
        ]
        middle = [statistics.median(ratios) for _, ratios in found]
        low = [m - min(ratios) for m, (_, ratios) in zip(middle, found, strict=True)]
        high = [max(ratios) - m for m, (_, ratios) in zip(middle, found, strict=True)]
        width = 0.8 / len(peers)
        at = [place + (number - (len(peers) - 1) / 2) * width for place, _ in found]
        panel.bar(at, middle, 0.9 * width, yerr=[low, high], capsize=2, label=peer)
    panel.axhline(1, color="black", linewidth=1)
    names = [f"{row['network'].removeprefix('cifar_')}\n{row['what']}" for row in rows]
    panel.set_xticks(range(len(rows)), names, fontsize=8)
    panel.set_ylabel("images/s, ours over each")
    panel.set_title(f"{processor}, {versions(rows[-1])}", fontsize=10)
    panel.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
