"""No logit of a decoder that prunes itself knows a later token, of its own sequence or of another of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import random_variables

from hyperjax.pruning import (
    Buckets,
    BucketServer,
    Experts,
    Gated,
    GumbelSigmoid,
    HardConcrete,
    MixtureOfDepths,
    Threshold,
    TopK,
    compact,
    skip_decode,
)
from hyperjax.transformer import Config, Decoder

B, L, P, V = 2, 7, 3, 7
C = Config(vocabulary=V, layers=2, width=8, heads=2, ffn=8)
KEY = jax.random.key(0)
TEXT = np.random.default_rng(0).integers(0, V, (B, L))
DECIDES = dict(blocks=4, after=1, prompt=P)


def perturbed():
    """TEXT, and texts that differ in one sequence at position s, or from s on: [samples, B, L]; of each b and s."""
    texts, where = [TEXT], []
    for b in range(B):
        for s in range(L):
            for shift, end in ((1, s + 1), (3, L)):
                changed = TEXT.copy()
                changed[b, s:end] = (changed[b, s:end] + shift) % V
                texts.append(changed)
                where.append((b, s))
    return np.stack(texts), *np.array(where).T


TEXTS, CHANGED, SINCE = perturbed()


@functools.cache
def variables_of(model):
    with jax.ensure_compile_time_eval():  # numbers, also where it is first asked for in a trace
        return random_variables(model, TEXT)


@functools.cache
def run(model, **options):
    """Of every text, logits and gates."""

    @jax.jit
    @jax.vmap
    def every(tokens):
        out = model.apply(variables_of(model), tokens, **options)
        return out["logits"], out["gates"], out.get("dropped")

    return every(TEXTS)


def changes(logits):
    """How much each change moves logits at earlier positions of any sequence, [samples]; and all, [samples, B, L]."""
    moved = np.abs(np.asarray(logits)[1:] - np.asarray(logits)[:1]).max(-1)
    earlier = np.arange(L) < SINCE[:, None, None]
    return np.where(earlier, moved, 0).max((1, 2)), moved


def assert_causal(logits):
    before, moved = changes(logits)
    assert before.max() <= 1e-6
    own = moved[np.arange(len(CHANGED)), CHANGED]
    assert np.all(own[np.arange(len(own)), SINCE] > 1e-3)  # a change is felt where it may be
    return moved


def assert_varied(gates):
    """Some are open and some closed, and not the same in all texts, or this would say little."""
    values = np.concatenate([np.asarray(gate).reshape(len(TEXTS), -1) for gate in jax.tree.leaves(gates)], 1)
    assert 0 < (values == 0).mean() < 1
    assert np.any(values != values[:1])


BY_TOKEN = {
    "hard concrete": Gated(C, per="token", choice=HardConcrete(), blocks=4),
    "gumbel": Gated(C, per="token", choice=GumbelSigmoid(), blocks=4),
    "threshold": Gated(C, per="token", choice=Threshold(), blocks=4),
    "top-k": Gated(C, per="token", choice=TopK(0.5), blocks=4),
    "layers": Gated(C, per="token", prune=("layers",), blocks=4),
    "all": Gated(C, per="token", prune=("heads", "blocks", "layers"), choice=HardConcrete(), blocks=4),
    "depths": MixtureOfDepths(C, keep=0.4),
    "all depths": MixtureOfDepths(C, keep=0.4, every=1),
    "experts": Experts(C, blocks=4, keep=2),
}


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_decisions_by_token(kind):
    logits, gates, _ = run(BY_TOKEN[kind])
    moved = assert_causal(logits)
    assert_varied(gates)
    assert not np.any(moved[np.arange(len(CHANGED)), 1 - CHANGED])  # sequences do not know each other


def test_places_of_experts_go_to_earlier_tokens_of_any_sequence():
    for capacity, scarce in ((0.6, True), (2.0, False)):
        logits, _, dropped = run(Experts(C, blocks=4, keep=2), capacity=capacity)
        assert_causal(logits)
        assert np.all(dropped > 0) == scarce


BY_PROMPT = {
    "batch": Gated(C, per="batch", **DECIDES),
    "sequence": Gated(C, per="sequence", **DECIDES),
    "at once": Gated(C, per="sequence", blocks=4, after=0, prompt=P),
    "layers": Gated(C, per="sequence", prune=("heads", "layers"), **DECIDES),
    "top-k": Gated(C, per="sequence", choice=TopK(0.5), **DECIDES),
    "hard concrete": Gated(C, per="batch", choice=HardConcrete(), **DECIDES),
    "buckets": Buckets(C, shares=(0.5, 1.0), **DECIDES),
    "buckets of a batch": Buckets(C, shares=(0.5, 1.0), per="batch", **DECIDES),
}


@pytest.mark.parametrize("kind", BY_PROMPT)
def test_decisions_by_prompt(kind):
    model = BY_PROMPT[kind]
    logits, gates, _ = run(model)
    moved = assert_causal(logits)
    assert_varied(gates)
    others = moved[np.arange(len(CHANGED)), 1 - CHANGED]
    if model.per == "batch":  # a prompt moves what follows all prompts, and nothing else does
        assert not np.any(others[:, :P])
        assert np.any(others[SINCE < P])
        others = others[SINCE >= P]
    assert not np.any(others)
    for gate in jax.tree.leaves(gates):
        gate = np.asarray(gate)
        np.testing.assert_array_equal(gate[:, :, :, :P], 1)  # the prompt is computed whole
        np.testing.assert_array_equal(gate[1:][SINCE >= P], np.broadcast_to(gate[:1], gate[1:][SINCE >= P].shape))
    if "buckets" in kind:
        server = BucketServer(model, variables_of(model))
        serve = server if model.per == "batch" else server.each
        served = jax.jit(jax.vmap(lambda tokens: serve(server.variables, tokens)["logits"]))(TEXTS)
        assert_causal(served)


def test_static_decisions():
    model = Gated(C, choice=HardConcrete(), blocks=4)
    small = compact(model, variables_of(model))
    compacted = jax.jit(jax.vmap(lambda tokens: small.model.apply(small.variables, tokens)["logits"]))(TEXTS)
    for logits in (run(model)[0], compacted):
        assert not np.any(assert_causal(logits)[np.arange(len(CHANGED)), 1 - CHANGED])


@pytest.mark.parametrize("kind", ["depths", "layers"])
def test_decoding_that_skips_layers(kind):
    model = BY_TOKEN[kind]

    def decode(tokens):
        def step(cache, token):
            logits, cache, taken = skip_decode(model, variables_of(model), token[None, None], cache)
            return cache, (logits[0], taken)

        return jax.lax.scan(step, Decoder(C).initialize_cache(1, L), tokens)[1]

    logits, taken = jax.jit(jax.vmap(jax.vmap(decode)))(TEXTS)
    assert_causal(logits)
    assert 0 < np.mean(taken == 0) < 1


def test_what_looks_ahead_is_seen_to():
    for model, key in (
        (MixtureOfDepths(C, keep=0.4), KEY),  # training: the k largest scores
        (MixtureOfDepths(C, keep=0.4, causal=False), None),
        (Gated(C, causal=False, per="sequence", blocks=4), None),
    ):
        model = model if model.causal else model.clone(config=Config(**{**vars(C), "outputs": 3}))

        def last_state(tokens, model=model, key=key):
            return model.apply(variables_of(model), tokens, key)["features"]

        assert changes(jax.jit(jax.vmap(last_state))(TEXTS))[0].max() > 1e-2
    sequence = Gated(C, per="sequence", **DECIDES)  # where the prompt would gate itself as well
    gates = run(sequence)[1]
    assert np.any(np.asarray(gates.heads)[1:][SINCE < P] != np.asarray(gates.heads)[:1])


def test_random_decisions_know_no_token():
    for model in (MixtureOfDepths(C, keep=0.4, seed=0), Buckets(C, seed=0, budget=0.9, **DECIDES)):
        logits, gates, _ = run(model)
        assert_causal(logits)
        for gate in jax.tree.leaves(gates):
            np.testing.assert_array_equal(gate, np.broadcast_to(gate[:1], gate.shape))
        assert min(jnp.min(gate) for gate in jax.tree.leaves(gates)) == 0
