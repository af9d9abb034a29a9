"""Requests to an exported folder, most of them wrong.

    python -m tests.export.small FOLDER
    python tests/export/run_hostile.py FOLDER/3 [COUNT]

Runs without Keras and prints what came of them as JSON. A right request in
between must get the answer of the first one, to the last bit, and an image the
same with any batch mates. `memory` is that of the process in MiB, after a tenth
of the requests and at the end.
"""

import json
import pathlib
import random
import resource
import sys
import zlib

import numpy as np
from c_api import RefusedRequest
from c_api import ServedModel
from replay import read_requests

JPEG = bytes.fromhex("ffd8ffe000104a46494600010100000100010000")
PNG = b"\x89PNG\r\n\x1a\n"


def wrong_request(draw, jpeg):
    """A signature, and inputs that nobody should send."""
    numbers = np.random.default_rng(draw.getrandbits(32))
    if draw.random() < 0.4:
        content = wrong_bytes(draw, jpeg)
        return draw.choice(["serve_jpeg", "fast_jpeg"]), content
    name = draw.choice(["serving_default", "serve_images", "fast", "features"])
    kind = "uint8" if name == "serve_images" else "float32"
    shape = draw.choice(
        [
            (), (0,), (3,), (16, 16, 3), (2, 16, 16), (2, 16, 16, 1),
            (2, 17, 16, 3), (1, 2, 16, 16, 3), (1, 1, 1, 1), (0, 16, 16, 3),
            (2, 16, 16, 3), (5000, 16, 16, 3), (2, 0, 16, 3),
        ]
    )  # fmt: skip
    kinds = [kind, kind, kind, "float64", "int32", "int64", "bool"]
    kind = draw.choice(kinds)
    images = (255 * numbers.normal(size=shape)).astype(kind)
    if kind == "float32" and images.size and draw.random() < 0.5:
        images = np.full_like(images, draw.choice([np.nan, np.inf, 3e38]))
    return name, {"images": images}


def broken(draw, jpeg):
    """A JPEG with some of its bytes changed, or cut short."""
    content = bytearray(jpeg)
    for _ in range(draw.randrange(1, 20)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content[: draw.choice([len(content), len(content) // 2])])


def claims_to_be_huge(jpeg):
    """A JPEG of a few bytes whose head says 65,535 x 65,535 pixels."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + b"\xff" * 4 + jpeg[start + 4 :]


def png(width, height, before=b""):
    """A PNG of black pixels, perhaps with a chunk before its head."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        length = len(content).to_bytes(4, "big")
        return length + kind + content + check.to_bytes(4, "big")

    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    head = chunk(b"IHDR", sides + bytes([8, 0, 0, 0, 0]))
    pixels = zlib.compress(bytes((width + 1) * height))
    before = chunk(b"abCd", before) if before else b""
    return PNG + before + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# Too many pixels, behind a chunk that claims few; two sides whose product has
# more bits than a number; and a JPEG that is gone over again and again.
BOMBS = [
    png(9000, 9000, before=(8).to_bytes(4, "big") * 2),
    PNG + b"\0\0\0\rIHDR" + b"\xff" * 8 + bytes(20),
    JPEG + b"\xff\xda\0\0" * 500,
]


def wrong_bytes(draw, jpeg):
    """Files that are none, in a list or in no list."""
    files = [
        b"", b"\x00", b"a" * 100_000, JPEG, JPEG + draw.randbytes(300),
        JPEG[:3], PNG, PNG + draw.randbytes(50),
        PNG + bytes(8) + b"\xff" * 8 + bytes(20), b"GIF89a" + bytes(50),
        b"BM" + draw.randbytes(60), draw.randbytes(2000),
        claims_to_be_huge(jpeg), *(broken(draw, jpeg) for _ in range(9)),
    ]  # fmt: skip
    content = [draw.choice(files) for _ in range(draw.randrange(5))]
    if draw.random() < 0.2:
        content = np.array([content] if content else b"", object)
    return {"image_bytes": content}


def memory():
    """MiB that the process holds."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def main(folder, count=1000):
    """Asks, and counts."""
    served, draw = ServedModel(folder), random.Random(0)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    images = images.astype("float32")
    first = served("serving_default", images=images)
    (jpeg, *_) = next(
        inputs["image_bytes"]
        for name, inputs in read_requests(folder)
        if name == "serve_jpeg"
    )
    for name in ("serve_jpeg", "fast_jpeg"):
        answer = served(name, image_bytes=[*BOMBS, jpeg])
        assert (answer["class_id"][:-1] == -1).all()
        assert answer["class_id"][-1] >= 0
    counts = {
        "requests": 0, "right": 0, "alone": 0, "answered": 0, "refused": 0,
    }  # fmt: skip
    before = 0
    for i in range(int(count)):
        counts["requests"] += 1
        if i == int(count) // 10:
            before = memory()
        if i % 4 == 0:
            answer = served("serving_default", images=images)
            counts["right"] += all(
                np.array_equal(answer[name], first[name]) for name in first
            )
            continue
        if i % 4 == 1:
            others = images * draw.choice([np.nan, -1, 1e30])
            others[2] = images[2]
            answer = served("serving_default", images=others)
            counts["alone"] += all(
                np.array_equal(answer[name][2], first[name][2])
                for name in first
            )
            continue
        name, inputs = wrong_request(draw, jpeg)
        try:
            served(name, **inputs)
            counts["answered"] += 1
        except RefusedRequest:
            counts["refused"] += 1
    print(json.dumps({**counts, "memory": [before, memory()]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
