"""The house rules: who may import whom, who may print, and what stands nowhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config import load_sweep

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT) for name in ("qkmodel", "orchestrator") for path in (ROOT / name).rglob("*.py"))
SEARCH = [path for path in MODULES if path.parts[:2] == ("orchestrator", "search")]
TREES = {path: ast.parse((ROOT / path).read_text(), str(path)) for path in MODULES}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import anywhere in a file, those inside functions too."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module
            # `from ray import tune` and `from orchestrator import plan` name modules too
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def offences(paths: list[Path], forbidden: set[str]) -> list[str]:
    return [
        f"{path}:{line}: {module}"
        for path in paths
        for line, module in imports(path)
        if module.split(".")[0] in forbidden
    ]


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every call of a name or an attribute path."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_both_packages_are_looked_at() -> None:
    assert {path.parts[0] for path in MODULES} == {"qkmodel", "orchestrator"}
    assert Path("orchestrator/search/searcher.py") in SEARCH and len(MODULES) > 40


def test_the_science_knows_nothing_of_the_orchestrator() -> None:
    science = [path for path in MODULES if path.parts[0] == "qkmodel"]
    assert offences(science, {"orchestrator", "ray", "optuna", "mlflow", "hydra"}) == []


def test_search_and_fronts_need_neither_torch_nor_ray() -> None:
    pure = [path for path in SEARCH if path.name != "searcher.py"] + [Path("orchestrator/pareto.py")]
    assert offences(pure, {"torch", "ray"}) == []


def test_search_and_fronts_do_not_load_torch_or_ray_by_way_of_others() -> None:
    modules = [str(path.with_suffix("")).replace("/", ".") for path in SEARCH if path.name != "searcher.py"]
    script = f"import sys, orchestrator.pareto, {', '.join(modules)}; print({{'torch', 'ray'}} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("mlflow", {"tracking.py", "tracking_run.py", "tracking_fronts.py", "tracking_summary.py", "registry.py"}),
        ("hydra", {"composition.py"}),
    ],
)
def test_a_package_that_few_files_may_import(package: str, owners: set[str]) -> None:
    others = [path for path in MODULES if path not in {Path("orchestrator") / owner for owner in owners}]
    assert offences(others, {package}) == []


def test_only_the_command_line_prints() -> None:
    speaking = {"cli.py", "cli_output.py", "__main__.py"}
    others = [path for path in MODULES if path not in {Path("orchestrator") / name for name in speaking}]
    printing = [f"{path}:{line}" for path in others for line, name in calls(path) if name == "print"]
    streams = [
        f"{path}:{node.lineno}"
        for path in others
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
    ]
    assert printing + streams == []


def test_no_assert_statements() -> None:
    """python -O takes them away, and they do not say what would be right."""
    found = [f"{path}:{n.lineno}" for path in MODULES for n in ast.walk(TREES[path]) if isinstance(n, ast.Assert)]
    assert found == []


def test_no_except_that_swallows_everything_but_those_around_mlflow_and_around_a_pack() -> None:
    found = [
        str(path)
        for path in MODULES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or {"Exception", "BaseException"} & set(ast.unparse(node.type).strip("()").split(", ")))
    ]
    assert found == ["orchestrator/tracking_thread.py", "orchestrator/trainable.py"]


def test_nothing_that_runs_what_it_reads() -> None:
    dangerous = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "instantiate"}
    assert [f"{path}:{line}: {name}" for path in MODULES for line, name in calls(path) if name in dangerous] == []
    assert offences(MODULES, {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}) == []


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_packaged_sweep_loads_under_its_own_name(file: Path) -> None:
    assert load_sweep(file).name == file.stem
