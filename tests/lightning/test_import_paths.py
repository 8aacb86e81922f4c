"""Every path and name that the interface promises, under each of its roots."""

import importlib
import subprocess
import sys

import pytest

import puretrain.lightning as pl
from puretrain.lightning.utilities.exceptions import MisconfigurationException

NAMES = {
    "": "Trainer LightningModule LightningDataModule Callback seed_everything metrics __version__",
    "accelerators": "Accelerator CPUAccelerator GPUAccelerator TPUAccelerator",
    "callbacks": (
        "Callback EarlyStopping ModelCheckpoint LambdaCallback LearningRateMonitor ProgressBar "
        "ProgressBarBase GradientAccumulationScheduler StochasticWeightAveraging Timer "
        "GPUStatsMonitor BaseFinetuning BackboneFinetuning BasePredictionWriter ModelPruning "
        "ModelSummary RichProgressBar QuantizationAwareTraining"
    ),
    "callbacks.base": "Callback",
    "callbacks.early_stopping": "EarlyStopping",
    "callbacks.model_checkpoint": "ModelCheckpoint",
    "callbacks.lambda_function": "LambdaCallback",
    "callbacks.lr_monitor": "LearningRateMonitor",
    "callbacks.progress": "ProgressBarBase ProgressBar tqdm",
    "callbacks.progress.base": "ProgressBarBase",
    "callbacks.progress.progress_bar": "ProgressBar",
    "callbacks.progress.rich_progress": "RichProgressBar RichProgressBarTheme",
    "callbacks.progress.tqdm_progress": "TQDMProgressBar",
    "callbacks.callback": "Callback",
    "callbacks.checkpoint": "Checkpoint",
    "callbacks.model_summary": "ModelSummary RichModelSummary",
    "callbacks.rich_model_summary": "RichModelSummary",
    "callbacks.device_stats_monitor": "DeviceStatsMonitor",
    "callbacks.timer": "Timer",
    "callbacks.finetuning": "BaseFinetuning BackboneFinetuning",
    "callbacks.stochastic_weight_avg": "StochasticWeightAveraging",
    "callbacks.gradient_accumulation_scheduler": "GradientAccumulationScheduler",
    "callbacks.gpu_stats_monitor": "GPUStatsMonitor",
    "callbacks.prediction_writer": "BasePredictionWriter",
    "callbacks.pruning": "ModelPruning",
    "callbacks.quantization": "QuantizationAwareTraining",
    "core": "LightningModule LightningDataModule",
    "core.lightning": "LightningModule",
    "core.datamodule": "LightningDataModule",
    "core.decorators": "auto_move_data",
    "core.hooks": "ModelHooks DataHooks CheckpointHooks",
    "core.memory": "ModelSummary LayerSummary UNKNOWN_SIZE get_human_readable_count",
    "core.optimizer": "LightningOptimizer",
    "core.saving": (
        "load_hparams_from_yaml save_hparams_to_yaml load_hparams_from_tags_csv "
        "save_hparams_to_tags_csv"
    ),
    "core.step_result": "Result",
    "loggers": (
        "TensorBoardLogger CSVLogger LoggerCollection LightningLoggerBase WandbLogger "
        "MLFlowLogger CometLogger NeptuneLogger"
    ),
    "loggers.base": (
        "LightningLoggerBase DummyLogger DummyExperiment rank_zero_experiment merge_dicts "
        "LoggerCollection"
    ),
    "loggers.tensorboard": "TensorBoardLogger",
    "loggers.csv_logs": "CSVLogger ExperimentWriter",
    "metrics": (
        "Metric MetricCollection Accuracy Precision Recall F1 FBeta ConfusionMatrix IoU AUROC AUC "
        "ROC PrecisionRecallCurve AveragePrecision HammingDistance StatScores MeanAbsoluteError "
        "MeanSquaredError MeanSquaredLogError ExplainedVariance R2Score PSNR SSIM functional"
    ),
    "metrics.functional": (
        "accuracy confusion_matrix precision recall precision_recall f1 fbeta mean_absolute_error "
        "mean_squared_error auc auroc roc average_precision precision_recall_curve stat_scores "
        "to_onehot to_categorical iou dice_score hamming_distance explained_variance "
        "mean_squared_log_error psnr ssim r2score image_gradients embedding_similarity bleu_score"
    ),
    "plugins": "DDPPlugin DDPShardedPlugin DeepSpeedPlugin HorovodPlugin TPUSpawnPlugin",
    "plugins.environments": "ClusterEnvironment LightningEnvironment SLURMEnvironment",
    "profiler": "BaseProfiler SimpleProfiler AdvancedProfiler PyTorchProfiler PassThroughProfiler",
    "trainer": "Trainer",
    "trainer.trainer": "Trainer",
    "trainer.states": "TrainerState RunningStage",
    "trainer.supporters": "CombinedLoader TensorRunningAccum",
    "tuner": "Tuner",
    "tuner.auto_gpu_select": "pick_multiple_gpus pick_single_gpu",
    "tuner.batch_size_scaling": "scale_batch_size",
    "tuner.lr_finder": "lr_find",
    "tuner.tuning": "Tuner",
    "utilities": (
        "AttributeDict is_picklable rank_zero_only rank_zero_warn rank_zero_info "
        "move_data_to_device apply_to_collection flatten_dict AMPType DeviceType DistributedType "
        "_TORCH_GREATER_EQUAL_1_6 _TORCH_GREATER_EQUAL_1_7 _TORCH_GREATER_EQUAL_1_8 "
        "_APEX_AVAILABLE _NATIVE_AMP_AVAILABLE _HOROVOD_AVAILABLE _TPU_AVAILABLE "
        "_OMEGACONF_AVAILABLE _TORCHTEXT_AVAILABLE _module_available"
    ),
    "utilities.apply_func": "move_data_to_device apply_to_collection",
    "utilities.argparse": "add_argparse_args from_argparse_args parse_argparser",
    "utilities.cli": "LightningCLI SaveConfigCallback LightningArgumentParser",
    "utilities.cloud_io": "load get_filesystem atomic_save",
    "utilities.data": "has_len has_iterable_dataset",
    "utilities.distributed": "rank_zero_only rank_zero_info rank_zero_warn",
    "utilities.enums": "DistributedType",
    "utilities.exceptions": "MisconfigurationException",
    "utilities.imports": "_module_available",
    "utilities.memory": "is_oom_error garbage_collection_cuda recursive_detach",
    "utilities.model_helpers": "is_overridden",
    "utilities.model_summary": "ModelSummary",
    "utilities.parsing": "AttributeDict lightning_getattr lightning_hasattr lightning_setattr",
    "utilities.rank_zero": "rank_zero_only rank_zero_info rank_zero_warn",
    "utilities.seed": "seed_everything",
    "utilities.types": "STEP_OUTPUT EPOCH_OUTPUT",
    "utilities.warnings": "WarningCache",
    # later spellings
    "cli": "LightningCLI",
    "core.module": "LightningModule",
    "loggers.logger": "Logger",
    "profilers": "SimpleProfiler Profiler",
    "strategies": "DDPStrategy FSDPStrategy",
}


