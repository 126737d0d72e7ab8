"""Reading and writing checkpoints: where they lie, what their files hold, and models made of them."""
