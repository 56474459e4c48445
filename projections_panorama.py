"""Projections: pictures of the sphere that are not equirectangular, laid down as such, and what looks like them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_ROWS = 128  # of the sphere that are made at a time
Place = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
Covered = tuple[float, float, float, float]


@dataclass(frozen=True)
class Projection:
    """How a picture shows the sphere, as `name` or `name:option=value,option=value`.

    Args:
        name: `equirectangular`; `cubemap_3x2`, `cubemap_6x1` (six faces in rows); `dual_fisheye` (two equidistant
            circles side by side); `cylindrical` (all around, of square pixels at the horizon); `stereo_side_by_side`,
            `stereo_top_bottom` (two whole spheres, of which the left or upper one is taken); `vr180` (the front half of
            the sphere for two eyes side by side, of which the left is taken).
        faces: order of the faces, row by row: right, left, up, down, front, back as in `rludfb`, FFmpeg's. Up and
            down are seen with the front at their lower and upper edge.
        fov: of each circle in degrees; has to be given, it is the lens that has it.
        radius: of each circle, as a share of half the height.
        front: which circle looks to the front, `left` or `right`.
    """

    name: str = "equirectangular"
    faces: str = "rludfb"
    fov: float | None = None
    radius: float = 1.0
    front: str = "left"

    @classmethod
    def parse(cls, text: "str | Projection | None") -> "Projection":
        """From its text, `None` for the usual one.

        Raises:
            ValueError: for a name or an option that there is not, or a value that it cannot have.
        """
        if isinstance(text, Projection):
            return text
        name, _, options = (text or "equirectangular").partition(":")
        if name not in _OPTIONS:
            raise ValueError(f"projection must be one of {', '.join(_OPTIONS)}, got {name!r}")
        given: dict[str, Any] = {}
        for option in filter(None, options.split(",")):
            key, _, value = option.partition("=")
            if key not in _OPTIONS[name]:
                raise ValueError(f"projection {name!r} has the options {list(_OPTIONS[name])}, got {option!r}")
            try:
                given[key] = float(value) if key in ("fov", "radius") else value
            except ValueError:
                raise ValueError(f"{key} of projection {name!r} must be a number, got {value!r}") from None
        made = cls(name, **given)
        if sorted(made.faces) != sorted("rludfb"):
            raise ValueError(f"faces must hold each of r, l, u, d, f, b once, got {made.faces!r}. Typical: rludfb")
        if name == "dual_fisheye" and not (made.fov is not None and 180 <= made.fov < 360):
            raise ValueError(
                f"dual_fisheye needs the field of view of its lenses in [180, 360) degrees, got {made.fov}. Typical: "
                "projection='dual_fisheye:fov=190'"
            )
        if not 0 < made.radius <= 1.5 or made.front not in ("left", "right"):
            raise ValueError(
                f"radius must be in (0, 1.5] and front 'left' or 'right', got {made.radius} and {made.front!r}"
            )
        return made

    def native_width(self, height: int, width: int) -> float:
        """Pixels around the whole sphere that a picture of this size has."""
        return {
            "cubemap_3x2": 4 * width / 3,
            "cubemap_6x1": 4 * width / 6,
            "dual_fisheye": 360 / (self.fov or 180) * height * self.radius,
            "stereo_side_by_side": max(width / 2, 2 * height),
            "vr180": max(width, 2 * height),
        }.get(self.name, width)

    def check_size(self, height: int, width: int) -> None:
        """Refuse a picture that cannot be of this projection."""
        sides = {"cubemap_3x2": 3 / 2, "cubemap_6x1": 6.0, "dual_fisheye": 2.0}.get(self.name)
        if sides is not None and abs(width / height / sides - 1) > 0.02:
            raise ValueError(f"a {self.name} is {sides:g}:1, and it has {width} x {height} pixels")

    def covered(self, height: int, width: int) -> Covered | None:
        """The part of the sphere that is shown, as :attr:`Panorama.covered` has it."""
        if self.name == "vr180":
            return 0.0, 1.0, 0.25, 0.75
        return None

    def places(self, rays: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Where directions [..., 3] (x right, y up, z forward) are seen: columns and rows, in pixels from the upper
        left corner of a picture [height, width]."""
        x, y, z = np.moveaxis(rays, -1, 0)
        if self.name in ("cubemap_3x2", "cubemap_6x1"):
            return self._on_a_cube(x, y, z, height, width)
        if self.name == "dual_fisheye":
            front = z >= 0
            angle = np.arccos(np.clip(np.abs(z), 0, 1))
            radius = angle / np.radians((self.fov or 180) / 2) * self.radius * height / 2
            aside = np.maximum(np.hypot(x, y), 1e-12)
            on_the_left = front if self.front == "left" else ~front
            middle = np.where(on_the_left, width / 4, 3 * width / 4)
            return middle + np.where(front, x, -x) / aside * radius, height / 2 - y / aside * radius
        column = np.arctan2(x, z) / (2 * np.pi) + 0.5
        row = 0.5 - np.arcsin(np.clip(y, -1, 1)) / np.pi
        if self.name == "stereo_side_by_side":
            return np.clip(column * width / 2, 0.5, width / 2 - 0.5), row * height
        if self.name == "stereo_top_bottom":
            return column * width, np.clip(row * height / 2, 0.5, height / 2 - 0.5)
        return np.clip((2 * column - 0.5) * width / 2, 0.5, width / 2 - 0.5), row * height  # vr180

    def _on_a_cube(
        self, x: np.ndarray, y: np.ndarray, z: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        across, down = (3, 2) if self.name == "cubemap_3x2" else (6, 1)
        size = (width / across, height / down)
        most = np.maximum(np.maximum(np.abs(x), np.abs(y)), np.abs(z))
        columns, rows = np.empty_like(x), np.empty_like(x)
        seen = {
            "f": (z, x, -y),
            "b": (-z, -x, -y),
            "r": (x, -z, -y),
            "l": (-x, z, -y),
            "u": (y, x, z),
            "d": (-y, x, -z),
        }
        for place, face in enumerate(self.faces):
            depth, right, below = seen[face]
            mine = depth >= most
            top, left = divmod(place, across)
            for out, along, first, length in ((columns, right, left, size[0]), (rows, below, top, size[1])):
                share = (along[mine] / depth[mine] + 1) / 2 * length
                out[mine] = first * length + np.clip(share, 0.5, length - 0.5)  # nothing of the face beside it
        return columns, rows


_OPTIONS: dict[str, tuple[str, ...]] = {
    "equirectangular": (),
    "cubemap_3x2": ("faces",),
    "cubemap_6x1": ("faces",),
    "dual_fisheye": ("fov", "radius", "front"),
    "cylindrical": (),
    "stereo_side_by_side": (),
    "stereo_top_bottom": (),
    "vr180": (),
}


def to_equirectangular(
    pixels: torch.Tensor, projection: Projection, needed_width: float, neutral: torch.Tensor
) -> tuple[torch.Tensor, Covered | None]:
    """A picture [h, w, C] on the whole sphere [H, 2 H, C] (bilinear), no wider than it is fine or twice `needed_width`,
    and the part of the sphere that it covers; `neutral` [C] elsewhere."""
    height, width = pixels.shape[:2]
    projection.check_size(height, width)
    half = max(1, round(min(projection.native_width(height, width), 2 * needed_width) / 2))
    covered = projection.covered(height, width)
    out = torch.empty(half, 2 * half, pixels.shape[-1], dtype=pixels.dtype, device=pixels.device)
    source = pixels.permute(2, 0, 1)[None].float()
    if projection.name == "stereo_top_bottom":  # all around: it goes on at the seam
        source = torch.cat([source[..., -1:], source, source[..., :1]], -1)
    beyond = (source.shape[-1] - width) // 2
    yaw = ((np.arange(2 * half) + 0.5) / (2 * half) - 0.5) * 2 * np.pi
    for top in range(0, half, _ROWS):
        pitch = (0.5 - (np.arange(top, min(top + _ROWS, half)) + 0.5) / half)[:, None] * np.pi
        rays = np.stack(
            np.broadcast_arrays(np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)), -1
        )
        column, row = projection.places(rays, height, width)
        grid = np.stack([2 * (column + beyond) / source.shape[-1] - 1, 2 * row / height - 1], -1)
        sampled = F.grid_sample(
            source, torch.from_numpy(grid).to(source)[None], padding_mode="border", align_corners=False
        )[0].permute(1, 2, 0)
        out[top : top + len(pitch)] = sampled.round() if pixels.dtype == torch.uint8 else sampled
    if covered is not None:
        rows, columns = (np.arange(half) + 0.5) / half, (np.arange(2 * half) + 0.5) / (2 * half)
        unseen = ~(
            ((rows > covered[0]) & (rows < covered[1]))[:, None] & ((columns > covered[2]) & (columns < covered[3]))
        )
        out[torch.from_numpy(unseen)] = neutral
    return out, covered


