"""The tables of zndraw-joblib 0.1.7 become those of 0.2."""

from alembic import op

from zndraw_joblib import migration

revision = "joblib_0_2"
# in a host with a history of its own: the revision that came last
down_revision = None


def upgrade() -> None:
    """Keep every row; docs/upgrade.md says what becomes of each."""
    migration.upgrade(op)


def downgrade() -> None:
    """Keep every row that 0.1.7 has a place for."""
    migration.downgrade(op)
