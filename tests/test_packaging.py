"""An installed wheel holds what a clone holds."""

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = set(found["options"]["packages"].split()) - {"flux_core.weights"}  # which lies beside the package
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "flux_core").rglob("__init__.py")}
    assert listed == there
