"""A real Prometheus that scrapes a stack, and the queries that the dashboards would ask it."""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from app.devstack.ports import LOOPBACK
from app.devstack.processes import Reaper, Server
from app.devstack.stack import ROOT

OBSERVABILITY = ROOT / "deploy" / "observability"
RULES = OBSERVABILITY / "prometheus" / "rules.yml"
CONFIG = OBSERVABILITY / "prometheus" / "prometheus.yml"
BOARDS = sorted((OBSERVABILITY / "grafana").glob("*.json"))
API_JOB, WORKER_JOB = "agent-service-api", "agent-service-worker"
PROMTOOL = ROOT / ".ci" / "promtool"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of one panel. `legend`: how Grafana names its series."""

    board: str
    panel: str
    expression: str
    legend: str

    def filled(self, *, agent: str, interval: str, span: str) -> str:
        """As Grafana asks it: with the agent that was chosen, and for the time that is shown."""
        values = {"$__rate_interval": interval, "$__range": span, "$agent": agent}
        expression = self.expression
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        return expression


def panels(board: Path) -> list[dict[str, Any]]:
    """All but the headings of rows."""
    return [panel for panel in json.loads(board.read_text())["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Query]:
    for board in BOARDS:
        for panel in panels(board):
            for target in panel["targets"]:
                yield Query(board.stem, panel["title"], target["expr"], target.get("legendFormat", ""))


def rules() -> list[dict[str, Any]]:
    """The recording and the alerting ones, in their order."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def where_prometheus_is() -> Path:
    """The folder with promtool and the server.

    Raises `RuntimeError` where there are none; it says what to install.
    """
    found = subprocess.run([PROMTOOL, "--where"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr.strip())
    return Path(found.stdout.strip())


class Prometheus(Server):
    """With the configuration and the rules of this repository, but its targets are given, and it looks every second."""

    def __init__(self, directory: Path, *, targets: Mapping[str, Sequence[str]], reaper: Reaper) -> None:
        """`targets`: `host:port` of the processes of each job. `directory` is its own."""
        super().__init__("prometheus", directory=directory, log=directory / "prometheus.log", reaper=reaper)
        self._targets = targets
        self._binary = where_prometheus_is() / "prometheus"

    @property
    def command(self) -> list[str]:
        return [
            *(str(self._binary), "--config.file=prometheus.yml", f"--web.listen-address={LOOPBACK}:{self.port}"),
            *("--storage.tsdb.path=data", "--log.level=warn"),
        ]

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that it answers now, those without a number left out.

        Raises `ValueError` where it does not accept the query.
        """
        answer = self._get(f"/api/v1/query?{urlencode({'query': query})}")
        if answer["status"] != "success":
            raise ValueError(f"{query}: {answer['error']}")
        data = answer["data"]
        series = data["result"] if data["resultType"] == "vector" else [{"metric": {}, "value": data["result"]}]
        return [one for one in series if one["value"][1] != "NaN"]

    def _prepare(self) -> None:
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": list(self._targets[job["job_name"]])}]
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        (self.directory / RULES.name).write_text(RULES.read_text())

    def _is_ready(self) -> bool:
        try:
            return bool(self._get("/api/v1/status/buildinfo")["status"] == "success")
        except (OSError, HTTPException, ValueError):
            return False

    def _get(self, path: str) -> Any:
        with closing(HTTPConnection(LOOPBACK, self.port, timeout=10)) as connection:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
