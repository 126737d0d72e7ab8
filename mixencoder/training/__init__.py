"""Training a MixEncoder: data files (`data`), losses (`losses`), and transformers' Trainer around them (`trainer`)."""
