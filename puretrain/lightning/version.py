"""The version of the interface: what programs compare ``pytorch_lightning.__version__`` with."""

__version__ = "1.2.10"
version = __version__
