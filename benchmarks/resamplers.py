"""What does a resampler cost? Each with the options that it has by default, one after the other in one run.

`python -m panorama_vlm.benchmarks.resamplers [--image-size 256 --width 768 --views 9 --device cpu]`: the table of
`docs/backbones.md`. Times are medians, of the resampler alone.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from ..configuration_panorama import PanoramaConfig
from ..resampler_panorama import RESAMPLERS


def cost(
    kind: str, image_size: int, width: int, views: int, device: str, repeats: int = 5
) -> tuple[str, int, list[float]]:
    """Grid, parameters, and milliseconds a view without and with gradients."""
    vision = {"model_type": "siglip_vision_model", "image_size": image_size, "hidden_size": width, "patch_size": 16}
    config = PanoramaConfig(vision, resampler_type=kind)
    torch.manual_seed(0)
    resampler = RESAMPLERS[kind](config, width)
    for parameter in resampler.parameters():  # of a state space they are empty until a model starts them
        torch.nn.init.normal_(parameter, std=0.02)
    resampler.to(device)
    rows, columns = config.vision_grid
    tokens = torch.randn(views, rows * columns, width, device=device, requires_grad=True)

    def forward() -> None:
        with torch.no_grad():
            resampler(tokens)

    def both() -> None:
        resampler(tokens).square().sum().backward()

    times = []
    for step in (forward, both):
        step()
        taken = []
        for _ in range(repeats):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            taken.append(1e3 * (time.perf_counter() - start) / views)
        times.append(median(taken))
    grid = "{} x {} x {}".format(*config.token_grid, config.latent_dimension)
    return grid, sum(parameter.numel() for parameter in resampler.parameters()), times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--views", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print("| resampler | tokens a view | parameters | ms a view, forward | with gradients |\n|---|---|---|---|---|")
    for kind in RESAMPLERS:
        grid, parameters, times = cost(kind, given.image_size, given.width, given.views, given.device)
        print(f"| `{kind}` | {grid} | {parameters / 1e6:.1f} M | {times[0]:.1f} | {times[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
