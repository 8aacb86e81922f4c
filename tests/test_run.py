"""A run as a value: begun, resumed from the newest good checkpoint, kept apart from others."""

import os
from pathlib import Path

import pytest
import torch

import puretrain as pt
from puretrain.checkpoint import find_checkpoint
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import tree_equal


def make(directory, *, steps=6, **changes):
    optimizer = pt.optim.adamw(lr=0.1)
    x = torch.linspace(0, 1, 12).reshape(6, 2)
    run = pt.Run(
        state=pt.TrainState.create({"w": torch.ones(2)}, None, optimizer, key=pt.random.key(0)),
        step=pt.train_step(lambda p, b, x, key: ((x @ p["w"]) ** 2).mean(), optimizer),
        batches=pt.batches(x, 2, shuffle=True),
        steps=steps,
        reducers=[pt.ema(0.5), pt.best_k("loss", 1)],
        observers=[pt.checkpoints(directory, every=2, keep=None)] if directory else [],
        directory=directory,
    )
    return run.replace(**changes)


def test_a_field_that_a_run_does_not_have_is_refused():
    with pytest.raises(ConfigurationError, match=r"has no field epoch, lr; it has state, step, "):
        make(None).replace(lr=0.1, epoch=3)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_fit_is_fit_with_the_fields_as_arguments():
    run = make(None)
    expected = pt.fit(run.state, run.step, run.batches, steps=6, reducers=run.reducers)
    assert tree_equal(run.fit(), expected)
    assert tree_equal(run.replace(steps=None, epochs=2).fit(), expected)
    seen = []
    validation = pt.Validation(lambda state, batch: {"w": state.params["w"][0]}, [torch.ones(1)])
    run.replace(validation=validation, observers=[lambda state, event: seen.append(event)]).fit()
    assert [event.step for event in seen if event.kind == "validation"] == [3, 6]


@pytest.mark.parametrize("how", ["true", "file", "directory", "text"])
def test_a_resumed_run_ends_like_an_undisturbed_one(how, tmp_path):
    whole = make(None).fit()
    make(tmp_path, steps=4).fit()
    resume = {
        "true": True,
        "file": tmp_path / "step_00000004.ckpt",
        "directory": tmp_path,
        "text": str(tmp_path),
    }[how]
    run = make(tmp_path)
    assert int(run.resumed(resume).state.step) == 4
    assert tree_equal(run.fit(resume), whole)
    assert tree_equal(make(tmp_path).fit(resume=True), whole)  # there is nothing left to do


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    whole = make(None).fit()
    make(tmp_path, steps=5).fit()
    damage(tmp_path / "step_00000005.ckpt")
    with pytest.warns(UserWarning, match="damaged.*step_00000005.ckpt"):
        resumed = make(tmp_path).resumed()
    assert int(resumed.state.step) == 4
    with pytest.warns(UserWarning, match="damaged checkpoint is passed over|ckpt.old now"):
        assert tree_equal(make(tmp_path).fit(resume=True), whole)
    assert (tmp_path / "step_00000005.ckpt.old").exists()


def test_resuming_where_nothing_is_begins(tmp_path):
    assert tree_equal(make(tmp_path / "new").fit(resume=True), make(None).fit())


def test_a_path_to_resume_from_must_hold_something(tmp_path):
    run = make(tmp_path / "run")
    with pytest.raises(CheckpointError, match="missing.ckpt"):
        run.fit(tmp_path / "missing.ckpt")
    with pytest.raises(CheckpointError, match="without a good checkpoint"):
        run.fit(tmp_path)
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    with (
        pytest.warns(UserWarning, match="junk"),
        pytest.raises(CheckpointError, match="without a good checkpoint"),
    ):
        run.fit(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    make(tmp_path).fit()
    optimizer = pt.optim.sgd(lr=0.1)
    other = pt.TrainState.create({"v": torch.ones(3)}, None, optimizer, key=pt.random.key(0))
    with pytest.raises(CheckpointError, match="does not fit the template"):
        make(tmp_path, state=other).fit(resume=True)


def test_a_run_does_not_begin_among_the_checkpoints_of_another(tmp_path):
    make(tmp_path, steps=3).fit()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigurationError, match="earlier run.*newest is step_00000003.ckpt"):
        make(tmp_path).fit()
    assert sorted(os.listdir(tmp_path)) == before


def test_resuming_needs_a_directory_or_a_path():
    with pytest.raises(ConfigurationError, match="no directory"):
        make(None).fit(resume=True)


# ── Which checkpoint ──────────────────────────────────────────────────────────────────────────────


def test_the_newest_is_the_one_of_the_largest_step_whatever_its_name(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") == (None, ())
    assert find_checkpoint(tmp_path) == (None, ())
    state = make(None).state
    for name, step in (("a", 9), ("b", 10), ("step_00000100", 2)):
        pt.save(tmp_path / f"{name}.ckpt", state.replace(step=torch.tensor(step)))
    (tmp_path / "c.ckpt.old").write_bytes((tmp_path / "b.ckpt").read_bytes())
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert find_checkpoint(tmp_path) == (tmp_path / "b.ckpt", ())
    assert pt.latest(tmp_path) == tmp_path / "b.ckpt"
    # What the metadata says comes first, and files without a step come last.
    pt.save(tmp_path / "d.ckpt", {"x": torch.ones(1)}, metadata={"step": 11})
    pt.save(tmp_path / "e.ckpt", {"x": torch.ones(1)})
    assert pt.latest(str(tmp_path)) == tmp_path / "d.ckpt"


def test_among_equal_steps_the_latest_file_is_the_newest(tmp_path):
    for name, when in (("a", 2000), ("b", 1000)):
        pt.save(tmp_path / f"{name}.ckpt", {"step": 7})
        os.utime(tmp_path / f"{name}.ckpt", (when, when))
    assert pt.latest(tmp_path) == tmp_path / "a.ckpt"


def test_damaged_ones_are_told_but_not_those_that_need_not_be_read(tmp_path):
    for step in range(1, 6):
        pt.save(tmp_path / f"{step}.ckpt", {"w": torch.ones(9)}, metadata={"step": step})
    for step in (1, 4, 5):  # their indexes are whole
        damage(tmp_path / f"{step}.ckpt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    (tmp_path / "folder.ckpt").mkdir()
    found = find_checkpoint(tmp_path)
    assert found.path == tmp_path / "3.ckpt"
    assert [path.name for path, _ in found.damaged] == [
        "folder.ckpt",
        "junk.ckpt",
        "5.ckpt",
        "4.ckpt",
    ]
    assert all(path.name in str(error) for path, error in found.damaged)
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert pt.latest(tmp_path) == found.path
    assert len(warned) == 4
    for step in (2, 3):
        (tmp_path / f"{step}.ckpt").unlink()
    assert find_checkpoint(tmp_path).path is None


def test_a_directory_that_cant_be_read_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="can't be read"):
        find_checkpoint(file)


# ── Directories ───────────────────────────────────────────────────────────────────────────────────


def test_new_directory_counts_up(tmp_path):
    place = tmp_path / "run"
    assert pt.new_directory(place) == place
    place.mkdir()
    assert pt.new_directory(str(place)) == place  # empty
    (place / "log").write_text("")
    assert pt.new_directory(place) == tmp_path / "run-2"
    (tmp_path / "run-2").write_text("a file")
    assert pt.new_directory(place) == tmp_path / "run-3"
    assert not Path(tmp_path / "run-3").exists()
