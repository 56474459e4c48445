"""Everyday things as cut-outs: pictures of a colour font, by the names that people give them.

The pictures are those of Noto Color Emoji (SIL Open Font License 1.1), read from the font where it is installed
(`apt install fonts-noto-color-emoji`, or any path in `PANORAMA_VLM_EMOJI_FONT`; set to nothing, it leaves them out);
they are not part of this repository.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LICENCE = "Pictures of things: Noto Color Emoji, Copyright Google LLC, SIL Open Font License 1.1"
VARIABLE = "PANORAMA_VLM_EMOJI_FONT"
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
FILE = "NotoColorEmoji.ttf"
_SIZE = 109  # of the bitmaps in the font; it has no other
SIDE = 128  # pixels of a cut-out

THINGS = {
    "animals": (
        "dog 🐕 cat 🐈 horse 🐎 cow 🐄 pig 🐖 sheep 🐑 goat 🐐 camel 🐫 elephant 🐘 rabbit 🐇 mouse 🐁 chicken 🐓 "
        "duck 🦆 owl 🦉 penguin 🐧 turtle 🐢 snake 🐍 fish 🐟 dolphin 🐬 whale 🐋 snail 🐌 butterfly 🦋 "
        "spider 🕷 crab 🦀"
    ),
    "vehicles": (
        "car 🚗 taxi 🚕 bus 🚌 truck 🚚 tractor 🚜 bicycle 🚲 scooter 🛴 motorcycle 🏍 helicopter 🚁 rocket 🚀 "
        "sailboat ⛵ train 🚂 ambulance 🚑 airplane ✈"
    ),
    "furniture": "chair 🪑 bed 🛏 couch 🛋 door 🚪 toilet 🚽 bathtub 🛁 television 📺 lamp 💡 clock 🕰 mirror 🪞",
    "plants": "palm 🌴 cactus 🌵 sunflower 🌻 rose 🌹 tulip 🌷 mushroom 🍄 fir 🌲",
    "tools": (
        "hammer 🔨 wrench 🔧 saw 🪚 axe 🪓 scissors ✂ key 🔑 ladder 🪜 broom 🧹 bucket 🪣 umbrella ☂ telescope 🔭"
    ),
    "food": (
        "apple 🍎 banana 🍌 pear 🍐 pineapple 🍍 carrot 🥕 bread 🍞 cheese 🧀 pizza 🍕 hamburger 🍔 cake 🎂 "
        "strawberry 🍓"
    ),
    "buildings": "house 🏠 church ⛪ castle 🏰 factory 🏭 tent ⛺ fountain ⛲",
    "other": (
        "guitar 🎸 violin 🎻 trumpet 🎺 drum 🥁 backpack 🎒 suitcase 🧳 crown 👑 teddy 🧸 snowman ⛄ pumpkin 🎃 "
        "balloon 🎈"
    ),
}
# Kept out of training: what nobody was taught.
UNKNOWN = ("camel", "tractor", "mirror", "tulip", "axe", "cheese", "castle", "trumpet", "snail", "sailboat")


def _all() -> dict[str, str]:
    words = " ".join(THINGS.values()).split()
    return dict(zip(words[::2], words[1::2], strict=True))


def names(unknown: bool = False) -> tuple[str, ...]:
    """What there is to train on, or with `unknown` what is kept for tests."""
    return tuple(name for name in _all() if (name in UNKNOWN) == unknown)


def is_left_out() -> bool:
    """Whether the variable is set to nothing: solids alone."""
    return os.environ.get(VARIABLE) == ""


def find_font() -> str | None:
    """The font that is installed, if it is, and is not left out by a variable that is set to nothing.

    Raises:
        ValueError: where the variable names a file that is not there.
    """
    return _font(os.environ.get(VARIABLE))


@lru_cache(maxsize=4)
def _font(named: str | None) -> str | None:
    if named == "":
        return None
    if named is not None:
        if not Path(named).is_file():
            raise ValueError(f"{VARIABLE}={named!r} is no file; it must name {FILE}")
        return named
    found = (path for folder in FOLDERS for path in sorted(Path(folder).expanduser().rglob(FILE)))
    return next((str(path) for path in found), None)


@lru_cache(maxsize=256)
def picture(name: str) -> np.ndarray:
    """A cut-out, [SIDE, SIDE, 4] uint8 of colour and opacity; it stands on the lower edge and touches two others.

    Raises:
        ValueError: for a name that there is no picture of, or a font that is not there.
    """
    known = _all()
    if name not in known:
        raise ValueError(f"there is no picture of {name!r}; there are {', '.join(known)}")
    path = find_font()
    if path is None:
        raise ValueError(f"{FILE} is not installed: apt install fonts-noto-color-emoji, or name it in {VARIABLE}")
    font = ImageFont.truetype(path, _SIZE)
    image = Image.new("RGBA", (2 * SIDE, 2 * SIDE))
    ImageDraw.Draw(image).text((SIDE // 4, SIDE // 4), known[name], font=font, embedded_color=True)
    box = image.getbbox()
    if box is None:
        raise ValueError(f"the font {path!r} has no picture of {name!r}")
    image = image.crop(box)
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    cut = Image.new("RGBA", (SIDE, SIDE))
    cut.paste(image.resize((width, height), Image.Resampling.LANCZOS), ((SIDE - width) // 2, SIDE - height))
    return np.asarray(cut)


def available(unknown: bool = False) -> Sequence[str]:
    """The names of which there are pictures here; none without the font."""
    return names(unknown) if find_font() is not None else ()
