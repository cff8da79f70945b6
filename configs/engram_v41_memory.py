"""The memory of DeepSeek-V4.1-Flash at its released sizes, in a small backbone; only to compile.

Command: `python -m engram_jax.ahead_of_time engram_v41_memory --topology v5p:4x8x8`.
Cost: two tables of 384 M rows of width 256, orders 2 to 4, 8 heads each.
Expect: the memory figures of docs/scale.md. The backbone is not the released one: do not train it.
"""

from engram_jax.config import Config, DataConfig, MemoryConfig
from engram_jax.layers.engram import EngramConfig
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.memory.layout import StorageConfig
from engram_jax.model import DecoderConfig
from engram_jax.optimizer import OptimizerConfig
from engram_jax.sharding import MeshConfig

config = Config(
    name="engram_v41_memory",
    model=DecoderConfig(
        vocabulary=129_280,
        width=5120,
        layers=15,
        attention=LatentAttentionConfig(),
        feed_forward=10_240,
        hyper_connections=HyperConnectionsConfig(),
        engram=EngramConfig(
            bias=False, convolution=False, norm_epsilon=1e-20, signed_root="copysign"
        ),
        tie_embeddings=False,
        dtype="bfloat16",
        remat="nothing_saveable",
        scan=True,
    ),
    memory=MemoryConfig(
        layers=(1, 14),
        max_order=4,
        rows_per_head=(16_000_000,) * 3,
        row_width=256,
        storage=StorageConfig(value="bfloat16", moments="bfloat16", second_moment="row"),
    ),
    data=DataConfig(
        sources=("corpus",), tokenizer="tokenizer.json", sequence_length=4096, batch_size=256
    ),
    optimizer=OptimizerConfig(matrices="muon", decay="steps"),
    mesh=MeshConfig(data=8, fsdp=32),
)
