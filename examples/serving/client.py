"""Asks a running TF Serving for the classes of image files.

    python client.py digits seven.png three.png
    python client.py digits *.jpg --grpc localhost:8500 --signature accurate
    python client.py digits *.jpg --label canary

By REST it needs Python alone; by gRPC `pip install 'keras_vmoe[serving]'`.
"""

import argparse
import base64
import http.client
import json
import pathlib
import urllib.error
import urllib.request


def main(arguments=None):
    """Prints the class of each file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="Name under which it is served.")
    parser.add_argument("images", nargs="+", help="JPEG or PNG files.")
    parser.add_argument(
        "--rest",
        default="http://localhost:8501",
        help="Address of the REST interface.",
    )
    parser.add_argument("--grpc", help="host:port, instead of REST.")
    parser.add_argument(
        "--signature",
        default="serve_jpeg",
        help="One that takes encoded images.",
    )
    parser.add_argument("--label", help="Of a version, such as canary.")
    settings = parser.parse_args(arguments)
    if "://" not in settings.rest:
        settings.rest = f"http://{settings.rest}"
    try:
        files = [pathlib.Path(name).read_bytes() for name in settings.images]
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from error
    ask = by_grpc if settings.grpc else by_rest
    for name, answer in zip(settings.images, ask(settings, files), strict=True):
        print(f"{name}: {answer}")


def by_rest(settings, files):
    """Predictions by the REST interface: the inputs of each image in a row."""
    label = f"/labels/{settings.label}" if settings.label else ""
    body = {
        "signature_name": settings.signature,
        "instances": [
            {"image_bytes": {"b64": base64.b64encode(x).decode()}}
            for x in files
        ],
    }
    request = urllib.request.Request(
        f"{settings.rest}/v1/models/{settings.model}{label}:predict",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            rows = json.load(response)["predictions"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"refused: {error.read().decode()}") from error
    except urllib.error.URLError as error:
        raise SystemExit(f"{settings.rest}: {error.reason}") from error
    except (http.client.HTTPException, json.JSONDecodeError) as error:
        raise SystemExit(f"{settings.rest}: no REST ({error!r})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{settings.signature} names no classes")
    return [
        describe(row["class_id"], row.get("class_name"), row["probabilities"])
        for row in rows
    ]


def by_grpc(settings, files):
    """Predictions by the gRPC interface: tensors."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = settings.model
    request.model_spec.signature_name = settings.signature
    if settings.label:
        request.model_spec.version_label = settings.label
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(files))
    with grpc.insecure_channel(settings.grpc) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            outputs = stub.Predict(request, timeout=30).outputs
        except grpc.RpcError as error:
            raise SystemExit(f"refused: {error.details()}") from error
    values = {name: tf.make_ndarray(x) for name, x in outputs.items()}
    if "class_id" not in values:
        raise SystemExit(f"{settings.signature} names no classes")
    names = values.get("class_name", [b""] * len(files))
    return [
        describe(int(i), name.decode(), probabilities)
        for i, name, probabilities in zip(
            values["class_id"], names, values["probabilities"], strict=True
        )
    ]


def describe(class_id, name, probabilities):
    """One line about one image."""
    if class_id < 0:
        return "cannot be read"
    return f"{name or class_id} {probabilities[class_id]:.3f}"


if __name__ == "__main__":
    main()
