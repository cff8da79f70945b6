"""Options of an evaluation: what it reads and writes, the mesh, the text, and the sample."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError
from engram_jax.files import expand_home
from engram_jax.sharding import MeshConfig, fit_mesh


@dataclass(frozen=True)
class EvalMesh:
    """Sizes of the mesh. If one is given, the others are 1, and data uses the remaining devices.

    Attributes:
        data: replicas of the parameters.
        fsdp: devices over which each replica of the parameters is split.
        expert: devices over which the experts of a layer are split.
        context: devices over which each sequence is split.
    """

    data: int | None = None
    fsdp: int | None = None
    expert: int | None = None
    context: int | None = None

    def resolve(self, trained: MeshConfig, rows: int) -> MeshConfig:
        """The mesh; if no size is given, one that fits the devices here.

        Args:
            trained: the mesh of the training.
            rows: rows of a batch.
        """
        given = {axis: size for axis, size in asdict(self).items() if size is not None}
        return MeshConfig(**given) if given else fit_mesh(trained, rows)


@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        run: the run folder that train.py wrote.
        step: step of the checkpoint; by default, the newest.
        sources: shipped corpora or paths whose held-out documents are scored; by default, those of
            the run.
        max_tokens: number of held-out tokens to score per source; by default, all.
        statistics: also report statistics of the memory; this reads the training text.
        output: folder to write to; by default, the run folder.
        text: text of the gate map; by default, the start of a held-out document.
        text_file: file with the text of the gate map (UTF-8).
        prompt: text to continue.
        sample_tokens: tokens of the continuation; 0: no continuation.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample from this many most likely tokens; by default, from all.
        seed: seed of the continuation.
        tasks: evaluate only these tasks of lm-evaluation-harness: names of shipped tasks
            (engram_jax/evaluation/tasks), or YAML files.
        batch_size: rows of a batch, over all devices; by default, the run's
            train.evaluate_batch_size, or those of a micro-batch.
        mesh: sizes of the mesh; by default, see below.
        distributed: join the other processes of a pod, SLURM job or cluster first
            (`jax.distributed.initialize`).
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    step: int | None = None
    sources: tuple[str, ...] = ()
    max_tokens: int | None = None
    statistics: bool = True
    output: Path | None = None
    text: str | None = None
    text_file: Path | None = None
    prompt: str = "The city of"
    sample_tokens: int = 60
    temperature: float = 0.8
    top_k: int | None = None
    seed: int = 0
    tasks: tuple[str, ...] = ()
    batch_size: int | None = None
    mesh: EvalMesh = field(default_factory=EvalMesh)
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def check(self) -> None:
        """Checks what can be checked without the run.

        Raises:
            InputError: an option is invalid, or the results cannot be written.
        """
        if not self.run.is_dir():
            raise InputError(f"There is no run folder {self.run}; train.py creates runs/NAME.")
        if not self.folder.is_dir():
            raise InputError(f"--output {self.folder} is no folder; create it first.")
        if not os.access(self.folder, os.W_OK):
            raise InputError(
                f"Cannot write to {self.folder} (no permission); give another folder with --output."
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"--max-tokens is {self.max_tokens}; score at least 1 token.")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        if self.sample_tokens < 0:
            raise InputError(f"--sample-tokens is {self.sample_tokens}; it must be 0 or more.")

    def sample_settings(self) -> GenerationSettings | None:
        """The settings of the sampled continuation; None: none is asked for.

        Raises:
            InputError: an invalid value.
        """
        if not self.sample_tokens:
            return None
        return GenerationSettings(
            tokens=self.sample_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        )

    @property
    def folder(self) -> Path:
        """The folder to write to."""
        return expand_home(self.output or self.run)

    def file(self, name: str) -> Path:
        """The file to write; a partial evaluation does not replace a complete one."""
        parts = self.sources, self.step is not None, self.max_tokens, not self.statistics
        stem, suffix = name.split(".")
        return self.folder / f"{stem}{'_part' if any(parts) else ''}.{suffix}"

    def gate_text(self) -> str | None:
        """The text that is given for the gate map, or None.

        Raises:
            InputError: it cannot be read, is empty, or is given twice.
        """
        if self.text_file is None:
            text = self.text
        elif self.text is not None:
            raise InputError("Give --text or --text-file, not both.")
        else:
            try:  # like a source: line ends stay, a byte order mark does not
                text = expand_home(self.text_file).read_bytes().decode("utf-8-sig")
            except OSError as error:
                raise InputError(f"Cannot read {self.text_file}: {error.strerror}.") from error
            except UnicodeDecodeError as error:
                raise InputError(f"{self.text_file} is not UTF-8; convert it.") from error
        if text is not None and not text.strip():
            raise InputError("The text for the gate map is empty; give a text, or omit the option.")
        return text
