"""Commands about what a job file may say: spaces, evaluators, strategies, schema, validate."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from archfront.cli.common import AsJson, PluginFiles, console, print_json
from archfront.registry import Registry, arguments_model


def spaces(plugin: PluginFiles = None, json: AsJson = False) -> None:
    """List the spaces that a job can search."""
    _list("spaces", plugin, json)


def evaluators(plugin: PluginFiles = None, json: AsJson = False) -> None:
    """List the evaluators that a job can use."""
    _list("evaluators", plugin, json)


def strategies(plugin: PluginFiles = None, json: AsJson = False) -> None:
    """List the search strategies."""
    _list("strategies", plugin, json)


def schema() -> None:
    """Print the JSON Schema of job files, for editors."""
    print_json(job_schema())


def validate(
    file: Annotated[str, typer.Argument(metavar="JOB.yaml")], plugin: PluginFiles = None, json: AsJson = False
) -> None:
    """Check a job file without running it."""
    from archfront.plugins import read_plugins
    from archfront.search.job import read_spec
    from archfront.search.plugins import load_plugins
    from archfront.search.resolve import resolve

    load_plugins(read_plugins(plugin or []))
    job = resolve(read_spec(file))
    if json:
        print_json(job.spec.model_dump(mode="json"))
        return
    size = "without bound" if job.space.size is None else f"of {job.space.size:.3g} genotypes"
    console.print(
        f"{file} is valid: a space {size}, metrics {', '.join(job.metrics)}, at most "
        f"{job.spec.budget.evaluations} evaluations.",
        highlight=False,
        soft_wrap=True,
    )


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, with the arguments of every component that is installed."""
    from archfront.search.job import JobSpec

    document = JobSpec.model_json_schema()
    for family, field in (("spaces", "space"), ("strategies", "strategy"), ("evaluators", "evaluators")):
        choices = _component_schemas(_family(family))
        place = document["properties"][field]
        if field == "evaluators":
            place["items"] = {"anyOf": choices}
        else:
            document["properties"][field] = {"anyOf": choices, "title": place.get("title", field)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def _component_schemas(registry: Registry[Any]) -> list[dict[str, Any]]:
    schemas = []
    for name in registry:
        arguments = arguments_model(registry.get(name, "name")).model_json_schema()
        arguments["properties"] = {"name": {"const": name}} | arguments.get("properties", {})
        arguments["required"] = ["name", *arguments.get("required", [])]
        arguments["title"] = name
        schemas.append(arguments)
    return schemas


def _family(name: str) -> Registry[Any]:
    from archfront.search.plugins import FAMILIES

    return FAMILIES[name]


def _list(family: str, plugins: list[str] | None, as_json: bool) -> None:
    from archfront.plugins import read_plugins
    from archfront.search.plugins import load_plugins

    load_plugins(read_plugins(plugins or []))
    registry = _family(family)
    rows = [_facts(name, registry) for name in registry]
    if as_json:
        print_json(rows)
        return
    table = Table("name", "what it is", "arguments")
    for row in rows:
        shown = [a["name"] if a["required"] else f"{a['name']}={a['default']}" for a in row["arguments"]]
        # Brackets in them are no markup.
        table.add_row(row["name"], escape(row["summary"]), escape(", ".join(shown)))
    console.print(table)


def _facts(name: str, registry: Registry[Any]) -> dict[str, Any]:
    cls = registry.get(name, "name")
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")
    arguments = [
        {"name": key, "required": field.is_required(), "default": None if field.is_required() else str(field.default)}
        for key, field in arguments_model(cls).model_fields.items()
    ]
    return {"name": name, "summary": summary, "arguments": arguments}
