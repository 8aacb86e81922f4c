"""Metrics that gather over batches: equal to their functions of all data at once."""

import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning import metrics as M
from puretrain.lightning.metrics import functional as F

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

GENERATOR = torch.Generator().manual_seed(3)
SCORES = torch.rand(40, 3, generator=GENERATOR).softmax(dim=1)
CLASSES = torch.cat([torch.arange(3), torch.randint(3, (37,), generator=GENERATOR)])
BINARY = torch.rand(40, generator=GENERATOR)
BITS = torch.cat([torch.tensor([0, 1]), torch.randint(2, (38,), generator=GENERATOR)])
NUMBERS = torch.rand(40, 2, generator=GENERATOR) + 1
TRUTH = torch.rand(40, 2, generator=GENERATOR) + 1
IMAGES = torch.rand(40, 1, 12, 12, generator=GENERATOR)

CASES = {
    "accuracy": (M.Accuracy, {}, F.accuracy, {}, SCORES, CLASSES),
    "top2": (M.Accuracy, {"top_k": 2}, F.accuracy, {"top_k": 2}, SCORES, CLASSES),
    "hamming": (M.HammingDistance, {}, F.hamming_distance, {}, BINARY, BITS),
    "precision": (
        M.Precision,
        {"num_classes": 3, "average": "macro"},
        F.precision,
        {"num_classes": 3, "average": "macro"},
        SCORES,
        CLASSES,
    ),
    "recall": (
        M.Recall,
        {"num_classes": 3, "class_reduction": "none"},
        F.recall,
        {"num_classes": 3, "class_reduction": "none"},
        SCORES,
        CLASSES,
    ),
    "samples": (
        M.Recall,
        {"average": "samples"},
        F.recall,
        {"average": "samples"},
        BINARY.reshape(20, 2),
        BITS.reshape(20, 2),
    ),
    "f1": (
        M.F1,
        {"num_classes": 3, "average": "weighted"},
        F.f1,
        {"num_classes": 3, "average": "weighted"},
        SCORES,
        CLASSES,
    ),
    "fbeta": (
        M.FBeta,
        {"num_classes": 3, "beta": 2.0},
        F.fbeta,
        {"num_classes": 3, "beta": 2.0},
        SCORES,
        CLASSES,
    ),
    "stat scores": (
        M.StatScores,
        {"reduce": "macro", "num_classes": 3},
        F.stat_scores,
        {"reduce": "macro", "num_classes": 3},
        SCORES,
        CLASSES,
    ),
    "confusion": (
        M.ConfusionMatrix,
        {"num_classes": 3, "normalize": "true"},
        F.confusion_matrix,
        {"num_classes": 3, "normalize": "true"},
        SCORES,
        CLASSES,
    ),
    "iou": (M.IoU, {"num_classes": 3}, F.iou, {"num_classes": 3}, SCORES, CLASSES),
    "roc": (M.ROC, {"pos_label": 1}, F.roc, {"pos_label": 1}, BINARY, BITS),
    "pr curve": (
        M.PrecisionRecallCurve,
        {"num_classes": 3},
        F.precision_recall_curve,
        {"num_classes": 3},
        SCORES,
        CLASSES,
    ),
    "average precision": (M.AveragePrecision, {}, F.average_precision, {}, BINARY, BITS),
    "auroc": (M.AUROC, {"num_classes": 3}, F.auroc, {"num_classes": 3}, SCORES, CLASSES),
    "partial auroc": (M.AUROC, {"max_fpr": 0.5}, F.auroc, {"max_fpr": 0.5}, BINARY, BITS),
    "auc": (M.AUC, {}, F.auc, {}, BINARY.sort().values, BITS),
    "mae": (M.MeanAbsoluteError, {}, F.mean_absolute_error, {}, NUMBERS, TRUTH),
    "mse": (M.MeanSquaredError, {}, F.mean_squared_error, {}, NUMBERS, TRUTH),
    "msle": (M.MeanSquaredLogError, {}, F.mean_squared_log_error, {}, NUMBERS, TRUTH),
    "explained variance": (
        M.ExplainedVariance,
        {"multioutput": "raw_values"},
        F.explained_variance,
        {"multioutput": "raw_values"},
        NUMBERS,
        TRUTH,
    ),
    "r2": (M.R2Score, {"num_outputs": 2}, F.r2score, {}, NUMBERS, TRUTH),
    "psnr": (M.PSNR, {}, F.psnr, {}, NUMBERS, TRUTH),
    "psnr of rows": (
        M.PSNR,
        {"data_range": 2.0, "dim": 1},
        F.psnr,
        {"data_range": 2.0, "dim": 1},
        NUMBERS,
        TRUTH,
    ),
    "ssim": (M.SSIM, {"data_range": 1.0}, F.ssim, {"data_range": 1.0}, IMAGES, IMAGES.flip(0)),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_give_what_all_data_gives(case):
    cls, options, function, arguments, preds, target = CASES[case]
    metric = cls(**options)
    size = -(-len(preds) // 4)
    for start in range(0, len(preds), size):
        part = slice(start, start + size)
        metric.update(preds[part], target[part])
    expected = function(preds, target, **arguments)
    torch.testing.assert_close(metric.compute(), expected)
    metric.reset()
    torch.testing.assert_close(metric(preds, target), expected)
    again = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(again.compute(), expected)


def test_a_call_gives_the_value_of_the_batch_alone():
    accuracy = pl.metrics.Accuracy()
    assert accuracy(torch.tensor([0, 1]), torch.tensor([0, 1])) == 1
    assert accuracy(torch.tensor([0, 0]), torch.tensor([1, 1])) == 0
    assert accuracy.compute() == 0.5
    assert pl.metrics.Accuracy(compute_on_step=False)(torch.tensor([1]), torch.tensor([1])) is None


class Total(M.Metric):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("seen", default=[], dist_reduce_fx="cat")

    def update(self, x, scale=1.0):
        self.total = self.total + scale * x.sum()
        self.seen.append(x)

    def compute(self):
        return self.total


def test_the_base_class():
    metric = Total()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        metric.compute()
    metric.update(torch.tensor([1.0, 2.0]))
    assert metric.compute() == 3
    metric.update(torch.tensor([4.0]), scale=2.0)
    assert metric.compute() == 11
    assert metric.state_dict() == {}
    metric.persistent(True)
    other = Total()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert other.compute() == 11
    assert metric.to(torch.float64).total.dtype == torch.float64
    metric.reset()
    assert metric.total == 0
    assert metric.seen == []
    with pytest.raises(ValueError, match="any empty list"):
        metric.add_state("more", [1])
    with pytest.raises(ValueError, match="dist_reduce_fx"):
        metric.add_state("more", torch.tensor(0), "median")


def test_two_metrics_stay_two_in_a_module():
    module = nn.ModuleList([M.ROC(), M.ROC()])
    assert len(list(module.modules())) == 3


def test_arithmetic():
    first, second = Total(), Total()
    mean, worst = (first + second) / 2, first > second
    assert mean(torch.tensor([2.0])) == 2
    first.update(torch.tensor([4.0]))
    assert mean.compute() == (6 + 2) / 2
    assert worst.compute()
    assert (10 - first).compute() == 4
    assert abs(-first).compute() == 6


def test_collection():
    named = M.MetricCollection({"mae": M.MeanAbsoluteError(), "f1": M.F1(2)}, prefix="val_")
    x = torch.tensor([0, 1])
    assert named(x, x) == {"val_mae": 0, "val_f1": 1}
    pair = M.MetricCollection([M.MeanAbsoluteError(), M.MeanSquaredError()])
    assert pair(x, x + 2) == {"MeanAbsoluteError": 2, "MeanSquaredError": 4}
    assert pair.clone(prefix="a/").compute() == {
        "a/MeanAbsoluteError": 2,
        "a/MeanSquaredError": 4,
    }
    assert isinstance(pair["MeanSquaredError"], M.MeanSquaredError)
    with pytest.raises(ValueError, match="both named"):
        M.MetricCollection([M.ROC(), M.ROC()])


def _in_a_process(rank, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mine = slice(0, 15) if rank == 0 else slice(15, 40)
    found = {}
    for case in ("accuracy", "f1", "confusion", "auroc", "mae", "psnr", "samples"):
        cls, options, _, _, preds, target = CASES[case]
        metric = cls(**options)
        metric.update(preds[mine], target[mine])
        found[case] = metric.compute()
        own = metric.update, metric.compute  # the state is one's own again
        assert all(callable(method) for method in own)
        found[f"{case} again"] = metric.compute()
    on_step = M.MeanAbsoluteError(dist_sync_on_step=True)
    found["step"] = on_step(NUMBERS[mine], TRUTH[mine])
    results.put((rank, {name: value.tolist() for name, value in found.items()}))
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_all_data_gives(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_in_a_process, args=(rank, tmp_path, results)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    found = dict(results.get() for _ in processes)
    for case in ("accuracy", "f1", "confusion", "auroc", "mae", "psnr", "samples"):
        _, _, function, arguments, preds, target = CASES[case]
        expected = function(preds, target, **arguments)
        for rank in (0, 1):
            torch.testing.assert_close(torch.tensor(found[rank][case]), expected)
            assert found[rank][f"{case} again"] == found[rank][case]
    expected = F.mean_absolute_error(NUMBERS, TRUTH)
    assert found[0]["step"] == pytest.approx(expected.item())


class Logs(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.accuracy = pl.metrics.Accuracy()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.accuracy(self.layer(batch[0]).softmax(-1), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_metric_in_self_log(tmp_path):
    x, y = NUMBERS, (NUMBERS[:, 0] > NUMBERS[:, 1]).long()
    loader = DataLoader(TensorDataset(x, y), batch_size=7)  # the last batch is smaller
    module = Logs()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        logger=False,
        checkpoint_callback=False,
        progress_bar_refresh_rate=0,
        weights_summary=None,
    )
    trainer.fit(module, loader, loader)
    with torch.no_grad():
        expected = F.accuracy(module.layer(x).softmax(-1), y)
    assert trainer.callback_metrics["accuracy"] == expected


class Resumes(Logs):
    def __init__(self):
        super().__init__()
        self.roc = pl.metrics.AUROC(num_classes=2)

    def training_step(self, batch, batch_idx):
        scores = self.layer(batch[0])
        self.accuracy(scores.softmax(-1), batch[1])
        self.roc(scores.softmax(-1), batch[1])
        self.log("train", self.accuracy, on_step=False, on_epoch=True)
        self.log("roc", self.roc, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(scores, batch[1])

    validation_step = None


class Saves(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx):
        trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


@pytest.mark.parametrize("batch", [0, 3, 5])
def test_a_metric_goes_on_after_a_resume(tmp_path, batch):
    x, y = NUMBERS, (NUMBERS[:, 0] > NUMBERS[:, 1]).long()
    loader = DataLoader(TensorDataset(x, y), batch_size=7)

    def fit(**options):
        torch.manual_seed(0)
        module = Resumes()
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=1,
            logger=False,
            checkpoint_callback=False,
            progress_bar_refresh_rate=0,
            weights_summary=None,
            **options,
        )
        trainer.fit(module, loader)
        return {name: trainer.callback_metrics[name].item() for name in ("train", "roc")}

    whole = fit(callbacks=[Saves(tmp_path)])
    assert fit(resume_from_checkpoint=tmp_path / f"{batch}.ckpt") == whole
