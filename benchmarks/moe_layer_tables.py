"""Prints the results of moe_layer.py as the Markdown tables of docs/speed.md.

python benchmarks/moe_layer_tables.py
"""

import csv
import pathlib

FOLDER = pathlib.Path(__file__).parent / "results"
BACKENDS = ("jax", "tensorflow", "torch")
PASSES = ("forward", "training")
SHAPE = "ViT-S/16 x8"
NAMES = {"keras_hub": "KerasHub", "model garden": "Model Garden"}


def main():
    """Reads the committed results."""
    with open(FOLDER / "moe_layer.csv", newline="") as file:
        rows = select(csv.DictReader(file), dtype="float32")
    for kind in PASSES:
        methods = select(rows, table="methods", shape=SHAPE)
        print_markdown(methods, kind, "candidate")
    for kind in PASSES:
        shapes = select(rows, table="methods", candidate="top-k")
        print_markdown(shapes, kind, "shape")
    hub = select(rows, table="methods", candidate="keras_hub")
    print_markdown(hub, "forward", "shape")
    overhead = [
        {**row, "candidate": f"{row['shape']}, {row['candidate']}"}
        for row in select(rows, table="overhead")
        if row["candidate"].startswith("top-k")
    ]
    for kind in PASSES:
        print_markdown(overhead, kind, "candidate")
    for table in ("experts", "selected", "capacity", "statistics"):
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
            cells.append(cell(found[0]) if found else "")
        print(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")


def cell(row):
    """A median with its quartiles, where they differ."""
    names = ("ratio", "ratio_q25", "ratio_q75")
    median, low, high = (f"{float(row[x]):.2f}" for x in names)
    return median if low == high else f"{median} ({low} to {high})"


if __name__ == "__main__":
    main()
