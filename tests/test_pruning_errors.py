"""What hyperjax.pruning refuses: in one line that names the value, what was expected and the fix."""

import dataclasses

import jax
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
    cut,
    distillation,
    skip_decode,
)
from hyperjax.transformer import Config, Decoder, Gates

L = 6
C = Config(vocabulary=7, layers=2, width=8, heads=2, ffn=8, length=L, outputs=7)
TOKENS = np.random.default_rng(0).integers(0, 7, (2, L))
KEY = jax.random.key(0)
SHORT = dataclasses.replace(C, positions="learned", length=L - 1)
RAGGED = dataclasses.replace(C, heads=(2, 1), head_width=4)
NAN = float("nan")


@dataclasses.dataclass  # not frozen, and so without a hash
class Thawed:
    bias: float = 0.0

    def gates(self, key, logits, temperature=1.0):
        return logits

    def open(self, logits):
        return logits


def made(model, tokens=TOKENS, **more):
    """Only shapes: it refuses before anything is computed."""
    return jax.eval_shape(lambda: model.init(KEY, tokens, **more))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Gated(C, per="word"), "per is 'word', expected one of static, batch, sequence, token"),
        (lambda: Gated(C, prune=("neurons",)), r"prune is \('neurons',\), expected some of heads, blocks, layers"),
        (lambda: Gated(C, prune=()), r"prune is \(\), expected some of"),
        (lambda: Gated(C, blocks=3), "blocks is 3, which does not divide the feed-forward width 8; choose 2 or 4"),
        (lambda: Gated(C, blocks=0), "blocks is 0, which does not divide the feed-forward width 8"),
        (lambda: Gated(C, choice=TopK(3)), "keep is 3, above the number of units, 2; keep 2 or fewer"),
        (lambda: Gated(C, choice=GumbelSigmoid), "choice is .*GumbelSigmoid.*, expected one such as GumbelSigmoid"),
        (lambda: Gated(C, choice=Thawed()), "choice is Thawed.*, which has no hash; make its class frozen"),
        (lambda: Gated(C, choice=TopK(1), prune=("layers",)), "TopK chooses among the units .*; use GumbelSigmoid"),
        (lambda: Gated(C, per="sequence", after=2), "after is 2, expected a layer of 0 to 1"),
        (lambda: Gated(C, per="batch", prompt=0), "prompt is 0, expected 1 or more: a decoder decides from"),
        (lambda: Gated(C, per="batch", prompt=L), "the input has length 6, and the first 6 tokens decide; give more"),
        (lambda: Gated(C, seed=0), "seed is 0 and choice GumbelSigmoid.*, expected TopK"),
        (lambda: Gated(RAGGED), r"heads is \(2, 1\) and ffn 8, expected the same in all layers"),
        (lambda: Gated(SHORT, blocks=4), "length 6, above the 5 rows of the position table; cut it, raise `length`"),
        (lambda: Buckets(C, shares=(0.5, 0.25)), r"shares are \(0.5, 0.25\), expected rising numbers in \(0, 1\]"),
        (lambda: Buckets(C, shares=(0.5, 1.5)), r"shares are \(0.5, 1.5\), expected rising numbers in \(0, 1\]"),
        (lambda: Buckets(C, shares=(NAN, 1.0)), r"shares are \(nan, 1.0\), expected rising numbers in"),
        (lambda: Buckets(C, shares=()), r"shares are \(\), expected"),
        (lambda: Buckets(C, per="token"), "per is 'token', expected sequence or batch"),
        (lambda: Buckets(C, seed=1), "seed is 1 and budget None, expected both, for random buckets, or none"),
        (lambda: Buckets(C, prompt=2, seed=1, budget=1.5), "budget is 1.5, expected 0.8.* to 1.000, what the buckets"),
        (lambda: Buckets(C, prompt=2, seed=1, budget=NAN), "budget is nan, expected 0.8.* to 1.000"),
        (lambda: Buckets(C, prompt=L), "the input has length 6, and the first 6 tokens decide; give more tokens"),
        (lambda: Buckets(C, blocks=16), "blocks is 16, which does not divide the feed-forward width 8; choose 8"),
        (lambda: MixtureOfDepths(C, keep=0.0), r"keep is 0.0, expected a share of the positions in \(0, 1\]"),
        (lambda: MixtureOfDepths(C, keep=1.1), r"keep is 1.1, expected a share of the positions in \(0, 1\]"),
        (lambda: MixtureOfDepths(C, keep=NAN), "keep is nan, expected a share"),
        (lambda: MixtureOfDepths(C, every=3), "every is 3, expected 1 to 2, the number of layers"),
        (lambda: MixtureOfDepths(SHORT), "the input has length 6, above the 5 rows of the position table"),
        (
            lambda: Experts(C, routing="expert"),
            "'expert' in a causal model: .* decoding does not have yet; use routing=",
        ),
        (lambda: Experts(C, routing="hash"), "routing is 'hash', expected token or expert"),
        (lambda: Experts(C, keep=9), "keep is 9, above the number of units, 8; keep 8 or fewer"),
        (lambda: Experts(C, keep=0), r"keep is 0, expected a share in \(0, 1\] or a number of 1 or more"),
        (lambda: Experts(C, capacity=0), "capacity is 0, expected a number above 0, such as 1.25, or None for all"),
        (lambda: Experts(C, capacity=NAN), "capacity is nan, expected a number above 0"),
        (lambda: Experts(C, capacity="all"), "capacity is 'all', expected a number above 0"),
        (lambda: Experts(C, blocks=5), "blocks is 5, which does not divide the feed-forward width 8; choose 4 or 8"),
    ],
)
def test_settings(model, message):
    with pytest.raises(ValueError, match=message):
        made(model())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (lambda: TopK(0.0), r"keep is 0.0, expected a share in \(0, 1\]"),
        (lambda: TopK(1.5), r"keep is 1.5, expected a share in \(0, 1\]"),
        (lambda: TopK(NAN), "keep is nan, expected a share"),
        (lambda: TopK("half"), "keep is 'half', expected a share"),
        (lambda: TopK(-1), "keep is -1, expected a share"),
        (lambda: TopK(True), "keep is True, expected a share"),
        (lambda: GumbelSigmoid(start=1.0), r"start is 1.0, expected a probability inside of \(0, 1\)"),
        (lambda: Threshold(start=NAN), "start is nan, expected a probability"),
        (lambda: HardConcrete(beta=0.0), "beta is 0.0, expected above 0"),
        (lambda: HardConcrete(gamma=0.1), "gamma is 0.1, expected"),
        (lambda: HardConcrete(start=0.0), "0.0, expected"),
    ],
)
def test_choices(choice, message):
    with pytest.raises(ValueError, match=message):
        choice()


