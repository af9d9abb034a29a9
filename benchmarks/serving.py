"""Served models: what the dial costs and gives, and latency against dense.

    KERAS_BACKEND=tensorflow python benchmarks/serving.py --run_dir runs/cifar \
        --data_dir DIR --save

Everything is measured on exported folders, in TensorFlow's C API, in one
process on all cores, the candidates in turn.

Table `dial`: a trained run, exported with positions of the routing dial, and
with quantized experts: accuracy on its test split, latency of a batch of 64,
bytes of the weights.

Table `latency`: models of the papers with random weights against their dense
twins, both exported, by batch size. The target is the ratio of their
multiply-adds times 1.15.
"""

import argparse
import functools
import json
import pathlib
import sys
import tempfile

import interleaved
import numpy as np
import yaml

from keras_vmoe import data
from keras_vmoe import export
from keras_vmoe import models

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.export.c_api import ServedModel  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "serving.csv"
ALONE, GROUPED = {"images_per_group": 1}, {"images_per_group": 8}
DIAL = {
    "capacity 0.5, BPR": {"capacity_factor": 0.5, "batch_priority": True},
    "capacity 0.5, vanilla": {"capacity_factor": 0.5, "batch_priority": False},
    "capacity 2": {"capacity_factor": 2.0},
    "K + 1": {"num_selected_experts": 3},
    "K = 1": {"num_selected_experts": 1},
}
PAIRS = {
    "vit_s16_e8_last2": "vit_s16",
    "convnext_t_e8_last2": "convnext_t",
}
SLACK = 1.15


def main():
    """Measures both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run_dir", help="A finished run of keras-vmoe train.")
    parser.add_argument("--data_dir")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    rows = []
    if arguments.run_dir:
        rows += dial(
            pathlib.Path(arguments.run_dir),
            arguments.data_dir,
            arguments.rounds,
        )
    for sparse, dense in PAIRS.items():
        rows += latency(sparse, dense, arguments.batches, arguments.rounds)
    if arguments.save:
        interleaved.write(RESULTS, rows, keys=("table", "model"))


def dial(run_dir, data_dir, rounds):
    """Rows of a trained run under several positions."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    model = models.load(run_dir / "model.keras", compile=False)
    signatures = {"grouped": GROUPED}
    names = {"serving_default": "own dials", "grouped": "own dials"}
    for i, (name, dials) in enumerate(DIAL.items()):
        signatures[f"alone_{i}"] = dials
        signatures[f"grouped_{i}"] = {**dials, **GROUPED}
        names[f"alone_{i}"] = names[f"grouped_{i}"] = name
    test = data.load(
        config["dataset"], config["test_split"], model.input_shape[1], 64,
        training=False, data_dir=data_dir or config["data_dir"],
        test_crop=config["test_crop"],
    )  # fmt: skip
    batches = list(test.as_numpy_iterator())
    candidates = {}
    with tempfile.TemporaryDirectory() as folder:
        path = export.saved_model(model, folder, 1, signatures, warmup=False)
        served = ServedModel(path)
        for name, label in names.items():
            groups = 8 if name.startswith("grouped") else 1
            candidates[label, groups] = (served, name, path)
        for version, kind in ((2, "float16"), (3, "int8")):
            path = export.saved_model(
                model, folder, version, warmup=False, quantize_experts=kind
            )
            candidates[f"experts in {kind}", 1] = (
                ServedModel(path), "serving_default", path,
            )  # fmt: skip
        rows = positions(candidates, batches, rounds)
    name = f"{config['dataset']}, {model.name}"
    return [{**common("dial", name), **row} for row in rows]


def weights_of(folder):
    """Bytes of an export's weights."""
    return sum(x.stat().st_size for x in folder.glob("variables/*"))


def places_of(folder, signature):
    """Places in the experts' buffers of a MoE layer, per image."""
    card = json.loads((folder / "assets.extra/model_card.json").read_text())
    places = {
        x["slots_per_image"] for x in card["signatures"][signature]["routing"]
    }
    (number,) = places  # The layers are alike.
    return number


def positions(candidates, batches, rounds):
    """Accuracy and latency of signatures of folders, in turn."""
    images = batches[0][0]
    calls = {
        str(key): functools.partial(served, name, images=images)
        for key, (served, name, _) in candidates.items()
    }
    seconds = interleaved.measure(calls, rounds)
    baseline = seconds[str(("own dials", 1))]
    rows = []
    for (label, groups), (served, name, folder) in candidates.items():
        values = seconds[str((label, groups))]
        right = sum(
            int((served(name, images=x)["class_id"] == y).sum())
            for x, y in batches
        )
        rows.append(
            {
                "candidate": label,
                "images_per_group": groups,
                "batch": len(images),
                **spread(values, values / baseline),
                "accuracy": round(right / sum(len(y) for _, y in batches), 4),
                "weight_bytes": weights_of(folder),
                "slots_per_image": places_of(folder, name),
                "target": "",
            }
        )
        print(rows[-1], flush=True)
    return rows


def latency(sparse, dense, batches, rounds):
    """Rows of a sparse model against its dense twin."""
    with tempfile.TemporaryDirectory() as folder:
        served, flops = {}, {}
        for version, name in enumerate((dense, sparse), 1):
            model = models.from_preset(name, num_classes=1000)
            flops[name] = models.cost(
                models.set_routing(model, images_per_group=1)
                if name == sparse
                else model
            ).macs
            path = export.saved_model(model, folder, version, warmup=False)
            served[name] = ServedModel(path)
            shape = model.input_shape[1:]
            del model
        rows = []
        for batch in batches:
            images = np.random.default_rng(0).uniform(-1, 1, (batch, *shape))
            images = images.astype("float32")
            seconds = interleaved.measure(
                {
                    name: functools.partial(x, "serving_default", images=images)
                    for name, x in served.items()
                },
                rounds,
            )
            rows.append(
                {
                    **common("latency", sparse),
                    "candidate": f"against {dense}",
                    "images_per_group": 1,
                    "batch": batch,
                    **spread(seconds[sparse], seconds[sparse] / seconds[dense]),
                    "accuracy": "",
                    "weight_bytes": "",
                    "slots_per_image": "",
                    "target": round(SLACK * flops[sparse] / flops[dense], 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def common(table, model):
    """What all rows of a table begin with."""
    return {
        **interleaved.versions("tensorflow"),
        "table": table,
        "model": model,
    }


def spread(seconds, ratio):
    """Median latency, and the ratio within a round with its quartiles."""
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    return {
        "ms": round(1e3 * float(np.median(seconds)), 2),
        "ratio": round(float(middle), 3),
        "ratio_q25": round(float(low), 3),
        "ratio_q75": round(float(high), 3),
    }


if __name__ == "__main__":
    main()
