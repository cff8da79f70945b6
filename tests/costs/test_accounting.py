"""Parameters, FLOPs and bytes, compared with published figures and manual counts; allocation."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import vary

from engram_jax.command_line import load_named_config
from engram_jax.config import Config
from engram_jax.costs import accounting
from engram_jax.costs.accounting import account, allocate, count_flops, main
from engram_jax.errors import InputError
from engram_jax.program import Program
from engram_jax.sharding import MeshConfig, make_abstract_mesh

# Billions, recomputed from the paper's table 5: total, activated, memory.
PUBLISHED = {
    "dense_4b": (4.119, 3.788, 0),
    "moe_27b": (26.702, 3.793, 0),
    "engram_27b": (26.710, 3.825, 5.79),
    "engram_40b": (39.452, 3.825, 18.53),
}


def short(name: str) -> Config:
    """With short sequences, because FLOPs are not tested here."""
    return vary(load_named_config(name), data={"sequence_length": 8})


@pytest.fixture
def without_flops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What they are takes most of the time of an account."""
    monkeypatch.setattr(accounting, "_flops_per_token", lambda _: (math.nan, math.nan))
    account.cache_clear()
    yield
    account.cache_clear()


@pytest.mark.usefixtures("without_flops")
@pytest.mark.parametrize(
    "name",
    [
        *("dense_4b", "engram_27b"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("moe_27b", "engram_40b")),
    ],
)
def test_published_parameter_counts(name: str) -> None:
    counted = account(short(name))
    total, activated, memory = PUBLISHED[name]
    assert counted.total / 1e9 == pytest.approx(total, rel=1e-3)
    assert counted.activated / 1e9 == pytest.approx(activated, rel=1e-3)
    assert counted.memory / 1e9 == pytest.approx(memory, rel=1e-3)
    assert counted.hyper_connections / 1e9 == pytest.approx(0.0147, rel=5e-3)


@pytest.mark.slow
def test_engram_27b_has_the_papers_allocation_and_the_flops_of_its_twin() -> None:
    engram, twin = (account(load_named_config(name)) for name in ("engram_27b", "moe_27b"))
    assert engram.allocation == pytest.approx(0.743, abs=5e-4)
    assert engram.sparse == pytest.approx(twin.sparse, rel=2e-3)
    for flops in ("forward_flops", "training_flops"):
        assert 1 < getattr(engram, flops) / getattr(twin, flops) < 1.01


def test_flops_of_a_dense_model_by_hand() -> None:
    config = load_named_config("dense")
    model, length = config.model, config.data.sequence_length
    attention = model.attention
    heads, pairs, width = attention.heads, attention.kv_heads, attention.head_width
    matrices = 2 * model.width * width * (heads + pairs) + 3 * model.width * model.feed_forward
    scores = 2 * heads * width * length
    by_hand = model.layers * (matrices + scores) + model.vocabulary * model.width
    counted = account(config)
    assert counted.forward_flops == 2 * by_hand
    # The backward pass has two products for each product of the forward pass.
    assert counted.training_flops == 3 * counted.forward_flops
    vectors = (2 * model.layers + 1) * model.width
    assert counted.backbone == model.layers * matrices + vectors
    assert counted.vocabulary == model.vocabulary * model.width


def test_flops_of_latent_attention_and_branches_by_hand() -> None:
    """Values are narrower than keys. Mixing branches is not a matrix product."""
    config = load_named_config("dense_2m")
    model, length = config.model, config.data.sequence_length
    sizes, branches, width = model.attention, model.branches, model.width
    key_width = sizes.head_width + sizes.rotary_width
    attention = (
        width * (sizes.heads * key_width + sizes.latent_width + sizes.rotary_width)
        + sizes.latent_width * sizes.heads * (sizes.head_width + sizes.value_width)
        + sizes.heads * sizes.value_width * width
    )
    scores = sizes.heads * (key_width + sizes.value_width) * length
    connections = 2 * branches * width * (2 * branches + branches**2)
    layer = attention + scores + 3 * width * model.feed_forward + connections
    assert account(config).forward_flops == 2 * (model.layers * layer + model.vocabulary * width)


def test_flops_of_experts_are_those_of_the_chosen() -> None:
    """And padding experts are not counted."""
    config = short("moe_2m")
    counted = account(config)
    experts = config.model.experts
    one = 3 * config.model.width * experts.width * (config.model.layers - 1)
    assert counted.experts == experts.routed * one
    assert counted.active_experts == experts.active * one
    fewer = vary(config, model={"experts": replace(experts, active=experts.active - 1)})
    assert counted.forward_flops - account(fewer).forward_flops == 2 * one
    padded = vary(config, model={"experts": replace(experts, multiple=16)})
    again = account(padded)
    assert padded.model.experts.stored > experts.routed
    assert (again.experts, again.total, again.training_flops) == (
        *(counted.experts, counted.total),
        counted.training_flops,
    )
    assert again.state_bytes > counted.state_bytes


