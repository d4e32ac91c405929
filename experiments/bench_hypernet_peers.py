"""How bench_hypernet.py times and weighs things, and the libraries beside ours: hypnettorch, hyper-nn, hyperlight.

Each library makes all parameters of the target from an embedding as wide as ours, with no hidden layers, and trains
with Adam at 1e-3. "chunked" is its own way of sharing one small head among the chunks of the target, with chunks of our
size. PyTorch's Adam is the fused one, the fastest on a CPU. No library is imported unless it is measured.
"""

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from hyperjax.paramtree import count
from hyperjax.timing import compiled

ADAM = optax.adam(1e-3)
Runs = dict[str, Callable[[], Any]]  # "generate", "gradient", "step" -> what to time


class Target(NamedTuple):
    """A target network with one batch of random data.

    Attributes:
        title: for the reader.
        suffix: of its keys among the figures.
        model: its Linen module.
        layers: its widths, from the features to the classes, or the depth and the width of a Wide ResNet.
        x, y: inputs [B, ...] and labels [B].
        size: number of its parameters.
        embedding: width of z.
        kinds: what to time: of "generate", "gradient" and "step".
    """

    title: str
    suffix: str
    model: nn.Module
    layers: tuple[int, ...]
    x: jax.Array
    y: jax.Array
    size: int
    embedding: int
    kinds: tuple[str, ...]

    @property
    def images(self) -> bool:
        """Whether it is a Wide ResNet."""
        return self.x.ndim == 4

    @property
    def chunks(self) -> int:
        """Number of chunks of about sqrt(size) parameters."""
        return -(-self.size // (math.isqrt(self.size - 1) + 1))

    @property
    def head_mb(self) -> float:
        """Megabytes of a head with a weight for each pair of parameter and embedding feature."""
        return self.size * self.embedding * 4 / 1e6


class Candidate(NamedTuple):
    """What is timed: `runs` by kind, the number of weights that it learns, and what its compilation took."""

    label: str
    weights: int
    runs: Runs
    compile_seconds: float | None = None


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def gradient_of(loss: Callable) -> Callable:
    """value_and_grad of a loss(variables, x, y) -> scalar, as a function of (params, other variables, x, y)."""

    def split(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss({"params": params, **rest}, x, y)

    return jax.value_and_grad(split)


def jax_candidate(target: Target, label: str, loss: Callable, variables: Any, generate: Callable | None) -> Candidate:
    """Compiles a loss(variables, x, y) and generate(variables); a step overwrites its own state, as in training."""

    def step(state: Any, rest: Any, x: jax.Array, y: jax.Array) -> Any:
        params, moments = state
        value, gradient = gradient_of(loss)(params, rest, x, y)
        updates, moments = ADAM.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    def run_step() -> Any:
        state[0], value = compiled_step(state[0], *fixed)
        return value

    rest = dict(variables)
    params = rest.pop("params")
    weights, state = count(params), [(params, ADAM.init(params))]
    fixed = (rest, target.x, target.y)
    start = time.perf_counter()
    compiled_step = compiled(step, state[0], *fixed, donate=(0,))
    seconds = time.perf_counter() - start
    runs: Runs = {"step": run_step}
    if "gradient" in target.kinds:
        gradient = compiled(gradient_of(loss), params, *fixed)
        runs["gradient"] = lambda: gradient(state[0][0], *fixed)
    if generate is not None:
        generated = compiled(generate, variables)
        runs["generate"] = lambda: generated({**rest, "params": state[0][0]})
    return Candidate(label, weights, runs, seconds)


def account(call: Any) -> int:
    """XLA's own account of the memory of a compiled function: arguments, results and everything in between."""
    memory = call.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def resident_peak(run: Callable[[], Any]) -> float:
    """Most memory that the process took during a run beyond what it had before; NaN where Linux does not tell."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status.read_text()
        jax.block_until_ready(run())
        after = status.read_text()
    except OSError:
        return math.nan
    return 1024.0 * (int(after.split("VmHWM:")[1].split()[0]) - int(before.split("VmRSS:")[1].split()[0]))


def hypernn_flax(target: Target, label: str, chunked: bool = False) -> Candidate:
    """hyper-nn's Flax half; its embeddings belong to chunks, so one embedding is one chunk."""
    vars(jax).setdefault("tree_map", jax.tree.map)  # which JAX has removed
    from hypernn.jax import JaxLinearHyperNetwork

    hyper = JaxLinearHyperNetwork.from_target(
        target.model, [target.x.shape], embedding_dim=target.embedding, num_embeddings=target.chunks if chunked else 1
    )

    def loss(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(hyper.apply(variables, x), y)

    def generate(variables: Any) -> Any:
        return hyper.apply(variables, method=hyper.generate_params)[0]

    return jax_candidate(target, label, loss, hyper.init(jax.random.key(0), target.x), generate)


def hypernn_torch(target: Target, label: str, chunked: bool = False) -> Candidate:
    """hyper-nn's PyTorch half."""
    from hypernn.torch import TorchLinearHyperNetwork

    hyper = TorchLinearHyperNetwork.from_target(
        torch_target(target), embedding_dim=target.embedding, num_embeddings=target.chunks if chunked else 1
    )
    parameters = [parameter for parameter in hyper.parameters() if parameter.numel()]
    return torch_candidate(target, label, parameters, hyper, hyper.generate_params)


def hypnettorch(target: Target, label: str, chunked: bool = False) -> Candidate:
    """hypnettorch with its own target networks: HMLP, or ChunkedHMLP."""
    from hypnettorch.hnets.chunked_mlp_hnet import ChunkedHMLP
    from hypnettorch.hnets.mlp_hnet import HMLP

    network = hypnettorch_target(target, no_weights=True)
    same = {"cond_in_size": target.embedding, "layers": (), "num_cond_embs": 1, "verbose": False}
    if chunked:
        size = -(-target.size // target.chunks)
        hyper = ChunkedHMLP(network.param_shapes, size, chunk_emb_size=target.embedding, **same)
    else:
        hyper = HMLP(network.param_shapes, **same)

    def generate() -> Any:
        return hyper(cond_id=0)

    return torch_candidate(target, label, hyper.parameters(), lambda x: network(x, weights=generate()), generate)


def hyperlight(target: Target, label: str) -> Candidate:
    """hyperlight, which has no chunks and keeps no embeddings: z is ours, and learned too."""
    import hyperlight as library
    import torch

    network = torch_target(target)
    network = library.hypernetize(network, parameters=list(network.parameters()))
    hyper = library.HyperNet({"z": (target.embedding,)}, network.external_shapes(), hidden_sizes=[], encoding=None)
    z = torch.nn.Parameter(torch.randn(target.embedding))

    def forward(x: Any) -> Any:
        with network.using_externals(hyper(z=z)):
            return network(x)

    return torch_candidate(target, label, [z, *hyper.parameters()], forward, lambda: hyper(z=z))


def torch_plain(target: Target, label: str) -> Candidate:
    """The target by itself, in PyTorch."""
    network = torch_target(target)
    return torch_candidate(target, label, network.parameters(), network, None)


def torch_target(target: Target) -> Any:
    """The target in PyTorch."""
    import torch

    if target.images:
        return hypnettorch_target(target, no_weights=False)
    modules: list[Any] = []
    for features, width in zip(target.layers[:-1], target.layers[1:], strict=True):
        modules += [torch.nn.Linear(features, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*modules[:-1])


def hypnettorch_target(target: Target, no_weights: bool) -> Any:
    """hypnettorch's MLP or Wide ResNet, with the shape of ours."""
    if target.images:
        from hypnettorch.mnets.wide_resnet import WRN

        depth, width = target.layers
        own = {"use_bias": False, "use_fc_bias": True, "chw_input_format": True, "verbose": False}
        return WRN(target.x.shape[1:], 10, (depth - 4) // 6, width, no_weights=no_weights, **own)
    from hypnettorch.mnets.mlp import MLP

    return MLP(target.layers[0], target.layers[-1], target.layers[1:-1], no_weights=no_weights, verbose=False)


def torch_candidate(target: Target, label: str, parameters: Any, forward: Callable, generate: Any) -> Candidate:
    """forward(x) -> logits, and generate() -> weights, in PyTorch."""
    import torch

    images = np.array(target.x.transpose(0, 3, 1, 2) if target.images else target.x)
    x, y = torch.from_numpy(images), torch.from_numpy(np.array(target.y, np.int64))
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def gradient() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(x), y).backward()

    def step() -> None:
        gradient()
        optimizer.step()

    runs: Runs = {"step": step, "gradient": gradient}
    if generate is not None:
        runs["generate"] = torch.no_grad()(generate)
    weights = sum(parameter.numel() for parameter in parameters)
    return Candidate(label, weights, {kind: run for kind, run in runs.items() if kind in target.kinds})


PEERS: dict[str, tuple[str, Callable[..., Candidate], float]] = {  # name -> label, how it is made, share of a full head
    "torch": ("plain target, PyTorch", torch_plain, 0.0),
    "hypnettorch": ("hypnettorch", hypnettorch, 1.0),
    "hypernn_flax": ("hyper-nn, Flax", hypernn_flax, 1.0),
    "hypernn_torch": ("hyper-nn, PyTorch", hypernn_torch, 1.0),
    "hyperlight": ("hyperlight", hyperlight, 1.0),
    "hypnettorch_chunked": ("hypnettorch, chunked", partial(hypnettorch, chunked=True), 0.0),
    "hypernn_flax_chunked": ("hyper-nn, Flax, chunked", partial(hypernn_flax, chunked=True), 0.0),
    "hypernn_torch_chunked": ("hyper-nn, PyTorch, chunked", partial(hypernn_torch, chunked=True), 0.0),
}


def build_peer(name: str, target: Target) -> Candidate | str:
    """Returns a peer ready to be timed, or in one line why it is not."""
    label, make, _ = PEERS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they use what PyTorch and JAX have deprecated
            candidate = make(target, label)
            for run in candidate.runs.values():
                run()
        return candidate
    except ModuleNotFoundError as error:
        return f"{label}: {error}; pip install -e '.[bench]'"
    except Exception as error:  # whatever another library may raise
        return f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
