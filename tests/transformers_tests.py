"""The test mixins of transformers, which lie in its source distribution: fetched with pip, never copied in here.

`python tests/transformers_tests.py` fetches those of the installed version into a cache; :func:`load` imports them.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import transformers

NAME = f"transformers-{transformers.__version__}"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "panorama_vlm")
FOLDER = CACHE / NAME / "tests"
PACKAGE = "tests_of_transformers"
PANORAMA = str(next((Path(__file__).resolve().parent.parent / "samples").glob("*.jpg")))  # in place of what URLs name


def fetch() -> None:
    """Put the tests of the installed version into the cache; nothing where they are there."""
    if FOLDER.is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as new:
        options = ["--no-deps", "--no-binary", "transformers", "--dest", new]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *options]
        subprocess.run([*pip, f"transformers=={transformers.__version__}"], check=True)
        with tarfile.open(next(Path(new).glob("*.tar.gz"))) as archive:
            wanted = [member for member in archive if member.name.startswith(f"{NAME}/tests/")]
            archive.extractall(new, members=wanted, filter="data")
        os.replace(Path(new, NAME), CACHE / NAME)


def load(*names: str) -> list[Any]:
    """Modules of the tests, such as `test_modeling_common`. What they import and the source distribution does not carry
    is empty: the mixins of generation and of exporters. What URLs name is a panorama of ours."""
    if PACKAGE not in sys.modules:
        _module(PACKAGE, __path__=[str(FOLDER)])
        _module(f"{PACKAGE}.exporters", __path__=[])
        _module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _module(f"{PACKAGE}.generation", __path__=[])
        _module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _module(f"{PACKAGE}.utils", __path__=[])
        _module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
        _module("fetch_hub_objects_for_ci", url_to_local_path=lambda _: PANORAMA)
    kept = list(sys.path)  # they add folders that are not there
    with (
        tempfile.TemporaryDirectory() as no_models,
        mock.patch.dict(os.environ, {"TRANSFORMERS_TINY_MODEL_PATH": no_models}),
        mock.patch("transformers.utils.direct_transformers_import", lambda *_, **__: transformers),
    ):
        Path(no_models, "reports").mkdir()
        Path(no_models, "reports", "tiny_model_summary.json").write_text("{}")
        modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    sys.path[:] = kept
    return modules


def _module(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module


if __name__ == "__main__":
    try:
        fetch()
    except subprocess.CalledProcessError:
        sys.exit(f"pip found no source distribution of {NAME} (see above): its tests will be skipped")
