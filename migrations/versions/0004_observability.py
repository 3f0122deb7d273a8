"""Where a run's time goes, whose trace it belongs to, and which ends no worker has told of yet.

The release before goes on working on this: it counts no time of models and tools, and a wait that began before this is
counted from nothing.

Revision ID: 0004
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE runs
            ADD COLUMN traceparent   text,
            ADD COLUMN waiting_since timestamptz,
            ADD COLUMN lost_since    timestamptz,
            ADD COLUMN queued_ms     bigint NOT NULL DEFAULT 0,
            ADD COLUMN human_ms      bigint NOT NULL DEFAULT 0,
            ADD COLUMN model_ms      bigint NOT NULL DEFAULT 0,
            ADD COLUMN tools_ms      bigint NOT NULL DEFAULT 0,
            ADD COLUMN unreported    boolean NOT NULL DEFAULT false
    """)
    op.execute("CREATE INDEX runs_unreported ON runs (id) WHERE unreported")
    # For whoever counts them: of the runs of a year, a handful waits.
    op.execute("CREATE INDEX runs_waiting ON runs (id) WHERE status = 'waiting'")
    # The time in a state is counted when the state is left, whichever statement does that.
    op.execute("""
        CREATE FUNCTION count_time() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF old.status = 'queued' THEN
                new.queued_ms := old.queued_ms + extract(epoch FROM now() - old.queued_at) * 1000;
            ELSIF old.status = 'waiting' THEN
                new.human_ms := old.human_ms
                    + coalesce(extract(epoch FROM now() - old.waiting_since) * 1000, 0);
            END IF;
            -- These two stay over the queue, so that whoever goes on with the run knows what was before it.
            IF new.status = 'waiting' THEN
                new.waiting_since := now();
            ELSIF old.status = 'running' THEN
                new.waiting_since := NULL;
            END IF;
            IF old.status = 'running' THEN
                new.lost_since := CASE WHEN new.lost_leases > old.lost_leases THEN old.running_since END;
            END IF;
            RETURN new;
        END
        $$
    """)
    op.execute("""
        CREATE TRIGGER counted BEFORE UPDATE OF status ON runs FOR EACH ROW
        WHEN (new.status <> old.status) EXECUTE FUNCTION count_time()
    """)


def downgrade() -> None:
    op.execute("DROP TRIGGER counted ON runs")
    op.execute("DROP FUNCTION count_time")
    op.execute("DROP INDEX runs_waiting")
    op.execute("DROP INDEX runs_unreported")
    op.execute("""
        ALTER TABLE runs
            DROP COLUMN traceparent,
            DROP COLUMN waiting_since,
            DROP COLUMN lost_since,
            DROP COLUMN queued_ms,
            DROP COLUMN human_ms,
            DROP COLUMN model_ms,
            DROP COLUMN tools_ms,
            DROP COLUMN unreported
    """)
