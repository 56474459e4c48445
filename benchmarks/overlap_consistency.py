"""Does stage `vision` teach neighbouring views to say the same of what both see, and do rays teach it better?

Trains the resampler on eight of the sample panoramas, once with pairs by rays and once with sequential strips (the
peer: what is known of other systems), from the same random weights and with the same budget, and looks at the four
others: how often is the token that looks the same way the nearest of all tokens of the neighbouring view?

`python -m panorama_vlm.benchmarks.overlap_consistency`: a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..configuration_panorama import PanoramaConfig
from ..image_processing_panorama import PanoramaImageProcessor, to_erp_tensor
from ..modeling_panorama import PanoramaVLM

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
FIGURES = ("retrieval", "cosine_matched", "cosine_random", "feature_std", "effective_rank")


def make_model(seed: int, by_rays: bool, image_size: int) -> PanoramaVLM:
    """A random tower and a random resampler; the language model plays no part."""
    torch.manual_seed(seed)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 384}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": image_size, "patch_size": 8}
    language = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    language |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8}
    config = PanoramaConfig(
        {**vision, "vision_use_head": False},
        language,
        latent_dimension=128,
        vicreg_projector_dim=128,
        use_anyres_e2p_vicreg=by_rays,
    )
    return PanoramaVLM(config)


@torch.no_grad()
def measure(model: PanoramaVLM, pixels: torch.Tensor) -> dict[str, float]:
    """The metrics of the resampled tokens [B, V, S, D_latent], which are what the language model will read."""
    return model.overlap_metrics(model.encode_views(pixels))


def run(seed: int, by_rays: bool, steps: int, image_size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics on the panoramas held out, before and after training."""
    model = make_model(seed, by_rays, image_size)
    model.set_stage("vision")
    processor = PanoramaImageProcessor(image_size)
    erps = [to_erp_tensor(Image.open(path)) for path in sorted(SAMPLES.glob("*.jpg"))]  # each [3, H, W]
    held_out = processor(erps[2::3], return_tensors="pt")["pixel_values"]  # four, of all kinds
    training = [erp for index, erp in enumerate(erps) if index % 3 != 2]
    before = measure(model, held_out)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=f"seed {seed} {'rays' if by_rays else 'strips'}", leave=False):
        chosen = torch.randperm(len(training), generator=generator)[:4]
        turned = [training[i].roll(int(torch.randint(512, (), generator=generator)), -1) for i in chosen]
        loss = model(processor(turned, return_tensors="pt")["pixel_values"], stage="vision").loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, measure(model, held_out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--image-size", type=int, default=128, help="pixels a side of each view")
    options = parser.parse_args(arguments)
    rows: dict[str, list[dict[str, float]]] = {"before training": [], "strips": [], "rays": []}
    for seed in range(options.seeds):
        for name, by_rays in (("strips", False), ("rays", True)):
            before, after = run(seed, by_rays, options.steps, options.image_size)
            rows[name].append(after)
        rows["before training"].append(before)
    print(f"Resampled tokens of four panoramas held out, {options.seeds} seeds, {options.steps} steps: mean (range)\n")
    print("| | " + " | ".join(FIGURES) + " |\n|---" * 1 + "|---" * len(FIGURES) + "|")
    for name, figures in rows.items():
        cells = []
        for figure in FIGURES:
            values = [row[figure] for row in figures]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
