"""README and docs tell the truth: commands exist, links lead somewhere, study-file.md is the schema."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import click
import pytest
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import client.cli
import server.cli
import simulation.cli
from shared_model.study import Study, study_from_table
from simulation.comparison_plan import Comparison
from simulation.hospitals import HospitalSpec, write_hospital
from simulation.plan import Simulation, load_comparison, load_plan, load_tradeoff
from simulation.tradeoff_plan import Tradeoff

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
COMMANDS = {
    "hemofed-client": typer.main.get_command(client.cli.app),
    "hemofed-server": typer.main.get_command(server.cli.app),
    "hemofed-sim": typer.main.get_command(simulation.cli.app),
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`((?:hemofed-\w+|make) [^`\n]+)`")
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def fences(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands_in(script: str) -> Iterator[list[str]]:
    """The hemofed and make commands of a shell script, split into words."""
    lexer = shlex.shlex(script.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    command: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";|&<>"):
            if command and (command[0].startswith("hemofed-") or command[0] == "make"):
                yield command
            command = []
        elif command or word not in ("do", "then", "else"):
            command.append(word.removeprefix(".venv/bin/"))


def without_comments(script: str) -> str:
    return re.sub(r"(^|\s)#.*$", "", script, flags=re.MULTILINE)


def documented_commands() -> list[tuple[str, list[str]]]:
    return [
        (path.name, command)
        for path in DOCUMENTS
        for script in fences(path.read_text(encoding="utf-8"), "bash", "sh", "console")
        for command in commands_in(without_comments(script))
    ]


def fault_of(words: list[str]) -> str | None:
    """Why a command line would be refused before it did anything, or None."""
    name, *arguments = words
    if name == "make":
        unknown = [word for word in arguments if "=" not in word and word not in MAKE_TARGETS]
        return f"no target {unknown[0]}" if unknown else None
    group = COMMANDS.get(name)
    if not isinstance(group, click.Group):
        return f"no command {name}"
    if arguments[:1] in ([], ["--help"]):
        return None
    command = group.commands.get(arguments[0])
    if command is None:
        return f"{name} has no {arguments[0]}"
    try:
        command.make_context(name, arguments[1:])
    except click.exceptions.Exit:  # --help
        return None
    except click.UsageError as error:
        return error.format_message()
    return None


def id_of(value: object) -> str | None:
    return " ".join(value)[:60] if isinstance(value, list) else None


@pytest.mark.parametrize(("document", "words"), documented_commands(), ids=id_of)
def test_fenced_commands_would_be_accepted(document: str, words: list[str]) -> None:
    assert fault_of(words) is None


def test_commands_are_found_and_a_wrong_one_is_seen() -> None:
    found = [words for _, words in documented_commands()]
    assert ["make", "demo"] in found
    assert any(words[:2] == ["hemofed-sim", "run"] for words in found)
    loop = "for d in A B; do\n  .venv/bin/hemofed-client ingest x \\\n    --site-dir y  # why\ndone\n"
    assert list(commands_in(without_comments(loop))) == [["hemofed-client", "ingest", "x", "--site-dir", "y"]]
    assert fault_of(["hemofed-sim", "run", "study.toml", "--out", "x"]) is None
    assert fault_of(["hemofed-sim", "run", "study.toml", "--out", "x", "--turbo"]) is not None
    assert fault_of(["hemofed-sim", "run", "--out", "x"]) is not None
    assert fault_of(["hemofed-sim", "fly"]) is not None
    assert fault_of(["make", "tea"]) is not None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_running_text_exist(path: Path) -> None:
    """A command named in a sentence may lack arguments; its subcommand and options must exist."""
    for span in SPAN.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        name, *rest = shlex.split(span)
        if name == "make":
            assert rest[0] in MAKE_TARGETS, span
            continue
        group = COMMANDS[name]
        assert isinstance(group, click.Group)
        assert rest[0] in group.commands, span
        known = {option for parameter in group.commands[rest[0]].params for option in parameter.opts}
        known |= {option for parameter in group.commands[rest[0]].params for option in parameter.secondary_opts}
        assert {word for word in rest if word.startswith("--")} <= known | {"--help"}, span


def test_console_scripts_lead_to_functions() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(scripts) == set(COMMANDS)
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{path.name} links to {target}"


def test_every_document_can_be_reached_from_the_index() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        todo += [page.parent / link for link in links if "://" not in link]
    assert sorted(path.name for path in (ROOT / "docs").rglob("*.md") if path.resolve() not in reached) == []


# A letter in brackets keeps this file from holding what it looks for.
FORBIDDEN = re.compile(
    r"/wor[k]/|/tm[p]/|/roo[t]/|/hom[e]/|/User[s]/|pyp[i]|pythonhoste[d]|pytorch\.org/wh[l]|ghcr\.i[o]|docker\.i[o]"
)


def tracked_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout: which files are tracked is not known")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_machine_path_and_no_registry_host_in_the_project() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FORBIDDEN.finditer(text)]
    assert found == []
    assert FORBIDDEN.search("/".join(("", "home", "somebody", "notes")))


class Row(NamedTuple):
    """One line of a table in study-file.md."""

    type: str
    default: str
    meaning: str


def documented_keys() -> dict[str, Row]:
    """Every key in study-file.md by its dotted path."""
    keys: dict[str, Row] = {}
    text = (ROOT / "docs" / "study-file.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        table = re.fullmatch(r"`\[{1,2}([\w.]+)\]{1,2}`", heading)
        prefix = f"{table.group(1)}." if table else ""
        for key, kind, default, meaning in re.findall(
            r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+) \|$", section, re.MULTILINE
        ):
            assert prefix + key not in keys, f"{prefix}{key} stands twice"
            keys[prefix + key] = Row(kind, default, meaning)
    return keys


def table_in(annotation: object) -> type[BaseModel] | None:
    """The settings class that a field holds, itself or as a tuple of them."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def schema_keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    keys: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        inner = table_in(field.annotation)
        keys |= schema_keys(inner, f"{prefix}{name}.") if inner else {prefix + name: field}
    return keys


