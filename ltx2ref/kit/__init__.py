"""The conformance kit: files with which a port in any language finds its errors, and a judge of the port's results."""

from . import cases, check, export

__all__ = ["cases", "check", "export"]
