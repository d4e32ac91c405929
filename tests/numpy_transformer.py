"""The Transformer once more, one sample and one head at a time in float64 NumPy: slow, plain, independent.

L positions, D width, H heads, K width of a head, F hidden units, N blocks. Gates are a dict of arrays with a leading
axis of layers, each of which `by_position` spreads to [L, units] of one sample.
"""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, *inputs, **more):
    """Variables of a Flax model, all random, the scales of normalisations too; nothing is compiled."""
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs, **more), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0.2, 0.6, s.shape), s.dtype), shapes)


def numpy_of(variables):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])


def norm(x, scale, epsilon=1e-6):
    return np.stack([(row - row.mean()) / np.sqrt(row.var() + epsilon) * scale for row in x])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def turned(vector, position):
    """Pairs (x_i, x_{i + K/2}) as complex numbers, turned by position * 10000^(-2i/K)."""
    half = len(vector) // 2
    z = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * 10_000.0 ** (-2 * np.arange(half) / len(vector)))
    return np.concatenate([z.real, z.imag])


def attend(p, asking, asked, seen, places=None, gates=None):
    """seen(i, j): whether query i sees key j; places: the positions of both, where they are rotary."""
    out = np.zeros_like(asking)
    for h in range(p["query"].shape[1]):
        q, k, v = asking @ p["query"][:, h], asked @ p["key"][:, h], asked @ p["value"][:, h]
        if places is not None:
            q, k = (np.stack([turned(row, at) for row, at in zip(x, places, strict=True)]) for x in (q, k))
        for i in range(len(asking)):
            keys = [j for j in range(len(asked)) if seen(i, j)]
            if not keys:
                continue
            score = np.exp([q[i] @ k[j] / np.sqrt(q.shape[1]) for j in keys])
            head = sum(w * v[j] for w, j in zip(score / score.sum(), keys, strict=True))
            out[i] += (1 if gates is None else gates[i, h]) * head @ p["out"][h]
    return out


def feed_forward(p, x, gates=None):
    hidden = silu(x @ p["gate"]) * (x @ p["up"]) if "gate" in p else gelu(x @ p["up"])
    if gates is None:
        return hidden @ p["down"]
    size, out = hidden.shape[1] // gates.shape[1], np.zeros_like(x)
    for n in range(gates.shape[1]):
        block = slice(n * size, (n + 1) * size)
        out += gates[:, n, None] * (hidden[:, block] @ p["down"][block])
    return out


def by_position(gate, sample, length):
    """[U], [B, U] or [B, L, U] of one layer as [L, U] of one sample."""
    if gate is None:
        return None
    gate = gate if gate.ndim == 1 else gate[sample]
    return gate if gate.ndim == 2 else np.tile(gate, (length, 1))


def dispatched(index, weight, samples, length):
    """A dispatch plan as gates of blocks by position, [B, L, N]: every place adds its weight."""
    gates = np.zeros((samples, length, len(index)))
    for n in range(len(index)):
        for place, w in zip(index[n], weight[n], strict=True):
            if w:
                gates[place // length, place % length, n] += w
    return gates


def layer(p, config, number, x, places, there, causal, sample, gates, memory, memory_there):
    """One layer of one sample: [L, D] to [L, D], and its updates."""
    if isinstance(gates.get("tokens"), tuple):
        chosen, weight = (plan[sample] for plan in gates["tokens"])
        inner = {**gates, "tokens": None}
        for name in ("heads", "blocks", "cross"):
            if inner.get(name) is not None and inner[name].ndim == 3:
                inner[name] = inner[name][:, chosen]
        new, _ = layer(
            p, config, number, x[chosen], places[chosen], there[chosen], causal, sample, inner, memory, memory_there
        )
        out = x.copy()
        out[chosen] += weight[:, None] * (new - x[chosen])
        return out, {}

    def uses(kind):
        numbers = getattr(config, f"{kind}_map")
        return number if numbers is None else numbers[number]

    token = np.ones(len(x)) if gates.get("tokens") is None else gates["tokens"][sample]
    whole = gates.get("layer")
    whole = 1.0 if whole is None else whole if np.ndim(whole) == 0 else whole[sample]
    heads, cross, blocks = (by_position(gates.get(name), sample, len(x)) for name in ("heads", "cross", "blocks"))
    before, done = x, {}

    def seen(i, j):
        return there[j] and token[j] != 0 and (j <= i or not causal)

    if f"attention_{uses('attention')}" in p:
        h = norm(x, p[f"attention_norm_{uses('norm')}"]["scale"])
        rotary = places if config.positions == "rotary" else None
        done["attention"] = attend(p[f"attention_{uses('attention')}"], h, h, seen, rotary, heads)
        x = x + whole * done["attention"]
    if f"cross_attention_{uses('attention')}" in p:
        h = norm(x, p[f"cross_norm_{uses('norm')}"]["scale"])
        weights = p[f"cross_attention_{uses('attention')}"]
        done["cross"] = attend(weights, h, memory, lambda i, j: memory_there[j], None, cross)
        x = x + whole * done["cross"]
    if f"ffn_{uses('ffn')}" in p:
        h = norm(x, p[f"ffn_norm_{uses('norm')}"]["scale"])
        done["ffn"] = feed_forward(p[f"ffn_{uses('ffn')}"], h, blocks)
        x = x + whole * done["ffn"]
    return before + token[:, None] * (x - before), done


def run(params, config, tokens, causal, mask, gates, memory, memory_mask):
    """`features` [B, L, D], `embedded`, and by layer its `state` and updates, lists of samples."""
    out = {"features": [], "embedded": [], "layers": [{} for _ in range(config.layers)]}
    length, places = tokens.shape[1], np.arange(tokens.shape[1])
    for b in range(len(tokens)):
        x = np.stack([params["embedding"]["embedding"][token] for token in tokens[b]])
        if config.positions == "learned":
            x = x + params["position"]["embedding"][:length]
        out["embedded"].append(x)
        there = np.ones(length, bool) if mask is None else mask[b]
        read = None if memory is None else memory[b]
        readable = None if memory is None else np.ones(len(read), bool) if memory_mask is None else memory_mask[b]
        for n in range(config.layers):
            part = {
                name: tuple(half[n] for half in gate) if isinstance(gate, tuple) else gate[n]
                for name, gate in (gates or {}).items()
            }
            x, done = layer(params["stack"], config, n, x, places, there, causal, b, part, read, readable)
            for name, value in {**done, "state": x}.items():
                out["layers"][n].setdefault(name, []).append(value)
        out["features"].append(norm(x, params["norm"]["scale"]))
    return out


def encoder(params, config, tokens, mask=None, gates=None):
    out = run(params, config, tokens, False, mask, gates, None, None)
    if "output" in params:
        there = np.ones(tokens.shape, bool) if mask is None else mask
        pooled = np.stack([x[m].mean(0) for x, m in zip(out["features"], there, strict=True)])
        out["logits"] = pooled @ params["output"]["kernel"] + params["output"]["bias"]
    return out


def decoder(params, config, tokens, gates=None, memory=None, memory_mask=None):
    out = run(params, config, tokens, True, None, gates, memory, memory_mask)
    return {**out, "logits": np.stack(out["features"]) @ params["output"]["kernel"]}


def encoder_decoder(params, configs, source, tokens, mask=None, encoder_gates=None, gates=None):
    encoded = encoder(params["encode"], configs[0], source, mask, encoder_gates)
    return decoder(params["decode"], configs[1], tokens, gates, encoded["features"], mask)
