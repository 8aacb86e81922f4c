"""Test tube, which is not maintained any more."""

from puretrain.lightning.utilities.unavailable import unavailable

__all__ = ["TestTubeLogger"]

TestTubeLogger = unavailable(
    "TestTubeLogger", __name__, "test-tube is not maintained; use TensorBoardLogger or CSVLogger"
)
TestTubeLogger.__test__ = False  # it is no test, whatever pytest reads in its name
