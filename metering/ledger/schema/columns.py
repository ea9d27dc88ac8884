"""What the tables share: names of constraints, and kinds of columns."""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, MetaData, String

__all__ = ["LINE", "NAME", "PERIOD", "POSITION", "SERIAL", "metadata"]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

NAME = String(255)
LINE = String(64)
PERIOD = String(7)
POSITION = String(80)
SERIAL = BigInteger().with_variant(Integer(), "sqlite")
