"""metrics.functional against worked-out values and scikit-learn."""

import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given
from hypothesis import strategies as st

from puretrain.lightning.metrics import functional as F

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def t(text):
    return torch.tensor([int(digit) for digit in text])


def near(actual, expected, tolerance=1e-4):
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(np.array(expected), dtype=torch.float64)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


# ── Values worked out by hand ─────────────────────────────────────────────────────────────────────

BINARY = t("00110111"), t("00001111")  # predicted, true
THREE = t("000011112"), t("000111222")


def test_accuracy():
    assert F.accuracy(torch.tensor([0, 2, 1, 3]), torch.tensor([0, 1, 2, 3])) == 0.5


def test_binary_confusion_matrix():
    near(F.confusion_matrix(*BINARY, num_classes=2), [[2, 2], [1, 3]])


def test_three_class_confusion_matrix():
    near(F.confusion_matrix(*THREE, num_classes=3), [[3, 0, 0], [1, 2, 0], [0, 2, 1]])
    by_row = F.confusion_matrix(*THREE, num_classes=3, normalize="true")
    near(by_row, [[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 2 / 3, 1 / 3]])
    near(F.confusion_matrix(*THREE, 3, "all").sum(), 1.0)


@pytest.mark.parametrize("name", ["average", "class_reduction"])
@pytest.mark.parametrize(
    ("metric", "data", "classes", "reduction", "expected"),
    [
        (F.precision, BINARY, 2, "none", [0.6667, 0.6000]),
        (F.recall, BINARY, 2, "none", [0.5, 0.75]),
        (F.f1, BINARY, 2, "none", [0.5714, 0.6667]),
        (F.precision, THREE, 3, "none", [0.75, 0.5, 1]),
        (F.precision, THREE, 3, "macro", 0.75),
        (F.precision, THREE, 3, "micro", 0.6667),
        (F.recall, THREE, 3, "none", [1, 0.6667, 0.3333]),
        (F.recall, THREE, 3, "macro", 0.6667),
        (F.recall, THREE, 3, "micro", 0.6667),
        (F.f1, THREE, 3, "none", [0.8571, 0.5714, 0.5]),
        (F.f1, THREE, 3, "macro", 0.6429),
        (F.f1, THREE, 3, "micro", 0.6667),
    ],
)
def test_averages(metric, data, classes, reduction, expected, name):
    near(metric(*data, num_classes=classes, **{name: reduction}), expected)


def test_the_older_order_of_arguments():
    near(F.precision(*THREE, 3, "macro"), 0.75)
    near(F.recall(*THREE, 3), 0.6667)
    near(F.f1_score(*THREE, 3, "macro"), 0.6429)
    near(F.fbeta_score(*THREE, 1.0, 3, "none"), [0.8571, 0.5714, 0.5])


def test_precision_and_recall_as_a_pair():
    pair = F.precision_recall(*BINARY, num_classes=2, class_reduction="none")
    assert isinstance(pair, tuple)
    near(pair[0], [0.6667, 0.6])
    near(pair[1], [0.5, 0.75])


def test_errors_of_ten_numbers():
    x = torch.arange(10.0)
    assert F.mean_absolute_error(x, x + 2) == 2
    assert F.mean_squared_error(x, x + 2) == 4
    assert F.mean_absolute_error(torch.arange(10), torch.arange(10) + 2) == 2


def test_iou_and_dice_of_squares():
    target = torch.zeros(4, 4, dtype=torch.long)
    target[:2] = 1
    predicted = torch.zeros(4, 4, dtype=torch.long)
    predicted[1:3] = 1
    near(F.iou(predicted, target, reduction="none"), [4 / 12, 4 / 12])
    near(F.iou(predicted, target, num_classes=3, absent_score=-1.0, reduction="sum"), 2 / 3 - 1)
    near(F.iou(predicted, target, ignore_index=0, reduction="none"), [4 / 12])
    scores = torch.stack([1.0 - predicted, predicted.float()], dim=1)  # rows are samples
    near(F.dice_score(scores, target), 2 * 4 / 16)
    near(F.dice_score(scores, target, bg=True, reduction="none"), [0.5, 0.5])


def test_stat_scores():
    predicted, target = torch.tensor([1, 0, 2, 1]), torch.tensor([1, 1, 2, 0])
    by_class = F.stat_scores(predicted, target, reduce="macro", num_classes=3)
    assert by_class.tolist() == [[0, 1, 2, 1, 1], [1, 1, 1, 1, 2], [1, 0, 3, 0, 1]]
    assert F.stat_scores(predicted, target, reduce="micro").tolist() == [2, 2, 6, 2, 4]
    older = F.stat_scores(predicted, target, class_index=1)
    assert [int(value) for value in older] == [1, 1, 1, 1, 2]
    columns = F.stat_scores_multiple_classes(predicted, target, num_classes=3)
    assert torch.stack(columns, dim=1).long().tolist() == by_class.tolist()


