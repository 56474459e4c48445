"""Vectors of panoramas and of directions, for retrieval."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from panorama_vlm.geometry_panorama import View, ViewOptions, direction_weights
from panorama_vlm.tests.test_reading import encoded
from PIL import Image

PAGE = Path(__file__).resolve().parent.parent / "docs/search.md"
GRID = (16, 16)
PLANS = {
    "default": ViewOptions(),
    "cubemap": ViewOptions(view_strategy="cubemap"),
    "tiles that touch": ViewOptions(view_strategy="anyres_tiles", fov_deg=72),
    "caps": ViewOptions(pole_caps=True),
    "windows": ViewOptions(view_strategy="sliding_window"),
    "one view": ViewOptions(view_strategy="resize"),
}


def sphere(count=40_000):
    """Unit rays [count, 3] spread evenly over the sphere, along a spiral from pole to pole (Fibonacci)."""
    index = np.arange(count) + 0.5
    height, turn = 1 - 2 * index / count, index * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.sin(turn), height, radius * np.cos(turn)], -1)


@pytest.mark.parametrize(
    "view", [View("perspective", 30, 20, 90), View("perspective", -100, -80, 40), View("erp"), View("erp", 20, 0, 90)]
)
def test_solid_angles_are_those_of_rays_spread_evenly_over_the_sphere(view):
    grid = (4, 6)
    row, column, inside = view.cells(sphere(400_000), grid, margin=0.5)
    cells = np.clip(np.rint(row), 0, 3).astype(int) * 6 + np.rint(column).astype(int) % 6
    counts = np.bincount(cells[inside], minlength=24) / 400_000 * 4 * math.pi
    np.testing.assert_allclose(view.solid_angles(grid).reshape(-1), counts, rtol=0.03)


@pytest.mark.parametrize("name", PLANS)
def test_every_part_of_the_sphere_counts_once(name):
    plan = PLANS[name].plan
    whole, *ahead = direction_weights(plan, GRID, [(0, 0, 90), (180, 0, 90)])
    assert whole.sum() == pytest.approx(4 * math.pi, rel=0.08)  # slivers lie in no token or in two, see docs/views.md
    for weights in ahead:  # a sixth of the sphere is the face of a cube
        assert weights.sum() == pytest.approx(4 * math.pi / 6, rel=0.15)
    if name == "cubemap":
        assert whole.sum() == pytest.approx(4 * math.pi)
        assert ahead[0].sum() == pytest.approx(4 * math.pi / 6)


def test_they_are_the_means_of_the_tokens_by_solid_angle(make, panoramas):
    """Written out for a cube, whose faces are their own directions."""
    model, processor = make(view_strategy="cubemap")
    inputs = processor.image_processor(panoramas[:2], return_tensors="pt")
    with torch.no_grad():
        features = model.get_panorama_features(**inputs)
        tokens = model.get_image_features(**inputs).last_hidden_state.double()  # [2, 6, 16, D]
    middle = (np.arange(4) + 0.5) / 2 - 1
    angle = torch.tensor((1 + middle**2 + middle[:, None] ** 2) ** -1.5).reshape(-1, 1)  # of a small cell: cos^3
    faces = F.normalize((tokens * angle).sum(2), dim=-1)
    assert features.directions.tolist() == [[yaw, pitch, 90] for yaw, pitch in [*_SIDES, (0, 90), (0, -90)]]
    assert F.cosine_similarity(features.direction_embeds.double(), faces, dim=-1).min() > 1 - 1e-3
    whole = F.normalize((tokens * angle).sum((1, 2)), dim=-1)
    assert F.cosine_similarity(features.panorama_embeds.double(), whole, dim=-1).min() > 1 - 1e-3
    torch.testing.assert_close(features.direction_embeds.norm(dim=-1), torch.ones(2, 6))


_SIDES = [(0, 0), (90, 0), (-180, 0), (-90, 0)]


def test_a_panorama_turned_has_its_directions_turned_and_stays_itself(make, panoramas):
    model, processor = make(view_strategy="e2p", fov_deg=90)
    images = processor.image_processor
    with torch.no_grad():
        features = model.get_panorama_features(**images(panoramas, return_tensors="pt"))
        turned = model.get_panorama_features(**images(panoramas, return_tensors="pt", yaw_offsets=[90.0] * 6))
    torch.testing.assert_close(turned.direction_embeds, features.direction_embeds.roll(-2, 1), atol=1e-3, rtol=0)
    torch.testing.assert_close(turned.panorama_embeds, features.panorama_embeds, atol=1e-3, rtol=0)


def test_other_directions_are_asked_for_without_running_the_tower_on_more(make, panoramas):
    model, processor = make()
    inputs = processor.image_processor(panoramas[:1], return_tensors="pt")
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    with torch.no_grad():
        asked = model.get_panorama_features(**inputs, directions=[(45, 0, 90), (10, 5, 60), (0, 90, 60)])
        default = model.get_panorama_features(**inputs)
    assert seen == [9, 9] and asked.direction_embeds.shape[1] == 3
    torch.testing.assert_close(asked.direction_embeds[:, 0], default.direction_embeds[:, 1])
    torch.testing.assert_close(asked.panorama_embeds, default.panorama_embeds)
    one_view, processor = make(view_strategy="resize")
    features = one_view.get_panorama_features(**processor.image_processor(panoramas[:1], return_tensors="pt"))
    assert features.directions.tolist() == [[*side, 90] for side in _SIDES]


def test_what_a_partial_panorama_does_not_show_is_left_out(make, panoramas):
    model, processor = make(view_strategy="cubemap")
    inputs = processor.image_processor(panoramas[:1], return_tensors="pt")
    front = torch.tensor([[True, False, False, False, False, False]])
    other = {"pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][:, 1:] = 3.0
    with torch.no_grad():
        features = model.get_panorama_features(**inputs, view_mask=front)
        masked = model.get_panorama_features(**other, view_mask=front)
    torch.testing.assert_close(features.panorama_embeds, masked.panorama_embeds)
    torch.testing.assert_close(features.panorama_embeds, features.direction_embeds[:, 0])
    assert not features.direction_embeds[:, 1:].any()


def test_they_can_be_trained_with_and_are_float32_in_half_precision(make, panoramas):
    model, processor = make()
    inputs = processor.image_processor(panoramas[:2], return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        features = model.get_panorama_features(**inputs)
    assert features.panorama_embeds.dtype == features.direction_embeds.dtype == torch.float32
    features.direction_embeds.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.resampler.parameters())
    half = model.to(torch.bfloat16).get_panorama_features(**inputs)
    assert F.cosine_similarity(half.panorama_embeds, features.panorama_embeds).min() > 0.99


def test_directions_that_cannot_be_are_refused(make, panoramas):
    model, processor = make(view_strategy="e2p")
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt")["pixel_values"]
    with pytest.raises(ValueError, match=r"a direction must be .* got \(0, 95, 60\)"):
        model.get_panorama_features(pixels, directions=[(0, 95, 60)])
    with pytest.raises(ValueError, match="no token of these views looks in the direction .0.0, 90.0, 30.0"):
        model.get_panorama_features(pixels, directions=[(0, 90, 30)])
    with pytest.raises(ValueError, match="a view must be .* got .0.0, 0.0, 190"):
        model.get_view_features(pixels[:, 0], fov_deg=190)
    with pytest.raises(TypeError, match="further_views"):  # nothing is left out in silence
        model.get_panorama_features(pixels, further_views=torch.zeros(1, 1, 3))


def test_a_photograph_is_the_view_that_it_would_be_in_the_panorama(make, panoramas, tmp_path):
    model, processor = make(view_strategy="cubemap")
    images = processor.image_processor
    views = images(panoramas[:1], return_tensors="pt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
    square = ((views["pixel_values"][0, 1] * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
    wide = np.pad(square, ((0, 0), (20, 20), (0, 0)))  # the middle is taken
    Image.fromarray(wide).save(tmp_path / "photo.png")
    photographs = images.photographs([tmp_path / "photo.png", Image.fromarray(square)])
    torch.testing.assert_close(photographs, views["pixel_values"][0, [1, 1]], atol=0.01, rtol=0)
    deep = encoded(Image.fromarray(square[..., 0].astype(np.uint16) * 257))  # 16 bit
    url = "data:image/png;base64," + base64.b64encode(deep).decode()
    assert torch.equal(images.photographs([deep, url]), images.photographs([Image.fromarray(square[..., 0])] * 2))
    with pytest.raises(ValueError, match=r"cannot read .*none\.png"):
        (tmp_path / "none.png").write_bytes(deep[:60])
        images.photographs(tmp_path / "none.png")
    with torch.no_grad():
        photo = model.get_view_features(photographs, fov_deg=90)
        features = model.get_panorama_features(**views)
    torch.testing.assert_close(photo[0], features.direction_embeds[0, 1], atol=1e-3, rtol=0)


def test_the_lines_of_the_page_find_a_photograph_and_say_which_way_to_look(make, panoramas, tmp_path, capsys):
    """The tower is random: what is looked for is a red wall to the right, in another light and from another angle."""
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "samples").mkdir()
    wall = panoramas[2].copy()
    wall.paste((180, 30, 20), (340, 64, 428, 192))  # 62 degrees wide around a yaw of 90
    for number, panorama in enumerate([*panoramas[:2], wall, *panoramas[3:]]):
        panorama.save(tmp_path / f"samples/{number}.jpg")
    seen = processor.image_processor(wall, further_views=[[(97.0, 0.0, 70.0)]], image_size=256, return_tensors="pt")
    photo = ((seen["pixel_values"][0, 9] * 0.5 + 0.5) * 255 * 0.9).byte().permute(1, 2, 0).numpy()
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    code = re.search(r"```python\n(.*?)```", PAGE.read_text().partition("## Vectors")[2], re.DOTALL)[1]
    for given, local in (("build/demo/model", "model"), ("samples", "samples"), ("photo.jpg", "photo.jpg")):
        assert f'"{given}"' in code
        code = code.replace(f'"{given}"', repr(str(tmp_path / local)))
    exec(code, {})
    assert capsys.readouterr().out == f"{tmp_path}/samples/2.jpg: look 90 degrees to the right, 0 up\n"
