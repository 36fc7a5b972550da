"""The Dockerfile, as far as it can be checked without Docker: its stages, what it copies, and who runs it."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Stage:
    """One ``FROM ... AS name`` and the instructions that follow it."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [words for word, words in self.instructions if word == keyword]


def parse(text: str) -> dict[str, Stage]:
    """The stages by name. Comments are dropped, lines that end in a backslash are joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", kept).splitlines():
        if not line.strip():
            continue
        keyword, _, words = line.partition(" ")
        assert keyword.isupper(), f"no instruction: {line}"
        if keyword == "FROM":
            base, name = words.split(" AS ")
            stages[name] = Stage(name=name, base=base)
        elif stages:
            list(stages.values())[-1].instructions.append((keyword, words))
    return stages


STAGES = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def lineage(stage: Stage) -> list[Stage]:
    """A stage and those that it is built on."""
    return [stage, *(lineage(STAGES[stage.base]) if stage.base in STAGES else [])]


def copied(stage: Stage) -> list[str]:
    """Sources that a stage copies from the folder of the build."""
    return [s for words in stage.all("COPY") if not words.startswith("--from=") for s in words.split()[:-1]]


def in_context(path: str) -> bool:
    """Whether .dockerignore leaves a file in the folder of the build: the last line that fits decides."""
    left = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = path.split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        anywhere = pattern.startswith("**/")
        if any(fnmatch(name, pattern.removeprefix("**/")) for name in (parts if anywhere else above)):
            left = line.startswith("!")
    return left


def test_there_is_a_target_for_each_kind_of_machine() -> None:
    assert {"cpu", "cuda"} <= set(STAGES)
    # Without --target, Docker builds the last one.
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_a_plain_user_that_exists(target: str) -> None:
    stages = lineage(STAGES[target])
    assert stages[0].instructions[-1] == ("USER", "archfront")
    commands = " ".join(words for stage in stages for words in stage.all("RUN"))
    assert "useradd" in commands
    assert " archfront " in commands
    assert any(stage.all("CMD") for stage in stages)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_installs_the_wheel_with_the_pinned_versions(target: str) -> None:
    [install] = STAGES[target].all("RUN")
    assert "/dist/archfront-*.whl" in install
    assert "--constraint /dist/constraints.txt" in install
    assert "[postgres]" in install


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [source for stage in STAGES.values() for source in copied(stage)]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert in_context(source), f".dockerignore leaves out {source}"


def test_what_is_copied_from_a_stage_has_a_stage() -> None:
    for stage in STAGES.values():
        for words in stage.all("COPY"):
            if words.startswith("--from="):
                assert words.split()[0].removeprefix("--from=") in STAGES


def test_every_layer_gets_into_the_wheel() -> None:
    """The links of src/archfront lead to folders beside it: what is not copied is silently not in the wheel."""
    links = {path.resolve().name for path in (ROOT / "src" / "archfront").iterdir() if path.is_symlink()}
    assert links
    assert links <= set(copied(STAGES["wheel"]))


@pytest.mark.parametrize(
    "path", ["secrets/db-password", ".env", ".git/config", "archfront.db", ".venv/bin/python", "db/__pycache__/x.pyc"]
)
def test_nothing_else_gets_into_the_build(path: str) -> None:
    assert not in_context(path)


def test_no_registry_is_named() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "://" not in text
    for argument in re.findall(r"^ARG (\w*INDEX\w*)=(.*)$", text, re.MULTILINE):
        assert argument[1] == '""'
