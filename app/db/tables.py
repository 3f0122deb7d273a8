"""The tables, as SQLAlchemy sees them. The migrations make them; a test compares the two."""

from datetime import datetime

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()


def _time(name: str, *, nullable: bool = True, default_now: bool = False) -> Column[datetime]:
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=func.now() if default_now else None)


api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("key_hash", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    _time("created_at", nullable=False, default_now=True),
    _time("expires_at"),
    _time("revoked_at"),
    Column("holder", Text),
    Column("replaced_by", Text),
    Column("requests_per_s", Double, nullable=False, server_default=text("100")),
    Column("burst", Integer, nullable=False, server_default=text("200")),
    Column("max_in_flight", Integer, nullable=False, server_default=text("1000")),
    _time("last_used_at"),
    Index("keys_by_holder", "holder"),
)

budgets = Table(
    "budgets",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("daily_usd", Numeric(14, 8), nullable=False),
    Column("day", Date, nullable=False),
    Column("spent_usd", Numeric(14, 8), nullable=False, server_default=text("0")),
    Column("reserved_usd", Numeric(14, 8), nullable=False, server_default=text("0")),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("api_key_id", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("agent", Text, nullable=False),
    Column("agent_version", Text, nullable=False),
    Column("image_digest", Text, nullable=False, server_default=""),
    Column("input", JSONB, nullable=False),
    Column("metadata", JSONB, nullable=False),
    Column("limits", JSONB, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("idempotency_key", Text),
    Column("request_hash", LargeBinary, nullable=False),
    Column("status", Text, nullable=False),
    Column("stop_reason", Text),
    Column("output", JSONB),
    Column("error", Text),
    Column("model_calls", Integer, nullable=False, server_default=text("0")),
    Column("input_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("cached_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("output_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("cost_usd", Numeric(14, 8), server_default=text("0")),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("lost_leases", Integer, nullable=False, server_default=text("0")),
    Column("lease_token", Uuid),
    _time("lease_until"),
    Column("worker", Text),
    Column("needs_enqueue", Boolean, nullable=False, server_default=text("false")),
    Column("active_ms", BigInteger, nullable=False, server_default=text("0")),
    _time("running_since"),
    _time("created_at", nullable=False, default_now=True),
    _time("queued_at", nullable=False, default_now=True),
    _time("started_at"),
    _time("ended_at"),
    _time("erased_at"),
    Column("reserved_usd", Numeric(14, 8), nullable=False, server_default=text("0")),
    # A run's id is a UUIDv7, so the order of ids is the order of submission.
    Index("runs_by_tenant", "tenant", "id"),
    Index("runs_by_status", "tenant", "status", "id"),
    Index("runs_by_agent", "tenant", "agent", "id"),
    Index(
        "runs_idempotency",
        "tenant",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index("runs_queued", "id", postgresql_where=text("status = 'queued'")),
    Index("runs_running", "id", postgresql_where=text("status = 'running'")),
    Index("runs_to_enqueue", "id", postgresql_where=text("needs_enqueue")),
    Index("runs_in_flight", "api_key_id", postgresql_where=text("status IN ('queued', 'running')")),
)

steps = Table(
    "steps",
    metadata,
    Column("run_id", Uuid, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("state", Text),
    Column("body", JSONB, nullable=False),
    _time("recorded_at", nullable=False, default_now=True),
    PrimaryKeyConstraint("run_id", "seq"),
)

reviews = Table(
    "reviews",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("run_id", Uuid, nullable=False),
    Column("agent", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("seq", Integer),
    Column("tool", Text),
    Column("arguments", JSONB, nullable=False),
    Column("args_hash", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("decision", Text),
    Column("reason", Text),
    Column("response", Text),
    Column("decided_by", Text),
    _time("created_at", nullable=False, default_now=True),
    _time("decided_at"),
    _time("expires_at", nullable=False),
    Column("why", Text, nullable=False, server_default=""),
    Column("stop_reason", Text),
    Column("queue", Text, nullable=False, server_default="first"),
    Column("barred", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),
    Column("on_expiry", Text, nullable=False, server_default="end"),
    Column("expires_s", Double, nullable=False, server_default=text("86400")),
    Column("edited", JSONB),
    Index("reviews_by_tenant", "tenant", "id"),
    Index("reviews_by_status", "tenant", "status", "id"),
    Index("reviews_by_agent", "tenant", "agent", "id"),
    Index("reviews_by_kind", "tenant", "kind", "id"),
    Index("reviews_by_queue", "tenant", "queue", "id"),
    Index("reviews_by_run", "run_id"),
    Index("reviews_pending", "expires_at", postgresql_where=text("status = 'pending'")),
)

audit_heads = Table(
    "audit_heads",
    metadata,
    Column("run_id", Uuid, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("is_sealed", Boolean, nullable=False, server_default=text("false")),
    Index("audit_heads_unsealed", "run_id", postgresql_where=text("NOT is_sealed")),
)

audit_events = Table(
    "audit_events",
    metadata,
    Column("run_id", Uuid, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("tenant", Text, nullable=False),
    _time("at", nullable=False),
    Column("actor", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("data", JSON, nullable=False),  # not JSONB: the text is what was hashed
    Column("payload_sha256", LargeBinary),
    Column("hash", LargeBinary, nullable=False),
    PrimaryKeyConstraint("run_id", "seq"),
)

audit_payloads = Table(
    "audit_payloads",
    metadata,
    Column("run_id", Uuid, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("salt", LargeBinary, nullable=False),
    Column("payload", Text, nullable=False),
    PrimaryKeyConstraint("run_id", "seq"),
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    _time("anchored_at"),
    Index("audit_checkpoints_unanchored", "number", postgresql_where=text("anchored_at IS NULL")),
)

audit_leaves = Table(
    "audit_leaves",
    metadata,
    Column("checkpoint", BigInteger, nullable=False),
    Column("run_id", Uuid, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    PrimaryKeyConstraint("checkpoint", "run_id"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("events", ARRAY(Text), nullable=False),
    _time("created_at", nullable=False, default_now=True),
    Column("created_by", Text, nullable=False),
    _time("failing_since"),
    _time("disabled_at"),
    Column("disabled_why", Text),
    Index("webhooks_by_tenant", "tenant", "id"),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=text("gen_random_uuid()")),
    Column("number", BigInteger, Identity(always=True), nullable=False),
    Column("tenant", Text, nullable=False),
    Column("webhook_id", Uuid, nullable=False),
    Column("run_id", Uuid, nullable=False),
    Column("event", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("status", Text, nullable=False, server_default="pending"),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    _time("next_attempt_at", nullable=False, default_now=True),
    Column("last_status", Integer),
    Column("last_error", Text),
    _time("created_at", nullable=False, default_now=True),
    _time("ended_at"),
    Index("deliveries_due", "webhook_id", "next_attempt_at", postgresql_where=text("status = 'pending'")),
    Index("deliveries_by_webhook", "webhook_id", "number"),
    Index("deliveries_by_run", "run_id", "number"),
    Index("deliveries_ended", "ended_at", postgresql_where=text("status <> 'pending'")),
)
