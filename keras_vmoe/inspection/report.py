"""The report of an `Inspection`: sentences, a page, tables."""

import base64
import csv
import io
import pathlib

import numpy as np

from keras_vmoe import _files
from keras_vmoe._checks import counted
from keras_vmoe._extras import require
from keras_vmoe.inspection import _plots
from keras_vmoe.inspection import pictures

PAGE, NUMBERS = "index.html", "numbers.npz"
TABLES = ("experts.csv", "classes.csv")
ABLATIONS = "ablations.csv"
OURS = {PAGE, NUMBERS, ABLATIONS, *TABLES}
PER_LAYER = (
    "load", "load_of_all_choices", "experts_per_image",
    "experts_per_image_of_all_choices", "similarity", "class_counts",
    "class_weight", "patches_cdf", "spatial_share", "extra_tokens",
    "best_gates", "best_images", "best_labels", "best_patches", "examples",
    "priority",
)  # fmt: skip


def sentences(found, name):
    """What the numbers of a layer say.

    Args:
        found: An `Inspection`.
        name: Of the layer.
    """
    layer = found.layers[name]
    experts = layer.num_experts
    said = [
        f"{_mean(layer.experts_per_image):.1f} of {experts} experts are the "
        "first choice of a patch of an image, "
        f"{_mean(layer.experts_per_image_of_all_choices):.1f} with all choices."
    ]
    unused = np.flatnonzero(layer.load == 0)
    most = int(layer.load.argmax())
    said.append(
        f"Expert {most} is the first choice of {layer.load[most]:.0%} of the "
        f"patches, {layer.load[most] * experts:.1f} times an even load"
        + (f"; {_experts(unused)} of none." if len(unused) else ".")
    )
    if layer.served_share < 0.9995:
        said.append(
            f"{1 - layer.served_share:.1%} of the patches are served by no "
            "expert."
        )
    if layer.class_counts is not None:
        said += _of_classes(layer, found.class_names)
    pair = _most_alike(layer.similarity)
    if pair is not None:
        a, b = pair
        said.append(
            f"Experts {a} and {b} look at the most similar images "
            f"({layer.similarity[a, b]:.2f})."
        )
    return said


def _of_classes(layer, names):
    """The class that one expert has most of, and how many such there are."""
    counts = layer.class_counts
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    # Beyond what the expert takes of everything.
    excess = np.where(totals[:, None] > 0, share - layer.load, -1)
    c, e = np.unravel_index(excess.argmax(), excess.shape)
    return [
        f"Expert {e} takes {share[c, e]:.0%} of class '{names[c]}', "
        f"{layer.load[e]:.0%} of all."
    ]


def _experts(numbers):
    """`"expert 3"`, `"experts 3 and 5"`, `"9 experts"`."""
    if len(numbers) == 1:
        return f"expert {numbers[0]}"
    if len(numbers) > 3:
        return f"{len(numbers)} experts"
    return "experts " + " and ".join(map(str, numbers))


def _mean(histogram):
    return float((histogram * np.arange(len(histogram))).sum()) / max(
        1, histogram.sum()
    )


def _most_alike(similarity):
    """The pair of experts with the largest similarity, if there are two."""
    upper = np.triu(np.nan_to_num(similarity), k=1)
    if not upper.any():
        return None
    return tuple(map(int, np.unravel_index(upper.argmax(), upper.shape)))


