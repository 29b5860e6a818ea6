"""What `train_step.py` compares: the step of each side, in a process of its own.

`python benchmarks/sides.py SIDE NETWORK BATCH WHAT DTYPE` prepares the step and reports that in a
line of JSON. For each line of standard input, which is a number of seconds, it then takes steps for
so long, and answers with the seconds per step in each stretch of steps and with the peak memory.
"""

import contextlib
import functools
import json
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[int], None]

STRETCH = 0.5  # seconds that a stretch takes at least: the host waits for the device after each
IN_ONE = 100  # steps per dispatch where the data is resident on the device
WARM = 0.4  # warm-up before the seconds that count, as a fraction of them

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_shape(network: str) -> tuple[int, int, int]:
    """Height, width and channels of the images on which a network is compared."""
    return (32, 32, 3) if network.startswith("cifar") else (224, 224, 3)


def classes_of(network: str) -> int:
    """Number of classes of the data set that a network is usually trained on."""
    return 10 if network.startswith("cifar") else 1000


# ours and Flax's example ------------------------------------------------------------------------


def make_jax(side: str, network: str, batch: int, what: str, dtype: str) -> tuple[Run, Any]:
    """A JAX side: what takes steps, and what returns the peak memory in bytes."""
    import jax
    from programs import noise

    arrays = jax.device_put(noise(batch, image_shape(network), classes_of(network)))
    if side == "flax_example":
        state, step, predict = _flax_example(network, dtype)
    else:
        state, step, predict = _ours(side, network, batch, what, dtype)

    def run(steps: int) -> None:
        nonlocal state
        found: Any = None
        for _ in range(steps):
            if what == "infer":
                found = predict(state, arrays["image"])
            else:
                state, found = step(state, arrays)
        jax.block_until_ready(found)

    def peak() -> int:
        statistics = jax.devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else _peak_of_process()

    return run, peak


def overrides(side: str) -> dict[str, str]:
    """The implementations that a side such as 'ours:forward=dot' names, for `ops.override`."""
    return dict(part.split("=") for part in side.split(":")[1:] if not part.startswith("--"))


