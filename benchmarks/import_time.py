"""What `import keras_vmoe` costs on top of `import keras`.

    KERAS_BACKEND=jax python benchmarks/import_time.py

Each import runs in a process of its own, the two in turn.
"""

import argparse
import pathlib
import subprocess
import sys

import interleaved

RESULTS = pathlib.Path(__file__).parent / "results" / "import_time.csv"


def importing(module):
    """A function that imports a module in a new process."""
    command = [sys.executable, "-c", f"import {module}"]
    return lambda: subprocess.run(command, check=True).returncode


def main():
    """Measures, prints a table and, with `--save`, updates the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    candidates = {name: importing(name) for name in ("keras", "keras_vmoe")}
    seconds = interleaved.measure(candidates, args.rounds)
    table = interleaved.rows(seconds, "keras", **{"pass": "import"})
    interleaved.print_table(table)
    if args.save:
        columns = {**interleaved.versions(), "setting": vars(args)}
        interleaved.write(RESULTS, [{**columns, **row} for row in table])


if __name__ == "__main__":
    main()
