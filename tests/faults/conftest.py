"""The same models, data and programs as for the whole system."""

from tests.system.conftest import start, toys

__all__ = ["start", "toys"]
