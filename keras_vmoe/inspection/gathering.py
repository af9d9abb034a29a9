"""Sums over batches of a layer's expert statistics, in constant memory."""

import dataclasses

import numpy as np

from keras_vmoe.inspection import patches

BEST = 12  # Patches kept per expert.


@dataclasses.dataclass(frozen=True)
class LayerInspection:
    """Statistics of the experts of one layer.

    A class token and registers have no place in the image and are counted
    separately. With token choice a patch's experts are those it chooses, even
    without capacity for it; with expert choice those that took it.

    Attributes:
        name: Name of the layer.
        router: Name of the router's class.
        grid: `(rows, columns)` of the patches.
        num_images: Number of images.
        load: `(E,)` share of the patches whose first choice is the expert.
        load_of_all_choices: `(E,)` the same for all choices.
        served_share: Share of the patches that an expert serves.
        entropy: Mean entropy of the patches' gates, in nats.
        experts_per_image: `(E + 1,)` histogram of images by the number of
            experts that are the first choice of a patch.
        experts_per_image_of_all_choices: The same for all choices.
        similarity: `(E, E)`, see `inspection.similarity`.
        class_counts: `(classes, E)`, see `inspection.class_counts`; None
            without labels.
        class_weight: `(classes, E)`, see `inspection.class_weight`.
        patches_cdf: `(E, N + 1)`, see `inspection.patches_cdf`.
        spatial_share: `(E, rows, columns)`, see `inspection.spatial_share`.
        extra_tokens: `(E,)` first choices of the class token and registers.
        best_gates: `(E, 12)` largest gates, one per image, in descending order;
            0 beyond the number of images.
        best_images: `(E, 12)` numbers of these images, -1 for none.
        best_labels: `(E, 12)` their classes; None without labels.
        best_patches: `(E, 12, height, width, channels)` uint8, the patches.
        examples: `(images, rows, columns)` first choice of each patch of the
            example images.
        priority: `(images, rows, columns)` largest gate of each of them.
        taken: `(images, E, rows, columns)` how much each expert takes of each
            of them: the gate of chosen patches (expert choice), or the dispatch
            weights of its slots (Soft MoE); None for token choice.
        served: Dict from `(capacity_factor, batch_priority)` to `(images, rows,
            columns)` bool: whether each of them is served. Empty unless tokens
            choose.
    """

    name: str
    router: str
    grid: tuple[int, int]
    num_images: int
    load: np.ndarray
    load_of_all_choices: np.ndarray
    served_share: float
    entropy: float
    experts_per_image: np.ndarray
    experts_per_image_of_all_choices: np.ndarray
    similarity: np.ndarray
    class_counts: np.ndarray | None
    class_weight: np.ndarray | None
    patches_cdf: np.ndarray
    spatial_share: np.ndarray
    extra_tokens: np.ndarray
    best_gates: np.ndarray
    best_images: np.ndarray
    best_labels: np.ndarray | None
    best_patches: np.ndarray
    examples: np.ndarray
    priority: np.ndarray
    taken: np.ndarray | None
    served: dict[tuple[float, bool], np.ndarray]

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return len(self.load)


