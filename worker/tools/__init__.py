"""Executing tool calls: what to do with each (`plan`), and doing it (`call`)."""
