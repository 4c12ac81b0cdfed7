"""The arrows between the rooms, held by the contracts in pyproject.toml."""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[1]


def test_the_contracts_name_every_private_module():
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
  named = {
    module
    for contract in settings["importlinter"]["contracts"]
    if contract["name"] == "The experiments import public names alone"
    for module in contract["forbidden_modules"]
  }
  core = ROOT / "fsam_optax"
  private = [*core.glob("_*.py"), *(core / "sharpness").glob("_*.py")]
  assert named == {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in private
    if not path.stem.startswith("__")
  }
