"""Writes outputs.json: what the torch networks give on the random weights.

pip install torch==2.13.0 && pip install --no-deps torchvision timm safetensors
python tests/goldens/make_goldens.py
"""

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


def _rounded(values: Any) -> list[list[float]]:
    return [[round(value, 9) for value in row] for row in values.tolist()]


if __name__ == "__main__":
    main()
