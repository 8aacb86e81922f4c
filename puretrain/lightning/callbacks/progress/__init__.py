"""Progress bars in a terminal."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from puretrain.lightning.callbacks.base import Callback

__all__ = [
    "ProgressBar",
    "ProgressBarBase",
    "RichProgressBar",
    "RichProgressBarTheme",
    "TQDMProgressBar",
    "tqdm",
]

_INTERVAL = 0.1  # seconds between two drawings at least
_BAR, _SHORT_BAR = 20, 5  # characters of a bar, and what is left of it in a narrow terminal


class tqdm:  # noqa: N801 - the name by which programs import it
    """A line that shows how far something is, drawn with rich in a terminal.

    It has the part of tqdm's interface that progress bars of Lightning use.
    """

    def __init__(
        self,
        iterable: Any = None,
        desc: str = "",
        total: float | None = None,
        initial: int = 0,
        position: int = 0,
        disable: bool = False,
        leave: bool = True,
        file: Any = None,
        **unused: Any,
    ) -> None:
        """Begin to show; ``total`` None or infinity: unknown."""
        self.iterable, self.desc, self.disable, self.leave = iterable, desc, disable, leave
        self.n, self.initial, self.pos = initial, initial, position
        self.total = None if total is None or total == math.inf else total
        self.file = file or sys.stderr
        self.postfix = ""
        self._began, self._drawn = time.monotonic(), 0.0
        self._live: Any = None

    def __iter__(self) -> Any:
        for item in self.iterable:
            yield item
            self.update(1)
        self.close()

    def update(self, n: float = 1) -> None:
        """Go on by so many."""
        self.n += n
        self.refresh(force=False)

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """Change the text in front."""
        self.desc = desc or ""

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **values: Any) -> None:
        """Change the values behind."""
        found = {**(ordered_dict or {}), **values}
        parts = []
        for name, value in found.items():
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            parts.append(f"{name}={text}")
        self.postfix = ", ".join(parts)
        if refresh:
            self.refresh(force=False)

    def reset(self, total: float | None = None) -> None:
        """Begin again."""
        self.n, self._began = self.initial, time.monotonic()
        if total is not None:
            self.total = None if total == math.inf else total

    def refresh(self, force: bool = True) -> None:
        """Draw, unless that was done just now."""
        now = time.monotonic()
        if self.disable or (not force and now - self._drawn < _INTERVAL):
            return
        self._drawn = now
        if not self._is_terminal():
            return
        if self._live is None:
            from rich.live import Live

            self._live = Live(console=self._console(), auto_refresh=False, transient=not self.leave)
            self._live.start()
        self._live.update(self._picture(), refresh=True)

    def _is_terminal(self) -> bool:
        return bool(getattr(self.file, "isatty", lambda: False)())

    def _console(self) -> Any:
        from rich.console import Console

        return Console(file=self.file)

    def _picture(self) -> Any:
        """What is drawn, for rich: one line of the terminal."""
        from rich.text import Text

        text = self._line(_BAR)
        excess = len(text) - self._console().width
        if excess > 0:
            text = self._line(max(_BAR - excess, _SHORT_BAR))
        return Text(text, no_wrap=True, overflow="ellipsis")

    def __str__(self) -> str:
        return self._line(_BAR)

    def _line(self, width: int) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = (self.n - self.initial) / elapsed
        count = f"{self.n:g}" if self.total is None else f"{self.n:g}/{self.total:g}"
        share = "" if not self.total else f"{100 * self.n / self.total:3.0f}%|"
        full = 0 if not self.total else min(width, int(width * self.n / self.total))
        bar = "" if not self.total else "█" * full + " " * (width - full) + "| "
        tail = f", {self.postfix}" if self.postfix else ""
        return f"{self.desc}: {share}{bar}{count} [{elapsed:.0f}s, {rate:.2f}it/s{tail}]"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "file": None, "_live": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, file=sys.stderr)

    def clear(self) -> None:
        """Take the line away; the next refresh draws it again."""
        if self._live is not None:
            self._live.transient = True
            self._live.stop()
            self._live = None

    def close(self) -> None:
        """End the line."""
        if self.leave and self.n > self.initial:
            self.refresh()  # as it is now, also if it was taken away
        if self._live is not None:
            self._live.stop()
            self._live = None

    @staticmethod
    def write(text: str = "", file: Any = None, end: str = "\n", **unused: Any) -> None:
        """Print above the bars."""
        print(text, file=file or sys.stdout, end=end)


class ProgressBarBase(Callback):
    """Counts batches; override its hooks to show them in a way of your own."""

    def __init__(self) -> None:
        """Begin to count."""
        self._trainer: Any = None
        self._train_batch_idx = 0
        self._val_batch_idx = 0
        self._test_batch_idx = 0
        self._predict_batch_idx = 0
        self._enabled = True

    @property
    def trainer(self) -> Any:
        """The trainer."""
        return self._trainer

    @property
    def is_enabled(self) -> bool:
        """Whether it shows anything."""
        return self._enabled

    @property
    def is_disabled(self) -> bool:
        """Whether it shows nothing."""
        return not self.is_enabled

    @property
    def train_batch_idx(self) -> int:
        """Training batches seen in this epoch."""
        return self._train_batch_idx

    @property
    def val_batch_idx(self) -> int:
        """Validation batches seen."""
        return self._val_batch_idx

    @property
    def test_batch_idx(self) -> int:
        """Test batches seen."""
        return self._test_batch_idx

    @property
    def predict_batch_idx(self) -> int:
        """Batches predicted."""
        return self._predict_batch_idx

    @property
    def total_train_batches(self) -> float:
        """Training batches in an epoch."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches(self) -> float:
        """Validation batches in all validations of an epoch."""
        trainer = self.trainer
        if not trainer.enable_validation:
            return 0
        every = trainer.check_val_every_n_epoch or 1
        if (trainer.current_epoch + 1) % every:
            return 0
        return sum(trainer.num_val_batches)

    @property
    def total_test_batches(self) -> float:
        """Test batches."""
        return sum(self.trainer.num_test_batches)

    @property
    def total_predict_batches(self) -> float:
        """Batches to predict."""
        return sum(self.trainer.num_predict_batches)

    def disable(self) -> None:
        """Show nothing any more."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, without disturbing the bar."""
        print(*args, **kwargs)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """What is shown besides the counts."""
        return {**pl_module.get_progress_bar_dict(), **trainer.progress_bar_metrics}

    def on_init_end(self, trainer):
        """Remember the trainer."""
        self._trainer = trainer

    def setup(self, trainer, pl_module, stage=None):
        """Remember the trainer."""
        self._trainer = trainer

    def on_train_start(self, trainer, pl_module):
        """Begin to count."""
        self._train_batch_idx = trainer.batch_idx

    def on_train_epoch_start(self, trainer, pl_module):
        """Begin to count."""
        self._train_batch_idx = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Count."""
        self._train_batch_idx += 1

    def on_validation_start(self, trainer, pl_module):
        """Begin to count."""
        self._val_batch_idx = 0

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ):
        """Count."""
        self._val_batch_idx += 1

    def on_test_start(self, trainer, pl_module):
        """Begin to count."""
        self._test_batch_idx = 0

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Count."""
        self._test_batch_idx += 1

    def on_predict_epoch_start(self, trainer, pl_module):
        """Begin to count."""
        self._predict_batch_idx = 0

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Count."""
        self._predict_batch_idx += 1


class ProgressBar(ProgressBarBase):
    """Shows epoch, batches, rate, loss and logged values."""

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, **unused: Any) -> None:
        """Say after how many batches to draw; 0: never."""
        super().__init__()
        self._refresh_rate, self._process_position = refresh_rate, process_position
        self.main_progress_bar: Any = None
        self.val_progress_bar: Any = None
        self.test_progress_bar: Any = None
        self.predict_progress_bar: Any = None
        self._due = 0.0

    @property
    def refresh_rate(self) -> int:
        """After how many batches it is drawn."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """Kept for its name."""
        return self._process_position

    @property
    def is_enabled(self) -> bool:
        """Whether it shows anything."""
        return self._enabled and self._refresh_rate > 0

    def _bar(self, description: str, total: Any = None, leave: bool = True) -> Any:
        return tqdm(
            desc=description,
            total=total,
            disable=self.is_disabled,
            leave=leave,
            file=sys.stdout,
        )

    def init_sanity_tqdm(self) -> Any:
        """The bar of the first, short validation."""
        return self._bar("Validation sanity check", leave=False)

    def init_train_tqdm(self) -> Any:
        """The bar of a training epoch."""
        return self._bar("Training")

    def init_validation_tqdm(self) -> Any:
        """The bar of a validation."""
        return self._bar("Validating", leave=self.trainer._fn != "fit")

    def init_test_tqdm(self) -> Any:
        """The bar of a test."""
        return self._bar("Testing")

    def init_predict_tqdm(self) -> Any:
        """The bar of a prediction."""
        return self._bar("Predicting")

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar."""
        tqdm.write(sep.join(map(str, args)), **kwargs)

    def on_sanity_check_start(self, trainer, pl_module):
        """Begin the bar."""
        self.val_progress_bar = self.init_sanity_tqdm()
        self.main_progress_bar = self._bar("")

    def on_sanity_check_end(self, trainer, pl_module):
        """End the bar."""
        self.main_progress_bar.close()
        self.val_progress_bar.close()

    def on_train_start(self, trainer, pl_module):
        """Begin the bar."""
        super().on_train_start(trainer, pl_module)
        self.main_progress_bar = self.init_train_tqdm()

    def on_train_epoch_start(self, trainer, pl_module):
        """Begin the epoch's line."""
        super().on_train_epoch_start(trainer, pl_module)
        total = self.total_train_batches
        self.main_progress_bar.reset(None if total == math.inf else total)
        self.main_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Draw, if it is due."""
        self._train_batch_idx += 1
        now = time.monotonic()
        every = self._refresh_rate
        if not self._enabled or not every or self._train_batch_idx % every or now < self._due:
            return
        self._due = now + _INTERVAL
        self._draw_main(trainer, pl_module)

    def _draw_main(self, trainer: Any, pl_module: Any) -> None:
        bar = self.main_progress_bar
        if bar is None:
            return
        bar.update(self._train_batch_idx - bar.n)
        bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer, pl_module, *args):
        """Draw the full line."""
        if self.is_enabled:
            self._draw_main(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module):
        """Begin the bar."""
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking:
            if self.main_progress_bar is not None:
                self.main_progress_bar.clear()  # one line at a time
            self.val_progress_bar = self.init_validation_tqdm()
            self.val_progress_bar.reset(sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ):
        """Go on."""
        self._val_batch_idx += 1
        if self.is_enabled and self.val_progress_bar is not None:
            self.val_progress_bar.update(1)

    def on_validation_end(self, trainer, pl_module):
        """End the bar."""
        if not trainer.sanity_checking and self.val_progress_bar is not None:
            self.val_progress_bar.close()
            if self.main_progress_bar is not None and self.is_enabled and trainer._fn == "fit":
                self._draw_main(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        """End the bar."""
        if self.main_progress_bar is not None:
            self.main_progress_bar.close()

    def on_test_start(self, trainer, pl_module):
        """Begin the bar."""
        super().on_test_start(trainer, pl_module)
        self.test_progress_bar = self.init_test_tqdm()
        self.test_progress_bar.reset(self.total_test_batches)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Go on."""
        self._test_batch_idx += 1
        if self.is_enabled:
            self.test_progress_bar.update(1)

    def on_test_end(self, trainer, pl_module):
        """End the bar."""
        self.test_progress_bar.close()

    def on_predict_epoch_start(self, trainer, pl_module):
        """Begin the bar."""
        super().on_predict_epoch_start(trainer, pl_module)
        self.predict_progress_bar = self.init_predict_tqdm()
        self.predict_progress_bar.reset(self.total_predict_batches)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Go on."""
        self._predict_batch_idx += 1
        if self.is_enabled:
            self.predict_progress_bar.update(1)

    def on_predict_end(self, trainer, pl_module):
        """End the bar."""
        self.predict_progress_bar.close()


TQDMProgressBar = ProgressBar


@dataclass
class RichProgressBarTheme:
    """Styles of rich, such as ``"bold green"`` or ``"#6206E0"``, for the parts of a bar."""

    description: Any = ""
    progress_bar: Any = "#6206E0"
    progress_bar_finished: Any = "#6206E0"
    progress_bar_pulse: Any = "#6206E0"
    batch_progress: Any = ""
    time: Any = "dim"
    processing_speed: Any = "dim underline"
    metrics: Any = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class _RichBar(tqdm):
    """A line of coloured parts."""

    def __init__(self, theme: RichProgressBarTheme, console: dict[str, Any], **options: Any):
        super().__init__(**options)
        self.theme, self.console = theme, console

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **values: Any) -> None:
        """Change the values behind."""
        form = self.theme.metrics_format
        self.postfix = self.theme.metrics_text_delimiter.join(
            f"{name}: {value:{form}}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in {**(ordered_dict or {}), **values}.items()
        )
        if refresh:
            self.refresh(force=False)

    def _console(self) -> Any:
        from rich.console import Console

        return Console(**{"file": self.file, **self.console})

    def _is_terminal(self) -> bool:
        return bool(self._console().is_terminal)

    def _picture(self) -> Any:
        from rich.progress_bar import ProgressBar as Line
        from rich.table import Table
        from rich.text import Text

        theme, elapsed = self.theme, max(time.monotonic() - self._began, 1e-9)
        rate = (self.n - self.initial) / elapsed
        left = "-:--:--"
        if self.total and rate:
            left = str(timedelta(seconds=round((self.total - self.n) / rate)))
        count = f"{self.n:g}/{'--' if self.total is None else format(self.total, 'g')}"
        past = str(timedelta(seconds=int(elapsed)))
        table = Table.grid(padding=(0, 1))
        table.add_row(
            Text(self.desc, style=theme.description),
            Line(
                total=self.total, completed=self.n, width=40, pulse=self.total is None,
                complete_style=theme.progress_bar, finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            Text(count, style=theme.batch_progress),
            Text(f"{past} • {left}", style=theme.time),
            Text(f"{rate:.2f}it/s", style=theme.processing_speed),
            Text(self.postfix, style=theme.metrics),
        )  # fmt: skip
        return table


class RichProgressBar(ProgressBar):
    """A progress bar in colours."""

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Say how it looks.

        Args:
            refresh_rate: after how many batches to draw; 0: never.
            leave: let the line of each stage stay when it is full.
            theme: the styles of its parts.
            console_kwargs: arguments of :class:`rich.console.Console`.
        """
        super().__init__(refresh_rate)
        self.leave, self.theme = leave, theme or RichProgressBarTheme()
        self._console_kwargs = dict(console_kwargs or {})

    def _bar(self, description: str, total: Any = None, leave: bool = True) -> Any:
        return _RichBar(
            self.theme, self._console_kwargs, desc=description, total=total,
            leave=leave and self.leave,
            disable=self.is_disabled, file=sys.stdout,
        )  # fmt: skip


# Modules are attributes, whether or not a program imports them; they import from here.
from puretrain.lightning.callbacks.progress import (  # noqa: E402, F401
    base,
    progress_bar,
    rich_progress,
    tqdm_progress,
)
