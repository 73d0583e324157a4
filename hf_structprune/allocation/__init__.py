"""How a budget is given out over heads and neurons (`widths`), and which layers and sublayers go (`depth`)."""
