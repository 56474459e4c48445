"""Cylindrical panoramas: the rows of a cylinder around the camera as those of the sphere."""

import math

import torch


def unrolled(pixels: torch.Tensor, horizon: float, turn: float, sphere: int) -> tuple[torch.Tensor, int]:
    """A cylindrical image as the rows of an equirectangular one. Columns stay as they are: both are even in yaw. A row
    of the cylinder lies at `tan(pitch) * turn / (2 pi)` above the horizon; each row of the sphere is the mean of what
    it covers of them, so that nothing aliases (away from the horizon a cylinder is the finer one).

    Args:
        pixels: [H, W, C].
        horizon: where the horizon lies, in rows from the upper edge; it need not be in the image.
        turn: length of the whole turn, in rows as well.
        sphere: rows of the whole sphere.

    Returns:
        The rows that the image covers, to half a row, [rows, W, C] of the same dtype; and the first of them.
    """
    height, radius = len(pixels), turn / (2 * math.pi)
    upper, lower = ((0.5 - math.atan((horizon - row) / radius) / math.pi) * sphere for row in (0, height))
    first, last = round(upper), round(lower)  # a row of which less than a half is covered would lie off
    pitches = [math.pi * (0.5 - row / sphere) for row in range(first, last + 1)]
    edges = [min(max(horizon - radius * math.tan(pitch), 0.0), float(height)) for pitch in pitches]
    if first == last:  # an image of less than a row
        last, edges = first + 1, [0.0, float(height)]
    out = pixels.new_empty(last - first, *pixels.shape[1:])
    for row, (above, below) in enumerate(zip(edges, edges[1:], strict=False)):
        start, end = math.floor(above), math.ceil(below)
        cells = torch.arange(start, end, dtype=torch.float32)
        shares = (cells + 1).clamp(max=below) - cells.clamp(min=above)
        mean = torch.tensordot(shares.to(pixels.device) / shares.sum(), pixels[start:end].float(), 1)
        out[row] = mean if pixels.is_floating_point() else mean.round()
    return out, first
