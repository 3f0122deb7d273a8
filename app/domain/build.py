"""What is running: which image, built from which commit, where."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Empty where it is not known: outside of an image there is no digest. `image_digest`: `sha256:…`."""

    image_digest: str = ""
    git_revision: str = ""
    environment: str = "development"
