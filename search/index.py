"""An index of ray tokens on disk: a LanceDB table with a row for each token of each panorama.

A folder holds `index.json` (which model made it), `whitening.safetensors` and the table. Panoramas are added whole or
not at all: LanceDB commits what one call adds by renaming one file.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..geometry_panorama import Direction, View, ViewPlan, check_direction
from ..options_panorama import check_whole
from ..reading_panorama import read_panorama
from ..sampling_panorama import erp_to_views, needed_width
from .matching import Aligned, TokenEncoder, Whitening, first_places, query_tokens, refined

INDEX, WHITENING, TABLE = "index.json", "whitening.safetensors", "tokens"
_FORMAT = 1
_CANDIDATES = 128  # panoramas that an example is laid over
_PLACES = 64  # likely places in them
_NEIGHBOURS = 256  # tokens of the index that vote, for each of the example
_SCANNED = 65_536  # tokens at a time
_LARGE = 2_000_000  # tokens from which neighbours are looked up in an approximate index
_PROBED = 32  # of its lists
_BYTES = 8  # tokens have a byte for so many of their dimensions in it


class Hit(NamedTuple):
    """A panorama that shows it.

    Attributes:
        panorama: its path.
        yaw: degrees to the right of its front, in [-180, 180), of the middle of the example.
        pitch: degrees upwards.
        score: mean cosine of the whitened tokens, in [-1, 1]; 1 is the same.
    """

    panorama: str
    yaw: float
    pitch: float
    score: float


class Neighbours(NamedTuple):
    """The tokens of an index that are nearest to K others, the nearest first.

    Attributes:
        panorama: paths, [K][L].
        token: which of a panorama's tokens, int64 [K, L].
        cosine: float32 [K, L].
    """

    panorama: list[list[str]]
    token: torch.Tensor
    cosine: torch.Tensor


class PanoramaIndex:
    """Which of many panoramas shows what an example view shows, and which way to look.

    Args:
        folder: of the index; :meth:`create` makes one.
        encoder: the model that made it.

    Raises:
        ImportError: without LanceDB.
        FileNotFoundError: where there is no index.
        ValueError: for the index of another model; what differs is named.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: TokenEncoder):
        self.folder, self.encoder = Path(folder), encoder
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"there is no index of panoramas in {str(folder)!r} ({INDEX} is missing)")
        then = mark_of(self.folder)
        now = encoder.mark()
        changed = [
            f"{name} ({then.get(name)} then, {value} now)" for name, value in now.items() if then.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{str(folder)!r} was made by another model; what differs: {'; '.join(changed)}. Name the model that "
                "made it, or index the panoramas again into another folder"
            )
        stored = load_file(self.folder / WHITENING)
        self.whitening = Whitening(stored["mean"], stored["matrix"])
        self.table = _table(self.folder, len(self.whitening.mean))

    @classmethod
    def create(cls, folder: str | os.PathLike[str], encoder: TokenEncoder, whitening: Whitening) -> PanoramaIndex:
        """A new index, empty.

        Args:
            folder: that does not hold one.
            encoder: the model.
            whitening: fitted on tokens of some of the panoramas; indexes that are to be merged share it.
        """
        path = Path(folder)
        if (path / INDEX).exists():
            raise FileExistsError(f"{str(folder)!r} holds an index already: open it, or choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": whitening.mean.contiguous(), "matrix": whitening.matrix.contiguous()}
        save_file(tensors, path / WHITENING)
        beside = path / f"{INDEX}.new"
        beside.write_text(json.dumps({"format": _FORMAT, **encoder.mark()}, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path / INDEX)
        return cls(folder, encoder)

    def panoramas(self) -> set[str]:
        """The paths of all panoramas in it."""
        found: set[str] = set()
        for batch in self._batches(["panorama"]):
            found.update(batch["panorama"].unique().to_pylist())
        return found

    def __len__(self) -> int:
        """How many tokens it holds."""
        return self.table.count_rows()

    def add(self, panoramas: Sequence[str], tokens: torch.Tensor, shown: torch.Tensor) -> None:
        """Add panoramas that are not in it, all at once.

        Args:
            panoramas: paths [B].
            tokens: [B, T, D], of the encoder.
            shown: bool [B, T], which the camera saw.
        """
        import pyarrow as pa

        if not panoramas:
            return
        panorama, token = shown.nonzero(as_tuple=True)
        vectors = self.whitening(tokens[shown]).half().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        names = pa.array(list(panoramas), pa.string()).take(pa.array(panorama.numpy()))
        angles = directions_of(self.encoder.rays)[token]
        arrays = [
            names,
            pa.array(token.numpy().astype(np.int32)),
            *(pa.array(each) for each in angles.numpy().T),
            column,
        ]
        self.table.add(pa.RecordBatch.from_arrays(arrays, schema=self.table.schema))

    def merge(self, other: str | os.PathLike[str]) -> int:
        """Take over the panoramas of another index, of the same model and whitening, that are not in this one, all at
        once.

        Returns:
            How many they were.

        Raises:
            ValueError: for an index of another model or with another whitening.
        """
        theirs = PanoramaIndex(other, self.encoder)
        if not torch.equal(theirs.whitening.matrix, self.whitening.matrix):
            raise ValueError(
                f"{str(other)!r} has another whitening than {str(self.folder)!r}: fit one, and give it to "
                "PanoramaIndex.create for both"
            )
        import pyarrow as pa
        import pyarrow.compute as pc

        new = theirs.panoramas() - self.panoramas()
        if new:
            wanted = pa.array(sorted(new))
            parts = (each.filter(pc.is_in(each["panorama"], wanted)) for each in theirs._batches(None))
            self.table.add(pa.RecordBatchReader.from_batches(self.table.schema, parts))
        return len(new)

    def finish(self) -> None:
        """Make queries quick: pieces are joined, panoramas looked up by path, and from two million tokens on neighbours
        looked up approximately (IVF-PQ)."""
        from lancedb.index import BTree, IvfPq

        with warnings.catch_warnings():  # of readers of what was there before the last commit: they read again
            warnings.filterwarnings("ignore", message="optimize")
            self.table.optimize(cleanup_older_than=timedelta(0))
        if not len(self):
            return
        self.table.create_index("panorama", config=BTree(), replace=True)
        if len(self) >= _LARGE:
            width = len(self.whitening.mean)
            parts = max(part for part in range(1, width // _BYTES + 1) if width % part == 0)
            self.table.create_index("vector", config=IvfPq(distance_type="dot", num_sub_vectors=parts), replace=True)

    def nearest(self, vectors: torch.Tensor, count: int) -> Neighbours:
        """The nearest of its tokens to whitened tokens [K, D]: exact by reading all of them, a piece at a time, or
        by the approximate index where :meth:`finish` made one."""
        count = min(check_whole("count", count, 10), max(len(self), 1))
        if any("vector" in each.columns for each in self.table.list_indices()):
            return self._looked_up(vectors, count)
        cosine, row = torch.zeros(len(vectors), 0), torch.zeros(len(vectors), 0, dtype=torch.int64)
        rows, names, tokens = np.zeros(0, np.int64), np.zeros(0, object), np.zeros(0, np.int64)  # of those kept
        first = 0
        for batch in self._batches(["panorama", "token", "vector"]):
            stored = torch.from_numpy(_vectors(batch["vector"]))
            here = torch.arange(first, first + len(stored)).expand(len(vectors), -1)
            cosine, kept = torch.cat([cosine, vectors @ stored.T], 1).topk(min(count, cosine.shape[1] + len(stored)))
            row = torch.cat([row, here], 1).gather(1, kept)
            wanted = np.unique(row.numpy())
            before, new = np.searchsorted(rows, wanted[wanted < first]), wanted[wanted >= first] - first
            names = np.append(names[before], batch["panorama"].take(new).to_numpy(zero_copy_only=False))
            tokens = np.append(tokens[before], batch["token"].to_numpy()[new].astype(np.int64))
            rows = wanted
            first += len(stored)
        places = np.searchsorted(rows, row.numpy())
        return Neighbours(names[places].tolist(), torch.from_numpy(tokens[places]), cosine)

    def _looked_up(self, vectors: torch.Tensor, count: int) -> Neighbours:
        names, tokens, cosines = [], [], []
        for vector in vectors:
            search = self.table.search(vector.numpy()).distance_type("dot").nprobes(_PROBED).refine_factor(4)
            found = search.select(["panorama", "token", "_distance"]).limit(count).to_arrow()
            names.append(found["panorama"].to_pylist())
            tokens.append(found["token"].to_numpy().astype(np.int64))
            cosines.append(1 - found["_distance"].to_numpy())
        least = min(map(len, names))
        token, cosine = (np.stack([each[:least] for each in values]) for values in (tokens, cosines))
        return Neighbours([each[:least] for each in names], torch.from_numpy(token), torch.from_numpy(cosine))

    def tokens_of(self, panoramas: Sequence[str]) -> torch.Tensor:
        """Whitened tokens of panoramas that are in it [C, T, D], zero where the camera did not look."""
        found = torch.zeros(len(panoramas), len(self.encoder.rays), len(self.whitening.mean))
        if not panoramas:
            return found
        import pyarrow as pa
        import pyarrow.compute as pc

        order = pa.array(panoramas, pa.string())
        quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in panoramas)
        rows = self.table.search().where(f"panorama IN ({quoted})").select(["panorama", "token", "vector"])
        for batch in rows.to_batches(_SCANNED):
            at = torch.from_numpy(pc.index_in(batch["panorama"], order).to_numpy().astype(np.int64))
            token = torch.from_numpy(batch["token"].to_numpy().astype(np.int64))
            found[at, token] = torch.from_numpy(_vectors(batch["vector"]))
        return found

    def query(self, example: Any, fov: float = 60.0, count: int = 10) -> list[Hit]:
        """Which panoramas show an example view, and which way to look.

        Its tokens vote for panoramas; it is laid over those with most votes in every direction, then painted there and
        compared with what the same views of the panorama hold.

        Args:
            example: a photograph (see :func:`read_photograph`), of which the middle square is looked for. It is taken
                to be upright.
            fov: the field of view of its shorter side in degrees; of a phone's main camera about 50.
            count: at most so many hits, one a panorama; no more than 128.

        Returns:
            The best first.

        Raises:
            ValueError: for a photograph that cannot be read, and a number or field of view that cannot be.
        """
        check_whole("count", count, 10)
        pixels = self.encoder.example(example, fov)
        if not len(self):
            return []
        tokens = query_tokens(self.encoder, self.whitening, pixels, fov)
        names = _voted(self.nearest(tokens, _NEIGHBOURS), _CANDIDATES)
        panoramas = self.tokens_of(names)
        likely = first_places(self.encoder, self.whitening, pixels, fov, panoramas)
        exact = refined(self.encoder, self.whitening, pixels, fov, panoramas, likely[:_PLACES])
        best: dict[int, Aligned] = {}
        for each in (*exact, *likely):
            best.setdefault(each.panorama, each)
        found = sorted(best.values(), key=lambda each: -each.score)[:count]
        return [Hit(names[each.panorama], each.yaw, each.pitch, each.score) for each in found]

    def query_like(self, panorama: Any, yaw: float, pitch: float, fov: float = 60.0, count: int = 10) -> list[Hit]:
        """As :meth:`query`, by what a panorama shows in a direction, in degrees; the file is read."""
        direction: Direction = check_direction((yaw, pitch, fov), "direction")
        return self.query(view_of(panorama, direction, 2 * self.encoder.size, self.encoder.images), fov, count)

    def _batches(self, columns: list[str] | None) -> Iterator[Any]:
        search = self.table.search()
        yield from (search.select(columns) if columns else search).to_batches(_SCANNED)


def view_of(panorama: Any, direction: Direction, size: int, images: Any) -> np.ndarray:
    """What a panorama shows in a direction, uint8 [size, size, 3], read as the image processor `images` reads it."""
    plan = ViewPlan((View("perspective", *direction),))
    options = {"align_heading": images.align_heading, "level": images.level, "max_pixels": images.max_pixels}
    read = read_panorama(panorama, needed_width(plan, size), resample=False, **options)
    pixels = read.pixels if read.pixels.dtype == torch.uint8 else (255 * read.pixels).round().byte()
    view = erp_to_views(pixels.permute(2, 0, 1), plan, size, rotation=read.rotation)[0]
    return view.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def mark_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What made an index.

    Raises:
        ValueError: for what cannot be read, or another version's.
    """
    try:
        mark = json.loads((Path(folder) / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(Path(folder, INDEX))!r} cannot be read ({error}): index the panoramas again") from None
    if mark.get("format") != _FORMAT:
        raise ValueError(f"{str(folder)!r} has the format {mark.get('format')}, this version reads {_FORMAT}")
    return mark


def directions_of(rays: torch.Tensor) -> torch.Tensor:
    """Yaw and pitch in degrees of unit rays [T, 3], float32 [T, 2]."""
    x, y, z = rays.double().unbind(-1)
    return torch.stack([torch.atan2(x, z), torch.asin(y.clamp(-1, 1))], -1).rad2deg().float()


def name_of(path: str | os.PathLike[str]) -> str:
    """The path under which a panorama stands in an index: absolute, in the form of Unicode in which it exists.

    Raises:
        ValueError: for a path that is no text.
    """
    name = os.path.abspath(os.fspath(path))
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the path {name!r} is no UTF-8: rename the file") from None
    return name


def _voted(neighbours: Neighbours, count: int) -> list[str]:
    """The panoramas with most votes: of each token the best of its neighbours there, by as much as it is nearer than
    the farthest of all its neighbours."""
    votes: dict[str, float] = {}
    for names, cosines in zip(neighbours.panorama, neighbours.cosine.tolist(), strict=True):
        best: dict[str, float] = {}
        for name, cosine in zip(names, cosines, strict=True):
            best.setdefault(name, cosine)
        for name, cosine in best.items():
            votes[name] = votes.get(name, 0.0) + cosine - min(cosines)
    return sorted(votes, key=lambda name: (-votes[name], name))[:count]


def _vectors(column: Any) -> np.ndarray:
    """A column of vectors as an array [N, D]."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)


def _table(folder: Path, width: int) -> Any:
    try:
        import lancedb
        import pyarrow as pa
    except ImportError as error:
        raise ImportError("an index of panoramas needs LanceDB: pip install 'panorama-vlm[search]'") from error
    fields: Iterable[tuple[str, Any]] = (
        ("panorama", pa.string()),
        ("token", pa.int32()),
        ("yaw", pa.float32()),
        ("pitch", pa.float32()),
        ("vector", pa.list_(pa.float16(), width)),
    )
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])
    return lancedb.connect(folder).create_table(TABLE, schema=schema, exist_ok=True)
