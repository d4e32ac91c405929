"""hyperjax/hypernet/image_models.py: published parameter counts, BatchNorm's statistics, pooling, a picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.hypernet import ConvTiles, HyperNetwork, Learned
from hyperjax.hypernet.image_models import ConvNet, WideResNet
from hyperjax.paramtree import count, select, structure

GROUPS = "^group.*/conv"


def shapes(model, *size):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *size), jnp.float32))


def static(model, size, rule, width):
    """A static hypernetwork for the kernels that a rule selects."""
    tiles = ConvTiles(tile=16, embedding=width, hidden=width)
    example = np.zeros((1, *size), np.float32)
    sizes = {"embedding_dim": width, "num_embeddings": 0}
    return HyperNetwork.from_target(model, example, **sizes, generator=Learned(), rules=[(rule, tiles)])


def split(hyper, size):
    """Parameters learned directly, embeddings of the tiles, and the generator that all tiles share."""
    params = structure(shapes(hyper, *size)["params"])
    tiles = next(i for i, made in enumerate(hyper.generators) if isinstance(made, ConvTiles))
    made = [spec for spec in params.specs if spec.path.startswith(f"generators_{tiles}/")]
    embeddings = sum(spec.size for spec in made if spec.path.endswith(".tiles"))
    whole = sum(spec.size for spec in params.specs)
    return whole - sum(spec.size for spec in made), embeddings, sum(spec.size for spec in made) - embeddings


class TestConvNet:
    def test_the_generated_kernel_of_mnist_is_the_papers(self):
        params = shapes(ConvNet(), 28, 28, 1)["params"]
        assert params["conv2"]["kernel"].shape == (7, 7, 16, 16)
        assert count(params["conv2"]["kernel"]) == 12_544
        learned, embeddings, shared = split(static(ConvNet(), (28, 28, 1), "^conv2/kernel$", 4), (28, 28, 1))
        assert embeddings + shared == 4_244
        assert learned == count(params) - 12_544 == 800 + 16 + 7_850

    def test_pooling_halves_twice_and_drops_an_odd_row(self):
        model = ConvNet(classes=3, features=2, kernel=3)
        images = jax.random.normal(jax.random.key(1), (2, 9, 13, 1))
        variables = model.init(jax.random.key(0), images)
        assert variables["params"]["head"]["kernel"].shape == (2 * 3 * 2, 3)
        # The last odd row lies within reach of the pooled ones, but only of those next to it.
        gradient = jax.grad(lambda x: model.apply(variables, x).sum())(images)
        assert np.any(gradient[:, 8])
        assert np.all(np.isfinite(gradient))

    def test_pooling_is_a_maximum(self):
        images = jnp.arange(2.0 * 4 * 4).reshape(2, 4, 4, 1) + 1
        model = ConvNet(classes=1, features=1, kernel=1)
        one = {"kernel": jnp.ones((1, 1, 1, 1)), "bias": jnp.zeros(1)}
        params = {"conv1": one, "conv2": one, "head": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}
        np.testing.assert_allclose(model.apply({"params": params}, images), [[16.0], [32.0]])

    def test_images_too_small(self):
        with pytest.raises(ValueError, match="images are 3 x 8, expected 4 x 4 or more"):
            shapes(ConvNet(), 3, 8, 1)


class TestWideResNet:
    # The paper's 0.563M and 0.097M are these sums for 40-1. For 40-2 it prints 2.236M and 0.148M, which are the same
    # networks without BatchNorm (5,408) and the last layer (1,290): 2,236,848, and 148,928 beside our 155,626.
    @pytest.mark.parametrize(
        ("width", "plain", "tiles", "learned", "papers", "left_out"),
        [(1, 563_930, 242, 6_362, (563, 97), 0), (2, 2_243_546, 966, 17_882, (2_236, 148), 5_408 + 1_290)],
    )
    def test_counts_are_the_papers(self, width, plain, tiles, learned, papers, left_out):
        model, size = WideResNet(40, width), (32, 32, 3)
        assert count(shapes(model, *size)["params"]) == plain
        parts = split(static(model, size, GROUPS, 64), size)
        assert parts == (learned, 64 * tiles, 75_920)
        assert ((plain - left_out) // 1000, (sum(parts) - left_out) // 1000) == papers

    def test_the_pattern_selects_the_3x3_kernels_of_the_groups(self):
        specs = {spec.path: spec for spec in structure(shapes(WideResNet(16, 2), 8, 8, 3)["params"]).specs}
        chosen = select(GROUPS, list(specs))
        assert len(chosen) == 3 * 2 * 2
        assert {specs[path].shape[:2] for path in chosen} == {(3, 3)}
        others = [path for path, spec in specs.items() if len(spec.shape) == 4 and path not in chosen]
        assert others == [f"group{g}_block1/shortcut/kernel" for g in (1, 2, 3)] + ["stem/kernel"]

    def test_training_uses_and_updates_the_statistics_of_the_batch(self):
        model = WideResNet(10, 1, classes=5)
        images = 3 * jax.random.normal(jax.random.key(1), (4, 8, 8, 2)) + 1
        variables = jax.jit(model.init)(jax.random.key(0), images)
        assert not any(np.any(mean) for mean in jax.tree.leaves(variables["batch_stats"]["norm"]["mean"]))
        run = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
        logits, changed = run(variables, images)
        assert logits.shape == (4, 5)
        stem = jax.lax.conv_general_dilated(
            images, variables["params"]["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        statistics = changed["batch_stats"]["group1_block1"]["norm1"]
        np.testing.assert_allclose(statistics["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-3)
        evaluated = jax.jit(model.apply)({**variables, **changed}, images[:1])
        assert np.all(np.isfinite(evaluated))

    @pytest.mark.parametrize(("depth", "width"), [(12, 1), (4, 1), (40, 0)])
    def test_impossible_sizes(self, depth, width):
        with pytest.raises(ValueError, match=f"depth {depth}, width {width}: expected a depth 6 n"):
            shapes(WideResNet(depth, width), 8, 8, 3)
