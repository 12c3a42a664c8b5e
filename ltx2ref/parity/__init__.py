"""Conformance: cases, recorded tensors of other implementations, and the verdict on this machine."""