@pytest.mark.parametrize("model", [Gated(C), Buckets(C, prompt=2), MixtureOfDepths(C), Experts(C)])
def test_inputs(model):
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 6\) is given to a decoder, expected none"):
        made(model, mask=TOKENS > 0)
    with pytest.raises(ValueError, match=r"tokens have shape \(6,\) and type int64, expected .*\[batch, length\]"):
        made(model, TOKENS[0])
    with pytest.raises(ValueError, match="tokens run from 7 to 13, expected numbers from 0 to 6; a vocabulary of"):
        made(model, TOKENS + 7)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\) and type bool, expected bool \(2, 6\)"):
        made(model.clone(causal=False), mask=TOKENS[:, 1:] > 0)


def test_temperatures():
    model = Gated(C, blocks=4)
    for temperature in (0.0, NAN):
        with pytest.raises(ValueError, match=f"temperature is {temperature}, expected above 0 and finite"):
            made(model, key=KEY, temperature=temperature)
        with pytest.raises(ValueError, match=f"temperature is {temperature}, expected a number above 0, such as 2"):
            distillation(np.ones(3), np.ones(3), temperature)
    with pytest.raises(ValueError, match=r"the student's logits have shape \(3,\) and the teacher's \(4,\), expected"):
        distillation(np.ones(3), np.ones(4))


