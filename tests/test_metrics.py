import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engram_jax.errors import InputError
from engram_jax.metrics import LINES, MetricsLog, read_metrics


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_both_files_hold_what_was_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        for step in range(3):
            log.write(step, {"loss": 5.0 / (step + 3), "rate": 0.1})
        log.write(2, {"loss": 4.5}, kind="eval")

    lines = read_metrics(tmp_path / "run")
    assert lines == [{"step": n, "loss": 5.0 / (n + 3), "rate": 0.1} for n in range(3)]
    assert read_metrics(tmp_path / "run", "eval") == [{"step": 2, "loss": 4.5}]
    assert read_events(tmp_path / "run") == {
        "train/loss": [(n, float(np.float32(5.0 / (n + 3)))) for n in range(3)],
        "train/rate": [(n, float(np.float32(0.1))) for n in range(3)],
        "eval/loss": [(2, 4.5)],
    }


@given(value=st.floats())
def test_any_float_returns_exactly_and_every_line_is_json(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with MetricsLog(folder) as log:
        log.write(1, {"loss": value})
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    (restored,) = read_metrics(folder)
    if math.isnan(value):
        assert math.isnan(restored["loss"])
    else:
        assert np.float64(restored["loss"]).tobytes() == np.float64(value).tobytes()


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(7, {"loss": 1.5})
    assert read_metrics(tmp_path) == [{"step": 7, "loss": 1.5}]
    assert read_events(tmp_path) == {"train/loss": [(7, 1.5)]}
    log.close()


@pytest.mark.parametrize(("resume_step", "kept"), [(None, 6), (3, 4), (-1, 0), (99, 6)])
def test_resume_cuts_both_files_to_the_step(
    tmp_path: Path, resume_step: int | None, kept: int
) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(6):
            log.write(step, {"loss": float(step), "gap": math.inf})
    with MetricsLog(tmp_path, resume_step=resume_step) as log:
        log.write(100, {"loss": 0.5})

    expected = [(n, float(n)) for n in range(kept)] + [(100, 0.5)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == expected
    assert read_events(tmp_path)["train/loss"] == expected
    assert not list(tmp_path.glob("*.partial"))


def test_a_resumed_log_equals_an_uninterrupted_one_byte_for_byte(tmp_path: Path) -> None:
    def loss(step: int) -> dict[str, float]:
        return {"loss": math.exp(-step), "norm": math.nan}

    with MetricsLog(tmp_path / "whole") as log:
        for step in range(8):
            log.write(step, loss(step))
    with MetricsLog(tmp_path / "cut") as log:
        for step in range(6):
            log.write(step, loss(step))
    with MetricsLog(tmp_path / "cut", resume_step=4) as log:
        for step in range(5, 8):
            log.write(step, loss(step))
    whole, cut = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("torn", ['{"step": 2, "ki', '{"step": 2, "kind": "train", "loss": 1.0}'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    with MetricsLog(tmp_path) as log:
        log.write(2, {"loss": 1.5})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2.0, 1.5]
    assert read_events(tmp_path)["train/loss"] == [(1, 2.0), (2, 1.5)]


@pytest.mark.parametrize("broken", ["nonsense", "null", "[]", "{}", "3", '"step"'])
def test_a_broken_line_before_the_last_is_named_and_nothing_is_lost(
    tmp_path: Path, broken: str
) -> None:
    text = f'{{"step": 1, "kind": "train"}}\n{broken}\n{{"step": 2, "kind": "train"}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"Line 2 of .*metrics.jsonl is no line of metrics"):
        MetricsLog(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_full_disk_is_one_sentence_and_the_whole_lines_stay(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(.*\): free some disk"):
            for step in range(100_000):
                log.write(step, {f"metric_{n}": n / 7 for n in range(50)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
    with MetricsLog(tmp_path) as log:
        assert [line["step"] for line in read_metrics(tmp_path)] == list(range(step))


@pytest.mark.parametrize(
    "change",
    [*({"step": step} for step in ("abc", 2.5, True, -1, 2**70)), {"loss": None}, {"loss": [1]}],
)
def test_a_line_with_another_type_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    line = {"step": 1, "kind": "train", "loss": 2.5} | change
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="Line 1"):
        read_metrics(tmp_path)


def test_a_folder_at_the_place_of_the_log_is_named(tmp_path: Path) -> None:
    (tmp_path / LINES).mkdir()
    with pytest.raises(
        InputError, match=r"Is a directory\): move what is at .*metrics\.jsonl away"
    ):
        MetricsLog(tmp_path)
