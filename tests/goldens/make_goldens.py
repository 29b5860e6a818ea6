"""Writes logits.json: what the torch networks give on the random weights.

pip install torch==2.13.0 && pip install --no-deps torchvision timm safetensors
python tests/goldens/make_goldens.py
"""

import json
from pathlib import Path

import networks
import torch_networks
from torch_networks import torch

from resnet_flax.weights.torch_layout import export_torch

TARGET = Path(__file__).parent / "logits.json"


def main() -> None:
    """Evaluates every case in float64."""
    goldens = {}
    for name, (_, layout) in networks.CASES.items():
        ours = networks.network(name, networks.jnp.float32)
        model = torch_networks.torch_network(name).eval()
        variables = networks.random_variables(name)
        torch_networks.load(model, export_torch(variables, ours, layout.removesuffix("_v1")))
        with torch.no_grad():
            logits = model(torch_networks.channels_first(networks.images(name)))
        goldens[name] = [[round(value, 9) for value in row] for row in logits.tolist()]
    TARGET.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()
