"""Checks of arguments: what was expected, what was received, how to fix it."""

import difflib
import math
import numbers


def is_number(value):
    """Whether this is a finite number and not a bool."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and math.isfinite(value)


def is_integer(value):
    """Whether this is an integer of Python or NumPy and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def plain(value):
    """Values of NumPy, alone, in arrays, sequences and dicts, as Python's.

    Keras takes them for some arguments, and no JSON file holds them.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return type(value)(plain(x) for x in value)
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return int(value) if is_integer(value) else value


def check_sizes(least=1, /, **sizes):
    """Raises unless all of these are integers of at least 1, or `least`."""
    for name, size in sizes.items():
        if not is_integer(size) or size < least:
            raise ValueError(
                f"`{name}` must be an integer of at least {least}. "
                f"Received: {name}={size!r}."
            )


def check_seed(seed):
    """Raises unless this is an integer of at least 0, or None."""
    if seed is not None and (not is_integer(seed) or seed < 0):
        raise ValueError(
            "`seed` must be an integer of at least 0, or None. "
            f"Received: seed={seed!r}."
        )


def check_not_negative(**settings):
    """Raises unless all of these are finite numbers of at least 0."""
    for name, value in settings.items():
        if not is_number(value) or value < 0:
            raise ValueError(
                f"`{name}` must be a finite number and not negative. "
                f"Received: {name}={value!r}. 0 turns it off."
            )


def check_positive(**values):
    """Raises unless all of these are finite numbers above 0."""
    for name, value in values.items():
        if not is_number(value) or value <= 0:
            raise ValueError(
                f"`{name}` must be a number above 0. "
                f"Received: {name}={value!r}."
            )


def check_rates(**rates):
    """Raises unless all of these are probabilities below 1."""
    for name, rate in rates.items():
        if not is_number(rate) or not 0 <= rate < 1:
            raise ValueError(
                f"`{name}` must be a number of at least 0 and below 1. "
                f"Received: {name}={rate!r}. 0 turns it off."
            )


def check_dropout(**rates):
    """Raises unless all of these are numbers of 0 to 1."""
    for name, rate in rates.items():
        if not is_number(rate) or not 0 <= rate <= 1:
            raise ValueError(
                f"`{name}` must be a number between 0 and 1. "
                f"Received: {name}={rate!r}. 0 keeps every value."
            )


def check_shares(**shares):
    """Raises unless all of these are numbers in (0, 1], or None."""
    for name, share in shares.items():
        if share is not None and not (is_number(share) and 0 < share <= 1):
            raise ValueError(
                f"`{name}` must be a share in (0, 1] or None. "
                f"Received: {name}={share!r}."
            )


def check_flags(**settings):
    """Raises unless all of these are True or False."""
    for name, value in settings.items():
        if not isinstance(plain(value), bool):
            raise ValueError(
                f"`{name}` must be True or False. Received: {name}={value!r}."
            )


def check_mask(mask, tokens):
    """Raises unless a mask has the shape of the tokens, as far as is known."""
    if mask is None:
        return
    shape, tokens = tuple(mask.shape), tuple(tokens)
    pairs = zip(shape, tokens, strict=False)
    known = ([x for x in pair if isinstance(x, int)] for pair in pairs)
    fits = all(len(set(sizes)) < 2 for sizes in known)
    if len(shape) != len(tokens) or not fits:
        raise ValueError(
            "`mask` must have one value per token. Received: a mask of shape "
            f"{shape} for tokens {tokens}. Give it the shape of the inputs "
            "without the axis of their features, experts or slots."
        )


def check_choice(name, value, choices):
    """Raises unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {list(choices)}. "
            f"Received: {name}={value!r}.{nearest(value, choices)}"
        )


def check_keys(what, given, known):
    """Raises unless all keys of a dict are known.

    Args:
        what: What takes the keys, for the message.
        given: Dict.
        known: Iterable of strings.
    """
    known = list(known)
    for key in given:
        if key not in known:
            raise ValueError(
                f"{what} takes the keys {known}. "
                f"Received: {key}={given[key]!r}.{nearest(key, known)}"
            )


def nearest(name, known):
    """`" Did you mean 'x'?"`, or nothing where no known name is like it.

    The name may be the start of a known one. The dashes of flags do not count.
    """
    words = {str(x).lstrip("-").lower(): str(x) for x in known}
    name = str(name).lstrip("-").lower()
    near = [x for x in words if name and x.startswith(name)]
    near = near or difflib.get_close_matches(name, words, n=1)
    return f" Did you mean {words[near[0]]!r}?" if near else ""


def counted(number, noun):
    """`"1 epoch"`, `"2 epochs"`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
