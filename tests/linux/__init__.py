"""Tests of what Linux does."""
