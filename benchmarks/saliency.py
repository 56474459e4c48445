"""Did the answer look there? What happens to answers when the directions where a heat map says so are masked.

`python -m panorama_vlm.benchmarks.saliency [MODEL] [--questions 30]`, MODEL the one at the root of the repository.

A deletion test (Samek et al. 2017, "Evaluating the Visualization of What a Deep Neural Network Has Learned"): a tenth
of the sphere takes the mean colour of the panorama, and the model says again how likely its answer was. Of each way to
find the tenth the table has how much log-probability the answer loses (in nats, mean and median over the questions),
and of how many it is no longer what the model would say. Beside the heat map of `panorama_vlm.pictures` stand the
attention that the answer's tokens pay to image tokens (mean over layers and heads), integrated gradients (Sundararajan
et al. 2017, eq. 1 and 3, from the mean token, eight steps), and, with as much of the sphere masked, directions by
chance in blocks of 22.5 degrees, and the tenths of heat maps turned about the vertical by chance, which mask the same
shapes at the same heights. Last, how far the brightest direction is from the thing that is asked for, where a question
has one.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..geometry_panorama import View, ray_angles
from ..pictures import heat_map, hottest, saliency
from ..pipeline_panorama import PanoramaPipeline
from ..places_panorama import great_circle
from ..synthetic.write import World
from .hotspots import ROOT, UNSEEN, pipeline_of

KINDS = ("colour", "shape", "size", "grounding", "direction", "what_is_in_direction")
SEED = 2026_24
_ROWS = 64  # of the heat maps
_STEPS = 8  # of the integral
_BLOCKS = 8  # of a random mask, from pole to pole


class Asked:
    """A question about a panorama, its answer, and how likely that is about others.

    Args:
        pipe: asks.
        panorama: equirectangular picture.
        words: the question.
    """

    def __init__(self, pipe: PanoramaPipeline, panorama: Image.Image, words: str):
        self.pipe, self.panorama, self.words = pipe, panorama, words
        given = self.inputs(panorama)
        said = pipe.model.generate(
            **given, max_new_tokens=192, do_sample=False, return_dict_in_generate=True, tokenizer=pipe.tokenizer
        )
        self.ids = said.generated_ids[0]
        self.input_ids = torch.cat([given["input_ids"], self.ids[None]], 1)
        self.given = {**given, "input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids)}

    def inputs(self, panorama: Image.Image) -> dict[str, torch.Tensor]:
        made = self.pipe.preprocess({"panorama": panorama, "question": self.words})["inputs"]
        return {name: value.to(self.pipe.device) for name, value in made.items()}

    @torch.no_grad()
    def likelihood(self, panorama: Image.Image) -> tuple[float, bool]:
        """Log-probability of the answer about a panorama, and whether it is what the model would say."""
        pixels = self.inputs(panorama)["pixel_values"]
        logits = self.pipe.model(**{**self.given, "pixel_values": pixels}).logits[0, -len(self.ids) - 1 : -1]
        likely = logits.log_softmax(-1).gather(1, self.ids[:, None]).sum()
        return float(likely), bool((logits.argmax(-1) == self.ids).all())

    def heat(self, image_scores: np.ndarray) -> np.ndarray:
        """Scores of the image tokens as a heat map."""
        return heat_map(self.pipe.model, image_scores, self.given, _ROWS)

    @torch.no_grad()
    def attention(self) -> np.ndarray:
        """The attention of the answer to image tokens; the language model computes it by `eager` for once."""
        language = self.pipe.model.model.language_model
        before = language.config._attn_implementation
        language.set_attn_implementation("eager")
        try:
            layers = self.pipe.model(**self.given, output_attentions=True).attentions
        finally:
            language.set_attn_implementation(before)
        paid = torch.stack([each[0].mean(0) for each in layers]).mean(0)[-len(self.ids) - 1 : -1].mean(0)
        return self.heat(paid[self.pipe.model.model.is_placeholder(self.input_ids)[0]].cpu().numpy())

    def gradient(self) -> np.ndarray:
        """What `panorama_vlm.pictures` draws."""
        return saliency(self.pipe, {"panorama": self.panorama, "question": self.words}, height=_ROWS).heat

    def integrated(self) -> np.ndarray:
        """The size of what each image token adds to the log-probability on the way from their mean."""
        model = self.pipe.model
        with torch.no_grad():
            (tokens,) = model.model.get_image_features(self.given["pixel_values"]).pooler_output
            total = torch.zeros_like(tokens)
        for step in range(_STEPS):
            share = (step + 0.5) / _STEPS
            at = (tokens.mean(0) + share * (tokens - tokens.mean(0))).requires_grad_()
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=[at])}
            logits = model(
                input_ids=self.input_ids, attention_mask=self.given["attention_mask"], mm_encoder_outputs=encoded
            ).logits[0, -len(self.ids) - 1 : -1]
            likely = logits.log_softmax(-1).gather(1, self.ids[:, None]).sum()
            total += torch.autograd.grad(likely, at)[0] / _STEPS
        return self.heat((total * (tokens - tokens.mean(0))).sum(-1).abs().cpu().numpy())

    def masked(self, mask: np.ndarray) -> Image.Image:
        """The panorama with a mask [h, 2h] in its mean colour."""
        pixels = np.asarray(self.panorama)
        times = pixels.shape[0] // mask.shape[0]
        large = np.kron(mask, np.ones((times, times), bool))[..., None]
        return Image.fromarray(np.where(large, pixels.reshape(-1, 3).mean(0), pixels).astype(np.uint8))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.saliency", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT, help="folder (default: the repository)")
    parser.add_argument("--questions", type=int, default=30, help="(default: 30)")
    options = parser.parse_args(arguments)
    if (pipe := pipeline_of(options.model)) is None:
        return
    world = World(SEED, questions=2, kinds=KINDS, backgrounds=UNSEEN)
    questions = ((world.picture(scene), each) for scene in map(world.scene, range(10**6)) for each in world.ask(scene))
    random = np.random.default_rng(0)
    lost: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    aside: dict[str, list[float]] = defaultdict(list)
    for _, (picture, question) in zip(tqdm(range(options.questions), "questions"), questions, strict=False):
        asked = Asked(pipe, picture, question.words)
        before, _ = asked.likelihood(picture)
        heats = {
            "gradient": asked.gradient(),
            "integrated gradients": asked.integrated(),
            "attention": asked.attention(),
        }
        masks = {name: hottest(heat) for name, heat in heats.items()}
        blocks = np.kron(random.random((_BLOCKS, 2 * _BLOCKS)), np.ones((_ROWS // _BLOCKS, _ROWS // _BLOCKS)))
        masks["by chance"] = hottest(blocks)
        for name in ("gradient", "attention"):
            turn = int(random.integers(_ROWS // 2, 3 * _ROWS // 2))  # by 90 to 270 degrees
            masks[f"{name}, turned"] = np.roll(masks[name], turn, 1)
        for name, mask in masks.items():
            after, same = asked.likelihood(asked.masked(mask))
            lost[name].append((before - after, not same))
        if question.places and len(question.places) == 1:
            for name, heat in heats.items():
                at = np.unravel_index(heat.argmax(), heat.shape)
                yaw, pitch = ray_angles(View("erp").rays((_ROWS, 2 * _ROWS))[at])
                aside[name].append(great_circle((float(yaw), float(pitch)), question.places[0][:2]))
    print(f"{options.questions} questions; {math.pi * 4 * 0.1:.2f} of {math.pi * 4:.2f} steradians masked")
    print(f"{'masked':<30}{'nats lost':>10}{'median':>8}{'answer changed':>16}{'brightest from the thing':>26}")
    for name, losses in lost.items():
        nats, changed = zip(*losses, strict=True)
        figures = f"{statistics.mean(nats):10.2f}{statistics.median(nats):8.2f}{statistics.mean(changed):16.0%}"
        off = f"{statistics.median(aside[name]):.0f}° (median of {len(aside[name])})" if aside[name] else ""
        print(f"{name:<30}{figures}{off:>26}")


if __name__ == "__main__":
    main()