def type_words(annotation: object) -> set[str]:
    """A type as study-file.md writes it; None is left out, since TOML has no null."""
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if isinstance(annotation, type) and annotation in names:
        return {names[annotation]}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {f"`{value}`" for value in arguments}
    if origin is tuple:
        return {{float: "list of numbers", int: "list of integers"}.get(arguments[0], "list of text")}
    if origin is dict:
        return {"table of numbers"}
    if hasattr(annotation, "__metadata__"):
        return type_words(arguments[0])
    return set().union(*(type_words(part) for part in arguments if part is not type(None)))


SCHEMA = schema_keys(Study) | schema_keys(Simulation, "simulation.") | schema_keys(Comparison, "comparison.")
SCHEMA |= schema_keys(Tradeoff, "tradeoff.")


def test_every_key_of_a_study_is_documented_and_no_other() -> None:
    assert set(documented_keys()) == set(SCHEMA)
    assert len(SCHEMA) > 50
    assert SCHEMA["simulation.hospitals.filter.low_pass_hz"].default == 150.0


@pytest.mark.parametrize("key", SCHEMA)
def test_documented_type_and_default_are_the_schemas(key: str) -> None:
    field, row = SCHEMA[key], documented_keys()[key]
    assert set(row.type.split(", ")) == type_words(field.annotation)
    if field.is_required():
        assert row.default == "required"
        return
    default = field.get_default(call_default_factory=True)
    written = tomllib.loads(f"value = {row.default.strip('`')}")["value"]
    assert written == (list(default) if isinstance(default, tuple) else default)
    assert type(written) is not bool or type(default) is bool


@pytest.mark.parametrize("path", sorted((ROOT / "simulation" / "studies").glob("*.toml")), ids=lambda path: path.name)
def test_studies_that_come_along_are_valid(path: Path) -> None:
    if "[tradeoff]" in path.read_text(encoding="utf-8"):
        assert load_tradeoff(path)[2].sweeps
        return
    study, _ = load_plan(path)
    assert study.name
    if "[comparison]" in path.read_text(encoding="utf-8"):
        assert load_comparison(path)[2].methods


def test_study_files_in_the_docs_are_valid(tmp_path: Path) -> None:
    blocks = [
        body
        for path in DOCUMENTS
        for body in fences(path.read_text(encoding="utf-8"), "toml")
        if path.name in ("study-file.md", "running-a-study.md", "methods.md", "README.md")
    ]
    assert len(blocks) >= 3
    for body in blocks:
        file = tmp_path / "study.toml"
        file.write_text(body if body.startswith("name") else f'name = "part of a study"\n{body}', encoding="utf-8")
        load_plan(file)


@pytest.mark.long
def test_the_commands_of_running_a_study_run_as_they_stand(tmp_path: Path) -> None:
    """docs/running-a-study.md from "Hospitals of your own" on, on two small hospitals."""
    text = (ROOT / "docs" / "running-a-study.md").read_text(encoding="utf-8")
    own = text[text.index("## Hospitals of your own") :]
    for name, patients in (("north", 150), ("south", 120)):
        write_hospital(HospitalSpec(name=name, patients=patients), tmp_path / "exports" / name, seed=1)
    study = fences(own, "toml")[0]
    assert study_from_table(tomllib.loads(study), "running-a-study.md").finetune.rounds <= 2
    (tmp_path / "study.toml").write_text(study, encoding="utf-8")
    modules = {"hemofed-client": "client.cli", "hemofed-server": "server.cli", "hemofed-sim": "simulation.cli"}
    commands = [words for script in fences(own, "bash") for words in commands_in(without_comments(script))]
    assert len(commands) >= 6
    for name, *arguments in commands:
        done = subprocess.run(
            [sys.executable, "-c", f"from {modules[name]} import main; main()", *arguments],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{name} {' '.join(arguments)}: {done.stderr[-2000:]}"
    for file in ("results.json", "report.html", "metrics.jsonl", "model/model.safetensors", "model/card.md"):
        assert (tmp_path / "runs" / "mine" / file).is_file()
    weights = [(tmp_path / "runs" / run / "model" / "model.safetensors").read_bytes() for run in ("mine", "on-ray")]
    assert weights[0] == weights[1]
