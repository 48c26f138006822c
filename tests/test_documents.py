"""The documents: every command in them is run by a test, has made a page of figures, or says that it was not run; and
the pages build without a warning."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ser_ray.__main__ import VERBS

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "cluster/README.md", *PAGES)
NOT_RUN = re.compile(r"\bnot (yet )?(run|built)\b|\bnot run\b")
PROGRAMS = re.compile(
    r"(python3? -m |python tests/|ser-ray |pytest|sbatch |salloc |scontrol |ray job |ray start |cluster/\w+\.sh|"
    r"docker |apptainer |kubectl |\.ci/run)"
)
BENCHMARK = re.compile(r"python (tests/benchmarks/\w+\.py)")

RUN_BY = {
    r"python3 -m venv": ".ci/run",
    r"(ruff|mypy|sphinx-build) ": ".ci/run",
    r"ser-ray (--|VERB|NAME)": "tests/test_command_line.py::test_help_lists_every_verb",
    r"ser-ray config": "tests/test_command_line.py::test_a_key_is_shown_with_its_value_and_where_that_is_from",
    r"ser-ray (new|spaces)": "tests/test_command_line.py::test_a_built_in_space_is_listed_and_copied_with_its_comments",
    r"pytest|\.ci/run": ".ci/run",
    r"(ser-ray |python -m ser_ray\.)tune": "tests/test_job.py::test_the_demo_runs_as_a_submitted_job",
    r"(ser-ray |python -m ser_ray\.)train": "tests/test_local.py::test_training_under_a_debugger_stops_in_the_loop",
    r"ser-ray table": "tests/test_table.py::test_a_folder_becomes_a_table_and_is_trained_on",
    r"ser-ray prepare": "tests/test_prepare.py::test_the_command",
    r"ser-ray audit": "tests/test_audit.py::test_an_emotion_that_cannot_be_learned_is_an_error_in_one_line",
    r"ser-ray evaluate": "tests/test_verbs.py::test_a_second_opening_of_the_test_set_is_counted",
    r"ser-ray report": "tests/test_report.py::test_command_writes_the_page_and_prints_where",
    r"ser-ray rerun": "tests/test_verbs.py::test_a_rerun_says_that_nothing_differs",
    r"ser-ray cache": "tests/test_cache.py::test_the_command_makes_and_then_finds",
    r"ser-ray leakage": "tests/test_leakage_gap.py::test_the_leakage_gap_of_a_small_corpus",
    r"ser-ray distil": "tests/test_distil.py::test_a_student_is_distilled_with_a_folder_without_labels",
    r"ser-ray enrol|ser-ray predict .*--(voice|enrol)": "tests/test_enrol.py::test_a_voice_is_enrolled_and_used",
    r"ser-ray serve .*--config": "tests/serving/test_serve.py::test_a_configuration_file_for_ray_serve",
    r"ser-ray serve": "tests/serving/test_serve.py::server",
    r"ser-ray predict .*--sets": "tests/test_predict.py::test_a_set_is_added_to_every_answer",
    r"ser-ray predict": "tests/test_verbs.py::test_the_winner_predicts_what_the_evaluation_said",
    r"ser-ray fetch": "tests/test_fetch.py::test_what_was_fetched_is_found_offline",
    r"ser-ray export": "tests/test_export.py::test_a_stranger_gets_the_answers_of_predict",
    r"python -m recipes": "tests/recipes/test_recipe.py::test_a_shortened_recipe_gives_the_same_weights_twice",
    r"ray job submit": "tests/cluster/test_standing.py::test_a_job_uses_both_hosts_and_nobody_without_the_token",
    r"sbatch --array": "tests/cluster/test_slurm.py::test_bad_yaml_is_exit_code_2_in_every_task_of_an_array",
    r"sbatch": "tests/cluster/test_slurm.py::test_the_demo_runs_over_both_nodes",
    r"scontrol requeue": "tests/cluster/test_slurm.py::test_a_requeued_job_goes_on",
    r"cluster/up\.sh \w": "tests/cluster/test_standing.py::standing",
    r"cluster/(up|down)\.sh|salloc": "tests/cluster/test_salloc.py::test_a_cluster_over_an_allocation_takes_a_job",
}
"""How a command begins -> what runs it: a script, or a function of the tests. The first that fits counts."""


def commands(document: str) -> list[tuple[str, str]]:
    """Commands of a page with the line that each is on: in blocks of code, and in the text between backticks."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        lines = block.replace("\\\n", " ").splitlines()
        found += [(line.split("  #")[0].strip(), line) for line in lines if PROGRAMS.search(line)]
    for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
        found += [(code, line) for code in re.findall(r"`([^`]+)`", line) if PROGRAMS.match(code)]
    return found


