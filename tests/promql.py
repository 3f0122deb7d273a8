"""What a PromQL query needs: does every metric, label and value that it names exist?"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from promql_parser import (
    AggModifierType,
    AggregateExpr,
    BinaryExpr,
    Call,
    Expr,
    LabelModifierType,
    Matcher,
    MatchOp,
    MatrixSelector,
    NumberLiteral,
    ParenExpr,
    StringLiteral,
    SubqueryExpr,
    UnaryExpr,
    VectorSelector,
    parse,
    walk,
)

Labels = frozenset[str]
OF_TARGETS = frozenset({"job", "instance"})
"""The labels that a scrape adds."""
WITHOUT_LABELS = {"absent", "scalar", "time", "vector"}
_NONE: Labels = frozenset()


class WrongQuery(Exception):
    """Something that it names does not exist, or two sides that cannot be matched."""


@dataclass
class Exported:
    """The series that processes export, by name: each label with the values that it had."""

    series: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """What one process answered."""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values = self.series.setdefault(sample.name, {label: set() for label in OF_TARGETS})
                for label, value in sample.labels.items():
                    values.setdefault(label, set()).add(value)

    def record(self, name: str, labels: Labels) -> None:
        """A series that a rule makes."""
        self.series[name] = {label: set() for label in labels}


def selectors(query: str) -> list[VectorSelector]:
    """Every place where it names a metric."""
    found: list[VectorSelector] = []

    def look(node: Expr) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)

    walk(parse(query), pre_visit=look)
    return found


def labels_of(query: str, exported: Exported) -> Labels:
    """The labels of what it answers.

    Raises `WrongQuery`, or `ValueError` where it cannot be read.
    """
    return _labels(parse(query), exported) or _NONE


def _labels(node: Expr, exported: Exported) -> Labels | None:
    """None where it answers a number."""
    found: Labels | None = None
    match node:
        case NumberLiteral():
            pass
        case ParenExpr() | UnaryExpr() | SubqueryExpr():
            found = _labels(node.expr, exported)
        case MatrixSelector():
            found = _of_selector(node.vector_selector, exported)
        case VectorSelector():
            found = _of_selector(node, exported)
        case AggregateExpr():
            found = _of_aggregate(node, exported)
        case Call():
            found = _of_call(node, exported)
        case BinaryExpr():
            found = _of_binary(node, exported)
        case _:
            raise WrongQuery(f"not understood: {node.prettify()}")
    return found


def _of_selector(node: VectorSelector, exported: Exported) -> Labels:
    values = exported.series.get(node.name or "")
    if values is None:
        raise WrongQuery(f"nobody exports {node.name}")
    for matcher in node.matchers.matchers:
        _check_matcher(node, matcher, values)
    return frozenset(values)


def _check_matcher(node: VectorSelector, matcher: Matcher, values: Mapping[str, set[str]]) -> None:
    if matcher.name not in values:
        raise WrongQuery(f"{node.name} has no label {matcher.name}")
    if matcher.op == MatchOp.Equal:
        wanted = {matcher.value}
    elif matcher.op == MatchOp.Re and re.fullmatch(r"\w+(\|\w+)*", matcher.value):
        wanted = set(matcher.value.split("|"))
    else:
        return
    if unknown := wanted - values[matcher.name]:
        raise WrongQuery(f"{node.name}: {matcher.name} is never {', '.join(sorted(unknown))}")


def _of_aggregate(node: AggregateExpr, exported: Exported) -> Labels:
    inner = _labels(node.expr, exported) or _NONE
    if node.modifier is None:
        return _NONE
    named = frozenset(node.modifier.labels)
    if missing := named - inner:
        raise WrongQuery(f"no {', '.join(sorted(missing))} in {node.expr.prettify()}")
    return named if node.modifier.type == AggModifierType.By else inner - named


def _of_call(node: Call, exported: Exported) -> Labels:
    vectors = [argument for argument in node.args if not isinstance(argument, StringLiteral)]
    labels = [found for vector in vectors if (found := _labels(vector, exported)) is not None]
    if node.func.name in WITHOUT_LABELS:
        return _NONE
    if node.func.name == "label_replace":
        return labels[0] | {node.args[1].val}
    if node.func.name == "histogram_quantile":
        if "le" not in labels[0]:
            raise WrongQuery(f"no le in {node.prettify()}")
        return labels[0] - {"le"}
    return labels[0]


def _of_binary(node: BinaryExpr, exported: Exported) -> Labels | None:
    left, right = _labels(node.lhs, exported), _labels(node.rhs, exported)
    if left is None or right is None:
        return right if left is None else left
    on = node.modifier.matching if node.modifier else None
    if on is None:
        if left != right:
            raise WrongQuery(f"{sorted(left)} and {sorted(right)} never match: {node.prettify()}")
    elif on.type == LabelModifierType.Include and (missing := frozenset(on.labels) - (left & right)):
        raise WrongQuery(f"no {', '.join(sorted(missing))} on both sides: {node.prettify()}")
    return left
