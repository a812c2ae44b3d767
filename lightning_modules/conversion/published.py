"""Which layout a published directory has, by its config.json, and its model."""

from pathlib import Path

from lightning_modules.conversion import huggingface, state_spaces
from lightning_modules.conversion.parameters import Parameters
from lightning_modules.conversion.weight_files import read_json

LAYOUTS = {"hf": huggingface, "state-spaces": state_spaces}


def is_published(path: Path) -> bool:
    """Whether `path` is a directory of another project's making."""
    return (path / "config.json").is_file() and not (path / "config.yaml").is_file()


def layout_of(path: Path) -> str:
    """hf or state-spaces. Raises ValueError (one line) where it is neither."""
    config = read_json(path / "config.json")
    for name, layout in LAYOUTS.items():
        if layout.is_layout(config):
            return name
    kind = config.get("model_type")
    what = f"model_type={kind}" if kind is not None else "neither model_type nor d_model and n_layer"
    raise ValueError(f"{path / 'config.json'}: {what}: not Mamba-2 in a layout known here (hf, state-spaces)")


def read_published(path: Path) -> Parameters:
    """The model of a published directory. Raises ValueError (one line) for what does not hold."""
    return LAYOUTS[layout_of(path)].read(path)
