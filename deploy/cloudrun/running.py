#!/usr/bin/env python3
"""What runs now, from what `gcloud run … list --format=json` prints, given on standard input.

    running.py NAME revision     which has all of the traffic, or all instances; empty where NAME is not there yet
    running.py NAME instances    how many instances a worker pool has; 1 where there is no pool yet
    running.py NAME url          where a service answers
    running.py NAME candidate    where its candidate answers

Exit code 1 where that cannot be said: with a split, there is no one revision to go back to.
"""

import json
import sys
from typing import Any

INSTANCES = "run.googleapis.com/manualInstanceCount"


class Unclear(Exception):
    """Why it cannot be said."""


def revision(resource: dict[str, Any]) -> str:
    status = resource.get("status", {})
    shares = status.get("traffic", status.get("instanceSplits", []))
    serving = {share.get("revisionName") for share in shares if share.get("percent")}
    if len(serving) != 1 or None in serving:
        raise Unclear(
            f"{resource['metadata']['name']} is split between revisions: {sorted(map(str, serving))}."
            " End that promotion first, or go back: the README says how"
        )
    return str(serving.pop())


def instances(resource: dict[str, Any]) -> str:
    return str(resource["metadata"].get("annotations", {}).get(INSTANCES, "1"))


def url(resource: dict[str, Any]) -> str:
    return _present(resource.get("status", {}).get("url"), "address")


def candidate(resource: dict[str, Any]) -> str:
    shares = resource.get("status", {}).get("traffic", [])
    return _present(next((share.get("url") for share in shares if share.get("tag") == "candidate"), None), "candidate")


def _listed() -> list[dict[str, Any]]:
    try:
        listed: list[dict[str, Any]] = json.load(sys.stdin)
    except ValueError:
        raise Unclear("gcloud does not say what runs") from None
    return listed


def _present(value: str | None, what: str) -> str:
    if not value:
        raise Unclear(f"there is no {what}")
    return value


ANSWERS = {"revision": revision, "instances": instances, "url": url, "candidate": candidate}
WITHOUT_RESOURCE = {"revision": "", "instances": "1"}


def answer(name: str, question: str) -> str:
    resource = next((one for one in _listed() if one["metadata"]["name"] == name), None)
    if resource is not None:
        return ANSWERS[question](resource)
    if question not in WITHOUT_RESOURCE:
        raise Unclear("it is not deployed")
    return WITHOUT_RESOURCE[question]


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[2] not in ANSWERS:
        sys.exit(f"usage: running.py NAME {'|'.join(ANSWERS)}")
    try:
        print(answer(*sys.argv[1:]))  # noqa: T201
    except Unclear as error:
        sys.exit(f"{sys.argv[1]}: {error}.")


if __name__ == "__main__":
    main()
