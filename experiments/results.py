"""The results of an experiment: a JSON file with one line per finished run, and a table of it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from engram_jax.config import TrainConfig
from engram_jax.errors import InputError
from engram_jax.files import atomic_write

type Record = dict[str, Any]
type Floats = Float[np.ndarray, "seeds"]


@dataclass(frozen=True)
class Results:
    """Finished runs. Tables and plots are made from these alone.

    Attributes:
        records: one per run: label, seed, key (hash of the configuration), measurement (version of
            the figures), order (version of the order of documents), the settings that differ from
            their defaults, the figures, how and when they were measured, and the relative speed of
            an arm of equal time.
    """

    records: tuple[Record, ...]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The results in a file; none, if there is no file.

        Raises:
            InputError: the file is damaged.
        """
        if not path.exists():
            return cls(())
        try:
            return cls(tuple(json.loads(path.read_text("utf-8"))["runs"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} holds no results ({error}); restore it from git, or delete it."
            ) from error

    def write(self, path: Path) -> None:
        """Replaces a file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in self.records)
        with atomic_write(path) as partial:
            partial.write_text(f'{{"runs": [\n{lines}\n]}}\n', "utf-8")

    def add(self, record: Record, labels: Sequence[str]) -> "Results":
        """With one more run, which replaces the run of the same label and seed.

        Runs that were measured in another way are dropped: no table mixes them.

        Args:
            record: the run.
            labels: all labels in their order, by which the runs are sorted.
        """
        others = [
            each
            for each in self.records
            if _place(each) != _place(record)
            and each.get("measurement") == record.get("measurement")
        ]
        order = {label: place for place, label in enumerate(labels)}
        records = [*others, record]
        records.sort(key=lambda each: (order.get(each["label"], len(order)), each["seed"]))
        return Results(tuple(records))

    def labels(self) -> list[str]:
        """The labels, in the order of the file."""
        return list(dict.fromkeys(record["label"] for record in self.records))

    def of(self, label: str) -> list[Record]:
        """The runs of a label, by seed."""
        return [record for record in self.records if record["label"] == label]

    def orders(self, seed: int) -> set[int]:
        """The orders in which the runs of a seed read the documents. Pairs need one order."""
        return {order_of(record) for record in self.records if record["seed"] == seed}

    def relative_speed(self, label: str) -> float | None:
        """The measured speed by which an arm of equal time got its steps; None: none was."""
        runs = self.of(label)
        return runs[0].get("relative_speed") if runs else None

    def values(self, label: str, *path: str) -> Float[np.ndarray, "seeds ..."]:
        """A figure of every run of a label, such as `values("Engram", "loss", "prose")`."""
        return np.array([_get(record, path) for record in self.of(label)], np.float64)

    def paired(self, labels: Sequence[str], *path: str) -> Float[np.ndarray, "labels seeds ..."]:
        """A figure of several labels, for the seeds for which all of them have it, in order."""
        by_label = [
            {
                record["seed"]: figure
                for record in self.of(label)
                if (figure := _get(record, path)) is not None
            }
            for label in labels
        ]
        seeds = sorted(set.intersection(*map(set, by_label)))
        return np.array([[of[seed] for seed in seeds] for of in by_label], np.float64)

    def differences(self, label: str, baseline: str, *path: str) -> Floats:
        """A figure of a label minus that of the baseline, for every seed that both have."""
        own, other = self.paired([label, baseline], *path)
        return np.asarray(own - other)

    def table(self, baseline: str) -> str:
        """A markdown table with one line per label.

        Args:
            baseline: the label that the others are compared with, paired by seed.
        """
        lines = [
            "| | seeds | steps | parameters | held-out loss | difference, paired by seed "
            "| memory dropped | gates > 0.95, < 0.05 | added / stream | tokens/s |",
            f"{'|---' * 10}|",
        ]
        for label in self.labels():
            runs = self.of(label)
            difference = self.differences(label, baseline, "loss", "prose")
            cells = [
                f"{len(runs)} | {steps_of(runs[0])}",
                f"{runs[0]['account']['total'] / 1e6:.2f} M",
                mean_and_error(self.values(label, "loss", "prose")),
                "" if label == baseline else mean_and_error(difference, "+"),
                mean_and_error(self.values(label, "dropped"), "+") if "dropped" in runs[0] else "",
                *_health_cells(runs),
                _speed(self.values(label, "measured", "tokens_per_second")),
            ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines += [
            "",
            "Nats per token of prose, mean ± standard error over seeds; differences are to "
            f"“{baseline}”. “Memory dropped” is the increase of the loss without the memory's "
            "output. Gates and the RMS of what the memory adds, relative to the residual stream, "
            "are means over layers and held-out tokens.",
        ]
        return "\n".join(lines)


def order_of(record: Record) -> int:
    """The version of the order in which a run read the documents (`packing.ORDER`)."""
    return int(record.get("order", 1))


def steps_of(record: Record) -> int:
    """The number of training steps of a run."""
    return int(record["settings"].get("train.steps", TrainConfig().steps))


def mean_and_error(values: Floats, sign: str = "") -> str:
    """Mean ± standard error over seeds; without an error if there is one seed."""
    if not len(values):
        return ""
    mean = f"{values.mean():{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {standard_error(values):.4f}"


def standard_error(values: Floats) -> float:
    """Standard error of the mean; NaN for one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _speed(tokens_per_second: Floats) -> str:
    known = tokens_per_second[np.isfinite(tokens_per_second)]
    return f"{np.median(known):,.0f}" if len(known) else ""


def _health_cells(runs: Iterable[Record]) -> list[str]:
    layers = [layer for run in runs for layer in run.get("health", {}).values()]
    if not layers:
        return ["", ""]
    mean = {name: np.mean([layer[name] for layer in layers]) for name in layers[0]}
    return [f"{mean['open']:.1%}, {mean['closed']:.1%}", f"{mean['strength']:.3f}"]


def _get(record: Record, path: Sequence[str]) -> Any:
    """A figure; None: the record does not have it."""
    figure: Any = record
    for name in path:
        figure = figure.get(name)
        if figure is None:
            return None
    return figure


def _place(record: Record) -> tuple[str, int]:
    return record["label"], record["seed"]
