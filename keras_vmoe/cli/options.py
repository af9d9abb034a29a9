"""Options that several commands have."""

from typing import Literal


def add_classes(parser):
    """Adds `--classes`."""
    parser.add_argument(
        "--classes",
        type=str | None,
        default=None,
        help="JSON list of class names; default: that of the run folder.",
    )


def add_config(parser):
    """Adds `--config`."""
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with these settings; what is given beside it counts "
        "more.",
    )


def add_dry_run(parser):
    """Adds `--dry_run`."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Print settings, cost, memory and steps, and do no more.",
    )


def add_backend(parser):
    """Adds `--backend`."""
    parser.add_argument(
        "--backend",
        type=Literal["jax", "tensorflow", "torch"] | None,
        default=None,
        help="Keras backend; null leaves the choice to Keras.",
    )
