"""``python -m puretrain.lightning`` and ``import_as_lightning``."""

import signal
import subprocess
import sys
import textwrap

import forking
import pytest

ROOTS = ["pytorch_lightning", "lightning.pytorch", "lightning"]


def run(*arguments, cwd, check=True):
    process = forking.run(*arguments, cwd=cwd)
    if check:
        assert process.returncode == 0, process.stderr
    return process


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def test_a_program(tmp_path):
    write(
        tmp_path,
        "train.py",
        """\
        import sys
        import torch
        import pytorch_lightning as pl
        from pytorch_lightning.callbacks import EarlyStopping
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

        class Model(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)
            def training_step(self, batch, batch_idx):
                return self.layer(batch).square().mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        if __name__ == "__main__":
            assert Model.__module__ == "__main__"
            trainer = pl.Trainer(max_epochs=int(sys.argv[1]), progress_bar_refresh_rate=0)
            trainer.fit(Model(), torch.utils.data.DataLoader(torch.rand(4, 2)))
            print("steps", trainer.global_step, pl.__name__)
        """,
    )
    out = run("-m", "puretrain.lightning", "train.py", "2", cwd=tmp_path).stdout
    assert out.splitlines()[-1] == "steps 8 puretrain.lightning"
    assert (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").is_file()


def test_all_roots_are_one(tmp_path):
    write(
        tmp_path,
        "roots.py",
        """\
        import lightning as L
        import lightning.pytorch as lp
        import pytorch_lightning as pl
        import lightning.pytorch.callbacks.early_stopping as first
        from pytorch_lightning.callbacks import early_stopping as second
        from lightning.callbacks.early_stopping import EarlyStopping
        assert L is lp is pl
        assert first is second
        assert EarlyStopping is pl.callbacks.EarlyStopping
        try:
            import pytorch_lightning.nothing
        except ModuleNotFoundError as error:
            print(error)
        try:
            from pytorch_lightning import nothing
        except ImportError as error:
            print(error)
        """,
    )
    out = run("-m", "puretrain.lightning", "roots.py", cwd=tmp_path).stdout.splitlines()
    assert out[0] == "No module named 'pytorch_lightning.nothing'"
    assert out[1].startswith("cannot import name 'nothing'")


SAME = """\
import sys, pickle
from helper import inside
class Thing: pass
print(sys.argv, __name__, __file__, __package__, __spec__, sys.path[0])
print(pickle.loads(pickle.dumps(Thing())).__class__, sys.modules["__main__"].Thing is Thing)
if "exit" in sys.argv:
    sys.exit(7)
if "interrupt" in sys.argv:
    raise KeyboardInterrupt
try:
    inside(0)
except ZeroDivisionError as error:
    raise ValueError("bad") from error
"""


@pytest.mark.parametrize("argument", ["none", "exit", "interrupt"])
def test_behaves_like_python_itself(tmp_path, argument):
    write(tmp_path, "deep/program.py", SAME)
    write(tmp_path, "deep/helper.py", "def inside(x):\n    return 1 / x\n")
    real, ours = (
        subprocess.run(
            [sys.executable, *runner, "deep/program.py", argument, "-x"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )
        for runner in ([], ["-m", "puretrain.lightning"])
    )  # fmt: skip
    assert ours.stdout == real.stdout
    assert ours.returncode == real.returncode
    assert ours.stderr == real.stderr
    if argument == "interrupt":
        assert ours.returncode == -signal.SIGINT


def test_a_syntax_error(tmp_path):
    write(tmp_path, "wrong.py", "x = = 1\n")
    process = run("-m", "puretrain.lightning", "wrong.py", cwd=tmp_path, check=False)
    assert process.returncode == 1
    assert "SyntaxError" in process.stderr
    assert "puretrain" not in process.stderr


def test_wrong_use(tmp_path):
    process = run("-m", "puretrain.lightning", cwd=tmp_path, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("usage:")
    process = run("-m", "puretrain.lightning", "none.py", cwd=tmp_path, check=False)
    assert process.returncode == 2
    assert "can't open file 'none.py'" in process.stderr


def test_a_module(tmp_path):
    write(
        tmp_path,
        "tests/test_it.py",
        "import pytorch_lightning as pl\n\n"
        "def test_it():\n    assert pl.__name__ == 'puretrain.lightning'\n",
    )
    arguments = ["-m", "puretrain.lightning", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    assert "1 passed" in run(*arguments, "tests", cwd=tmp_path).stdout


def test_in_a_conftest(tmp_path):
    write(
        tmp_path,
        "conftest.py",
        "import puretrain.lightning\n\npuretrain.lightning.import_as_lightning()\n",
    )
    write(
        tmp_path,
        "test_it.py",
        "from lightning.pytorch import Trainer\n\n"
        "def test_it():\n    assert Trainer.__module__.startswith('puretrain')\n",
    )
    assert "1 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path).stdout


def test_a_real_lightning_in_use_is_refused(tmp_path):
    write(tmp_path, "pytorch_lightning.py", "value = 1\n")
    write(
        tmp_path,
        "late.py",
        """\
        import pytorch_lightning
        import puretrain.lightning
        try:
            puretrain.lightning.import_as_lightning()
        except RuntimeError as error:
            print(error)
        """,
    )
    assert "pytorch_lightning is imported already" in run("late.py", cwd=tmp_path).stdout
    early = "import pytorch_lightning as pl\nprint(pl.__name__)\n"
    write(tmp_path, "early.py", early)
    out = run("-m", "puretrain.lightning", "early.py", cwd=tmp_path).stdout
    assert out.strip() == "puretrain.lightning"
