"""Where an answer looked: the gradient of its likelihood with respect to the image tokens, on the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..geometry_panorama import View
from ..modeling_panorama import PanoramaVLM
from ..pipeline_panorama import PanoramaPipeline
from ..tokens_panorama import image_tokens
from .features import erp_rays, tokens_that_show, view_groups
from .figure import EXTENT, ROWS, WIDTH, new_figure, sphere_axes

HEAT = "inferno"  # its lightness rises from end to end
_MOST_TOKENS = 256  # of an answer


class Saliency(NamedTuple):
    """Where an answer looked.

    Attributes:
        answer: that it is of.
        heat: how much each direction has to do with it, [H, 2H] on the equirectangular image, at least 0; its mean over
            the sphere is 1.
    """

    answer: str
    heat: np.ndarray


@torch.inference_mode(False)
def saliency(
    pipe: PanoramaPipeline,
    asked: Mapping[str, Any],
    answer: str | None = None,
    *,
    height: int = ROWS,
    max_new_tokens: int = _MOST_TOKENS,
) -> Saliency:
    """Where an answer looked: how strongly its log-probability depends on each image token (the length of the gradient;
    Simonyan et al. 2014, "Deep Inside Convolutional Networks", section 3), spread over the directions that it shows.

    It costs a pass forward and one backward, needs no attention weights, so that any attention serves, and leaves the
    model as it was. `docs/pictures.md` says how true it is: what becomes of answers where these directions are masked.

    Args:
        pipe: asks the model.
        asked: `{"panorama": ..., "question": ...}` or `{"messages": ...}` with one panorama, as a pipeline takes them.
        answer: what was said; what the model says where it is not given, with the steps before it.
        height: rows of the heat map.
        max_new_tokens: of what the model says.

    Raises:
        ValueError: for several panoramas or none, and where there is no answer.
    """
    model, processor = pipe.model, pipe.processor
    given = {name: value.to(model.device) for name, value in pipe.preprocess(dict(asked))["inputs"].items()}
    if len(given.get("pixel_values", ())) != 1:
        raise ValueError(f"a heat map is of one panorama, got {len(given.get('pixel_values', ()))} in the chat")
    if answer is None:
        said = model.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            tokenizer=processor.tokenizer,
        )
        ids, answer = said.generated_ids[:1], said.text[0]
    else:
        ids = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)
    if not ids.shape[1]:
        raise ValueError("an empty answer looked nowhere: ask something that is answered")
    input_ids = torch.cat([given["input_ids"], ids], 1)
    masks = {name: given.get(name) for name in ("view_mask", "further_views")}
    with torch.no_grad():
        image = model.model.get_image_features(given["pixel_values"], **masks, return_dict=True)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(input_ids), "logits_to_keep": ids.shape[1] + 1}
    if model.config.position_encoding == "panorope":
        options["position_ids"] = model.model.panorama_positions(input_ids, 1, options["attention_mask"], **masks)
    with torch.enable_grad():
        (tokens,) = (each.clone().requires_grad_() for each in image.pooler_output)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[tokens])}
        logits = model(input_ids=input_ids, mm_encoder_outputs=encoded, use_cache=False, **options).logits[:, :-1]
        likely = logits.float().log_softmax(-1).gather(-1, ids[..., None]).sum()
        (slopes,) = torch.autograd.grad(likely, tokens)
    return Saliency(answer, heat_map(model, slopes.float().norm(dim=-1).cpu().numpy(), given, height))


def heat_map(model: PanoramaVLM, scores: np.ndarray, given: Mapping[str, torch.Tensor], height: int) -> np.ndarray:
    """Scores of image tokens, spread over the directions that they show.

    Args:
        model: that is shown them.
        scores: [image tokens] of one panorama, at least 0.
        given: `view_mask` and `further_views` of the panorama, where it has them.
        height: rows of the map.

    Returns:
        Of each direction the sum over the tokens that show it, of score by solid angle, so that a token counts as much
        however wide it is: [height, 2 * height], of mean 1 over the sphere.
    """
    plan, grid, config = model.model.view_plan, model.model.token_grid, model.config
    size = grid[0] * grid[1]
    indices, _ = image_tokens(plan, grid, config.token_selection, config.position_code, torch.device("cpu"))
    kept = indices.numpy()
    if (mask := given.get("view_mask")) is not None:
        kept = kept[mask[0].cpu().numpy().astype(bool)[kept // size]]
    further = given.get("further_views", torch.empty(1, 0, 3))[0].cpu().numpy()
    closer = [View("perspective", yaw, pitch, fov) for yaw, pitch, fov in further.tolist() if np.isfinite(yaw)]
    views = [*plan.views, *closer]
    shown, density = np.zeros(len(views) * size, bool), np.zeros(len(views) * size)
    kept = np.concatenate([kept, np.arange(plan.num_views * size, len(views) * size)])
    areas = np.concatenate([view.solid_angles(grid).reshape(-1) for view in views])
    shown[kept], density[kept] = True, scores / areas[kept]
    shown, density = shown.reshape(-1, size), density.reshape(-1, size)
    rays = erp_rays(height)
    total = np.zeros(len(rays))
    for group in [*view_groups(plan), *([index] for index in range(plan.num_views, len(views)))]:
        found = tokens_that_show([views[index] for index in group], grid, rays, shown[group])
        total += np.where(found >= 0, density[group].reshape(-1)[found], 0)
    weights = View("erp").solid_angles((height, 2 * height))
    heat = total.reshape(height, 2 * height)
    return heat / max((heat * weights).sum() / weights.sum(), 1e-30)


def hottest(heat: np.ndarray, share: float = 0.1) -> np.ndarray:
    """The directions that are looked at most, a `share` of the sphere, bool [H, 2H]."""
    areas = View("erp").solid_angles(heat.shape).reshape(-1)
    order = np.argsort(-heat.reshape(-1), kind="stable")
    inside = np.zeros(heat.size, bool)
    inside[order[: np.searchsorted(np.cumsum(areas[order]), share * areas.sum())]] = True
    return inside.reshape(heat.shape)


def draw_saliency(panorama: Image.Image, found: Saliency, question: str = "", bar: bool = True) -> Figure:
    """The panorama in grey with the heat map over it, and a line around the tenth of the sphere that is looked at most.

    Args:
        panorama: equirectangular picture of the whole sphere.
        found: :func:`saliency` of it.
        question: for the title.
        bar: whether question, answer and the scale are shown.
    """
    figure = new_figure(8.5, 4.2) if bar else new_figure(5.2, 2.75)
    axes = figure.subplots()
    height, width = found.heat.shape
    grey = panorama.convert("L").resize((WIDTH, WIDTH // 2), Image.Resampling.LANCZOS)
    title = "\n".join(_short(words) for words in (question, found.answer) if words) if bar else ""
    sphere_axes(axes, grey, title, cmap="gray", vmin=-40, vmax=300)
    top = max(float(np.percentile(found.heat, 99.5)), 1e-6)
    scaled = np.clip(found.heat / top, 0, 1)
    axes.imshow(
        found.heat, extent=EXTENT, cmap=HEAT, vmin=0, vmax=top, alpha=0.1 + 0.55 * scaled, interpolation="bilinear"
    )
    yaw, pitch = (np.arange(width) + 0.5) / width * 360 - 180, 90 - (np.arange(height) + 0.5) / height * 180
    axes.contour(yaw, pitch, hottest(found.heat).astype(float), [0.5], colors="white", linewidths=1.2)
    if bar:
        scale = figure.colorbar(ScalarMappable(Normalize(0, top), HEAT), ax=axes, shrink=0.8, pad=0.01)
        scale.set_label("times the mean of the sphere", fontsize=8)
        scale.ax.tick_params(labelsize=8)
    return figure


def _short(words: str, longest: int = 110) -> str:
    words = " ".join(words.split()).replace("$", r"\$")
    return words if len(words) <= longest else f"{words[: longest - 1]}…"
