"""CloudFormation templates, with what they are given put in."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Knows the short forms: `!Ref X` is {"Ref": "X"}, `!Sub X` is {"Fn::Sub": "X"}."""


def _short_form(loader: _Loader, tag: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    return {tag if tag in {"Ref", "Condition"} else f"Fn::{tag}": value}


_Loader.add_multi_constructor("!", _short_form)


def read_template(path: Path, **given: str) -> dict[str, Any]:
    """A template with its parameters as given, or their defaults.

    What is neither, and what only the cloud knows, becomes `${Name}`.
    """
    template: dict[str, Any] = yaml.load(path.read_text(), _Loader)
    parameters = template.get("Parameters", {})
    defaults = {name: str(each["Default"]) for name, each in parameters.items() if "Default" in each}
    for name in given.keys() & parameters.keys():
        assert re.fullmatch(parameters[name]["AllowedPattern"], given[name]), f"{path.name}: {name}"
    resolved: dict[str, Any] = _resolve(template, defaults | given)
    return resolved


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "Fn::GetAtt": lambda what: f"${{{what if isinstance(what, str) else '.'.join(what)}}}",
    "Fn::ImportValue": lambda name: f"${{{name}}}",
    "Fn::Join": lambda two: two[0].join(two[1]),
    "Fn::Split": lambda two: two[1].split(two[0]),
    "Fn::Select": lambda two: two[1][int(two[0])],
}


def _resolve(part: Any, names: Mapping[str, str]) -> Any:
    match part:
        case list():
            return [_resolve(each, names) for each in part]
        case {"Ref": str() as name}:
            return names.get(name, f"${{{name}}}")
        case {"Fn::Sub": argument}:
            return _substitute(argument, names)
        case dict():
            resolved = {key: _resolve(value, names) for key, value in part.items()}
            (first, *more) = resolved or [""]
            return resolved if more or first not in _FUNCTIONS else _FUNCTIONS[first](resolved[first])
    return part


def _substitute(argument: Any, names: Mapping[str, str]) -> str:
    text, more = argument if isinstance(argument, list) else (argument, {})
    own = {**names, **{name: str(_resolve(value, names)) for name, value in more.items()}}
    return re.sub(r"\$\{([\w.:]+)\}", lambda match: own.get(match[1], match[0]), text)
