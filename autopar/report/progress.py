"""Progress of profiling and running: a bar while someone is looking, else one line for each part that begins."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressLine:
    """Understands the messages of ``runtime.profile``, ``runtime.run``, ``validate.study`` and of long answers."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
        self._task: TaskID | None = None
        self._part = ""

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, message: dict[str, Any]) -> None:
        """Show a message."""
        if "profile" in message:
            self._show("profile", str(message["profile"]), int(message["done"]), int(message["of"]))
        elif "study" in message:
            self._show("validate", str(message["study"]), int(message["done"]), int(message["of"]))
        elif "answer" in message:
            self._show("plan", str(message["answer"]), int(message["done"]), int(message["of"]))
        elif "preflight" in message:
            self._show("preflight", str(message["preflight"]), int(message["done"]), int(message["of"]))
        elif message.get("event") == "restart":
            where = f" from {message['resumes_from']}" if "resumes_from" in message else ""
            line = f"{message['what']}: restart {message['restart']} of {message['of']}{where}"
            self._console.print(line, markup=False, soft_wrap=True)
        elif message.get("event") == "log":
            self._console.print(str(message["line"]), markup=False, highlight=False, soft_wrap=True)
        elif message.get("event") == "replan":
            line = f"{message['what']}: plan {message['slug']} on {message['ranks']} ranks"
            self._console.print(line, markup=False, soft_wrap=True)
        elif message.get("event") == "plan_begin":
            self._show("run", message["slug"], 0, 1, f" ({message['index'] + 1} of {message['plans']})")
        elif message.get("event") == "step":
            self._show("run", message["slug"], int(message["step"]) + 1, int(message["steps"]))

    def _show(self, what: str, part: str, done: int, of: int, note: str = "") -> None:
        description = f"{what}: {part}"
        if self._bar is None:
            if description != self._part:
                print(f"{description}{note}", file=sys.stderr, flush=True)
        elif self._task is None or (what == "run" and description != self._part):
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(description, total=of, completed=done)
        else:
            self._bar.update(self._task, description=description, total=of, completed=done)
        self._part = description