def test_an_ignored_class():
    scores = F.precision(*THREE, average="none", num_classes=3, ignore_index=0)
    near(scores, [float("nan"), 0.5, 1.0])
    near(F.precision(*THREE, average="macro", num_classes=3, ignore_index=0), 0.75)


def test_top_k_accuracy():
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3]])
    target = torch.tensor([0, 1, 2])
    assert F.accuracy(scores, target) == 0
    near(F.accuracy(scores, target, top_k=2), 2 / 3)


def test_accuracy_of_several_labels():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7]])
    target = torch.tensor([[1, 0], [1, 0]])
    assert F.accuracy(scores, target) == 0.75
    assert F.accuracy(scores, target, subset_accuracy=True) == 0.5
    assert F.hamming_distance(scores, target) == 0.25


def test_logits_of_classes_are_accepted():
    logits = torch.tensor([[4.0, -3.0], [-2.0, 5.0]])
    assert F.accuracy(logits, torch.tensor([0, 0])) == 0.5


def test_image_gradients():
    image = torch.arange(25.0).reshape(1, 1, 5, 5)
    rows, columns = F.image_gradients(image)
    assert (rows[..., :4, :] == 5).all()
    assert (rows[..., 4, :] == 0).all()
    assert (columns[..., :4] == 1).all()
    assert (columns[..., 4] == 0).all()
    with pytest.raises(RuntimeError, match="4D tensor but got 2D"):
        F.image_gradients(image[0, 0])


def test_psnr():
    predicted = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    target = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
    near(F.psnr(predicted, target), 10 * np.log10(9 / 5))
    near(F.psnr(predicted, target, data_range=4.0), 10 * np.log10(16 / 5))
    near(F.psnr(predicted, target, 3.0, dim=1, reduction="none"), [10 * np.log10(9 / 5)] * 2)
    with pytest.raises(ValueError, match="data_range"):
        F.psnr(predicted, target, dim=1)


