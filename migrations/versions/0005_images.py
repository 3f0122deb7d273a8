"""Which commit the image was built from that had a run last, and which runs have ended last.

Revision ID: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN git_revision text NOT NULL DEFAULT ''")
    # For whoever asks how long runs take at present: those of a year are not all to be sorted for it.
    op.execute("CREATE INDEX runs_ended ON runs (ended_at) WHERE ended_at IS NOT NULL AND started_at IS NOT NULL")


def downgrade() -> None:
    op.execute("DROP INDEX runs_ended")
    op.execute("ALTER TABLE runs DROP COLUMN git_revision")
