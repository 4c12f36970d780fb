"""The reference pages' tables, made from the code when the site is built."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from inspect import cleandoc, isfunction
from typing import Any

from fastapi import FastAPI

import zndraw_joblib as joblib
from zndraw_joblib import JobLibSettings, events, exceptions, router

METHODS = ("get", "put", "post", "patch", "delete")


def table(*head: str, rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table, the columns left out that are empty."""
    filled = [list(row) for row in rows]
    kept = [n for n in range(len(head)) if any(row[n] for row in filled)]
    lines = [list(head), ["---"] * len(head), *filled]
    return "\n".join(
        "| " + " | ".join(one_line(line[n]).replace("|", "\\|") for n in kept) + " |"
        for line in lines
    )


def one_line(text: str) -> str:
    return " ".join(text.split())


def code(text: Any) -> str:
    return f"`{text}`"


def as_json(default: Any) -> str:
    """Return a default as the wire, and a variable of the environment, has it."""
    return code(json.dumps(default))


def told(thing: Any) -> str:
    """Return a docstring's first paragraph, its literals as Markdown has them."""
    first, _, _ = cleandoc(thing.__doc__ or "").partition("\n\n")
    return first.replace("``", "`")


def kind(schema: dict[str, Any]) -> str:
    """Return a JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](bodies.md#{name.lower()})"
    if options := schema.get("anyOf"):
        return " or ".join(map(kind, options))
    if "enum" in schema:
        return " or ".join(map(code, schema["enum"]))
    if "const" in schema:
        return code(schema["const"])
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind(schema['additionalProperties'])}"
    name = schema.get("format", schema.get("type", "any"))
    bounds = [
        f"{sign} {exact(schema[key])}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return " ".join([name, ", ".join(bounds)]).strip()


def exact(bound: float) -> str:
    return str(int(bound) if bound == int(bound) else bound)


def settings() -> str:
    """Return every setting, its type and its default."""

    def rows() -> Iterator[list[str]]:
        for name, field in JobLibSettings.model_fields.items():
            schema = JobLibSettings.model_json_schema()["properties"][name]
            default = field.get_default(call_default_factory=True)
            yield [code(name), kind(schema), as_json(default), str(field.description)]

    return table("setting", "type", "default", "what", rows=rows())


def all_problems() -> list[type[exceptions.Problem]]:
    """Return the classes of problems, by status and name."""
    classes = [each for each in vars(exceptions).values() if isinstance(each, type)]
    # what others are derived from is none by itself
    found = [c for c in classes if issubclass(c, exceptions.Problem) and not c.__subclasses__()]
    return sorted(found, key=lambda problem: (problem.status, problem.__name__))


def title(problem: type[exceptions.Problem]) -> str:
    return f"{problem.status} {problem.problem_id()}"


def problems() -> str:
    """Return a section for every problem."""
    return "\n\n".join(
        "\n\n".join(
            [
                f"## {title(problem)}",
                told(problem),
                f"`type`: `{problem.type_uri()}`, class `{problem.__name__}`"
                + "".join(f", header `{header}`" for header in problem.headers),
            ]
        )
        for problem in all_problems()
    )


def all_events() -> list[type[events.FrozenEvent]]:
    """Return the classes of events, in the order of their definition."""
    return events.FrozenEvent.__subclasses__()


def event_sections() -> str:
    """Return a section for every event, with its fields."""
    return "\n\n".join(
        f"## {event.event_name}\n\n{told(event)}\n\n"
        + (
            table(
                "field",
                "type",
                rows=(
                    [code(name), kind(schema)]
                    for name, schema in inlined(event)["properties"].items()
                ),
            )
            if event.model_fields
            else "No fields."
        )
        for event in all_events()
    )


def inlined(model: Any) -> dict[str, Any]:
    """Return a model's schema, the schemas that it refers to in their places."""
    schema = model.model_json_schema()

    def inline(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return schema["$defs"][part["$ref"].rpartition("/")[2]]
            return {key: inline(value) for key, value in part.items()}
        return [inline(p) for p in part] if isinstance(part, list) else part

    return inline(schema)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of a host that has these routes alone."""
    app = FastAPI(title="zndraw-joblib")
    app.include_router(router)
    return app.openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield method.upper(), path.removeprefix(router.prefix), item[method]


def unnamed(path: str) -> str:
    """Return a path as OpenAPI has it, without the converters of its parameters."""
    return re.sub(r":\w+}", "}", path)


def routes() -> str:
    """Return a section for every route."""
    return "\n\n".join(
        route(method, path, operation)
        for method, path, operation in sorted(operations(openapi()), key=place)
    )


def bodies() -> str:
    """Return a section for every model that the routes name."""
    models = openapi()["components"]["schemas"]
    return "\n\n".join(model(name, schema) for name, schema in sorted(models.items()))


def place(operation: tuple[str, str, Any]) -> tuple[Any, ...]:
    """Return where a route stands: by its noun, those of rooms first."""
    method, path, _ = operation
    nouns = ["workers", "jobs", "tasks", "batches", "providers"]
    noun = path.removeprefix("/rooms/{room_id}").split("/")[1]
    at = nouns.index(noun) if noun in nouns else len(nouns)
    return at, noun, not path.startswith("/rooms"), path, METHODS.index(method.lower())


def route(method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [f"## `{method} {path}`", operation["description"]]
    parameters = [p for p in operation.get("parameters", ()) if p["in"] != "path"]
    if parameters:
        rows = (
            [f"`{p['name']}`", p["in"], kind(p["schema"]), p.get("description", "")]
            for p in parameters
        )
        lines.append(table("parameter", "in", "type", "what", rows=rows))
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        shape = kind(body["schema"])
        lines.append(f"Body: {shape}" + ("" if "json" in media else f" (`{media}`)"))
    answers, refused = [], []
    for status, answer in operation["responses"].items():
        media = answer.get("content", {})
        problem = media.get("application/problem+json")
        types = problem and problem["schema"]["properties"]["type"].get("enum")
        if types:
            names = (f"{status} {uri.rpartition('/')[2]}" for uri in types)
            refused += [f"[{n}](problems.md#{n.replace(' ', '-')})" for n in names]
        else:
            answers.append([status, *shown(answer)])
    if any(cell for _, *cells in answers for cell in cells):
        lines.append(table("answer", "body", "headers", "what", rows=answers))
    else:
        lines.append("Answer: " + " or ".join(status for status, *_ in answers))
    lines.append("Problems: " + ", ".join(sorted(refused)))
    return "\n\n".join(lines)


def shown(answer: dict[str, Any]) -> list[str]:
    bodies = [
        kind(body.get("schema", {})) if "/json" in media else code(media)
        for media, body in answer.get("content", {}).items()
    ]
    return [
        " or ".join(bodies),
        ", ".join(map(code, answer.get("headers", {}))),
        answer["description"].replace("Successful Response", ""),
    ]


def model(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = (
        [
            code(field),
            kind(part),
            "required" if field in required else as_json(part.get("default")),
            part.get("description", ""),
        ]
        for field, part in schema.get("properties", {}).items()
    )
    described = " ".join(cleandoc(schema.get("description", "")).split("\n\n")[0].split())
    body = (
        table("field", "type", "default", "what", rows=rows)
        if "properties" in schema
        else kind(schema)
    )
    return f"## {name}\n\n{described}\n\n{body}"


#: The modules of which a page tells; all others are for hosts.
PAGES = {
    "python-workers": ("client", "extension", "execution", "provider"),
    "python-wire": ("schemas", "events", "exceptions", "lifecycle"),
}


def python(page: str) -> str:
    """Return what documents every name that the package hands on, by module."""
    others = {module for modules in PAGES.values() for module in modules}
    by_module: dict[str, list[str]] = {}
    for name in joblib.__all__:
        module = joblib._MODULE_OF[name]
        if module in PAGES[page] if page in PAGES else module not in others:
            by_module.setdefault(module, []).append(name)
    sections = []
    for module, names in by_module.items():
        about = told(import_module(f"zndraw_joblib.{module}"))
        sections.append(f"## {module}\n\n{about}")
        sections.append("```{eval-rst}\n" + "\n".join(map(directive, names)) + "\n```")
    return "\n\n".join(sections)


def directive(name: str) -> str:
    thing = getattr(joblib, name)
    what = f"zndraw_joblib.{name}"
    if thing is router:
        return f".. py:data:: {what}\n\n   The routes, with their prefix.\n"
    if isfunction(thing):
        return f".. autofunction:: {what}\n"
    if not isinstance(thing, type):
        # its comment stands where it is defined
        return f".. autodata:: zndraw_joblib.{joblib._MODULE_OF[name]}.{name}\n"
    options = ["members:", "show-inheritance:"]
    if name == "JobManager":
        # what it can do stands in its bases
        options.append("inherited-members: Mapping")
    lines = "".join(f"   :{option}\n" for option in options)
    return f".. autoclass:: {what}\n{lines}"


GENERATED = {
    **{page: partial(python, page) for page in (*PAGES, "python-hosts")},
    "settings": settings,
    "problems": problems,
    "events": event_sections,
    "routes": routes,
    "bodies": bodies,
}
