"""The demo page as a Space of the Hub: this repository, pushed as it is, with the model at its root.

A Space installs `requirements.txt`, not the package, which is the folder that this file lies in.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

if importlib.util.find_spec("panorama_vlm") is None:
    spec = importlib.util.spec_from_file_location("panorama_vlm", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = sys.modules["panorama_vlm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)

from panorama_vlm.demo.page import LOOK, make_page  # noqa: E402

if __name__ == "__main__":
    make_page().launch(max_file_size="64mb", **LOOK)  # where it listens the Space says by GRADIO_SERVER_NAME
