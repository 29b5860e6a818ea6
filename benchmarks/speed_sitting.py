"""All comparisons of `train_step.py` for a device, one after the other, for some minutes.

    python benchmarks/speed_sitting.py --plan=gpu --minutes=9 --out=results/train_step.json
    python benchmarks/speed_sitting.py --plan=cpu --figure=docs/train_step.png
    python benchmarks/speed_sitting.py --against=results/train_step.json   # `make bench`

What the file has of this commit, this device and these versions is not done again, so that several
sittings make one whole. The first of a plan matter most. Leads are tried beside the step as it is,
one by one; what was expected of them stands in docs/speed.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from train_step import available, compare, difference, floor, key, table, torch_version, versions

OUT = Path(__file__).parent.parent / "results" / "train_step.json"

PEERS = "ours,flax_example,torch,torch_last"
COMPILED = "ours,flax_example,torch_last,torch_compile"
LEADS = (
    "statistics=one_pass",
    "pooling=native",
    "forward=dot:input_gradient=dot:kernel_gradient=dot",
    "forward=space_to_depth:kernel_gradient=space_to_depth",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_autotune_level=4",
    "--xla_gpu_enable_command_buffer=",
)

# Network, batch, what, sides.
PLANS: dict[str, list[tuple[str, int, str, str]]] = {
    "gpu": [
        ("resnet50", 256, "train", COMPILED),
        ("cifar_resnet20", 128, "resident", "ours"),
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
        ("cifar_resnet20", 8, "train", "ours,flax_example"),
        ("cifar_resnet20", 8, "infer", "ours,ours:forward=taps"),
        ("cifar_resnet20", 8, "resident", "ours"),
    ],
}


def main() -> int:
    """As many comparisons as there is time for; returns 0 where the plan is at its end, else 75."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", choices=tuple(PLANS), default="cpu")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="only compare, with this JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    from resnet_flax.provenance import provenance, read_json, write_json

    start = time.monotonic()
    about = provenance()
    about["versions"] |= torch_version()
    print(f"{about['device']}; {versions(about)}", flush=True)
    dtype = "float32" if "cpu" in about["device"] else "bfloat16"
    took = 0.0
    for network, batch, what, names in PLANS[arguments.plan]:
        begun = time.monotonic()
        if begun + took - start > 60 * arguments.minutes:
            print("time is up; the same command goes on")
            return 75
        kept = read_json(arguments.out) or []
        sides = available(names.split(","))
        planned = {"network": network, "batch": batch, "what": what, "dtype": dtype, **about}
        planned["sides"] = dict.fromkeys(sides)
        if not arguments.against and any(done(old, planned) for old in kept):
            continue
        found = compare(
            *(network, batch, what, dtype, sides),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
        if limits := floor(network, what, about["device"], dtype):
            found["floor"] = limits
        found |= about
        print(table(found), flush=True)
        if arguments.against:
            print(difference(found, read_json(arguments.against) or []), flush=True)
        else:
            write_json(arguments.out, [*(old for old in kept if key(old) != key(found)), found])
        took = time.monotonic() - begun
    if arguments.figure:
        draw(read_json(arguments.out) or [], about["device"], arguments.figure)
    return 0


def done(old: dict[str, Any], planned: dict[str, Any]) -> bool:
    """Whether a comparison has been made with these programs."""
    same = key(old) == key(planned) and old["versions"] == planned["versions"]
    return same and old["commit"] == planned["commit"]


def draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Ours over each peer, with the range of the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import statistics

    from matplotlib import pyplot

    rows = [row for row in rows if row["device"] == device and len(row["sides"]) > 2]
    newest = max(row["versions"]["jax"] for row in rows)
    rows = [row for row in rows if row["versions"]["jax"] == newest]
    figure, panel = pyplot.subplots(figsize=(9, 4), constrained_layout=True)
    peers = [name for name in rows[0]["sides"] if name != "ours"]
    for number, peer in enumerate(peers):
        for place, row in enumerate(rows):
            ratios = row["sides"][peer]["ours_by_this"]
            middle = statistics.median(ratios)
            panel.bar(
                place + (number - 1) * 0.27,
                middle,
                0.25,
                color=f"C{number}",
                label=peer if place == 0 else None,
                yerr=[[middle - min(ratios)], [max(ratios) - middle]],
                capsize=2,
            )
    panel.axhline(1, color="black", linewidth=1)
    names = [f"{row['network'].removeprefix('cifar_')}\n{row['what']}" for row in rows]
    panel.set_xticks(range(len(rows)), names, fontsize=8)
    panel.set_ylabel("images/s, ours over each")
    panel.set_title(f"{device}, {rows[0]['dtype']}, JAX {newest}", fontsize=10)
    panel.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
