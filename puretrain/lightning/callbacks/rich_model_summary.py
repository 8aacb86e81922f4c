"""Where 2.x has the summary in colours."""

from puretrain.lightning.callbacks.model_summary import RichModelSummary

__all__ = ["RichModelSummary"]
