"""Compose: what its overlays come to is asked of Compose itself."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from typing import Any

from tests.deploy.tools import ROOT
from tests.deploy.workload import IMAGE, NO_DIGEST, Target, Workload
from tests.stack import clean_env


@cache
def compose(overlay: str) -> Target:
    name = f"compose/{overlay}"
    document = json.loads(merged(overlay))
    ours = [each for each in document["services"].values() if each["image"] == IMAGE]
    return Target(name, tuple(_service(name, document, each) for each in ours), scaler=None)


@cache
def merged(overlay: str | None) -> str:
    """What docker-compose.yml and an overlay come to, as JSON."""
    files = ["docker-compose.yml", *([f"deploy/compose/{overlay}.yml"] if overlay else [])]
    done = subprocess.run(
        [
            *(".ci/compose", "--env-file", os.devnull, *(f"--file={file}" for file in files)),
            *("config", "--format", "json"),
        ],
        cwd=ROOT,
        env=clean_env(**({"IMAGE": IMAGE, "IMAGE_DIGEST": NO_DIGEST} if overlay else {})),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _service(target: str, document: Mapping[str, Any], service: Mapping[str, Any]) -> Workload:
    secret = {
        (each.get("target") or each["source"]).rpartition("/")[2].upper(): document["secrets"][each["source"]]["file"]
        for each in service.get("secrets", [])
    }
    arguments = tuple(service.get("command") or ())
    return Workload(
        target=target,
        role=arguments[0] if arguments else "api",
        image=service["image"],
        entry_point=tuple(service.get("entrypoint") or ()),
        arguments=arguments or ("api",),
        plain={name: value or "" for name, value in (service.get("environment") or {}).items()},
        secret=secret,
        grace=seconds(service["stop_grace_period"]) if "stop_grace_period" in service else 10.0,
        ports=tuple(port["target"] for port in service.get("ports", [])),
        user=service.get("user"),
        read_only=bool(service.get("read_only")),
        has_health_command=not service.get("healthcheck", {}).get("disable", False),  # the image's own
    )


def seconds(duration: str) -> float:
    """Of a duration such as 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", duration))
