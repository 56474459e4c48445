"""Scenes: things around an observer, all of it a function of a seed.

The observer stands at the origin, his eyes 1.6 m above the floor; x right, y up, z forward, as in `geometry_panorama`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..geometry_panorama import ray_angles
from ..places_panorama import BFoV

EYES = 1.6  # metres above the floor
COLOURS = {
    "red": (205, 32, 32),
    "orange": (240, 130, 20),
    "yellow": (242, 216, 40),
    "green": (38, 140, 56),
    "blue": (36, 82, 205),
    "purple": (130, 50, 160),
    "white": (236, 236, 232),
    "black": (44, 44, 47),
}
SHAPES = ("ball", "cube", "cylinder", "cone", "diamond")
SIZES = {"small": 0.5, "medium": 1.0, "large": 1.8}  # metres, height and width
GROUNDS = ("meadow", "sand", "tiles", "wood")
_MOST_TRIES = 200


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        name: its shape, or what a cut-out shows.
        colour: of a solid; `None` of a cut-out.
        size: `small`, `medium` or `large`.
        position: of its middle, metres.
        turn: degrees about its own upright axis.
        seen: share of its outline that nothing hides, in [0, 1]; known when the scene was looked at.
        place: of what is seen of it; `None` where nothing is.
    """

    name: str
    colour: str | None
    size: str
    position: tuple[float, float, float]
    turn: float = 0.0
    seen: float = 1.0
    place: BFoV | None = None

    @property
    def extent(self) -> float:
        """Height and width in metres."""
        return SIZES[self.size]

    @property
    def radius(self) -> float:
        """Of the sphere around it, metres."""
        return self.extent * {"ball": 0.5, "cube": 0.81, "cylinder": 0.65, "cone": 0.65, "diamond": 0.5}.get(
            self.name, 0.71
        )

    @cached_property
    def distance(self) -> float:
        """From the eyes to its middle, metres."""
        return math.dist((0, 0, 0), self.position)

    @cached_property
    def yaw(self) -> float:
        """Of its middle, degrees."""
        return float(ray_angles(np.array(self.position) / self.distance)[0])

    @cached_property
    def pitch(self) -> float:
        """Of its middle, degrees."""
        return float(ray_angles(np.array(self.position) / self.distance)[1])

    @property
    def stands(self) -> bool:
        """Whether it is on the floor."""
        return abs(self.position[1] + EYES - self.extent / 2) < 0.01

    @property
    def words(self) -> str:
        """What it is called where no other is like it: `small red ball`, `dog`."""
        return f"{self.size} {self.colour} {self.name}" if self.colour else self.name


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture.

    Attributes:
        seed: it was made from.
        things: in no order.
        ground: texture of the floor, where the surroundings are drawn.
        sky: colour of the sky above it, or of the walls of a room.
        room: half the width of the room, metres; `None` outdoors.
        sun: yaw and pitch of the light, degrees, where the surroundings are drawn; a real panorama lights by itself.
        panorama: name of the real panorama around, `None` where the surroundings are drawn.
        heading: by which that panorama is turned, degrees.
    """

    seed: int
    things: tuple[Thing, ...]
    ground: str = "meadow"
    sky: tuple[int, int, int] = (150, 190, 235)
    room: float | None = None
    sun: tuple[float, float] = (30.0, 50.0)
    panorama: str | None = None
    heading: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        """The scene that `to_dict` wrote."""
        things = tuple(_thing(each) for each in values["things"])
        return cls(**{**values, "things": things, "sky": tuple(values["sky"]), "sun": tuple(values["sun"])})


def _thing(values: dict[str, Any]) -> Thing:
    place = None if values["place"] is None else BFoV(*values["place"])
    return Thing(**{**values, "position": tuple(values["position"]), "place": place})


def make_scene(seed: int, names: Sequence[str] = (), panoramas: Sequence[str] = ()) -> Scene:
    """A scene of 3 to 10 things; nothing of it has been looked at (`look` of `render` does that).

    Args:
        seed: decides everything, with the names and panoramas there are.
        names: of cut-outs there may be.
        panoramas: files of real panoramas, of which every second scene has one around it.
    """
    random = np.random.default_rng((seed, 20261))
    real = bool(panoramas) and random.random() < 0.5
    # In every second scene several are alike, or there would be little to count.
    alike = int(random.integers(2, 7)) if random.random() < 0.5 else 0
    count = int(random.integers(max(3, alike), 11))
    shared = [("name", "colour"), ("name",), ("colour",)][int(random.integers(3))]
    things: list[Thing] = []
    model = _draw_thing(random, (), [])
    for number in range(count):
        for _ in range(_MOST_TRIES):
            thing = _draw_thing(random, names, things)
            if number < alike:
                thing = _like(thing, model, shared, random)
            if all(math.dist(thing.position, other.position) > thing.radius + other.radius for other in things):
                things.append(thing)
                break
    room = None if real or random.random() < 0.5 else float(random.uniform(8.5, 12.0))
    shade = random.integers(-25, 26, 3)
    base = (170, 200, 235) if room is None else (200, 192, 178)
    return Scene(
        seed=seed,
        things=tuple(things),
        ground=str(random.choice(GROUNDS)),
        sky=tuple(int(np.clip(value + step, 0, 255)) for value, step in zip(base, shade, strict=True)),  # type: ignore[arg-type]
        room=room,
        sun=(float(random.uniform(-180, 180)), float(random.uniform(35, 70))),
        panorama=Path(str(random.choice(list(panoramas)))).name if real else None,
        heading=float(random.integers(0, 360)) if real else 0.0,
    )


def _draw_thing(random: np.random.Generator, names: Sequence[str], others: Sequence[Thing]) -> Thing:
    """One thing somewhere: on the floor, underfoot or overhead; sometimes near another, so that one hides the other."""
    is_cutout = bool(names) and random.random() < 0.45
    where = random.choice(["floor", "underfoot", "overhead"], p=[0.76, 0.1, 0.14])
    size = str(random.choice(list(SIZES)))
    if where != "floor" and size == "large":
        size = "medium"
    if where == "underfoot":
        size, is_cutout = "small", False
    name = str(random.choice(list(names) if is_cutout else list(SHAPES)))
    colour = None if is_cutout else str(random.choice(list(COLOURS)))
    extent = SIZES[size]
    yaw = float(random.uniform(-180, 180))
    if others and random.random() < 0.25:
        yaw = others[int(random.integers(len(others)))].yaw + float(random.uniform(-15, 15))
    if where == "floor":
        low = 1.0 + 0.8 * extent
        away = float(random.uniform(low, low + 0.8 + 3.0 * extent))
        y = extent / 2 - EYES
    elif where == "underfoot":
        away, y = float(random.uniform(0.25, 1.0)), extent / 2 - EYES
    else:
        pitch = math.radians(random.uniform(30, 85))
        far = float(random.uniform(1.6 + extent, 3.5 + extent))
        away, y = far * math.cos(pitch), far * math.sin(pitch)
    turn = 0.0 if is_cutout else float(random.uniform(0, 90))
    angle = math.radians(yaw)
    position = (away * math.sin(angle), y, away * math.cos(angle))
    return Thing(name, colour, size, position, turn)


def _like(thing: Thing, model: Thing, shared: Sequence[str], random: np.random.Generator) -> Thing:
    """A solid where a thing is, which shares its shape or its colour, or both, with another."""
    own: dict[str, Any] = {"name": str(random.choice(SHAPES)), "colour": str(random.choice(list(COLOURS)))}
    own |= {attribute: getattr(model, attribute) for attribute in shared}
    return dataclasses.replace(thing, turn=float(random.uniform(0, 90)), **own)


def seed_of(*parts: Any) -> int:
    """A seed that follows from anything that prints."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