def test_ssim_of_each_window():
    """Against the formula, window by window in numpy."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(1, 1, 12, 12, generator=generator, dtype=torch.float64)
    second = torch.rand(1, 1, 12, 12, generator=generator, dtype=torch.float64)
    axis = np.arange(5) - 2
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 2 / 1.5**2)
    window /= window.sum()
    a, b = first[0, 0].numpy(), second[0, 0].numpy()
    values = []
    for i in range(8):
        for j in range(8):
            x, y = a[i : i + 5, j : j + 5], b[i : i + 5, j : j + 5]
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * x * x).sum() - mean_x**2, (window * y * y).sum() - mean_y**2
            cov = (window * x * y).sum() - mean_x * mean_y
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_x * mean_y + c1)
                * (2 * cov + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
            )
    result = F.ssim(first, second, kernel_size=(5, 5), data_range=1.0)
    near(result, np.mean(values), 1e-9)


def test_bleu():
    translation = [list("abcdae")]
    references = [[list("fcgbdae"), list("gbcdae")]]
    # of 6 words 5 are in a reference, of 5 pairs 4, and so on; a reference is as long
    near(F.bleu_score(translation, references), (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert F.bleu_score([["a"]], [[["b"]]]) == 0


def test_embedding_similarity():
    batch = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    angle = 0.5**0.5
    near(F.embedding_similarity(batch), [[0, angle, 0], [angle, 0, angle], [0, angle, 0]])
    dots = F.embedding_similarity(batch, "dot", "sum", zero_diagonal=False)
    near(dots, [9 + 3, 3 + 2 + 2, 2 + 4])


def test_mean_relative_error():
    near(F.mean_relative_error(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])), 1.75)


# ── Against scikit-learn ──────────────────────────────────────────────────────────────────────────

LABELS = st.integers(2, 5).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(
            st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)),
            min_size=1,
            max_size=30,
        ),
    )
)
AVERAGES = st.sampled_from(["micro", "macro", "weighted", "none"])


@given(LABELS, AVERAGES)
def test_classes_against_scikit_learn(labels, average):
    classes, pairs = labels
    predicted, target = (torch.tensor(column) for column in zip(*pairs, strict=True))
    known = {
        "labels": range(classes),
        "average": None if average == "none" else average,
        "zero_division": 0,
    }
    ours = {"num_classes": classes, "average": average}
    near(F.precision(predicted, target, **ours), sk.precision_score(target, predicted, **known))
    near(F.recall(predicted, target, **ours), sk.recall_score(target, predicted, **known))
    near(F.f1(predicted, target, **ours), sk.f1_score(target, predicted, **known))
    near(
        F.fbeta(predicted, target, beta=2.0, **ours),
        sk.fbeta_score(target, predicted, beta=2.0, **known),
    )
    near(F.accuracy(predicted, target), sk.accuracy_score(target, predicted))
    near(
        F.confusion_matrix(predicted, target, classes),
        sk.confusion_matrix(target, predicted, labels=range(classes)),
    )
    near(
        F.iou(predicted, target, num_classes=classes, reduction="none"),
        sk.jaccard_score(target, predicted, labels=range(classes), average=None, zero_division=0),
    )


SCORES = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 1)), min_size=2, max_size=30).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


@given(SCORES)
def test_curves_against_scikit_learn(pairs):
    scores = torch.tensor([score / 10 for score, _ in pairs])
    target = torch.tensor([label for _, label in pairs])
    false, true, thresholds = F.roc(scores, target, pos_label=1)
    expected = sk.roc_curve(target, scores, drop_intermediate=False)
    near(false, expected[0])
    near(true, expected[1])
    near(thresholds[1:], expected[2][1:])
    near(F.auroc(scores, target, pos_label=1), sk.roc_auc_score(target, scores))
    near(
        F.auroc(scores, target, pos_label=1, max_fpr=0.4),
        sk.roc_auc_score(target, scores, max_fpr=0.4),
    )
    near(F.average_precision(scores, target), sk.average_precision_score(target, scores))
    precision, recall, thresholds = F.precision_recall_curve(scores, target)
    expected = sk.precision_recall_curve(target, scores)
    # scikit-learn also has the thresholds below the first that finds everything
    near(precision, expected[0][-len(precision) :])
    near(recall, expected[1][-len(recall) :])
    near(thresholds, expected[2][-len(thresholds) :])
    assert recall[0] == 1


@given(st.integers(0, 10_000), st.sampled_from(["macro", "weighted"]))
def test_auroc_of_several_classes_against_scikit_learn(seed, average):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(20, 3, generator=generator).softmax(dim=1)
    target = torch.cat([torch.arange(3), torch.randint(3, (17,), generator=generator)])
    expected = sk.roc_auc_score(target, scores, multi_class="ovr", average=average)
    near(F.auroc(scores, target, num_classes=3, average=average), expected)
    labels = torch.nn.functional.one_hot(target, 3)
    near(F.auroc(scores, labels, average=average), expected)
    near(
        F.auroc(scores, labels, average="micro"),
        sk.roc_auc_score(labels, scores, average="micro"),
    )


@given(st.integers(0, 10_000), st.sampled_from(["raw_values", "uniform_average"]))
def test_numbers_against_scikit_learn(seed, multioutput):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(8, 2, generator=generator) + 100  # far from 0, where sums cancel
    predicted = target + 0.3 * torch.rand(8, 2, generator=generator)
    near(F.mean_squared_error(predicted, target), sk.mean_squared_error(target, predicted))
    near(F.mean_absolute_error(predicted, target), sk.mean_absolute_error(target, predicted))
    near(
        F.mean_squared_log_error(predicted, target),
        sk.mean_squared_log_error(target, predicted),
    )
    near(
        F.explained_variance(predicted, target, multioutput),
        sk.explained_variance_score(target, predicted, multioutput=multioutput),
    )
    near(
        F.r2score(predicted, target, multioutput=multioutput),
        sk.r2_score(target, predicted, multioutput=multioutput),
    )


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=2, max_size=10))
def test_auc_against_scikit_learn(points):
    x, y = (torch.tensor(column) for column in zip(*points, strict=True))
    order = torch.argsort(x, stable=True)
    expected = sk.auc(x[order], y[order])
    near(F.auc(x, y, reorder=True), expected)
    near(F.auc(x[order].flip(0), y[order].flip(0)), expected)


# ── What is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.auc(t("0213"), t("0000")), "neither increasing or decreasing"),
        (lambda: F.accuracy(torch.tensor([1.5, 0.1]), t("01")), "should be probabilities"),
        (lambda: F.accuracy(torch.tensor([0.5, 0.1]), torch.tensor([0.0, 1.0])), "integer tensor"),
        (lambda: F.accuracy(t("01"), t("011")), "same first dimension"),
        (lambda: F.precision(t("01"), t("01"), average="median"), "`average` has to be one of"),
        (lambda: F.precision(t("01"), t("05"), num_classes=2), "highest label"),
        (lambda: F.auroc(torch.rand(3, 2).softmax(1), t("010")), "did not provide `num_classes`"),
        (lambda: F.roc(torch.rand(3), t("111"), pos_label=1), "No negative samples"),
        (lambda: F.r2score(torch.ones(1), torch.ones(1)), "two samples"),
        (lambda: F.explained_variance(t("01"), t("01"), "mode"), "multioutput"),
        (lambda: F.precision(t("0011").reshape(2, 2), t("0110").reshape(2, 2)), "mdmc_reduce"),
    ],
)
def test_wrong_use(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_row_without_samples_is_zero_and_warned_of():
    with pytest.warns(UserWarning, match="nan values found in confusion matrix"):
        matrix = F.confusion_matrix(t("00"), t("00"), num_classes=2, normalize="true")
    near(matrix, [[1, 0], [0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.confusion_matrix(t("01"), t("01"), num_classes=2, normalize="true")
