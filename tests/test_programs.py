"""What is read out of a compiled program, against programs whose products and exchanges are known."""

import jax
import jax.numpy as jnp
import pytest

from hyperjax.training.programs import Collective, collectives, flops, product_flops

EXCHANGES = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%s), index=1
  %in_loop = f32[4]{0} all-reduce(%g), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%s, %in_loop)
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %w = (s32[], f32[4]{0}) while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %two = (f32[8]{0}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%x, %x), replica_groups=[2,4]<=[8], to_apply=%add
  %gather = f32[8]{0} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}
  %started = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %done = f32[8]{0} all-gather-done(%started)
  %alone = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %on = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %r = f32[8]{0} reduce-scatter(%x), replica_groups={}, dimensions={0}, to_apply=%add
}
"""


def test_reads_every_way_to_write_an_exchange():
    found = collectives(EXCHANGES, 8)
    assert sorted(found) == sorted(
        [
            Collective("all-reduce", 16, 2, 5),
            Collective("all-reduce", 32 + 12, 4, 1),
            Collective("all-gather", 32, 2, 1),
            Collective("all-gather", 32, 8, 1),
            Collective("collective-permute", 16, 8, 1),
            Collective("reduce-scatter", 32, 8, 1),
        ]
    )
    sent = {(each.kind, each.group): each.sent for each in found}
    assert sent["all-reduce", 2] == 5 * 2 * 16 / 2
    assert sent["all-gather", 8] == 32 * 7 / 8
    assert sent["reduce-scatter", 8] == 32 * 7  # of its input, an eighth of which is its result
    assert sent["collective-permute", 8] == 16


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_products_in_loops_count_as_often_as_they_run():
    w, x = jnp.ones((8, 8)), jnp.ones((3, 8))

    def nested(x, w):
        inner = lambda y: jax.lax.fori_loop(0, 4, lambda _, z: z @ w, y)  # noqa: E731
        last, each = jax.lax.scan(lambda y, _: (inner(y), jnp.tanh(y) @ w), x, None, 5)
        return last @ w, each

    assert product_flops(compiled(nested, x, w).as_text()) == (5 * 4 + 5 + 1) * 2 * 3 * 8 * 8


@pytest.mark.parametrize("batched", [False, True])
def test_without_loops_it_is_the_count_of_xla(batched):
    a, b = (jnp.ones((7, 4, 5)), jnp.ones((7, 5, 6))) if batched else (jnp.ones((40, 50)), jnp.ones((50, 60)))
    program = compiled(lambda a, b: jnp.tanh(a @ b), a, b)
    assert flops(program) == program.cost_analysis()["flops"]
    assert product_flops(program.as_text()) == 2 * (7 * 4 * 5 * 6 if batched else 40 * 50 * 60)
