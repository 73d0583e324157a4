"""The vocabulary: which tokens stay, and the tokenizer without the others."""
