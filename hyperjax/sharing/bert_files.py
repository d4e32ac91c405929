"""Reading BERT's weights from safetensors files, as Hugging Face's library writes them; no network, no pickle.

D width, H heads, K width of a head.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from hyperjax.sharing.bert import BertConfig

SIZES = {  # names in config.json
    "vocabulary": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "length": "max_position_embeddings",
    "types": "type_vocab_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
LEFT_OUT = ("cls.", "embeddings.position_ids")  # heads of pre-training, and a list of numbers
INDEX = "model.safetensors.index.json"


def read_bert(path: Any, config: BertConfig | None = None) -> tuple[BertConfig, dict[str, Any]]:
    """Reads a BERT for `Bert(config).apply({"params": params}, tokens)`.

    Args:
        path: a directory with `config.json` and `model.safetensors`, or its index and several files; or one such file,
            with `config.json` beside it.
        config: sizes, in place of `config.json`. With maps, the weights that no layer uses are read all the same.

    Returns:
        (config, parameters in float32). Weights of pre-training's heads are left out; where the pooler's are missing,
        `config.pooler` is False.

    Raises:
        ValueError: there is no such file, it is truncated or none, its config is of another architecture, or tensors
            are missing, too many, or of other shapes; they are listed.
    """
    path = Path(path)
    files = _files(path)
    config = _config(path if path.is_dir() else path.parent) if config is None else config
    found: dict[str, np.ndarray] = {}
    for name, tensor in ((_name(name), tensor) for file in files for name, tensor in _tensors(file).items()):
        if name in found:
            raise ValueError(f"{path} holds {name} twice, expected it once, with or without the prefix 'bert.'")
        if not name.startswith(LEFT_OUT):
            found[name] = tensor
    config = dataclasses.replace(config, pooler=config.pooler and any(name.startswith("pooler.") for name in found))
    own = dataclasses.replace(config, attention_map=None, ffn_map=None, norm_map=None)  # as a file has them
    wanted = _wanted(own)
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    if missing or extra:
        lists = [f"{what}: {_listed(names)}" for what, names in (("missing", missing), ("extra", extra)) if names]
        raise ValueError(f"the tensors in {path} are not those of this BERT; {'; '.join(lists)}")
    flat: dict[str, Any] = {}
    for name, (place, shape, change) in wanted.items():
        if found[name].shape != shape:
            raise ValueError(f"{name} in {path} has shape {found[name].shape}, expected {shape}, by the config")
        if not jnp.issubdtype(found[name].dtype, jnp.floating):
            raise ValueError(f"{name} in {path} has type {found[name].dtype}, expected a floating type, as float32")
        flat[place] = jnp.asarray(change(np.asarray(found[name], np.float32)))
    return config, unflatten_dict(flat, sep="/")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} is no file, and holds no model.safetensors and no {INDEX}; give one of them")
    shards = _json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path / INDEX} has no weight_map from names of tensors to names of files")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise ValueError(f"{path / INDEX} names the file {name!r}, expected one that lies beside it")
    return [path / name for name in names]


def _config(folder: Path) -> BertConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}; give read_bert a config=BertConfig(...)")
    given = _json(file)
    kind, positions = given.get("model_type"), given.get("position_embedding_type", "absolute")
    if kind != "bert":
        raise ValueError(f"{file} says model_type {kind!r}, expected 'bert'; other architectures are not read")
    if positions != "absolute" or given.get("is_decoder"):
        what = "a decoder" if given.get("is_decoder") else f"{positions!r} positions"
        raise ValueError(f"{file} describes a BERT with {what}, expected an encoder with 'absolute' positions")
    lacking = [name for name in SIZES.values() if name not in given]
    if lacking:
        raise ValueError(f"{file} lacks {_listed(lacking)}")
    try:
        return BertConfig(**{ours: given[theirs] for ours, theirs in SIZES.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not fit: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, expected a JSON object")
    return found


def _tensors(file: Path) -> Mapping[str, np.ndarray]:
    import safetensors
    from safetensors.flax import load_file

    try:
        return {name: np.asarray(tensor) for name, tensor in load_file(file).items()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}; fetch it again") from None


def _name(name: str) -> str:
    """The tensor's name without the prefix that models with heads have, and with new names of normalisation."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _wanted(c: BertConfig) -> dict[str, tuple[str, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]]:
    """By name in the file: path of the parameter, shape in the file, and the change from one to the other."""
    d, h, k, f = c.width, c.heads, c.width // c.heads, c.ffn
    wanted: dict[str, tuple[str, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]] = {}

    def same(x: np.ndarray) -> np.ndarray:
        return x

    def norm(name: str, path: str) -> None:
        wanted[f"{name}.weight"], wanted[f"{name}.bias"] = (f"{path}/scale", (d,), same), (f"{path}/bias", (d,), same)

    for name, path, rows in (("word", "embedding", c.vocabulary), ("position", "position", c.length)):
        wanted[f"embeddings.{name}_embeddings.weight"] = (f"{path}/embedding", (rows, d), same)
    wanted["embeddings.token_type_embeddings.weight"] = ("type/embedding", (c.types, d), same)
    norm("embeddings.LayerNorm", "embedding_norm")
    for l in range(c.layers):
        layer, attention, ffn = f"encoder.layer.{l}", f"stack/attention_{l}", f"stack/ffn_{l}"
        for name in ("query", "key", "value"):
            of = f"{layer}.attention.self.{name}"
            wanted[f"{of}.weight"] = (f"{attention}/{name}", (d, d), lambda x: x.T.reshape(d, h, k))
            wanted[f"{of}.bias"] = (f"{attention}/{name}_bias", (d,), lambda x: x.reshape(h, k))
        of = f"{layer}.attention.output.dense"
        wanted[f"{of}.weight"] = (f"{attention}/out", (d, d), lambda x: x.T.reshape(h, k, d))
        wanted[f"{of}.bias"] = (f"{attention}/out_bias", (d,), same)
        norm(f"{layer}.attention.output.LayerNorm", f"stack/attention_norm_{l}")
        for of, name, shape in (("intermediate", "up", (f, d)), ("output", "down", (d, f))):
            wanted[f"{layer}.{of}.dense.weight"] = (f"{ffn}/{name}", shape, lambda x: x.T)
            wanted[f"{layer}.{of}.dense.bias"] = (f"{ffn}/{name}_bias", shape[:1], same)
        norm(f"{layer}.output.LayerNorm", f"stack/ffn_norm_{l}")
    if c.pooler:
        wanted["pooler.dense.weight"] = ("pooler/kernel", (d, d), lambda x: x.T)
        wanted["pooler.dense.bias"] = ("pooler/bias", (d,), same)
    return wanted


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
