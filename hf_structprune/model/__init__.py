"""What a model is made of, and models of other shapes."""
