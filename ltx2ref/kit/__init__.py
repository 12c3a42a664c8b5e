"""The conformance kit: files that tell a port in any language where it is wrong, and a judge of what it computed."""

from . import cases, check, export

__all__ = ["cases", "check", "export"]
