"""What the commands around a trained model take."""

from typing import Literal

from keras_vmoe.cli.options import add_backend
from keras_vmoe.cli.options import add_classes
from keras_vmoe.data.preprocessing import MAX_PIXELS
from keras_vmoe.export.settings import MAX_BATCH_SIZE

EXPORT_EPILOG = """A signature is NAME:SETTING=VALUE,SETTING=VALUE with the
settings input (float, uint8 or encoded), features, capacity_factor,
num_selected_experts, batch_priority and images_per_group, or NAME: alone.

examples:
  keras-vmoe export runs/digits served/digits
  keras-vmoe export runs/digits served/digits --version 2 --signatures \\
    fast:capacity_factor=0.5,batch_priority=true \\
    accurate:num_selected_experts=3,input=encoded
  keras-vmoe export model.keras served/mine --mean='[123.675,116.28,103.53]' \\
    --std='[58.395,57.12,57.375]' --test_crop 0.875
  keras-vmoe export runs/digits digits.onnx --format onnx \\
    --capacity_factor 0.5 --batch_priority true
"""
CONVERT_EPILOG = """examples:
  keras-vmoe convert checkpoints/vmoe_b16_imagenet21k vmoe_b16.keras
  keras-vmoe convert ViT-B_16.npz vit_b16.keras --image_size 384
"""
PRESETS_EPILOG = """examples:
  keras-vmoe presets
  keras-vmoe presets convnext_t
"""


def presets_parser(jsonargparse):
    """What `presets` takes."""
    parser = jsonargparse.ArgumentParser(
        usage="keras-vmoe presets [match]",
        description="Prints the models of the papers, their sizes and costs.",
        epilog=PRESETS_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "match", type=str, nargs="?", default="", help="Part of the names."
    )
    return parser


def export_parser(jsonargparse):
    """What `export` takes."""
    parser = jsonargparse.ArgumentParser(
        usage="keras-vmoe export model output [options]",
        description="Writes a SavedModel for TF Serving into the folder "
        "OUTPUT/VERSION, or an ONNX or LiteRT file.",
        epilog=EXPORT_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=str, help="Run folder or .keras file.")
    parser.add_argument(
        "output", type=str, help="Folder of the versions, or the file to write."
    )
    parser.add_argument(
        "--format",
        type=Literal["saved_model", "onnx", "litert"],
        default="saved_model",
        help="What to write.",
    )
    _add_dials(parser)
    _add_serving(parser)
    add_classes(parser)
    add_backend(parser)
    return parser


def _add_dials(parser):
    """How the experts are used, in every format."""
    parser.add_argument(
        "--images_per_group",
        type=int | Literal["batch"],
        default=1,
        help="Images that are routed together; 1 makes answers independent.",
    )
    parser.add_argument(
        "--capacity_factor",
        type=float | Literal["dropless"] | None,
        default=None,
        help="Room of the experts; default: that of the model.",
    )
    parser.add_argument(
        "--num_selected_experts",
        type=int | None,
        default=None,
        help="K of an ONNX or LiteRT file; default: that of the model.",
    )
    parser.add_argument(
        "--batch_priority",
        type=bool | None,
        default=None,
        help="Whether confident tokens are served first, in an ONNX or LiteRT "
        "file; default: as in the model.",
    )
    parser.add_argument(
        "--quantize_experts",
        type=Literal["int8", "float16"] | None,
        default=None,
        help="How the experts' kernels are stored.",
    )


def _add_serving(parser):
    """What a SavedModel has alone."""
    parser.add_argument(
        "--version", type=int, default=1, help="Version of a SavedModel."
    )
    parser.add_argument(
        "--signatures",
        nargs="*",
        action="extend",
        default=[],
        help="Further positions of the routing dial, see below.",
    )
    parser.add_argument(
        "--max_batch_size",
        type=int,
        default=MAX_BATCH_SIZE,
        help="Larger requests to a SavedModel are refused.",
    )
    parser.add_argument(
        "--mean",
        type=float | list[float],
        default=127.5,
        help="What pixels of 0 to 255 are less, one number or one for each "
        "channel.",
    )
    parser.add_argument(
        "--std",
        type=float | list[float],
        default=127.5,
        help="And what the rest is divided by.",
    )
    parser.add_argument(
        "--test_crop",
        type=float | None,
        default=None,
        help="Share of the shorter side of files that is kept; default: that "
        "of the run, or all.",
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        help="Files of more pixels are not decoded.",
    )
    parser.add_argument(
        "--warmup",
        type=bool | list[int],
        default=True,
        help="Whether to write warm-up requests, of batches of 1 and 8, or "
        "their batch sizes.",
    )


def convert_parser(jsonargparse):
    """What `convert` takes."""
    parser = jsonargparse.ArgumentParser(
        usage="keras-vmoe convert [options] checkpoint output",
        description="Writes a checkpoint of the V-MoE program, or of the first "
        "ViTs, as a .keras file.",
        epilog=CONVERT_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        type=str,
        help="Prefix of a sharded checkpoint (without .index), folder of an "
        "Orbax checkpoint, or .npz file.",
    )
    parser.add_argument("output", type=str, help="New .keras file.")
    parser.add_argument(
        "--image_size",
        type=int | None,
        default=None,
        help="Side of the images, if not that of the checkpoint; learned "
        "positions are resized.",
    )
    parser.add_argument(
        "--num_selected_experts",
        type=int | None,
        default=None,
        help="K, which no checkpoint holds; null means 2.",
    )
    add_backend(parser)
    return parser
