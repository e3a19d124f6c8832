"""Run files: reads them, lays overrides over them, and reports precisely what is wrong with the result.

A `Draft` remembers the origin of each value, so that an error names the key, the value and the file, environment
variable or option that set it. Layers are laid in order of rising precedence; rewards are addressed by name:

    draft = Draft("deploy/runs/shapes.yaml")
    draft.lay(read_run_file(path), "deploy/runs/shapes.yaml")
    draft.lay({"rewards": {"hps": {"weight": 0.5}}}, "option --rewards.hps.weight")
    config = draft.build()
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from common.config.backbones import BACKBONE_SECTIONS, BACKBONE_TAGS
from common.config.rewards import RewardConfig
from common.config.run import Config
from common.config.section import Section
from common.config.upgrade import REMOVED, RENAMED, upgraded
from common.errors import ConfigError, one_line
from common.project_files import PROJECT_ROOT
from common.urls import without_secrets

Key = tuple[str, ...]
REWARD_PLACEHOLDER = "NAME"
WORD_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
"""Tags of a mapping's keys: words, and `<<`, which merges another mapping."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SHELL_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")
CREDENTIALS = re.compile(r"(?<=://)(?:\\.|[^\"\\])*@")
QUERY = re.compile(r"(://(?:\\.|[^\"\\?])*)\?(?:\\.|[^\"\\])*")
"""Parts of a URL inside a JSON string that may hold secrets."""
RUN_FILES = PROJECT_ROOT / "deploy" / "runs"
"""Directory of the run files that come with the project."""


@dataclass(frozen=True)
class Knob:
    """One option: a field of a section of the schema. A reward's fields have the key ("rewards", "NAME", field).

    Every model family has its own section under ("backbone",), so their common fields appear once per family.
    """

    key: Key
    field: FieldInfo
    section: type[Section]

    @property
    def dotted(self) -> str:
        return ".".join(self.key)


def knobs(section: type[Section] = Config, prefix: Key = ()) -> Iterator[Knob]:
    """Every option of the schema, in its order."""
    for name, field in section.model_fields.items():
        if name == "rewards":
            yield from knobs(RewardConfig, (*prefix, name, REWARD_PLACEHOLDER))
        elif name == "backbone":
            for family in BACKBONE_SECTIONS:
                yield from knobs(family, (*prefix, name))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from knobs(field.annotation, (*prefix, name))
        else:
            yield Knob((*prefix, name), field, section)


def kinds_of(key: Key) -> set[Any]:
    """The types that the option with this key may have, in any family; none if there is no such option."""
    pattern = (key[0], REWARD_PLACEHOLDER, *key[2:]) if key[0] == "rewards" else key
    return {kind for knob in knobs() if knob.key == pattern for kind in _kinds(knob.field.annotation)}