def exists(place: str) -> bool:
    """Whether a function of that name is in the file."""
    path, _, function = place.partition("::")
    if not function:
        return (REPOSITORY / path).is_file()
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(tree))


def test_what_runs_the_commands_is_there():
    assert [place for place in RUN_BY.values() if not exists(place)] == []


@pytest.mark.parametrize(("command", "line"), [pair for document in DOCUMENTS for pair in commands(document)])
def test_a_command_is_run_by_a_test_or_says_that_it_was_not(command, line):
    if NOT_RUN.search(line) or any(re.match(start, command) for start in RUN_BY):
        return
    benchmark = BENCHMARK.match(command)
    assert benchmark, f"{command}: no test runs it, it has no page, and its line does not say that it was not run"
    pages = (page.read_text(encoding="utf-8") for page in (REPOSITORY / "results" / "benchmarks").glob("*.md"))
    assert any(benchmark[1] in page for page in pages), f"{command}: no page in results/benchmarks is made by it"


def test_commands_are_found():
    found = [command for command, _ in commands("README.md")]
    assert any(command.startswith("python3 -m venv") for command in found)
    assert any(command.startswith("ser-ray predict") for command in found)
    assert sum(len(commands(document)) for document in DOCUMENTS) > 50


def test_no_number_of_a_page_is_missing():
    assert [page for page in DOCUMENTS if "NUMBER(" in (REPOSITORY / page).read_text()] == []


def quoted_messages() -> list[str]:
    """What docs/troubleshooting.md quotes: a heading, or a term of a list of definitions, in backticks."""
    lines = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    terms = [line for line, following in zip(lines, [*lines[1:], ""], strict=True) if following.startswith(": ")]
    terms += [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    return [quoted for term in terms for quoted in re.findall(r"`([^`]+)`", term)]


def test_messages_of_troubleshooting_are_those_of_the_code():
    """Each part between the variable ones is in the source, whatever the lines that it is written on."""
    messages = quoted_messages()
    assert len(messages) > 30
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "ser_ray").rglob("*.py")))
    joined = re.sub(r'"\s*f?"', "", source)  # a string over several lines
    for message in messages:
        for part in (part.strip() for part in message.split("…")):
            assert len(part) < 4 or part in joined, f"{message}: {part!r} is not in the code"


@pytest.mark.ray
@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """All of its blocks, one after the other, in one process; an epoch less is trained, and speakers are unknown."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "demo-notebook.md").read_text(), re.S)
    assert len(blocks) >= 6
    script = tmp_path / "notebook.py"
    less = 'experiment__epochs=1, experiment__head__speaker="none"'
    shorter = [block.replace("experiment__epochs=2", less) for block in blocks]
    assert shorter != blocks
    script.write_text("\n".join(shorter) + "\nprint('results', RESULTS)\n")
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = Path(done.stdout.strip().splitlines()[-1].removeprefix("results "))
    for name in ("learning_curves.png", "embeddings.png"):
        assert (results / name).stat().st_size > 5_000


def test_the_pages_build_without_a_warning(tmp_path):
    """Links between pages, tables, the generated reference and the docstrings of the Python API."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(tmp_path / "pages")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = tmp_path / "pages" / "reference"
    assert 'id="rank"' in (reference / "configuration.html").read_text()
    assert "ser_ray.api.load" in (reference / "python.html").read_text()
    for page in PAGES:  # one that has the name of a page of Sphinx's own, such as search, is lost without a word
        title = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert f"<h1>{title}" in (tmp_path / "pages" / Path(page).with_suffix(".html").name).read_text(), page
    for verb in VERBS:
        assert f"ser-ray {verb}" in (reference / "commands.html").read_text()
