#!/usr/bin/env python3
"""Fill a manifest in from environment variables: `IMAGE=…@sha256:… python3 render.py service.yaml`.

`${NAME}` becomes the variable's value. The placeholder image and its digest of zeros become `IMAGE` and its digest;
that of CREMA becomes `CREMA_DIGEST`. Exit code 2, and nothing on standard output, where anything would be left
unfilled or an image would not be named by its digest.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

DIGEST = r"sha256:[0-9a-f]{64}"
IMAGE = rf"[a-z0-9][a-z0-9._:/-]*@{DIGEST}"
NO_DIGEST = "sha256:" + 64 * "0"
PLACEHOLDER = f"registry.example.com/agent-service@{NO_DIGEST}"
CREMA = f"/crema-v1/autoscaler@{NO_DIGEST}"


class Unfilled(Exception):
    """What is missing or malformed."""


def render(manifest: str, values: Mapping[str, str]) -> str:
    """The manifest without placeholders. Raises `Unfilled`."""
    if CREMA in manifest:
        manifest = manifest.replace(NO_DIGEST, _checked(values, "CREMA_DIGEST", DIGEST))
    if PLACEHOLDER in manifest:
        image = _checked(values, "IMAGE", IMAGE)
        manifest = manifest.replace(PLACEHOLDER, image).replace(NO_DIGEST, image.rpartition("@")[2])

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        # `latest` would change what runs with the next instance that starts, and no deployment would know.
        return _checked(values, name, "[1-9][0-9]*" if name.endswith("_VERSION") and name != "CREMA_VERSION" else None)

    filled = re.sub(r"\$\{([A-Z_]+)\}", value_of, manifest)
    if "${" in filled:
        raise Unfilled("a placeholder is malformed: ${NAME}, in capital letters")
    return filled


def _checked(values: Mapping[str, str], name: str, pattern: str | None) -> str:
    value = values.get(name, "")
    if not value:
        raise Unfilled(f"{name} is not set")
    if any(mark in value for mark in "\n\r\"'") or (pattern and not re.fullmatch(pattern, value)):
        raise Unfilled(f"{name} is malformed: {value!r}")
    if value == NO_DIGEST or value.endswith(f"@{NO_DIGEST}"):
        raise Unfilled(f"{name} is still the placeholder")
    return value


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: render.py MANIFEST")
    manifest = Path(sys.argv[1])
    try:
        sys.stdout.write(render(manifest.read_text(), os.environ))
    except (OSError, Unfilled) as error:
        print(f"{manifest.name}: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