def write(found, folder, history=None):
    """See `Inspection.save`."""
    require("matplotlib", "plots")
    jinja2 = require("jinja2", "plots")
    if folder.exists():
        others = {x.name for x in folder.iterdir()} - OURS
        others = {x for x in others if not x.startswith(_files.PARTIAL)}
        if others:
            raise FileExistsError(
                "The folder of a report must be new, or hold nothing but an "
                f"earlier one. Received: {str(folder)!r}, which holds "
                f"{sorted(others)[:5]}. Name another folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    template = pathlib.Path(__file__).with_name("report.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(template).render(
        layers=_sections(found),
        overview=_images(
            {
                "Which expert sees what: the first choice of each patch.": (
                    lambda: pictures.expert_maps(found)
                )
            }
            if len(found.images)
            else {}
        )
        + _images(_of_training(history, found)),
        between=_images(
            {
                f"From {names[0]} to {names[1]}.": (
                    lambda names=names, table=table: pictures.between_layers(
                        table, names
                    )
                )
                for names, table in found.between.items()
            }
        ),
        num_images=next(iter(found.layers.values())).num_images,
        has_classes=found.class_names is not None,
        tables=[*TABLES[: 2 if found.class_names else 1], NUMBERS],
    )
    with _files.replacing(folder / NUMBERS) as partial:
        np.savez(partial, **_numbers(found))
    _files.write_text(folder / TABLES[0], _experts_csv(found))
    if found.class_names is not None:
        _files.write_text(folder / TABLES[1], _classes_csv(found))
    _files.write_text(folder / PAGE, page)
    return folder / PAGE


def _sections(found):
    """What the page shows of each layer."""
    return [
        {
            "name": name,
            "router": layer.router,
            "summary": f"{counted(layer.num_experts, 'expert')}, "
            f"{layer.grid[0]} x {layer.grid[1]} patches",
            "sentences": sentences(found, name),
            "pictures": _images(_pictures(found, name)),
        }
        for name, layer in found.layers.items()
    ]


def _pictures(found, name):
    """Captions and what draws them, in the order of the page."""
    layer = found.layers[name]
    figures = {
        "Load of the experts; the line is an even load.": lambda: (
            pictures.load_bars(layer)
        ),
        "The patches with the largest gates, at most one per image.": lambda: (
            pictures.best_patches(layer, found.class_names)
        ),
        "Where in the image an expert has its patches.": lambda: (
            pictures.spatial_maps(layer)
        ),
        "How many experts an image meets, and how many of its patches an "
        "expert has.": lambda: pictures.distributions(layer),
        "How alike the images of two experts are.": lambda: (
            pictures.similarity_matrix(layer)
        ),
    }
    if layer.class_counts is not None:
        figures["Which expert takes which class."] = lambda: (
            pictures.class_heatmap(layer, found.class_names)
        )
    if layer.served:
        figures[
            "Patches that are served (bright) as capacity shrinks, without and "
            "with Batch Prioritized Routing."
        ] = lambda: pictures.drop_maps(found, name)
    return figures


def _of_training(history, found):
    """The load over the epochs, of a `history.csv`."""
    if history is None:
        return {}
    with open(history, newline="") as file:
        rows = list(csv.DictReader(file))
    figures = {}
    for name, layer in found.layers.items():
        columns = [f"{name}/load_{e}" for e in range(layer.num_experts)]
        if not rows or any(column not in rows[0] for column in columns):
            continue
        epochs = [
            {"load_share": [float(row[column]) for column in columns]}
            for row in rows
        ]
        figures[f"Load of {name} while it was trained."] = (
            lambda name=name, epochs=epochs: _plots.load_figure(name, epochs)
        )
    return figures


def _images(figures):
    """Figures by caption as pictures inside of the page."""
    found = []
    for caption, draw in figures.items():
        content = io.BytesIO()
        draw().savefig(content, format="png", dpi=90)
        code = base64.b64encode(content.getvalue()).decode()
        found.append({"caption": caption, "source": code})
    return found


def _numbers(found):
    """All numbers by `<layer>/<name>`."""
    numbers = {"images": found.images}
    if found.labels is not None:
        numbers["labels"] = found.labels
    for name, layer in found.layers.items():
        for key in PER_LAYER:
            value = getattr(layer, key)
            if value is not None:
                numbers[f"{name}/{key}"] = value
        for (capacity, priority), served in layer.served.items():
            kind = "bpr" if priority else "vanilla"
            numbers[f"{name}/served_{kind}_{capacity:g}"] = served
    for (first, second), table in found.between.items():
        numbers[f"{first}/to/{second}"] = table
    return numbers


def _experts_csv(found):
    rows = [
        [name, e, layer.load[e], layer.load_of_all_choices[e],
         layer.extra_tokens[e], layer.best_gates[e, 0]]
        for name, layer in found.layers.items()
        for e in range(layer.num_experts)
    ]  # fmt: skip
    head = ["layer", "expert", "load", "load_of_all_choices", "extra_tokens",
            "largest_gate"]  # fmt: skip
    return _csv(head, rows)


def _classes_csv(found):
    rows = [
        [name, found.class_names[c], e, layer.class_counts[c, e],
         layer.class_weight[c, e]]
        for name, layer in found.layers.items()
        for c in range(len(found.class_names))
        for e in range(layer.num_experts)
    ]  # fmt: skip
    return _csv(["layer", "class", "expert", "patches", "weight"], rows)


def _csv(head, rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
