"""What is asked for in the place of a ratio: sizes, caches, speed and quality, and the plans that reach them."""
