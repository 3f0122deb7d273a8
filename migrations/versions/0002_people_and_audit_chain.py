"""Reviews of every kind; the audit becomes a chain of hashes that the service can only append to.

The release before goes on working on this: its reviews get the defaults, its events are made canonical here.

Revision ID: 0002
"""

from alembic import op
from sqlalchemy import text

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SERVICE = "agent_service"
"""The role that the service's login is a member of. It is the cluster's, and stays when this is taken back."""
AUDIT_TABLES = ("audit_events", "audit_payloads", "audit_heads", "audit_leaves", "audit_checkpoints")
DEFINERS = ("append_audit", "seal_audit", "mark_sealed", "note_anchored")
"""What that role may do to the audit."""


def upgrade() -> None:
    _extend_reviews()
    _make_canonical()
    _chain_events()
    _make_seals()
    _make_append_only()
    _grant()


def _extend_reviews() -> None:
    op.execute("""
        ALTER TABLE reviews
            ALTER COLUMN seq DROP NOT NULL,
            ALTER COLUMN tool DROP NOT NULL,
            ADD COLUMN why         text NOT NULL DEFAULT '',
            ADD COLUMN stop_reason text,
            ADD COLUMN queue       text NOT NULL DEFAULT 'first' CHECK (queue IN ('first', 'second')),
            ADD COLUMN barred      text[] NOT NULL DEFAULT '{}',
            ADD COLUMN on_expiry   text NOT NULL DEFAULT 'end' CHECK (on_expiry IN ('end', 'reject', 'escalate')),
            ADD COLUMN expires_s   double precision NOT NULL DEFAULT 86400,
            ADD COLUMN edited      jsonb
    """)
    op.execute("CREATE INDEX reviews_by_status ON reviews (tenant, status, id)")
    op.execute("CREATE INDEX reviews_by_agent ON reviews (tenant, agent, id)")
    op.execute("CREATE INDEX reviews_by_kind ON reviews (tenant, kind, id)")
    op.execute("CREATE INDEX reviews_by_queue ON reviews (tenant, queue, id)")
    op.execute("ALTER TABLE runs ADD COLUMN erased_at timestamptz")


def _make_canonical() -> None:
    # RFC 8785 for what the service records: keys of ASCII (so bytes sort as UTF-16 does), and numbers that are integers
    # or short decimals. Postgres escapes strings as that scheme wants it. Workers send text that is canonical already;
    # this is for the few events that statements make up themselves, and for the release before.
    op.execute("""
        CREATE FUNCTION canonical_json(value jsonb) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN
            RETURN CASE jsonb_typeof(value)
                WHEN 'object' THEN '{' || coalesce((
                    SELECT string_agg(to_json(key)::text || ':' || canonical_json(member.value), ','
                                      ORDER BY key COLLATE "C")
                    FROM jsonb_each(value) AS member (key, value)), '') || '}'
                WHEN 'array' THEN '[' || coalesce((
                    SELECT string_agg(canonical_json(item), ',' ORDER BY place)
                    FROM jsonb_array_elements(value) WITH ORDINALITY AS element (item, place)), '') || ']'
                WHEN 'number' THEN trim_scale(value::numeric)::text
                ELSE value::text
            END;
        END
        $$
    """)
    # The members stand in the order of their keys: this is the canonical form, without anything to sort.
    op.execute("""
        CREATE FUNCTION audit_hash(run_id uuid, seq integer, at timestamptz, tenant text, actor text, kind text,
                                   data text, payload_sha256 bytea, previous bytea) RETURNS bytea
        LANGUAGE sql STABLE AS $$
            SELECT sha256(convert_to(
                '{"actor":' || to_json(actor)::text
                || ',"at":"' || to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
                || '","data":' || data
                || ',"kind":' || to_json(kind)::text
                || ',"payload_sha256":' || coalesce('"' || encode(payload_sha256, 'hex') || '"', 'null')
                || ',"previous":' || coalesce('"' || encode(previous, 'hex') || '"', 'null')
                || ',"run_id":"' || run_id::text
                || '","seq":' || seq::text
                || ',"tenant":' || to_json(tenant)::text || '}', 'UTF8'))
        $$
    """)


