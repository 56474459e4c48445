"""The ray caster: what a scene looks like, how far away it is and which thing is seen, for any rays.

Everything is exact for the ray of each pixel's middle; where another thing, or none, lies beside a pixel it is cast
again with 4 x 4 rays. All of it is torch, float32, the same on a CPU and a GPU to a grey level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..geometry_panorama import Grid, View, ViewPlan
from ..places_panorama import BFoV, bfov_of_rays
from .cutouts import SIDE, picture
from .scenes import COLOURS, EYES, Scene, Thing

Tensor = torch.Tensor
NOTHING = -1  # id of what is no thing
_FINE = 4  # rays a side of a pixel at an outline
_AMBIENT = 0.72
_LOOKED_AT: Grid = (512, 1024)  # cells by which it is known what is seen of a thing


class Picture(NamedTuple):
    """What rays see.

    Attributes:
        colour: [..., 3], float32 in [0, 1].
        depth: metres to what is seen [...]; infinite where nothing is.
        ids: which thing of the scene is seen [...], int16; -1 for none.
    """

    colour: Tensor
    depth: Tensor
    ids: Tensor


def cast(scene: Scene, rays: Tensor, panorama: Tensor | None = None, size: Grid | None = None) -> Picture:
    """Cast rays from the eyes.

    Args:
        scene: with its things.
        rays: unit rays [N, 3], float32.
        panorama: [3, H, W] in [0, 1], where the scene has a real one around it.
        size: rows and columns, where the rays are those of an equirectangular image: less is looked at then.
    """
    depth, ids, colour = _surroundings(scene, rays, panorama, size)
    for number, thing in enumerate(scene.things):
        near = _near(thing.position, thing.radius, rays, size)
        distance, shade = _hit(thing, rays[near], scene)
        closer = distance < depth[near]
        near = near[closer]
        depth[near], ids[near], colour[near] = distance[closer], number, shade[closer]
    return Picture(colour, depth, ids)


def _near(middle: Sequence[float], radius: float, rays: Tensor, size: Grid | None) -> Tensor:
    """The rays that pass a sphere, as indices; of an equirectangular image of a size only those around it are tried."""
    distance = math.dist((0, 0, 0), middle)
    sine = min(0.9999, radius / distance)
    ray = torch.tensor(middle, dtype=torch.float32, device=rays.device) / distance
    least = math.sqrt(1 - sine * sine) - 1e-5
    if size is None:
        return torch.nonzero(rays @ ray >= least)[:, 0]
    cells = _cells_around(middle, radius, size).to(rays.device)
    return cells[rays[cells] @ ray >= least]


# Things


def _hit(thing: Thing, rays: Tensor, scene: Scene | None) -> tuple[Tensor, Tensor]:
    """Distance [N] (infinite where a ray misses) and colour [N, 3] of one thing; black without a scene."""
    if thing.colour is None:
        return _hit_cutout(thing, rays)
    origin = -torch.tensor(thing.position, dtype=torch.float32, device=rays.device)
    turn = _upright_turn(-thing.turn, rays.device)
    distance, normal = _SOLIDS[thing.name](rays @ turn.T, turn @ origin, thing.extent / 2)
    if scene is None:
        return distance, torch.zeros_like(rays)
    normal = normal @ turn
    light = _sun(scene, rays.device)
    base = torch.tensor(COLOURS[thing.colour], dtype=torch.float32, device=rays.device) / 255
    lit = _AMBIENT + 0.08 * normal[:, 1] + 0.25 * (normal @ light).clamp(min=0)
    return distance, (base * lit[:, None]).clamp(0, 1)


def _hit_cutout(thing: Thing, rays: Tensor) -> tuple[Tensor, Tensor]:
    """A picture that stands upright, or hangs overhead, and faces the observer."""
    x, y, z = thing.position
    away = math.hypot(x, z)
    sine, cosine = (0.0, 1.0) if thing.stands else (y / thing.distance, away / thing.distance)
    facing = torch.tensor([cosine * x / away, sine, cosine * z / away], device=rays.device)
    right = torch.tensor([z / away, 0.0, -x / away], device=rays.device)
    upward = torch.tensor([-sine * x / away, cosine, -sine * z / away], device=rays.device)
    middle = torch.tensor(thing.position, device=rays.device)
    ahead = rays @ facing
    distance = (middle @ facing) / ahead.clamp(min=1e-6)
    across = (rays @ right) * distance / thing.extent + 0.5
    up = ((rays @ upward) * distance - middle @ upward) / thing.extent + 0.5
    inside = (ahead > 1e-6) & (across >= 0) & (across <= 1) & (up >= 0) & (up <= 1)
    texture = _texture(thing.name, str(rays.device))
    place = torch.stack([2 * across - 1, 1 - 2 * up], -1)[None, None]
    found = F.grid_sample(texture, place, mode="bilinear", padding_mode="zeros", align_corners=False)[0, :, 0].T
    opaque = inside & (found[:, 3] > 0.5)
    colour = found[:, :3] / found[:, 3:].clamp(min=1e-3)
    return torch.where(opaque, distance, torch.inf), colour.clamp(0, 1)


@lru_cache(maxsize=256)
def _texture(name: str, device: str) -> Tensor:
    """[1, 4, SIDE, SIDE], colour times opacity and opacity."""
    pixels = torch.from_numpy(picture(name).copy()).float().to(device) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels.permute(2, 0, 1)[None].reshape(1, 4, SIDE, SIDE)


def _ball(rays: Tensor, origin: Tensor, half: float) -> tuple[Tensor, Tensor]:
    along = rays @ origin
    inside = along * along - origin @ origin + half * half
    distance = torch.where(inside >= 0, -along - inside.clamp(min=0).sqrt(), torch.inf)
    distance = torch.where(distance > 0, distance, torch.inf)
    return distance, _point(rays, distance, origin) / half


def _convex(rays: Tensor, origin: Tensor, normals: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """A convex body of planes at the same distance from its middle."""
    falls = rays @ normals.T  # [N, planes]
    gap = reach - normals @ origin  # [planes]
    times = gap / torch.where(falls.abs() < 1e-9, 1e-9, falls)
    enters = torch.where(falls < 0, times, -torch.inf)
    first, which = enters.max(-1)
    last = torch.where(falls > 0, times, torch.inf).amin(-1)
    distance = torch.where((first <= last) & (first > 0), first, torch.inf)
    return distance, normals[which]


def _cube(rays: Tensor, origin: Tensor, half: float) -> tuple[Tensor, Tensor]:
    # Its sides are 0.9 of its extent, so that it is not taken for larger than a ball of the same size.
    flat = origin + torch.tensor([0.0, 0.1 * half, 0.0], device=rays.device)
    axes = torch.eye(3, device=rays.device)
    return _convex(rays, flat, torch.cat([axes, -axes]), 0.9 * half)


def _diamond(rays: Tensor, origin: Tensor, half: float) -> tuple[Tensor, Tensor]:
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], device=rays.device)] * 3)
    return _convex(rays, origin, signs / math.sqrt(3), half / math.sqrt(3))


def _cylinder(rays: Tensor, origin: Tensor, half: float) -> tuple[Tensor, Tensor]:
    width = 0.75 * half
    a = rays[:, 0] ** 2 + rays[:, 2] ** 2
    b = rays[:, 0] * origin[0] + rays[:, 2] * origin[2]
    c = origin[0] ** 2 + origin[2] ** 2 - width * width
    inside = b * b - a * c
    side = torch.where(inside >= 0, (-b - inside.clamp(min=0).sqrt()) / a.clamp(min=1e-9), torch.inf)
    point = _point(rays, side, origin)
    side = torch.where((side > 0) & (point[:, 1].abs() <= half), side, torch.inf)
    normal = torch.stack([point[:, 0], torch.zeros_like(a), point[:, 2]], -1) / width
    return _with_cap(rays, origin, side, normal, half, width)


def _cone(rays: Tensor, origin: Tensor, half: float) -> tuple[Tensor, Tensor]:
    width = 0.75 * half
    slope = width / (2 * half)  # radius a metre below the tip
    tip = origin[1] - half
    a = rays[:, 0] ** 2 + rays[:, 2] ** 2 - (slope * rays[:, 1]) ** 2
    b = rays[:, 0] * origin[0] + rays[:, 2] * origin[2] - slope**2 * rays[:, 1] * tip
    c = origin[0] ** 2 + origin[2] ** 2 - (slope * tip) ** 2
    inside = (b * b - a * c).clamp(min=-1.0)
    root = inside.clamp(min=0).sqrt()
    a = torch.where(a.abs() < 1e-7, 1e-7, a)
    best = torch.full_like(a, torch.inf)
    for sign in (-1.0, 1.0):  # both, because one may lie on the cone's double above the tip
        side = (-b + sign * root) / a
        height = rays[:, 1] * side + origin[1]
        good = (inside >= 0) & (side > 0) & (height.abs() <= half)
        best = torch.where(good & (side < best), side, best)
    point = _point(rays, best, origin)
    around = torch.hypot(point[:, 0], point[:, 2]).clamp(min=1e-6)
    normal = torch.stack([point[:, 0] / around, torch.full_like(a, slope), point[:, 2] / around], -1)
    return _with_cap(rays, origin, best, F.normalize(normal, dim=-1), half, width, top=False)


def _with_cap(
    rays: Tensor, origin: Tensor, side: Tensor, normal: Tensor, half: float, width: float, top: bool = True
) -> tuple[Tensor, Tensor]:
    """A round body with its flat ends."""
    for end in (1.0, -1.0) if top else (-1.0,):
        flat = torch.where(rays[:, 1] * end < 0, (end * half - origin[1]) / rays[:, 1].clamp(max=-1e-9), torch.inf)
        if end < 0:
            flat = torch.where(rays[:, 1] > 0, (-half - origin[1]) / rays[:, 1].clamp(min=1e-9), torch.inf)
        point = _point(rays, flat, origin)
        closer = (flat > 0) & (point[:, 0] ** 2 + point[:, 2] ** 2 <= width * width) & (flat < side)
        side = torch.where(closer, flat, side)
        normal = torch.where(closer[:, None], torch.tensor([0.0, end, 0.0], device=rays.device), normal)
    return side, normal


def _point(rays: Tensor, distance: Tensor, origin: Tensor) -> Tensor:
    """Where rays are, seen from the middle of a body."""
    return rays * torch.where(torch.isfinite(distance), distance, 0.0)[:, None] + origin


_SOLIDS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "ball": _ball,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "diamond": _diamond,
}


def _upright_turn(degrees: float, device: torch.device) -> Tensor:
    a = math.radians(degrees)
    turn = [[math.cos(a), 0.0, math.sin(a)], [0.0, 1.0, 0.0], [-math.sin(a), 0.0, math.cos(a)]]
    return torch.tensor(turn, dtype=torch.float32, device=device)


def _sun(scene: Scene, device: torch.device) -> Tensor:
    yaw, pitch = (math.radians(value) for value in scene.sun)
    ray = [math.cos(pitch) * math.sin(yaw), math.sin(pitch), math.cos(pitch) * math.cos(yaw)]
    return torch.tensor(ray, dtype=torch.float32, device=device)


# Surroundings


def _surroundings(
    scene: Scene, rays: Tensor, panorama: Tensor | None, size: Grid | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Depth [N], ids [N] and colour [N, 3] of what is around the things, with the shadows under them."""
    ids = torch.full((len(rays),), NOTHING, dtype=torch.int16, device=rays.device)
    below = rays[:, 1] < -1e-3
    floor = torch.where(below, -EYES / rays[:, 1].clamp(max=-1e-3), torch.inf)
    if scene.panorama is not None:
        if panorama is None:
            raise ValueError(f"the scene {scene.seed} has the panorama {scene.panorama!r} around it: give its pixels")
        whole = panorama.shape[1:] == size
        colour = _turned(panorama, scene.heading) if whole else _look_up(panorama, rays, scene.heading)
        depth = torch.full_like(floor, torch.inf)
    else:
        colour, depth = _drawn(scene, rays, floor)
    light = _shadows(scene, rays, torch.where(depth >= floor - 1e-3, floor, torch.inf), size)
    dark = torch.nonzero(light < 1)[:, 0]
    colour[dark] *= light[dark, None]
    return depth, ids, colour


