"""What an installed tbik-jax holds: one top-level name, the two linked folders being packages inside it."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("models", "pallas_kernels")
CODE = ("tbik_jax", *LINKED)
NOT_SHIPPED = {".md"}  # notes next to the code


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run `command` in `cwd` and return its output; an error shows all of it."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{command} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _source_files() -> list[str]:
    """Files git knows or would add, so that caches and build products of the work tree cannot help."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the list of source files comes from git")
    listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


def _expected(files: list[str]) -> set[str]:
    """Paths in the wheel of every source file of the package."""
    shipped = {name for name in files if PurePosixPath(name).suffix not in NOT_SHIPPED}
    code = {name for name in shipped if name.split("/")[0] in CODE and not (ROOT / name).is_symlink()}
    return {name if name.startswith("tbik_jax/") else f"tbik_jax/{name}" for name in code}


def _imported_tops(path: Path) -> set[str]:
    """Top-level names that a source file imports absolutely."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.append(node.module)
    return {module.split(".")[0] for module in modules}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist of a clean copy of the tree, and the wheel built from that sdist."""
    copy = tmp_path_factory.mktemp("tree")
    for name in _source_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    dist = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, cwd=copy)
    return dist


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_links_are_relative_and_lead_next_door() -> None:
    for name in LINKED:
        assert os.readlink(ROOT / "tbik_jax" / name) == f"../{name}"


def test_linked_folders_are_imported_by_one_name() -> None:
    """From the root of a checkout `import models` would work too, and make a second copy of every class."""
    sources = (name for name in _source_files() if name.endswith(".py"))
    wrong = {name: tops for name in sources if (tops := _imported_tops(ROOT / name) & set(LINKED))}
    assert not wrong, "import tbik_jax.models and tbik_jax.pallas_kernels instead"


def test_sdist_holds_no_second_copy_and_no_tests(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    tops = {member.name.split("/")[1] for member in members if "/" in member.name}
    assert tops.isdisjoint({*LINKED, "tests", "benchmarks"})
    assert {"tbik_jax", "LICENSE", "README.md", "pyproject.toml"} <= tops


def test_wheel_installs_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    info = next(top for top in tops if top.endswith(".dist-info"))
    assert tops == {"tbik_jax", info}
    assert f"{info}/licenses/LICENSE" in names
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "tbik-jax = tbik_jax.cli:main" in scripts


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("tbik_jax/")}
    expected = _expected(_source_files())
    assert expected - packed == set(), "add __init__.py or the suffix to [tool.setuptools.package-data]"
    assert packed - expected == set()
    assert "tbik_jax/py.typed" in packed
    for name in LINKED:
        assert f"tbik_jax/{name}/__init__.py" in packed


def test_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    _run(*pip, "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    code = (
        "import importlib.util, tbik_jax, tbik_jax.models, tbik_jax.pallas_kernels\n"
        "for module in (tbik_jax, tbik_jax.models, tbik_jax.pallas_kernels): print(module.__file__)\n"
        "assert not [n for n in ('models', 'pallas_kernels', 'benchmarks') if importlib.util.find_spec(n)]\n"
    )
    out = _run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(target), JAX_PLATFORMS="cpu")
    found = [Path(line) for line in out.splitlines()[-3:]]
    assert all(path.is_relative_to(target.resolve()) for path in found), out