def test_flops_of_loops_and_branches() -> None:
    square = jnp.zeros((4, 4))

    def program(x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    traced = jax.make_jaxpr(jax.checkpoint(jax.jit(program)))(square)
    assert count_flops(traced.jaxpr) == (5 + 2) * 2 * 4**3
    batched = jax.make_jaxpr(lambda x: jnp.einsum("bij,bjk->bik", x, x))(jnp.zeros((3, 4, 4)))
    assert count_flops(batched.jaxpr) == 3 * 2 * 4**3


# At 2 M, the routers, which a dense model does not have, are 2.1 % of the activated parameters.
@pytest.mark.parametrize(
    ("size", "activated"),
    [
        ("2m", 0.022),
        pytest.param("10m", 0.015, marks=pytest.mark.slow),
        pytest.param("100m", 0.015, marks=pytest.mark.slow),
    ],
)
def test_the_small_family_is_equal(size: str, activated: float) -> None:
    dense, moe, engram, over_encoding = (
        account(short(f"{kind}_{size}")) for kind in ("dense", "moe", "engram", "over_encoding")
    )
    for other in (dense, engram, over_encoding):
        assert other.activated == pytest.approx(moe.activated, rel=activated)
        assert other.forward_flops == pytest.approx(moe.forward_flops, rel=0.015)
    for other in (engram, over_encoding):
        assert other.total == pytest.approx(moe.total, rel=2e-3)
    assert engram.memory == pytest.approx(over_encoding.memory, rel=1e-3)
    assert engram.allocation == pytest.approx(0.75, abs=2e-3)


@pytest.mark.usefixtures("without_flops")
def test_state_is_divided_over_the_chips() -> None:
    config = short("engram_10m")

    def state_bytes(*mesh: int) -> int:
        counted = account(replace(config, mesh=MeshConfig(*mesh)))
        assert counted.chips == math.prod(mesh)
        return counted.state_bytes

    one = state_bytes(1, 1, 1)
    assert one / 2 < state_bytes(1, 2, 1) < 1.01 * one / 2
    # With several replicas, only the tables are split (records of 64 words).
    rows = Program.of_sizes(config, make_abstract_mesh(MeshConfig())).ngram_hash.padded_rows
    assert one - state_bytes(2, 1, 1) == sum(rows) * 64 * 4 // 2
    # With expert parallelism, experts are split, too: 8 bytes per parameter, with Muon's momentum.
    experts = account(config).experts
    assert state_bytes(2, 1, 1) - state_bytes(1, 1, 2) == experts * 8 // 2


@pytest.mark.usefixtures("without_flops")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_an_allocation_keeps_the_sparse_parameters(share: float) -> None:
    config = short("engram_10m")
    before, after = account(config), account(allocate(config, share))
    assert after.sparse == pytest.approx(before.sparse, rel=1e-3)
    assert after.activated == pytest.approx(before.activated, rel=0.01)  # routers differ
    one_expert = 3 * 256 * 128 * 7
    assert after.allocation == pytest.approx(share, abs=one_expert / before.sparse / 2 + 1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("without_flops")
def test_the_papers_allocation_gives_its_own_sizes() -> None:
    config = short("engram_27b")
    same = allocate(config, account(config).allocation)
    assert same.model.experts.routed == 55
    rows = same.memory.rows_per_head
    assert rows == pytest.approx((2_262_400,) * 2, rel=2e-4)  # sizes of heads are the next primes


@pytest.mark.usefixtures("without_flops")
@pytest.mark.parametrize("name", ["engram_10m", "over_encoding_10m"])
def test_all_to_experts_leaves_no_memory(name: str) -> None:
    pure = allocate(short(name), 1.0)
    assert pure.memory.layers == () and pure.model.experts.routed == 54
    counted, twin = account(pure), account(short("moe_10m"))
    assert counted.allocation == 1
    assert counted.activated == pytest.approx(account(short(name)).activated, rel=2e-4)
    # The dense twin's parameters, except for the difference in the router's width.
    assert counted.total == pytest.approx(twin.total, rel=2e-3)
    assert counted.activated == pytest.approx(twin.activated, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["engram_10m", "over_encoding_10m"])
def test_all_to_experts_has_the_flops_of_a_mixture_of_experts(name: str) -> None:
    counted, twin = account(allocate(short(name), 1.0)), account(short("moe_10m"))
    assert counted.forward_flops == pytest.approx(twin.forward_flops, rel=5e-3)


@pytest.mark.usefixtures("without_flops")
def test_all_to_experts_where_no_layer_is_dense() -> None:
    """Then no layer can be widened."""
    config = short("engram_10m")
    config = vary(config, model={"experts": replace(config.model.experts, leading_dense=0)})
    pure = allocate(config, 1.0)
    assert pure.model.feed_forward == config.model.feed_forward and pure.memory.layers == ()


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("default", 0.5, "default has no experts"),
        ("moe_10m", 0.5, "moe_10m has no memory"),
        ("engram_10m", 1.5, "between 0 and 1"),
        ("engram_10m", -0.1, "between 0 and 1"),
    ],
)
def test_impossible_allocations_are_refused(name: str, share: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        allocate(short(name), share)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["dense", "engram_2m", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == ["dense", "engram_2m"]
    assert lines[1]["total"] == account(load_named_config("engram_2m")).total
    main(["engram_2m", "--allocation", "0.5", "--mesh.fsdp", "2"])
    text = capsys.readouterr().out
    assert re.search(r" (49|50)\.\d% ", text) and text.splitlines()[1].split()[-1] == "2"
