"""Generates docs/configuration.md from the schema: every option with its default, its values and its description.

python -m learner.preflight.configuration_page > docs/configuration.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from common.config.section import Section
from learner.preflight.run_file import Key, Knob, knobs

JsonSchema = Mapping[str, Any]

INTRODUCTION = """\
# Configuration

After this page you can find every option of a run file, its default and the values it takes.

The page is generated from the schema in `common/config/`. Do not edit it. Regenerate it with

    python -m learner.preflight.configuration_page > docs/configuration.md

- **Set an option** in the run file, as an environment variable or on the command line. These three are equal:
  `alignment: {group_size: 16}`, `RTDMD_ALIGNMENT__GROUP_SIZE=16`, `--alignment.group_size 16`. A later one of the three
  overrides an earlier one.
- **Set an option of one reward** by its name: `--rewards.hps.weight 0.5`. NAME stands for the name below.
- **Read the values** as YAML. `null` turns an option off or selects the default that its description names. Numbers are
  decimal: `010` is refused. In a variable or option, text and paths are what you typed, quotes and `#` included.
- **Check a run file** with `rtdmd train --config FILE --dry-run`.

The defaults are the published SD3-M setting, see [method.md](method.md). The run files in `deploy/runs/` set what their
model needs."""

TABLE_HEAD = "| option | default | values | description |\n|---|---|---|---|"

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
"""Each JSON schema key maps to its sign. The order is that of a sentence: lower bound, then upper bound."""

WORDS = {
    "boolean": "`true`, `false`",
    "integer": "whole number",
    "null": "`null`",
    "number": "number",
    "object": "mapping",
    "path": "path",
    "string": "text",
}
"""Each JSON schema type, or its format if it has one, maps to its description."""


def configuration_page(options: Iterable[Knob]) -> str:
    """The page as Markdown, one table per section of the schema, in the schema's order."""
    parts = [INTRODUCTION]
    for (prefix, section), group in groupby(options, key=lambda knob: (knob.key[:-1], knob.section)):
        schema = section.model_json_schema()
        about = (section.__doc__ or "").strip().splitlines()[0]
        rows = [_row(knob, _resolved(schema["properties"][knob.key[-1]], schema)) for knob in group]
        parts.append("\n".join([f"## {_title(prefix, section)}\n\n{about}\n\n{TABLE_HEAD}", *rows]))
    return "\n\n".join(parts) + "\n"


def _title(prefix: Key, section: type[Section]) -> str:
    """The section's key; model families share one key, so theirs is followed by the family."""
    family = section.model_fields.get("family")
    if family is None:
        return ".".join(prefix)
    values = _values(section.model_json_schema()["properties"]["family"])
    return f"{'.'.join(prefix)}, family {values if values.startswith('`') else '`module:Class`'}"


def _row(knob: Knob, schema: JsonSchema) -> str:
    default = "required" if knob.field.is_required() else _code(json.dumps(knob.field.default, default=str))
    cells = [_code(knob.dotted), default, _values(schema), knob.field.description or ""]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _resolved(option: JsonSchema, schema: JsonSchema) -> JsonSchema:
    """The option's schema; that of an enumeration is a reference to the definitions of the whole schema."""
    if "anyOf" in option:
        return {**option, "anyOf": [_resolved(member, schema) for member in option["anyOf"]]}
    if "items" in option:
        return {**option, "items": _resolved(option["items"], schema)}
    return schema["$defs"][option["$ref"].rpartition("/")[2]] if "$ref" in option else option


def _values(schema: JsonSchema) -> str:
    """The values that a schema of one option allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(member) for member in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(_code(value) for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}{', not empty' if schema.get('minItems') else ''}"
    return WORDS[schema.get("format", schema["type"])] + "".join(_limits(schema))


def _limits(schema: JsonSchema) -> Iterator[str]:
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    if bounds:
        yield f" {' and '.join(bounds)}"
    if "pattern" in schema:
        yield f" that matches {_code(schema['pattern'])}"


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    print(configuration_page(knobs()), end="")
