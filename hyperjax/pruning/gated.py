"""A Transformer that opens and closes its heads, feed-forward blocks and layers.

B samples, L positions, D width, H heads, N blocks of a feed-forward network, U units of any kind.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.pruning.choices import Choice, GumbelSigmoid, TopK
from hyperjax.pruning.flops import costs, share
from hyperjax.pruning.routers import Router, Static, after_prompt, check_per, mask_options, pool, seeded
from hyperjax.transformer import Config, Decoder, Encoder, Gates

Array = jax.Array
PRUNABLE = ("heads", "blocks", "layers")
HIDDEN = 32  # width inside of the router of a pooled state


class Gated(nn.Module):
    """A decoder or encoder whose gates are learned: for all inputs, by batch, by sequence, or by token.

    Multiplying by a gate saves nothing: it trains. What saves time: `compact` for static gates; `lax.cond` decoding
    (`skip_decode`) for layers by token. Gates of heads and blocks by sequence or token are a training device and a
    yardstick; `Buckets`, `Experts` and `MixtureOfDepths` decide in shapes that a machine can skip.

    A decoder decides by batch or sequence from the state of its prompt, which is computed whole, for what follows it.

    Attributes:
        config: sizes; equal in all layers.
        causal: whether it is a decoder.
        prune: of "heads", "blocks" and "layers".
        per: what has gates of its own: "static" (all inputs the same), "batch", "sequence" or "token".
        choice: how logits become gates.
        blocks: number of blocks of each feed-forward network.
        after: by batch or sequence: number of layers, computed whole, whose state decides for the others.
        prompt: by batch or sequence, of a decoder: number of tokens that decide.
        seed: of gates drawn at random, to compare with; with `TopK`. None learns.

    Raises:
        ValueError: a setting is out of range, or blocks do not divide the feed-forward networks.
    """

    config: Config
    causal: bool = True
    prune: tuple[str, ...] = ("heads", "blocks")
    per: str = "static"
    choice: Choice = GumbelSigmoid()
    blocks: int = 8
    after: int = 1
    prompt: int = 32
    seed: int | None = None

    def setup(self) -> None:
        c = self.config
        check_per(self.per, self.causal, self.after, c.layers, self.prompt)
        check_sizes(c, self.blocks)
        if isinstance(self.choice, type) or not isinstance(self.choice, Choice):
            raise ValueError(
                f"choice is {self.choice!r}, expected one such as GumbelSigmoid(), with bias, gates and open"
            )
        odd = [name for name in self.prune if name not in PRUNABLE]
        if odd or not self.prune:
            raise ValueError(f"prune is {self.prune}, expected some of {', '.join(PRUNABLE)}")
        try:
            hash(self.choice)
        except TypeError as error:
            raise ValueError(f"choice is {self.choice!r}, which has no hash; make its class frozen") from error
        if isinstance(self.choice, TopK):
            for name in self.prune:
                self.choice.number(self._units(name))
            if "layers" in self.prune:
                raise ValueError("TopK chooses among the units of a layer, not among layers; use GumbelSigmoid")
        elif self.seed is not None:
            raise ValueError(
                f"seed is {self.seed} and choice {self.choice}, expected TopK: only it keeps a budget at random"
            )
        self.model = (Decoder if self.causal else Encoder)(c)
        start, names = self.choice.bias, list(enumerate(self.prune))
        layers = c.layers - self.after if self.per in ("batch", "sequence") else c.layers
        self.routers: dict[str, Any]
        if self.per == "static":
            self.routers = {n: Static(layers, self._units(n), start, seed=seeded(self.seed, i)) for i, n in names}
        elif self.per == "token":
            self.routers = {
                f"{n}_{l}": Router(self._units(n), None, start, seeded(self.seed, i * layers + l))
                for i, n in names
                for l in range(layers)
            }
        else:
            self.routers = {n: Router(layers * self._units(n), HIDDEN, start, seeded(self.seed, i)) for i, n in names}

    def __call__(
        self,
        tokens: Array,
        key: Array | None = None,
        *,
        mask: Array | None = None,
        temperature: Any = 1.0,
        settled: Any = False,
    ) -> dict[str, Any]:
        """Runs the network.

        Args:
            tokens: [B, L] int.
            key: PRNG key of gates and dropout, for training; without it gates are those that are served.
            mask: [B, L] bool, False for padding; of encoders.
            temperature: of the choice.
            settled: whether gates are those that are served although there is a key; may be traced. For the last steps
                of training, so that the network learns to do without noise what it will do.

        Returns:
            What the Transformer returns; `gates`, of all layers; `opened`, the same 0 or 1 as they are served, with the
            gradient of the probabilities to be open; `share` of the operations that those leave, scalar or [B]: steer
            it by `hyperjax.budget.lagrangian`; `losses`: empty.

        Raises:
            ValueError: tokens are no whole numbers [B, L], a mask is given to a decoder or is of another shape, or, by
                batch or sequence, a decoder's input is no longer than its prompt.
        """
        gate_key, drop_key = (None, None) if key is None else tuple(jax.random.split(key))
        decided: dict[int, tuple[Gates, Gates]] = {}

        def decide(number: int, x_BLD: Array) -> Gates:
            if self.per == "token":
                logits = {n: self._logits(f"{n}_{number}", x_BLD, gate_key, number) for n in self.prune}
                decided[number] = self._choose(logits, gate_key, number, temperature, settled)
            elif self.per != "static" and number == self.after:
                pooled = pool(x_BLD, self.per, mask, self.prompt if self.causal else None)
                for name in self.prune:
                    flat = self._logits(name, pooled, gate_key, number)
                    made[name] = flat.reshape(*flat.shape[:-1], -1, self._units(name)).swapaxes(0, 1)
            if self.per != "token":
                first = 0 if self.per == "static" else self.after
                if number < first:
                    decided[number] = (self._all_open(tokens.shape), self._all_open(tokens.shape))
                else:
                    logits = {n: logits[number - first] for n, logits in made.items()}
                    decided[number] = self._choose(logits, gate_key, number, temperature, settled, tokens.shape)
            return decided[number][0]

        made: dict[str, Array] = {n: self.routers[n]() for n in self.prune} if self.per == "static" else {}
        options = mask_options(mask, self.causal)
        out = self.model(tokens, gates=decide, key=drop_key, **options)
        gates, opened = (jax.tree.map(lambda *each: jnp.stack(each), *(d[i] for d in decided.values())) for i in (0, 1))
        whole = costs(self.config, tokens.shape[1], causal=self.causal)
        counted = share(whole, opened, mask, all_keys=self.per == "token")
        return {**out, "gates": gates, "opened": opened, "share": counted, "losses": {}}

    def decide_one(self, number: int, x_BLD: Array) -> Array:
        """What each position's updates in a layer are multiplied by, [B, L]; of gates of layers per token."""
        return self.choice.gates(None, self._logits(f"layers_{number}", x_BLD, None, number))[..., 0]

    def _units(self, name: str) -> int:
        return {"heads": self.config.heads_by_layer[0], "blocks": self.blocks, "layers": 1}[name]

    def _logits(self, name: str, x: Array, key: Array | None, number: int) -> Array:
        return self.routers[name](x, None if key is None else _key(key, name, number))

    def _choose(
        self,
        logits: dict[str, Array],
        key: Array | None,
        number: int,
        temperature: Any,
        settled: Any,
        shape: tuple | None = None,
    ) -> tuple[Gates, Gates]:
        """Gates of a layer, and what of them is open as it is served."""
        drawn, opened = {}, {}
        for name, values in logits.items():
            # random logits are noise enough, and those of static gates stay what is served
            key_of = None if key is None or self.seed is not None else _key(jax.random.fold_in(key, 1), name, number)
            gates = self.choice.gates(key_of, values, temperature)
            if key_of is not None and settled is not False:
                gates = jnp.where(settled, self.choice.gates(None, values), gates)
            pair: tuple[Array, ...] = gates, self.choice.open(values)
            if shape is not None and self.per != "static":
                pair = tuple(jnp.broadcast_to(gate, (shape[0], gate.shape[-1])) for gate in pair)
                if self.causal:
                    pair = tuple(after_prompt(gate, shape[1], self.prompt) for gate in pair)
            if name == "layers":
                pair = tuple(gate[..., 0] for gate in pair)
                name = "tokens" if pair[0].ndim == 2 else "layer"
            drawn[name], opened[name] = pair
        return Gates(**drawn), Gates(**opened)

    def _all_open(self, shape: tuple) -> Gates:
        axes = shape if self.causal else shape[:1]
        fields = {n: jnp.ones((*axes, self._units(n))) for n in self.prune if n != "layers"}
        if "layers" in self.prune:
            fields["tokens" if self.causal else "layer"] = jnp.ones(axes)
        return Gates(**fields)


def check_sizes(config: Config, blocks: int) -> None:
    """Raises ValueError for layers of different sizes, or blocks that do not divide them."""
    if len(set(config.heads_by_layer)) > 1 or len(set(config.ffn_by_layer)) > 1:
        raise ValueError(f"heads is {config.heads} and ffn {config.ffn}, expected the same in all layers")
    ffn = config.ffn_by_layer[0]
    if blocks < 1 or ffn % blocks or not ffn:
        near = [n for n in range(1, ffn + 1) if ffn % n == 0 and 0.5 * blocks <= n <= 2 * blocks] if ffn else []
        raise ValueError(
            f"blocks is {blocks}, which does not divide the feed-forward width {ffn}"
            + (f"; choose {' or '.join(map(str, near[:4]))}" if near else "")
        )


def _key(key: Array, name: str, number: int) -> Array:
    return jax.random.fold_in(key, number * len(PRUNABLE) + PRUNABLE.index(name.split("_")[0]))


__all__ = ["Gated", "check_sizes"]
