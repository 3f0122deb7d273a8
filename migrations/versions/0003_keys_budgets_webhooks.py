"""What a key may do at most, what a tenant may spend in a day, and whom a tenant wants to be told of its runs.

The release before goes on working on this: its keys get the defaults, and what its workers spend is counted.

Revision ID: 0003
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SERVICE = "agent_service"
TOOLS = "agent_service_tools"
"""What `ctx.db` of a tool works as. It may read what a migration of yours grants it, and nothing of the service."""


def upgrade() -> None:
    _limit_keys()
    _make_budgets()
    _make_webhooks()
    _make_role_of_tools()


def _limit_keys() -> None:
    op.execute("""
        ALTER TABLE api_keys
            ADD COLUMN holder         text,
            ADD COLUMN replaced_by    text,
            ADD COLUMN requests_per_s double precision NOT NULL DEFAULT 100 CHECK (requests_per_s > 0),
            ADD COLUMN burst          integer NOT NULL DEFAULT 200 CHECK (burst > 0),
            ADD COLUMN max_in_flight  integer NOT NULL DEFAULT 1000 CHECK (max_in_flight > 0),
            ADD COLUMN last_used_at   timestamptz
    """)
    op.execute("CREATE INDEX keys_by_holder ON api_keys (holder)")
    op.execute("CREATE INDEX runs_in_flight ON runs (api_key_id) WHERE status IN ('queued', 'running')")


def _make_budgets() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN reserved_usd numeric(14, 8) NOT NULL DEFAULT 0")
    op.execute("""
        CREATE TABLE budgets (
            tenant       text PRIMARY KEY,
            daily_usd    numeric(14, 8) NOT NULL CHECK (daily_usd >= 0),
            day          date NOT NULL,
            spent_usd    numeric(14, 8) NOT NULL DEFAULT 0,
            reserved_usd numeric(14, 8) NOT NULL DEFAULT 0 CHECK (reserved_usd >= 0)
        ) WITH (fillfactor = 50)
    """)
    # Whatever lets go of a run, or records what it used, settles with its tenant's budget in the same transaction:
    # no path can forget it, so a worker that dies leaves no reservation behind once its run is rescued.
    #
    # A reply without a price costs the most that it may. So does a call that a cancel or a deadline breaks off: the
    # provider goes on with it, and whoever may submit could otherwise spend without end and without a trace.
    # A transaction that began before midnight may come to a budget that another one has renewed already.
    op.execute("""
        CREATE FUNCTION settle_budget() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            today date := (now() AT TIME ZONE 'UTC')::date;
            used  numeric := CASE
                WHEN new.model_calls <> old.model_calls THEN coalesce(new.cost_usd - old.cost_usd, old.reserved_usd)
                WHEN new.stop_reason IN ('cancelled', 'deadline') THEN old.reserved_usd
                ELSE 0
            END;
        BEGIN
            UPDATE budgets
            SET reserved_usd = greatest(reserved_usd - old.reserved_usd, 0),
                spent_usd = CASE WHEN day >= today THEN spent_usd ELSE 0 END + used,
                day = greatest(day, today)
            WHERE tenant = new.tenant;
            new.reserved_usd := 0;
            RETURN new;
        END
        $$
    """)
    op.execute("""
        CREATE TRIGGER settled BEFORE UPDATE ON runs FOR EACH ROW
        WHEN (new.cost_usd IS DISTINCT FROM old.cost_usd
              OR old.reserved_usd <> 0 AND (new.model_calls <> old.model_calls
                                            OR new.lease_token IS DISTINCT FROM old.lease_token))
        EXECUTE FUNCTION settle_budget()
    """)
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON budgets TO {SERVICE}")


def _make_webhooks() -> None:
    op.execute("""
        CREATE TABLE webhooks (
            id            uuid PRIMARY KEY,
            tenant        text NOT NULL,
            url           text NOT NULL,
            events        text[] NOT NULL,
            created_at    timestamptz NOT NULL DEFAULT now(),
            created_by    text NOT NULL,
            failing_since timestamptz,
            disabled_at   timestamptz,
            disabled_why  text
        )
    """)
    op.execute("CREATE INDEX webhooks_by_tenant ON webhooks (tenant, id)")
    op.execute("""
        CREATE TABLE webhook_deliveries (
            id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
            number          bigint GENERATED ALWAYS AS IDENTITY,
            tenant          text NOT NULL,
            webhook_id      uuid NOT NULL,
            run_id          uuid NOT NULL,
            event           text NOT NULL,
            body            text NOT NULL,
            status          text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'delivered', 'failed')),
            attempts        integer NOT NULL DEFAULT 0,
            next_attempt_at timestamptz NOT NULL DEFAULT now(),
            last_status     integer,
            last_error      text,
            created_at      timestamptz NOT NULL DEFAULT now(),
            ended_at        timestamptz
        ) WITH (fillfactor = 70)
    """)
    op.execute("""
        CREATE INDEX deliveries_due ON webhook_deliveries (webhook_id, next_attempt_at) WHERE status = 'pending'
    """)
    op.execute("CREATE INDEX deliveries_by_webhook ON webhook_deliveries (webhook_id, number)")
    op.execute("CREATE INDEX deliveries_by_run ON webhook_deliveries (run_id, number)")
    op.execute("CREATE INDEX deliveries_ended ON webhook_deliveries (ended_at) WHERE status <> 'pending'")
    # The outbox is filled in the transaction of the transition, whichever statement makes it.
    op.execute("""
        CREATE FUNCTION notify_webhooks() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO webhook_deliveries (tenant, webhook_id, run_id, event, body)
            SELECT new.tenant, webhooks.id, new.id, 'run.' || new.status, json_build_object(
                'type', 'run.' || new.status,
                'timestamp', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                'data', json_build_object('run_id', new.id, 'agent', new.agent, 'status', new.status,
                                          'stop_reason', new.stop_reason))::text
            FROM webhooks
            WHERE tenant = new.tenant AND disabled_at IS NULL AND 'run.' || new.status = ANY(events);
            RETURN NULL;
        END
        $$
    """)
    op.execute("""
        CREATE TRIGGER notified AFTER UPDATE OF status ON runs FOR EACH ROW
        WHEN (new.status <> old.status AND new.status IN ('waiting', 'succeeded', 'failed', 'cancelled'))
        EXECUTE FUNCTION notify_webhooks()
    """)
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON webhooks, webhook_deliveries TO {SERVICE}")


def _make_role_of_tools() -> None:
    # Like the service's role, it is the cluster's, and stays when this is taken back.
    op.execute(f"""
        DO $$
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{TOOLS}') THEN
                CREATE ROLE {TOOLS} NOLOGIN NOINHERIT;
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN  -- another database's migration was a moment faster
        END
        $$
    """)
    # Where it was there before, another owner may have made it, who alone can grant it.
    op.execute(f"""
        DO $$
        BEGIN
            IF NOT pg_has_role('{SERVICE}', '{TOOLS}', 'MEMBER') THEN
                GRANT {TOOLS} TO {SERVICE};
            END IF;
        EXCEPTION WHEN unique_violation OR SQLSTATE 'XX000' THEN  -- "tuple concurrently updated": by the same grant
        END
        $$
    """)
    # The owner is the service's own user where there is only one.
    op.execute(f"""
        DO $$
        BEGIN
            GRANT {TOOLS} TO CURRENT_USER;
        EXCEPTION WHEN insufficient_privilege OR unique_violation OR SQLSTATE 'XX000' THEN
        END
        $$
    """)


def downgrade() -> None:
    op.execute("DROP TRIGGER notified ON runs")
    op.execute("DROP TRIGGER settled ON runs")
    op.execute("DROP FUNCTION notify_webhooks")
    op.execute("DROP FUNCTION settle_budget")
    for table in ("webhook_deliveries", "webhooks", "budgets"):
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP INDEX runs_in_flight")
    op.execute("ALTER TABLE runs DROP COLUMN reserved_usd")
    op.execute("""
        ALTER TABLE api_keys
            DROP COLUMN holder,
            DROP COLUMN replaced_by,
            DROP COLUMN requests_per_s,
            DROP COLUMN burst,
            DROP COLUMN max_in_flight,
            DROP COLUMN last_used_at
    """)
