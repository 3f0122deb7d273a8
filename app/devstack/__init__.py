"""The development stack: real PostgreSQL and Valkey from wheels, the stand-in model server, and what runs them."""
