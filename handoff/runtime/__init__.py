"""Drives `core` with `linux`: the runtime directory, sessions, the control thread, the Service."""
