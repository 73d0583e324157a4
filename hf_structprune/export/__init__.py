"""Models in the formats of other runtimes: one file a format, each with one function `export_<format>`."""
