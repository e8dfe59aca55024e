"""Traffic read from compiled programs whose collectives are known, over eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from befm_jax.planning import hlo

MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
# A float32 array of 8 x 16 x 32, cut over both axes: on each device 2,048 bytes of 16,384.
WHOLE, PART = 16_384, 2_048


def text_of(function, taken, given):
    mapped = jax.shard_map(function, mesh=MESH, in_specs=taken, out_specs=given, check_vma=False)
    x = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32, sharding=NamedSharding(MESH, taken))
    return jax.jit(mapped).lower(x).compile().as_text()


def gathered(x, axis):
    return jax.lax.all_gather(x, axis, axis=0, tiled=True)


CASES = {
    "gather over all": (
        lambda x: gathered(x, ("x", "y")), P(("x", "y")), P(), {"all-gather": WHOLE * 7 / 8},
    ),
    "gather over four": (
        lambda x: gathered(x, "y"), P("y"), P(), {"all-gather": WHOLE * 3 / 4},
    ),
    "sum over two": (
        lambda x: jax.lax.psum(x, "x"), P(("x", "y")), P("y"), {"all-reduce": 2 * PART / 2},
    ),
    "sum over all": (
        lambda x: jax.lax.psum(x, ("x", "y")), P(("x", "y")), P(), {"all-reduce": 2 * PART * 7 / 8},
    ),
    "sum and keep a part": (
        lambda x: jax.lax.psum_scatter(x, "y", scatter_dimension=1, tiled=True),
        P(("x", "y")), P("x", "y"), {"reduce-scatter": PART * 3 / 4},
    ),
    "exchange": (
        lambda x: jax.lax.all_to_all(x, "y", 1, 0, tiled=True),
        P(("x", "y")), P("x", "y"), {"all-to-all": PART * 3 / 4},
    ),
    "pass on": (
        lambda x: jax.lax.ppermute(x, "y", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        P(("x", "y")), P(("x", "y")), {"collective-permute": PART},
    ),
    "nothing": (lambda x: x * 2, P(("x", "y")), P(("x", "y")), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bytes_sent_are_those_of_a_ring(name):
    function, taken, given, expected = CASES[name]
    found = hlo.traffic(text_of(function, taken, given), 8)
    assert found.by_kind() == pytest.approx(expected)
    assert not any(found.between.values())


def test_a_loop_counts_as_often_as_it_turns_and_so_does_a_loop_in_it():
    def looped(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "y"), None), x, length=5)[0], None

        return jax.lax.scan(outer, x, length=3)[0]

    found = hlo.traffic(text_of(looped, P(("x", "y")), P(("x", "y"))), 8)
    assert found.by_kind() == {"all-reduce": pytest.approx(15 * 2 * PART * 3 / 4)}
    assert found.unknown_loops == 0


def test_a_loop_that_data_end_has_the_turns_that_it_is_given():
    def looped(x):
        return jax.lax.while_loop(lambda x: x[0, 0, 0] > 0, lambda x: jax.lax.psum(x, "y"), x)

    text = text_of(looped, P(("x", "y")), P(("x", "y")))
    found = hlo.traffic(text, 8, unknown_turns=7)
    assert found.by_kind() == {"all-reduce": pytest.approx(7 * 2 * PART * 3 / 4)}
    assert found.unknown_loops == 1


def test_between_slices_goes_what_every_chip_has_a_share_of():
    """Over two slices of four: a sum goes round in each, then quarters of it between them."""
    text = text_of(lambda x: jax.lax.psum(x, ("x", "y")), P(("x", "y")), P())
    found = hlo.traffic(text, 8, slices=2)
    assert found.within == {"all-reduce": pytest.approx(2 * PART * 3 / 4)}
    assert found.between == {"all-reduce": pytest.approx(2 * PART / 4 / 2)}
    text = text_of(lambda x: jax.lax.psum(x, "y"), P(("x", "y")), P("x"))
    assert not any(hlo.traffic(text, 8, slices=2).between.values())


# As compilers for TPU write them: loops without a number, groups as axes of a mesh.
TPU = """
HloModule jit_step

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%a, %b)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %gathered = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=2, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
  %reduced = (bf16[4,8]{1,0}, /*index=1*/bf16[2,8]{1,0}) all-reduce(%y, %z), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %next = (s32[], bf16[4,8]) tuple(%i, %gathered)
}

%first (x: bf16[4,8]) -> bf16[4,8] {
  ROOT %g.1 = bf16[16,8]{1,0} all-gather(%x), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
}

%then (x: bf16[4,8]) -> bf16[4,8] {
  ROOT %g.2 = bf16[16,8]{1,0} all-gather(%x), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (x: bf16[4,8]) -> bf16[1,8] {
  %r = bf16[4,8]{1,0} all-reduce(%x), channel_id=10, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = bf16[1,8] dynamic-slice(%r, %at), dynamic_slice_sizes={1,8}
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(80), backend_config={"a":[]}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit.1), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %piece.1 = bf16[4,8] fusion(%x), kind=kCustom, calls=%first
  %piece.2 = bf16[4,8] fusion(%piece.1), kind=kOutput, calls=%then
  %scattered = bf16[1,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %loop = (s32[], bf16[4,8]) while(%init), condition=%condition, body=%body
  ROOT %out = bf16[4,8] get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_text_of_a_tpu_compiler_is_read():
    gathered, reduced = 16 * 8 * 2 * 3 / 4, 2 * (4 * 8 + 2 * 8) * 2 * 3 / 4
    found = hlo.traffic(TPU, 8)
    assert found.by_kind() == {
        "all-reduce": 80 * reduced,
        # Those of the loop, one before it, and one in two pieces that are fused with other work.
        "all-gather": 82 * gathered,
        "reduce-scatter": 4 * 8 * 2 * 3 / 4,
    }
    # Devices are counted along `a` first; in the other form every second one is taken.
    assert hlo._groups(TPU.splitlines()[8], 8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert hlo._groups(TPU.splitlines()[9], 8).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_what_hosts_carry_between_tpu_slices_is_read():
    """An array that the hosts of two slices add up: every chip's is sent to its like."""
    text = """
ENTRY %main (x: bf16[5,8]) -> bf16[5,8] {
  %send = (bf16[5,8]{1,0}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %received = (bf16[5,8]{1,0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501
    found = hlo.traffic(text, 8, slices=2)
    assert found.between == {"all-reduce": 5 * 8 * 2}
    assert not any(found.within.values())


def test_groups_that_can_not_be_read_are_an_error():
    line = "  %x = f32[8] all-reduce(%y), replica_groups=something_new, to_apply=%add"
    with pytest.raises(ValueError, match="can't be read"):
        hlo._groups(line, 8)
