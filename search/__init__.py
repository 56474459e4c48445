"""Which panorama shows it, and which way to look: an index of ray tokens on disk.

`matching` makes tokens of panoramas and of example views and compares them, `index` keeps them (LanceDB), `build` fills
an index from a folder on any number of processes; `python -m panorama_vlm.search` is the command line.
"""

from .index import Hit, PanoramaIndex

__all__ = ["Hit", "PanoramaIndex"]
