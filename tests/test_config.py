"""Configurations: files, checks, and that every named one can be built."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_runs import vary

from engram_jax.command_line import load_named_config, named_configs
from engram_jax.config import (
    Config,
    DataConfig,
    MemoryConfig,
    TrainConfig,
    load_config,
    save_config,
)
from engram_jax.costs.ahead_of_time import abstract_step
from engram_jax.errors import InputError
from engram_jax.layers.attention import AttentionConfig
from engram_jax.layers.engram import EngramConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.model import DecoderConfig
from engram_jax.optimizer import OptimizerConfig
from engram_jax.program import Program
from engram_jax.sharding import MeshConfig, make_abstract_mesh, make_mesh
from engram_jax.train_step import make_train_step

ROOT = Path(__file__).parent.parent
PAPER = load_named_config("engram_27b")
UNUSUAL = Config(
    name="unusual",
    model=DecoderConfig(
        layers=6,
        attention=AttentionConfig(heads=4, implementation="xla"),
        engram=EngramConfig(bias=False, signed_root="copysign"),
        dtype="bfloat16",
        tie_embeddings=False,
    ),
    memory=MemoryConfig(
        layers=(1, 4),
        max_order=4,
        rows_per_head=(100, 200, 300),
        adam=RowAdamConfig(factor=0.1 + 0.2),
    ),
    data=DataConfig(sources=("a.jsonl", "b.txt"), weights=(1 / 3, 2 / 3)),
    optimizer=OptimizerConfig(learning_rate=1e-30),
    train=TrainConfig(accumulation=4),
    mesh=MeshConfig(fsdp=2),
)


@pytest.mark.parametrize("config", [Config(), UNUSUAL, PAPER], ids=lambda config: config.name)
def test_file_round_trip(tmp_path: Path, config: Config) -> None:
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def change_file(path: Path, section: str | None, change: dict[str, Any]) -> None:
    document = json.loads(path.read_text())
    (document[section] if section else document).update(change)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("section", [None, "model", "memory", "train"])
def test_an_unknown_field_in_the_file_is_refused(tmp_path: Path, section: str | None) -> None:
    path = tmp_path / "config.json"
    save_config(Config(), path)
    change_file(path, section, {"stepz": 3})
    with pytest.raises(InputError, match=r"config\.json.*stepz"):
        load_config(path)


def test_a_field_that_an_older_file_lacks_takes_its_default(tmp_path: Path) -> None:
    path, latent = tmp_path / "config.json", LatentAttentionConfig(heads=3)
    config = vary(Config(), model={"attention": latent}, train={"seed": 7})
    save_config(config, path)
    document = json.loads(path.read_text())
    del document["train"]["steps"], document["model"]["attention"]["latent_width"]
    path.write_text(json.dumps(document))
    assert load_config(path) == config


def test_a_missing_section_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(Config(), path)
    document = json.loads(path.read_text())
    del document["train"]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="lacks train"):
        load_config(path)


def test_impossible_values_in_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(Config(), path)
    change_file(path, "train", {"accumulation": 3})
    with pytest.raises(InputError, match="accumulation 3"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"sources": "austen"}),
        ("data", {"pad_id": "x"}),
        ("data", {"cache": None}),
        ("model", {"width": 64.0}),
        ("model", {"dtype": "float7"}),
        ("model", {"scan": 1}),
        ("memory", {"rows_per_head": [100, "x"]}),
        ("memory", {"fusion": "nonsense"}),
    ],
)
def test_values_of_another_type_in_the_file_are_refused(
    tmp_path: Path, section: str, change: dict[str, Any]
) -> None:
    path = tmp_path / "config.json"
    save_config(Config(), path)
    change_file(path, section, change)
    with pytest.raises(InputError, match=f"{section}.{next(iter(change))} is"):
        load_config(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b'{"name": "a"}', b"[" * 100_000, b"9" * 5000],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(tmp_path / "config.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run folder"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("memory", {"layers": (4,)}, r"\[4\].*4 layers"),
        ("memory", {"layers": (1, 1)}, "distinct"),
        ("memory", {"layers": (-1,)}, "zero-based"),
        ("memory", {"heads": 0}, "head"),
        ("memory", {"max_order": 4}, "rows_per_head"),
        ("memory", {"max_order": 1, "rows_per_head": ()}, "orders start at 2"),
        ("memory", {"rows_per_head": (0, 1)}, "one row"),
        ("memory", {"row_width": 0}, "row_width"),
        ("memory", {"hash_seed": -1}, "seed"),
        ("memory", {"fusion": "over_encoding"}, "memory.layers to 0"),
        ("memory", {"fusion": "over_encoding", "layers": (0, 1)}, "memory.layers to 0"),
        ("memory", {"fusion": "added", "layers": (0,)}, "row_width.*192"),
        ("model", {"layers": 1}, "outside a model of 1"),
        ("model", {"layers": 0}, "at least 1"),
        ("model", {"width": 0}, "at least 1"),
        ("mesh", {"expert": 2}, "no experts"),
        ("model", {"experts": ExpertsConfig(leading_dense=4)}, "leading_dense"),
        ("optimizer", {"muon_momentum": 1.0}, "muon_momentum"),
        ("optimizer", {"muon_steps": 0}, "muon_steps"),
        ("optimizer", {"weight_decay": -0.1}, "weight_decay"),
        ("optimizer", {"final_fraction": -1.0}, "final_fraction"),
        ("data", {"sources": ()}, "at least one"),
        ("data", {"weights": (1.0,)}, "1 weights for 5"),
        ("data", {"sequence_length": 0}, "sequence_length"),
        ("data", {"batch_size": 0}, "batch_size"),
        ("data", {"held_out": 0.0}, "held_out"),
        ("data", {"held_out": 1.0}, "held_out"),
        ("optimizer", {"learning_rate": 0.0}, "learning_rate"),
        ("optimizer", {"clip_norm": -1.0}, "clip_norm"),
        ("optimizer", {"b2": 1.0}, "b2"),
        ("optimizer", {"eps": 0.0}, "eps"),
        ("optimizer", {"warmup_steps": -1}, "warmup_steps"),
        ("train", {"accumulation": 3}, "does not divide"),
        ("train", {"accumulation": 0}, "accumulation"),
        ("train", {"steps": 0}, "steps"),
        ("train", {"log_every": 0}, "log_every"),
        ("train", {"evaluate_tokens": 0}, "evaluate_tokens"),
        ("train", {"evaluate_every": -1}, "evaluate_every"),
        ("train", {"evaluate_batch_size": 0}, "evaluate_batch_size is 0"),
        ("train", {"checkpoint_every": -1}, "checkpoint_every"),
        ("train", {"keep_checkpoints": 0}, "keep_checkpoints"),
        ("train", {"steps": 10**14}, "below 2³¹"),
        ("train", {"seed": -1}, "seed"),
        ("train", {"seed": 2**40}, "seed is 1099511627776"),
        ("optimizer", {"learning_rate": math.nan}, r"optimizer\.learning_rate is nan"),
        ("optimizer", {"weight_decay": math.inf}, r"optimizer\.weight_decay is inf"),
        ("optimizer", {"matrix_factor": math.nan}, r"matrix_factor is nan"),
        ("optimizer", {"eps": 1e-60}, "no positive number of float32"),
        ("memory", {"init_scale": math.nan}, r"init_scale is nan"),
        ("memory", {"init_scale": -0.1}, "init_scale is -0.1"),
        ("model", {"norm_epsilon": 0.0}, "no positive number of float32"),
        ("model", {"attention": AttentionConfig(theta=math.nan)}, r"attention\.theta is nan"),
        ("data", {"sources": ("a", "b"), "weights": (1.0, math.inf)}, r"data\.weights is inf"),
        ("memory", {"hash_seed": 10**20}, "at most 18 digits"),
        ("optimizer", {"warmup_steps": 10**18}, "warmup_steps is 1000000000000000000.*2³¹"),
        ("data", {"batch_size": 10**18}, "batch_size is 1000000000000000000.*2³¹"),
        ("model", {"layers": 10**9}, "layers is 1000000000; give at most 1000"),
        ("memory", {"heads": 2000}, "heads is 2000; give at most 1000"),
        ("memory", {"heads": 10**6}, "2,000,000 heads in all layers is not supported"),
        ("data", {"workers": 10**9}, "workers is 1000000000; give at most 1000"),
        ("data", {"prefetch": 10**6}, "prefetch is 1000000; give at most 1000"),
    ],
)
def test_impossible_configurations_are_refused(
    section: str, change: dict[str, Any], message: str
) -> None:
    config = Config()
    with pytest.raises(InputError, match=message):
        replace(config, **{section: replace(getattr(config, section), **change)})


def test_the_least_values_that_are_allowed() -> None:
    Config(
        optimizer=OptimizerConfig(
            warmup_steps=0, final_fraction=0.0, weight_decay=0.0, eps=2.0**-126
        ),
        train=TrainConfig(steps=1, evaluate_every=0, checkpoint_every=0, seed=0),
    )


def test_row_updates_cannot_be_reversed() -> None:
    for factor in (-1.0, 0.0):
        with pytest.raises(InputError, match="factor is"):
            RowAdamConfig(factor=factor)


def on_eight_devices(config: Config) -> Program:
    small = MeshConfig(fsdp=2, expert=2 if config.model.experts else 1)
    short = {"batch_size": 8, "sequence_length": 128}
    config = replace(vary(config, data=short, train={"accumulation": 1}), mesh=small)
    return Program.of_sizes(config, make_mesh(small))


# One of each kind; the others differ in sizes.
KINDS = {"default", "over_encoding", "dense_2m", "moe_2m", "engram_2m", "engram_v41_memory"}
EVERY = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name in named_configs()
    ],
)


@EVERY
def test_every_named_configuration_builds(name: str, tmp_path: Path) -> None:
    """With abstract arrays, without creating parameters and tables."""
    config = load_named_config(name)
    assert config.name == name
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert set(on_eight_devices(config).abstract_state().tables) == set(config.memory.layers)
    chips = make_abstract_mesh(config.mesh).size
    assert config.micro_batch_size % chips == config.evaluate_batch_size % chips == 0


@EVERY
def test_the_training_step_of_every_named_configuration_keeps_the_states_types(name: str) -> None:
    """Other types, including weak types, would cause a second compilation."""
    config = load_named_config(name)
    if name not in ("default", "engram_2m"):  # equal blocks are traced once
        config = vary(config, model={"scan": True})
    program = on_eight_devices(config)
    with program.use_mesh():
        state, batch = abstract_step(program)
        new_state, metrics = jax.eval_shape(
            make_train_step(program), state, batch, program.abstract_row_adam()
        )
    types, new_types = (
        {
            jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.weak_type)
            for path, leaf in jax.tree.leaves_with_path(either)
        }
        for either in (state, new_state)
    )
    assert new_types == types
    assert metrics["loss"].shape == ()


def test_the_named_configurations_are_the_files_and_the_small_family() -> None:
    files = {path.stem for path in (ROOT / "configs").glob("[!_]*.py")} - {"small"}
    kinds, sizes = ("dense", "moe", "engram", "over_encoding"), ("2m", "10m", "100m")
    assert set(named_configs()) == files | {f"{kind}_{size}" for kind in kinds for size in sizes}
