"""Postgres: all SQL is here. Repository functions take a connection and never commit; the caller decides.

Most writes are one statement on an autocommit connection (`engine.connect()`), which is one transaction.
"""
