"""Clients of an exported folder: those of TensorFlow, and examples/serving.

The servers of this test answer from the folder, in TensorFlow's C API, with the
messages of TF Serving's two interfaces. TF Serving itself is a program that
is not on the package index.
"""

import base64
import concurrent.futures
import http.server
import json
import pathlib
import re
import runpy
import socketserver
import subprocess
import sys
import threading

import grpc
import keras
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import predict_pb2
from tensorflow_serving.apis import prediction_service_pb2_grpc
from tensorflow_serving.config import model_server_config_pb2

from keras_vmoe.export.settings import STANDARD
from keras_vmoe.export.settings import WARMUP_BATCHES
from tests.export import small
from tests.export.small import SIGNATURES

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "serving"
pytestmark = [pytest.mark.slow, small.IN_TENSORFLOW]


@pytest.fixture
def files(tmp_path):
    """Two images and a file that is none."""
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        image = generator.integers(0, 256, (20, 30, 3))
        keras.utils.save_img(tmp_path / name, image, scale=False)
    (tmp_path / "c.jpg").write_bytes(b"none")
    return [str(tmp_path / name) for name in ("a.png", "b.jpg", "c.jpg")]


def expected(served, files):
    content = [pathlib.Path(name).read_bytes() for name in files]
    answer = served("serve_jpeg", image_bytes=content)
    lines = []
    for i, name in enumerate(files):
        found = answer["class_id"][i]
        text = "cannot be read"
        if found >= 0:
            share = answer["probabilities"][i, found]
            text = f"{small.CLASSES[found]} {share:.3f}"
        lines.append(f"{name}: {text}")
    assert lines[-1].endswith("cannot be read")
    return lines


def client(*arguments):
    runpy.run_path(str(FOLDER / "client.py"))["main"](list(arguments))


def test_by_rest(served, files, capsys):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            assert self.path == "/v1/models/digits/labels/canary:predict"
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            images = [
                base64.b64decode(x["image_bytes"]["b64"])
                for x in body["instances"]
            ]
            answer = served(body["signature_name"], image_bytes=images)
            rows = [
                {
                    "class_id": int(answer["class_id"][i]),
                    "class_name": answer["class_name"][i].decode(),
                    "probabilities": answer["probabilities"][i].tolist(),
                }
                for i in range(len(images))
            ]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"predictions": rows}).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    client("digits", *files, "--rest", url, "--label", "canary")
    assert capsys.readouterr().out.splitlines() == expected(served, files)


def test_by_grpc(served, files, capsys):
    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):  # noqa: N802
            spec = request.model_spec
            assert (spec.name, spec.version_label) == ("digits", "")
            inputs = {k: tf.make_ndarray(x) for k, x in request.inputs.items()}
            response = predict_pb2.PredictResponse()
            for name, value in served(spec.signature_name, **inputs).items():
                proto = tf.make_tensor_proto(value)
                response.outputs[name].CopyFrom(proto)
            return response

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        Service(), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        client("digits", *files, "--grpc", f"127.0.0.1:{port}")
    finally:
        server.stop(None)
    assert capsys.readouterr().out.splitlines() == expected(served, files)


def test_what_goes_wrong_is_one_line(files):
    nobody = "127.0.0.1:1"
    for arguments, words in (
        (["none.png"], "none.png: No such file"),
        ([*files, "--rest", nobody], f"^http://{nobody}: "),
        ([*files, "--grpc", nobody], "^refused: "),
    ):
        with pytest.raises(SystemExit, match=words):
            client("digits", *arguments)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"gRPC", "no REST"),
        (b"HTTP/1.0 200 OK\r\n\r\n<html>", "no REST"),
        (
            b'HTTP/1.0 200 OK\r\n\r\n{"predictions": [[0.5, 1.5]]}',
            "mine names no classes",
        ),
    ],
)
def test_answers_of_something_else(answer, words, files):
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    server = socketserver.TCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    place = f"127.0.0.1:{server.server_address[1]}"
    with pytest.raises(SystemExit, match=words):
        client("digits", *files, "--rest", place, "--signature", "mine")


TENSORFLOW_ALONE = """
import contextlib, sys
import numpy as np
import tensorflow as tf
from tensorflow.python.tools import saved_model_cli

folder, files = sys.argv[1:]
call = tf.saved_model.load(folder).signatures["serving_default"]
with np.load(f"{files}/batches.npz") as batches:
    answers = [call(images=tf.constant(x))["logits"] for x in batches.values()]
np.savez(f"{files}/answers.npz", *answers)
for command in ("show --all", "run --tag_set serve --signature_def "
        f"serving_default --inputs images={files}/images.npy --outdir {files}"):
    sys.argv = ["saved_model_cli", *command.split(), "--dir", folder]
    with contextlib.suppress(SystemExit):
        saved_model_cli.main()
assert "keras_vmoe" not in sys.modules
"""


def test_tensorflow_without_this_package(folder, served, tmp_path):
    """The loader of Python, and saved_model_cli."""
    batches = [small.images(batch) for batch in small.BATCHES]
    np.savez(tmp_path / "batches.npz", *batches)
    np.save(tmp_path / "images.npy", small.images(2))
    done = subprocess.run(
        [sys.executable, "-c", TENSORFLOW_ALONE, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    right = served("serving_default", images=batches[-1])["logits"]
    atol = 1e-5 * np.abs(right).max()
    with np.load(tmp_path / "answers.npz") as answers:
        for batch, given in zip(small.BATCHES, answers.values(), strict=True):
            np.testing.assert_allclose(given, right[:batch], atol=atol)
    for name in (*STANDARD, *SIGNATURES):
        assert f"signature_def['{name}']" in done.stdout
    given = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(given, right[:2], atol=atol)


def test_batches_of_the_server_are_warmed_up():
    config = (FOLDER / "batching_parameters.txt").read_text()
    sizes = re.findall(r"^allowed_batch_sizes: (\d+)$", config, re.MULTILINE)
    assert tuple(map(int, sizes)) == WARMUP_BATCHES
    assert f"\nmax_batch_size {{ value: {sizes[-1]} }}\n" in config


def test_the_configuration_of_models():
    config = text_format.Parse(
        (FOLDER / "models.config").read_text(),
        model_server_config_pb2.ModelServerConfig(),
    )
    (model,) = config.model_config_list.config
    assert dict(model.version_labels) == {"stable": 1, "canary": 2}
    assert list(model.model_version_policy.specific.versions) == [1, 2]