def _kinds(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (types.UnionType, Union):
        for member in get_args(annotation):
            yield from _kinds(member)
    else:
        yield get_origin(annotation) or annotation


def load_config(path: Path) -> Config:
    """Load the configuration of one run file, without overrides.

    Raises:
        ConfigError: the file cannot be read or is not valid.
    """
    draft = Draft(str(path))
    draft.lay(read_run_file(path), str(path))
    return draft.build()


def load_saved_config(path: Path) -> Config:
    """Load the configuration that a run has saved, even with an earlier version.

    Raises:
        ConfigError: see `load_config`.
    """
    draft = Draft(str(path))
    draft.lay(upgraded(read_run_file(path)), str(path))
    return draft.build()


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_saved_config` reads back to the same value."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_RunFileDumper, sort_keys=False, allow_unicode=True)


def read_run_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: missing, unreadable, not UTF-8, not YAML, a key given twice, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such run file (looked for it from {Path.cwd()}); see {RUN_FILES}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run file is a mapping of sections, this one holds {_shown(values)}")
    return values


def parse_yaml(text: str, origin: str) -> Any:
    """Parse a YAML value; an error names `origin`."""
    try:
        value = yaml.load(text, Loader=_RunFileLoader)
    except RecursionError as error:
        raise ConfigError(f"{origin}: not valid YAML: nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{origin}: not valid YAML: {one_line(error)}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{origin}: line {line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        json.dumps(value, default=str)
    except ValueError as error:
        raise ConfigError(f"{origin}: not valid YAML: an alias (*name) stands inside of what it names") from error
    return value


NUMBERS = {
    "int": r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)",
    "float": r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf)|\.nan",
}
"""Patterns of numbers in a run file: `1e-5` is a number, `010` and `12:30` are text. YAML 1.1 says text, 8 and 750."""
NOT_RESOLVED = {f"tag:yaml.org,2002:{kind}" for kind in (*NUMBERS, "timestamp")}


class _RunFileLoader(yaml.SafeLoader):
    """YAML loader without the pitfalls of YAML 1.1's numbers and dates; a duplicate key is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - yaml's own name and type
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in NOT_RESOLVED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checks the keys as they are written: a merge key (`<<: *other`) may add keys that are overridden here."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "of several parts"
            if key_node.tag not in WORD_TAGS:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is not a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return node


class _RunFileDumper(yaml.SafeDumper):
    """Quotes text that `_RunFileLoader` would read as a number."""


for _kind, _pattern in NUMBERS.items():
    for _class in (_RunFileLoader, _RunFileDumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list("-+.0123456789")
        )


class Draft:
    """Values that will become a `Config`, with the origin of each."""

    def __init__(self, default_origin: str) -> None:
        self._values: dict[str, Any] = {}
        self._origins: dict[Key, str] = {}
        self._default_origin = default_origin

    def lay(self, values: Mapping[str, Any], origin: str) -> None:
        """Lay a partial configuration over the values so far: mappings merge, anything else replaces."""
        for name, value in values.items():
            self._lay_value(self._values, name, value, (name,), origin)

    def build(self) -> Config:
        """Validate the values and return the configuration.

        Raises:
            ConfigError: one line per problem, with its origin, key and value.
        """
        for location, text in _texts(self._values):
            self._require_usable(self._named(location), text)
        try:
            return Config.model_validate_json(json.dumps(self._values, default=str), strict=True)
        except ValidationError as error:
            lines = [self._complaint(detail) for detail in error.errors(include_url=False)]
            raise ConfigError("\n".join(dict.fromkeys(lines))) from error

    def _require_usable(self, key: Key, text: str) -> None:
        """ConfigError for a text that is lost or changed on its way into a `Config`, or that names no path."""
        origin, dotted = self._origin(key), ".".join(key)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{origin}: {dotted} = {_shown(text)} has bytes that are not UTF-8: rename it") from error
        kinds = kinds_of(key)
        if not text and Path in kinds:  # a variable that is not set; `Path` would take the current directory
            raise ConfigError(f"{origin}: {dotted} is empty: name a path")
        if kinds & {str, Path} and CONTROL.search(text):
            raise ConfigError(
                f"{origin}: {dotted} = {_shown(text)} has a control character, such as a line end: remove it"
            )
        if Path in kinds and SHELL_VARIABLE.search(text) and not Path(text).exists():
            raise ConfigError(
                f"{origin}: {dotted} = {_shown(text)}: variables are not expanded here: write the whole path, or let "
                f"the shell expand it as --{dotted} {text}"
            )

    def _lay_value(self, parent: dict[str, Any], name: str, value: Any, key: Key, origin: str) -> None:
        current = parent.get(name)
        if isinstance(value, Mapping) and isinstance(current, list):
            for entry_name, fields in value.items():
                self._lay_entry(current, fields, (*key, str(entry_name)), origin)
        elif isinstance(value, Mapping) and (current is None or isinstance(current, dict)):
            section = parent[name] = current or {}
            for child, child_value in value.items():
                self._lay_value(section, child, child_value, (*key, child), origin)
        else:
            parent[name] = deepcopy(value)
            self._origins = {known: source for known, source in self._origins.items() if known[: len(key)] != key}
            self._origins[key] = origin

    def _lay_entry(self, entries: list[Any], fields: Any, key: Key, origin: str) -> None:
        """Lay `fields` over the list entry that has the key's last part as its name."""
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
        if key[-1] not in names:
            known = ", ".join(str(name) for name in names)
            raise ConfigError(f"{origin}: {'.'.join(key)}: no such entry in {key[0]}; there are {known}")
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{origin}: {'.'.join(key)} = {_shown(fields)}: name the field, {'.'.join(key)}.FIELD")
        for child, value in fields.items():
            self._lay_value(entries[names.index(key[-1])], child, value, (*key, child), origin)

    def _complaint(self, detail: Any) -> str:
        key = self._named(detail["loc"])
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "union_tag_invalid":
            key = (*key, "family")
            return (
                f'{self._origin(key)}: {".".join(key)} = "{context["tag"]}": input should be {context["expected_tags"]}'
            )
        if kind == "cross_field":
            key = (*key, *str(context["key"]).split("."))
            return f"{self._origin(key)}: {'.'.join(key)}: {context['message']}"
        dotted = ".".join(key)
        if kind == "extra_forbidden":
            return f"{self._origin_within(key)}: {dotted}: unknown key{self._suggestion(key)}"
        if kind == "missing":
            return f"{self._default_origin}: {dotted}: required, but not set"
        fault = "input should be true or false" if kind.startswith("bool_") else detail["msg"]
        if kind == "string_type" and isinstance(detail["input"], int | float):
            fault = "input should be text, and YAML reads this as a number or as true or false: write it in quotes"
        return f"{self._origin(key)}: {dotted} = {_shown_at(key, detail['input'])}: {fault[0].lower()}{fault[1:]}"

    def _named(self, location: tuple[int | str, ...]) -> Key:
        """A pydantic location with list positions replaced by the names of the entries, if they have one."""
        key: list[str] = []
        value: Any = self._values
        for part in location:
            if key == ["backbone"] and part in BACKBONE_TAGS:
                continue  # pydantic adds this part: the section of the union that reports the error
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                value = None
            named = isinstance(part, int) and isinstance(value, dict) and "name" in value
            key.append(str(value["name"] if named else part))
        return tuple(key)

    def _suggestion(self, key: Key) -> str:
        if key in RENAMED:
            return f"; it is now {' and '.join(RENAMED[key])}"
        if key in REMOVED:
            return f"; it is no longer needed: {REMOVED[key]}"
        if key[0] == "backbone" and key in {knob.key for knob in knobs()}:
            family = str(self._values["backbone"].get("family", "sd3"))
            own = "; what it needs goes into backbone.options" if ":" in family else ""
            return f" for backbone.family = {family}{own}"
        return _nearest(key)

    def _origin_within(self, key: Key) -> str:
        """As `_origin`; that of a key inside of an unknown section."""
        inside = (source for known, source in self._origins.items() if known[: len(key)] == key)
        return next(inside, self._origin(key))

    def _origin(self, key: Key) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self._origins:
                return self._origins[key[:length]]
        return self._default_origin


def _texts(value: Any, location: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Every text among nested values, with its location."""
    if isinstance(value, str):
        yield location, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, (*location, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(inner, (*location, place))


def _nearest(key: Key) -> str:
    """The nearest valid key: a sibling with a similar spelling, else the same word in another section."""
    pattern = (key[0], REWARD_PLACEHOLDER, *key[2:]) if key[0] == "rewards" and len(key) > 2 else key
    known = [knob.key for knob in knobs()]
    siblings = {
        other[len(key) - 1] for other in known if len(other) >= len(key) and other[: len(key) - 1] == pattern[:-1]
    }
    close = difflib.get_close_matches(key[-1], sorted(siblings), n=1)
    if close:
        return f"; did you mean {'.'.join((*key[:-1], close[0]))}?"
    elsewhere = [".".join(other) for other in known if other[-1] == key[-1]]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""


def _shown_at(key: Key, value: Any) -> str:
    """As `_shown`; of a URL without its scheme only the key says that there may be secrets in it."""
    mistyped = key[-1] == "url" and isinstance(value, str) and "://" not in value
    return _shown(without_secrets(value) if mistyped else value)


def _shown(value: Any) -> str:
    """A value as it would be written in the file, shortened, without the user, password and query of a URL."""
    text = QUERY.sub(r"\1?...", CREDENTIALS.sub("...@", json.dumps(value, default=str)))
    return text if len(text) <= 80 else f"{text[:77]}..."
