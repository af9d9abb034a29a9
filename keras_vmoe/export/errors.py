"""Errors of other libraries, in words of ours."""

import contextlib

LONGEST = 500


@contextlib.contextmanager
def named_errors(name, advice):
    """Errors of a converter or a runtime as one of ours.

    Theirs are of many kinds, which have nothing in common.

    Args:
        name: Name of what raises them.
        advice: Sentence that says how to mend it.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} must be able to run the model. Received: "
            f"{type(error).__name__}: {shortened(error)} {advice}"
        ) from error


def shortened(error):
    """The words of an error; of many, the first and last."""
    words = str(error).strip()
    if len(words) <= LONGEST:
        return words
    half = LONGEST // 2
    return f"{words[:half]} ... {words[-half:]}"