def _turned(panorama: Tensor, heading: float) -> Tensor:
    """What :func:`_look_up` gives for all pixels of the image itself, [H * W, 3]: between two columns."""
    whole = math.floor(column := heading / 360 * panorama.shape[-1])
    pixels = panorama.permute(1, 2, 0).roll(-whole, 1)
    return torch.lerp(pixels, pixels.roll(-1, 1), column - whole).reshape(-1, 3)


def _look_up(panorama: Tensor, rays: Tensor, heading: float) -> Tensor:
    """Colours [N, 3] of an equirectangular image, around the seam too."""
    yaw = torch.atan2(rays[:, 0], rays[:, 2]) / (2 * math.pi) + heading / 360
    column = (yaw + 0.5) % 1.0
    row = 0.5 - torch.asin(rays[:, 1].clamp(-1, 1)) / math.pi
    width = panorama.shape[-1]
    wrapped = torch.cat([panorama[..., -1:], panorama, panorama[..., :1]], -1)
    x = (column * width + 1) / (width + 2)
    place = torch.stack([2 * x - 1, 2 * row - 1], -1)[None, None]
    return F.grid_sample(wrapped[None], place, padding_mode="border", align_corners=False)[0, :, 0].T.contiguous()


def _drawn(scene: Scene, rays: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Colour and depth of a floor under a sky, or in a room."""
    sky = torch.tensor(scene.sky, dtype=torch.float32, device=rays.device) / 255
    colour = sky * (1.05 - 0.35 * rays[:, 1:2].clamp(0, 1))
    depth = torch.full_like(floor, torch.inf)
    if scene.room is not None:
        wall = scene.room / rays[:, [0, 2]].abs().clamp(min=1e-6)
        ceiling = torch.where(rays[:, 1] > 1e-3, (scene.room * 0.55) / rays[:, 1].clamp(min=1e-3), torch.inf)
        depth, side = torch.cat([wall, ceiling[:, None]], -1).min(-1)
        shade = torch.tensor([0.82, 0.94, 1.06], device=rays.device)[side]
        stripes = 1 - 0.05 * ((rays.abs().amax(-1) * depth * 0.7) % 1 < 0.5)
        colour = sky * (shade * stripes)[:, None]
    near = floor < depth
    points = rays * torch.where(near, floor, 0.0)[:, None]
    colour = torch.where(near[:, None], _floor_colour(scene.ground, points), colour)
    return colour.clamp(0, 1), torch.where(near, floor, depth)


def _floor_colour(ground: str, points: Tensor) -> Tensor:
    """Colour [N, 3] of the floor at points; its pattern fades where it would be finer than pixels."""
    x, z = points[:, 0], points[:, 2]
    fade = 1 / (1 + 0.04 * (x * x + z * z))
    if ground == "tiles":
        base, pattern = (0.72, 0.70, 0.66), ((torch.floor(x) + torch.floor(z)) % 2) - 0.5
    elif ground == "wood":
        base, pattern = (0.60, 0.44, 0.30), torch.sin(2.1 * torch.floor(3 * x)) * 0.4 + 0.3 * torch.sin(9 * x + 0.8 * z)
    elif ground == "sand":
        base, pattern = (0.80, 0.71, 0.52), 0.4 * torch.sin(4.1 * x + 1.7 * torch.sin(1.3 * z))
    else:
        waves = torch.sin(7.3 * x + 2.1 * z) + torch.sin(3.7 * x - 5.9 * z) + torch.sin(11.1 * z + 4.3 * x)
        base, pattern = (0.36, 0.50, 0.24), 0.25 * waves
    bright = 1 + 0.22 * pattern * fade
    return torch.tensor(base, device=points.device) * bright[:, None]


def _shadows(scene: Scene, rays: Tensor, floor: Tensor, size: Grid | None) -> Tensor:
    """How bright the floor is where rays meet it at a distance [N], in [0.35, 1]: darker under and beside what stands
    on it."""
    light = torch.ones_like(floor)
    for thing in scene.things:
        if not thing.stands:
            continue
        reach = 0.75 * thing.extent
        x, _, z = thing.position
        near = _near((x, -EYES, z), reach, rays, size)
        near = near[torch.isfinite(floor[near])]
        points = rays[near] * floor[near, None]
        away = torch.hypot(points[:, 0] - x, points[:, 2] - z) / reach
        light[near] = torch.minimum(light[near], 0.35 + 0.65 * away.clamp(0, 1) ** 1.5)
    return light


# Pictures


def render_erp(scene: Scene, size: Grid, panorama: Tensor | None = None, device: str = "cpu") -> Picture:
    """The scene as an equirectangular image.

    Args:
        scene: with its things.
        size: rows and columns.
        panorama: [3, H, W] in [0, 1], where the scene has a real one around it.
        device: where to compute.

    Returns:
        Colour [H, W, 3], depth and ids [H, W].
    """
    return _render(scene, View("erp"), size, panorama, device)


def render_views(
    scene: Scene, plan: ViewPlan, image_size: int, panorama: Tensor | None = None, device: str = "cpu"
) -> Picture:
    """The scene straight into the views of a plan: what the image processor makes of its equirectangular image.

    Returns:
        Colour [V, S, S, 3], depth and ids [V, S, S].
    """
    size = (image_size, image_size)
    pictures = [_render(scene, view, size, panorama, device) for view in plan.views]
    return Picture(*(torch.stack(parts) for parts in zip(*pictures, strict=True)))


def _render(scene: Scene, view: View, size: Grid, panorama: Tensor | None, device: str) -> Picture:
    if panorama is not None:
        panorama = panorama.to(device)
        scene = replace(scene, sun=_brightest(panorama, scene.heading))
    rays = _rays(view, size, device)
    coarse = cast(scene, rays, panorama, size if view.is_global else None)
    colour = coarse.colour
    edges = _outlines(coarse.ids.reshape(size), view.is_global)
    if len(edges):
        fine = cast(scene, _fine_rays(view, size, edges.cpu().numpy(), device), panorama)
        colour[edges] = fine.colour.reshape(len(edges), _FINE * _FINE, 3).mean(1)
    return Picture(colour.reshape(*size, 3), coarse.depth.reshape(size), coarse.ids.reshape(size))


def _brightest(panorama: Tensor, heading: float) -> tuple[float, float]:
    """Where the light of a real panorama comes from, roughly: yaw and pitch of the brightest part above the horizon."""
    parts = F.adaptive_avg_pool2d(panorama.mean(0, keepdim=True), (8, 16))[0, :4]
    row, column = divmod(int(parts.argmax()), 16)
    return (column + 0.5) / 16 * 360 - 180 - heading, 90 - (row + 0.5) / 8 * 180


@lru_cache(maxsize=64)
def _rays(view: View, size: Grid, device: str) -> Tensor:
    return torch.from_numpy(view.rays(size).reshape(-1, 3).astype(np.float32)).to(device)


def _fine_rays(view: View, size: Grid, cells: np.ndarray, device: str) -> Tensor:
    """The rays of 4 x 4 places in each of some cells, [cells * 16, 3]."""
    aside = (np.arange(_FINE) + 0.5) / _FINE - 0.5
    rows, columns = np.divmod(cells, size[1])
    row = np.repeat(rows[:, None] + np.repeat(aside, _FINE), 1, 0)
    column = columns[:, None] + np.tile(aside, _FINE)
    return torch.from_numpy(view.rays_at(row, column, size).reshape(-1, 3).astype(np.float32)).to(device)


def _outlines(ids: Tensor, wraps: bool) -> Tensor:
    """Cells beside which another thing is seen, as indices."""
    changes = torch.zeros_like(ids, dtype=torch.bool)
    across = ids[:, 1:] != ids[:, :-1]
    changes[:, 1:] |= across
    changes[:, :-1] |= across
    if wraps:
        seam = ids[:, 0] != ids[:, -1]
        changes[:, 0] |= seam
        changes[:, -1] |= seam
    down = ids[1:] != ids[:-1]
    changes[1:] |= down
    changes[:-1] |= down
    return torch.nonzero(changes.reshape(-1))[:, 0]


def look(scene: Scene) -> Scene:
    """The same scene, with what is seen of each thing: the share of its outline that nothing hides, and its place."""
    exact, rays, weights = _sphere(_LOOKED_AT)
    outlines, distances = [], []
    for thing in scene.things:
        near = _near(thing.position, thing.radius, rays, _LOOKED_AT)
        distance = _hit(thing, rays[near], None)[0]
        hits = torch.isfinite(distance)
        outlines.append(near[hits])
        distances.append(distance[hits])
    depth = torch.empty(len(rays))  # where no thing is it is never read
    ids = torch.empty(len(rays), dtype=torch.int16)
    for cells in outlines:
        depth[cells] = torch.inf
    for number, (cells, distance) in enumerate(zip(outlines, distances, strict=True)):
        closer = distance < depth[cells]
        depth[cells[closer]], ids[cells[closer]] = distance[closer], number
    things = []
    for number, (thing, cells) in enumerate(zip(scene.things, outlines, strict=True)):
        seen = cells[ids[cells] == number]
        whole = weights[cells].sum()
        share = float(weights[seen].sum() / whole) if whole > 0 else 0.0
        place = bfov_of_rays(exact[seen.numpy()], size=360 / _LOOKED_AT[1])
        things.append(replace(thing, seen=min(1.0, share), place=_rounded(place)))
    return replace(scene, things=tuple(things))


@lru_cache(maxsize=2)
def _sphere(size: Grid) -> tuple[np.ndarray, Tensor, Tensor]:
    """Rays of an equirectangular image in both precisions, and what their cells are worth: they are narrower towards
    the poles."""
    exact = View("erp").rays(size).reshape(-1, 3)
    rays = torch.from_numpy(exact.astype(np.float32))
    return exact, rays, torch.sqrt((1 - rays[:, 1] ** 2).clamp(min=0))


def _cells_around(middle: Sequence[float], radius: float, size: Grid) -> Tensor:
    """The cells in which a sphere lies, as indices: those of a few rows and columns."""
    rows, columns = size
    x, y, z = middle
    distance = math.dist((0, 0, 0), middle)
    yaw, pitch = math.degrees(math.atan2(x, z)), math.degrees(math.asin(y / distance))
    reach = math.degrees(math.asin(min(1.0, radius / distance))) + 0.5
    low, high = pitch - reach, pitch + reach
    top = max(0, math.floor((0.5 - high / 180) * rows))
    bottom = min(rows, math.ceil((0.5 - low / 180) * rows))
    half = 180.0
    if max(abs(low), abs(high)) < 90:
        half = math.degrees(math.asin(min(1.0, math.sin(math.radians(reach)) / math.cos(math.radians(pitch)))))
    first = math.floor(((yaw - half) / 360 + 0.5) * columns)
    last = min(math.ceil(((yaw + half) / 360 + 0.5) * columns), first + columns)
    across = torch.arange(first, last) % columns
    return (torch.arange(top, bottom)[:, None] * columns + across).reshape(-1)


def _rounded(place: BFoV | None) -> BFoV | None:
    return None if place is None else BFoV(*(round(value, 2) for value in place))
