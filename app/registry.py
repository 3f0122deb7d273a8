"""Finds the agents: every `Agent` in the modules of the packages named by the setting `AGENTS`."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping

from app.domain.agent import Agent
from app.domain.errors import ConfigurationError


class Registry(Mapping[str, Agent]):
    """The agents by name."""

    def __init__(self, agents: Iterable[Agent]) -> None:
        self._agents: dict[str, Agent] = {}
        for agent in agents:
            if agent.name in self._agents:
                raise ConfigurationError(f"AGENTS: two agents are named {agent.name!r}")
            self._agents[agent.name] = agent

    def __getitem__(self, name: str) -> Agent:
        return self._agents[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._agents)

    def __len__(self) -> int:
        return len(self._agents)


def load_agents(packages: Iterable[str]) -> Registry:
    """Import every module directly inside the packages and collect the agents they define.

    Raises `ConfigurationError` where a module cannot be imported, naming it and why.
    """
    return Registry(agent for package in packages for agent in _agents_of(package))


def models_of(agent: Agent, override: str | None) -> tuple[str, ...]:
    """The models that are asked for this agent, in order: its own and its fallbacks, or the one that `MODEL` names."""
    return (override,) if override else (agent.model, *agent.fallback_models)


def _agents_of(package: str) -> Iterator[Agent]:
    try:
        root = importlib.import_module(package)
        names = [f"{package}.{module.name}" for module in pkgutil.iter_modules(getattr(root, "__path__", []))]
        modules = [root, *(importlib.import_module(name) for name in names)]
    except Exception as error:
        raise ConfigurationError(f"AGENTS: cannot import {package}: {type(error).__name__}: {error}") from error
    seen: set[int] = set()
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Agent) and id(value) not in seen:
                seen.add(id(value))
                yield value
