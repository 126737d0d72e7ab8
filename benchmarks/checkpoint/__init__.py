"""How the bundled checkpoint was made: free text pairs in addition to public data, training, and choices."""
