"""hyperjax.sharing: layer maps, layer ties, similarity, search."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import paramtree, sharing
from hyperjax.sharing import Maps, search
from hyperjax.transformer import Config, Decoder, EncoderDecoder

KEY = jax.random.key(0)
CONFIG = Config(vocabulary=13, layers=6, width=16, heads=2, ffn=32, length=12)
TOKENS = jax.random.randint(KEY, (2, 10), 0, 13)


def test_maps_are_those_of_the_papers():
    assert sharing.identity(4) == (0, 1, 2, 3)
    assert sharing.all_shared(4) == (0, 0, 0, 0)
    assert sharing.groups(12, 4) == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert sharing.groups(5, 2) == (0, 0, 0, 1, 1)
    assert sharing.sequence(6, 2) == (0, 0, 1, 1, 2, 2)
    assert sharing.cycle(6, 2) == (0, 1, 2, 0, 1, 2)
    assert sharing.middle_cycle(8, 2) == (0, 1, 2, 3, 1, 2, 3, 7)
    assert sharing.cycle_reverse(6, 2) == (0, 1, 2, 2, 1, 0)
    assert sharing.cycle_reverse(9, 3) == (0, 1, 2, 0, 1, 2, 2, 1, 0)
    assert sharing.cycle_reverse(3, 1) == (0, 1, 2)
    assert sharing.canonical((7, 7, 3, 7)) == (0, 0, 2, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sharing.cycle(7, 2), "2 loops over 7, expected a divisor"),
        (lambda: sharing.sequence(6, 0), "0 loops over 6"),
        (lambda: sharing.groups(4, 5), "5 groups of 4 layers, expected 1 to 4"),
        (lambda: sharing.middle_cycle(2, 1), "there are 2 layers, expected 3 or more"),
        (lambda: sharing.middle_cycle(7, 2), "between the first and last, 5"),
        (lambda: sharing.identity(0), "there are 0 layers"),
        (lambda: Maps((0, 1, 2, 3, 4, 6)).on(CONFIG), "the attention map points to layer 6, expected 0 to 5"),
        (lambda: Maps(None, (0, 1)).on(CONFIG), "the ffn map is .0, 1., expected a tuple of 6 numbers"),
        (lambda: sharing.layer_ties(Maps((0, -1))), "the attention map points to layer -1"),
        (lambda: dataclasses.replace(CONFIG, ffn_map=(0, 0, 0, 0, 0, 6)), "ffn_map points to layer 6, expected 0 to 5"),
    ],
)
def test_bad_maps_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_identity_map_is_the_plain_model():
    plain, variables = Decoder(CONFIG), Decoder(CONFIG).init(KEY, TOKENS)
    same = Decoder(Maps.same(sharing.identity(6)).on(CONFIG))
    np.testing.assert_array_equal(same.apply(variables, TOKENS)["logits"], plain.apply(variables, TOKENS)["logits"])
    tied = sharing.tie(plain, sharing.layer_ties(Maps.same(sharing.identity(6))), TOKENS)
    assert tied.links == ()
    np.testing.assert_array_equal(tied.apply(variables, TOKENS)["logits"], plain.apply(variables, TOKENS)["logits"])


@pytest.mark.parametrize("layer_map", [(0, 0, 0, 0, 0, 0), (0, 1, 2, 2, 1, 0), (0, 1, 1, 1, 4, 5)])
def test_ties_and_maps_are_one_network(layer_map):
    maps = Maps(layer_map, layer_map, (0, 0, 2, 2, 4, 4))
    tied, native = sharing.tie(Decoder(CONFIG), sharing.layer_ties(maps), TOKENS), Decoder(maps.on(CONFIG))
    variables = tied.init(KEY, TOKENS)
    assert jax.tree.structure(variables) == jax.tree.structure(native.init(KEY, TOKENS))
    a, b = tied.apply(variables, TOKENS), native.apply(variables, TOKENS)
    np.testing.assert_allclose(a["logits"], b["logits"], atol=1e-6)


def test_decoder_on_encoder():
    small = dataclasses.replace(CONFIG, layers=2)
    model = EncoderDecoder(small, dataclasses.replace(CONFIG, layers=4))
    tied = sharing.tie(model, sharing.decoder_on_encoder(small, model.decoder), TOKENS, TOKENS)
    variables = tied.init(KEY, TOKENS, TOKENS)
    stack = variables["params"]["decode"]["stack"]
    assert not [name for name in stack if name.startswith(("attention_0", "ffn_0", "ffn_3"))] or all(
        name.endswith("norm_0") for name in stack if name.startswith(("attention_0", "ffn_0"))
    )
    assert "cross_attention_3" in stack
    plain = model.apply(tied.untie(variables), TOKENS, TOKENS)
    np.testing.assert_allclose(tied.apply(variables, TOKENS, TOKENS)["logits"], plain["logits"], atol=1e-6)
    full = tied.expand(variables["params"])
    np.testing.assert_array_equal(full["decode"]["stack"]["ffn_3"]["up"], full["encode"]["stack"]["ffn_1"]["up"])
    with pytest.raises(ValueError, match="the encoder's ffn is 32 and the decoder's 64"):
        sharing.decoder_on_encoder(CONFIG, dataclasses.replace(CONFIG, ffn=64))


def test_one_wide_ffn_keeps_the_number_of_parameters():
    model = EncoderDecoder(CONFIG, CONFIG)
    wide = EncoderDecoder(*sharing.one_wide_ffn(CONFIG, CONFIG))
    assert wide.encoder.ffn == 12 * 32
    counts = [paramtree.count(jax.eval_shape(lambda m=m: m.init(KEY, TOKENS, TOKENS))) for m in (model, wide)]
    norms = 6 * 16  # of the decoder's networks that are gone
    assert counts[0] - counts[1] in (0, norms)
    half = sharing.one_wide_ffn(CONFIG, CONFIG, 0.5)[0]
    assert half.ffn == 6 * 32
    with pytest.raises(ValueError, match="share is 0"):
        sharing.one_wide_ffn(CONFIG, CONFIG, 0)


def test_cka_knows_rotations_and_scales():
    rng = np.random.default_rng(0)
    x, unrelated = rng.normal(size=(500, 8)).astype(np.float32), rng.normal(size=(500, 8)).astype(np.float32)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    assert float(sharing.linear_cka(x, -3 * x @ turn + 5)) == pytest.approx(1, abs=1e-5)
    assert float(sharing.linear_cka(x, x @ rng.normal(size=(8, 8)).astype(np.float32))) < 0.99
    assert float(sharing.linear_cka(x, unrelated)) < 0.05
    assert float(sharing.linear_cka(x, np.ones((500, 3), np.float32))) == 0
    a, b = x - x.mean(0), unrelated + x
    b = b - b.mean(0)
    gram = (a @ a.T * (b @ b.T)).sum() / (np.linalg.norm(a @ a.T) * np.linalg.norm(b @ b.T))  # HSIC, the other route
    assert float(sharing.linear_cka(x, unrelated + x)) == pytest.approx(float(gram), rel=1e-4)
    matrix = sharing.cka_matrix([x, unrelated + x, x @ turn])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert matrix[0, 1] == pytest.approx(float(gram), rel=1e-4)
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-5)
    assert matrix[0, 2] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="expected two of"):
        sharing.linear_cka(x, unrelated[:7])
    with pytest.raises(ValueError, match="there are no features"):
        sharing.cka_matrix([])


def test_features_are_gathered_in_one_pass():
    variables = Decoder(CONFIG).init(KEY, TOKENS)
    out = Decoder(CONFIG).apply(variables, TOKENS)
    for kind in ("state", "attention", "ffn"):
        matrix = sharing.cka_matrix(sharing.layer_features(out, kind))
        assert matrix.shape == (6, 6)
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)
    with pytest.raises(ValueError, match="layer 0 has no 'cross'"):
        sharing.layer_features(out, "cross")


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_alignment_undoes_a_permutation(kind, activation):
    config = dataclasses.replace(CONFIG, activation=activation, heads=4)
    variables = Decoder(config).init(KEY, TOKENS)
    layers = sharing.layers_of(variables["params"], kind)
    units = 4 if kind == "attention" else 32
    order, axes = np.roll(np.random.default_rng(1).permutation(units), 1), {"out": 0, "down": 0}
    shuffled = {name: jnp.take(w, order, axes.get(name, 1)) for name, w in layers[2].items()}
    jax.tree.map(np.testing.assert_array_equal, sharing.align(shuffled, layers[2]), layers[2])
    plain = sharing.weight_distances([layers[2], shuffled, layers[3]])
    aligned = sharing.weight_distances([layers[2], shuffled, layers[3]], aligned=True)
    assert aligned[0, 1] == 0 < plain[0, 1]
    assert (aligned <= plain + 1e-9).all()
    assert plain[0, 2] == pytest.approx(np.sqrt(2), rel=0.05)
    params = {**variables["params"], "stack": {**variables["params"]["stack"], f"{kind}_2": shuffled}}
    out = [Decoder(config).apply({"params": p}, TOKENS)["logits"] for p in (params, variables["params"])]
    np.testing.assert_allclose(*out, atol=1e-5)
    with pytest.raises(ValueError, match="there are no norm_0"):
        sharing.layers_of(variables["params"], "norm")


def planted(layers, groups, rng):
    cuts = sorted(rng.choice(np.arange(1, layers), groups - 1, replace=False).tolist())
    label = np.searchsorted(cuts, np.arange(layers), side="right")
    centres = 5 * rng.normal(size=(groups, 20))
    return label, [centres[k] + 0.1 * rng.normal(size=20) for k in label]


def test_the_search_recovers_planted_groups():
    rng = np.random.default_rng(0)
    for _ in range(20):
        label, layers = planted(12, 4, rng)
        expected = sharing.canonical(tuple(label.tolist()))
        distances = np.array([[np.linalg.norm(a - b) for b in layers] for a in layers])
        for cost in (search.residual(layers), search.medoid(distances), search.mean_pair(distances)):
            assert search.contiguous(cost, 12, 4) == expected
            assert search.greedy(cost, 12, 4) == expected
        mixed = rng.permutation(12)
        found = search.greedy(search.residual([layers[i] for i in mixed]), 12, 4)
        assert found == sharing.canonical(tuple(label[mixed].tolist()))


def test_dynamic_programming_is_exact_and_never_worse_than_greedy():
    rng = np.random.default_rng(1)
    strictly = 0
    for _ in range(100):
        d = rng.uniform(size=(8, 8))
        cost = search.medoid(d + d.T - np.diag(2 * np.diag(d)))
        for groups in (2, 3, 5):
            best = search.contiguous(cost, 8, groups)
            merged = search.greedy(cost, 8, groups, neighbours=True)
            assert search.total(cost, best) <= search.total(cost, merged) + 1e-12
            strictly += search.total(cost, best) < search.total(cost, merged) - 1e-9
            assert len(set(best)) == len(set(merged)) == groups
        cuts = min(
            (search.total(cost, tuple(max((0, *(c for c in chosen if c <= l))) for l in range(8))))
            for chosen in itertools.combinations(range(1, 8), 2)
        )
        assert search.total(cost, search.contiguous(cost, 8, 3)) == pytest.approx(cuts)
    assert strictly > 10


def test_private_layers_share_with_none():
    d = np.ones((6, 6)) - np.eye(6)
    for found in (
        search.contiguous(search.medoid(d), 6, 3, private=(0, 5)),
        search.greedy(search.medoid(d), 6, 3, private=(0, 5)),
    ):
        assert found == (0, 1, 1, 1, 1, 5)


def test_measured_losses_are_a_cost_and_each_group_is_tried_once():
    tried = []

    def evaluate(layer_map):
        tried.append(layer_map)
        return 1.0 + sum(abs(l - n) for l, n in enumerate(layer_map)) * 0.1

    cost = search.measured(evaluate, 5)
    assert search.contiguous(cost, 5, 3) in ((0, 0, 2, 2, 4), (0, 0, 2, 3, 3), (0, 1, 1, 3, 3))
    assert len(tried) == len(set(tried))
    assert (0, 1, 2, 3, 4) in tried
    assert cost((1, 2)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: search.contiguous(c, 6, 7), "7 groups of 6 layers with 0 private, expected 1 to 6"),
        (lambda c: search.contiguous(c, 6, 2, private=(0, 5)), "2 groups of 6 layers with 2 private, expected 3 to 6"),
        (lambda c: search.contiguous(c, 6, 3, private=(2,)), None),
        (lambda c: search.greedy(c, 6, 0), "0 groups"),
        (lambda c: search.greedy(c, 6, 2, private=(9,)), "private layer 9 is not among 0 to 5"),
        (lambda c: search.medoid(np.ones((2, 3))), r"distances have shape \(2, 3\)"),
        (lambda c: search.medoid(np.full((2, 2), np.nan)), "of finite numbers"),
    ],
)
def test_bad_searches_are_refused(call, message):
    cost = search.medoid(np.ones((6, 6)) - np.eye(6))
    if message is None:
        assert call(cost) == (0, 0, 2, 3, 3, 3)
        return
    with pytest.raises(ValueError, match=message):
        call(cost)
