"""Few-shot evaluation: a linear classifier on frozen features, closed form.

Axes: M examples, D features (the bias included), H shots, L penalties.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import cast

import numpy as np

from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number
from keras_vmoe._warnings import warn
from keras_vmoe.evaluation.features import checked

L2_REGS = tuple(2.0**n for n in range(-10, 20))
BIAS = 100.0  # A constant feature, penalized like the others.
EPSILON = 1e-5  # Added to the standard deviations.
RULES = ("held_out", "test")
# The data sets of V-MoE's evaluations: a split to draw from, one to test on.
SETS = {
    name: ((dataset, train), (dataset, test))
    for name, dataset, train, test in (
        ("birds", "caltech_birds2011", "train", "test"),
        ("caltech101", "caltech101", "train", "test"),
        ("cars196", "cars196", "train", "test"),
        ("cifar100", "cifar100", "train", "test"),
        (
            "colorectal_histology", "colorectal_histology", "train[:2000]",
            "train[2000:]",
        ),
        ("dtd", "dtd", "train", "test"),
        ("pets", "oxford_iiit_pet", "train", "test"),
        ("uc_merced", "uc_merced", "train[:1000]", "train[1000:]"),
    )
} | {
    "imagenet": (
        ("imagenet2012_subset/10pct", "train"),
        ("imagenet2012", "validation"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Accuracies of a few-shot evaluation.

    Attributes:
        shots: `(H,)` examples per class.
        l2_regs: `(L,)` penalties.
        seeds: Seeds that draw the examples.
        accuracy: `(seeds, H, L)` float64 array: share of the test images that
            are classified correctly.
        held_out_accuracy: The same on training images outside all shots; NaN
            if there are none.
    """

    shots: tuple[int, ...]
    l2_regs: tuple[float, ...]
    seeds: tuple[int, ...]
    accuracy: np.ndarray
    held_out_accuracy: np.ndarray

    @property
    def best_l2(self) -> list[float]:
        """`(H,)` penalties chosen by the reference's rule, `"test"`."""
        return choose_l2([self], "test")

    def accuracy_at(self, l2: float | Sequence[float]) -> np.ndarray:
        """Accuracies at one penalty per shot.

        Args:
            l2: `(H,)` of `l2_regs`, as from `choose_l2`, or one for all shots.

        Returns:
            `(seeds, H)` array.
        """
        penalties = np.broadcast_to(l2, len(self.shots)).tolist()
        wrong = [x for x in penalties if x not in self.l2_regs]
        if wrong:
            raise ValueError(
                "Penalties must be among those that were tried, "
                f"{self.l2_regs}. Received: {wrong}. Pass them to `few_shot` "
                "as `l2_regs`."
            )
        places = [self.l2_regs.index(x) for x in penalties]
        return self.accuracy[:, np.arange(len(self.shots)), places]


