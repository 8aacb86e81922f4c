"""The public names, written down here so that nobody changes one by accident."""

import importlib
import inspect

import pytest

PUBLIC = {
    "puretrain": """
        Aux Cursor EnsembleState Event FrozenDict Interrupted RangeTest Record Reducer Run
        TrainState Validation averaged batches best_k checkpoints command_line compiled
        compose convert csv_log curvature early_stopping ema ensemble ensemble_eval_step
        ensemble_step errors eval_step evaluate explain explanations field fit functional
        journal jsonl_log latest lease load load_into load_part lr_find lr_monitor
        mean_probabilities member metrics nan_guard new_directory open_checkpoint open_run
        optim per_example per_member population predict prepare profiler progress random
        ranking read_index read_slice reduce_on_plateau rematerialize replay save scan
        select_members sharding swa tensorboard train_step tree verify
    """,
    "puretrain.checkpoint": """
        Checkpoint Entry Found Index Piece convert find_checkpoint latest load load_part
        open_checkpoint read_index read_slice save verify
    """,
    "puretrain.compose": """
        distillation ema_teacher fgsm label_smoothing mixup pcgrad pgd sam with_teacher
    """,
    "puretrain.curvature": """
        Eigenpairs Line Plane Trace eigh filter_normalized fisher_diagonal hvp line plane
        random_direction trace
    """,
    "puretrain.data": """
        Batches DataWarning Parts Read batches collate
    """,
    "puretrain.errors": """
        CheckpointError ConfigurationError DataError DonatedStateError JournalError
        LossError NonFiniteError OptimizerError PatternError PuretrainError StructureError
        TransformError
    """,
    "puretrain.explain": """
        ActivationNorms Explanation LeafNorms draw_explanations explain explanations
        read_explanations
    """,
    "puretrain.metrics": """
        Accuracy Confusion Count Max Mean Metric Min Std Sum Variance as_metric compute_all
        functional merge_all merge_trees
    """,
    "puretrain.metrics.functional": """
        Average accuracy confusion_matrix f1 mean_absolute_error mean_squared_error
        precision recall top_k_accuracy
    """,
    "puretrain.observers": """
        checkpoints csv_log jsonl_log profiler progress tensorboard
    """,
    "puretrain.optim": """
        AccumulationState AdadeltaState AdagradState AdamState AdamaxState CountState
        GradientTransformation InjectedState LambState LionState LookaheadState Mask
        MuonState NAdamState Optimizer RMSpropState SGDState Schedule TorchOptimizerState
        adadelta adagrad adam adamax adamw add_decayed_weights apply_every chain
        clip_by_global_norm clip_by_value constant cosine cosine_restarts exponential freeze
        from_torch get_hyperparams global_norm inject_hyperparams join lamb linear lion
        lookahead masked multi_step multi_transform muon nadam one_cycle piecewise
        polynomial radam rmsprop scale schedule_value set_hyperparams sgd step warmup
        warmup_cosine
    """,
    "puretrain.per_example": """
        Influence NoiseScale PoissonSampled Statistics epsilon gradients influence
        noise_multiplier noise_scale norms private products statistics
    """,
    "puretrain.random": """
        fold_in key scope split stream
    """,
    "puretrain.replay": """
        BatchDigest ChangedLeaf Difference Digests EventRecord FactDifference Journal
        Parting Recorded Replayed Segment StepRecord StoredCheckpoint StoredDifference
        batch_digest bisect journal leaf_digests open_run read_journal tensor_digest
        write_report
    """,
    "puretrain.sharding": """
        Placements Zero agreement all_reduce checkpoints ddp device_of distribute divide dp
        elastic eval_across everyone gather latest load local on_rank_zero place processes
        save shard sync_batch_norm table uneven zero
    """,
    "puretrain.tree": """
        FrozenDict LeafDifference Path Record field freeze match_paths path_string tree_cast
        tree_diff tree_digest tree_equal tree_flatten tree_flatten_up_to tree_index
        tree_leaves tree_like tree_map tree_map_with_path tree_paths tree_size tree_stack
        tree_structure tree_to tree_unflatten tree_unstack
    """,
}


def public(module):
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module):
    # whoever changes one means to: name it here and, once it has been released, in the changelog
    assert sorted(public(module)) == sorted(PUBLIC[module].split())


@pytest.mark.parametrize("module", PUBLIC)
def test_each_public_function_and_class_says_what_it_is(module):
    values = public(module).items()
    things = {name: value for name, value in values if inspect.isroutine(value)}
    things |= {name: value for name, value in values if inspect.isclass(value)}
    assert things
    assert [name for name, value in things.items() if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("module", PUBLIC)
def test_how_often_is_given_by_keyword(module):
    # a bare number does not say whether it counts steps, epochs or updates
    for name, value in public(module).items():
        if inspect.isroutine(value):
            for argument in inspect.signature(value).parameters.values():
                if argument.name.startswith("every") or argument.name.endswith("_every"):
                    assert argument.kind is argument.KEYWORD_ONLY, name
