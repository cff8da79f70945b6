"""The metrics of a run, as JSON Lines and as TensorBoard event files."""

import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from engram_jax.errors import DISK_FULL, InputError
from engram_jax.files import parse_json, read_regular

LINES = "metrics.jsonl"
EVENTS = "events.out.tfevents."


class MetricsLog:
    """Appends scalars to `metrics.jsonl` and to one TensorBoard event file of a run folder.

    A line is `{"step": 3, "kind": "train", "loss": 5.25, …}`. Floats are written with enough digits
    to be read back exactly. "NaN", "Infinity" and "-Infinity" are strings, so that every line is
    valid JSON. The event file has the same values as float32, under the tags `kind/name`.

    Opening keeps the complete lines of an earlier session up to `resume_step` (None: all; -1: none)
    and removes an incomplete last line, which a killed process may leave. Then the event file is
    written again from these lines, so that both files agree. The kept events get the time of
    opening.

    Raises:
        InputError: a line before the last one is not JSON, or the disk is full.
    """

    def __init__(self, folder: str | Path, *, resume_step: int | None = None) -> None:
        """Opens the log in `folder`, which is created if it does not exist."""
        self._folder = folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [
                line
                for line in _read_lines(folder / LINES)
                if resume_step is None or line["step"] <= resume_step
            ]
            kept = folder / f"{LINES}.partial"
            with kept.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            kept.replace(folder / LINES)
            self._lines = (folder / LINES).open("ab", buffering=0)
            self._events = self._rewrite_events(lines)
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, step: int, scalars: Mapping[str, float | int], kind: str = "train") -> None:
        """Appends one line and one event. On return, the operating system has both."""
        line = {"step": step, "kind": kind} | {
            name: value if math.isfinite(value) else _NON_FINITE[str(float(value))]
            for name, value in scalars.items()
        }
        encoded = (json.dumps(line) + "\n").encode()
        try:
            written = 0
            while written < len(encoded):  # a nearly full disk accepts a part, then raises
                written += self._lines.write(encoded[written:])
            self._events.write(_event(line))
        except OSError as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Closes both files; a second call does nothing."""
        self._lines.close()
        self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rewrite_events(self, lines: list[dict[str, Any]]) -> RecordWriter:
        """Replaces the folder's event files by one that holds `lines`, open for appending."""
        # TensorBoard reads any file with "tfevents" in its name, so it gets its name when complete.
        partial = self._folder / "events.partial"
        stale = set(self._folder.glob(f"{EVENTS}*"))
        with partial.open("wb") as file:
            writer = RecordWriter(file)
            writer.write(
                Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()
            )
            for line in lines:
                writer.write(_event(line))
        final = self._folder / f"{EVENTS}{time.time_ns()}.engram"
        partial.rename(final)
        for path in stale:
            path.unlink()
        return RecordWriter(final.open("ab", buffering=0))

    def _cannot_write(self, error: OSError) -> InputError:
        full = error.errno in DISK_FULL
        remedy = "free some disk space" if full else f"move what is at {error.filename} away"
        return InputError(
            f"The metrics in {self._folder} cannot be written ({error.strerror}): {remedy} or "
            "choose another run folder, then resume."
        )


def read_metrics(folder: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run folder, in the order written, as {"step": int, name: float}.

    An incomplete last line is skipped. If there is no file, the list is empty.

    Raises:
        InputError: a complete line is no line of metrics.
    """
    return [
        {
            name: float(value) if isinstance(value, str) else value
            for name, value in line.items()
            if name != "kind"
        }
        for line in _read_lines(Path(folder) / LINES)
        if line["kind"] == kind
    ]


_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, line in enumerate(io.BytesIO(read_regular(path)), start=1):
        if not line.endswith(b"\n"):
            return  # incomplete: the writer was killed, or is writing now
        try:
            content = parse_json(line)
            if (reason := _wrong(content)) is not None:
                raise ValueError(reason)
        except ValueError as error:
            raise InputError(
                f"Line {number} of {path} is no line of metrics ({error}): repair or delete the "
                "line, then resume."
            ) from error
        yield content


def _wrong(line: Any) -> str | None:
    """What is wrong with a line of metrics, or None."""
    if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
        return "no kind or step"
    if type(line["step"]) is not int or not 0 <= line["step"] < 2**63:
        return f"step {line['step']}"
    for name, value in line.items():
        is_number = type(value) in (int, float) and math.isfinite(value)
        if name != "kind" and not is_number and value not in _NON_FINITE.values():
            return f"{name} {value}"
    return None


def _event(line: Mapping[str, Any]) -> bytes:
    values = [
        Summary.Value(tag=f"{line['kind']}/{name}", simple_value=float(value))
        for name, value in line.items()
        if name not in ("step", "kind")
    ]
    event = Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values))
    return event.SerializeToString()
