import pathlib
import runpy

from setuptools import find_packages
from setuptools import setup

ROOT = pathlib.Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "keras_vmoe" / "version.py"))["__version__"]

# Ranges that install and import together on Python 3.11 (CPU), tested by CI.
TENSORFLOW = "tensorflow>=2.20,<2.21"
EXTRAS = {
    "jax": ["jax>=0.10.2,<0.11"],
    "tensorflow": [TENSORFLOW],
    # One version: a later build of the same series would bring CUDA packages.
    "torch": ["torch==2.13.0"],
    "data": [
        "tensorflow-datasets>=4.9.10,<4.10",
        TENSORFLOW,
        "keras-cv==0.9.0",
        "scikit-learn>=1.6,<2",
        # TFDS needs it to write a dataset and does not say so.
        "importlib_resources>=6",
    ],
    "model-garden": ["tf-models-official>=2.20,<2.21"],
    "checkpoints": [
        "msgpack>=1.1,<2",
        "orbax-checkpoint>=0.12,<0.13",
        "safetensors>=0.5,<1",
    ],
    "plots": ["matplotlib>=3.9,<4", "Jinja2>=3.1,<4"],
    "cli": ["jsonargparse[signatures]>=4.40,<5"],
    "serving": [TENSORFLOW, "tensorflow-serving-api>=2.20,<2.21"],
    "onnx": [TENSORFLOW, "tf2onnx>=1.17,<1.18", "onnxruntime>=1.23,<2"],
    "litert": [TENSORFLOW, "ai-edge-litert>=2.1,<3"],
    # What the MoE layer is measured against; only benchmarks/ needs it.
    "benchmark": [
        "keras-hub>=0.32,<0.33",
        "mixture-of-experts==0.2.3",
        "tf-models-official>=2.20,<2.21",
    ],
    "docs": [
        "mkdocs-material>=9.7,<10",
        "mkdocstrings[python]>=1,<2",
        "nbconvert>=7.16,<8",
    ],
    "test": [
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.14,<0.18",
        "mypy>=2,<3",
        "build>=1.2,<2",
        # Whose weights are read; torchvision is the one for torch above.
        "timm>=1.0.20,<1.1",
        "torchvision==0.28.0",
        # What drives the Chromium of `make test-browser`.
        "playwright>=1.55,<2",
        # What the notebooks of examples/ run in.
        "ipykernel>=6.29,<8",
        "ipython>=8.26,<10",
        "nbclient>=0.10,<1",
    ],
}
EXTRAS["all"] = sorted({need for needs in EXTRAS.values() for need in needs})

setup(
    name="keras_vmoe",
    version=VERSION,
    description="Sparse Mixture-of-Experts for vision, native to Keras 3.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["keras_vmoe", "keras_vmoe.*"]),
    package_data={
        "keras_vmoe": ["py.typed"],
        "keras_vmoe.evaluation": ["*.csv", "*.json"],
        "keras_vmoe.inspection": ["*.html"],
        "keras_vmoe.models": ["*.csv"],
        "keras_vmoe.training.recipes": ["*.yaml"],
    },
    install_requires=["keras>=3.15,<4", "numpy>=1.26"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["keras-vmoe = keras_vmoe.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
