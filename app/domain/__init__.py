"""Plain types. Imports nothing of the project, and of libraries only pydantic."""
