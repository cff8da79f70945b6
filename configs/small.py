"""The small family: the paper's four kinds of model at three sizes, for one CPU or one GPU.

Command: `python train.py KIND_SIZE`, such as `engram_2m`; kinds are dense, moe (a mixture of
experts), engram and over_encoding (the paper's baseline), sizes 2m, 10m and 100m, after the
parameters that a token activates besides the vocabulary.

All models of a size have the same backbone of latent attention, four residual branches and Muon,
and activate the same parameters: what reads the memory is taken from the leading dense layer. The
mixture of experts, Engram and OverEncoding have the same total, too: where there is memory, three
quarters of their sparse parameters are experts, and the rest are its tables (ρ = 0.75, the paper's
best).

| size | activated | dense | the other three, of them in tables | cost on two CPU cores |
|---|---|---|---|---|
| 2m | 1.6 M | 2.6 M | 8.6 M, 1.5 M | five minutes of 500 steps |
| 10m | 8.5 M | 10.5 M | 43.7 M, 8.3 M | 1.5 to 1.9 s a step |
| 100m | 114 M | 120 M | 587 M, 117 M | not trained yet |

Expect of 2m with `--train.steps 500`, held-out loss on prose in nats per token: dense 5.216 ±
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
    """A size of the family; what is not here follows.

    Attributes:
        width: model width D.
        layers: blocks.
        heads: attention heads, of 32 + 16.
        expert_width: inner width of an expert; a token has 6 and 2 shared ones.
        memory: the layer with Engram.
        row_width: width F of its rows.
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
_REPLACED = 12  # a quarter of the idle experts, which memory takes the place of
_COLUMNS = 16  # 8 heads of two orders
_BRANCHES = 4


def small_config(kind: Kind, size: str) -> Config:
    """A model of the family, called KIND_SIZE."""
    sizes, has_memory = _SIZES[size], kind in ("engram", "over_encoding")
    expert = 3 * sizes.width * sizes.expert_width * (sizes.layers - 1)  # of one, in all its layers
    memory_width = _COLUMNS * sizes.row_width
    rows = round(_REPLACED * expert / memory_width) if has_memory else 2
    # Keys of the branches and a value, or one projection, in columns of a feed-forward layer.
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
            scan=True,
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

# What the command line offers: for each name a line about it, and its configuration.
family = {
    f"{kind}_{size}": (
        f"Small family, {size.removesuffix('m')} M activated: {_WHAT[kind]}.",
        small_config(kind, size),
    )
    for size in _SIZES
    for kind in get_args(Kind.__value__)
}
