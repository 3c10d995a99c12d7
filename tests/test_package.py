"""The shape of the package: imports only go down, start-up is quick, a wheel holds what it needs."""

import ast
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vqhit"
FLOORS = [
    {"config", "distributed", "files", "options", "pickles", "repository", "sizes", "tables"},
    {"norms"},
    {"execution"},
    {
        "images",
        "layers",
        "losses",
        "augment",
        "bench",
        "checkpoint",
        "frechet",
        "progress",
        "ema",
        "logs",
        "metrics",
        "optimizer",
        "perceptual",
        "inception_score",
        "runs",
        "stopwatch",
        "card",
        "origin",
    },
    {"vqgan", "quantizer", "hit", "hub", "folder", "discriminator", "extractors"},
    {"sources", "generator", "comparison", "token_shards", "stems"},
    {"data", "convnet", "doctor", "labels", "token_folder"},
    {"vector_quantize", "codebook", "views", "tokenizer_config"},
    {"tokenizer", "plots"},
    {"models"},
    {"measure", "convert", "convert_vqgan", "objective", "prepare", "bench_generators", "peer"},
    {"protocol", "tokenize"},
    {"record", "detokenize", "export"},
    {"evaluate", "bench_tokenizer", "bench_train"},
    {"recipe"},
    {"feed", "state"},
    {"report", "finetune", "run_card"},
    {"train", "publish"},
    {"demo", "cli_convert", "cli_eval", "cli_export", "cli_tokens", "cli_bench"},
    {"cli"},
    {"__main__"},
]


MODEL_FILES = {"config.json", "model.safetensors", "README.md"}


def imported(path):
    """Names of the vqhit modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "vqhit":
                names |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("vqhit."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("vqhit") for alias in node.names), f"{path.name}: import vqhit.x"
    return names - {"__version__"}


def test_every_module_has_a_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set().union(*FLOORS)
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {"pretrained"}


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_down(floor):
    below = set().union(*FLOORS[:floor])
    for name in FLOORS[floor]:
        upwards = imported(PACKAGE / f"{name}.py") - below
        assert not upwards, f"{name}.py imports {upwards} from its own floor or above"


def test_packaged_models_are_small_folders_of_data():
    folders = list((PACKAGE / "pretrained").iterdir())
    assert folders
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == MODEL_FILES
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6


def best_seconds(code, tries=4):
    """Of a processor: other tests run at the same time."""
    times = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(times)


def best_seconds_after(first, code, tries=4):
    """Of a processor, in a process that has done `first`: a difference of two times of seconds would be all noise."""
    clocked = f"{first}; import time; start = time.process_time(); {code}; print(time.process_time() - start)"
    runs = [subprocess.run([sys.executable, "-c", clocked], check=True, capture_output=True) for _ in range(tries)]
    return min(float(run.stdout) for run in runs)


def test_start_up_times():
    """Above an empty interpreter: under 0.3 s for the package, at most 0.5 s more than torch for a model class."""
    empty = best_seconds("pass")
    package = best_seconds("import vqhit") - empty
    model_class = best_seconds_after("import torch", "from vqhit import VQHiT")
    command = best_seconds("import sys; sys.argv = ['vqhit', '--help']; from vqhit.cli import main; main()") - empty
    print(f"start-up seconds: import vqhit {package:.2f}, VQHiT above torch {model_class:.2f}, --help {command:.2f}")
    assert package < 0.3
    assert command < 0.6
    assert model_class < 0.5


@pytest.mark.parametrize("code", ["import vqhit; dir(vqhit)", "import vqhit.cli", "import vqhit.config"])
def test_torch_is_not_loaded_before_it_is_needed(code):
    check = f"{code}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_public_names_are_there():
    import vqhit

    for name in vqhit.__all__:
        assert getattr(vqhit, name) is not None
    with pytest.raises(AttributeError, match="module 'vqhit' has no attribute 'VQHIT'"):
        vqhit.VQHIT  # noqa: B018


def test_the_wheel_holds_the_configurations_and_the_type_marker(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(PACKAGE.parent)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vqhit-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = [path.relative_to(PACKAGE.parent) for path in (PACKAGE.parent / "configs").rglob("*.yaml")]
    assert {"vqhit/py.typed", *(f"vqhit/{path}" for path in configs)} <= names
    assert {f"vqhit/{path.name}" for path in PACKAGE.glob("*.py")} <= names
    for model in (PACKAGE / "pretrained").iterdir():
        assert {f"vqhit/pretrained/{model.name}/{file}" for file in MODEL_FILES} <= names
    assert not any(name.startswith("tests/") for name in names)
