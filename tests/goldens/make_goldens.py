"""Writes outputs.json, what the torch networks give on the random weights, and two tiny .pth.

pip install torch==2.13.0 && pip install --no-deps torchvision timm safetensors
python tests/goldens/make_goldens.py
"""

import collections
import json
from pathlib import Path
from typing import Any

import networks
import torch_networks

from resnet_flax.weights.torch_layout import export_torch

TARGET = Path(__file__).parent / "outputs.json"


def main() -> None:
    """Evaluates every case in float64."""
    goldens: dict[str, dict[str, list[list[float]]]] = {}
    for name, (_, layout) in networks.CASES.items():
        ours = networks.network(name, networks.jnp.float32)
        model = torch_networks.torch_network(name).eval()
        variables = networks.random_variables(name)
        torch_networks.load(model, export_torch(variables, ours, layout.removesuffix("_v1")))
        found = torch_networks.outputs(model, networks.images(name))
        goldens[name] = {"logits": _rounded(found[""])}
        for stage, size in enumerate(ours.stage_sizes, start=1):
            last = torch_networks.block_name(f"stage{stage}_block{size}", layout)
            goldens[name][f"c{stage + 1}"] = _rounded(networks.sample(found[last]))
    TARGET.write_text(json.dumps(goldens, indent=1) + "\n")
    write_tensors()


def write_tensors() -> None:
    """A training program's checkpoint of a few tensors, as torch.save has it now and had it."""
    torch = torch_networks.torch
    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    state = {
        "module.a": whole,
        "module.turned": whole.permute(2, 0, 1),
        "module.part": whole[1, 1:, ::2],
        "module.half": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "module.bfloat16": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        "module.parameter": torch.nn.Parameter(torch.tensor([1.5])),
        "module.empty": torch.zeros(0, 3),
        "module.count": torch.tensor(7),
    }
    saved = {"epoch": 3, "best": 0.5, "arch": "x", "state_dict": collections.OrderedDict(state)}
    torch.save(saved, TARGET.with_name("tensors.pth"))
    torch.save(saved, TARGET.with_name("tensors_legacy.pth"), _use_new_zipfile_serialization=False)


def _rounded(values: Any) -> list[list[float]]:
    return [[round(value, 9) for value in row] for row in values.tolist()]


if __name__ == "__main__":
    main()
