"""What test_mesh.py runs in processes of its own: four small trainings, laid out as the arguments say.

    python tests/mesh_worker.py FOLDER STEPS --mesh data=4,model=2

Metrics and checkpoints go to FOLDER/NAME; what is there goes on. Prints nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import jax
import numpy as np
import optax
from scaling_cases import CASES, IN_PLACE

from hyperjax import training

B = 8


def main():
    folder, steps, *options = sys.argv[1:]
    names = [option.removeprefix("--").replace("-", "_") for option in options[::2]]
    given = dict(zip(names, options[1::2], strict=True))
    devices = training.Devices(**{n: v if n in ("mesh", "coordinator") else int(v) for n, v in given.items()})
    layout = training.lay_out(devices, batch=B, in_place=IN_PLACE)
    for name, case in CASES.items():
        workdir = training.Workdir(Path(folder) / name, devices, layout=layout).open()
        problem = case(B, 64, 12)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
        state = problem.state(optimizer)
        checkpoints = training.Checkpoints(workdir.shared / "checkpoints")
        state, resumed = checkpoints.restore(state) or (state, {})
        files = [
            training.JsonLines(workdir.path / f"{n}.jsonl", resumed.get("step", 0)) for n in ("metrics", "timings")
        ]
        with workdir, checkpoints, files[0], files[1]:
            training.fit(
                state,
                training.make_step(problem.loss_fn, optimizer, layout),
                problem.batch_at,
                jax.random.key(1),
                steps=int(steps),
                checkpoints=checkpoints,
                metrics=files[0],
                timings=files[1],
                validate=lambda state: {"size": sum(float(np.abs(p).sum()) for p in jax.tree.leaves(state.params))},
                best="size",
                eval_every=3,
                log_every=1,
                items=B,
                resumed=resumed,
                layout=layout,
            )


main()
