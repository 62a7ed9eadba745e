"""Tests of what is decided, in memory."""