def few_shot(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    shots: int | Sequence[int] = (1, 5, 10, 25),
    l2_regs: float | Sequence[float] = L2_REGS,
    seeds: int | Sequence[int] = (0,),
    seed_offset: int = 0,
) -> FewShot:
    """Fits frozen features with a few labeled examples per class.

    Ridge regression from features to +1 for the true class and -1 for the
    others, solved exactly in float64 (in float32, as in the reference program,
    accuracies at small penalties are off by up to 0.7 points). Features are
    standardized with the examples they are fitted to. Examples are drawn as in
    the reference program: fewer shots are a subset of more, and a class with
    too few examples contributes all of them.

    Args:
        train: Pair `(features, labels)` to draw examples from, such as from
            `extract_features`.
        test: Pair `(features, labels)` of the test images.
        shots: Numbers of examples per class, or one.
        l2_regs: Penalties of the squared weights; default: 2^-10 to 2^19.
        seeds: Integers; each draws different examples.
        seed_offset: Integer, the first of the two numbers that seed the draw;
            the other one is from `seeds`.

    Returns:
        A `FewShot`.

    Raises:
        ValueError: If features are not finite, labels are negative or not
            integers, or a class of the test images has no example.

    Example:

    >>> features = np.eye(3, dtype="float32").repeat(4, axis=0)
    >>> data = (features, np.arange(3).repeat(4))
    >>> few_shot(data, data, shots=(1, 2), l2_regs=(1.0,)).accuracy.shape
    (1, 2, 1)

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 3.3.
    """
    shots, seeds = _several(shots), _several(seeds)
    l2_regs = _several(l2_regs)
    check_settings(shots, l2_regs, seeds)
    train, test, num_classes = checked(train, test)
    _warn_of_few(train[1], num_classes, max(shots))
    # Held-out images of each class, to choose a penalty.
    spare = -(-len(test[1]) // num_classes)
    accuracy = np.empty((2, len(seeds), len(shots), len(l2_regs)))
    for i, seed in enumerate(seeds):
        order = _order(train[1], num_classes, seed_offset, seed)
        others = np.concatenate([x[max(shots) :][:spare] for x in order])
        judged = [test, [part[others] for part in train]]
        for j, shot in enumerate(shots):
            drawn = np.concatenate([x[:shot] for x in order])
            examples = [part[drawn] for part in train]
            accuracy[:, i, j] = _accuracies(
                examples, judged, l2_regs, num_classes
            )
    return FewShot(shots, l2_regs, seeds, *accuracy)


def choose_l2(
    results: FewShot | Sequence[FewShot],
    rule: float | Literal["held_out", "test"] = "held_out",
) -> list[float]:
    """Chooses one penalty per shot, for all data sets and seeds together.

    Args:
        results: `FewShot`, or a list with one per data set, all with the same
            shots and penalties.
        rule: `"held_out"`: the penalty whose accuracies on held-out training
            images rank best, on average over data sets and seeds. `"test"`:
            the same on the test images, as the reference program does; the
            choice has then seen the images it is scored on. A number: that
            penalty (big_vision fixes 1024).

    Returns:
        `(H,)` list of penalties.

    Raises:
        ValueError: If the rule is unknown, or no images are held out.

    Example:

    >>> data = (np.eye(2).repeat(3, axis=0), np.arange(2).repeat(3))
    >>> result = few_shot(data, data, shots=(1, 2), l2_regs=(1.0, 2.0))
    >>> choose_l2([result], 2.0)
    [2.0, 2.0]
    """
    results = _several(results)
    check_rule(rule)
    settings = {(x.shots, x.l2_regs) for x in results}
    if len(settings) != 1:
        raise ValueError(
            "Results must have the same shots and penalties, at least one. "
            f"Received: {len(results)} of {len(settings)} kinds. Evaluate all "
            "data sets with the same settings."
        )
    l2_regs = results[0].l2_regs
    if rule not in RULES:
        if rule not in l2_regs:
            raise ValueError(
                "A fixed penalty must be among those that were tried, "
                f"{l2_regs}. Received: rule={rule!r}. Pass it to `few_shot` as "
                "`l2_regs`."
            )
        return [cast(float, rule)] * len(results[0].shots)
    name = "accuracy" if rule == "test" else "held_out_accuracy"
    found = np.concatenate([getattr(x, name) for x in results])
    if np.isnan(found).any():
        raise ValueError(
            "Training images must be left to choose a penalty. Received: "
            "as many shots as a data set has examples. Use fewer shots, a "
            "fixed penalty, or the rule 'test'."
        )
    ranks = found.argsort(axis=-1, kind="stable")
    ranks = ranks.argsort(axis=-1, kind="stable").mean(axis=0)
    return [l2_regs[i] for i in ranks.argmax(axis=-1)]


def check_rule(rule):
    """Raises unless this is a rule that chooses a penalty."""
    if rule not in RULES and not (is_number(rule) and rule > 0):
        raise ValueError(
            f"The penalty must be chosen by one of {RULES}, or be a number "
            f"above 0. Received: {rule!r}."
        )


def l2_regs_for(rule):
    """The penalties to try for a rule: all, or the fixed one."""
    return L2_REGS if rule in RULES else (float(rule),)


def _several(values: Any) -> tuple[Any, ...]:
    """A tuple of one or several values."""
    one = isinstance(values, (int, float, FewShot))
    return (values,) if one else tuple(values)


def _order(labels, num_classes, seed_offset, seed):
    """The examples of each class in the order they are drawn."""
    generator = np.random.default_rng(hash((seed_offset, seed)) % 2**31)
    return [
        generator.permutation(np.flatnonzero(labels == c))
        for c in range(num_classes)
    ]


def _accuracies(examples, judged, l2_regs, num_classes):
    """`(len(judged), L)` accuracies of classifiers fitted to examples."""
    found = np.full((len(judged), len(l2_regs)), np.nan)
    sets = [features for features, _ in judged]
    fitted = _scores(examples, sets, l2_regs, num_classes)
    for i, scores in enumerate(fitted):
        for j, (_, truth) in enumerate(judged):
            if len(truth):
                found[j, i] = (scores[j].argmax(axis=-1) == truth).mean()
    return found


def _scores(examples, sets, l2_regs, num_classes):
    """Scores of sets of features, for each penalty in turn."""
    features, labels = examples
    mean, std = features.mean(axis=0), features.std(axis=0) + EPSILON

    def standardized(x):
        return np.pad((x - mean) / std, [(0, 0), (0, 1)], constant_values=BIAS)

    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    sets = [standardized(x) for x in sets]
    return _ridge(standardized(features), targets, sets, l2_regs)


def _ridge(x, targets, others, l2_regs):
    """Scores of `others` by ridge regression, for each penalty in turn.

    `x (M, D)`, `targets (M, classes)`. The weights minimize the squared error
    plus the penalty times their squares. One eigendecomposition of the smaller
    of the two systems serves all penalties.
    """
    if x.shape[0] >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        targets = vectors.T @ (x.T @ targets)
        others = [other @ vectors for other in others]
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        targets = vectors.T @ targets
        others = [(other @ x.T) @ vectors for other in others]
    for l2 in l2_regs:
        weights = targets / (values + l2)[:, None]
        yield [other @ weights for other in others]


def check_settings(shots, l2_regs, seeds):
    """Raises for invalid shots, penalties or seeds."""
    check_sizes(**{f"shots[{i}]": x for i, x in enumerate(shots)})
    check_sizes(0, **{f"seeds[{i}]": x for i, x in enumerate(seeds)})
    good = all(is_number(x) and x > 0 for x in l2_regs)
    if not good or not shots or not l2_regs or not seeds:
        raise ValueError(
            "There must be at least one shot, one seed and one penalty above "
            f"0. Received: shots={shots}, seeds={seeds}, l2_regs={l2_regs}."
        )


def _warn_of_few(labels, num_classes, most):
    """Warns about classes with fewer examples than shots."""
    counts = np.bincount(labels, minlength=num_classes)
    few = np.flatnonzero((counts < most) & (counts > 0))
    if len(few):
        c = int(few[0])
        warn(
            f"{len(few)} of {num_classes} classes have fewer examples than "
            f"shots: class {c} has {counts[c]} of {most}. All of "
            "them are used."
        )
