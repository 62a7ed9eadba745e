"""What Linux does, one module a facility. Imports the types of `core` only."""
