"""The guarantee that cutting is the same as zeroing, tried before the user's model is touched."""
