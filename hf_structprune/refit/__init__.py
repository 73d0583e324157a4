"""Closed-form re-fitting of what is left."""
