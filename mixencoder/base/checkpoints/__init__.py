"""Reading and writing checkpoints: finding their folders, checking their files, and loading models from them."""
