"""Every module imports on a bare CPU machine, whoever else owns the name `kernels`."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("conf", "data", "kernels", "lightning_modules", "sweeps")
NEED_LM_EVAL = ("lightning_modules.lm_harness.model", "lightning_modules.lm_harness.run")  # an optional extra

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import kernels, torch
assert not torch.cuda.is_initialized()
print(kernels.__file__)
"""


def modules() -> list[str]:
    files = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    return [name for name in names if name not in NEED_LM_EVAL or find_spec("lm_eval")]


def run(code: str, *argv: str, path: Path | None = None) -> str:
    """Run Python from the repository root, with `path` behind it; what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def hugging_face_kernels(tmp_path: Path) -> Path:
    """A folder with the Hugging Face distribution of our name, of a version that transformers accepts."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('the other package of this name')\n")
    information = tmp_path / "kernels-0.18.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    (information / "RECORD").write_text("kernels/__init__.py,,\n")
    (information / "top_level.txt").write_text("kernels\n")
    return tmp_path


def test_every_module_imports_without_a_gpu() -> None:
    assert len(modules()) > 20
    assert run(IMPORT_ALL, *modules()).strip() == str(ROOT / "kernels" / "__init__.py")


def test_every_module_imports_beside_the_hugging_face_kernels(hugging_face_kernels: Path) -> None:
    version = "import importlib.metadata as m; print(m.version('kernels'))"
    assert run(version, path=hugging_face_kernels).strip() == "0.18.5"  # it is seen
    printed = run(IMPORT_ALL, *modules(), path=hugging_face_kernels)
    assert printed.strip() == str(ROOT / "kernels" / "__init__.py")


LOAD_TOKENIZER = """
import sys
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(sys.argv[1])
print(AutoTokenizer.from_pretrained(sys.argv[1])("b")["input_ids"])
"""


def test_tokenizers_load_beside_the_hugging_face_kernels(hugging_face_kernels: Path, tmp_path: Path) -> None:
    """What we use of transformers works although our `kernels` hides the package it looks for."""
    assert run(LOAD_TOKENIZER, str(tmp_path / "tokenizer"), path=hugging_face_kernels).strip() == "[1]"


def test_kernels_is_ours() -> None:
    import kernels

    found = Path(kernels.__file__ or "")
    assert found == ROOT / "kernels" / "__init__.py", f"{found} hides ours: run from the repository root"


@pytest.mark.parametrize("room", ["kernels", "data"])
def test_package_holds_only_a_docstring(room: str) -> None:
    """transformers executes a top-level package named `kernels`: whatever it did would happen there too."""
    body = ast.parse((ROOT / room / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


def test_config_is_parsed_without_torch() -> None:
    run("import conf.load, conf.schema, conf.measure_schema, sys; assert 'torch' not in sys.modules")


def test_imports_run_downward() -> None:
    """conf <- data, kernels <- lightning_modules <- sweeps; only the benchmark looks up."""
    allowed = {
        "conf": {"conf"},
        "data": {"conf", "data"},
        "kernels": {"conf", "kernels"},
        "lightning_modules": {"conf", "data", "kernels", "lightning_modules"},
        "sweeps": set(ROOMS),
    }
    for room, may_import in allowed.items():
        for file in (ROOT / room).rglob("*.py"):
            if ROOT / "kernels" / "benchmarks" in file.parents:
                continue
            for imported in imports(file):
                top = imported.split(".")[0]
                assert top not in ROOMS or top in may_import, f"{file.relative_to(ROOT)} imports {imported}"
                assert top != "pytorch_lightning", f"{file.relative_to(ROOT)}: import lightning.pytorch"


def imports(file: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
