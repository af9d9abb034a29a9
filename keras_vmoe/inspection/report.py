"""The report of an `Inspection`: sentences, a page, tables."""

import base64
import csv
import io
import pathlib

import numpy as np

from keras_vmoe import _files
from keras_vmoe._checks import counted
from keras_vmoe._extras import require
from keras_vmoe._warnings import warn
from keras_vmoe.inspection import _plots
from keras_vmoe.inspection import pictures

PAGE, NUMBERS = "index.html", "numbers.npz"
TABLES = ("layers.csv", "experts.csv", "classes.csv")
ABLATIONS = "ablations.csv"
OURS = {PAGE, NUMBERS, ABLATIONS, *TABLES}
PER_LAYER = (
    "load", "load_of_all_choices", "experts_per_image",
    "experts_per_image_of_all_choices", "similarity", "class_counts",
    "class_weight", "patches_cdf", "spatial_share", "extra_tokens",
    "best_gates", "best_images", "best_labels", "best_patches", "examples",
    "priority", "taken", "entropy", "served_share", "grid",
)  # fmt: skip


def sentences(found, name):
    """Summarizes the numbers of a layer in sentences.

    Args:
        found: An `Inspection`.
        name: Name of the layer.
    """
    layer = found.layers[name]
    experts = layer.num_experts
    first, every = (
        f"{_mean(numbers):.1f}"
        for numbers in (
            layer.experts_per_image,
            layer.experts_per_image_of_all_choices,
        )
    )
    more = "" if every == first else f", {every} by all choices"
    said = [
        f"On average, an image has patches in {first} of {experts} experts by "
        f"first choice{more}.",
        f"The mean entropy of a patch's gates is {layer.entropy:.2f} nats, out "
        f"of at most {np.log(experts):.2f}.",
    ]
    unused = np.flatnonzero(layer.load == 0)
    most = int(layer.load.argmax())
    said.append(
        f"Expert {most} is the first choice for {_percent(layer.load[most])} "
        "of the patches, "
        f"{layer.load[most] * experts:.1f} times an even load"
        + (f"; {_experts(unused)} for none." if len(unused) else ".")
    )
    if layer.served_share < 0.9995:
        said.append(
            f"No expert serves {1 - layer.served_share:.1%} of the patches, "
            "for lack of room."
        )
    if layer.class_counts is not None:
        said += _of_classes(layer, found.class_names)
    pair = _most_alike(layer.similarity)
    if pair is not None:
        a, b = pair
        said.append(
            f"Experts {a} and {b} see the most similar images: similarity "
            f"{layer.similarity[a, b]:.2f}, where 1 means the same."
        )
    return said


def _of_classes(layer, names):
    """Describes the expert that stands out most for a class."""
    counts = layer.class_counts
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    # Relative to the expert's share of all patches.
    excess = np.where(totals[:, None] > 0, share - layer.load, -1)
    c, e = np.unravel_index(excess.argmax(), excess.shape)
    return [
        f"Expert {e} is the first choice for {_percent(share[c, e])} of the "
        f"patches of class '{names[c]}', and for {_percent(layer.load[e])} of "
        "all patches."
    ]


def _percent(share):
    """Formats a share in percent; 0 and 100 only if they are exact."""
    words = f"{share:.0%}"
    if words == "100%" and share < 1:
        return "over 99%"
    return "under 1%" if words == "0%" and share > 0 else words


def _experts(numbers):
    """Returns `"expert 3"`, `"experts 3 and 5"` or `"9 experts"`."""
    if len(numbers) == 1:
        return f"expert {numbers[0]}"
    if len(numbers) > 3:
        return f"{len(numbers)} experts"
    *others, last = map(str, numbers)
    return f"experts {', '.join(others)} and {last}"


def _mean(histogram):
    return float((histogram * np.arange(len(histogram))).sum()) / max(
        1, histogram.sum()
    )


def _most_alike(similarity):
    """Returns the pair of experts with the largest similarity, or None."""
    upper = np.triu(np.nan_to_num(similarity), k=1)
    if not upper.any():
        return None
    return tuple(map(int, np.unravel_index(upper.argmax(), upper.shape)))


