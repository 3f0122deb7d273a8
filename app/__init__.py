"""What the API and the worker share, and the API itself."""

__version__ = "0.1.0"
