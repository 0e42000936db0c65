"""What is installed: the wheel has every module and the model, and a client needs neither torch nor much time."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVERY_MODULE = """
import importlib, pkgutil, sys
import penstock.actors, penstock.clients, penstock.engine
names = []
for package in (penstock.actors, penstock.clients, penstock.engine):
    assert package.__file__.startswith(sys.prefix), package.__file__
    names += [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without what git ignores, so that nothing else can slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, files):
        source, target = ROOT / name.decode(), folder / "source" / name.decode()
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, folder / "source"], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_is_small_and_has_the_model_and_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.stat().st_size < 16 * 2**20
    assert {"penstock/engine/tiny/model.safetensors", "penstock/engine/tiny/adapters/list/adapter_config.json"} <= names
    for top in ("actors", "engine", "clients"):
        assert f"penstock/{top}/py.typed" in names
        for source in (ROOT / top).rglob("*.py"):
            assert f"penstock/{source.relative_to(ROOT)}" in names


def test_every_module_imports_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "new"], check=True)
    python = tmp_path / "new" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    # Its dependencies are those of this environment, by path, which does not bring this environment's own penstock along.
    where = subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True)
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    (Path(where.stdout.strip()) / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    done = subprocess.run([python, "-c", EVERY_MODULE], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 60


def test_the_client_imports_without_the_engines_libraries() -> None:
    heavy = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "structlog", "triton")
    program = (
        f"import sys\nfor name in {heavy!r}: sys.modules[name] = None\n"
        "import penstock.clients as c\nc.AsyncClient, c.Client, c.launch, c.SamplingParams\nimport penstock.clients.cli.main\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_client_imports_in_less_than_a_fifth_of_a_second() -> None:
    program = "import time\nb = time.process_time()\nimport penstock.clients\npenstock.clients.AsyncClient\nprint(time.process_time() - b)"
    times = [float(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout) for _ in range(5)]
    assert min(times) < 0.2