def looks_like(pixels: torch.Tensor) -> str | None:
    """What a picture [H, W, 3] of 2:1 seems to be that is no equirectangular panorama, and how to say so; `None` where
    nothing speaks clearly against one."""
    height, width = pixels.shape[:2]
    if height < 32 or width < 64:
        return None
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) / n * size, size - 1).astype(int) for n, size in ((64, height), (128, width))
    )
    small = _grey(pixels[rows[:, None], columns])  # [64, 128]
    if small.std() < 0.02:
        return None
    outside, inside = (small[place] for place in _circles())
    if outside.max() < 0.06 and outside.std() < 0.01 and inside.std() > 0.05 and (inside < 0.06).mean() < 0.5:
        return "two fisheye circles: projection='dual_fisheye:fov=…' with the field of view of its lenses"
    if _alike(small[:, :64], small[:, 64:]):
        return "two pictures side by side: projection='stereo_side_by_side', or 'vr180' where each shows the front half"
    if _alike(small[:32], small[32:]):
        return "two pictures one above the other: projection='stereo_top_bottom'"
    edges = _grey(pixels[rows[2::4], :: width - 1])  # [16, 2]
    seam = float(np.abs(edges[:, 0] - edges[:, 1]).mean())
    if seam <= 0.05:
        return None
    steps = np.abs(np.diff(_grey(pixels[rows[2::4]]), axis=1)).mean(0)  # [W - 1]
    poles = min(float(_grey(pixels[row, columns]).std()) for row in (0, -1))
    if seam > 4 * float(np.quantile(steps, 0.99)) and poles > max(0.05, 0.5 * float(small.std(1).mean())):
        return (
            "a photograph or fisheye circles that fill it, since left and right edge do not continue each other and "
            "top and bottom are no points: projection='dual_fisheye:fov=…' for two circles"
        )
    return None


