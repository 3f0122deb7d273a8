"""The first schema: keys, runs, steps, reviews, audit.

Revision ID: 0001
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE api_keys (
            id         text PRIMARY KEY,
            tenant     text NOT NULL,
            name       text NOT NULL,
            key_hash   bytea NOT NULL,
            scopes     text[] NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz,
            revoked_at timestamptz
        )
    """)
    op.execute("""
        CREATE TABLE runs (
            id              uuid PRIMARY KEY,
            tenant          text NOT NULL,
            api_key_id      text NOT NULL,
            request_id      text NOT NULL,
            agent           text NOT NULL,
            agent_version   text NOT NULL,
            image_digest    text NOT NULL DEFAULT '',
            input           jsonb NOT NULL,
            metadata        jsonb NOT NULL,
            limits          jsonb NOT NULL,
            priority        smallint NOT NULL,
            idempotency_key text,
            request_hash    bytea NOT NULL,
            status          text NOT NULL
                            CHECK (status IN ('queued', 'running', 'waiting', 'succeeded', 'failed', 'cancelled')),
            stop_reason     text,
            output          jsonb,
            error           text,
            model_calls     integer NOT NULL DEFAULT 0,
            input_tokens    bigint NOT NULL DEFAULT 0,
            cached_tokens   bigint NOT NULL DEFAULT 0,
            output_tokens   bigint NOT NULL DEFAULT 0,
            cost_usd        numeric(14, 8) DEFAULT 0,
            attempt         integer NOT NULL DEFAULT 0,
            lost_leases     integer NOT NULL DEFAULT 0,
            lease_token     uuid,
            lease_until     timestamptz,
            worker          text,
            needs_enqueue   boolean NOT NULL DEFAULT false,
            active_ms       bigint NOT NULL DEFAULT 0,
            running_since   timestamptz,
            created_at      timestamptz NOT NULL DEFAULT now(),
            queued_at       timestamptz NOT NULL DEFAULT now(),
            started_at      timestamptz,
            ended_at        timestamptz,
            CONSTRAINT a_lease_exactly_while_running
                CHECK ((status = 'running') = (lease_token IS NOT NULL)
                   AND (status = 'running') = (lease_until IS NOT NULL)),
            CONSTRAINT an_end_exactly_when_terminal
                CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (ended_at IS NOT NULL)
                   AND (ended_at IS NOT NULL) = (stop_reason IS NOT NULL))
        ) WITH (fillfactor = 80)
    """)
    op.execute("CREATE INDEX runs_by_tenant ON runs (tenant, id)")
    op.execute("CREATE INDEX runs_by_status ON runs (tenant, status, id)")
    op.execute("CREATE INDEX runs_by_agent ON runs (tenant, agent, id)")
    op.execute("""
        CREATE UNIQUE INDEX runs_idempotency ON runs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL
    """)
    op.execute("CREATE INDEX runs_queued ON runs (id) WHERE status = 'queued'")
    op.execute("CREATE INDEX runs_running ON runs (id) WHERE status = 'running'")
    op.execute("CREATE INDEX runs_to_enqueue ON runs (id) WHERE needs_enqueue")
    op.execute("""
        CREATE TABLE steps (
            run_id      uuid NOT NULL,
            seq         integer NOT NULL,
            kind        text NOT NULL,
            attempt     integer NOT NULL,
            state       text,
            body        jsonb NOT NULL,
            recorded_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (run_id, seq)
        )
    """)
    op.execute("""
        CREATE TABLE reviews (
            id          uuid PRIMARY KEY,
            tenant      text NOT NULL,
            run_id      uuid NOT NULL,
            agent       text NOT NULL,
            kind        text NOT NULL,
            seq         integer NOT NULL,
            tool        text NOT NULL,
            arguments   jsonb NOT NULL,
            args_hash   text NOT NULL,
            status      text NOT NULL CHECK (status IN ('pending', 'decided', 'expired', 'void')),
            decision    text,
            reason      text,
            response    text,
            decided_by  text,
            created_at  timestamptz NOT NULL DEFAULT now(),
            decided_at  timestamptz,
            expires_at  timestamptz NOT NULL
        )
    """)
    op.execute("CREATE INDEX reviews_by_tenant ON reviews (tenant, id)")
    op.execute("CREATE INDEX reviews_by_run ON reviews (run_id)")
    op.execute("CREATE INDEX reviews_pending ON reviews (expires_at) WHERE status = 'pending'")
    op.execute("CREATE TABLE audit_heads (run_id uuid PRIMARY KEY, seq integer NOT NULL) WITH (fillfactor = 70)")
    op.execute("""
        CREATE TABLE audit_events (
            run_id uuid NOT NULL,
            seq    integer NOT NULL,
            tenant text NOT NULL,
            at     timestamptz NOT NULL DEFAULT now(),
            actor  text NOT NULL,
            kind   text NOT NULL,
            data   jsonb NOT NULL,
            PRIMARY KEY (run_id, seq)
        )
    """)
    # The only way in. The head row is locked until the transaction ends, so a run's events have no gaps and one order.
    op.execute("""
        CREATE FUNCTION append_audit(p_run_id uuid, p_tenant text, p_actor text, p_events jsonb) RETURNS integer
        LANGUAGE plpgsql AS $$
        DECLARE
            first_seq integer;
            how_many  integer := jsonb_array_length(p_events);
        BEGIN
            INSERT INTO audit_heads AS head (run_id, seq) VALUES (p_run_id, how_many)
            ON CONFLICT (run_id) DO UPDATE SET seq = head.seq + how_many
            RETURNING head.seq - how_many INTO first_seq;
            INSERT INTO audit_events (run_id, seq, tenant, actor, kind, data)
            SELECT p_run_id, first_seq + position, p_tenant, p_actor, event ->> 'kind', event -> 'data'
            FROM jsonb_array_elements(p_events) WITH ORDINALITY AS entry (event, position);
            RETURN first_seq + how_many;
        END
        $$
    """)


def downgrade() -> None:
    op.execute("DROP FUNCTION append_audit(uuid, text, text, jsonb)")
    for table in ("audit_events", "audit_heads", "reviews", "steps", "runs", "api_keys"):
        op.execute(f"DROP TABLE {table}")