def _chain_events() -> None:
    op.execute("""
        ALTER TABLE audit_events
            ALTER COLUMN at DROP DEFAULT,
            ALTER COLUMN data TYPE json USING canonical_json(data)::json,
            ADD COLUMN payload_sha256 bytea,
            ADD COLUMN hash bytea
    """)
    op.execute("ALTER TABLE audit_heads ADD COLUMN hash bytea, ADD COLUMN is_sealed boolean NOT NULL DEFAULT false")
    op.execute("""
        DO $$
        DECLARE
            event    audit_events;
            previous audit_events;
        BEGIN
            FOR event IN SELECT * FROM audit_events ORDER BY run_id, seq LOOP
                event.hash := audit_hash(event.run_id, event.seq, event.at, event.tenant, event.actor, event.kind,
                                         event.data::text, NULL,
                                         CASE WHEN previous.run_id = event.run_id THEN previous.hash END);
                UPDATE audit_events SET hash = event.hash WHERE run_id = event.run_id AND seq = event.seq;
                UPDATE audit_heads SET hash = event.hash WHERE run_id = event.run_id AND seq = event.seq;
                previous := event;
            END LOOP;
        END
        $$
    """)
    op.execute("ALTER TABLE audit_events ALTER COLUMN hash SET NOT NULL")
    op.execute("ALTER TABLE audit_heads ALTER COLUMN hash SET NOT NULL")
    # Appending to a head that is unsealed already changes nothing that an index holds, so it stays cheap.
    op.execute("CREATE INDEX audit_heads_unsealed ON audit_heads (run_id) WHERE NOT is_sealed")
    op.execute("""
        CREATE TABLE audit_payloads (
            run_id  uuid NOT NULL,
            seq     integer NOT NULL,
            salt    bytea NOT NULL,
            payload text NOT NULL,
            PRIMARY KEY (run_id, seq)
        )
    """)
    # The planner's statistics would keep samples of what is erased.
    op.execute("ALTER TABLE audit_payloads ALTER COLUMN payload SET STATISTICS 0")
    op.execute("DROP FUNCTION append_audit(uuid, text, text, jsonb)")
    # The only way in. The head row is locked until the transaction ends, so a run's events have no gaps and one order;
    # the clock is read under that lock, so their times have the same order.
    _definer(
        "append_audit(p_run_id uuid, p_tenant text, p_actor text, p_events jsonb) RETURNS integer",
        """
        DECLARE
            head           audit_heads;
            is_new         boolean;
            entry          jsonb;
            event_at       timestamptz;
            event_data     text;
            payload        text;
            payload_salt   bytea;
            payload_digest bytea;
        BEGIN
            SELECT * INTO head FROM audit_heads WHERE run_id = p_run_id FOR UPDATE;
            is_new := NOT FOUND;
            head.seq := coalesce(head.seq, 0);
            FOR entry IN SELECT value FROM jsonb_array_elements(p_events) LOOP
                event_at := clock_timestamp();
                event_data := CASE jsonb_typeof(entry -> 'data')
                                  WHEN 'string' THEN entry ->> 'data' ELSE canonical_json(entry -> 'data') END;
                payload := entry ->> 'payload';
                payload_digest := NULL;
                IF payload IS NOT NULL THEN
                    payload_salt := uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid());
                    payload_digest := sha256(payload_salt || convert_to(payload, 'UTF8'));
                END IF;
                head.seq := head.seq + 1;
                head.hash := audit_hash(p_run_id, head.seq, event_at, p_tenant, p_actor, entry ->> 'kind', event_data,
                                        payload_digest, head.hash);
                INSERT INTO audit_events (run_id, seq, tenant, at, actor, kind, data, payload_sha256, hash)
                VALUES (p_run_id, head.seq, p_tenant, event_at, p_actor, entry ->> 'kind', event_data::json,
                        payload_digest, head.hash);
                IF payload IS NOT NULL THEN
                    INSERT INTO audit_payloads (run_id, seq, salt, payload)
                    VALUES (p_run_id, head.seq, payload_salt, payload);
                END IF;
            END LOOP;
            IF is_new THEN
                INSERT INTO audit_heads (run_id, seq, hash) VALUES (p_run_id, head.seq, head.hash);
            ELSE
                UPDATE audit_heads SET seq = head.seq, hash = head.hash, is_sealed = false WHERE run_id = p_run_id;
            END IF;
            RETURN head.seq;
        END
        """,
    )


