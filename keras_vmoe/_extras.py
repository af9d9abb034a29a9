"""Optional dependencies, imported where they are used."""

import importlib

# Only where the name on the package index is not the module's name.
_DISTRIBUTIONS = {
    "ai_edge_litert": "ai-edge-litert",
    "keras_cv": "keras-cv",
    "official": "tf-models-official",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow_serving": "tensorflow-serving-api",
    "yaml": "PyYAML",
}


def require(module_name, extra):
    """Imports a module that an extra of this package installs.

    Args:
        module_name: String, such as `"tensorflow_datasets"`.
        extra: String, the extra that installs it, such as `"data"`.

    Returns:
        The module.

    Raises:
        ImportError: The module, or something that it imports, is missing.
            The message holds the pip command that installs the extra.

    Example:

    ```python
    from keras_vmoe._extras import require

    json = require("json", extra="data")
    ```
    """
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        root = module_name.partition(".")[0]
        distribution = _DISTRIBUTIONS.get(root, root)
        raise ImportError(
            f"`keras_vmoe[{extra}]` needs {distribution}, which cannot be "
            f"imported ({error}). "
            f"Received: module_name={module_name!r}. "
            f"Install it with: pip install 'keras_vmoe[{extra}]'"
        ) from error
