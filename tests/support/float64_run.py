"""Training in float64 on any mesh, by the loop and with the checkpoints of every run.

`train` trains in this process. As a program, it is one of several processes, see `main`.
"""

import argparse
from functools import partial
from pathlib import Path
from unittest import mock


def train(workdir, data_dir, steps, data=-1, fsdp=1, devices=None):
    """Trains up to a step, or continues to it.

    Args:
      workdir: of the run.
      data_dir: of TFDS, with the digits.
      steps: the last step.
      data: `mesh.data`.
      fsdp: `mesh.fsdp`.
      devices: the devices of the mesh; all by default.
    """
    import jax
    import jax.numpy as jnp
    from experiments import short_run

    from resnet_flax.apply import experiment, tables
    from resnet_flax.training import loop

    config = short_run(data_dir)
    config.steps = steps
    config.mesh.data, config.mesh.fsdp = data, fsdp
    config.optim.schedule = "constant"
    config.eval.every = config.checkpoint.every = 0

    def float64(*arguments, **keywords):
        model = made(*arguments, **keywords)
        return model.clone(dtype=jnp.float64, param_dtype=jnp.float64)

    made, on = experiment.configured_model, partial(experiment.sharding.make_mesh, devices=devices)
    with (
        jax.enable_x64(True),
        mock.patch.object(experiment, "configured_model", float64),
        mock.patch.object(experiment.sharding, "make_mesh", on),
    ):
        loop.train(experiment.make_run(tables.check(config)), workdir)


def main():
    """Trains in each workdir, in turn, as one of several processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", nargs="+", type=Path)
    for name in ("coordinator", "data_dir"):
        parser.add_argument(f"--{name}")
    for name in ("num_processes", "process_id", "steps", "fsdp"):
        parser.add_argument(f"--{name}", type=int)
    arguments = parser.parse_args()
    from resnet_flax.cli.stoppable import heard
    from resnet_flax.runtime import distributed

    place = arguments.coordinator, arguments.num_processes, arguments.process_id
    with heard(distributed.start(*place)):
        for workdir in arguments.workdir:
            train(workdir, arguments.data_dir, arguments.steps, fsdp=arguments.fsdp)


if __name__ == "__main__":
    main()
