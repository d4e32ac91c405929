"""A small Transformer that can be told what to leave out: gates of heads, blocks, layers and tokens, as data.

config = Config(vocabulary=98, layers=6, width=128, heads=4, ffn=512)
model = Decoder(config)
variables = model.init(key, tokens)
logits = model.apply(variables, tokens)["logits"]
gates = Gates(heads=jnp.ones((6, 4)).at[0, 2].set(0))  # without the third head of the first layer
logits = model.apply(variables, tokens, gates=gates)["logits"]

Example:
    >>> import jax, jax.numpy as jnp
    >>> from hyperjax.transformer import Config, Decoder, Gates
    >>> model, tokens = Decoder(Config(vocabulary=20, layers=1, width=16, heads=4, ffn=32)), jnp.zeros((1, 5), int)
    >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
    >>> closed = Gates(heads=jnp.zeros((1, 4)))  # [layers, heads]: no attention
    >>> out = jax.jit(model.apply)(variables, tokens, gates=closed)
    >>> out["logits"].shape, float(jnp.abs(out["layers"][0]["attention"]).max())
    ((1, 5, 20), 0.0)
"""

from hyperjax.transformer.config import Config
from hyperjax.transformer.decoding import generate
from hyperjax.transformer.gates import Chosen, Dispatch, Gates
from hyperjax.transformer.layers import Attention, FeedForward, Rotary, rotate
from hyperjax.transformer.model import Decoder, Encoder, EncoderDecoder
from hyperjax.transformer.stack import Cache, Context, LayerCache, Stack

__all__ = [
    "Attention",
    "Cache",
    "Chosen",
    "Config",
    "Context",
    "Decoder",
    "Dispatch",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "Gates",
    "LayerCache",
    "Rotary",
    "Stack",
    "generate",
    "rotate",
]
