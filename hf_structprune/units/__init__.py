"""The kinds of units that can be cut."""
