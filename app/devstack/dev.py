"""`agent-service dev`: the whole stack until Ctrl-C, its data kept in `.dev/`, restarted when a source file changes."""

import os
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from watchfiles import watch

from app.devstack.access import is_accepted, make_key
from app.devstack.lock import exclusive
from app.devstack.output import shown
from app.devstack.ports import is_free
from app.devstack.processes import ProcessFailed, Reaper
from app.devstack.stack import ROOT, Stack
from app.domain.errors import ConfigurationError

DATA = ROOT / ".dev"
TENANT = "dev"
_QUESTION = "My mug arrived broken, order A-1006. Can I have a refund?"
_LOOK_MS = 250
"""How often the processes are looked at while nothing changes."""


def dev() -> None:
    """Run until Ctrl-C, SIGTERM or a hang-up.

    Raises `ProcessFailed` where a part does not start or ends by itself; then everything has been stopped.
    """
    stop_on_signals()
    DATA.mkdir(exist_ok=True)
    env = environment()
    api_port = _port(env)
    with exclusive(DATA) as lock, Reaper(keep_open=lock) as reaper:
        if not is_free(api_port):
            raise ProcessFailed(f"port {api_port} is in use: choose another one, for example `API_PORT=8001 make dev`")
        stack = Stack(DATA, reaper=reaper, env=env, api_port=api_port)
        try:
            with shown([stack.api, stack.worker, *([stack.model] if stack.model else [])]):
                stack.start()
                print(_welcome(stack), flush=True)
                _keep_running(stack)
        except KeyboardInterrupt:
            print("\nStopping; once more, and it ends at once.", flush=True)
        finally:
            stack.stop()


def _port(env: Mapping[str, str]) -> int:
    value = env.get("API_PORT") or "8000"
    if not value.isdecimal() or not 0 < int(value) < 65536:
        raise ConfigurationError("API_PORT is malformed: it must be a number from 1 to 65535")
    return int(value)


def stop_on_signals() -> None:
    """Let SIGTERM and a closed terminal end this process in the order in which Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)


def environment() -> dict[str, str]:
    """Our environment, and below it what `.env` says. Draining is short: nobody here waits for a deployment."""
    from_file = {name: value for name, value in dotenv_values(ROOT / ".env").items() if value}
    return {"DRAIN_SECONDS": "2", **from_file, **os.environ}


def _keep_running(stack: Stack) -> None:
    """Watch the sources and the processes. Ends only by an exception."""
    sources = [ROOT / "app", ROOT / "worker"]
    for changes in watch(*sources, rust_timeout=_LOOK_MS, yield_on_timeout=True):
        if changes:
            _reload(stack, sorted({Path(path).relative_to(ROOT) for _, path in changes}))
        else:
            stack.check()


def _reload(stack: Stack, changed: list[Path]) -> None:
    """Restart the API and the worker; what does not start, because it is being edited, waits for the next change."""
    print(f"\n{', '.join(map(str, changed))} changed: restarting.", flush=True)
    stack.stop_service()
    try:
        stack.start_service()
    except ProcessFailed as error:
        stack.stop_service()
        print(f"{error}\n\nWaiting for the next change.", flush=True)
    else:
        print("Ready.", flush=True)


def _welcome(stack: Stack) -> str:
    key_file = DATA / "key"
    if not key_file.exists() or not is_accepted(stack.database_url, key_file.read_text().strip()):
        _write_private(key_file, make_key(stack.database_url, tenant=TENANT, name="development") + "\n")
    env_file = DATA / "env"
    variables = {
        "DATABASE_URL": stack.database_url,
        "REDIS_URL": stack.redis_url,
        "AGENT_SERVICE_URL": stack.api.address,
        "AUDIT_ANCHOR": str(stack.audit_anchor),
        "AGENT_SERVICE_KEY": key_file.read_text().strip(),
    }
    _write_private(env_file, "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()))
    key, env = key_file.relative_to(ROOT), env_file.relative_to(ROOT)
    return f"""
  The API is at {stack.api.address}, its description at {stack.api.address}/openapi.json.
  The model is {"the stand-in; with OPENAI_API_KEY it is a real one" if stack.model else "a real one: it costs money"}.

  Submit a run, then ask for it by its id:

    curl -s {stack.api.address}/v1/runs -H "Authorization: Bearer $(cat {key})" \\
      -H "Content-Type: application/json" -d '{{"agent": "support", "input": "{_QUESTION}"}}'
    curl -s "{stack.api.address}/v1/runs/$RUN?wait=30" -H "Authorization: Bearer $(cat {key})"

  This refund is large enough to wait for a person: `agent-service reviews list`, then `reviews show` and `decide`.
  For that and other commands, such as `agent-service keys list`:  set -a; . {env}; set +a
  Ctrl-C stops everything.
"""


def _write_private(file: Path, text: str) -> None:
    file.touch()
    file.chmod(0o600)
    file.write_text(text)
