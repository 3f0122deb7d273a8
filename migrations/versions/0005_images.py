"""Which commit the image was built from that had a run last.

Revision ID: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN git_revision text NOT NULL DEFAULT ''")


def downgrade() -> None:
    op.execute("ALTER TABLE runs DROP COLUMN git_revision")
