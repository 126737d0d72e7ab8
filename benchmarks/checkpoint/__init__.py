"""How the bundled checkpoint was made: free text pairs beside the public data, training and choice."""
