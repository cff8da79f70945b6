"""A run: a folder with a configuration, a tokenizer, corpora, checkpoints, and the program.

A run folder contains `config.json`, the tokenizer, `hash.json` (if the model has memory),
`texts.json` (fingerprints of the tokenized corpora), `versions.json`, `metrics.jsonl`, TensorBoard
event files, `checkpoints/`, and the results of evaluation.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from engram_jax.checkpoint import Checkpoints
from engram_jax.config import Config, load_config, save_config
from engram_jax.costs.memory import check_memory
from engram_jax.data.corpus import Corpus
from engram_jax.data.packing import ORDER
from engram_jax.data.pipeline import BatchIterator, make_batches, mix_rows
from engram_jax.data.token_cache import build_corpora
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.decoding.text import Continuation
from engram_jax.errors import InputError
from engram_jax.files import check_run_path, expand_home
from engram_jax.formats.safetensors import SINGLE
from engram_jax.formats.start_memory import open_start
from engram_jax.hashing import NgramHash
from engram_jax.identity import (
    check_fitting,
    check_same_run,
    check_saved_by,
    check_texts,
    checkpoint_identity,
    row_adam_facts,
    stored_hash,
)
from engram_jax.memory.layout import Table
from engram_jax.placement import (
    Stores,
    bytes_of_all,
    check_start_memory,
    save_stores,
    take_over,
)
from engram_jax.platforms import (
    check_evaluation_batch,
    check_training_batch,
    default_workers,
    without_foreign_kernels,
)
from engram_jax.processes import check_same_everywhere, collective, is_leader
from engram_jax.program import Program, make_config_row_adam
from engram_jax.run_folder import (
    check_empty,
    load_run_tokenizer,
    lock_run,
    make_hash,
    store_tokenizer,
    warn_of_settings,
    write_beginning,
)
from engram_jax.sharding import MeshConfig, batch_part, make_mesh, platform_of
from engram_jax.tokenizer import Tokenizer
from engram_jax.train_state import TrainState, Weights


@dataclass(frozen=True)
class Run:
    """A folder, a tokenizer and a program. Create one with `Run.start` or `Run.open`.

    Attributes:
        program: the computations on the devices.
        folder: the run folder.
        tokenizer: the tokenizer.
        checkpoints: the folder's checkpoints.
        start_from: folder of another run, with whose weights this run starts; None: random weights.
        start_step: step of that run's checkpoint; None: the newest.
    """

    program: Program
    folder: Path
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    start_from: Path | None = None
    start_step: int | None = None

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.program.config

    @classmethod
    def start(
        cls,
        config: Config,
        folder: str | Path,
        *,
        start_from: str | Path | None = None,
        start_step: int | None = None,
        reschedule: bool = False,
    ) -> "Run":
        """Creates the folder, or resumes the run in it if it has the same configuration.

        Args:
            config: the configuration.
            folder: the run folder.
            start_from: folder of another run, to start with its weights.
            start_step: step of that run's checkpoint; None: the newest.
            reschedule: also resume a run with another number of steps, other settings of the same
                optimizers, or another value of memory.frozen. The new configuration then replaces
                the folder's.

        Raises:
            InputError: the folder contains something else, the tokenizer does not fit the model,
                the mesh does not divide the sizes, the run has more steps than the configuration,
                or the other run's weights do not fit.
        """
        folder = expand_home(folder)
        start_from = None if start_from is None else expand_home(start_from)
        with collective(f"start the run in {folder}"):
            run = cls._check_start(config, folder, reschedule)
            done = run.checkpoints.steps()
            if done and done[-1] > config.train.steps:
                raise InputError(
                    f"{folder} is at step {done[-1]}, beyond train.steps {config.train.steps}; "
                    "raise train.steps."
                )
            run = replace(run, start_from=start_from, start_step=start_step)
            if start_from is not None and config.memory.start_from is not None and not done:
                raise InputError(
                    "--start-from takes the memory of that run; leave out --memory.start-from."
                )
            if start_step is not None and start_from is None:
                raise InputError("--start-step chooses a checkpoint of --start-from; give both.")
            if start_from is not None and not done:
                run.fitting(start_from).checkpoints.require(start_step)
        check_same_everywhere(
            done,
            f"The processes see different checkpoints in {folder}; it must be one folder that all "
            "of them share.",
        )
        with collective(f"write to {folder}"):
            if is_leader() and not (folder / "config.json").exists():
                run._write_beginning()
                warn_of_settings(config)
            elif is_leader():
                store_tokenizer(folder, run.tokenizer)
                if reschedule:
                    with lock_run(folder):
                        save_config(config, folder / "config.json")
        return run

    @classmethod
    def _check_start(cls, config: Config, folder: Path, reschedule: bool) -> "Run":
        """Creates the run without writing to its folder, so that an error leaves no folder."""
        check_run_path(folder)
        if not config.data.cache.strip():
            raise InputError("data.cache is empty; name a folder.")
        resumes = (folder / "config.json").exists()
        if resumes:
            check_same_run(config, folder, reschedule=reschedule)
        else:
            check_empty(folder)
        tokenizer, ngram_hash = make_hash(config, folder)
        if resumes and ngram_hash is not None:
            ngram_hash = stored_hash(ngram_hash, config, folder)
        mesh = make_mesh(config.mesh)
        check_training_batch(config, mesh)
        check_evaluation_batch(config, mesh)
        run = cls._assemble(folder, config, tokenizer, ngram_hash, mesh)
        batch_part(mesh)  # an error in the split of sequences over processes is found here
        check_memory(config, run.program.abstract_state(), mesh.size)
        make_config_row_adam(config)  # an error in its betas is found here
        start, width = config.memory.start_from, config.memory.row_width
        if steps := run.checkpoints.steps():
            check_start_memory(run.program, run.checkpoints.path(steps[-1]))
        elif start is not None and ngram_hash is not None:
            open_start(expand_home(start), ngram_hash, width)
        data = config.data
        mix_rows(run.corpora(), data.weights, data.sequence_length, config.train.seed)
        if resumes:
            check_texts(run._texts(), folder)
        return run

    def _write_beginning(self) -> None:
        parts = self.config, self.tokenizer, self.program.ngram_hash, self._texts()
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_run(self.folder):
            write_beginning(self.folder, *parts)

    def _texts(self) -> dict[str, Any]:
        """Fingerprints of the tokenizer and of the tokenized corpora, and the order of reading."""
        corpora = {corpus.name: corpus.folder.name for corpus in self.corpora()}
        return {"tokenizer": self.tokenizer.fingerprint, "corpora": corpora, "order": ORDER}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        mesh: MeshConfig | None = None,
        *,
        evaluate_batch_size: int | None = None,
    ) -> "Run":
        """Opens a run for reading. It may be from another mesh or platform.

        Args:
            folder: the run folder.
            mesh: sizes of the mesh, of which one process may leave devices out; None: one device.
            evaluate_batch_size: replaces that of the configuration.

        Raises:
            InputError: the folder holds no run or an export, its tokenizer is missing, or the mesh
                does not fit the devices, the model or a batch of an evaluation.
        """
        folder = expand_home(folder)
        if (folder / SINGLE).exists() and not (folder / "checkpoints").exists():
            raise InputError(
                f"{folder} is an export and no run; run python -m engram_jax.import_run {folder} "
                "RUN, and give RUN. (Its memory alone: --memory.start-from.)"
            )
        config = load_config(folder / "config.json")
        if evaluate_batch_size is not None:
            train = replace(config.train, evaluate_batch_size=evaluate_batch_size)
            config = replace(config, train=train)
        devices = jax.local_devices()[:1]
        if mesh is not None:
            config, devices = replace(config, mesh=mesh), jax.devices()
            if mesh.data != -1 and jax.process_count() == 1:
                devices = devices[: mesh.data * mesh.fsdp * mesh.expert * mesh.context]
        placed = make_mesh(mesh or MeshConfig(), devices)
        check_evaluation_batch(config, placed)
        config = without_foreign_kernels(config, platform_of(placed))
        config = replace(config, memory=replace(config.memory, placement="device"))
        tokenizer = load_run_tokenizer(config, folder)
        ngram_hash = NgramHash.load(folder / "hash.json") if config.memory.layers else None
        return cls._assemble(folder, config, tokenizer, ngram_hash, placed)

    @classmethod
    def _assemble(
        cls,
        folder: Path,
        config: Config,
        tokenizer: Tokenizer,
        ngram_hash: NgramHash | None,
        mesh: jax.sharding.Mesh,
    ) -> "Run":
        return cls(
            program=Program.build(config, ngram_hash, mesh),
            folder=folder,
            tokenizer=tokenizer,
            checkpoints=Checkpoints(
                folder / "checkpoints",
                keep=config.train.keep_checkpoints,
                identity=checkpoint_identity(tokenizer, ngram_hash, config.memory.layout),
            ),
        )

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Locks the folder, so that no other program trains in it.

        Raises:
            InputError: another program trains in it.
        """
        with ExitStack() as stack:
            with collective(f"train in {self.folder}"):
                if is_leader():
                    stack.enter_context(lock_run(self.folder))
                check_same_run(self.config, self.folder)  # another program may have replaced it
            yield

    def corpora(self, sources: Sequence[str] = ()) -> list[Corpus]:
        """The corpora of these sources. They are tokenized if they are not in the cache.

        Args:
            sources: shipped corpora or paths; by default, those of the run.

        Raises:
            InputError: a source cannot be read (see `build_corpora`), has no held-out documents, or
                has the same name as another.
        """
        return self._build(sources) if sources else list(self._own_corpora)

    @cached_property
    def _own_corpora(self) -> list[Corpus]:
        return self._build(self.config.data.sources)

    def _build(self, sources: Sequence[str]) -> list[Corpus]:
        data = self.config.data
        return build_corpora(sources, self.tokenizer, Path(data.cache), data.held_out)

    def batches(self, first_batch: int = 0) -> BatchIterator:
        """This process's training batches from `first_batch` on. Close them after use."""
        data, train = self.config.data, self.config.train
        workers = data.workers
        if workers is None:
            workers = default_workers(platform_of(self.program.mesh))
            if workers and is_leader():
                print(f"{workers} processes build batches (--data.workers).")
        return make_batches(
            self.corpora(),
            data.weights,
            sequence_length=data.sequence_length,
            batch_size=data.batch_size,
            accumulation=train.accumulation,
            seed=train.seed,
            planner=self.program.planner(),
            first_batch=first_batch,
            part=batch_part(self.program.mesh),
            workers=workers,
            prefetch=data.prefetch,
        )

    def describe_data(self) -> list[str]:
        """Lines that say what the run's steps read of each source, and how often."""
        data, train = self.config.data, self.config.train
        rows = mix_rows(self.corpora(), data.weights, data.sequence_length, train.seed)
        return rows.describe(train.steps * data.batch_size)

    def restore(self, step: int | None = None, stores: Stores | None = None) -> TrainState:
        """The state of the newest intact checkpoint, or of the checkpoint of `step`.

        If the checkpoint has another row optimizer or schedule, pending updates are applied to its
        tables under that schedule, with a message.

        Args:
            step: step of the checkpoint; None: the newest intact one.
            stores: empty stores, which get the rows; None: the state has tables on the devices.

        Raises:
            InputError: there is no checkpoint, it has another tokenizer, hash or model, or another
                run saved it.
        """
        abstract = self.program.on_device().abstract_state()
        found, state = self.checkpoints.restore(abstract, step)
        check_saved_by(self.config, self.checkpoints.path(found), trains=True)
        return replace(state, tables=self._tables(found, state.weights, stores))

    def restore_weights(
        self,
        step: int | None = None,
        stores: Stores | None = None,
        *,
        reset_rows: bool = False,
    ) -> Weights:
        """Like `restore`, without the state of the dense parameters' optimizer.

        Args:
            step: step of the checkpoint; None: the newest intact one.
            stores: as for `restore`.
            reset_rows: apply all pending updates, and reset the rows' moments and clocks, for a run
                that begins with these weights.
        """
        abstract = self.program.on_device().abstract_state().weights
        found, weights = self.checkpoints.restore(abstract, step, partial=True)
        if not reset_rows:  # otherwise these are the weights of another run
            check_saved_by(self.config, self.checkpoints.path(found), trains=False)
        tables = self._tables(found, weights, stores, reset=reset_rows)
        return replace(weights, tables=tables)

    def _tables(
        self, step: int, weights: Weights, stores: Stores | None, *, reset: bool = False
    ) -> dict[int, Table]:
        """The rows of a checkpoint as tables of this run, or in stores; then there are no tables.

        Args:
            step: step of the checkpoint.
            weights: what was restored; its tables have no arrays if their rows are in files.
            stores: as for `restore`.
            reset: as `reset_rows`.
        """
        folder = self.checkpoints.path(step)
        theirs = load_config(folder / "config.json")
        before = None
        if reset or row_adam_facts(theirs) != row_adam_facts(self.config):
            before = make_config_row_adam(theirs)
            if weights.tables and not reset and is_leader():
                print(
                    f"The checkpoint of step {step} in {self.checkpoints.folder} has another row "
                    "optimizer or schedule. All table rows are brought up to date under that first."
                )
        keep_moments = not (reset or self.config.memory.frozen)
        return take_over(self.program, folder, weights, before, keep_moments, stores)

    @cached_property
    def generator(self) -> Generator:
        """Continues prompts with the weights of the newest checkpoint."""
        return Generator(self.program.on_device(), self.tokenizer, self.restore_weights())

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[Continuation]:
        """Continues prompts with the newest checkpoint.

        Args:
            prompts: the texts.
            settings: those of `GenerationSettings`.
        """
        return self.generator.generate(prompts, GenerationSettings(**settings))

    def fitting(self, folder: Path) -> "Run":
        """Opens the run in another folder, after checking that this run can use its weights.

        Raises:
            InputError: there is no run, or it has another tokenizer or hash, or other sizes.
        """
        other = Run.open(folder)
        check_fitting(folder, (self.program, self.tokenizer), (other.program, other.tokenizer))
        return other

    def save(self, state: TrainState, stores: Stores | None = None, *, wait: bool = True) -> Path:
        """Saves the state as a checkpoint of its step, with what is needed to read it.

        If the run folder was moved or removed since, it says so: nothing is read from it.

        Args:
            state: the state.
            stores: the rows, if the tables are outside the devices.
            wait: until it is complete; otherwise see `Checkpoints.save`.
        """

        def write_files(folder: Path) -> None:
            save_config(self.config, folder / "config.json")
            if self.program.ngram_hash is not None:
                self.program.ngram_hash.save(folder / "hash.json")
            store_tokenizer(folder, self.tokenizer)

        gone = not (self.folder / "config.json").exists()
        if gone and is_leader() and not self.checkpoints.steps():
            print(
                f"{self.folder} was moved or removed: checkpoints go to a new folder there, with "
                "copies of configuration, tokenizer and hash.",
                file=sys.stderr,
            )
        return self.checkpoints.save(
            int(state.step),
            replace(state, tables={}) if stores else state,
            config=asdict(self.config),
            write_files=write_files,
            write_parts=lambda folder: save_stores(stores, folder) if stores else None,
            more_bytes=bytes_of_all(stores) if stores else 0,
            wait=wait,
        )
