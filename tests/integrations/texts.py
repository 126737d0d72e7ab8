"""Texts that the tests of all adapters rank."""

QUERY = "how to cook rice"
TEXTS = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france", "the cat sat"]
