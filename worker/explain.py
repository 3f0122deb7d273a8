"""What pydantic found wrong, in one sentence for the model."""

from pydantic import ValidationError


def explain(error: ValidationError, *, whole: str) -> str:
    """Each place and what is wrong there; `whole` names what was validated, for what is wrong with all of it."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or whole}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    )
