"""Weights that depend on the input: each layer's are a mixture of K shared sets, chosen by a router from the prompt.

B samples, L layers (of an array's axes: positions), K bases, D width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperjax import estimators
from hyperjax.sharing.layer_maps import groups
from hyperjax.transformer import Config, Decoder, Encoder

Array = jax.Array


class Mixture(nn.Module):
    """A Transformer of L layers over K sets of weights: for each sample, W_l = sum_k g_lk(x) W_k; norms are private.

    The router is one linear layer on the mean embedding of the first `prompt` tokens, so a decoder's outputs are causal
    from position `prompt` - 1 on: judge those. A sample's weights are mixed before they are used, which takes
    memory of the batch times L sets, and K / (2 positions) of the operations of a pass. It saves parameters, not time.

    Attributes:
        config: of the L layers, without maps; all layers of one size.
        bases: K, 1 to L.
        prompt: tokens that the router reads.
        causal: a `Decoder`, or an `Encoder`.
        hard: whether each layer takes one set, by straight-through Gumbel-softmax, rather than a mean.
        temperature: of the softmax; with `hard`, of its gradient.
        focus: at the start, the logit by which a layer prefers the set of its group of neighbours.

    Raises:
        ValueError: bases or prompt are out of range, or the config has maps or layers of several sizes.

    Reference: mixtures of parameters by input as in Yang et al., "CondConv" (2019), section 3, here across layers.
    """

    config: Config
    bases: int
    prompt: int = 16
    causal: bool = True
    hard: bool = False
    temperature: float = 1.0
    focus: float = 2.0

    @nn.compact
    def __call__(self, tokens: Array, key: Array | None = None) -> dict[str, Any]:
        """Runs the network.

        Args:
            tokens: [B, positions] int, more than `prompt`.
            key: PRNG key: of dropout, and of Gumbel noise if `hard`; without it, each layer takes its likeliest set.

        Returns:
            As the network's own call; and `gates` [B, L, K], which sum to 1 over K.

        Raises:
            ValueError: as its class says.
        """
        self._check(tokens)
        c, (layers, number) = self.config, (self.config.layers, self.bases)
        model = (Decoder if self.causal else Encoder)(c)
        params = self.param("model", lambda key: _stacked(model.init(key, tokens[:1, :2])["params"], layers, number))
        embedded = params["embedding"]["embedding"][tokens[:, : self.prompt]].mean(1).astype(jnp.float32)
        prior = np.zeros((layers, number), np.float32)
        prior[range(layers), groups(layers, number)] = self.focus
        logits = nn.Dense(layers * number, kernel_init=nn.initializers.zeros, name="router")(embedded)
        logits = logits.reshape(-1, layers, number) + prior[None]
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        if not self.hard:
            gates = jax.nn.softmax(logits / self.temperature)
        elif first is None:
            gates = jax.nn.one_hot(logits.argmax(-1), number)
        else:
            gates = estimators.gumbel_softmax(first, logits, self.temperature, hard=True)
        keys = None if rest is None else jax.random.split(rest, len(tokens))

        def one(tokens: Array, gates: Array, key: Array | None) -> Any:
            out = model.apply({"params": _mixed(params, gates)}, tokens[None], key=key)
            return jax.tree.map(lambda leaf: leaf[0], out)

        return {**jax.vmap(one)(tokens, gates, keys), "gates": gates}

    def _check(self, tokens: Array) -> None:
        c = self.config
        if not 1 <= self.bases <= c.layers:
            raise ValueError(f"bases is {self.bases}, expected 1 to {c.layers}, the number of layers")
        if not 1 <= self.prompt < tokens.shape[-1]:
            raise ValueError(f"prompt is {self.prompt}, expected 1 to {tokens.shape[-1] - 1}, below the tokens' length")
        if c.attention_map or c.ffn_map or c.norm_map or len({*c.heads_by_layer}) > 1 or len({*c.ffn_by_layer}) > 1:
            raise ValueError(
                "the config has maps or layers of several sizes, expected equal layers of their own weights"
            )


def _stacked(params: Any, layers: int, bases: int) -> Any:
    """Parameters with the weights of the first K layers along a new axis, and nothing of the others but norms."""
    flat, out = flatten_dict(params, sep="/"), {}
    for path, value in flat.items():
        kind, number, name = _layer_of(path)
        if kind is None:
            out[path] = value
        elif number == 0:
            out[f"bases/{kind}/{name}"] = jnp.stack([flat[f"stack/{kind}_{k}/{name}"] for k in range(bases)])
    return unflatten_dict(out, sep="/")


def _mixed(params: Any, gates: Array) -> Any:
    """Parameters of the network, each layer's mixed with its gates [L, K]."""
    out = {}
    for path, value in flatten_dict(params, sep="/").items():
        if not path.startswith("bases/"):
            out[path] = value
            continue
        _, kind, name = path.split("/", 2)
        mixed = jnp.tensordot(gates, value, 1)
        out |= {f"stack/{kind}_{l}/{name}": mixed[l] for l in range(len(gates))}
    return unflatten_dict(out, sep="/")


def _layer_of(path: str) -> tuple[str | None, int, str]:
    top, _, rest = path.partition("/")
    layer, _, name = rest.partition("/")
    kind, _, number = layer.rpartition("_")
    return (kind, int(number), name) if top == "stack" and kind in ("attention", "ffn") else (None, 0, "")
