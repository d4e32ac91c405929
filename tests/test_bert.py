"""hyperjax.sharing.bert: equal to Hugging Face's library on a random model, parameter counts, files of all kinds."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyperjax import paramtree, sharing
from hyperjax.sharing import Bert, BertConfig, LowRank, Maps, read_bert

FIXTURE = Path(__file__).parent / "fixtures" / "tiny_bert"
KEY = jax.random.key(0)
SMALL = BertConfig(vocabulary=61, layers=3, width=32, heads=4, ffn=48, length=20)


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(FIXTURE / "expected.npz"))


@pytest.fixture(scope="module")
def read():
    return read_bert(FIXTURE)


@pytest.fixture
def tensors():
    return load_file(FIXTURE / "model.safetensors")


def written(folder, tensors, config=None, name="model.safetensors"):
    save_file(tensors, folder / name)
    settings = json.loads((FIXTURE / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("jit", [False, True])
def test_it_computes_what_the_library_does(read, expected, jit):
    config, params = read
    assert config == SMALL
    apply = jax.jit(Bert(config).apply) if jit else Bert(config).apply
    out = apply({"params": params}, expected["tokens"], mask=expected["mask"], types=expected["types"])
    np.testing.assert_allclose(out["features"], expected["features"], atol=1e-5)
    np.testing.assert_allclose(out["pooled"], expected["pooled"], atol=1e-5)
    states = [out["embedded"], *(layer["state"] for layer in out["layers"])]
    np.testing.assert_allclose(np.stack(states), expected["states"], atol=1e-5)


def test_padding_changes_nothing(read, expected):
    config, params = read
    other = np.where(expected["mask"], expected["tokens"], 7)
    found = [
        Bert(config).apply({"params": params}, tokens, mask=expected["mask"])["features"]
        for tokens in (expected["tokens"], other)
    ]
    np.testing.assert_allclose(*(x[expected["mask"]] for x in found), atol=1e-6)


def test_what_is_read_is_what_init_makes(read):
    config, params = read
    shapes = jax.eval_shape(Bert(config).init, KEY, jnp.zeros((1, 4), jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


def test_dropout_needs_a_key(read, expected):
    config, params = read
    model, tokens = Bert(dataclasses.replace(config, dropout=0.5)), expected["tokens"]
    whole = Bert(config).apply({"params": params}, tokens)["features"]
    np.testing.assert_array_equal(model.apply({"params": params}, tokens)["features"], whole)
    assert float(jnp.abs(model.apply({"params": params}, tokens, key=KEY)["features"] - whole).max()) > 0.1


def test_half_precision_keeps_parameters_whole(read, expected):
    config, params = read
    out = Bert(dataclasses.replace(config, dtype=jnp.bfloat16)).apply({"params": params}, expected["tokens"])
    assert out["features"].dtype == jnp.bfloat16
    whole = Bert(config).apply({"params": params}, expected["tokens"])["features"]
    assert float(jnp.abs(out["features"].astype(jnp.float32) - whole).mean()) < 0.1


def unique(maps, rank=None):
    """Parameters of BERT-base with these maps, and with residuals of a rank; nothing is computed."""
    model = Bert(BertConfig())
    through = None if rank is None else LowRank(rank)
    tokens = jnp.zeros((1, 8), jnp.int32)
    tied = sharing.tie(model, sharing.layer_ties(maps, through), tokens)
    native = Bert(maps.on(BertConfig()))
    counts = [paramtree.count(jax.eval_shape(net.init, KEY, tokens)["params"]) for net in (tied, native)]
    assert rank is not None or counts[0] == counts[1]
    return counts[0]


@pytest.mark.parametrize(
    ("maps", "millions"),
    [
        (Maps(), 109.5),
        (Maps.same(sharing.groups(12, 4)), 52.8),
        (Maps.same(sharing.groups(12, 3)), 45.7),
        (Maps(None, sharing.all_shared(12)), 57.5),
        (Maps.same(sharing.all_shared(12)), 31.5),
    ],
)
def test_berts_arithmetic(maps, millions):
    assert unique(maps) / 1e6 == pytest.approx(millions, abs=0.05)


def test_berts_arithmetic_with_residuals():
    assert unique(Maps()) == 109_482_240
    private_biases = 8 * (4 * 768 + 768 + 3072)
    four = Maps.same(sharing.groups(12, 4))
    assert unique(four, 16) == unique(four) + private_biases + 12 * 16 * (4 * 2 * 768 + 2 * (768 + 3072))
    assert unique(four, 16) / 1e6 == pytest.approx(55.5, abs=0.05)


def test_layers_can_share(read, expected):
    config, params = read
    same = Bert(dataclasses.replace(config, attention_map=(0, 1, 2), ffn_map=(0, 1, 2), norm_map=(0, 1, 2)))
    whole = Bert(config).apply({"params": params}, expected["tokens"])["features"]
    np.testing.assert_array_equal(same.apply({"params": params}, expected["tokens"])["features"], whole)
    maps = Maps.same((0, 0, 2))
    tied, start = sharing.convert(Bert(config), params, maps, expected["tokens"], aligned=True)
    native = Bert(maps.on(config))
    np.testing.assert_allclose(
        tied.apply({"params": start}, expected["tokens"])["features"],
        native.apply({"params": start}, expected["tokens"])["features"],
        atol=1e-6,
    )
    aligned = sharing.align_groups(params, maps)
    np.testing.assert_allclose(
        Bert(config).apply({"params": aligned}, expected["tokens"])["features"], whole, atol=1e-5
    )
    out = Bert(config).apply({"params": params}, expected["tokens"])
    assert sharing.cka_matrix(sharing.layer_features(out, "ffn")).shape == (3, 3)


def test_other_names_heads_and_half_precision(tmp_path, tensors, read):
    old = {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
    old |= {"cls.predictions.bias": np.zeros(61, np.float32), "bert.embeddings.position_ids": np.arange(20)[None]}
    config, params = read_bert(written(tmp_path, old))
    assert config == read[0]
    jax.tree.map(np.testing.assert_array_equal, params, read[1])
    for dtype in (np.float16, jnp.bfloat16):
        half = read_bert(written(tmp_path, {name: t.astype(dtype) for name, t in tensors.items()}))[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01, rtol=0.01), half, read[1])
        assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(np.float32)}


def test_several_files_and_one(tmp_path, tensors, read):
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weights = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    shutil.copy(FIXTURE / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read_bert(tmp_path)[1], read[1])
    jax.tree.map(np.testing.assert_array_equal, read_bert(FIXTURE / "model.safetensors")[1], read[1])
    for name in ("../a.safetensors", "c.safetensors"):
        index.write_text(json.dumps({"weight_map": weights | {names[0]: name}}))
        with pytest.raises(ValueError, match=f"names the file '{name}', expected one that lies beside it"):
            read_bert(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="holds list, expected a JSON object"):
        read_bert(tmp_path)


def test_a_file_without_pooler_or_config(tmp_path, tensors, expected):
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"there is no .*config\.json; give read_bert a config"):
        read_bert(tmp_path / "bare.safetensors")
    config, params = read_bert(tmp_path / "bare.safetensors", SMALL)
    assert not config.pooler
    assert "pooled" not in Bert(config).apply({"params": params}, expected["tokens"])


def test_missing_and_extra_tensors_are_listed(tmp_path, tensors):
    changed = {name: tensor for name, tensor in tensors.items() if "layer.2.attention.self.query" not in name}
    changed["encoder.layer.3.output.dense.bias"] = np.zeros(32, np.float32)
    with pytest.raises(
        ValueError, match=r"missing: .*layer\.2\.attention\.self\.query\.weight.*; extra: encoder\.layer\.3\.out"
    ):
        read_bert(written(tmp_path, changed))
    with pytest.raises(ValueError, match=r"missing: .*, \.\.\. \(16 in all\)"):
        read_bert(written(tmp_path, tensors, {"num_hidden_layers": 4}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "roberta"}, "says model_type 'roberta', expected 'bert'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' positions, expected an encoder"),
        ({"is_decoder": True}, "a BERT with a decoder"),
        ({"hidden_act": "swish"}, "does not fit: activation is 'swish', expected one of gelu"),
        ({"num_attention_heads": 5}, "does not fit: heads is 5, expected a divisor of the width 32"),
        ({"vocab_size": 62}, r"word_embeddings.weight in .* has shape \(61, 32\), expected \(62, 32\)"),
        ({"hidden_size": "wide"}, "does not fit: width is 'wide'"),
    ],
)
def test_other_configs_are_refused(tmp_path, tensors, config, message):
    with pytest.raises(ValueError, match=message):
        read_bert(written(tmp_path, tensors, config))


def test_tensors_twice_or_of_whole_numbers_are_refused(tmp_path, tensors):
    name = "embeddings.LayerNorm.weight"
    with pytest.raises(ValueError, match=f"holds {name} twice"):
        read_bert(written(tmp_path, tensors | {f"bert.{name}": 2 * tensors[name]}))
    with pytest.raises(ValueError, match=f"{name} in .* has type int32, expected a floating type"):
        read_bert(written(tmp_path, tensors | {name: tensors[name].astype(np.int32)}))


def test_broken_files_are_refused(tmp_path, tensors):
    folder = written(tmp_path, tensors)
    file, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for data in (whole[: len(whole) // 2], whole[:5], b"", b"no tensors at all, just text"):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="is no whole safetensors file") as error:
            read_bert(folder)
        assert "\n" not in str(error.value)
    file.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_bert(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="lacks vocab_size, num_hidden_layers"):
        read_bert(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json"):
        read_bert(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_map": (0, 1, 3)}, "ffn_map points to layer 3, expected 0 to 2"),
        ({"attention_map": (0, 1)}, "attention_map is .0, 1., expected a tuple of 3 numbers"),
        ({"layers": 0}, "layers is 0, expected a whole number from 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": None}, "dropout is None, expected a share"),
        ({"eps": 0}, "eps is 0"),
        ({"eps": "small"}, "eps is 'small', expected a small number"),
        ({"activation": ["gelu"]}, "activation is .'gelu'., expected one of gelu"),
        ({"dtype": jnp.int32}, "dtype is .*int32.*, expected a floating type"),
        ({"dtype": "half-way"}, "dtype is 'half-way', expected a floating type"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_bad_inputs_are_refused(read):
    config, params = read
    apply, tokens = Bert(config).apply, jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match="length 21, above the 20 rows"):
        apply({"params": params}, jnp.zeros((1, 21), jnp.int32))
    with pytest.raises(ValueError, match="tokens run from 0 to 61"):
        apply({"params": params}, tokens.at[0, 0].set(61))
    with pytest.raises(ValueError, match=r"types have shape \(2, 4\)"):
        apply({"params": params}, tokens, types=tokens[:, :4])
    with pytest.raises(ValueError, match="types have shape None and type list"):
        apply({"params": params}, tokens, types=[[0] * 5] * 2)
    with pytest.raises(ValueError, match="types run from 2 to 2, expected 0 to 1"):
        apply({"params": params}, tokens, types=tokens + 2)
    with pytest.raises(ValueError, match="mask has shape"):
        apply({"params": params}, tokens, mask=tokens)
