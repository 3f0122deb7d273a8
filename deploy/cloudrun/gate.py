#!/usr/bin/env python3
"""Do requests fail on a revision? Asks Cloud Monitoring for a while; exit code 1 as soon as too many do.

    TOKEN=$(gcloud auth print-access-token) python3 gate.py --project P --service S --revision R --seconds 300

Counts what has reached the revision since this began. Cloud Monitoring shows requests minutes late, so a window much
shorter than five minutes judges little; and with few requests there is nothing to judge: that is said, and is no
failure.
"""

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

PAUSE_SECONDS = 15.0
PATIENCE_SECONDS = 10.0
SHORTEST_SECONDS = 60
"""Cloud Monitoring keeps a point a minute."""
FEW_FAILURES = 3
"""So many are too many, however few requests there were."""


class Unanswered(Exception):
    """Cloud Monitoring did not say."""


def count(options: argparse.Namespace, since: datetime, token: str) -> tuple[int, int]:
    """Requests, and those of them answered with 5xx."""
    now = datetime.now(UTC)
    query = {
        "filter": 'metric.type = "run.googleapis.com/request_count" AND resource.type = "cloud_run_revision"'
        f' AND resource.labels.service_name = "{options.service}"'
        f' AND resource.labels.revision_name = "{options.revision}"',
        "interval.startTime": since.isoformat(),
        "interval.endTime": now.isoformat(),
        "aggregation.alignmentPeriod": f"{max(SHORTEST_SECONDS, int((now - since).total_seconds()))}s",
        "aggregation.perSeriesAligner": "ALIGN_DELTA",
        "aggregation.crossSeriesReducer": "REDUCE_SUM",
        "aggregation.groupByFields": "metric.labels.response_code_class",
    }
    url = f"{options.monitoring}/v3/projects/{options.project}/timeSeries?{urlencode(query)}"
    try:
        request = Request(url, headers={"Authorization": f"Bearer {token}"})  # noqa: S310 - Google's address
        with urlopen(request, timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
            document: dict[str, Any] = json.load(answer)
    except HTTPError as error:
        raise Unanswered(f"Cloud Monitoring answered {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise Unanswered(f"Cloud Monitoring did not answer: {error}") from error
    requests = failures = 0
    for series in document.get("timeSeries", []):
        number = sum(int(point["value"]["int64Value"]) for point in series["points"])
        requests += number
        if series["metric"]["labels"]["response_code_class"] == "5xx":
            failures += number
    return requests, failures


def is_bad(requests: int, failures: int, options: argparse.Namespace) -> bool:
    """Are these too many failures?"""
    if requests < options.min_requests:
        return failures >= FEW_FAILURES
    return failures > float(options.max_share) * requests


def watch(options: argparse.Namespace, token: str) -> bool:
    """Did the revision pass?"""
    began, until = datetime.now(UTC), time.monotonic() + options.seconds
    while True:
        time.sleep(min(PAUSE_SECONDS, max(0.0, until - time.monotonic())))
        is_over = time.monotonic() >= until
        try:
            requests, failures = count(options, began, token)
        except Unanswered as error:
            if is_over:
                say(f"no judgement: {error}")
                return False
            continue
        said = f"{failures} of {requests} requests failed on {options.revision}"
        if is_bad(requests, failures, options):
            say(f"too many: {said}")
            return False
        if is_over:
            too_few = requests < options.min_requests
            say(f"{said}: too few to judge, fewer than {options.min_requests}" if too_few else f"good: {said}")
            return True


def say(line: str) -> None:
    print(f"gate: {line}", file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description="Do requests fail on a revision?")
    parser.add_argument("--project", required=True)
    parser.add_argument("--service", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long to look (default: %(default)g)")
    parser.add_argument("--max-share", type=float, default=0.01, help="of failures that pass (default: %(default)g)")
    parser.add_argument("--min-requests", type=int, default=20, help="that can be judged (default: %(default)d)")
    parser.add_argument("--monitoring", default="https://monitoring.googleapis.com", help=argparse.SUPPRESS)
    options = parser.parse_args()
    token = os.environ.get("TOKEN", "")
    if not token:
        parser.error("TOKEN is not set: gcloud auth print-access-token prints one")
    sys.exit(0 if watch(options, token) else 1)


if __name__ == "__main__":
    main()
