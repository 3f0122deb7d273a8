"""The stand-in's programs, gcloud and cosign: the first argument says which. Each call is a process of its own."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE = "STAND_IN_STATE"
SITE_PACKAGES = "STAND_IN_SITE_PACKAGES"
TOKEN = "a-token-of-google"
SHARES = {"services": "traffic", "worker-pools": "instanceSplits"}
"""By kind, what says who has how much."""


def gcloud(state: Path, arguments: list[str]) -> None:
    words = [word for word in arguments if not word.startswith("-")]
    kind = next((kind for kind in SHARES if kind in words), None)
    if words[-2:] == ["auth", "print-access-token"]:
        print(TOKEN)
    elif "parametermanager" in words and words[-1] == "list":
        file = state / "versions"
        print(file.read_text() if file.exists() else "")
    elif words[-1] == "list" and kind:
        file = state / f"{kind}.json"
        print(f"[{file.read_text()}]" if file.exists() else "[]")
    elif "replace" in words:
        text = Path(words[-1]).read_text()
        number = len(list(state.glob("manifest-*.yaml")))
        (state / f"manifest-{number:02}.yaml").write_text(text)
        if kind:
            resource = _yaml(text)
            if resource["metadata"]["name"] == "agent-service-crema":
                return
            url = (state / "url").read_text()
            shares = [{**each, "url": url} if "tag" in each else each for each in resource["spec"][SHARES[kind]]]
            resource["status"] = {SHARES[kind]: shares} | ({"url": url} if kind == "services" else {})
            (state / f"{kind}.json").write_text(json.dumps(resource))
    elif words[-2] in {"update-traffic", "update-instance-split"} and kind:
        (to,) = [word for word in arguments if word.startswith("--to-revisions=")]
        percents = dict(each.split("=") for each in to.removeprefix("--to-revisions=").split(","))
        file = state / f"{kind}.json"
        resource = json.loads(file.read_text())
        share(resource, kind, {name: int(percent) for name, percent in percents.items()})
        file.write_text(json.dumps(resource))


def _yaml(text: str) -> dict[str, Any]:
    sys.path.append(os.environ[SITE_PACKAGES])
    import yaml

    found: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


def share(resource: dict[str, Any], kind: str, shares: Mapping[str, int]) -> None:
    assert sum(shares.values()) == 100, shares
    status = resource["status"]
    tagged = [each for each in status[SHARES[kind]] if "tag" in each]
    status[SHARES[kind]] = [{"revisionName": name, "percent": percent} for name, percent in shares.items()] + [
        {name: value for name, value in each.items() if name != "percent"} for each in tagged
    ]


def main() -> None:
    state = Path(os.environ[STATE])
    program, *arguments = sys.argv[1:]
    with (state / "calls").open("a") as calls:
        print(json.dumps([program, *arguments]), file=calls)
    text = " ".join([program, *arguments])
    if (state / "waits").exists() and (state / "waits").read_text() in text:
        (state / "waiting").touch()
        time.sleep(1)
    if (state / "fails").exists() and (state / "fails").read_text() in text:
        sys.exit(f"{program}: the stand-in was told to fail")
    if program == "gcloud":
        gcloud(state, arguments)


if __name__ == "__main__":
    main()
