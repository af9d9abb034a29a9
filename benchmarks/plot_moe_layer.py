"""A picture and a Markdown table of the results of moe_layer.py.

    python benchmarks/plot_moe_layer.py

Writes `results/moe_layer.png` and prints the tables of the README.
"""

import csv
import pathlib

from matplotlib.figure import Figure

FOLDER = pathlib.Path(__file__).parent / "results"
BACKENDS = ("jax", "tensorflow", "torch")
PASSES = ("forward", "training")
SHAPE = "ViT-S/16 x8"


def main():
    """Reads the committed results."""
    with open(FOLDER / "moe_layer.csv", newline="") as file:
        rows = select(csv.DictReader(file), dtype="float32")
    draw(rows)
    for kind in PASSES:
        methods = select(rows, table="methods", shape=SHAPE)
        print_markdown(methods, kind, "candidate")
    for kind in PASSES:
        shapes = select(rows, table="methods", candidate="top-k")
        print_markdown(shapes, kind, "shape")
    for table in ("experts", "selected", "capacity", "overhead", "statistics"):
        for kind in PASSES:
            print_markdown(select(rows, table=table), kind, "candidate")
    print_markdown(select(rows, table="memory"), "training", "candidate")


def select(rows, **columns):
    """The rows with these values."""
    return [
        row
        for row in rows
        if all(row[name] == value for name, value in columns.items())
    ]


def print_markdown(rows, kind, label):
    """One line per label, one column per backend."""
    print(f"\n| {rows[0]['table']}, {kind} | JAX | TensorFlow | PyTorch |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(row[label] for row in rows):
        cells = []
        for backend in BACKENDS:
            found = select(rows, backend=backend, **{label: name, "pass": kind})
            cells.append(found[0]["ratio"] if found else "")
        print(f"| {name} | {' | '.join(cells)} |")


def draw(rows):
    """Time of every method relative to the dense MLP, as bars."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rows = select(rows, table="methods", shape=SHAPE)
    names = [name for name in dict.fromkeys(r["candidate"] for r in rows)]
    names.remove("dense")
    for axis, kind in zip(axes, PASSES, strict=True):
        for i, backend in enumerate(BACKENDS):
            found = select(rows, backend=backend, **{"pass": kind})
            ratio = {row["candidate"]: float(row["ratio"]) for row in found}
            here = [n for n in range(len(names)) if names[n] in ratio]
            axis.bar(
                [n + 0.27 * (i - 1) for n in here],
                [ratio[names[n]] for n in here],
                width=0.25,
                label=backend,
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axis.set_title(f"{kind}, {SHAPE}, E=8, K=2, CPU")
        axis.set_yscale("log")
        axis.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
    axes[0].set_ylabel("time, relative to a dense MLP of the same FLOPs")
    axes[0].legend()
    figure.savefig(FOLDER / "moe_layer.png", dpi=110)


if __name__ == "__main__":
    main()
