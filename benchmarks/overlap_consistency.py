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
from ..image_processing_panorama import PanoramaImageProcessor
from ..modeling_panorama import PanoramaVLM
from ..reading_panorama import to_erp_tensor

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
def tower_tokens(model: PanoramaVLM, erps: list[torch.Tensor], image_size: int) -> torch.Tensor:
    """[panoramas, V, patches, D_vision]; the tower is frozen, so they are computed once."""
    processor = PanoramaImageProcessor(image_size=image_size)
    pixels = (processor(erp, return_tensors="pt")["pixel_values"] for erp in erps)
    return torch.cat([model.model.tower_tokens(views) for views in pixels])


def resample(model: PanoramaVLM, tokens: torch.Tensor) -> torch.Tensor:
    """[B, V, patches, D_vision] -> [B, V, S, D_latent], what the language model will read."""
    return model.model.resampler(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def run(seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Metrics of the resampled tokens of the panoramas held out: before training, after strips and after rays."""
    erps = [to_erp_tensor(Image.open(path)) for path in sorted(SAMPLES.glob("*.jpg"))]  # each [3, H, W]
    held_out = erps[2::3]  # four, of all kinds
    generator = torch.Generator().manual_seed(seed)
    turned = [
        erp.roll(int(torch.randint(erp.shape[-1], (), generator=generator)), -1)
        for index, erp in enumerate(erps)
        if index % 3 != 2
        for _ in range(options.headings)
    ]
    figures: dict[str, dict[str, float]] = {}
    for name in ("strips", "rays"):
        model = make_model(seed, by_rays=name == "rays", image_size=options.image_size)
        model.set_stage("vision")
        if not figures:
            training, test = (tower_tokens(model, group, options.image_size) for group in (turned, held_out))
            with torch.no_grad():
                figures["before training"] = model.overlap.metrics(resample(model, test))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
        generator = torch.Generator().manual_seed(seed)
        for _ in tqdm(range(options.steps), desc=f"seed {seed} {name}", leave=False):
            batch = training[torch.randint(len(training), (4,), generator=generator)]
            loss, _ = model.overlap_loss(resample(model, batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            figures[name] = model.overlap.metrics(resample(model, test))
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--image-size", type=int, default=128, help="pixels a side of each view")
    parser.add_argument("--headings", type=int, default=8, help="random headings of each training panorama")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    runs = [run(seed, options) for seed in range(options.seeds)]
    rows = {name: [figures[name] for figures in runs] for name in ("before training", "strips", "rays")}
    print(f"Resampled tokens of four panoramas held out, {options.seeds} seeds, {options.steps} steps: mean (range)\n")
    print("| | " + " | ".join(FIGURES) + " |\n|---" + "|---" * len(FIGURES) + "|")
    for name, figures in rows.items():
        cells = []
        for figure in FIGURES:
            values = [row[figure] for row in figures]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