class LayerSums:
    """Running sums of one layer over batches.

    Args:
        layer: The `MoEMLP`.
        grid: `(rows, columns)` of the patches, the last tokens of an image.
        num_classes: Classes, or None without labels.
    """

    def __init__(self, layer, grid, num_classes):
        self.layer, self.grid = layer, grid
        experts, num_patches = layer.num_experts, grid[0] * grid[1]
        self.num_experts, self.num_patches = experts, num_patches
        self.num_images = 0
        self.first, self.all = np.zeros((2, experts), "int64")
        self.num_served, self.entropy = 0, 0.0
        self.per_image = np.zeros((2, experts + 1), "int64")
        self.shared = np.zeros((experts, experts), "int64")
        self.by_count = np.zeros((experts, num_patches + 1), "int64")
        self.places = np.zeros((experts, num_patches), "int64")
        self.extra = np.zeros(experts, "int64")
        self.classes = None
        if num_classes is not None:
            self.classes = np.zeros((num_classes, experts), "int64")
            self.weights = np.zeros((num_classes, experts))
            self.class_images = np.zeros(num_classes, "int64")
        self.best = np.zeros((experts, BEST))
        self.best_images, self.best_labels = np.full((2, experts, BEST), -1)
        self.best_patches = None
        self.examples = []

    def add(self, decisions, images, labels):
        """Adds a batch: its `Decisions`, uint8 images, labels or None."""
        experts, kept = self.num_experts, slice(-self.num_patches, None)
        gates, top = decisions.gates[:, kept], decisions.top[:, kept]
        first = top[..., 0]
        counts = patches.patch_counts(first, experts)
        all_counts = patches.patch_counts(top, experts)
        self.first += counts.sum(axis=0)
        self.all += all_counts.sum(axis=0)
        self.num_served += int(decisions.served[:, kept].sum())
        logs = np.log(np.maximum(gates, np.finfo("float32").tiny))
        self.entropy -= float((gates * logs).sum(dtype="float64"))
        for row, found in enumerate((counts, all_counts)):
            number = patches.experts_per_image(found)
            self.per_image[row] += np.bincount(number, minlength=experts + 1)
        self.shared += patches.shared_counts(counts)
        self.by_count += patches.images_by_count(counts, self.num_patches)
        chosen = first == np.arange(experts)[:, None, None]
        self.places += chosen.sum(axis=1)
        extra = decisions.top[:, : -self.num_patches, 0]
        self.extra += patches.patch_counts(extra.reshape(1, -1), experts)[0]
        if self.classes is not None:
            classes = len(self.classes)
            self.classes += patches.class_counts(counts, labels, classes)
            weights = patches.mean_weight(gates, top)
            self.weights += patches.class_counts(weights, labels, classes)
            self.class_images += np.bincount(labels, minlength=classes)
        numbers = np.arange(len(images)) + self.num_images
        if labels is None:
            labels = np.full(len(images), -1)
        self._add_best(gates, first, images, numbers, labels)
        self.num_images += len(images)

    def _add_best(self, gates, first, images, numbers, labels):
        """Keeps the patches with the largest gates, at most one per image."""
        experts = np.arange(self.num_experts)
        mine = np.where(first[..., None] == experts, gates, 0.0)  # (B, N, E)
        places = mine.argmax(axis=1)
        values = mine.max(axis=1)
        rows, columns = self.grid
        height, width = images.shape[1] // rows, images.shape[2] // columns
        if self.best_patches is None:
            shape = (self.num_experts, BEST, height, width, images.shape[3])
            self.best_patches = np.zeros(shape, "uint8")
        for e in experts:
            found = np.concatenate([self.best[e], values[:, e]])
            order = np.argsort(-found, kind="stable")[:BEST]
            crops = self.best_patches[e].copy()
            for slot, i in enumerate(order):
                if i < BEST:
                    crops[slot] = self.best_patches[e, i]
                elif found[i] > 0:
                    row, column = divmod(places[i - BEST, e], columns)
                    crops[slot] = images[
                        i - BEST,
                        row * height : (row + 1) * height,
                        column * width : (column + 1) * width,
                    ]
            self.best[e], self.best_patches[e] = found[order], crops
            for kept, new in (
                (self.best_images[e], numbers),
                (self.best_labels[e], labels),
            ):
                of_image = np.concatenate([kept, new])[order]
                kept[:] = np.where(self.best[e] > 0, of_image, -1)

    def add_examples(self, decisions, served):
        """Keeps the maps of example images, and where they are `served`."""
        self.examples.append((decisions, served))

    def result(self):
        """The `LayerInspection`."""
        patch_count = self.num_images * self.num_patches
        totals = self.first
        maps = self._maps()
        classes = weights = None
        if self.classes is not None:
            classes = self.classes
            with np.errstate(invalid="ignore"):
                weights = self.weights / self.class_images[:, None]
        return LayerInspection(
            name=self.layer.name,
            router=type(self.layer.router).__name__,
            grid=self.grid,
            num_images=self.num_images,
            load=totals / max(1, totals.sum()),
            load_of_all_choices=self.all / max(1, self.all.sum()),
            served_share=self.num_served / patch_count,
            entropy=self.entropy / patch_count,
            experts_per_image=self.per_image[0],
            experts_per_image_of_all_choices=self.per_image[1],
            similarity=patches.similarity_of(self.shared, totals),
            class_counts=classes,
            class_weight=weights,
            patches_cdf=patches.cdf_of(self.by_count),
            spatial_share=(self.places / self.num_images).reshape(
                -1, *self.grid
            ),
            extra_tokens=self.extra,
            best_gates=self.best,
            best_images=self.best_images,
            best_labels=None if classes is None else self.best_labels,
            best_patches=self.best_patches,
            **maps,
        )

    def _maps(self):
        """The maps of the example images."""
        kept = slice(-self.num_patches, None)

        def joined(found):
            found = np.concatenate([x[:, kept] for x in found])
            return found.reshape(-1, *self.grid)

        decisions = [x for x, _ in self.examples]
        taken = None
        if decisions[0].taken is not None:
            taken = np.concatenate([x.taken[:, kept] for x in decisions])
            taken = np.moveaxis(taken, -1, 1)
            taken = taken.reshape(*taken.shape[:2], *self.grid)
        return {
            "taken": taken,
            "examples": joined([x.top[..., 0] for x in decisions]),
            "priority": joined([x.gates.max(axis=-1) for x in decisions]),
            "served": {
                key: joined([served[key] for _, served in self.examples])
                for key in self.examples[0][1]
            },
        }
