"""What it costs to let a request in: key check and rate limit, alone and as part of a request."""

import asyncio
import subprocess
import sys
import time
from typing import Any, get_args
from uuid import uuid4

import aiohttp
import psutil
import uvloop

from app.db import keys
from app.db.engine import make_engine
from app.devstack.access import make_key
from app.devstack.processes import Process, Reaper
from app.devstack.stack import Api, Stack
from app.domain.principal import Principal, Scope
from app.rate_limit import RateLimiter
from tests.bench.client import quantile

TIMES = 3_000
WARM = 300
TURN, TURNS, WARM_TURNS = 50, 40, 4
GOAL_MS = 1.0

Row = tuple[str, str, str]


async def measure_admission(stack: Stack, reaper: Reaper) -> list[Row]:
    """Rows: what, figure, goal."""
    key = await asyncio.to_thread(make_key, stack.database_url, tenant="bench", name="admission")
    command = [sys.executable, "-m", "tests.bench.admission", "alone", stack.database_url, stack.redis_url, key]
    alone = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
    *parts, used = alone.stdout.splitlines()
    rows: list[Row] = []
    for what, p50, p95 in (part.split(";") for part in parts):
        rows.append((f"{what} p50 / p95, ms", f"{p50} / {p95}", f"≤ {GOAL_MS:g}" if "and" in what else ""))
    rows.append(("… CPU of both, ms", used, ""))
    unguarded = Unguarded("unguarded", log=stack.directory / "unguarded.log", reaper=reaper)
    unguarded.env = stack.env | unguarded.own_env
    unguarded.start()
    try:
        return rows + await _in_requests({"with both": stack.api, "without": unguarded}, key)
    finally:
        unguarded.stop()


class Unguarded(Api):
    """The same API, but for the door: whoever calls is let in."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.bench.admission", "unguarded"]


async def _in_requests(apis: dict[str, Api], key: str) -> list[Row]:
    """The same request to both APIs, in turns. It is answered 404, after one look into the database."""
    took: dict[str, list[float]] = {name: [] for name in apis}
    cpu = dict.fromkeys(apis, 0.0)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        for turn in range(-WARM_TURNS, TURNS):
            for name, api in apis.items():
                if turn == 0:
                    took[name].clear()
                    cpu[name] = 0.0
                before = cpu_of(api)
                for _ in range(TURN):
                    began = time.perf_counter()
                    async with session.get(f"{api.address}/v1/runs/{uuid4()}") as answer:
                        await answer.read()
                    took[name].append((time.perf_counter() - began) * 1000)
                    if answer.status != 404:
                        raise RuntimeError(f"{name}: {answer.status}")
                cpu[name] += cpu_of(api) - before
    return [
        (
            f"GET that is 404, {name}: p50 / CPU of the API, ms",
            f"{quantile(times, 0.5):.2f} / {cpu[name] * 1000 / len(times):.2f}",
            "",
        )
        for name, times in took.items()
    ]


def cpu_of(process: Process) -> float:
    """Seconds so far."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


async def _alone(database_url: str, redis_url: str, key: str) -> None:
    """What the API does before it looks at a request, in a process that does nothing else."""
    engine = make_engine(database_url, pool_size=10, application_name="bench")
    limiter = RateLimiter(redis_url)
    took: list[tuple[float, float, float]] = []
    for number in range(WARM + TIMES):
        if number == WARM:
            used = time.process_time()
        began = time.perf_counter()
        async with engine.connect() as connection:
            caller = await keys.authenticate(connection, key)
        assert caller is not None
        checked = time.perf_counter()
        assert await limiter.admit(caller)
        ended = time.perf_counter()
        took.append((checked - began, ended - checked, ended - began))
    used = time.process_time() - used
    parts = ("key check", "rate limit", "key check and rate limit")
    for what, seconds in zip(parts, zip(*took[WARM:], strict=True), strict=True):
        print(f"{what};{quantile(seconds, 0.5) * 1000:.2f};{quantile(seconds, 0.95) * 1000:.2f}")
    print(f"{used * 1000 / TIMES:.2f}")
    await limiter.aclose()
    await engine.dispose()


def _serve_unguarded() -> None:
    import uvicorn

    from app.api.deps import RunReader
    from app.api.protocol import ProblemProtocol
    from app.config import load_settings
    from app.logging import configure_logging
    from app.main import create_app

    settings = load_settings()
    configure_logging(settings.log_level)
    app = create_app(settings)
    _, security = get_args(RunReader)
    app.dependency_overrides[security.dependency] = lambda: Principal("k", "bench", frozenset({Scope.RUNS_READ}), "k")
    options: dict[str, Any] = {"loop": "uvloop", "http": ProblemProtocol, "log_config": None, "access_log": False}
    uvicorn.run(app, host=settings.api_host, port=settings.api_port, **options)


if __name__ == "__main__":
    if sys.argv[1] == "unguarded":
        _serve_unguarded()
    else:
        uvloop.run(_alone(*sys.argv[2:]))