def _ours(side: str, network: str, batch: int, what: str, dtype: str) -> tuple[Any, Any, Any]:
    """This package's programs.

    `side` may name implementations for `ops.override`, as in 'ours:forward=dot'.
    """
    import jax
    import numpy as np
    from programs import SEED, config_of_network, noise, programs_of

    from resnet_flax.evaluation.compile import jit
    from resnet_flax.ops import dispatch
    from resnet_flax.runtime import xla_options

    implementations = overrides(side)
    config = config_of_network(network, batch, dtype)
    programs, _ = programs_of(config, classes_of(network), image_shape(network), jax.devices()[:1])

    def overridden(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            with dispatch.override(**implementations):
                return function(*arguments)

        return call

    options = xla_options.options(
        jax.default_backend(), image_shape(network), dtype, training=False
    )

    @functools.partial(jit, options=options)
    def predict(state: Any, images: Any) -> Any:
        x = ((images.astype(np.float32) / 255 - np.array(MEAN)) / np.array(STD)).astype(dtype)
        return programs.model.apply(state.variables, x, train=False)

    seed = jax.device_put(SEED)

    def step(state: Any, arrays: Any) -> Any:
        return programs.train_step(state, arrays, seed)

    if what == "resident":
        resident = programs.resident_steps
        number = 50_000 if jax.default_backend() != "cpu" else 1000
        data = noise(number, image_shape(network), classes_of(network))
        data = jax.device_put({name: data[name] for name in ("image", "label")})
        order = np.random.default_rng(0).integers(0, number, (IN_ONE, batch))
        indices = jax.device_put(order.astype(np.int32))

        def step(state: Any, arrays: Any) -> Any:
            return resident(state, data, indices, len(indices), seed)

    return programs.init(0), overridden(step), overridden(predict)


def _flax_example(network: str, dtype: str) -> tuple[Any, Any, Any]:
    """What Flax's ImageNet example computes, rewritten here."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    cifar = network.startswith("cifar")
    depth = int(network.split("resnet")[1])
    bottleneck = depth >= 50 and not cifar
    if cifar:
        sizes: tuple[int, ...] = ((depth - 2) // 6,) * 3
    else:
        sizes = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
    kind = jnp.dtype(dtype)

    class Block(nn.Module):
        features: int
        strides: int
        norm: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            conv = functools.partial(nn.Conv, use_bias=False, dtype=kind)
            out = self.features * (4 if bottleneck else 1)
            kernels = ((1, 1), (3, 3), (1, 1)) if bottleneck else ((3, 3), (3, 3))
            y = x
            for i, kernel in enumerate(kernels):
                last = i == len(kernels) - 1
                strides = self.strides if i == len(kernels) - 2 else 1
                y = conv(out if last else self.features, kernel, (strides, strides))(y)
                scale = nn.initializers.zeros if last else nn.initializers.ones
                y = self.norm(scale_init=scale)(y)
                y = y if last else nn.relu(y)
            if x.shape != y.shape:
                x = self.norm()(conv(out, (1, 1), (self.strides, self.strides))(x))
            return nn.relu(x + y)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            conv = functools.partial(nn.Conv, use_bias=False, dtype=kind)
            norm = functools.partial(
                nn.BatchNorm,
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=kind,
            )
            width = 16 if cifar else 64
            if cifar:
                x = nn.relu(norm()(conv(width, (3, 3))(x)))
            else:
                x = nn.relu(norm()(conv(width, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(x)))
                x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            for stage, size in enumerate(sizes):
                for i in range(size):
                    x = Block(width * 2**stage, 2 if stage > 0 and i == 0 else 1, norm)(x)
            logits = nn.Dense(classes_of(network), dtype=kind)(x.mean((1, 2)))
            return jnp.asarray(logits, jnp.float32)

    model = Network()
    mean, std = (jnp.array(numbers) * 255 for numbers in (MEAN, STD))

    def prepare(images: Any) -> Any:
        return ((images.astype(jnp.float32) - mean) / std).astype(kind)

    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), jnp.zeros((1, *image_shape(network)))
    )
    tx = optax.sgd(0.1, momentum=0.9, nesterov=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, arrays: Any) -> Any:
        params, stats, opt_state = state

        def loss_of(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                prepare(arrays["image"]),
                train=True,
                mutable=["batch_stats"],
            )
            labels = jax.nn.one_hot(arrays["label"], classes_of(network))
            loss = optax.softmax_cross_entropy(logits, labels).mean()
            decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
            return loss + 0.5e-4 * decay, (updated["batch_stats"], logits)

        (loss, (stats, logits)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        accuracy = (logits.argmax(-1) == arrays["label"]).mean()
        return (optax.apply_updates(params, updates), stats, opt_state), (loss, accuracy)

    @jax.jit
    def predict(state: Any, images: Any) -> Any:
        return model.apply(
            {"params": state[0], "batch_stats": state[1]}, prepare(images), train=False
        )

    return (
        (variables["params"], variables["batch_stats"], tx.init(variables["params"])),
        step,
        predict,
    )


# PyTorch ----------------------------------------------------------------------------------------


def make_torch(side: str, network: str, batch: int, what: str, dtype: str) -> tuple[Run, Any]:
    """A PyTorch side: what takes steps, and what returns the peak memory in bytes."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _torch_network(network)
    layout = torch.contiguous_format if side == "torch" else torch.channels_last
    model = model.to(device, memory_format=layout).train(what != "infer")
    shape = image_shape(network)
    images = torch.randint(0, 256, (batch, 3, *shape[:2]), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=layout)
    labels = torch.randint(0, classes_of(network), (batch,), device=device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    sgd = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": rest}],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        **({"fused": True} if device == "cuda" else {"foreach": True}),
    )
    mean, std = (torch.tensor(n, device=device).view(1, 3, 1, 1) * 255 for n in (MEAN, STD))

    def forward(images: Any) -> Any:
        return model((images.float() - mean) / std)

    def loss_of(images: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(forward(images), labels)

    torch.backends.cudnn.benchmark = device == "cuda"
    side, _, mode = side.partition(":")
    if side == "torch_compile":
        forward = torch.compile(forward, mode=mode or "max-autotune")
        loss_of = torch.compile(loss_of, mode=mode or "max-autotune")

    def cast() -> Any:
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16)

    def run(steps: int) -> None:
        for _ in range(steps):
            if what == "infer":
                with torch.inference_mode(), cast():
                    forward(images)
                continue
            with cast():
                loss = loss_of(images, labels)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else _peak_of_process()

    return run, peak


def _torch_network(network: str) -> Any:
    # torchvision's compiled operators may not match the installed torch. None is used here, so an
    # empty module replaces the one that would register them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
    if network.startswith("cifar"):
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "goldens"))
        from torch_cifar import Cifar

        return Cifar((int(network.removeprefix("cifar_resnet")) - 2) // 6, classes_of(network))
    from torchvision.models import resnet

    return getattr(resnet, network)()


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prepares one side and takes its steps."""
    side, network, batch, what, dtype = sys.argv[1:]
    in_one = IN_ONE if what == "resident" else 1
    start = time.monotonic()
    make = make_torch if side.startswith("torch") else make_jax
    run, peak = make(side, network, int(batch), what, dtype)
    made = time.monotonic()
    run(1)
    first = time.monotonic()
    run(5)  # until the buffers have their final places
    print(json.dumps({"made": made - start, "first_step": first - made}), flush=True)
    stretch = 1
    for line in sys.stdin:
        each: list[float] = []
        begun = time.monotonic()
        # While other sides ran, memory may have been paged out and the clock lowered.
        while time.monotonic() < begun + WARM * float(line):
            run(stretch)
        end = time.monotonic() + float(line)
        while not each or time.monotonic() < end:
            start = time.monotonic()
            run(stretch)
            seconds = time.monotonic() - start
            if seconds < STRETCH and not each:
                stretch *= 2
                continue
            each.append(seconds / stretch / in_one)
        print(json.dumps({"seconds": each, "peak": int(peak())}), flush=True)


if __name__ == "__main__":
    main()
