"""Images and their patches, drawn into a matplotlib axis."""

import numpy as np

DROPPED = (0.85, 0.15, 0.55)  # Visible on dark and bright pictures.


def short(name, most):
    """Shortens a long name to both ends, and disables TeX in it."""
    name = str(name)
    if len(name) > most:
        end = most // 3
        name = f"{name[: most - end - 1]}…{name[-end:]}"
    return name.replace("$", r"\$")


def enlarged(cells, image):
    """Enlarges the cells of a grid to the size of the image."""
    height, width = image.shape[:2]
    rows = np.arange(height) * len(cells) // height
    columns = np.arange(width) * cells.shape[1] // width
    return cells[rows[:, None], columns]


def blended(image, cells):
    """Blends an image with the colors of its patches."""
    gray = image.mean(axis=-1, keepdims=True) / 255
    # Brightened: orange on black would look like another expert's brown.
    return 0.4 * (0.35 + 0.65 * gray) + 0.6 * enlarged(cells, image)


def veiled(image, served):
    """Veils the patches that no expert serves."""
    picture = np.broadcast_to(seen(image) / 255, (*image.shape[:2], 3))
    veil = 0.25 * picture + 0.75 * np.array(DROPPED)
    return np.where(enlarged(served[..., None], image), picture, veil)


def seen(image):
    """Returns the channels of an image that can be shown: three, or one."""
    return image[..., : 3 if image.shape[-1] >= 3 else 1]


def show(axis, image):
    """Shows an image of any number of channels, without axes."""
    image = seen(image)
    gray = image.shape[-1] == 1
    most = 255 if image.dtype == np.uint8 else 1
    image = image[..., 0] if gray else image
    axis.imshow(image, cmap="gray", vmin=0, vmax=most)
    bare(axis)


def bare(axis):
    """Leaves out ticks and frame."""
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
