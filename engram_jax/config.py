"""The configuration of a run: frozen dataclasses that are validated on construction."""

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engram_jax.errors import InputError
from engram_jax.files import atomic_write, parse_json, read_regular
from engram_jax.hashing import HashSpec, HashVariant
from engram_jax.memory.layout import RecordLayout, StorageConfig
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.memory.store import Placement
from engram_jax.model import DecoderConfig, MemorySites
from engram_jax.optimizer import OptimizerConfig
from engram_jax.sharding import MeshConfig
from pallas_kernels.hashed_gather import GatherImplementation


@dataclass(frozen=True)
class MemoryConfig:
    """The memory: its hash, its tables, and how the network reads them.

    Attributes:
        layers: zero-based ids of the blocks with memory; the flag without values means a model
            without memory.
        fusion: "engram" (gated, before the block), or a baseline, with layers 0: "over_encoding"
            (averaged with the input embedding) or "added" (added to it; row_width must be the
            model's width).
        max_order: largest n-gram order N; the paper sets model.engram.dilation to the same value.
        heads: hash heads K per order.
        rows_per_head: minimum number of rows of a head, for each order 2…N.
        row_width: width F of a row.
        hash_seed: seed of the hash multipliers.
        hash_variant: "engram": the paper's; "qwen": of Qwen3.8-Flash-Next, for its tables.
        init_scale: standard deviation of the initial rows.
        start_from: an export of a run, or a checkpoint of DeepSeek-V4.1-Flash or
            Qwen3.8-Flash-Next, whose tables this run begins with; by default, random rows.
        project_vocabulary: tokens that differ only in case, accents or spacing have the same id in
            the hash.
        frozen: the tables are read, but not trained.
        adam: the row optimizer.
        storage: precision of the rows and of their moments.
        gather: implementation of `pallas_kernels.hashed_gather`, which reads rows and copies them
            to tokens; None is "xla".
        placement: where training keeps the tables: "device", "host" (memory) or "file" (in the run
            folder). Results are equal bit for bit.
    """

    layers: tuple[int, ...] = (1,)
    fusion: Literal["engram", "over_encoding", "added"] = "engram"
    max_order: int = 3
    heads: int = 8
    rows_per_head: tuple[int, ...] = (200_000, 200_000)
    row_width: int = 24
    hash_seed: int = 0
    hash_variant: HashVariant = "engram"
    init_scale: float = 0.02
    start_from: str | None = None
    project_vocabulary: bool = True
    frozen: bool = False
    adam: RowAdamConfig = field(default_factory=lambda: RowAdamConfig(factor=10.0))
    storage: StorageConfig = field(default_factory=StorageConfig)
    gather: GatherImplementation | None = None
    placement: Placement = "device"

    def __post_init__(self) -> None:
        if self.layers:
            self.hash_spec(pad_id=0)
        if self.row_width < 1:
            raise InputError(f"memory.row_width is {self.row_width}; it must be at least 1.")
        if self.init_scale < 0:
            raise InputError(f"memory.init_scale is {self.init_scale}; it must not be negative.")
        if self.start_from is not None and not self.start_from.strip():
            raise InputError("memory.start_from is empty; name a folder, or leave it out.")
        if self.start_from is not None and not self.layers:
            raise InputError("memory.start_from needs memory; set memory.layers.")
        if self.fusion != "engram" and self.layers not in ((), (0,)):
            raise InputError(
                f"Memory of the form {self.fusion} is read only at the input, not at layers "
                f"{self.layers}; set memory.layers to 0."
            )

    def hash_spec(self, pad_id: int) -> HashSpec:
        """The hash, for a tokenizer's pad id."""
        return HashSpec(
            layers=self.layers,
            max_order=self.max_order,
            heads=self.heads,
            rows_per_head=self.rows_per_head,
            pad_id=pad_id,
            seed=self.hash_seed,
            variant=self.hash_variant,
        )

    @property
    def layout(self) -> RecordLayout:
        """The format of a stored row."""
        return RecordLayout(self.row_width, self.storage)

    @property
    def sites(self) -> MemorySites:
        """Where the decoder reads this memory."""
        orders = self.max_order - 1
        return MemorySites(
            layers=self.layers if self.fusion == "engram" else (),
            input=self.fusion if self.fusion != "engram" and self.layers else None,
            width=orders * self.heads * self.row_width,
            orders=orders,
        )


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it becomes batches.

    Attributes:
        sources: names of shipped corpora, files (.jsonl, also .gz, .xz, .zst; .txt, which is one
            document; .parquet; .arrayrecord), or folders of such files.
        weights: share of every source; by default, proportional to its size.
        tokenizer: "default", or the path of a SentencePiece .model or a tokenizer.json.
        pad_id: padding id; None: the tokenizer's own. The hash also reads it before the start of a
            document.
        bos_id: id at the start of a document; None: the tokenizer's own.
        eos_id: id at the end of a document; None: the tokenizer's own.
        sequence_length: tokens T of a packed row.
        batch_size: rows of an optimizer step, over all devices and micro-batches.
        held_out: share of the documents that is never used for training, chosen by their hash.
        cache: folder of the tokenized corpora.
        workers: number of processes that build batches; 0: a thread of the main process does. By
            default, 0 on a CPU and up to 4 on an accelerator.
        prefetch: number of batches that are built ahead.
    """

    sources: tuple[str, ...] = ("vital_en", "factbook", "web_bible", "austen", "wordnet")
    weights: tuple[float, ...] = ()
    tokenizer: str = "default"
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    sequence_length: int = 256
    batch_size: int = 8
    held_out: float = 0.05
    cache: str = ".cache/corpora"
    workers: int | None = None
    prefetch: int = 4

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("data.sources is empty; name at least one corpus or file.")
        if self.weights and len(self.weights) != len(self.sources):
            raise InputError(
                f"{len(self.weights)} weights for {len(self.sources)} sources; "
                "give one weight per source, or none."
            )
        if min(self.sequence_length, self.batch_size) < 1:
            raise InputError("sequence_length and batch_size must be at least 1.")
        if min(self.workers or 0, self.prefetch) < 0:
            raise InputError("data.workers and data.prefetch must not be negative.")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}; it must be between 0 and 1.")


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
        steps: optimizer steps.
        accumulation: micro-batches per step.
        seed: seed of the parameters and of the order of the documents.
        log_every: steps between lines of metrics.
        evaluate_every: steps between held-out evaluations; 0: only at the end.
        evaluate_tokens: maximum number of held-out tokens per source in such an evaluation.
        evaluate_batch_size: rows of a batch of an evaluation, over all devices; by default, those
            of a micro-batch.
        checkpoint_every: steps between checkpoints; 0: only at the end.
        keep_checkpoints: number of newest checkpoints to keep.
    """

    steps: int = 1000
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 250
    evaluate_tokens: int = 16_384
    evaluate_batch_size: int | None = None
    checkpoint_every: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "keep_checkpoints"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"train.{name} is {value}; it must be at least 1.")
        if self.steps >= 2**31:
            raise InputError(f"train.steps is {self.steps}; it must be below 2³¹.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"train.seed is {self.seed}; it must be from 0 to 2³² − 1.")
        if min(self.log_every, self.evaluate_tokens) < 1:
            raise InputError("train.log_every and train.evaluate_tokens must be at least 1.")
        if self.evaluate_batch_size is not None and self.evaluate_batch_size < 1:
            raise InputError(
                f"train.evaluate_batch_size is {self.evaluate_batch_size}; it must be at least 1."
            )
        if min(self.evaluate_every, self.checkpoint_every) < 0:
            raise InputError(
                "train.evaluate_every and train.checkpoint_every must not be negative; 0 means "
                "only at the end."
            )


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run.

    Attributes:
        name: name of the run; its default folder is runs/NAME.
        model: sizes of the decoder.
        memory: hash and tables.
        data: text.
        optimizer: optimizer of the dense parameters.
        train: steps, seeds, evaluation, checkpoints.
        mesh: devices.
    """

    name: str = "default"
    model: DecoderConfig = field(default_factory=DecoderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch, over all devices."""
        return self.data.batch_size // self.train.accumulation

    @property
    def evaluate_batch_size(self) -> int:
        """Rows of a batch of an evaluation, over all devices."""
        return self.train.evaluate_batch_size or self.micro_batch_size

    def without_memory(self) -> "Config":
        """The same backbone without memory."""
        return replace(self, memory=MemoryConfig(layers=()))

    def __post_init__(self) -> None:
        _check_numbers(asdict(self))
        outside = [layer for layer in self.memory.layers if layer >= self.model.layers]
        if outside:
            raise InputError(
                f"memory.layers {outside} are outside a model of {self.model.layers} layers; "
                f"the layer ids are 0…{self.model.layers - 1}."
            )
        if self.memory.sites.input == "added" and self.memory.row_width != self.model.width:
            raise InputError(
                f"memory.row_width is {self.memory.row_width}, but rows that are added to the "
                f"embedding have the model's width; set it to {self.model.width}."
            )
        experts = self.model.experts
        if experts is None and self.mesh.expert > 1:
            raise InputError(
                f"mesh.expert is {self.mesh.expert}, but the model has no experts; set it to 1."
            )
        if experts is not None and experts.stored % self.mesh.expert:
            raise InputError(
                f"{experts.stored} experts cannot be split evenly over mesh.expert "
                f"{self.mesh.expert} devices; choose a divisor, or for a new run set "
                f"model.experts.multiple to {self.mesh.expert}."
            )
        if self.data.batch_size % self.train.accumulation:
            raise InputError(
                f"data.batch_size {self.data.batch_size} does not divide into "
                f"train.accumulation {self.train.accumulation} micro-batches."
            )


def _check_numbers(values: Any, name: str = "") -> None:
    """Refuses numbers that no run can use, in any section.

    NaN would also pass every comparison of a section's own checks, and is not equal to itself, so
    that its run could not be resumed.
    """
    if isinstance(values, dict):
        for field_name, value in values.items():
            _check_numbers(value, f"{name}.{field_name}" if name else field_name)
    elif isinstance(values, tuple | list):
        for value in values:
            _check_numbers(value, name)
    elif isinstance(values, float) and not math.isfinite(values):
        raise InputError(f"{name} is {values}; give a finite number.")
    elif name.endswith((".eps", "_epsilon")) and values < 2.0**-126:
        raise InputError(f"{name} is {values}, which is no positive number of float32; raise it.")
    elif isinstance(values, int) and abs(values) >= 2**63:
        raise InputError(f"{name} is {values}; give a number of at most 18 digits.")
    elif isinstance(values, int) and abs(values) >= 2**31 and name != "memory.hash_seed":
        raise InputError(f"{name} is {values}; give a number below 2³¹.")
    elif name in _COUNTED_OUT and isinstance(values, int) and values > _MOST_COUNTED:
        raise InputError(f"{name} is {values}; give at most {_MOST_COUNTED}.")


# Each of these is built one after another, so a larger number would take hours to start.
_COUNTED_OUT = (
    *("model.layers", "memory.heads", "memory.max_order", "model.engram.kernel"),
    *("model.hyper_connections.branches", "model.hyper_connections.sinkhorn_iterations"),
    *("data.workers", "data.prefetch"),
)
_MOST_COUNTED = 1000


_SECTIONS = {"name", "model", "memory", "data", "optimizer", "train", "mesh"}  # since version 0.1.0


def save_config(config: Config, path: str | Path) -> None:
    """Writes a configuration as JSON; the file is replaced atomically."""
    with atomic_write(Path(path)) as partial:
        partial.write_text(json.dumps(asdict(config), indent=1) + "\n")


def load_config(path: str | Path) -> Config:
    """Reads a configuration that this or an earlier version saved.

    A field that is missing in the file has its default. The default of a new field must be the
    behavior before the field existed.

    Raises:
        InputError: the file is missing or damaged, or has fields that this version does not have.
    """
    try:
        plain = parse_json(read_regular(Path(path)))
        if lacking := _SECTIONS - set(plain):
            raise TypeError(f"it lacks {', '.join(sorted(lacking))}")
        return _from_plain(Config, plain)
    except OSError as error:
        raise InputError(
            f"No configuration at {path} ({error.strerror}); is this a run folder?"
        ) from error
    except InputError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a configuration of this version ({error}).") from error


def _from_plain(kind: Any, value: Any, name: str = "") -> Any:
    """Restores nested dataclasses and tuples from JSON values, and checks their types."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, dict) and (members := [each for each in kinds if is_dataclass(each)]):
        member: Any = max(members, key=lambda each: len(_names(each) & set(value)))
        hints = typing.get_type_hints(member)
        if unknown := sorted(set(value) - _names(member)):
            raise TypeError(f"{member.__name__} has no field {', '.join(unknown)}")
        prefix = f"{name}." if name else ""
        return member(
            **{part: _from_plain(hints[part], value[part], prefix + part) for part in value}
        )
    if not any(_matches(value, each) for each in kinds):
        raise TypeError(f"{name} is {str(value)[:40]!r}")
    return tuple(value) if isinstance(value, list) else value


def _matches(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type of a field."""
    if isinstance(kind, typing.TypeAliasType):
        kind = kind.__value__
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(
            _matches(part, typing.get_args(kind)[0]) for part in value
        )
    if kind is float:
        return type(value) in (int, float)
    return value is None if kind is types.NoneType else type(value) is kind


def _names(kind: Any) -> set[str]:
    return {item.name for item in fields(kind)}
