"""Files of a run, written so that each is always whole."""

import csv
import io


def write_csv(path, rows):
    """Writes rows as CSV, atomically.

    Args:
        path: `pathlib.Path` to write.
        rows: List of dicts; the columns are all their keys, in order.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def write_file(path, text):
    """Writes a text file, atomically.

    Args:
        path: `pathlib.Path` to write.
        text: String.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, newline="")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