def check_folder(folder):
    """Raises unless a report can be written to the folder."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            "The report folder must be new. Received: "
            f"{str(folder)!r}, which is a file. Name another one."
        )
    others = set()
    if folder.exists():
        others = {x.name for x in folder.iterdir()} - OURS
    others = {x for x in others if not x.startswith(_files.PARTIAL)}
    if others:
        raise FileExistsError(
            "The report folder must be new, or hold only an earlier report. "
            f"Received: {str(folder)!r}, which holds "
            f"{sorted(others)[:5]}. Name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            "The report folder must be one that can be created. Received: "
            f"{str(folder)!r} ({error.strerror}). Choose another one."
        ) from error


def write(found, folder, history=None, title=None, ablations=None):
    """See `Inspection.save`."""
    require("matplotlib", "plots")
    jinja2 = require("jinja2", "plots")
    check_folder(folder)
    tables = {"layers.csv": _layers_csv(found)}
    tables["experts.csv"] = _experts_csv(found)
    if found.class_names is not None:
        tables["classes.csv"] = _classes_csv(found)
    if ablations:
        tables[ABLATIONS] = _csv(
            list(ablations[0]), [list(row.values()) for row in ablations]
        )
    template = pathlib.Path(__file__).with_name("report.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(template).render(
        title=title,
        layers=_sections(found),
        overview=_overview(found, history),
        between=_images(_between(found)),
        num_images=next(iter(found.layers.values())).num_images,
        has_classes=found.class_names is not None,
        tables=[*tables, NUMBERS],
        ablations=ablations,
    )
    # Remove an earlier report first: it describes other images.
    for name in (PAGE, *sorted(OURS - {PAGE, NUMBERS, *tables})):
        (folder / name).unlink(missing_ok=True)
    with _files.replacing(folder / NUMBERS) as partial:
        np.savez(partial, **_numbers(found))
    for name, text in tables.items():
        _files.write_text(folder / name, text)
    _files.write_text(folder / PAGE, page)
    return folder / PAGE


def _overview(found, history):
    """Returns the pictures above the sections of single layers."""
    figures = {}
    if len(found.images):
        figures["Which expert sees what: the first choice of each patch."] = (
            lambda: pictures.expert_maps(found)
        )
    return _images({**figures, **_of_training(history, found)})


def _between(found):
    """Returns captions and pictures of choices from layer to layer."""
    return {
        f"Experts of {names[1]} that the patches of each expert of {names[0]} "
        "go to next.": lambda names=names, table=table: pictures.between_layers(
            table, names
        )
        for names, table in found.between.items()
    }


def _sections(found):
    """Returns what the page shows for each layer."""
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
    """Returns captions and their drawing functions, in page order."""
    layer = found.layers[name]
    figures = {
        "Load of the experts; the line is an even load.": lambda: (
            pictures.load_bars(layer)
        ),
        "The patches with each expert's largest gates, at most one per image, "
        "under the classes of their images.": lambda: pictures.best_patches(
            layer, found.class_names
        ),
        "Where each expert's patches are in the image.": lambda: (
            pictures.spatial_maps(layer)
        ),
        "Left: number of experts per image. Right: of the images with any of "
        "an expert's patches, the share with at most this many of "
        "them.": lambda: pictures.distributions(layer),
        "How similar the images of two experts are: the numbers of patches "
        "that they have in common, relative to all of theirs.": lambda: (
            pictures.similarity_matrix(layer)
        ),
    }
    if layer.class_counts is not None:
        figures[
            "The share of each class's patches by expert, as first choice."
        ] = lambda: pictures.class_heatmap(layer, found.class_names)
    if layer.taken is not None and len(found.images):
        figures[
            "What each expert takes from an image: the dispatch weights of its "
            "slots (Soft MoE), or the gates of the patches that it chose."
        ] = lambda: pictures.taken_maps(found, name)
    if layer.served:
        figures[
            "Served patches as capacity shrinks, without and with Batch "
            "Prioritized Routing. No expert has room for the veiled patches. "
            "Images that are routed together share the capacity."
        ] = lambda: pictures.drop_maps(found, name)
    return figures


def _of_training(history, found):
    """Returns plots of the load over the epochs of a `history.csv`."""
    if history is None:
        return {}
    figures = {}
    try:
        with open(history, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name, layer in found.layers.items():
            columns = [f"{name}/load_{e}" for e in range(layer.num_experts)]
            theirs = [x for x in rows[0] if x.startswith(f"{name}/load_")]
            if sorted(theirs) != sorted(columns):
                continue  # The model had other experts.
            epochs = [
                {"load_share": [float(row[column]) for column in columns]}
                for row in rows
            ]
            figures[f"Load of {name} during training."] = (
                lambda name=name, epochs=epochs: _plots.load_figure(
                    name, epochs
                )
            )
    except (OSError, ValueError, TypeError, LookupError, csv.Error) as error:
        warn(f"{history} is left out of the report: {error}")
    return figures


def _images(figures):
    """Draws figures by caption, as pictures embedded in the page."""
    found = []
    for caption, draw in figures.items():
        content = io.BytesIO()
        figure = draw()
        figure.savefig(content, format="png", dpi=90)
        code = base64.b64encode(content.getvalue()).decode()
        width = figure.get_figwidth()
        found.append({"caption": caption, "source": code, "wide": width > 6})
    return found


def _numbers(found):
    """Returns all numbers by `<layer>/<name>`."""
    numbers = {"images": found.images}
    if found.labels is not None:
        numbers["labels"] = found.labels
        numbers["class_names"] = np.array(found.class_names)
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


def _layers_csv(found):
    rows = [
        [name, layer.router, layer.num_experts, *layer.grid, layer.num_images,
         layer.served_share, layer.entropy, _mean(layer.experts_per_image),
         _mean(layer.experts_per_image_of_all_choices)]
        for name, layer in found.layers.items()
    ]  # fmt: skip
    head = ["layer", "router", "experts", "rows", "columns", "images",
            "served_share", "entropy", "experts_per_image",
            "experts_per_image_of_all_choices"]  # fmt: skip
    return _csv(head, rows)


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
