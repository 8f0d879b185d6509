"""Cross-modal attention targets: extract them once from a fusion teacher, train dual encoders from the cache."""

from importlib.metadata import version

__version__ = version("dde-cache")
