"""The agent whose run is looked at."""

from app.domain.agent import Agent
from tests.agents import echo, open_the_door, refuse

courier = Agent(
    name="courier",
    version="7",
    instructions="Bring it there.",
    model="gpt-5",
    fallback_models=("gpt-5-nano",),
    tools=(echo, refuse, open_the_door),
)