def _make_seals() -> None:
    op.execute("""
        CREATE TABLE audit_checkpoints (
            number      bigint PRIMARY KEY,
            body        text NOT NULL,
            signature   bytea NOT NULL,
            anchored_at timestamptz
        )
    """)
    op.execute("CREATE INDEX audit_checkpoints_unanchored ON audit_checkpoints (number) WHERE anchored_at IS NULL")
    op.execute("""
        CREATE TABLE audit_leaves (
            checkpoint bigint NOT NULL,
            run_id     uuid NOT NULL,
            seq        integer NOT NULL,
            hash       bytea NOT NULL,
            PRIMARY KEY (checkpoint, run_id)
        )
    """)
    _definer(
        "seal_audit(p_number bigint, p_body text, p_signature bytea,"
        " p_run_ids uuid[], p_seqs integer[], p_hashes bytea[]) RETURNS void",
        """
        BEGIN
            INSERT INTO audit_checkpoints (number, body, signature) VALUES (p_number, p_body, p_signature);
            INSERT INTO audit_leaves (checkpoint, run_id, seq, hash)
            SELECT p_number, leaf.run_id, leaf.seq, leaf.hash
            FROM unnest(p_run_ids, p_seqs, p_hashes) AS leaf (run_id, seq, hash);
        END
        """,
    )
    # A head that somebody is appending to right now, or that has moved on, stays unsealed: the next checkpoint has it.
    # A few at a time: whoever appends to one of them waits until this transaction ends.
    _definer(
        "mark_sealed(p_number bigint, p_run_ids uuid[]) RETURNS void",
        """
        BEGIN
            WITH free AS (
                SELECT head.run_id
                FROM unnest(p_run_ids) AS sealed (run_id)
                JOIN audit_heads AS head USING (run_id)
                JOIN audit_leaves AS leaf ON leaf.checkpoint = p_number AND leaf.run_id = head.run_id
                WHERE leaf.seq = head.seq AND NOT head.is_sealed
                FOR UPDATE OF head SKIP LOCKED
            )
            UPDATE audit_heads AS head SET is_sealed = true FROM free WHERE head.run_id = free.run_id;
        END
        """,
    )
    _definer(
        "note_anchored(p_number bigint) RETURNS void",
        """
        BEGIN
            UPDATE audit_checkpoints SET anchored_at = clock_timestamp()
            WHERE number = p_number AND anchored_at IS NULL;
        END
        """,
    )


def _make_append_only() -> None:
    """Also for the owner, who would have to take the triggers away first; the chain shows what they did then."""
    op.execute("""
        CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% of % is refused: the audit is append-only', TG_OP, TG_TABLE_NAME
                USING ERRCODE = 'insufficient_privilege';
        END
        $$
    """)
    for table in AUDIT_TABLES:
        op.execute(f"""
            CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table}
            FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
        """)
    for table in ("audit_events", "audit_leaves"):
        op.execute(f"""
            CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_change()
        """)
    op.execute("""
        CREATE TRIGGER never_deleted BEFORE DELETE ON audit_heads FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """)
    op.execute("""
        CREATE TRIGGER only_forward BEFORE UPDATE ON audit_heads FOR EACH ROW
        WHEN (new.run_id <> old.run_id OR new.seq < old.seq OR new.seq = old.seq AND new.hash <> old.hash)
        EXECUTE FUNCTION refuse_change()
    """)
    op.execute("""
        CREATE TRIGGER never_deleted BEFORE DELETE ON audit_checkpoints FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """)
    op.execute("""
        CREATE TRIGGER only_anchored BEFORE UPDATE ON audit_checkpoints FOR EACH ROW
        WHEN ((new.number, new.body, new.signature) IS DISTINCT FROM (old.number, old.body, old.signature)
              OR old.anchored_at IS NOT NULL)
        EXECUTE FUNCTION refuse_change()
    """)
    op.execute("""
        CREATE TRIGGER never_changed BEFORE UPDATE ON audit_payloads FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """)
    op.execute("""
        CREATE FUNCTION refuse_silent_erasure() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF EXISTS (SELECT FROM audit_events
                       WHERE run_id = old.run_id AND kind = 'run.erased' AND at >= transaction_timestamp()) THEN
                RETURN old;
            END IF;
            RAISE EXCEPTION 'DELETE of audit_payloads is refused: a payload goes only in the transaction of its'
                            ' run.erased event' USING ERRCODE = 'insufficient_privilege';
        END
        $$
    """)
    op.execute("""
        CREATE TRIGGER erased_by_an_event BEFORE DELETE ON audit_payloads
        FOR EACH ROW EXECUTE FUNCTION refuse_silent_erasure()
    """)


