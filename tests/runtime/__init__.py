"""Tests of handoff.runtime: the parts, and a real service under bad input."""
