"""Durations as people write them."""

import re
from datetime import timedelta

import click


class Duration(click.ParamType[timedelta]):
    """A positive number and a unit: minutes, hours or days."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        match = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration like 30m, 12h or 90d.", param, ctx)
        return timedelta(**{{"m": "minutes", "h": "hours", "d": "days"}[match[2]]: int(match[1])})