def _grant() -> None:
    op.execute(f"""
        DO $$
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{SERVICE}') THEN
                CREATE ROLE {SERVICE} NOLOGIN;
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN  -- another database's migration was a moment faster
        END
        $$
    """)
    op.execute(f"GRANT SELECT, INSERT, UPDATE ON api_keys, runs, steps, reviews TO {SERVICE}")
    op.execute(f"GRANT SELECT ON alembic_version, {', '.join(AUDIT_TABLES)} TO {SERVICE}")
    for function in DEFINERS:
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO {SERVICE}")


def _definer(signature: str, body: str) -> None:
    """A function with its owner's rights, for the service's role to call. Its names mean what they mean in our schema,
    whatever the caller's search path says."""
    schema = op.get_bind().execute(text("SELECT quote_ident(current_schema())")).scalar_one()
    op.execute(f"""
        CREATE FUNCTION {signature} LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp
        AS $${body}$$
    """)


def downgrade() -> None:
    op.execute(f"REVOKE ALL ON api_keys, runs, steps, reviews, alembic_version FROM {SERVICE}")
    for function in (*DEFINERS, "canonical_json"):
        op.execute(f"DROP FUNCTION {function}")
    for table in ("audit_payloads", "audit_leaves", "audit_checkpoints"):
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP FUNCTION audit_hash")
    for trigger, table in (
        ("never_truncated", "audit_events"),
        ("append_only", "audit_events"),
        ("never_truncated", "audit_heads"),
        ("never_deleted", "audit_heads"),
        ("only_forward", "audit_heads"),
    ):
        op.execute(f"DROP TRIGGER {trigger} ON {table}")
    op.execute("DROP FUNCTION refuse_change")
    op.execute("DROP FUNCTION refuse_silent_erasure")
    op.execute("""
        ALTER TABLE audit_events
            ALTER COLUMN at SET DEFAULT now(),
            ALTER COLUMN data TYPE jsonb USING data::jsonb,
            DROP COLUMN payload_sha256,
            DROP COLUMN hash
    """)
    op.execute(f"REVOKE ALL ON audit_events, audit_heads FROM {SERVICE}")
    op.execute("DROP INDEX audit_heads_unsealed")
    op.execute("ALTER TABLE audit_heads DROP COLUMN hash, DROP COLUMN is_sealed")
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
    op.execute("ALTER TABLE runs DROP COLUMN erased_at")
    op.execute("DROP INDEX reviews_by_status")
    op.execute("DROP INDEX reviews_by_agent")
    op.execute("DROP INDEX reviews_by_kind")
    op.execute("DELETE FROM reviews WHERE seq IS NULL")
    op.execute("""
        ALTER TABLE reviews
            ALTER COLUMN seq SET NOT NULL,
            ALTER COLUMN tool SET NOT NULL,
            DROP COLUMN why,
            DROP COLUMN stop_reason,
            DROP COLUMN queue,
            DROP COLUMN barred,
            DROP COLUMN on_expiry,
            DROP COLUMN expires_s,
            DROP COLUMN edited
    """)
