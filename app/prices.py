"""What a model call costs. The prices are data: `prices.toml`, beside this file."""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from app.domain.step import Usage

PRICES_FILE = Path(__file__).with_name("prices.toml")
_MILLION = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    input: Decimal
    cached_input: Decimal
    output: Decimal

    def of(self, usage: Usage) -> Decimal:
        """US dollars for one call."""
        fresh = usage.input_tokens - usage.cached_tokens
        return (
            fresh * self.input + usage.cached_tokens * self.cached_input + usage.output_tokens * self.output
        ) / _MILLION

    def at_most(self, *, input_tokens: int, output_tokens: int) -> Decimal:
        """US dollars for a call of at most this size, nothing cached."""
        return self.of(Usage(input_tokens=input_tokens, output_tokens=output_tokens))


class PriceTable:
    """Prices by model name. `digest` (SHA-256, hex) tells two tables apart."""

    def __init__(self, text: str) -> None:
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._prices = {
            name: Price(**{key: Decimal(value) for key, value in entry.items()})
            for name, entry in tomllib.loads(text)["models"].items()
        }

    def __getitem__(self, model: str) -> Price | None:
        """The model's price, or None. A date at the end of the name does not matter."""
        return self._prices.get(model) or self._prices.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))


def load_prices(path: Path = PRICES_FILE) -> PriceTable:
    return PriceTable(path.read_text())