@cache
def _circles() -> tuple[np.ndarray, np.ndarray]:
    """What of [64, 128] lies outside of two circles side by side, and inside, bool."""
    y, x = (np.arange(64) + 0.5) / 32 - 1, (np.arange(128) + 0.5) / 32
    away = np.hypot(np.where(x < 2, x - 1, x - 3)[None], y[:, None])
    return away > 1.06, away < 0.9


def _grey(pixels: torch.Tensor) -> np.ndarray:
    """[..., 3] -> [...] in [0, 1], float32."""
    unit = 255 if pixels.dtype == torch.uint8 else 1
    return pixels.cpu().numpy().astype(np.float32) @ np.full(3, 1 / 3 / unit, np.float32)


def hint(height: int, width: int) -> str:
    """What a picture that is not 2:1 may be by its sides, as the end of a sentence; empty where they say nothing."""
    known = {3 / 2: "projection='cubemap_3x2'", 6.0: "projection='cubemap_6x1'", 1.0: "projection='stereo_top_bottom'"}
    sides = next((sides for sides in known if abs(width / height / sides - 1) < 0.01), None)
    if sides is None:
        return ""
    single = "; of single faces of a cube make one picture, for projection='cubemap_6x1'" if sides == 1 else ""
    return f" (it may be for {known[sides]}{single})"


def _alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two halves show the same, beyond what each row or the whole has in common."""
    difference = first - second
    apart = float(difference.std() + abs(difference.mean()))
    if apart >= 0.6 * min(float(first.std()), float(second.std())):  # as below, where less is asked
        return False
    first, second = (half - half.mean(1, keepdims=True) for half in (first, second))
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    least = min(float(first.std()), float(second.std()))
    return least > 0.02 and float((first * second).sum()) > 0.85 * size and apart < 0.6 * least