@pytest.mark.parametrize("path", NAMES, ids=lambda path: path or "root")
def test_names(path):
    module = importlib.import_module(
        ".".join(part for part in ("puretrain.lightning", path) if part)
    )
    missing = [name for name in NAMES[path].split() if not hasattr(module, name)]
    assert not missing


def test_attributes_of_the_root():
    assert (
        pl.callbacks.EarlyStopping
        is importlib.import_module("puretrain.lightning.callbacks.early_stopping").EarlyStopping
    )
    assert pl.utilities.seed.seed_everything is pl.seed_everything
    assert pl.metrics.functional.accuracy
    assert {"Trainer", "callbacks", "metrics"} <= set(dir(pl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pl.nothing


@pytest.mark.parametrize(
    "path",
    [
        "plugins.DeepSpeedPlugin",
        "plugins.HorovodPlugin",
        "plugins.TPUSpawnPlugin",
        "plugins.DDPShardedPlugin",
        "plugins.ApexMixedPrecisionPlugin",
        "plugins.RPCSequentialPlugin",
        "accelerators.TPUAccelerator",
        "strategies.DeepSpeedStrategy",
        "loggers.TestTubeLogger",
    ],
)
def test_what_cannot_work_says_so_on_use(path):
    value = pl
    for part in path.split("."):
        value = getattr(value, part)
    with pytest.raises(MisconfigurationException, match=r"not available in puretrain: .*use "):
        value()


def test_plugins_describe_themselves():
    plugin = pl.plugins.DDPPlugin(find_unused_parameters=False)
    assert plugin.accelerator == "ddp"
    assert plugin.options == {"find_unused_parameters": False}


def test_environments_read_their_variables(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "40")
    monkeypatch.setenv("SLURM_PROCID", "39")
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setenv("SLURM_NODELIST", "node[7-16]")
    slurm = pl.plugins.SLURMEnvironment()
    assert (slurm.world_size(), slurm.global_rank(), slurm.local_rank()) == (40, 39, 3)
    assert slurm.main_address == "node7"
    assert slurm.creates_processes_externally


def test_modules_are_attributes_without_an_import():
    paths = [path for path in NAMES if path]
    code = (
        f"import puretrain.lightning as pl\nfor path in {paths}:\n"
        "    assert eval('pl.' + path).__name__ == 'puretrain.lightning.' + path, path"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_root_loads_little():
    code = "import sys, puretrain.lightning; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "puretrain.lightning.trainer" not in loaded
    assert "tensorboard" not in loaded
