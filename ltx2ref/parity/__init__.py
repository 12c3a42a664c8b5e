"""Conformance: cases, recorded tensors of other implementations, and the verdict on this machine."""

from . import verify as verify  # `ltx2ref.parity.verify` needs no import of its own
