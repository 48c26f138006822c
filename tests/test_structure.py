"""The order of the house, read from the imports of every file: nouns know no verbs, Ray stays at the edge."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ser_ray

PACKAGE = Path(ser_ray.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

VERBS = {
    *("prepare", "audit", "train", "evaluate", "tune", "report", "predict", "leakage", "cache", "rerun"),
    *("spaces", "explain", "table"),
    *("fetch", "serve", "export", "enrol", "distil"),
}
LEVELS = {
    "disk": 0,
    "terminal": 1,
    "schema": 0,
    "config": 1,
    "corpora": 2,
    "speech": 2,
    "protocols": 2,
    "evaluation": 2,
    "trials": 3,
    "models": 3,
    "training": 4,
    "exporting": 5,
    "runtime": 5,
    "serving": 6,
}
"""Nouns: each may import those below, and within its own folder; folders of level 2 may also know each other."""

VERBS_THAT_NEED_DATA = {"train", "tune", "evaluate", "audit", "cache", "rerun", "distil"}
"""The one exception beside tune and leakage: they prepare what is missing by themselves."""


def _module(path: Path) -> str:
    """``ser_ray.models.adapters``; a folder's ``__init__`` is the folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in FILES}


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).replace('"', "'") == "__name__ == '__main__'"


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it (TYPE_CHECKING too); not what runs as ``__main__`` only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(inner) for node in ast.walk(tree) if _is_main_guard(node) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


IMPORTS = {module: _imports(path) for module, path in MODULES.items()}


def _own(module: str) -> set[str]:
    """Imports from the project; the bare package holds the version alone."""
    return {name for name in IMPORTS[module] if name.startswith("ser_ray.")}


def _part(module: str) -> str:
    """The noun, verb or file of the top level that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def _uses(module: str, library: str) -> bool:
    return any(name.split(".")[0] == library for name in IMPORTS[module])


def test_every_file_has_its_place() -> None:
    known = VERBS | LEVELS.keys() | {"", "__main__", "api", "premium"}
    assert {_part(module) for module in MODULES} <= known
    assert LEVELS.keys() <= {_part(module) for module in MODULES}


def test_every_file_says_what_it_is() -> None:
    assert not [module for module, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]


@pytest.mark.parametrize("module", [m for m in MODULES if _part(m) in LEVELS])
def test_nouns_import_downwards_only(module: str) -> None:
    level = LEVELS[_part(module)]
    for imported in _own(module):
        part = _part(imported)
        assert part in LEVELS, f"{module} imports {imported}: a noun knows no verb"
        beside = part == _part(module) or LEVELS[part] == level == 2
        assert LEVELS[part] < level or beside, f"{module} imports {imported}, which is not below it"


def test_schema_disk_and_the_package_import_nothing_of_the_project() -> None:
    assert _own("ser_ray.schema") == _own("ser_ray.disk") == set()
    assert IMPORTS["ser_ray"] <= {"importlib", "typing"}


def test_only_verbs_and_what_they_share_import_ray() -> None:
    using = {module for module in MODULES if _uses(module, "ray")} - {"ser_ray.serving.deployment"}
    assert {_part(module) for module in using} <= VERBS | {"runtime"}


def test_only_cluster_starts_ray() -> None:
    starts = re.compile(r"\bray\.init\(")
    found = [m for m, path in MODULES.items() if starts.search(path.read_text())]
    assert found == ["ser_ray.runtime.cluster"]


def test_of_the_verbs_only_tune_and_leakage_import_others() -> None:
    for verb in VERBS & {_part(module) for module in MODULES}:
        others = {_part(imported) for imported in _own(f"ser_ray.{verb}")} & VERBS
        allowed = {
            "tune": {"train", "evaluate", "report", "cache"},
            "leakage": {"train", "evaluate"},
            "rerun": {"train", "tune", "report"},
            "distil": {"tune", "report"},
            "train": {"cache"},
            "evaluate": {"cache"},
        }.get(verb, set())
        if verb in VERBS_THAT_NEED_DATA:
            allowed |= {"prepare"}
        assert others <= allowed, f"{verb} imports {others - allowed}"


def test_nobody_imports_the_command_line() -> None:
    assert not [module for module in MODULES if "ser_ray.__main__" in _own(module)]


def test_there_is_no_circle_between_files() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for imported in sorted(_own(module) & MODULES.keys()):
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_yaml_is_read_in_one_place() -> None:
    assert [module for module in MODULES if _uses(module, "yaml")] == ["ser_ray.config.reader"]


def test_nothing_is_unpickled() -> None:
    for library in ("pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"):
        assert not [module for module in MODULES if _uses(module, library)], library
    dangerous = re.compile(
        r"torch\.load\(|yaml\.(unsafe_)?load\(|allow_pickle=True|trust_remote_code=True|strict=False\)?$", re.M
    )
    found = {m: [hit[0] for hit in dangerous.finditer(path.read_text())] for m, path in MODULES.items()}
    found = {m: hits for m, hits in found.items() if hits}
    # An export has a modelling file of ours: what the script of its proof runs, and what its card and that file say.
    ours = ("hf_predict", "huggingface", "modeling_emotion")
    assert found == {f"ser_ray.exporting.{name}": ["trust_remote_code=True"] for name in ours}
    loaders = re.findall(r"yaml\.\w*Loader|yaml\.compose|= _Loader\(", MODULES["ser_ray.config.reader"].read_text())
    assert set(loaders) == {"yaml.SafeLoader", "= _Loader("}


@pytest.mark.parametrize("module", ["ser_ray", "ser_ray.tune"])
def test_help_loads_neither_torch_nor_ray(module: str) -> None:
    script = (
        "import runpy, sys\n"
        f"sys.argv = [{module!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    print('exit', end.code)\n"
        "print('heavy', sorted({'torch', 'ray', 'transformers', 'pandas', 'sklearn'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert "exit 0" in done.stdout
    assert "heavy []" in done.stdout


@pytest.mark.parametrize("module", ["ser_ray.train", "ser_ray.audit"])
def test_who_only_starts_or_looks_loads_no_torch(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_can_be_read_in_one_sitting() -> None:
    """No file above 400 lines, no function above 60."""
    long = [f"{path}: {n}" for path in FILES if (n := len(path.read_text().splitlines())) > 400]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{path}: {node.name}: {lines}"] if lines > 60 else []
    assert long == []


RETIRED = {
    *(
        "kept",
        "keeper",
        "heard",
        "tried",
        "figures",
        "ahead",
        "dealt",
        "deciding",
        "decided",
        "tell",
        "tells",
    ),
    *("suggestions", "halving", "rivals", "strength", "premium", "settle", "heed", "take", "takes", "vary", "mend"),
    *("learns", "goes", "watched"),
}
"""Words that a reader of the field had to translate; CONTRIBUTING.md names the field's own."""


def _public_names(path: Path) -> set[str]:
    """Of a file: its name, and those of its classes, functions, arguments, fields and constants."""
    found = {path.stem}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        if isinstance(node, ast.Module | ast.ClassDef):
            for inner in node.body:
                targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_public_names_are_words_of_the_field() -> None:
    allowed = {"premium"}  # premium.py: the old name of a command, which still works
    found = {}
    for module, path in MODULES.items():
        for name in _public_names(path) - allowed:
            parts = {part.lower() for part in re.split(r"_|(?<=[a-z])(?=[A-Z])", name)}
            if parts & RETIRED:
                found[f"{module}: {name}"] = sorted(parts & RETIRED)
    assert found == {}
