"""The small family: the paper's four kinds of model at three sizes, for one CPU or one GPU.

Command: `python train.py KIND_SIZE`, such as `engram_2m`. Kinds are dense, moe (a mixture of
experts), engram and over_encoding (the paper's baseline). Sizes are 2m, 10m and 100m, named after
the parameters that a token activates, without the vocabulary.

All models of a size have the same backbone (latent attention, four residual branches, Muon), and
the same number of activated parameters: the parameters that read the memory are taken from the
leading dense layer. The mixture of experts, Engram and OverEncoding also have the same total. In
models with memory, three quarters of the sparse parameters are experts, and the rest are table rows
(ρ = 0.75, the paper's best).

| size | activated | dense | the other three, of them in tables | cost on two CPU cores |
|---|---|---|---|---|
| 2m | 1.6 M | 2.6 M | 8.6 M, 1.5 M | ten minutes on one core for 500 steps |
| 10m | 8.5 M | 10.5 M | 43.7 M, 8.3 M | 1.5 to 1.9 s per step (in a loop) |
| 100m | 114 M | 120 M | 587 M, 117 M | not trained yet |

Expect for 2m with `--train.steps 500`, held-out loss on prose in nats per token: dense 5.216 ±
0.005, moe 5.195 ± 0.012, over_encoding 5.210 ± 0.010, engram 5.100 ± 0.005. The larger sizes are
not trained yet.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from engram_jax.config import Config, MemoryConfig
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.model import DecoderConfig
from engram_jax.optimizer import OptimizerConfig

type Kind = Literal["dense", "moe", "engram", "over_encoding"]


@dataclass(frozen=True)
class _Size:
    """A size of the family. All other sizes follow from these.

    Attributes:
        width: model width D.
        layers: number of blocks.
        heads: attention heads, of width 32 + 16.
        expert_width: inner width of an expert; a token uses 6 routed and 2 shared experts.
        memory: the layer with Engram.
        row_width: width F of a table row.
    """

    width: int
    layers: int
    heads: int
    expert_width: int
    memory: int
    row_width: int


_SIZES = {
    "2m": _Size(width=128, layers=6, heads=4, expert_width=64, memory=1, row_width=10),
    "10m": _Size(width=256, layers=8, heads=8, expert_width=128, memory=1, row_width=21),
    "100m": _Size(width=768, layers=12, heads=24, expert_width=384, memory=1, row_width=42),
}
_ROUTED, _ACTIVE, _SHARED = 54, 6, 2
_REPLACED = 12  # a quarter of the idle experts; models with memory have table rows instead
_COLUMNS = 16  # 8 heads for each of two orders
_BRANCHES = 4


def small_config(kind: Kind, size: str) -> Config:
    """The configuration KIND_SIZE."""
    sizes, has_memory = _SIZES[size], kind in ("engram", "over_encoding")
    expert = 3 * sizes.width * sizes.expert_width * (sizes.layers - 1)  # parameters of one expert
    memory_width = _COLUMNS * sizes.row_width
    rows = round(_REPLACED * expert / memory_width) if has_memory else 2
    # Parameters that read the memory (keys of the branches and a value, or one projection), as
    # inner units of the feed-forward layer.
    reading = {"engram": _BRANCHES + 1, "over_encoding": 1}.get(kind, 0) * memory_width / 3
    return Config(
        name=f"{kind}_{size}",
        model=DecoderConfig(
            width=sizes.width,
            layers=sizes.layers,
            attention=LatentAttentionConfig(
                heads=sizes.heads,
                latent_width=sizes.width // 2,
                head_width=32,
                rotary_width=16,
                value_width=32,
            ),
            feed_forward=round((_ACTIVE + _SHARED) * sizes.expert_width - reading),
            experts=None
            if kind == "dense"
            else ExpertsConfig(
                routed=_ROUTED - _REPLACED if has_memory else _ROUTED,
                shared=_SHARED,
                active=_ACTIVE,
                width=sizes.expert_width,
            ),
            hyper_connections=HyperConnectionsConfig(branches=_BRANCHES),
            # On a CPU, a loop over the six blocks of 2m takes 1.25 times as long per step, and
            # compiles no faster. 10m was not measured. Longer programs compile in a loop.
            scan=size == "100m",
        ),
        memory=MemoryConfig(
            layers={"engram": (sizes.memory,), "over_encoding": (0,)}.get(kind, ()),
            fusion="over_encoding" if kind == "over_encoding" else "engram",
            rows_per_head=(rows, rows),
            row_width=sizes.row_width,
            adam=RowAdamConfig(factor=10.0),
        ),
        optimizer=OptimizerConfig(matrices="muon", learning_rate=1e-2),
    )


_WHAT = {
    "dense": "dense feed-forward layers, no memory",
    "moe": "a mixture of experts, no memory",
    "engram": "a mixture of experts and Engram",
    "over_encoding": "a mixture of experts and OverEncoding, the paper's baseline",
}

# For the command line: by name, a line of description and the configuration.
family = {
    f"{kind}_{size}": (
        f"Small family, {size.removesuffix('m')} M activated: {_WHAT[kind]}.",
        small_config(kind, size),
    )
    for size in _SIZES
    for kind in get_args(Kind.__value__)
}