def test_compact():
    for per in ("batch", "sequence", "token"):
        with pytest.raises(ValueError, match=f"the gates are per {per}: what to cut depends .*; expected per='static'"):
            compact(Gated(C, per=per, prompt=2), {})
    model = Gated(C, blocks=4)
    variables = random_variables(model, TOKENS)
    shut = dict(variables["params"])
    for name in ("routers_heads", "routers_blocks"):
        shut[name] = jax.tree.map(lambda logits: np.full(logits.shape, -9.0, np.float32), shut[name])
    with pytest.raises(ValueError, match="every layer is closed: nothing is left to compute; raise the budget"):
        compact(model, {"params": shut})
    with pytest.raises(ValueError, match="multiple is 0, expected 1 or more"):
        compact(model, variables, multiple=0)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (Gates(tokens=np.ones((2, 2, L))), "gates of tokens depend on the input, and nothing can be cut out"),
        (Gates(heads=np.ones((2, 2, 2))), r"gates of heads have shape \(2, 2, 2\), expected 2 axes, 2 layers first"),
        (Gates(layer=np.ones(3)), r"gates of layer have shape \(3,\), expected 1 axes, 2 layers first"),
        (Gates(heads=np.ones((2, 3))), "3 gates for 2 heads, expected one for each"),
        (Gates(blocks=np.ones((2, 3))), "3 blocks do not divide 8 hidden units; choose a divisor"),
        (Gates(blocks=np.full((2, 4), NAN)), "gates of blocks are .*nan.*, expected finite numbers"),
        (Gates(layer=np.zeros(2)), "every layer is closed"),
    ],
)
def test_cut(gates, message):
    params = random_variables(Decoder(C), TOKENS)["params"]
    with pytest.raises(ValueError, match=message):
        cut(C, params, gates)
    tied = dataclasses.replace(C, ffn_map=(0, 0))
    with pytest.raises(
        ValueError, match="layers share weights, which gates of a layer cannot cut for one alone; untie"
    ):
        cut(tied, params, gates)


def test_bucket_server():
    model = Buckets(C, prompt=2, blocks=4, shares=(0.5, 1.0))
    variables = random_variables(model, TOKENS)
    server = BucketServer(model, variables)
    with pytest.raises(ValueError, match="2 sequences with a width each, expected one; use `each`, or per='batch'"):
        server(server.variables, TOKENS)
    for run in (server, server.each):
        with pytest.raises(ValueError, match="the input has length 2, and the first 2 tokens decide; give more tokens"):
            run(server.variables, TOKENS[:1, :2])
        with pytest.raises(ValueError, match=r"a mask of shape \(1, 6\) is given to a decoder, expected none"):
            run(server.variables, TOKENS[:1], TOKENS[:1] > 0)
        with pytest.raises(ValueError, match="tokens run from 7 to 12, expected numbers from 0 to 6"):
            run(server.variables, TOKENS[:1] + 7)
    with pytest.raises(ValueError, match="seed is 3: random buckets are to compare with; expected seed=None to serve"):
        BucketServer(model.clone(seed=3, budget=0.9), variables)
    model = model.clone(causal=False)
    server = BucketServer(model, random_variables(model, TOKENS))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\) and type int64, expected bool \(1, 6\)"):
        server(server.variables, TOKENS[:1], TOKENS)
    with pytest.raises(ValueError, match=r"config.outputs is None, expected the number of classes"):
        BucketServer(model.clone(config=dataclasses.replace(C, outputs=None)), server.variables["whole"])


def test_skip_decode():
    model, token, cache = MixtureOfDepths(C), TOKENS[:1, :1], Decoder(C).initialize_cache(1, 3)
    variables = random_variables(model, TOKENS)
    with pytest.raises(ValueError, match=r"the token has shape \(2, 1\), expected \(1, 1\): a batch cannot skip"):
        skip_decode(model, variables, TOKENS[:, :1], cache)
    unfit = [Gated(C), Gated(C, per="token"), Experts(C), Buckets(C), MixtureOfDepths(C, causal=False)]
    for other in (*unfit, MixtureOfDepths(C, seed=0)):
        with pytest.raises(ValueError, match="nothing to skip, expected a decoder that learned to: MixtureOfDepths"):
            skip_decode(other, variables, token, cache)
    with pytest.raises(ValueError, match="the cache has 3 positions, of which 3 are used, and 1 more come; give"):
        skip_decode(model, variables, token, cache._replace(used=np.int32(3)))
    with pytest.raises(ValueError, match="the cache holds 2 samples and the tokens have 1; give initialize_cache"):
        skip_decode(model, variables, token, Decoder(C).initialize_cache(2, 3))
