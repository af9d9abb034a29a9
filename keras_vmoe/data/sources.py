"""Opens prepared datasets from disk, without downloads."""

import os
import pathlib

from keras_vmoe._checks import nearest
from keras_vmoe.data.tensorflow_runtime import import_tfds
from keras_vmoe.data.tensorflow_runtime import tfds


def open_builder(name, data_dir=None):
    """Opens a prepared dataset from its files alone; see `data.load`.

    Returns:
        A `tfds.core.DatasetBuilder`, or an `ImageFolder`.

    Raises:
        ValueError: The dataset is unknown or not prepared.
        OSError: The folder or the dataset in it cannot be read.
    """
    import_tfds()
    from google.protobuf import json_format
    from tensorflow_datasets.core import naming
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core import registered

    from keras_vmoe.data import digits
    from keras_vmoe.data import folders

    if data_dir is not None:
        data_dir = os.path.expanduser(os.fspath(data_dir))
    full_name = name
    if name in (digits.NAME, f"{digits.NAME}:{digits.VERSION}"):
        data_dir = data_dir or digits.cache_dir()
        digits.prepare(data_dir)
        full_name = f"{digits.NAME}:{digits.VERSION}"
    try:
        naming.parse_builder_name_kwargs(name)
    except (TypeError, ValueError, AttributeError):
        raise _not_found(name, data_dir) from None
    is_folder = name == folders.NAME
    what = f"images, {folders.LAYOUT}" if is_folder else "TFDS datasets"
    _check_folder(data_dir, what)
    if is_folder:
        return folders.ImageFolder(data_dir)
    try:
        return read_only_builder.builder_from_files(
            full_name, data_dir=data_dir
        )
    except registered.DatasetNotFoundError:
        raise _not_found(name, data_dir) from None
    except (
        *(AttributeError, LookupError, OSError, TypeError, ValueError),
        json_format.Error,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise _broken(name, data_dir, reason) from error


def _check_folder(data_dir, what):
    if data_dir is None or "://" in data_dir:
        return
    try:
        os.listdir(data_dir)
    except OSError as error:
        raise type(error)(
            f"`data_dir` must be a readable folder of {what}. "
            f"Received: data_dir={data_dir!r} ({error.strerror}). "
            "Check its spelling and permissions."
        ) from error


def broken_files(folder, reason, **received):
    """The error for a dataset whose files are missing or corrupt."""
    received = ", ".join(f"{k}={v!r}" for k, v in received.items())
    return OSError(
        "The files of a dataset must be complete and readable. "
        f"Received: {received} ({reason}). Delete the folder "
        f"{os.fspath(folder)!r} and prepare the dataset again."
    )


def _broken(name, data_dir, reason):
    folder = _dataset_folder(name, data_dir)
    return broken_files(folder, reason, name=name, data_dir=data_dir)


def _not_found(name, data_dir):
    """The error for a name without a readable dataset."""
    folder = pathlib.Path(_dataset_folder(str(name), data_dir))
    for file in folder.rglob("dataset_info.json"):
        # TFDS does not find a dataset without its features.
        if not (file.parent / "features.json").exists():
            return _broken(name, data_dir, "features.json is missing")
    # Without community datasets, whose list is on the network.
    registered = tfds.list_builders(with_community_datasets=False)
    prepared = prepared_datasets(data_dir)
    received = (
        f"Received: name={name!r}, data_dir={data_dir!r}. "
        f"Prepared in {_data_dirs(data_dir)}: {prepared}. "
    )
    base_name = str(name).partition(":")[0].partition("/")[0]
    if base_name in registered:
        return ValueError(
            "The dataset must be prepared before it is loaded. "
            f"{received}Pass its folder as data_dir, or prepare it once with: "
            "import tensorflow_datasets as tfds; "
            f"tfds.builder({name!r}, data_dir={data_dir!r})"
            ".download_and_prepare()"
        )
    known = {"digits", "image_folder", *registered}
    known.update(n.partition(":")[0] for n in prepared)
    return ValueError(
        'The dataset must be "digits" or one known to TFDS. '
        f"{received.strip()}{nearest(base_name, sorted(known))} Prepare a new "
        "one with: tfds.builder(name, data_dir=...).download_and_prepare()"
    )


def prepared_datasets(data_dir):
    """Lists the prepared datasets in a folder, as names that `load` accepts."""
    names = set()
    for root in map(pathlib.Path, _data_dirs(data_dir)):
        for depth in ("*/*", "*/*/*"):
            for file in root.glob(f"{depth}/dataset_info.json"):
                *parts, version = file.parent.relative_to(root).parts
                if not parts[0].startswith(("incomplete.", ".")):
                    names.add(f"{'/'.join(parts)}:{version}")
    return sorted(names)


def _data_dirs(data_dir):
    folders = tfds.core.utils.file_utils.list_data_dirs(data_dir)
    return [os.fspath(folder) for folder in folders]


def _dataset_folder(name, data_dir):
    return os.path.join(_data_dirs(data_dir)[0], name.partition(":")[0])
